"""Reads what stands in an action, tokens in, a pipe out; knows no control structure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NoReturn

from gpuwatch.errors import GpuwatchError
from gpuwatch.rules.templates import literals, nodes

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gpuwatch.rules.templates.lexer import Token

MAX_NESTING: Final = 50
GIVEN: Final = ("$", "$labels", "$externalLabels", "$externalURL", "$value")
_OPERANDS: Final = frozenset(["string", "char", "variable", "field", "dot", "number", "word", "open", "nil"])
_CONSTANTS: Final = (nodes.Literal, nodes.Dot, nodes.Nil)


class TemplateError(GpuwatchError):
    """A template that Prometheus would not load; `position` counts characters from 0."""

    def __init__(self, what: str, position: int) -> None:
        """`what` is worded as Prometheus words it."""
        self.what = what
        self.position = position
        super().__init__(what)


class PipelineParser:
    """Reads tokens from left to right; `knows` tells which functions there are."""

    def __init__(self, tokens: Sequence[Token], knows: Callable[[str], bool]) -> None:
        """The last token is an eof or an error, and is never passed."""
        self._tokens = tokens
        self._index = 0
        self._knows = knows
        self._variables = list(GIVEN)
        self._nesting = 0

    @property
    def _next(self) -> Token:
        return self._tokens[self._index]

    def _take(self) -> Token:
        token = self._tokens[self._index]
        self._index = min(self._index + 1, len(self._tokens) - 1)
        return token

    def _expect(self, kind: str, context: str) -> Token:
        token = self._take()
        if token.kind != kind:
            self._unexpected(token, context)
        return token

    def _unexpected(self, token: Token, context: str) -> NoReturn:
        what = token.text if token.kind == "error" else f"unexpected {token} in {context}"
        raise TemplateError(what, token.position)

    def _deeper(self) -> None:
        self._nesting += 1
        if self._nesting > MAX_NESTING:
            what = f"nested deeper than {MAX_NESTING}: use variables or define templates"
            raise TemplateError(what, self._next.position)

    def _pipe(self, context: str, end: str = "close") -> nodes.Pipe:
        """Everything up to and with a token of the kind `end`."""
        self._deeper()
        position = self._next.position
        names, assigns = self._declared(context)
        commands = []
        while self._next.kind != end:
            if self._next.kind not in _OPERANDS:
                self._unexpected(self._next, context)
            commands.append(self._command())
        self._take()
        self._nesting -= 1
        if not commands:
            raise TemplateError(f"missing value for {context}", position)
        for stage, command in enumerate(commands[1:], 2):
            if isinstance(command.args[0], _CONSTANTS):
                raise TemplateError(f"non executable command in pipeline stage {stage}", command.position)
        return nodes.Pipe(position, tuple(commands), names, assigns)

    def _declared(self, context: str) -> tuple[tuple[str, ...], bool]:
        """The variables before `:=` or `=`, and whether it is `=`."""
        names: list[str] = []
        while self._next.kind == "variable":
            after = self._tokens[self._index + 1]
            if after.kind not in {"declare", "assign"} and after.text != ",":
                break
            names.append(self._take().text)
            self._variables.append(names[-1])
            self._take()
            if after.text != ",":
                return tuple(names), after.kind == "assign"
            self._check_second(context, len(names))
        return tuple(names), False

    def _check_second(self, context: str, count: int) -> None:
        """What may follow a comma: only a `range` declares two variables."""
        if context == "range" and count == 1:
            if self._next.kind in {"variable", "close", "shut"}:
                return
            raise TemplateError("range can only initialize variables", self._next.position)
        raise TemplateError(f"too many declarations in {context}", self._next.position)

    def _command(self) -> nodes.Command:
        position = self._next.position
        args = [self._operand()]
        while self._next.spaced and self._next.kind in _OPERANDS:
            args.append(self._operand())
        after = self._next
        if after.kind == "pipe":
            self._take()
        elif after.kind not in {"close", "shut"}:
            self._unexpected(after, "operand")
        return nodes.Command(position, tuple(args))

    def _operand(self) -> nodes.Node:
        term = self._term()
        position = self._next.position  # Go points at the second name of a chain
        names: tuple[str, ...] = ()
        while self._next.kind == "field" and not self._next.spaced:
            names += (self._take().text[1:],)
        if not names:
            return term
        if isinstance(term, nodes.Field):
            return nodes.Field(position, term.names + names)
        if isinstance(term, nodes.Variable):
            return nodes.Variable(position, term.name, names)
        if isinstance(term, _CONSTANTS):
            raise TemplateError(f"unexpected . after term {literals.quote(str(term))}", position)
        return nodes.Chain(position, term, names)

    def _term(self) -> nodes.Node:
        token = self._take()
        if token.kind == "open":
            return self._pipe("parenthesized pipeline", "shut")
        if token.kind == "variable" and token.text not in self._variables:
            raise TemplateError(f"undefined variable {literals.quote(token.text)}", token.position)
        term = _leaf(token)
        if isinstance(term, nodes.Word) and not self._knows(term.name):
            raise TemplateError(f"function {literals.quote(term.name)} not defined", token.position)
        return term


def _leaf(token: Token) -> nodes.Node:
    at, text = token.position, token.text
    match token.kind:
        case "dot":
            return nodes.Dot(at)
        case "nil":
            return nodes.Nil(at)
        case "field":
            return nodes.Field(at, (text[1:],))
        case "variable":
            return nodes.Variable(at, text)
        case "word" if text not in {"true", "false"}:
            return nodes.Word(at, text)
        case _:
            return nodes.Literal(at, text, _constant(token))


def _constant(token: Token) -> str | float | bool:
    """The value of a string, character, number, `true` or `false`."""
    try:
        match token.kind:
            case "string":
                return literals.unquote(token.text)
            case "char":
                return literals.char(token.text)
            case "number":
                return literals.number(token.text)
            case _:
                return token.text == "true"
    except ValueError as error:
        raise TemplateError(str(error), token.position) from error
