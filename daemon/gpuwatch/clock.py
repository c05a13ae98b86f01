"""The only place that reads time. Everything else is handed `now_ms`."""

from __future__ import annotations

import datetime as dt
import time
from typing import Protocol


class Clock(Protocol):
    """Tells the time in UTC epoch milliseconds."""

    def now_ms(self) -> int:
        """The time now."""
        ...


class SystemClock:
    """The wall clock, which may step either way."""

    def now_ms(self) -> int:
        """UTC epoch milliseconds."""
        return time.time_ns() // 1_000_000


class SteadyClock:
    """Another clock that never goes back: a step back holds still until time has caught up."""

    def __init__(self, inner: Clock) -> None:
        """Start at the inner clock's time."""
        self._inner = inner
        self._last_ms = inner.now_ms()
        self.stepped_back_ms = 0

    def now_ms(self) -> int:
        """The inner clock's time, or the last one given if that was later."""
        now_ms = self._inner.now_ms()
        self.stepped_back_ms = max(0, self._last_ms - now_ms)
        self._last_ms = max(self._last_ms, now_ms)
        return self._last_ms


class ManualClock:
    """Moves only when told; refuses to go back."""

    def __init__(self, now_ms: int = 0) -> None:
        """Start at `now_ms`."""
        self._now_ms = now_ms

    def now_ms(self) -> int:
        """The time it was last moved to."""
        return self._now_ms

    def advance(self, ms: int) -> None:
        """Go on by `ms` milliseconds; ValueError if negative."""
        if ms < 0:
            message = f"time cannot go back: advance({ms})"
            raise ValueError(message)
        self._now_ms += ms


class ScaledClock:
    """Runs `speed` times as fast as the wall, from `start_ms`: the clock of a played recording."""

    def __init__(self, start_ms: int, speed: float) -> None:
        """Start now."""
        self._start_ms = start_ms
        self._speed = speed
        self._began_s = time.monotonic()

    def now_ms(self) -> int:
        """`start_ms` and what has passed since, times `speed`."""
        return self._start_ms + int((time.monotonic() - self._began_s) * 1000 * self._speed)


def monotonic_s() -> float:
    """Seconds of a clock that never steps, for measuring how long a thing took."""
    return time.monotonic()


def thread_cpu_s() -> float:
    """Seconds of CPU that this thread has taken."""
    return time.thread_time()


def monotonic_us() -> int:
    """CLOCK_MONOTONIC in microseconds: what systemd's MONOTONIC_USEC wants."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000


def utc_now() -> dt.datetime:
    """The wall clock as an aware datetime, for schedulers."""
    return dt.datetime.now(tz=dt.UTC)


def utc_text(at_ms: int) -> str:
    """An instant for people."""
    return f"{dt.datetime.fromtimestamp(at_ms / 1000, tz=dt.UTC):%Y-%m-%d %H:%M:%S} UTC"
