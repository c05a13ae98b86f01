"""Evaluates a subset of PromQL with Prometheus 3's semantics; knows only records and a `Querier`."""

from gpuwatch.promql.ast import LOOKBACK_MS, Expr, StringLiteral, ValueType, window_ms
from gpuwatch.promql.engine import evaluate
from gpuwatch.promql.parser import parse
from gpuwatch.promql.selection import Matcher, Querier, Series

__all__ = [
    "LOOKBACK_MS",
    "Expr",
    "Matcher",
    "Querier",
    "Series",
    "StringLiteral",
    "ValueType",
    "evaluate",
    "parse",
    "window_ms",
]
