"""What each revision of a server's settings came to: judged from rows and series, remembers nothing."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Final, cast

from gpuwatch import promql
from gpuwatch.errors import QueryError
from gpuwatch.records import StartOutcome

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from gpuwatch.promql import Querier
    from gpuwatch.records import Labels, ServerStart

_HOUR_MS: Final = 3_600_000
_SHORTEST_MS: Final = 10_000
_SHORTEST_OF_MINUTES_MS: Final = 120_000
_PEAK: Final = "sum(max_over_time(gpu_process_memory_used_bytes{{{of}}}[{span}]))"
_BEST_MINUTE: Final = "max_over_time(sum(rate(vllm:generation_tokens_total{{{of}}}[1m]))[{span}:30s])"
_FIRST_TOKEN: Final = (
    "histogram_quantile(0.95,"  # noqa: S105 (vLLM's kind of token)
    " sum by (le) (increase(vllm:time_to_first_token_seconds_bucket{{{of}}}[{span}])))"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """All starts of one revision taken together; None where nothing told.

    `kv_cache_tokens` and `healthy_after_ms` are of the newest start that became healthy. The memory of all
    its GPUs, tokens and time to the first token are of the last hour that it served.
    """

    revision: int
    starts: int
    failures: int  # starts that failed, and servers that did after they were healthy
    failure: str  # the class of the newest
    uptime_ms: int
    good_until_ms: int | None  # when it served last of the times that it lasted; None if it never did
    kv_cache_tokens: int | None = None
    healthy_after_ms: int | None = None
    peak_memory_bytes: int | None = None
    best_minute_tokens_per_s: float | None = None
    first_token_p95_s: float | None = None


@dataclass(frozen=True, slots=True)
class _Life:
    """A start, and when it was over or was last seen."""

    start: ServerStart
    until_ms: int
    serves: bool

    @property
    def healthy_ms(self) -> int:
        """How long it served."""
        at_ms = self.start.healthy_at_ms
        return 0 if at_ms is None else max(0, self.until_ms - at_ms)

    def is_good(self, after_ms: int) -> bool:
        """What serves now is good until it proves otherwise."""
        return self.start.healthy_at_ms is not None and (self.serves or self.healthy_ms >= after_ms)


def measured(
    server: str, starts: Iterable[ServerStart], querier: Querier | None, now_ms: int, *, good_after_ms: int
) -> Mapping[int, Measured]:
    """By revision, of all starts that had one; `starts` of this server in any order.

    Without a `querier` there is only what the starts tell. Good is what served for `good_after_ms` on end.
    """
    lives: dict[int, list[_Life]] = {}
    for life in _lives(starts, now_ms):
        if life.start.revision is not None:
            lives.setdefault(life.start.revision, []).append(life)
    return {number: _summed(server, number, each, querier, good_after_ms) for number, each in lives.items()}


def last_good(found: Mapping[int, Measured], *, before: int | None = None) -> int | None:
    """The revision that proved good and served last, of those before one if it is named; None if none did."""
    good = {
        one.good_until_ms: number
        for number, one in found.items()
        if one.good_until_ms is not None and (before is None or number < before)
    }
    return good[max(good)] if good else None


def _lives(starts: Iterable[ServerStart], now_ms: int) -> list[_Life]:
    """Oldest first. One whose end nobody saw was over when the next began."""
    in_order = sorted(starts, key=lambda start: start.began_at_ms)
    nexts = (after.began_at_ms for after in in_order[1:])
    return [_life(start, next_ms, now_ms) for start, next_ms in zip_longest(in_order, nexts)]


def _life(start: ServerStart, next_ms: int | None, now_ms: int) -> _Life:
    known = [at_ms for at_ms in (start.ended_at_ms, next_ms) if at_ms is not None]
    return _Life(start, min(known, default=now_ms), not known and start.outcome is StartOutcome.HEALTHY)


def _summed(
    server: str, number: int, lives: Sequence[_Life], querier: Querier | None, good_after_ms: int
) -> Measured:
    failed = [life.start for life in lives if life.start.failure or life.start.outcome is StartOutcome.FAILED]
    told = Measured(
        revision=number,
        starts=len(lives),
        failures=len(failed),
        failure=failed[-1].failure if failed else "",
        uptime_ms=sum(life.healthy_ms for life in lives),
        good_until_ms=max((life.until_ms for life in lives if life.is_good(good_after_ms)), default=None),
    )
    healthy = [life for life in lives if life.start.healthy_at_ms is not None]
    return _with_figures(told, server, healthy[-1], querier) if healthy else told


def _with_figures(told: Measured, server: str, life: _Life, querier: Querier | None) -> Measured:
    peak = _value(_PEAK, server, life, querier)
    has_minutes = life.healthy_ms >= _SHORTEST_OF_MINUTES_MS
    return replace(
        told,
        kv_cache_tokens=life.start.kv_cache_tokens,
        healthy_after_ms=(life.start.healthy_at_ms or 0) - life.start.began_at_ms,
        peak_memory_bytes=None if peak is None else int(peak),
        best_minute_tokens_per_s=_value(_BEST_MINUTE, server, life, querier) if has_minutes else None,
        first_token_p95_s=_value(_FIRST_TOKEN, server, life, querier),
    )


def _value(template: str, server: str, life: _Life, querier: Querier | None) -> float | None:
    """What an expression comes to over the last hour of a life; None if nothing was measured."""
    span_ms = min(_HOUR_MS, life.healthy_ms)
    if querier is None or span_ms < _SHORTEST_MS:
        return None
    expression = template.format(of=f'server="{server}"', span=f"{span_ms // 1000}s")
    try:
        value = promql.evaluate(promql.parse(expression), querier, life.until_ms).value
    except QueryError:  # more samples than may be read
        return None
    vector = cast("list[tuple[Labels, float]]", value)
    return vector[0][1] if vector and math.isfinite(vector[0][1]) else None
