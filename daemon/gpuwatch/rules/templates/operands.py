"""Evaluates the pipelines of a template as Go does, types, order and errors alike; writes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, cast

import msgspec

from gpuwatch.rules.templates import nodes
from gpuwatch.rules.templates.functions import function
from gpuwatch.rules.templates.literals import quote, to_bytes
from gpuwatch.rules.templates.values import (
    ANY,
    SAMPLE,
    STRING,
    VECTOR,
    Args,
    Fault,
    Function,
    Struct,
    Value,
    go_type,
    truth,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpuwatch.rules.templates.nodes import Node, Pipe
    from gpuwatch.rules.templates.template import Context

MAX_STEPS: Final = 50_000
MAX_DEPTH: Final = 60
_COSTS: Final = {"query": 1000, "match": 100, "reReplaceAll": 100}  # steps, beside those for long texts
_CHARACTERS_A_STEP: Final = 16
_PREAMBLE: Final = 112  # bytes: Prometheus declares its variables before the text, and counts columns so
_ABSENT: Final = object()  # nothing comes through the pipe
_CAN_BE_NIL: Final = frozenset([ANY, SAMPLE, VECTOR])
_CONSTANTS: Final = (nodes.Literal, nodes.Dot, nodes.Nil)


class Failure(Exception):  # noqa: N818 (no mistake of ours: it becomes the text of an annotation)
    """A template failed; the text is Go's."""


class Given(msgspec.Struct, frozen=True):
    """What a part of a pipeline is given: `.`, the arguments beside it, what comes through the pipe."""

    dot: Value
    args: Sequence[Node] = ()
    final: Value = _ABSENT

    @property
    def arity(self) -> int:
        """How many arguments there are."""
        return len(self.args) + (self.final is not _ABSENT)


class Operands:
    """The state of an expansion: variables, the bounds, and the node that an error is laid to."""

    def __init__(self, source: str, name: str, context: Context) -> None:
        """`name` is the template's own, as Go knows it."""
        self._source = source
        self._name = self._running = name
        self._context = context
        self._node: Node | None = None
        self._variables: list[tuple[str, Value]] = []
        self._steps = self._depth = 0

    def _failure(self, what: str) -> Failure:
        if self._node is None:
            return Failure(f"template: {self._running}: {what}")
        before = self._source[: self._node.position]
        line = before.count("\n") + 1
        column = len(to_bytes(before[before.rfind("\n") + 1 :])) + (_PREAMBLE if line == 1 else 0)
        place = f"{self._name}:{line}:{column}: executing {quote(self._running)} at <{self._node}>"
        return Failure(f"template: {place}: {what}")

    def _spend(self, steps: int) -> None:
        self._steps += steps
        if self._steps > MAX_STEPS:
            raise self._failure(f"takes more than {MAX_STEPS} steps")

    def _descend(self) -> None:
        self._spend(1)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._failure(f"exceeded maximum template depth ({MAX_DEPTH})")

    # ---- pipelines

    def _pipe(self, pipe: Pipe, dot: Value) -> Value:
        self._node = pipe
        self._descend()
        value: Value = _ABSENT
        for command in pipe.commands:
            value = self._command(command, Given(dot, command.args[1:], value))
        self._depth -= 1
        for name in pipe.variables:
            if pipe.assigns:
                self._assign(name, value)
            else:
                self._variables.append((name, value))
        return value

    def _assign(self, name: str, value: Value) -> None:
        for index in reversed(range(len(self._variables))):
            if self._variables[index][0] == name:
                self._variables[index] = (name, value)
                return
        raise self._failure(f"undefined variable: {name}")

    def _command(self, command: nodes.Command, given: Given) -> Value:
        first = command.args[0]
        if isinstance(first, (nodes.Word, *_CONSTANTS)):
            self._node = first
        if isinstance(first, nodes.Word):
            return self._call(function(first.name), first.name, command, given)
        if isinstance(first, (nodes.Pipe, *_CONSTANTS)):
            self._refuse_arguments(first, given)
        if isinstance(first, nodes.Nil):
            raise self._failure("nil is not a command")
        return self._operand(first, given)

    def _refuse_arguments(self, node: Node, given: Given) -> None:
        if given.arity:
            raise self._failure(f"can't give argument to non-function {node}")

    # ---- operands

    def _operand(self, node: Node, given: Given) -> Value:
        """What a node yields; only a function or a method takes the arguments."""
        if isinstance(node, nodes.Dot):
            return given.dot
        if isinstance(node, nodes.Literal):
            return self._constant(node)
        if isinstance(node, nodes.Pipe):
            return self._pipe(node, given.dot)
        self._node = node
        if isinstance(node, nodes.Word):
            return self._call(function(node.name), node.name, node, given)
        if isinstance(node, nodes.Chain):
            self._node = node.of
            return self._fields(self._operand(node.of, Given(given.dot)), node, given)
        receiver = self._variable(node.name) if isinstance(node, nodes.Variable) else given.dot
        return self._fields(receiver, cast("nodes.Field | nodes.Variable", node), given)

    def _variable(self, name: str) -> Value:
        for known, value in reversed(self._variables):
            if known == name:
                return value
        raise self._failure(f"undefined variable: {name}")

    def _constant(self, node: nodes.Literal) -> Value:
        self._node = node
        if type(node.value) is int and not -(2**63) <= node.value < 2**63:
            raise self._failure(f"{node} overflows int")
        return node.value

    def _fields(
        self, receiver: Value, node: nodes.Field | nodes.Variable | nodes.Chain, given: Given
    ) -> Value:
        """`.a.b.c` of a value; a variable may have no names behind it."""
        if not node.names:
            self._refuse_arguments(node, given)
        is_any = False  # whether Go holds the receiver as a value of any type
        for index, name in enumerate(node.names, 1):
            of_this = given if index == len(node.names) else Given(given.dot)
            owner = receiver
            receiver = self._field(owner, name, node, of_this, is_any=is_any)
            is_any = isinstance(owner, Args) or (isinstance(owner, Struct) and name == "Value")
        return receiver

    def _field(self, receiver: Value, name: str, node: Node, given: Given, *, is_any: bool) -> Value:
        if receiver is None:
            if is_any:
                raise self._failure(f"nil pointer evaluating {ANY}.{name}")
            return None
        method = getattr(receiver, "methods", {}).get(name)
        if method is not None:
            return self._call(method, name, node, given, receiver)
        if isinstance(receiver, Struct) and name in receiver.fields:
            if given.arity:
                raise self._failure(f"{name} has arguments but cannot be invoked as function")
            return receiver.fields[name]
        if isinstance(receiver, dict):
            if given.arity:
                raise self._failure(f"{name} is not a method but has arguments")
            return receiver.get(name, None if isinstance(receiver, Args) else "")
        raise self._failure(f"can't evaluate field {name} in type {ANY if is_any else go_type(receiver)}")

    # ---- calls

    def _call(self, called: Function, name: str, node: Node, given: Given, *bound: Value) -> Value:
        """Call a function, or a method of `bound`."""
        self._check_count(called, name, given)
        if called.call is None:
            return self._and_or(name, given)
        values = [self._argument(arg, called.type_of(at), given.dot) for at, arg in enumerate(given.args)]
        if given.final is not _ABSENT:
            values.append(self._checked(given.final, called.type_of(len(values))))
        characters = sum(len(value) for value in values if isinstance(value, str))
        self._spend(_COSTS.get(name, 0) + characters // _CHARACTERS_A_STEP)
        if name == "call":
            values.insert(0, str(given.args[0]) if given.args else _as_go_text(values[0]))
        if called.needs_context:
            bound = (self._context,)
        try:
            return called.call(*bound, *values)
        except Fault as fault:
            self._node = node
            raise self._failure(f"error calling {name}: {fault}") from fault

    def _check_count(self, called: Function, name: str, given: Given) -> None:
        fixed = len(called.takes) - called.is_variadic
        if called.is_variadic and given.arity < fixed:
            raise self._failure(
                f"wrong number of args for {name}: want at least {fixed} got {len(given.args)}"
            )
        if not called.is_variadic and given.arity != fixed:
            raise self._failure(f"wrong number of args for {name}: want {fixed} got {given.arity}")

    def _and_or(self, name: str, given: Given) -> Value:
        """The first argument that decides, else the last; those after it are not evaluated."""
        value = None
        for arg in given.args:
            value = self._argument(arg, ANY, given.dot)
            if truth(value) == (name == "or"):
                return value
        return value if given.final is _ABSENT else given.final

    def _argument(self, node: Node, want: str, dot: Value) -> Value:
        self._node = node
        if isinstance(node, nodes.Literal):
            return self._literal(node, want)
        if isinstance(node, nodes.Nil):
            if want in _CAN_BE_NIL:
                return None
            raise self._failure(f"cannot assign nil to {want}")
        return self._checked(self._operand(node, Given(dot)), want)

    def _literal(self, node: nodes.Literal, want: str) -> Value:
        if want == ANY:
            return self._constant(node)
        if want == STRING:
            if isinstance(node.value, str):
                return node.value
            raise self._failure(f"expected string; found {node}")
        if want == "time.Duration":
            if type(node.value) in {int, float} and node.value == int(node.value):
                return int(node.value)
            raise self._failure(f"expected integer; found {node}")
        raise self._failure(f"can't handle {node} for arg of type {want}")

    def _checked(self, value: Value, want: str) -> Value:
        """A value as an argument of a type; a pointer will do for what it points to."""
        if want == ANY or want == go_type(value).removeprefix("*") or want == go_type(value):
            return value
        if value is None:
            if want in _CAN_BE_NIL:
                return None
            raise self._failure(f"invalid value; expected {want}")
        raise self._failure(f"wrong type for value; expected {want}; got {go_type(value)}")


def _as_go_text(value: Value) -> str:
    """Go's `reflect.Value.String`."""
    return value if isinstance(value, str) else f"<{go_type(value)} Value>"
