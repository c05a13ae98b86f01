"""Prometheus' functions that most templates use: numbers made readable, and what a query finds."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Final

from gpuwatch.errors import GpuwatchError
from gpuwatch.rules.templates.literals import quote
from gpuwatch.rules.templates.values import (
    ANY,
    SAMPLE,
    STRING,
    VECTOR,
    Args,
    Fault,
    Function,
    Struct,
    Value,
    Vector,
    go_type,
)
from gpuwatch.rules.templates.verbs import Verb, show

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpuwatch.rules.templates.template import Context

_LARGE: Final = ("", "k", "M", "G", "T", "P", "E", "Z", "Y")
_LARGE_1024: Final = ("", "ki", "Mi", "Gi", "Ti", "Pi", "Ei", "Zi", "Yi")
_SMALL: Final = ("", "m", "u", "n", "p", "f", "a", "z", "y")
_HEXADECIMAL: Final = re.compile(r"[-+]?0[xX].*[pP]")
_NO_FLOAT: Final = re.compile(r"[^-+.0-9a-zA-Z]")
_FOUR_DIGITS: Final = Verb("g", "", 0, 4)
_MAX_WEIGHT: Final = 50
_NIL_POINTER: Final = "runtime error: invalid memory address or nil pointer dereference"


def number(value: Value) -> float:
    """A number, or a text that holds one; Fault for anything else."""
    if isinstance(value, float):
        return value
    if type(value) is int or go_type(value) in {"int64", "uint64", "time.Duration"}:
        return value / 1e9 if go_type(value) == "time.Duration" else float(value)
    if type(value) is str:
        return _parsed(value)
    raise Fault(f"can't convert {go_type(value)} to float")


def _parsed(text: str) -> float:
    """Go's `ParseFloat`: no space, no underscore, hexadecimal only with an exponent."""
    parse = float.fromhex if _HEXADECIMAL.match(text) else float
    try:
        value = math.nan if _NO_FLOAT.search(text) else parse(text)
    except OverflowError:
        value = math.inf
    except ValueError:
        value = math.nan
    what = ""
    if math.isnan(value) and text.lower() != "nan":
        what = "invalid syntax"
    elif math.isinf(value) and any(char.isdigit() for char in text):
        what = "value out of range"
    if what:
        raise Fault(f"strconv.ParseFloat: parsing {quote(text)}: {what}")
    return value


def _humanize(value: Value) -> str:
    """Four digits and an SI prefix."""
    of = number(value)
    if of == 0 or not math.isfinite(of):
        return four_digits(of)
    return _prefixed(of, _LARGE, 1000) if abs(of) >= 1 else _small(of)


def _humanize1024(value: Value) -> str:
    """Four digits and a binary prefix."""
    of = number(value)
    if abs(of) <= 1 or not math.isfinite(of):
        return four_digits(of)
    return _prefixed(of, _LARGE_1024, 1024)


def _humanize_percentage(value: Value) -> str:
    """A ratio as per cent, in four digits."""
    return four_digits(number(value) * 100) + "%"


def _humanize_duration(value: Value) -> str:
    """Seconds as days, hours, minutes and seconds."""
    of = number(value)
    if not math.isfinite(of):
        return four_digits(of)
    if abs(of) < 1:
        return ("0" if of == 0 else _small(of)) + "s"
    spelled = _spelled(int(abs(of))) or f"{four_digits(abs(of))}s"
    return f"-{spelled}" if of < 0 else spelled


def _spelled(seconds: int) -> str:
    """Whole seconds as days and less; empty below a minute."""
    sign = "" if seconds < 2**63 else "-"  # Prometheus' own overflow, each part negative
    minutes, seconds = divmod(min(seconds, 2**63), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = {"d": days, "h": hours, "m": minutes, "s": seconds}
    shown = [f"{sign}{count}{unit}" for unit, count in parts.items()]
    first = next((at for at, count in enumerate(parts.values()) if count), 3)
    return " ".join(shown[first:]) if first < 3 else ""


def _prefixed(value: float, prefixes: Sequence[str], base: int) -> str:
    for prefix in prefixes[:-1]:
        if abs(value) < base:
            return four_digits(value) + prefix
        value /= base
    return four_digits(value) + prefixes[-1]


def _small(value: float) -> str:
    for prefix in _SMALL[:-1]:
        if abs(value) >= 1:
            return four_digits(value) + prefix
        value *= 1000
    return four_digits(value) + _SMALL[-1]


def four_digits(value: float) -> str:
    """As Go's `%.4g`."""
    return show(value, _FOUR_DIGITS)


# ---- queries


def _query(context: Context, expression: str) -> Vector:
    try:
        found = context.query(expression)
    except GpuwatchError as error:
        raise Fault(str(error)) from error
    return Vector(Struct(SAMPLE, {"Labels": dict(labels), "Value": value}) for labels, value in found)


def _first(vector: Vector | None) -> Struct:
    if not vector:
        raise Fault("first() called on vector with no elements")
    return vector[0]


def _label(name: str, sample: Struct | None) -> Value:
    return _labels(sample).get(name, "")


def _strvalue(sample: Struct | None) -> Value:
    return _labels(sample).get("__value__", "")


def _labels(sample: Struct | None) -> dict[str, str]:
    if sample is None:
        raise Fault(_NIL_POINTER)
    labels: dict[str, str] = sample.fields["Labels"]
    return labels


def _value(sample: Struct | None) -> Value:
    if sample is None:
        raise Fault(_NIL_POINTER)
    return sample.fields["Value"]


def _sort_by_label(name: str, vector: Vector | None) -> Vector:
    return Vector(sorted(vector or (), key=lambda sample: str(_label(name, sample))))


def _args(*values: Value) -> Args:
    made = Args({f"arg{index}": value for index, value in enumerate(values)})
    made.weight += sum(value.weight for value in values if isinstance(value, Args))
    if made.weight > _MAX_WEIGHT:  # or a loop makes what no memory could print
        raise Fault(f"more than {_MAX_WEIGHT} args in one another")
    return made


FUNCTIONS: Final = {
    "args": Function((f"...{ANY}",), _args),
    "first": Function((VECTOR,), _first),
    "humanize": Function((ANY,), _humanize),
    "humanize1024": Function((ANY,), _humanize1024),
    "humanizeDuration": Function((ANY,), _humanize_duration),
    "humanizePercentage": Function((ANY,), _humanize_percentage),
    "label": Function((STRING, SAMPLE), _label),
    "query": Function((STRING,), _query, needs_context=True),
    "sortByLabel": Function((STRING, VECTOR), _sort_by_label),
    "strvalue": Function((SAMPLE,), _strvalue),
    "value": Function((SAMPLE,), _value),
}
