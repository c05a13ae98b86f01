"""The parts of a date in UTC, by Prometheus' function names; any instant of 63 bits, no time zones."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_DAY_S: Final = 86_400
_DAYS_OF_400_YEARS: Final = 146_097
_DAYS_TO_MARCH_OF_0: Final = 719_468  # from 0000-03-01 to 1970-01-01
_DAYS_OF_MONTHS: Final = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
_NO_INSTANT: Final = -(2**63)  # what Go makes of a float that no int64 holds


class _Date(NamedTuple):
    year: int
    month: int
    day: int


def _seconds(value: float) -> int:
    return int(value) if math.isfinite(value) and abs(value) < 2**63 else _NO_INSTANT


def _date(value: float) -> _Date:
    """Of a Unix time. Years begin in March here, so that a leap day is the last of its year."""
    days = _seconds(value) // _DAY_S + _DAYS_TO_MARCH_OF_0
    era, day = divmod(days, _DAYS_OF_400_YEARS)
    year = (day - day // 1460 + day // 36_524 - day // 146_096) // 365
    day -= 365 * year + year // 4 - year // 100
    shifted = (5 * day + 2) // 153  # months from March
    month = shifted + 3 if shifted < 10 else shifted - 9
    return _Date(era * 400 + year + (month <= 2), month, day - (153 * shifted + 2) // 5 + 1)


def _month_days(date: _Date) -> int:
    leap = date.year % 4 == 0 and (date.year % 100 != 0 or date.year % 400 == 0)
    return _DAYS_OF_MONTHS[date.month - 1] + (date.month == 2 and leap)


def _day_of_year(date: _Date) -> int:
    return date.day + sum(_month_days(date._replace(month=month)) for month in range(1, date.month))


PARTS: Final[Mapping[str, Callable[[float], float]]] = {
    "minute": lambda value: float(_seconds(value) % 3600 // 60),
    "hour": lambda value: float(_seconds(value) % _DAY_S // 3600),
    "day_of_week": lambda value: float((_seconds(value) // _DAY_S + 4) % 7),  # 1970 began on a Thursday
    "day_of_month": lambda value: float(_date(value).day),
    "day_of_year": lambda value: float(_day_of_year(_date(value))),
    "days_in_month": lambda value: float(_month_days(_date(value))),
    "month": lambda value: float(_date(value).month),
    "year": lambda value: float(_date(value).year),
}
