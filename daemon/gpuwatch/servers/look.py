"""One server's series as a judge of progress reads them: by metric, span and run; decides nothing."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Final

from gpuwatch.promql import Matcher

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gpuwatch.promql import Querier, Series

_MOST_GAP_MS: Final = 30_000  # the host slept, or gpuwatch was away: nobody looked
_FRESH_MS: Final = 10_000


@dataclass(frozen=True, slots=True)
class Look:
    """What a querier holds of a server at `now_ms`, nothing of it older than `since_ms`."""

    querier: Querier
    server: str
    now_ms: int
    since_ms: int

    def at(self, metrics: str, span_ms: int, *more: Matcher) -> Sequence[Series]:
        """The server's series of these metrics, names joined by `|`, over the last `span_ms`."""
        return self.of_host(metrics, span_ms, Matcher("server", "=", self.server), *more)

    def of_host(self, metrics: str, span_ms: int, *more: Matcher) -> Sequence[Series]:
        """The same, whoever's they are."""
        after_ms = max(self.now_ms - span_ms, self.since_ms - 1)
        name = Matcher("__name__", "=~" if "|" in metrics else "=", metrics)
        return self.querier.select((name, *more), after_ms, self.now_ms)


def last(series: Series | None) -> tuple[int, float] | None:
    """The newest sample that is a finite number, and so no staleness marker: instant and value."""
    if series is None:
        return None
    backwards = zip(reversed(series.at_ms), reversed(series.values), strict=True)
    return next(((at_ms, value) for at_ms, value in backwards if isfinite(value)), None)


def is_fresh(series: Series, now_ms: int) -> bool:
    """Whether the series goes on: its newest sample is recent, and not the end of it."""
    value = series.values[-1]
    return value == value and now_ms - series.at_ms[-1] <= _FRESH_MS


def run_began_ms(series: Series, holds: Callable[[float], bool]) -> int | None:
    """When the run of samples that hold, which reaches to the newest, began; None if the newest does not."""
    began_ms = None
    for at_ms, value in zip(reversed(series.at_ms), reversed(series.values), strict=True):
        if value != value:
            continue
        if not holds(value) or (began_ms is not None and began_ms - at_ms > _MOST_GAP_MS):
            break
        began_ms = at_ms
    return began_ms
