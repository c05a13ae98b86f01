"""Floating-point arithmetic that answers as Go does where Python raises; knows no vectors."""

from __future__ import annotations

import math
import operator
from decimal import Decimal
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

_NAN: Final = math.nan


def divided(a: float, b: float) -> float:
    """`a / b`; a division by zero is infinite or NaN."""
    if b != 0:
        return a / b
    return _NAN if a == 0 or math.isnan(a) else math.copysign(math.inf, a) * math.copysign(1, b)


def remainder(a: float, b: float) -> float:
    """`a % b` with the sign of `a`."""
    if b == 0 or math.isinf(a):
        return _NAN
    return math.fmod(a, b)


def power(a: float, b: float) -> float:
    """`a ^ b`; NaN for a root of a negative number."""
    odd = b % 2 == 1
    try:
        return math.pow(a, b)
    except OverflowError:
        return -math.inf if a < 0 and odd else math.inf
    except ValueError:
        return math.copysign(math.inf, a if odd else 1) if a == 0 else _NAN


ARITHMETIC: Final[dict[str, Callable[[float, float], float]]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": divided,
    "%": remainder,
    "^": power,
    "atan2": math.atan2,
}
COMPARISON: Final[dict[str, Callable[[float, float], bool]]] = {
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
    ">=": operator.ge,
    "<=": operator.le,
}


def logarithm(value: float, log: Callable[[float], float]) -> float:
    """A logarithm that is -Inf at zero and NaN below."""
    if value > 0 or math.isnan(value):
        return log(value)
    return -math.inf if value == 0 else _NAN


def rounded(value: float, step: float) -> float:
    """The nearest multiple of `step`, halves upwards."""
    inverse = divided(1, step)
    scaled = value * inverse + 0.5
    return divided(math.floor(scaled) if math.isfinite(scaled) else scaled, inverse)


def total(values: Iterable[float]) -> float:
    """A sum with Neumaier's compensation, as Prometheus sums: neither `sum` nor `fsum` comes to the same."""
    result = lost = 0.0
    for value in values:
        grown = result + value
        if math.isinf(grown):
            lost = 0.0
        elif abs(result) >= abs(value):
            lost += (result - grown) + value
        else:
            lost += (value - grown) + result
        result = grown
    return result if math.isinf(result) else result + lost


def mean(values: Sequence[float]) -> float:
    """The average; a sum that overflows does not spoil it."""
    count = len(values)
    whole = total(values)
    if math.isinf(whole) and not any(map(math.isinf, values)):
        return total(value / count for value in values)
    return whole / count


def variance(values: Sequence[float]) -> float:
    """The population's variance, by Welford's method: exactly 0 of equal values."""
    centre = squares = 0.0
    for count, value in enumerate(values, 1):
        off = value - centre
        centre += off / count
        squares += off * (value - centre)
    return squares / len(values)


def quantile(q: float, values: Sequence[float]) -> float:
    """The q-quantile with linear interpolation; NaN counts as the smallest value."""
    if not values or math.isnan(q):
        return _NAN
    if not 0 <= q <= 1:
        return math.copysign(math.inf, q)
    ordered = sorted(values, key=lambda v: -math.inf if math.isnan(v) else v)
    rank = q * (len(ordered) - 1)
    low = math.floor(rank)
    high = min(low + 1, len(ordered) - 1)
    weight = rank - low
    return ordered[low] * (1 - weight) + ordered[high] * weight


def least(values: Iterable[float]) -> float:
    """The minimum of what is not NaN."""
    return min((v for v in values if not math.isnan(v)), default=_NAN)


def greatest(values: Iterable[float]) -> float:
    """The maximum of what is not NaN."""
    return max((v for v in values if not math.isnan(v)), default=_NAN)


def linear_regression(at_ms: Sequence[int], values: Sequence[float], origin_ms: int) -> tuple[float, float]:
    """Slope per second, and value at `origin_ms`, of the least-squares line."""
    if all(value == values[0] for value in values):
        return (_NAN, _NAN) if math.isinf(values[0]) else (0.0, values[0])
    seconds = [(at - origin_ms) / 1000 for at in at_ms]
    n, sum_x, sum_y = len(values), total(seconds), total(values)
    covariance = total(x * y for x, y in zip(seconds, values, strict=True)) - sum_x * sum_y / n
    spread = total(x * x for x in seconds) - sum_x * sum_x / n
    slope = divided(covariance, spread)
    return slope, sum_y / n - slope * sum_x / n


def shown(value: float) -> str:
    """As Go's %g has it: the fewest digits that tell the value, with an exponent below 1e-4 and from 1e6 on.

    NaN, +Inf, -Inf.
    """
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        return repr(value).removesuffix(".0")
    digits = Decimal(repr(value)).normalize().as_tuple().digits
    return f"{value:.{len(digits) - 1}e}"
