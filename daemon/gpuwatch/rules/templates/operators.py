"""The functions that Go's templates have of themselves: comparing, taking apart, printing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from gpuwatch.rules.templates import gofmt
from gpuwatch.rules.templates.literals import to_bytes, to_text
from gpuwatch.rules.templates.values import (
    ANY,
    STRING,
    Byte,
    Fault,
    Function,
    Html,
    Value,
    go_type,
    is_pointer,
    truth,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

_KINDS: Final = {str: "string", Html: "string", int: "int", float: "float", bool: "bool", Byte: "uint"}
_WHOLE: Final = frozenset({"int", "uint"})


def _kind(value: Value) -> str:
    """What a value is compared as; empty if it is none of the basic kinds."""
    kind = _KINDS.get(type(value), "")
    return "int" if not kind and isinstance(value, int) and not is_pointer(value) else kind


def _comparable(one: Value, other: Value) -> bool:
    """Whether two values are of one kind; whole numbers are, signed or not."""
    kinds = {_kind(one), _kind(other)}
    return len(kinds) == 1 or kinds == _WHOLE


def _eq(one: Value, *others: Value) -> bool:
    if not others:
        raise Fault("missing argument for comparison")
    return any(_equal(one, other) for other in others)


def _equal(one: Value, other: Value) -> bool:
    if one is None or other is None:
        return one is other
    if not _comparable(one, other):
        raise Fault(f"incompatible types for comparison: {go_type(one)} and {go_type(other)}")
    if _kind(one):
        return bool(one == other)
    if type(one) is not type(other):
        types = go_type(one), go_type(other)
        raise Fault(gofmt.printf("non-comparable types %s: %s, %s: %v", one, *types, other))
    if isinstance(one, dict | list):
        raise Fault(gofmt.printf("non-comparable type %s: %s", other, go_type(other)))
    return one is other


def _ne(one: Value, other: Value) -> bool:
    return not _equal(one, other)


def _lt(one: Value, other: Value) -> bool:
    if not _kind(one) or not _kind(other):
        raise Fault("invalid type for comparison")
    if not _comparable(one, other):
        raise Fault(f"incompatible types for comparison: {go_type(one)} and {go_type(other)}")
    if isinstance(one, bool):
        raise Fault("invalid type for comparison")
    if isinstance(one, str):
        return to_bytes(one) < to_bytes(other)
    return bool(one < other)


def _le(one: Value, other: Value) -> bool:
    return _lt(one, other) or _equal(one, other)


def _gt(one: Value, other: Value) -> bool:
    return not _le(one, other)  # so a NaN is greater than anything, as in Go


def _ge(one: Value, other: Value) -> bool:
    return not _lt(one, other)


def _not(value: Value) -> bool:
    return not truth(value)


def _length(value: Value) -> int:
    if isinstance(value, str):
        return len(to_bytes(value))
    if isinstance(value, dict | list):
        return len(value)
    if value is None:
        raise Fault("reflect: call of reflect.Value.Type on zero Value")
    raise Fault(f"len of type {go_type(value).removeprefix('*')}")


def _index(item: Value, *indexes: Value) -> Value:
    if item is None:
        raise Fault("index of untyped nil")
    for index in indexes:
        item = _element(item, index)
    return item


def _element(item: Value, index: Value) -> Value:
    if isinstance(item, dict):
        return _entry(item, index)
    if item is None:
        raise Fault("index of nil pointer")
    if not isinstance(item, str | list):
        raise Fault(f"can't index item of type {go_type(item).removeprefix('*')}")
    items: Sequence[Value] = to_bytes(item) if isinstance(item, str) else item
    at = _bound(index, len(items))
    if at == len(items):
        raise Fault(f"reflect: {'string' if isinstance(item, str) else 'slice'} index out of range")
    return Byte(items[at]) if isinstance(item, str) else items[at]


def _entry(item: dict[str, Value], key: Value) -> Value:
    if key is None:
        raise Fault("value is nil; should be of type string")
    if type(key) is not str:
        raise Fault(f"value has type {go_type(key)}; should be string")
    return item.get(key, "" if type(item) is dict else None)


def _bound(index: Value, limit: int) -> int:
    if index is None:
        raise Fault("cannot index slice/array with nil")
    if _kind(index) not in _WHOLE:
        raise Fault(f"cannot index slice/array with type {go_type(index)}")
    if not 0 <= index <= limit:
        raise Fault(f"index out of range: {int(index)}")
    return int(index)


def _slice(item: Value, *indexes: Value) -> Value:
    if item is None:
        raise Fault("slice of untyped nil")
    if len(indexes) > 3:
        raise Fault(f"too many slice indexes: {len(indexes)}")
    if not isinstance(item, str | list):
        raise Fault(f"can't slice item of type {go_type(item).removeprefix('*')}")
    if isinstance(item, str) and len(indexes) == 3:
        raise Fault("cannot 3-index slice a string")
    items = to_bytes(item) if isinstance(item, str) else item
    bounds = [_bound(index, len(items)) for index in indexes]
    start, stop, *most = bounds + [0, len(items)][len(bounds) :]
    for low, high in ((start, stop), (stop, most[0] if most else stop)):
        if low > high:
            raise Fault(f"invalid slice index: {low} > {high}")
    part = items[start:stop]
    return to_text(part) if isinstance(part, bytes) else type(item)(part)


def _call(name: str, function: Value, *_: Value) -> Value:
    """No value of ours is a function."""
    if function is None:
        raise Fault("call of nil")
    raise Fault(f"non-function {name} of type {go_type(function)}")


_ANYTHING: Final = (f"...{ANY}",)
_TWO: Final = (ANY, ANY)
_MORE: Final = (ANY, f"...{ANY}")

FUNCTIONS: Final = {
    "and": Function(_MORE, None),  # these two evaluate no more arguments than they need: operands.py
    "or": Function(_MORE, None),
    "call": Function(_MORE, _call),
    "not": Function((ANY,), _not),
    "eq": Function(_MORE, _eq),
    "ne": Function(_TWO, _ne),
    "lt": Function(_TWO, _lt),
    "le": Function(_TWO, _le),
    "gt": Function(_TWO, _gt),
    "ge": Function(_TWO, _ge),
    "len": Function((ANY,), _length),
    "index": Function(_MORE, _index),
    "slice": Function(_MORE, _slice),
    "print": Function(_ANYTHING, gofmt.sprint),
    "printf": Function((STRING, *_ANYTHING), gofmt.printf),
    "println": Function(_ANYTHING, gofmt.sprintln),
}
