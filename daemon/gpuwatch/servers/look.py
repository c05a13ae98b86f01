"""One server's series as judges and hands read them: by metric, span and run; decides nothing."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise, takewhile
from math import isfinite
from typing import TYPE_CHECKING, Final

from gpuwatch.promql import Matcher

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from gpuwatch.promql import Querier, Series

_MOST_GAP_MS: Final = 30_000  # the host slept, or gpuwatch was away: nobody looked
_LEAST_RATE_MS: Final = 10_000
FRESH_MS: Final = 10_000

RUNNING: Final = "vllm:num_requests_running"
WAITING: Final = "vllm:num_requests_waiting"
TOKENS: Final = "vllm:generation_tokens_total"
KV_USE: Final = "vllm:kv_cache_usage_perc"
SLEEP: Final = "vllm:engine_sleep_state"
IN_FLIGHT: Final = "server_requests_in_flight"
LIMIT: Final = "server_limit"
STATE: Final = "server_process_state"
EXITS: Final = "server_process_exits_total"
CANARY: Final = "server_canary_ok"
HELD: Final = "gpu_process_memory_used_bytes"


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
    return value == value and now_ms - series.at_ms[-1] <= FRESH_MS


def present(series: Series, now_ms: int) -> float | None:
    """The value of a series that goes on; None if it does not, or has no finite one."""
    value = series.values[-1]
    return value if is_fresh(series, now_ms) and isfinite(value) else None


def finite(series: Series) -> list[tuple[int, float]]:
    """Its samples that are finite numbers: instants and values."""
    both = zip(series.at_ms, series.values, strict=True)
    return [sample for sample in both if isfinite(sample[1])]


def since_marker(series: Series) -> list[tuple[int, float]]:
    """Its samples since it ended last: those of a process, or of a time in which it could be read."""
    both = zip(reversed(series.at_ms), reversed(series.values), strict=True)
    return list(takewhile(lambda sample: isfinite(sample[1]), both))[::-1]


def rate(found: Iterable[Series], now_ms: int) -> float | None:
    """What counters that go on rose by a second, all together, as far back as they were read throughout.

    None where none goes on, or for less than ten seconds: two readings make no rate.
    """
    runs = [run for series in found if is_fresh(series, now_ms) and (run := since_marker(series))]
    span_ms = max((run[-1][0] - run[0][0] for run in runs), default=0)
    if span_ms < _LEAST_RATE_MS:
        return None
    rises = (max(after - before, 0.0) for run in runs for (_, before), (_, after) in pairwise(run))
    return 1000 * sum(rises) / span_ms


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
