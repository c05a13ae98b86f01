"""Quantiles of Prometheus' classic histograms, series of cumulative buckets with `le`; nothing else."""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import TYPE_CHECKING, Final

from gpuwatch.promql.values import Element, Vector

if TYPE_CHECKING:
    from gpuwatch.records import Labels

# Rates of one histogram's buckets differ by rounding: that little is no real fall.
_ROUNDING: Final = 1e-12

Buckets = list[tuple[float, float]]


def histogram_quantile(vector: Vector, q: float) -> Vector:
    """The q-quantile of each histogram, interpolated within its bucket; what has no `le` is left out."""
    histograms: dict[Labels, Buckets] = {}
    for element in vector:
        bound = _bound(element.labels.get("le"))
        if bound is not None:
            histograms.setdefault(element.labels.without("le"), []).append((bound, element.value))
    return [
        Element(labels, _bucket_quantile(q, buckets), drop_name=True)
        for labels, buckets in histograms.items()
    ]


def _bound(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _bucket_quantile(q: float, buckets: Buckets) -> float:
    if math.isnan(q):
        return math.nan
    if not 0 <= q <= 1:
        return math.copysign(math.inf, q)
    bounds, counts = _tidied(buckets)
    if bounds[-1] != math.inf or len(bounds) < 2 or not counts[-1] > 0:
        return math.nan
    rank = q * counts[-1]
    at = bisect_left(counts, rank, hi=len(counts) - 1)
    if at == len(bounds) - 1:
        return bounds[-2]
    if at == 0 and bounds[0] <= 0:
        return bounds[0]
    low, below = (bounds[at - 1], counts[at - 1]) if at else (0.0, 0.0)
    return low + (bounds[at] - low) * ((rank - below) / (counts[at] - below))


def _tidied(buckets: Buckets) -> tuple[list[float], list[float]]:
    """Bounds and counts, equal bounds added up, counts that fall raised to the one before."""
    sums: dict[float, float] = {}
    for bound, count in sorted(buckets, key=lambda bucket: bucket[0]):
        sums[bound] = sums.get(bound, 0.0) + count
    counts: list[float] = []
    for count in sums.values():
        before = counts[-1] if counts else count
        level = count < before or math.isclose(count, before, rel_tol=_ROUNDING)
        counts.append(before if level else count)
    return list(sums), counts
