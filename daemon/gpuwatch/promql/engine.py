"""Evaluates a parsed expression at the instants of a query; reads no clock, no database, and keeps nothing.

The tree is walked once an instant. What its selectors and subqueries need over all instants is read once,
into tracks, and each instant takes its part of them.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING, Any, Final

from gpuwatch.errors import QueryError
from gpuwatch.promql import binary, dates
from gpuwatch.promql.aggregate import aggregate
from gpuwatch.promql.answer import Answer, Limits
from gpuwatch.promql.arithmetic import shown
from gpuwatch.promql.ast import (
    LOOKBACK_MS,
    Aggregation,
    Binary,
    Call,
    Expr,
    MatrixSelector,
    NumberLiteral,
    Paren,
    StringLiteral,
    Subquery,
    Unary,
    ValueType,
    VectorSelector,
    start_of,
    unwrapped,
    window_ms,
)
from gpuwatch.promql.checks import SET_OPERATORS
from gpuwatch.promql.functions import FUNCTIONS, absent
from gpuwatch.promql.histogram import fractions, quantiles
from gpuwatch.promql.ranges import KEEPS_NAME, RANGES, is_named_as_counter
from gpuwatch.promql.selection import Series
from gpuwatch.promql.tracks import Query, Tracks
from gpuwatch.promql.values import Element, Value, Vector, Window, settled
from gpuwatch.records import Labels, is_stale

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from gpuwatch.promql.selection import Querier

_NO_LIMITS: Final = Limits()
_LEAST_SPAN_MS: Final = 6 * 3_600_000
_WINDOWS_A_SPAN: Final = 4


def evaluate(expr: Expr, querier: Querier, at_ms: int, limits: Limits = _NO_LIMITS) -> Answer:
    """The value of an expression at an instant, as Prometheus' instant query has it.

    QueryError if it cannot be evaluated on this data or takes more than `limits`; its position is the
    operator's or function's.
    """
    query = Query(querier, limits, at_ms, at_ms)
    evaluator = _Evaluator(query, at_ms, at_ms)
    if expr.type is ValueType.MATRIX:
        return query.remarks.answer(_series(evaluator.windows(expr), expr.position))
    value = evaluator.at(at_ms, expr)
    return query.remarks.answer(settled(value, expr.position) if isinstance(value, list) else value)


def evaluate_range(
    expr: Expr, querier: Querier, start_ms: int, end_ms: int, step_ms: int, limits: Limits = _NO_LIMITS
) -> Answer:
    """The values at `start_ms` and each `step_ms` (at least 1) after it up to `end_ms`, as a range query.

    Series in order of their labels; a scalar is one without labels. QueryError as of `evaluate`.
    """
    if expr.type not in {ValueType.SCALAR, ValueType.VECTOR}:
        what = f'invalid expression type "{expr.type}" for range query, must be Scalar or instant Vector'
        raise QueryError(what, expr.position)
    query = Query(querier, limits, start_ms, end_ms)
    points: dict[Labels, tuple[list[int], list[float]]] = {}
    for span in _spans(range(start_ms, end_ms + 1, step_ms), window_ms(expr)):
        query.held = sum(len(stamps) for stamps, _ in points.values())
        evaluator = _Evaluator(query, span[0], span[-1])
        for at_ms in span:
            value = evaluator.at(at_ms, expr)
            elements = settled(value, expr.position) if isinstance(value, list) else [(Labels(), value)]
            query.hold(len(elements))
            for labels, number in elements:
                stamps, numbers = points.setdefault(labels, ([], []))
                stamps.append(at_ms)
                numbers.append(_number(number))
    return query.remarks.answer([Series(labels, *points[labels]) for labels in sorted(points)])


def _spans(instants: range, window_ms: int) -> Iterator[range]:
    """The instants in parts, so that a long query holds the samples of a part and not of all of it."""
    step_ms = instants.step
    span_ms = max(_LEAST_SPAN_MS, _WINDOWS_A_SPAN * window_ms)
    count = span_ms // step_ms + 1 if step_ms < window_ms else 1
    for first in range(0, len(instants), count):
        yield instants[first : first + count]


def _series(windows: Iterator[Window], position: int) -> list[Series]:
    """A range vector as series, names dropped where they are due."""
    found = list(windows)
    named = settled([Element(w.labels, 0.0, w.drop_name) for w in found], position)
    return sorted(
        (Series(labels, w.at_ms, w.values) for (labels, _), w in zip(named, found, strict=True)),
        key=lambda series: series.labels,
    )


class _Evaluator:
    """Evaluates at instants from `first_ms` to `last_ms`, each asked for by `at`."""

    def __init__(self, query: Query, first_ms: int, last_ms: int) -> None:
        self._query = query
        self._tracks = Tracks(query, first_ms, last_ms, self._subquery)
        self._now_ms = first_ms

    def at(self, now_ms: int, expr: Expr) -> Value:
        self._now_ms = now_ms
        return self.value(expr)

    def value(self, expr: Expr) -> Value:
        self._query.check_time()
        return _EVALUATE[type(expr)](self, expr)

    def vector(self, expr: Expr) -> Vector:
        value = self.value(expr)
        if not isinstance(value, list):
            raise QueryError(f"expected an instant vector, got a {expr.type}", expr.position)
        return value

    # ---- samples

    def _latest(self, selector: VectorSelector) -> Iterator[tuple[Labels, int, float]]:
        """The newest sample of each series in the look-back window, unless it is a staleness marker."""
        upto_ms = self._query.instant(selector, self._now_ms)
        after_ms = upto_ms - LOOKBACK_MS
        for labels, stamps, values, _ in self._tracks.of(selector):
            last = len(stamps) - 1 if stamps[-1] <= upto_ms else bisect_right(stamps, upto_ms) - 1
            if last >= 0 and stamps[last] > after_ms:
                value = values[last]
                if value == value or not is_stale(value):
                    yield labels, stamps[last], value

    def windows(self, expr: Expr) -> Iterator[Window]:
        """The samples of each series in the range before now, if there are any."""
        matrix = unwrapped(expr)
        if not isinstance(matrix, MatrixSelector | Subquery):
            raise QueryError(f"expected a range vector, got a {expr.type}", expr.position)
        timed = matrix if isinstance(matrix, Subquery) else matrix.selector
        end_ms = self._query.instant(timed, self._now_ms)
        start_ms = end_ms - matrix.range_ms
        for labels, stamps, values, drop_name in self._tracks.of(matrix):
            first = 0 if stamps[0] > start_ms else bisect_right(stamps, start_ms)
            end = len(stamps) if stamps[-1] <= end_ms else bisect_right(stamps, end_ms)
            if first < end:
                self._query.check_time()
                part = slice(first, end)
                yield Window(labels, stamps[part], values[part], start_ms, end_ms, self._now_ms, drop_name)

    def _subquery(self, node: Subquery, instants: range) -> Iterator[tuple[int, Vector]]:
        """The inner expression's value at each instant."""
        inner = _Evaluator(self._query, instants[0], instants[-1])
        for at_ms in instants:
            value = inner.at(at_ms, node.expr)
            yield at_ms, value if isinstance(value, list) else []

    # ---- literals and operators

    def literal(self, expr: NumberLiteral | StringLiteral) -> Value:
        return expr.value

    def selector(self, expr: VectorSelector) -> Vector:
        return [Element(labels, value) for labels, _, value in self._latest(expr)]

    def paren(self, expr: Paren) -> Value:
        return self.value(expr.expr)

    def matrix(self, expr: Expr) -> Value:
        raise QueryError("a range vector has no value at an instant", expr.position)

    def unary(self, expr: Unary) -> Value:
        value = self.value(expr.expr)
        if expr.op == "+" or isinstance(value, str):
            return value
        return binary.negated(value) if isinstance(value, list) else -value

    def aggregation(self, node: Aggregation) -> Vector:
        param = None if node.param is None else self.value(node.param)
        vector = self.vector(node.expr)
        if node.op == "quantile" and node.param is not None and vector:
            self._check_quantile(_number(param), node.param)
        return aggregate(node, vector, None if isinstance(param, list) else param)

    def binary(self, node: Binary) -> Value:
        left, right = self.value(node.left), self.value(node.right)
        if isinstance(left, list) and isinstance(right, list):
            operation = binary.set_operation if node.op in SET_OPERATORS else binary.vectors
            return operation(node, left, right)
        if isinstance(left, list):
            return binary.vector_and_scalar(node, left, _number(right), scalar_first=False)
        if isinstance(right, list):
            return binary.vector_and_scalar(node, right, _number(left), scalar_first=True)
        return binary.scalars(node.op, _number(left), _number(right))

    # ---- functions

    def call(self, call: Call) -> Value:
        special = _SPECIAL.get(call.function)
        if special:
            return special(self, call)
        values = [self.value(arg) for arg in call.args]
        values.sort(key=lambda value: not isinstance(value, list))  # stable: the vector goes first
        try:
            return FUNCTIONS[call.function](*values)
        except QueryError as error:
            raise QueryError(error.what, call.position) from error

    def time(self, _call: Call) -> float:
        return self._now_ms / 1000

    def range_call(self, call: Call) -> Vector:
        scalars = [_number(self.value(arg)) for arg in call.args if arg.type is not ValueType.MATRIX]
        matrix = next(arg for arg in call.args if arg.type is ValueType.MATRIX)
        function, drops_name = RANGES[call.function], call.function not in KEEPS_NAME
        elements: Vector = []
        for window in self.windows(matrix):
            value = function(window, *scalars)
            if value is not None:
                elements.append(Element(window.labels, value, drops_name or window.drop_name))
        self._remark_on_range(call, scalars, elements)
        return elements

    def _remark_on_range(self, call: Call, scalars: Sequence[float], elements: Vector) -> None:
        if call.function in {"rate", "increase"}:
            for element in elements:
                if not is_named_as_counter(element.labels.metric):
                    what = "metric might not be a counter, name does not end in _total/_sum/_count/_bucket:"
                    where = start_of(call.args[0])
                    self._query.remarks.inform(f'{what} "{element.labels.metric}"', where)
        elif call.function == "quantile_over_time" and elements:
            self._check_quantile(scalars[0], call.args[0])

    def _check_quantile(self, q: float, arg: Expr) -> None:
        if not 0 <= q <= 1:
            what = f"quantile value should be between 0 and 1, got {shown(q)}"
            self._query.remarks.warn(what, start_of(arg))

    def timestamp(self, call: Call) -> Vector:
        """Of a selector the samples' own instants, of anything else the evaluation's."""
        arg = call.args[0]
        inner = unwrapped(arg)
        if isinstance(inner, VectorSelector):
            return [Element(labels, at_ms / 1000, True) for labels, at_ms, _ in self._latest(inner)]
        return [Element(element.labels, self._now_ms / 1000, True) for element in self.vector(arg)]

    def absent(self, call: Call) -> Vector:
        arg = unwrapped(call.args[0])
        found: object = self.vector(arg) if arg.type is ValueType.VECTOR else next(self.windows(arg), None)
        selector = arg.selector if isinstance(arg, MatrixSelector) else arg
        return absent(bool(found), selector.matchers if isinstance(selector, VectorSelector) else ())

    def date(self, call: Call) -> Vector:
        part = dates.PARTS[call.function]
        if not call.args:
            return [Element(Labels(), part(self._now_ms / 1000))]
        return [Element(e.labels, part(e.value), True) for e in self.vector(call.args[0])]

    def sort(self, call: Call) -> Value:
        if self._query.is_range:
            what = "sort is ineffective for range queries since results are always ordered by labels"
            self._query.remarks.warn(what, call.position)
        return FUNCTIONS[call.function](self.vector(call.args[0]))

    def histogram_quantile(self, call: Call) -> Vector:
        q, remarks, where = _number(self.value(call.args[0])), self._query.remarks, start_of(call.args[1])
        self._check_quantile(q, call.args[0])
        result = quantiles(self.vector(call.args[1]), q)
        self._remark_on_bounds(result.malformed, where)
        for metric, repair in result.repairs:
            remarks.repaired(metric, where, self._now_ms, repair)
        return result.elements

    def histogram_fraction(self, call: Call) -> Vector:
        lower, upper = (_number(self.value(arg)) for arg in call.args[:2])
        result = fractions(self.vector(call.args[2]), lower, upper)
        self._remark_on_bounds(result.malformed, start_of(call.args[2]))
        return result.elements

    def _remark_on_bounds(self, malformed: Sequence[tuple[str, str]], position: int) -> None:
        for metric, bound in malformed:
            about = f' for metric name "{metric}"' if metric else ""
            what = f'bucket label "le" is missing or has a malformed value of "{bound}"{about}'
            self._query.remarks.warn(what, position)


def _number(value: Value | None) -> float:
    if isinstance(value, float):
        return value
    raise QueryError(f"expected a scalar, got {value!r}")


_EVALUATE: Final[Mapping[type, Callable[[_Evaluator, Any], Value]]] = {
    NumberLiteral: _Evaluator.literal,
    StringLiteral: _Evaluator.literal,
    VectorSelector: _Evaluator.selector,
    MatrixSelector: _Evaluator.matrix,
    Subquery: _Evaluator.matrix,
    Paren: _Evaluator.paren,
    Unary: _Evaluator.unary,
    Binary: _Evaluator.binary,
    Aggregation: _Evaluator.aggregation,
    Call: _Evaluator.call,
}
# The functions that need more than their arguments' values: windows, the time, or a place for remarks.
_SPECIAL: Final[Mapping[str, Callable[[_Evaluator, Call], Value]]] = {
    **dict.fromkeys(RANGES, _Evaluator.range_call),
    **dict.fromkeys(dates.PARTS, _Evaluator.date),
    **dict.fromkeys(("absent", "absent_over_time"), _Evaluator.absent),
    **dict.fromkeys(("sort", "sort_desc"), _Evaluator.sort),
    "time": _Evaluator.time,
    "timestamp": _Evaluator.timestamp,
    "histogram_quantile": _Evaluator.histogram_quantile,
    "histogram_fraction": _Evaluator.histogram_fraction,
}
