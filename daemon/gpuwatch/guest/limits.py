"""The limits that this process is asked to keep; they lapse by themselves, and nothing here keeps them.

Level, not edge: each asking replaces all of them, and holds no longer than it says: who asked and died leaves
nothing behind.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

LONGEST_S: Final = 3600
_LEAST: Final = {"running": 0, "tokens": 1, "admission": 0}
_MOST: Final = 2**31


@dataclass(frozen=True, slots=True)
class Limits:
    """None where there is no limit; `until_s` by `time.monotonic`."""

    running: int | None = None  # sequences of one engine
    tokens: int | None = None  # of one engine's step
    admission: int | None = None  # requests in one API process
    until_s: float = 0.0

    def asked(self, *names: str) -> dict[str, int]:
        """Those of `names` that are set."""
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}


NONE: Final = Limits()


class Held:
    """What was asked last. The guest's thread alone writes; any thread reads, without a lock."""

    def __init__(self) -> None:
        """No limit."""
        self.limits = NONE

    def take(self, request: Mapping[str, Any]) -> Limits:
        """Replace them all; ValueError, and no change, if `request` is not whole."""
        asked = {name: _number(name, request.get(name)) for name in _LEAST}
        for_s = _seconds(request.get("for_s"))
        is_lifted = all(value is None for value in asked.values())
        self.limits = NONE if is_lifted else Limits(**asked, until_s=time.monotonic() + for_s)
        return self.limits

    def in_force(self) -> Limits:
        """Those that have not lapsed."""
        limits = self.limits
        return limits if limits is not NONE and time.monotonic() < limits.until_s else NONE

    def forget_lapsed(self) -> None:
        """So that nobody has to look at the time any more; for the guest's thread."""
        self.limits = self.in_force()


HELD: Final = Held()


def _number(name: str, value: object) -> int | None:
    if value is None:
        return None
    if type(value) is not int or not _LEAST[name] <= value < _MOST:
        raise ValueError(f"{name} must be null or a whole number of at least {_LEAST[name]}")
    return value


def _seconds(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= LONGEST_S:
        raise ValueError(f"for_s must be more than 0 and at most {LONGEST_S} seconds")
    return float(value)
