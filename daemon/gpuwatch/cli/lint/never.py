"""Tells of an alert's expression that it can never be true, or always is; it needs no sample for that."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Final, NamedTuple

from gpuwatch import promql
from gpuwatch.cli.memory import Memory
from gpuwatch.promql.arithmetic import COMPARISON
from gpuwatch.promql.ast import Aggregation, Binary, Call, Expr, NumberLiteral, Paren, Unary, unwrapped, walk

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_FLIPPED: Final = {">": "<", "<": ">", ">=": "<=", "<=": ">="}
_AT_LEAST_ONE: Final = frozenset({"count", "count_over_time"})
_ONE: Final = frozenset({"group", "absent", "absent_over_time", "present_over_time"})


class _Limit(NamedTuple):
    """`operand op number`; where it is written."""

    operand: Expr
    op: str
    number: float
    position: int

    def allows(self, value: float) -> bool:
        return COMPARISON[self.op](value, self.number)


def never_true(expr: Expr) -> Iterator[tuple[int, str]]:
    """Where an expression asks for what no value is, and why."""
    together: dict[object, list[_Limit]] = {}
    for limit in _limits(expr):
        together.setdefault(_shape(limit.operand), []).append(limit)
    for limits in together.values():
        operand = unwrapped(limits[0].operand)
        if not _is_possible([*limits, *_known_of(operand)]):
            asked = " and ".join(f"{limit.op} {limit.number:.15g}" for limit in limits)
            yield (
                limits[-1].position,
                f"nothing is ever {asked} here{_why(operand)}, so the alert never fires",
            )


def always_true(expr: Expr) -> Iterator[tuple[int, str]]:
    """Where an expression has a value whatever is compared, and why; a bare number is meant."""
    inner = unwrapped(expr)
    if isinstance(inner, Binary) and inner.return_bool:
        yield inner.position, '"bool" makes 0 or 1 of a comparison, and an alert fires for both; leave it out'
    elif expr.type is promql.ValueType.SCALAR and not isinstance(inner, NumberLiteral):
        yield expr.position, "a scalar is always there, so the alert always fires; compare a vector"


def _limits(expr: Expr) -> Iterator[_Limit]:
    """The comparisons with a constant that must all hold for an element of the result."""
    expr = unwrapped(expr)
    if not isinstance(expr, Binary):
        return
    if expr.op in {"and", "unless"}:
        yield from _limits(expr.left)
        if expr.op == "and" and not (expr.matching.on or expr.matching.labels):
            yield from _limits(expr.right)
    elif expr.op in COMPARISON and not expr.return_bool:
        left, right = _constant(expr.left), _constant(expr.right)
        if right is not None and left is None:
            yield _Limit(_valued(expr.left), expr.op, right, expr.position)
            yield from _limits(expr.left)
        elif left is not None and right is None:
            yield _Limit(_valued(expr.right), _FLIPPED.get(expr.op, expr.op), left, expr.position)
            yield from _limits(expr.right)


def _valued(expr: Expr) -> Expr:
    """What gives the values of an expression: `x` of `(x > 5 and y)`."""
    expr = unwrapped(expr)
    while isinstance(expr, Binary) and not expr.return_bool:
        if expr.op in {"and", "unless"} or (expr.op in COMPARISON and _constant(expr.left) is None):
            expr = unwrapped(expr.left)
        elif expr.op in COMPARISON:
            expr = unwrapped(expr.right)
        else:
            break
    return expr


def _constant(expr: Expr) -> float | None:
    """The value of an expression of numbers alone."""
    if not all(isinstance(node, NumberLiteral | Paren | Unary | Binary) for node, _ in walk(expr)):
        return None
    value = promql.evaluate(expr, Memory(), 0).value
    return value if isinstance(value, float) else None


def _known_of(operand: Expr) -> Iterator[_Limit]:
    name = _function(operand)
    if name in _AT_LEAST_ONE:
        yield _Limit(operand, ">=", 1, operand.position)
    elif name in _ONE:
        yield _Limit(operand, "==", 1, operand.position)


def _why(operand: Expr) -> str:
    name = _function(operand)
    if name in _AT_LEAST_ONE:
        return f" ({name}() of nothing is nothing, not 0: absent() tells what is not there)"
    return f" ({name}() is 1 or nothing)" if name in _ONE else ""


def _function(expr: Expr) -> str:
    match expr:
        case Aggregation(op=name) | Call(function=name):
            return name
        case _:
            return ""


def _is_possible(limits: Iterable[_Limit]) -> bool:
    """Whether some value satisfies all: one of the numbers, between two of them, or beyond."""
    limits = list(limits)
    cuts = sorted({-math.inf, math.inf, *(limit.number for limit in limits if not math.isnan(limit.number))})
    values = [*cuts, *(math.nextafter(low, math.inf) for low in cuts)]
    return any(all(limit.allows(value) for limit in limits) for value in values)


def _shape(node: object) -> object:
    """The same for the same expression, wherever it is written."""
    if dataclasses.is_dataclass(node):
        named = ((f.name, getattr(node, f.name)) for f in dataclasses.fields(node) if f.name != "position")
        return (type(node).__name__, *((name, _shape(value)) for name, value in named))
    return tuple(map(_shape, node)) if isinstance(node, tuple) else node
