"""The functions over one series' window of samples, `rate` and its kin; selects nothing."""

from __future__ import annotations

import math
import operator
from itertools import compress, islice, pairwise
from typing import TYPE_CHECKING, Final

from gpuwatch.promql.arithmetic import greatest, least, linear_regression, mean, quantile, total, variance

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gpuwatch.promql.values import Window

# How much farther than the usual step from the window's edge a series is taken to begin or end there.
_EXTRAPOLATION_LIMIT: Final = 1.1

_COUNTER_ENDINGS: Final = ("_total", "_sum", "_count", "_bucket")

KEEPS_NAME: Final = frozenset({"last_over_time"})


def is_named_as_counter(metric: str) -> bool:
    """Whether a metric's name says that it is a counter, or there is no name to say so."""
    return not metric or metric.endswith(_COUNTER_ENDINGS)


def rate(window: Window) -> float | None:
    """The increase per second."""
    grown = increase(window)
    return None if grown is None else grown / ((window.end_ms - window.start_ms) / 1000)


def increase(window: Window) -> float | None:
    """How much a counter grew, resets made up for, extrapolated to the whole window."""
    values = window.values
    if len(values) < 2:
        return None
    # Most counters were never reset: sorting what is in order is one pass in C.
    lost = 0.0 if sorted(values) == list(values) else _lost(values)
    return _extrapolated(window, values[-1] - values[0] + lost, counter=True)


def _lost(values: Sequence[float]) -> float:
    """What a counter had reached before each of its resets, in all."""
    return sum(compress(values, map(operator.gt, values, islice(values, 1, None))))


def delta(window: Window) -> float | None:
    """How much a gauge changed, extrapolated to the whole window."""
    if len(window.values) < 2:
        return None
    return _extrapolated(window, window.values[-1] - window.values[0], counter=False)


def _extrapolated(window: Window, change: float, *, counter: bool) -> float:
    sampled_s = (window.at_ms[-1] - window.at_ms[0]) / 1000
    step_s = sampled_s / (len(window.values) - 1)
    to_start_s = (window.at_ms[0] - window.start_ms) / 1000
    to_end_s = (window.end_ms - window.at_ms[-1]) / 1000
    if to_start_s >= step_s * _EXTRAPOLATION_LIMIT:
        to_start_s = step_s / 2
    if to_end_s >= step_s * _EXTRAPOLATION_LIMIT:
        to_end_s = step_s / 2
    first = window.values[0]
    if counter and change > 0 and first >= 0:
        # A counter cannot have been below zero: go back no farther than to where it was born.
        to_start_s = min(to_start_s, sampled_s * (first / change))
    return change * ((sampled_s + to_start_s + to_end_s) / sampled_s)


def irate(window: Window) -> float | None:
    """The increase per second between the last two samples."""
    return _instant(window, counter=True)


def idelta(window: Window) -> float | None:
    """The change between the last two samples."""
    return _instant(window, counter=False)


def _instant(window: Window, *, counter: bool) -> float | None:
    if len(window.values) < 2:
        return None
    before, last = window.values[-2:]
    change = last if counter and last < before else last - before
    return change / ((window.at_ms[-1] - window.at_ms[-2]) / 1000) if counter else change


def deriv(window: Window) -> float | None:
    """The slope per second of the least-squares line."""
    if len(window.values) < 2:
        return None
    return linear_regression(window.at_ms, window.values, window.at_ms[0])[0]


def predict_linear(window: Window, ahead_s: float) -> float | None:
    """Where the least-squares line will be in `ahead_s` seconds."""
    if len(window.values) < 2:
        return None
    slope, now = linear_regression(window.at_ms, window.values, window.now_ms)
    return slope * ahead_s + now


def changes(window: Window) -> float:
    """How often the value changed."""
    return float(sum(a != b and not (math.isnan(a) and math.isnan(b)) for a, b in pairwise(window.values)))


def resets(window: Window) -> float:
    """How often the value fell."""
    return float(sum(after < before for before, after in pairwise(window.values)))


RANGES: Final[dict[str, Callable[..., float | None]]] = {
    "rate": rate,
    "increase": increase,
    "delta": delta,
    "irate": irate,
    "idelta": idelta,
    "deriv": deriv,
    "predict_linear": predict_linear,
    "changes": changes,
    "resets": resets,
    "avg_over_time": lambda window: mean(window.values),
    "min_over_time": lambda window: least(window.values),
    "max_over_time": lambda window: greatest(window.values),
    "sum_over_time": lambda window: total(window.values),
    "count_over_time": lambda window: float(len(window.values)),
    "last_over_time": lambda window: window.values[-1],
    "present_over_time": lambda _: 1.0,
    "stddev_over_time": lambda window: math.sqrt(variance(window.values)),
    "stdvar_over_time": lambda window: variance(window.values),
    "quantile_over_time": lambda window, q: quantile(q, window.values),
}
