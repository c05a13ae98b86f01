"""Quantiles and fractions of Prometheus' classic histograms, series of cumulative buckets with `le`."""

from __future__ import annotations

import math
import re
import sys
from bisect import bisect_right
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from gpuwatch.promql.answer import Repair
from gpuwatch.promql.arithmetic import divided
from gpuwatch.promql.values import Element, Vector

if TYPE_CHECKING:
    from gpuwatch.records import Labels

# Rates of one histogram's buckets differ by rounding: that little is no real fall.
_ROUNDING: Final = 1e-12
_NO_NUMBER_IN_GO: Final = re.compile(r"[\s_]")

Buckets = list[tuple[float, float]]


@dataclass(slots=True)
class Result:
    """Elements, and what is worth a remark: (metric, `le`) that is no number; where counts fell."""

    elements: Vector = field(default_factory=list)
    malformed: list[tuple[str, str]] = field(default_factory=list)
    repairs: list[tuple[str, Repair]] = field(default_factory=list)


def quantiles(vector: Vector, q: float) -> Result:
    """The q-quantile of each histogram, interpolated within its bucket; what has no `le` is left out."""
    result = Result()
    for labels, buckets in _histograms(vector, result).items():
        value, repair = _quantile(q, buckets)
        result.elements.append(Element(labels, value, drop_name=True))
        if repair:
            result.repairs.append((labels.metric, repair))
    return result


def fractions(vector: Vector, lower: float, upper: float) -> Result:
    """The share of each histogram's observations between two values, interpolated within its buckets."""
    result = Result()
    for labels, buckets in _histograms(vector, result).items():
        result.elements.append(Element(labels, _fraction(lower, upper, buckets), drop_name=True))
    return result


def _histograms(vector: Vector, result: Result) -> dict[Labels, Buckets]:
    histograms: dict[Labels, Buckets] = {}
    for element in vector:
        text = element.labels.get("le")
        bound = _bound(text)
        if bound is None:
            result.malformed.append((element.labels.metric, text))
        else:
            histograms.setdefault(element.labels.without("le"), []).append((bound, element.value))
    return histograms


def _bound(text: str) -> float | None:
    try:
        return None if _NO_NUMBER_IN_GO.search(text) else float(text)
    except ValueError:
        return None


def _coalesced(buckets: Buckets) -> tuple[list[float], list[float]]:
    """Bounds in order and their counts; what has one bound in two spellings is added up."""
    sums: dict[float, float] = {}
    for bound, count in sorted(buckets, key=lambda bucket: bucket[0]):
        sums[bound] = sums.get(bound, 0.0) + count
    return list(sums), list(sums.values())


def _quantile(q: float, buckets: Buckets) -> tuple[float, Repair | None]:
    if math.isnan(q):
        return math.nan, None
    if not 0 <= q <= 1:
        return math.copysign(math.inf, q), None
    bounds, counts = _coalesced(buckets)
    if bounds[-1] != math.inf:
        return math.nan, None
    repair = _make_monotonic(bounds, counts)
    return _interpolated(q, bounds, counts), repair


def _interpolated(q: float, bounds: list[float], counts: list[float]) -> float:
    if len(bounds) < 2 or counts[-1] == 0:
        return math.nan
    rank = q * counts[-1]
    at = next((i for i, count in enumerate(counts[:-1]) if count >= rank), len(counts) - 1)
    if at == len(bounds) - 1:
        return bounds[-2]
    if at == 0 and bounds[0] <= 0:
        return bounds[0]
    low, below = (bounds[at - 1], counts[at - 1]) if at else (0.0, 0.0)
    return low + (bounds[at] - low) * divided(rank - below, counts[at] - below)


def _make_monotonic(bounds: list[float], counts: list[float]) -> Repair | None:
    """Raise counts that fall to the one before; tells of those that fell by more than rounding."""
    low, high, most = math.inf, -math.inf, 0.0
    before = counts[0]
    for i in range(1, len(counts)):
        count = counts[i]
        if count == before:
            continue
        if _is_rounding(before, count):
            counts[i] = before
        elif count < before:
            counts[i] = before
            low, high, most = min(low, bounds[i]), max(high, bounds[i]), max(most, before - count)
        else:
            before = count
    return Repair(low, high, most) if most else None


def _is_rounding(a: float, b: float) -> bool:
    size = abs(a) + abs(b)
    if a == 0 or b == 0 or size < sys.float_info.min:
        return abs(a - b) < _ROUNDING * sys.float_info.min
    return abs(a - b) / min(size, sys.float_info.max) < _ROUNDING


def _fraction(lower: float, upper: float, buckets: Buckets) -> float:
    bounds, counts = _coalesced(buckets)
    if bounds[-1] != math.inf or not counts[-1] or math.isnan(lower) or math.isnan(upper):
        return math.nan
    if lower >= upper:
        return 0.0
    return (_rank(upper, bounds, counts) - _rank(lower, bounds, counts)) / counts[-1]


def _rank(value: float, bounds: list[float], counts: list[float]) -> float:
    """How many observations lie below a value; a bucket without an end is all above or all below."""
    at = bisect_right(bounds, value)
    if at == len(bounds):
        return counts[-1]
    below = counts[at - 1] if at else 0.0
    low = bounds[at - 1] if at else 0.0 if bounds[0] > 0 else -math.inf
    if value <= low:
        return min(below, counts[-1])
    if math.isinf(low):
        return min(counts[at], counts[-1])
    return min(below + (counts[at] - below) * (value - low) / (bounds[at] - low), counts[-1])
