"""The functions on times and durations, which few templates use; reads no clock, all times are UTC."""

from __future__ import annotations

import math
import re
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final, Self

from gpuwatch.rules.templates.humanize import four_digits, number
from gpuwatch.rules.templates.literals import quote
from gpuwatch.rules.templates.values import ANY, STRING, Fault, Function, Stringer, Value
from gpuwatch.rules.templates.verbs import show

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_SECOND_NS: Final = 1_000_000_000
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_YEAR_1_S: Final = -62_135_596_800
_YEAR_10000_S: Final = 253_402_300_800
_INT64: Final = 2**63
_MONTHS: Final = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
_DAYS: Final = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


class Int64(int):
    """Go's int64, which counts seconds and the like."""

    go_type = "int64"


class Named(Stringer, int):
    """A month or a weekday."""

    def __new__(cls, value: int, name: str, go_type: str) -> Self:
        """`name` is how it reads."""
        named = super().__new__(cls, value)
        named.name, named.go_type = name, go_type
        return named

    name: str

    def __str__(self) -> str:
        return self.name


class Duration(Stringer, int):
    """Nanoseconds."""

    go_type = "time.Duration"

    def __str__(self) -> str:
        """As Go prints it: `1h2m3.5s`, `1.5ms`."""
        sign, left = "-" if self < 0 else "", abs(int(self))
        for unit, size in (("ns", 1), ("µs", 1000), ("ms", 1_000_000)):
            if left < max(size * 1000, 1) and left:
                return f"{sign}{_decimal(left, size)}{unit}"
        minutes, left = divmod(left, 60 * _SECOND_NS)
        hours, minutes = divmod(minutes, 60)
        larger = f"{hours}h{minutes}m" if hours else f"{minutes}m" if minutes else ""
        return f"{sign}{larger}{_decimal(left, _SECOND_NS)}s"

    @property
    def methods(self) -> Mapping[str, Function]:
        """What `.Name` of a duration calls."""
        return _DURATION_METHODS


class Time(Stringer):
    """An instant, in nanoseconds since 1970."""

    __slots__ = ("at_ns",)
    go_type = "time.Time"

    def __init__(self, at_ns: int) -> None:
        """Fault beyond Python's calendar."""
        if not _YEAR_1_S <= at_ns // _SECOND_NS < _YEAR_10000_S:
            raise Fault("the time lies outside of the years 1 to 9999")
        self.at_ns = at_ns

    def __str__(self) -> str:
        return _formatted(self, "2006-01-02 15:04:05.999999999 -0700 MST")

    @property
    def methods(self) -> Mapping[str, Function]:
        """What `.Name` of a time calls."""
        return _TIME_METHODS

    @property
    def utc(self) -> datetime:
        """The calendar's view, less what is below a second."""
        return _EPOCH + timedelta(seconds=self.at_ns // _SECOND_NS)


class TimePointer(Time):
    """What `toTime` yields."""

    __slots__ = ()
    go_type = "*time.Time"


def _decimal(count: int, size: int) -> str:
    whole, rest = divmod(count, size)
    digits = str(rest).rjust(len(str(size)) - 1, "0").rstrip("0") if rest else ""
    return f"{whole}.{digits}" if digits else str(whole)


# ---- functions


def _to_time(value: Value) -> TimePointer:
    seconds = number(value)
    if not math.isfinite(seconds):
        raise Fault("value is NaN or Inf")
    if abs(seconds * 1e9) > _INT64:
        shown = show(seconds)
        raise Fault(f"{shown} cannot be represented as a nanoseconds timestamp since it overflows int64")
    return TimePointer(int(int(seconds * 1e9) / 1_000_000) * 1_000_000)


def _humanize_timestamp(value: Value) -> str:
    seconds = number(value)
    if not math.isfinite(seconds):
        return four_digits(seconds)
    return str(_to_time(value))


def _parse_duration(text: str) -> float:
    from gpuwatch.config.duration import Duration as Written  # noqa: PLC0415 (few templates parse one)

    if text == "":
        raise Fault("empty duration string")
    sign = -1 if text.startswith("-") else 1
    try:
        return sign * Written.parse(text.removeprefix("-")) / 1000
    except ValueError as error:
        raise Fault(f"not a valid duration string: {quote(text.removeprefix('-'))}") from error


# ---- methods

_PARTS: Final = re.compile(
    r"January|Jan(?![a-z])|Monday|Mon(?![a-z])|MST|2006|-07:00|-0700|-07|Z07:00|Z0700|[.,]0+(?!\d)|[.,]9+(?!\d)"
    r"|__2|002|_2|0[1-6]|15|[1-5]|PM|pm"
)
_PLAIN_PARTS: Final[Mapping[str, str]] = {
    "2006": "%Y", "06": "%y", "01": "%m", "02": "%d", "15": "%H", "03": "%I", "04": "%M", "05": "%S",
    "002": "%j", "PM": "%p", "MST": "UTC", "-0700": "+0000", "-07:00": "+00:00", "-07": "+00",
    "Z07:00": "Z", "Z0700": "Z",
}  # fmt: skip


def _formatted(time: Time, layout: str) -> str:
    """Go's layouts, in which 2006-01-02 15:04:05 stands for the parts of a time."""
    return _PARTS.sub(lambda part: _part(time, part.group()), layout)


def _part(time: Time, part: str) -> str:
    utc = time.utc
    if part[0] in ".,":
        digits = f"{time.at_ns % _SECOND_NS:09}"[: len(part) - 1]
        shown = digits if part[1] == "0" else digits.rstrip("0")
        return part[0] + shown if shown else ""
    names = {"January": _MONTHS[utc.month - 1], "Monday": _DAYS[utc.weekday()]}
    for name, shown in names.items():
        if part in {name, name[:3]}:
            return shown[: len(part)] if len(part) == 3 else shown
    counts = {"1": utc.month, "2": utc.day, "3": (utc.hour - 1) % 12 + 1, "4": utc.minute, "5": utc.second}
    if part in counts:
        return str(counts[part])
    if part.startswith("_"):
        return str(utc.day).rjust(2) if part == "_2" else str(utc.timetuple().tm_yday).rjust(3)
    shown = utc.strftime(_PLAIN_PARTS.get(part.upper() if part == "pm" else part, part))
    return shown.lower() if part == "pm" else shown


def _truncated(duration: Duration, unit: Duration) -> Duration:
    if unit <= 0:
        return Duration(duration)
    whole = abs(duration) // unit * unit
    return Duration(whole if duration >= 0 else -whole)


def _rounded(duration: Duration, unit: Duration) -> Duration:
    if unit <= 0:
        return Duration(duration)
    whole = (abs(duration) * 2 + unit) // (unit * 2) * unit
    return Duration(whole if duration >= 0 else -whole)


def _method(call: Callable[..., Value], *takes: str) -> Function:
    return Function(takes, call)


def _whole(unit_ns: int) -> Function:
    return _method(lambda duration: Int64(int(duration / unit_ns)))


def _in(unit_ns: int) -> Function:
    return _method(lambda duration: int(duration) / unit_ns)


_TIME: Final = "time.Time"
_DURATION: Final = "time.Duration"
_DURATION_METHODS: Final = {
    "Abs": _method(lambda duration: Duration(abs(duration))),
    "Hours": _in(3600 * _SECOND_NS),
    "Microseconds": _whole(1000),
    "Milliseconds": _whole(1_000_000),
    "Minutes": _in(60 * _SECOND_NS),
    "Nanoseconds": _whole(1),
    "Round": _method(_rounded, _DURATION),
    "Seconds": _in(_SECOND_NS),
    "String": _method(str),
    "Truncate": _method(_truncated, _DURATION),
}
_TIME_METHODS: Final = {
    "Add": _method(lambda time, duration: Time(time.at_ns + duration), _DURATION),
    "After": _method(lambda time, other: time.at_ns > other.at_ns, _TIME),
    "Before": _method(lambda time, other: time.at_ns < other.at_ns, _TIME),
    "Day": _method(lambda time: time.utc.day),
    "Equal": _method(lambda time, other: time.at_ns == other.at_ns, _TIME),
    "Format": _method(_formatted, STRING),
    "Hour": _method(lambda time: time.utc.hour),
    "Minute": _method(lambda time: time.utc.minute),
    "Month": _method(lambda time: Named(time.utc.month, _MONTHS[time.utc.month - 1], "time.Month")),
    "Nanosecond": _method(lambda time: time.at_ns % _SECOND_NS),
    "Second": _method(lambda time: time.utc.second),
    "String": _method(str),
    "Sub": _method(lambda time, other: Duration(time.at_ns - other.at_ns), _TIME),
    "UTC": _method(lambda time: Time(time.at_ns)),
    "Unix": _method(lambda time: Int64(time.at_ns // _SECOND_NS)),
    "UnixMicro": _method(lambda time: Int64(time.at_ns // 1000)),
    "UnixMilli": _method(lambda time: Int64(time.at_ns // 1_000_000)),
    "UnixNano": _method(lambda time: Int64(time.at_ns)),
    "Weekday": _method(
        lambda time: Named(time.utc.isoweekday() % 7, _DAYS[time.utc.weekday()], "time.Weekday")
    ),
    "Year": _method(lambda time: time.utc.year),
    "YearDay": _method(lambda time: time.utc.timetuple().tm_yday),
}

FUNCTIONS: Final = {
    "humanizeTimestamp": Function((ANY,), _humanize_timestamp),
    "parseDuration": Function((STRING,), _parse_duration),
    "toTime": Function((ANY,), _to_time),
}
