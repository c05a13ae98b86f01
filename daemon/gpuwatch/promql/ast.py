"""The tree that a PromQL expression is parsed into: frozen nodes with positions; evaluates nothing."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gpuwatch.promql.selection import Matcher

LOOKBACK_MS = 300_000  # how far back an instant selector looks for the last sample: Prometheus' default


class ValueType(enum.StrEnum):
    """What an expression yields, in the words of Prometheus' messages."""

    SCALAR = "scalar"
    STRING = "string"
    VECTOR = "instant vector"
    MATRIX = "range vector"


class Cardinality(enum.StrEnum):
    """How many elements of each side of a vector operation may match."""

    ONE_TO_ONE = "one-to-one"
    MANY_TO_ONE = "many-to-one"  # group_left
    ONE_TO_MANY = "one-to-many"  # group_right
    MANY_TO_MANY = "many-to-many"  # and, or, unless


@dataclass(frozen=True, slots=True, kw_only=True)
class _Node:
    """`position` is where the node begins, in characters from 0."""

    position: int
    type: ValueType


@dataclass(frozen=True, slots=True, kw_only=True)
class NumberLiteral(_Node):
    """A number, or a duration in seconds."""

    type: ValueType = ValueType.SCALAR
    value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StringLiteral(_Node):
    """A quoted text, its escapes resolved."""

    type: ValueType = ValueType.STRING
    value: str


class Edge(enum.StrEnum):
    """What `@ start()` and `@ end()` name: the query's first and its last instant."""

    START = "start"
    END = "end"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Timed(_Node):
    """What reads samples of another time: `@ at` sets the instant, `offset_ms` goes back from there."""

    at: int | Edge | None = None
    offset_ms: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorSelector(_Timed):
    """`name{label="value"} @ 0 offset 5m`; the name is a matcher of `__name__`."""

    type: ValueType = ValueType.VECTOR
    matchers: tuple[Matcher, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixSelector(_Node):
    """`selector[5m]`; its time is the selector's."""

    type: ValueType = ValueType.MATRIX
    selector: VectorSelector
    range_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Subquery(_Timed):
    """`expr[1h:5m]`: the expression at each multiple of the step; without a step the querier's default."""

    type: ValueType = ValueType.MATRIX
    expr: Expr
    range_ms: int
    step_ms: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Paren(_Node):
    """`(expr)`; kept, because `(x) offset 5m` is refused where `x offset 5m` is not."""

    expr: Expr


@dataclass(frozen=True, slots=True, kw_only=True)
class Unary(_Node):
    """`-expr` or `+expr`."""

    op: str
    expr: Expr


@dataclass(frozen=True, slots=True, kw_only=True)
class Matching:
    """`on(labels) group_left(include)`; without `on`, all labels but `labels` must agree."""

    cardinality: Cardinality = Cardinality.ONE_TO_ONE
    on: bool = False
    labels: tuple[str, ...] = ()
    include: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Binary(_Node):
    """`left op right`; `position` is the operator's."""

    op: str
    left: Expr
    right: Expr
    return_bool: bool = False
    matching: Matching = Matching()


@dataclass(frozen=True, slots=True, kw_only=True)
class Aggregation(_Node):
    """`sum by (labels) (expr)`; `param` is the k of topk, the q of quantile, the label of count_values."""

    type: ValueType = ValueType.VECTOR
    op: str
    expr: Expr
    param: Expr | None = None
    labels: tuple[str, ...] = ()
    without: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Call(_Node):
    """`function(args)`."""

    function: str
    args: tuple[Expr, ...]


Expr: TypeAlias = (
    NumberLiteral
    | StringLiteral
    | VectorSelector
    | MatrixSelector
    | Subquery
    | Paren
    | Unary
    | Binary
    | Aggregation
    | Call
)


def children(expr: Expr) -> tuple[Expr, ...]:
    """The expressions directly within one, in the order written."""
    match expr:
        case MatrixSelector(selector=selector):
            return (selector,)
        case Paren(expr=inner) | Unary(expr=inner) | Subquery(expr=inner):
            return (inner,)
        case Binary(left=left, right=right):
            return (left, right)
        case Aggregation(param=param, expr=inner):
            return (inner,) if param is None else (param, inner)
        case Call(args=args):
            return args
        case NumberLiteral() | StringLiteral() | VectorSelector():
            return ()


def walk(expr: Expr) -> Iterator[tuple[Expr, int]]:
    """Every expression within one, itself first, with its depth from 1; needs no call stack."""
    todo = [(expr, 1)]
    while todo:
        node, depth = todo.pop()
        yield node, depth
        todo.extend((child, depth + 1) for child in children(node))


def unwrapped(expr: Expr) -> Expr:
    """The expression less the parentheses round it."""
    while isinstance(expr, Paren):
        expr = expr.expr
    return expr


def start_of(expr: Expr) -> int:
    """Where the text of an expression begins, in characters from 0; an operator's position is its own."""
    while isinstance(expr, Binary | Subquery):
        expr = expr.left if isinstance(expr, Binary) else expr.expr
    return expr.position


def window_ms(expr: Expr) -> int:
    """How far back from the evaluation's instant any selector looks, but for those with `@ <timestamp>`."""
    match expr:
        case VectorSelector():
            return LOOKBACK_MS + expr.offset_ms
        case MatrixSelector():
            return expr.range_ms + expr.selector.offset_ms
        case Subquery():
            return expr.range_ms + expr.offset_ms + window_ms(expr.expr)
        case _:
            return max(map(window_ms, children(expr)), default=0)
