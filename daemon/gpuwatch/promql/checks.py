"""Refuses what parses but means nothing in PromQL: wrong types, impossible matchings; evaluates nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from gpuwatch.errors import QueryError
from gpuwatch.promql.arithmetic import COMPARISON
from gpuwatch.promql.ast import (
    Binary,
    Call,
    Cardinality,
    Expr,
    Matching,
    MatrixSelector,
    Subquery,
    ValueType,
    VectorSelector,
    walk,
)
from gpuwatch.promql.selection import Matcher, test_of
from gpuwatch.promql.signatures import EXPERIMENTAL, FUNCTIONS

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_DEPTH: Final = 100
_MAX_INSTANT_S: Final = 2**63 / 1000
COMPARISONS: Final = frozenset(COMPARISON)
SET_OPERATORS: Final = frozenset({"and", "or", "unless"})
_OPERANDS: Final = frozenset({ValueType.SCALAR, ValueType.VECTOR})


def check_depth(expr: Expr) -> None:
    """QueryError if the tree is deeper than the evaluator may recurse."""
    for node, depth in walk(expr):
        if depth > MAX_DEPTH:
            raise QueryError(f"the expression is nested deeper than {MAX_DEPTH} levels", node.position)


def check_type(expr: Expr, wanted: ValueType, where: str) -> None:
    """QueryError unless `expr` yields `wanted`."""
    if expr.type is not wanted:
        raise QueryError(f"expected type {wanted} in {where}, got {expr.type}", expr.position)


def check_unary(inner: Expr, position: int) -> None:
    """QueryError unless an operand may have a sign."""
    if inner.type not in _OPERANDS:
        allowed = "expressions of type scalar or instant vector"
        raise QueryError(f"unary expression only allowed on {allowed}, got {inner.type}", position)


def check_call(call: Call) -> None:
    """QueryError unless the function exists and takes these arguments."""
    signature = FUNCTIONS[call.function]
    if not signature.accepts(len(call.args)):
        bound = "at least " if signature.optional < 0 else "at most " if signature.optional else ""
        wanted = len(signature.args) + min(signature.optional, 0)
        raise QueryError(
            f'expected {bound}{wanted} argument(s) in call to "{call.function}", got {len(call.args)}',
            call.position,
        )
    for index, arg in enumerate(call.args):
        check_type(arg, signature.arg(index), f'call to function "{call.function}"')


def unknown_function(name: str, position: int) -> QueryError:
    """What to say of a function that there is not."""
    if name in EXPERIMENTAL:
        return experimental(f"{name}()", position)
    return QueryError(f'unknown function with name "{name}"', position)


def experimental(what: str, position: int) -> QueryError:
    """What to say of what Prometheus has behind a feature flag only."""
    return QueryError(
        f"{what} is experimental in Prometheus, off by default there, and not offered here", position
    )


def timed(expr: Expr, modifier: str, position: int) -> VectorSelector | Subquery:
    """What a modifier of time applies to; QueryError unless that is a selector or a subquery."""
    inner = expr.selector if isinstance(expr, MatrixSelector) else expr
    if isinstance(inner, VectorSelector | Subquery):
        return inner
    what = "an instant vector selector or range vector selector or a subquery"
    raise QueryError(f"{modifier} must be preceded by {what}", position)


def instant_ms(seconds: float, position: int) -> int:
    """The instant of an @ modifier; QueryError if milliseconds in 63 bits cannot hold it."""
    if not abs(seconds) < _MAX_INSTANT_S:
        raise QueryError(f"timestamp out of bounds for @ modifier: {seconds:f}", position)
    return round(seconds * 1000)


def check_binary(binary: Binary) -> None:
    """QueryError unless the operator takes these operands and modifiers."""
    op, left, right = binary.op, binary.left, binary.right
    for side in (left, right):
        if side.type not in _OPERANDS:
            raise QueryError(
                "binary expression must contain only scalar and instant vector types", side.position
            )
    scalars = [side.type for side in (left, right)].count(ValueType.SCALAR)
    if binary.return_bool and op not in COMPARISONS:
        raise QueryError("bool modifier can only be used on comparison operators", binary.position)
    if op in COMPARISONS and scalars == 2 and not binary.return_bool:
        raise QueryError("comparisons between scalars must use BOOL modifier", binary.position)
    if op in SET_OPERATORS and scalars:
        raise QueryError(f'set operator "{op}" not allowed in binary scalar expression', binary.position)
    _check_matching(binary, scalars)


def _check_matching(binary: Binary, scalars: int) -> None:
    matching = binary.matching
    grouped = matching.cardinality in {Cardinality.MANY_TO_ONE, Cardinality.ONE_TO_MANY}
    if scalars and (matching.labels or matching.on or grouped):
        raise QueryError("vector matching only allowed between instant vectors", binary.position)
    if grouped and binary.op in SET_OPERATORS:
        raise QueryError(f'no grouping allowed for "{binary.op}" operation', binary.position)
    both = set(matching.labels) & set(matching.include)
    if matching.on and both:
        raise QueryError(
            f'label "{min(both)}" must not occur in ON and GROUP clause at once', binary.position
        )


def check_selector(selector: VectorSelector) -> None:
    """QueryError if a regex is none, or if the selector would accept every series there is."""
    for matcher in selector.matchers:
        if matcher.op in {"=~", "!~"}:
            try:
                test_of(matcher.value)
            except QueryError as error:
                raise QueryError(error.what, selector.position) from error
    if all(matcher.matches("") for matcher in selector.matchers):
        raise QueryError("vector selector must contain at least one non-empty matcher", selector.position)


def named_matchers(name: str, matchers: Sequence[Matcher], position: int) -> tuple[Matcher, ...]:
    """The matchers with the metric's name among them; QueryError if they name it again."""
    if not name:
        return tuple(matchers)
    for matcher in matchers:
        if matcher.name == "__name__":
            raise QueryError(f'metric name must not be set twice: "{name}" or "{matcher.value}"', position)
    return (Matcher("__name__", "=", name), *matchers)


def default_matching(op: str) -> Matching:
    """How the sides match where nothing is said."""
    many = Cardinality.MANY_TO_MANY if op in SET_OPERATORS else Cardinality.ONE_TO_ONE
    return Matching(cardinality=many)
