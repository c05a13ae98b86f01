"""The tree of a template; says how each part reads in an error and evaluates nothing.

`position` counts characters from 0 and is where Go would point.
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from gpuwatch.rules.templates.literals import quote


class Node(msgspec.Struct, frozen=True):
    """A part of a template."""

    position: int


Body: TypeAlias = tuple[Node, ...]  # Text, Pipe, Branch, Range, Leave, Include


class Literal(Node, frozen=True):
    """A string, number or boolean as written; a whole number may be too large for Go."""

    text: str
    value: str | float | bool

    def __str__(self) -> str:
        return self.text


class Dot(Node, frozen=True):
    """`.`, what a template, a `with` or a `range` is about."""

    def __str__(self) -> str:
        return "."


class Nil(Node, frozen=True):
    """`nil`."""

    def __str__(self) -> str:
        return "nil"


class Word(Node, frozen=True):
    """The name of a function."""

    name: str

    def __str__(self) -> str:
        return self.name


class Field(Node, frozen=True):
    """`.Labels.gpu`."""

    names: tuple[str, ...]

    def __str__(self) -> str:
        return "".join(f".{name}" for name in self.names)


class Variable(Node, frozen=True):
    """`$labels.gpu`: the variable's name with its `$`, then fields."""

    name: str
    names: tuple[str, ...] = ()

    def __str__(self) -> str:
        return ".".join((self.name, *self.names))


class Chain(Node, frozen=True):
    """`(first (query "up")).Value`: fields of what something else yields."""

    of: Node
    names: tuple[str, ...]

    def __str__(self) -> str:
        return ".".join((_in_parentheses(self.of), *self.names))


class Command(Node, frozen=True):
    """A function or an operand, and arguments."""

    args: tuple[Node, ...]

    def __str__(self) -> str:
        return " ".join(_in_parentheses(arg) for arg in self.args)


class Pipe(Node, frozen=True):
    """Commands, each given what the one before it yields; the last one's result goes into variables.

    In a body it is an action, which prints what goes into no variable.
    """

    commands: tuple[Command, ...]
    variables: tuple[str, ...] = ()
    assigns: bool = False  # `=`: the variables are there already

    def __str__(self) -> str:
        sign = " = " if self.assigns else " := "
        names = ", ".join(self.variables) + sign if self.variables else ""
        return names + " | ".join(str(command) for command in self.commands)


class Text(Node, frozen=True):
    """What stands outside of actions."""

    text: str


class Branch(Node, frozen=True):
    """`if` or `with`: the first body whose pipe yields something true."""

    is_with: bool
    cases: tuple[tuple[Pipe, Body], ...]
    otherwise: Body


class Range(Node, frozen=True):
    """The body for each element, or `otherwise` if there is none."""

    pipe: Pipe
    body: Body
    otherwise: Body


class Leave(Node, frozen=True):
    """`{{ break }}` or `{{ continue }}`."""

    breaks: bool


class Include(Node, frozen=True):
    """`{{ template "name" pipe }}`."""

    name: str
    pipe: Pipe | None

    def __str__(self) -> str:
        about = "" if self.pipe is None else f" {self.pipe}"
        return f"{{{{template {quote(self.name)}{about}}}}}"


def _in_parentheses(node: Node) -> str:
    return f"({node})" if isinstance(node, Pipe) else str(node)
