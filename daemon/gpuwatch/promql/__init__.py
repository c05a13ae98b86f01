"""Evaluates PromQL with Prometheus 3's semantics; knows only records and a `Querier`."""

from gpuwatch.promql.answer import Answer, AnswerValue, Limits, Remark
from gpuwatch.promql.ast import LOOKBACK_MS, Expr, StringLiteral, Subquery, ValueType, window_ms
from gpuwatch.promql.engine import evaluate, evaluate_range
from gpuwatch.promql.parser import parse
from gpuwatch.promql.selection import Matcher, Querier, Series, metric_of

__all__ = [
    "LOOKBACK_MS",
    "Answer",
    "AnswerValue",
    "Expr",
    "Limits",
    "Matcher",
    "Querier",
    "Remark",
    "Series",
    "StringLiteral",
    "Subquery",
    "ValueType",
    "evaluate",
    "evaluate_range",
    "metric_of",
    "parse",
    "window_ms",
]
