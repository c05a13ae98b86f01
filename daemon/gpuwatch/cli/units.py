"""What a value is measured in, by the names of its metrics, and how people write it; never for programs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, NamedTuple

from gpuwatch.promql import metric_of
from gpuwatch.promql.ast import (
    Aggregation,
    Binary,
    Call,
    NumberLiteral,
    ValueType,
    VectorSelector,
    children,
    unwrapped,
    walk,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gpuwatch.promql import Expr

PER_SECOND: Final = "/s"
_UNITS: Final = {
    **{unit: unit for unit in ("bytes", "celsius", "hertz", "ratio", "seconds", "watts")},
    "perc": "ratio",  # vLLM's gauges of that name go from 0 to 1
}
_BESIDE_UNIT: Final = frozenset({"total", "max", "min", "sum", "bucket"})
_COUNTS: Final = frozenset({"count", "count_values", "group", "stdvar"})
_RATES: Final = frozenset({"rate", "irate", "deriv"})
_KEEP: Final = frozenset(
    {
        *("abs", "ceil", "floor", "round", "clamp", "clamp_max", "clamp_min"),
        *("increase", "delta", "idelta", "predict_linear", "scalar"),
        *(
            "avg_over_time",
            "first_over_time",
            "last_over_time",
            "mad_over_time",
            "max_over_time",
            "min_over_time",
        ),
        *("quantile_over_time", "stddev_over_time", "sum_over_time", "double_exponential_smoothing"),
        *("label_join", "label_replace", "sort", "sort_desc", "sort_by_label", "sort_by_label_desc"),
    }
)
_COMPARISONS: Final = frozenset({"==", "!=", "<", "<=", ">", ">="})


class Scale(NamedTuple):
    """How a unit is written at some magnitude: the value by `divisor`, then `suffix`."""

    divisor: float
    suffix: str


_BINARY: Final = ("", "Ki", "Mi", "Gi", "Ti", "Pi")
_SCALES: Final[dict[str, tuple[tuple[float, Scale], ...]]] = {  # each from some magnitude on
    "": (
        (0, Scale(1, "")),
        (1e4, Scale(1e3, "k")),
        *((power, Scale(power, sign)) for power, sign in ((1e6, "M"), (1e9, "G"), (1e12, "T"), (1e15, "P"))),
    ),
    "bytes": tuple((1024.0**k if k else 0, Scale(1024.0**k, f" {sign}B")) for k, sign in enumerate(_BINARY)),
    "celsius": ((0, Scale(1, " °C")),),
    "hertz": (
        (0, Scale(1, " Hz")),
        (1e3, Scale(1e3, " kHz")),
        (1e6, Scale(1e6, " MHz")),
        (1e9, Scale(1e9, " GHz")),
    ),
    "ratio": ((0, Scale(0.01, " %")), (1e4, Scale(1, ""))),
    "seconds": (
        (0, Scale(1, " s")),
        (1e-12, Scale(1e-6, " µs")),
        (1e-3, Scale(1e-3, " ms")),
        (1, Scale(1, " s")),
        (60, Scale(60, " min")),
        (3600, Scale(3600, " h")),
        (86_400, Scale(86_400, " d")),
    ),
    "watts": ((0, Scale(1, " W")), (1e3, Scale(1e3, " kW")), (1e6, Scale(1e6, " MW"))),
}


def unit_of_metric(name: str) -> str:
    """`bytes` of `gpu_memory_used_bytes`; empty if the name tells none."""
    words = name.split("_")
    while words and words[-1] in _BESIDE_UNIT:
        words.pop()
    return _UNITS.get(words[-1], "") if words else ""


def unit_of_metrics(names: Iterable[str]) -> str:
    """The unit that all these have; empty if they differ."""
    units = {unit_of_metric(name) for name in names}
    return units.pop() if len(units) == 1 else ""


def unit_of(expr: Expr) -> str:
    """The unit of an expression's values, as far as that is certain; empty if not."""
    match expr:
        case VectorSelector(matchers=matchers):
            return unit_of_metric(metric_of(matchers))
        case Aggregation(op=op, expr=inner):
            return "" if op in _COUNTS else unit_of(inner)
        case Call():
            return _of_call(expr)
        case Binary():
            return _of_binary(expr)
        case _:
            within = children(expr)
            return unit_of(within[0]) if len(within) == 1 else ""


def _of_call(call: Call) -> str:
    inner = [arg for arg in call.args if arg.type in {ValueType.VECTOR, ValueType.MATRIX}]
    if call.function == "histogram_quantile":  # its values are limits of buckets, however these are counted
        selectors = (node for node, _ in walk(inner[0]) if isinstance(node, VectorSelector))
        return unit_of_metrics(metric_of(selector.matchers) for selector in selectors)
    if call.function in _KEEP:
        return unit_of(inner[0])
    return _by_second(unit_of(inner[0])) if call.function in _RATES else ""


def _by_second(unit: str) -> str:
    """Seconds by the second are no unit, and watts by the second nobody reads."""
    return unit + PER_SECOND if unit in {"", "bytes"} else ""


def _of_binary(node: Binary) -> str:
    left, right = unit_of(node.left), unit_of(node.right)
    if node.op in _COMPARISONS:
        return "" if node.return_bool else left or right
    if node.op in {"and", "unless"}:
        return left
    if node.op == "/":
        return "ratio" if left and left == right else ""
    if node.op in {"+", "-"} and (_is_number(node.left) or _is_number(node.right)):
        return left or right
    return left if left == right and node.op in {"+", "-", "or"} else ""


def _is_number(expr: Expr) -> bool:
    return isinstance(unwrapped(expr), NumberLiteral)


def scale(unit: str, magnitude: float) -> Scale:
    """How values of a unit are best written whose largest is about `magnitude`."""
    base = unit.removesuffix(PER_SECOND)
    divisor, suffix = [found for least, found in _SCALES[base] if least <= magnitude][-1]
    return Scale(divisor, suffix + (PER_SECOND if base != unit else ""))


def human(value: float, unit: str) -> str:
    """A value as people write it, three digits or four: `63.1 GiB`, `42 %`, `61 °C`."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
    divisor, suffix = scale(unit, abs(value))
    return number(value / divisor) + suffix


def number(value: float) -> str:
    """A number to about four digits."""
    size = abs(value)
    if size >= 1e6 or 0 < size < 1e-4:
        return f"{value:.3g}"
    decimals = 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 1 else 4
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text
