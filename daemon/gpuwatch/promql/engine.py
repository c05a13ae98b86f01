"""Evaluates a parsed expression at one instant against a `Querier`; reads no clock and keeps nothing."""

from __future__ import annotations

import math
from itertools import compress
from typing import TYPE_CHECKING

from gpuwatch.errors import QueryError
from gpuwatch.promql import binary
from gpuwatch.promql.aggregate import aggregate
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
    Unary,
    ValueType,
    VectorSelector,
    unwrapped,
)
from gpuwatch.promql.checks import SET_OPERATORS
from gpuwatch.promql.functions import FUNCTIONS, absent
from gpuwatch.promql.ranges import KEEPS_NAME, RANGES
from gpuwatch.promql.answer import LIMITS, Answer, Limits
from gpuwatch.promql.selection import Series
from gpuwatch.promql.values import Element, Value, Vector, Window, settled
from gpuwatch.records import Labels, is_stale

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpuwatch.promql.selection import Querier


def evaluate(expr: Expr, querier: Querier, at_ms: int, limits: Limits = LIMITS) -> Answer:
    """The value of an expression at an instant, as Prometheus' instant query has it; QueryError."""
    limits.check(0)
    value = _Evaluator(querier, at_ms).value(expr)
    return Answer(settled(value, expr.position) if isinstance(value, list) else value)


def evaluate_range(
    expr: Expr, querier: Querier, start_ms: int, end_ms: int, step_ms: int, limits: Limits = LIMITS
) -> Answer:
    """The value at `start_ms` and each `step_ms` after it up to `end_ms`: series in order of labels; QueryError."""
    points: dict[Labels, tuple[list[int], list[float]]] = {}
    for at_ms in range(start_ms, end_ms + 1, step_ms):
        value = evaluate(expr, querier, at_ms, limits).value
        elements = value if isinstance(value, list) else [(Labels(), value)]
        for labels, number in elements:
            stamps, numbers = points.setdefault(labels, ([], []))
            stamps.append(at_ms)
            numbers.append(number)
    return Answer([Series(labels, *points[labels]) for labels in sorted(points)])


class _Evaluator:
    def __init__(self, querier: Querier, at_ms: int) -> None:
        self._querier = querier
        self._at_ms = at_ms

    def value(self, expr: Expr) -> Value:
        match expr:
            case NumberLiteral() | StringLiteral() | MatrixSelector() | VectorSelector() | Paren():
                return self._leaf(expr)
            case Unary():
                return self._unary(expr)
            case Binary():
                return self._binary(expr)
            case Aggregation():
                return self._aggregation(expr)
            case Call():
                return self._call(expr)

    def _leaf(self, expr: NumberLiteral | StringLiteral | MatrixSelector | VectorSelector | Paren) -> Value:
        match expr:
            case NumberLiteral(value=literal) | StringLiteral(value=literal):
                return literal
            case Paren(expr=inner):
                return self.value(inner)
            case VectorSelector():
                return [Element(s.labels, s.values[-1]) for s in self._latest(expr)]
            case MatrixSelector():
                raise QueryError("a range vector has no value at an instant", expr.position)

    def vector(self, expr: Expr) -> Vector:
        value = self.value(expr)
        if not isinstance(value, list):
            raise QueryError(f"expected an instant vector, got a {expr.type}", expr.position)
        return value

    # ---- selectors

    def _latest(self, selector: VectorSelector) -> list[Series]:
        """The series whose last sample of the look-back window is no staleness marker."""
        upto_ms = self._at_ms - selector.offset_ms
        found = self._querier.select(selector.matchers, upto_ms - LOOKBACK_MS, upto_ms)
        return [series for series in found if series.values and not is_stale(series.values[-1])]

    def _windows(self, expr: Expr) -> list[Window]:
        matrix = unwrapped(expr)
        if not isinstance(matrix, MatrixSelector):
            raise QueryError(f"expected a range vector, got a {expr.type}", expr.position)
        end_ms = self._at_ms - matrix.selector.offset_ms
        start_ms = end_ms - matrix.range_ms
        windows = []
        for series in self._querier.select(matrix.selector.matchers, start_ms, end_ms):
            at_ms, values = _unmarked(series)
            if values:
                windows.append(
                    Window(
                        labels=series.labels,
                        at_ms=at_ms,
                        values=values,
                        start_ms=start_ms,
                        end_ms=end_ms,
                        now_ms=self._at_ms,
                    )
                )
        return windows

    # ---- operators

    def _unary(self, expr: Unary) -> Value:
        value = self.value(expr.expr)
        if expr.op == "+" or isinstance(value, str):
            return value
        return binary.negated(value) if isinstance(value, list) else -value

    def _aggregation(self, node: Aggregation) -> Vector:
        param = None if node.param is None else self.value(node.param)
        return aggregate(node, self.vector(node.expr), None if isinstance(param, list) else param)

    def _binary(self, node: Binary) -> Value:
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

    def _call(self, call: Call) -> Value:
        if call.function in RANGES:
            return self._range_call(call)
        if call.function == "time":
            return self._at_ms / 1000
        if call.function == "timestamp":
            return self._timestamps(call.args[0])
        if call.function in {"absent", "absent_over_time"}:
            return self._absent(call)
        values = [self.value(arg) for arg in call.args]
        values.sort(key=lambda value: not isinstance(value, list))  # stable: the vector goes first
        try:
            return FUNCTIONS[call.function](*values)
        except QueryError as error:
            raise QueryError(error.what, call.position) from error

    def _range_call(self, call: Call) -> Vector:
        windows: list[Window] = []
        scalars: list[Value] = []
        for arg in call.args:
            if arg.type is ValueType.MATRIX:
                windows = self._windows(arg)
            else:
                scalars.append(self.value(arg))
        drop_name = call.function not in KEEPS_NAME
        function = RANGES[call.function]
        values = ((window.labels, function(window, *scalars)) for window in windows)
        return [Element(labels, value, drop_name) for labels, value in values if value is not None]

    def _timestamps(self, arg: Expr) -> Vector:
        """Of a selector the samples' own instants, of anything else the evaluation's."""
        inner = unwrapped(arg)
        if isinstance(inner, VectorSelector):
            return [Element(s.labels, s.at_ms[-1] / 1000, drop_name=True) for s in self._latest(inner)]
        return [Element(e.labels, self._at_ms / 1000, drop_name=True) for e in self.vector(arg)]

    def _absent(self, call: Call) -> Vector:
        arg = unwrapped(call.args[0])
        found = self._windows(arg) if arg.type is ValueType.MATRIX else self.vector(arg)
        selector = arg.selector if isinstance(arg, MatrixSelector) else arg
        return absent(bool(found), selector.matchers if isinstance(selector, VectorSelector) else ())


def _unmarked(series: Series) -> tuple[Sequence[int], Sequence[float]]:
    """The samples without staleness markers; a finite sum tells in one pass in C that there are none."""
    if math.isfinite(sum(series.values)):
        return series.at_ms, series.values
    kept = [not is_stale(value) for value in series.values]
    return list(compress(series.at_ms, kept)), list(compress(series.values, kept))


def _number(value: Value) -> float:
    if isinstance(value, float):
        return value
    raise QueryError(f"expected a scalar, got {value!r}")
