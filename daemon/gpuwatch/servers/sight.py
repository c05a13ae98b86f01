"""What can be seen of a server for the steps of a remediation, out of series alone; waits for nothing.

Rule 1: what was not read within ten seconds, or has ended, is not known: None, not 0.
Rule 2: processes of one name are one series: what is counted are names, which is exact at 0.
Rule 3: an orphan of which nobody knows the server is the server's where it holds a GPU of the server's.
Rule 4: of a server that was never seen on a GPU, nobody can tell whether NVML would list it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Final

from gpuwatch.promql import Matcher
from gpuwatch.records import Labels, Sight
from gpuwatch.servers.look import (
    CANARY,
    EXITS,
    FRESH_MS,
    HELD,
    IN_FLIGHT,
    KV_USE,
    LIMIT,
    RUNNING,
    SLEEP,
    STATE,
    TOKENS,
    WAITING,
    Look,
    last,
    present,
    rate,
    since_marker,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from gpuwatch.promql import Querier, Series
    from gpuwatch.records import Errand, ServerStart, ServerState

_LOOKBACK_MS: Final = 300_000
_MINUTE_MS: Final = 60_000
_HELD_SPANS_MS: Final = (_MINUTE_MS, _LOOKBACK_MS, 3_600_000)
_MOVES_BYTES: Final = 256 * 2**20
_MOST_GAP_MS: Final = 10_000

_PROGRESS: Final = "server_progress"
_PAUSED: Final = "server_guest_paused"
_GUESTS: Final = "server_guests"
_PRESENT: Final = (
    f"{RUNNING}|{WAITING}|{KV_USE}|{SLEEP}|{STATE}|{EXITS}|{IN_FLIGHT}|{LIMIT}"
    f"|{_PAUSED}|{_GUESTS}|{_PROGRESS}"
)
_FREE: Final = "gpu_memory_free_bytes"
_TOTAL: Final = "gpu_memory_total_bytes"
_OF_GPUS: Final = f"{HELD}|{_FREE}|{_TOTAL}|up"

_Present = defaultdict[str, list[tuple[Labels, float]]]


def sight(
    querier: Querier,
    state: ServerState,
    *,
    starts: Sequence[ServerStart],
    errands: Mapping[str, Errand],
    revision: int | None,
    now_ms: int,
) -> Sight:
    """All that is known now of the server of `state`, from what `querier` holds of the last hour.

    `starts` are the server's, the newest first; `errands` and `revision` are what its hands know.
    """
    look = Look(querier, state.name, now_ms, 0)
    now = _present(look)
    door = _of(now[IN_FLIGHT], source="admission")
    doors = _told(now, "door", len(door))
    gpus = _gpus(look)
    return Sight(
        requests_running=_sum(now[RUNNING]),
        requests_waiting=_sum(now[WAITING]),
        in_flight=_sum(door),
        kv_use_ratio=max((value for _, value in now[KV_USE]), default=None),
        doors=doors,
        guests=max(doors, _told(now, "guest", len(now[_PAUSED]))),
        admission_limit=_sum(_of(now[LIMIT], limit="admission")),
        running_limit=_sum(_of(now[LIMIT], limit="running")),
        processes=_processes(now),
        gpu_holders=gpus.holders(),
        free_bytes=gpus.figures(gpus.free),
        total_bytes=gpus.figures(gpus.total),
        free_steady_since_ms=gpus.steady_since_ms(),
        rival_bytes=gpus.rivals(),
        others_growing=gpus.others_growing(),
        asleep=any(not value for _, value in _of(now[SLEEP], sleep_state="awake")),
        verdict=next((labels.get("verdict") for labels, value in now[_PROGRESS] if value), ""),
        canary_ok_at_ms=_canary_ok_at_ms(look),
        tokens_per_s=rate(look.at(TOKENS, _MINUTE_MS), now_ms),
        start=starts[0] if starts else None,
        revision=revision,
        errands=errands,
    )


# -- the server and its guests ---------------------------------------------------------------------------


def _present(look: Look) -> _Present:
    """The present value of each series of the server that goes on, by metric."""
    found: _Present = defaultdict(list)
    for series in look.at(_PRESENT, FRESH_MS + 1):
        value = present(series, look.now_ms)
        if value is not None:
            found[series.labels.metric].append((series.labels, value))
    return found


def _of(found: Iterable[tuple[Labels, float]], **label: str) -> list[tuple[Labels, float]]:
    """Those with these labels."""
    return [one for one in found if all(one[0].get(name) == value for name, value in label.items())]


def _sum(found: Sequence[tuple[Labels, float]]) -> int | None:
    """Of engines or guests together; None if none tells."""
    total = sum(value for _, value in found)
    return int(total) if found and isfinite(total) else None


def _told(now: _Present, part: str, signs: int) -> int:
    """How many guests have this part; of a guest that does not count itself there are signs alone."""
    return _sum(_of(now[_GUESTS], part=part)) or signs


def _processes(now: _Present) -> int | None:
    """The names of which a process lives; the count of ends, which outlives them, tells that none does."""
    if not now[STATE] and not now[EXITS]:
        return None
    alive = {
        labels.get("process")
        for labels, value in now[STATE]
        if value and labels.get("state") != "zombie" and labels.get("role") != "helper"
    }
    return len(alive)


def _canary_ok_at_ms(look: Look) -> int | None:
    """When the last canary was asked that was answered."""
    asked = (
        at_ms
        for series in look.at(CANARY, _LOOKBACK_MS)
        for at_ms, is_ok in zip(series.at_ms, series.values, strict=True)
        if is_ok == 1.0
    )
    return max(asked, default=None)


# -- its GPUs --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Gpus:
    """The last minute of the GPUs that a server holds memory on, or held it last: series by GPU."""

    server: str
    now_ms: int
    uuids: frozenset[str]
    held: Sequence[Series]
    free: Mapping[str, Series]
    total: Mapping[str, Series]
    is_read: bool  # NVML answers for each of them

    def figures(self, of: Mapping[str, Series]) -> dict[str, int]:
        """The present values that are known."""
        values = {uuid: present(series, self.now_ms) for uuid, series in sorted(of.items())}
        return {uuid: int(value) for uuid, value in values.items() if value is not None}

    def holders(self) -> int | None:
        """How many processes of the server hold memory, each counted on each GPU."""
        if not self.is_read:
            return None
        return sum(self._is_own(s) and present(s, self.now_ms) is not None for s in self.held)

    def steady_since_ms(self) -> int | None:
        """Since when the free memory of none of them moved; None if that of one is not known."""
        if not self.uuids or self.figures(self.free).keys() != self.uuids:
            return None
        return max(_steady_since_ms(series) for series in self.free.values())

    def rivals(self) -> dict[tuple[str, str], int]:
        """What others hold, by UUID and name; processes of one name are one."""
        found: defaultdict[tuple[str, str], int] = defaultdict(int)
        for series, held in self._others():
            found[series.labels.get("uuid"), series.labels.get("process")] += int(held)
        return dict(found)

    def others_growing(self) -> bool | None:
        """Whether somebody else came within the minute, or holds so much more than in it."""
        if not self.is_read:
            return None
        return any(_has_grown(one, self.free.get(one.labels.get("uuid"))) for one, _ in self._others())

    def _others(self) -> Iterator[tuple[Series, float]]:
        """What is held now by who is not the server."""
        for series in self.held:
            held = present(series, self.now_ms)
            if held is not None and not self._is_own(series):
                yield series, held

    def _is_own(self, series: Series) -> bool:
        server, owner = series.labels.get("server"), series.labels.get("owner")
        return server == self.server or (not server and owner == "orphan")


def _gpus(look: Look) -> _Gpus:
    uuids = _used(look)
    found: defaultdict[str, list[Series]] = defaultdict(list)
    for uuid in uuids:
        for series in look.of_host(_OF_GPUS, _MINUTE_MS, Matcher("uuid", "=", uuid)):
            found[series.labels.metric].append(series)
    nvml = (s for s in found["up"] if s.labels.get("source") == "nvml")
    up = {s.labels.get("uuid") for s in nvml if present(s, look.now_ms)}
    return _Gpus(
        server=look.server,
        now_ms=look.now_ms,
        uuids=uuids,
        held=found[HELD],
        free={series.labels.get("uuid"): series for series in found[_FREE]},
        total={series.labels.get("uuid"): series for series in found[_TOTAL]},
        is_read=bool(uuids) and up == uuids,
    )


def _used(look: Look) -> frozenset[str]:
    """The UUIDs; what it held long before it held the last is of another life of it."""
    for span_ms in _HELD_SPANS_MS:
        held = [(sample[0], s.labels.get("uuid")) for s in look.at(HELD, span_ms) if (sample := last(s))]
        if held:
            newest_ms, _ = max(held)
            return frozenset(uuid for at_ms, uuid in held if newest_ms - at_ms <= _MINUTE_MS) - {""}
    return frozenset()


def _steady_since_ms(free: Series) -> int:
    """When the samples began that lie within 256 MiB, as far as they follow one another."""
    run = since_marker(free)
    since_ms, low = run[-1]
    high = low
    for at_ms, value in reversed(run):
        low, high = min(low, value), max(high, value)
        if high - low >= _MOVES_BYTES or since_ms - at_ms > _MOST_GAP_MS:
            break
        since_ms = at_ms
    return since_ms


def _has_grown(held: Series, free: Series | None) -> bool:
    """Whether a process that lives came after its GPU was first read, or holds more than it did."""
    run, read = since_marker(held), since_marker(free) if free else []
    came = bool(read) and run[0][0] > read[0][0]
    return came or run[-1][1] - min(value for _, value in run) > _MOVES_BYTES
