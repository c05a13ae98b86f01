"""Numbers and texts as Go's fmt and Prometheus' template functions print them; knows no template."""

from __future__ import annotations

import math
import re
from decimal import Decimal
from typing import TYPE_CHECKING, Final, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

Value: TypeAlias = str | float | int

FLOAT_VERBS: Final = frozenset("feEgG")
VERBS: Final = FLOAT_VERBS | frozenset("dsv%")
_VERB: Final = re.compile(
    r"%(?P<flags>[-+ 0]*)(?P<width>\d+)?(?:\.(?P<precision>\d*))?(?P<verb>.)", re.DOTALL
)
_GO_TYPES: Final = {str: "string", float: "float64", int: "int"}
_TAKES: Final[dict[str, type | tuple[type, ...]]] = {"s": str, "d": int, "v": (str, float, int)}
_LARGE: Final = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")
_LARGE_1024: Final = ("", "ki", "Mi", "Gi", "Ti", "Pi", "Ei", "Zi", "Yi")
_SMALL: Final = ("", "m", "u", "n", "p", "f", "a", "z", "y")


def verbs(form: str) -> Iterator[tuple[str, int]]:
    """The verbs of a format with their positions; one that is cut short is "" or no verb of ours."""
    for match in re.finditer(_VERB.pattern + "|%", form, re.DOTALL):
        yield match["verb"] or "", match.start()


def text(value: Value) -> str:
    """Go's `%v`."""
    return _shortest(value) if isinstance(value, float) else str(value)


def _shortest(value: float) -> str:
    """Go's shortest `%g`: the fewest digits that tell the value, an exponent below 1e-4 and from 1e6 on."""
    if not math.isfinite(value):
        return _not_finite(value)
    plain = repr(value).removesuffix(".0")
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        return plain
    digits = Decimal(repr(value)).normalize().as_tuple().digits
    return f"{value:.{len(digits) - 1}e}"


def _not_finite(value: float) -> str:
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"


def printf(form: str, *values: Value) -> str:
    """Go's `Sprintf` for the verbs in `VERBS`; what does not fit is told in the text, as Go does."""
    rest = list(values)

    def replaced(match: re.Match[str]) -> str:
        if match["verb"] == "%":
            return "%"
        if not rest:
            return f"%!{match['verb']}(MISSING)"
        return _one(match, rest.pop(0))

    result = _VERB.sub(replaced, form)
    if rest:
        extra = ", ".join(f"{_GO_TYPES[type(value)]}={text(value)}" for value in rest)
        result += f"%!(EXTRA {extra})"
    return result


def _one(match: re.Match[str], value: Value) -> str:
    verb, flags, width = match["verb"], match["flags"], int(match["width"] or 0)
    if not isinstance(value, _TAKES.get(verb, float)):
        return f"%!{verb}({_GO_TYPES[type(value)]}={text(value)})"
    zeros = "0" in flags and "-" not in flags and _is_number(value)
    if isinstance(value, str):
        shown = value if match["precision"] is None else value[: int(match["precision"] or 0)]
    else:
        shown = _number(match, value)
    if zeros:
        return shown.zfill(width)
    return shown.ljust(width) if "-" in flags else shown.rjust(width)


def _is_number(value: Value) -> bool:
    return not isinstance(value, str) and math.isfinite(value)


def _number(match: re.Match[str], value: float) -> str:
    verb, precision = match["verb"], match["precision"]
    if isinstance(value, int) or not math.isfinite(value) or (verb in "vgG" and precision is None):
        shown = text(value)
    else:
        kind = "g" if verb == "v" else verb
        shown = format(value, f".{6 if precision is None else int(precision or 0)}{kind}")
    if shown[0] in "+-":
        return shown
    return "+" + shown if "+" in match["flags"] else " " + shown if " " in match["flags"] else shown


def humanize(value: float) -> str:
    """Four digits and an SI prefix."""
    if value == 0 or not math.isfinite(value):
        return _four_digits(value)
    if abs(value) >= 1:
        return _prefixed(value, _LARGE, 1000)
    return _small(value)


def humanize1024(value: float) -> str:
    """Four digits and a binary prefix."""
    if abs(value) <= 1 or not math.isfinite(value):
        return _four_digits(value)
    return _prefixed(value, _LARGE_1024, 1024)


def humanize_percentage(value: float) -> str:
    """A ratio as per cent, in four digits."""
    return _four_digits(value * 100) + "%"


def humanize_duration(value: float) -> str:
    """Seconds as days, hours, minutes and seconds."""
    if not math.isfinite(value):
        return _four_digits(value)
    if abs(value) < 1:
        return ("0" if value == 0 else _small(value)) + "s"
    sign, whole = "-" if value < 0 else "", int(abs(value))
    minutes, seconds = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{sign}{days}d {hours}h {minutes}m {seconds}s"
    if hours:
        return f"{sign}{hours}h {minutes}m {seconds}s"
    if minutes:
        return f"{sign}{minutes}m {seconds}s"
    return f"{_four_digits(value)}s"


def _prefixed(value: float, prefixes: Sequence[str], base: int) -> str:
    for prefix in prefixes[:-1]:
        if abs(value) < base:
            return _four_digits(value) + prefix
        value /= base
    return _four_digits(value) + prefixes[-1]


def _small(value: float) -> str:
    for prefix in _SMALL[:-1]:
        if abs(value) >= 1:
            return _four_digits(value) + prefix
        value *= 1000
    return _four_digits(value) + _SMALL[-1]


def _four_digits(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) else _not_finite(value)
