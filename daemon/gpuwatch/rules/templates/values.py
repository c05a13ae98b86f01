"""The values that a template works on, under the names that Go has for their types.

Python's `str`, `float`, `int` and `bool` are Go's string, float64, int and bool; a `dict` is labels,
`map[string]string`; None is what Go calls nil or no value.
"""

from __future__ import annotations

from typing import Any, Final, TypeAlias

import msgspec

Value: TypeAlias = Any  # Go's interface {}: what it is shows when it is used

STRING: Final = "string"
ANY: Final = "interface {}"
SAMPLE: Final = "*template.sample"
VECTOR: Final = "template.queryResult"
_TYPES: Final = {str: STRING, float: "float64", int: "int", bool: "bool", dict: "map[string]string"}


class Fault(Exception):  # noqa: N818 (no mistake of ours: Go prints it)
    """What a function says when it fails."""


class Struct(msgspec.Struct):
    """A value with named fields; `go_type` begins with `*` if Go would hold a pointer to it."""

    go_type: str
    fields: dict[str, Value]


class Stringer:
    """A value that says itself how it reads, by `__str__`."""

    __slots__ = ()
    go_type = ""


class Vector(list[Struct]):
    """A query's result: samples, each with `Labels` and `Value`."""

    go_type = VECTOR


class Args(dict[str, Value]):
    """What the function `args` makes; `weight` counts the args in it, and in those, and itself."""

    go_type = "map[string]interface {}"
    weight = 1


class Byte(int):
    """A byte of a string."""

    go_type = "uint8"


class Html(str):
    """A text that says it is safe HTML."""

    __slots__ = ()
    go_type = "template.HTML"


class Function(msgspec.Struct, frozen=True):
    """What a template can call. `takes` are the types of its arguments; `...` before the last: any number."""

    takes: tuple[str, ...]
    call: Any  # Callable[..., Value]; raises Fault
    needs_context: bool = False  # the call's first argument is then the Context

    @property
    def is_variadic(self) -> bool:
        """Whether the last argument may be left out or repeated."""
        return self.takes[-1:] != () and self.takes[-1].startswith("...")

    def type_of(self, index: int) -> str:
        """The type of an argument, counted from 0."""
        return self.takes[min(index, len(self.takes) - 1)].removeprefix("...")


def go_type(value: Value) -> str:
    """The name of a value's type."""
    return _TYPES.get(type(value)) or str(getattr(value, "go_type", "<nil>"))


def is_pointer(value: Value) -> bool:
    """Whether Go holds a pointer to it."""
    return go_type(value).startswith("*")


def truth(value: Value) -> bool:
    """Whether `if` takes a value as true: not zero, not empty, not nil."""
    return value is not None and (is_pointer(value) or bool(value))
