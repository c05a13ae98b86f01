"""What goes on beside the straight line: reads the logs of starts, seals hours, deletes, sends on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final

from gpuwatch import notify, remediation, remote_write, servers
from gpuwatch.records import Labels, Sample
from gpuwatch.remote_write import RemoteWriteError
from gpuwatch.store import Changes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from gpuwatch.records import Scrape
    from gpuwatch.remote_write import RemoteWriter, WriterState
    from gpuwatch.store import Store
    from gpuwatch.troubles import Troubles

    Row = tuple[int, Scrape]

_PRUNE_MS: Final = 600_000
_SEAL_MS: Final = 60_000
_SEND_MS: Final = 5_000
_START_MS: Final = 1_000
_REQUESTS_A_TURN: Final = 50
_ROWS_A_REQUEST: Final = 200
_ROWS_ONE_BY_ONE: Final = 2


@dataclass(frozen=True, slots=True)
class Job:
    """Something to run every `every_ms`, `offset_ms` after the full second, handed the time.

    A `worker` job may take long beside the others.
    """

    name: str
    every_ms: int
    run: Callable[[int], object]
    offset_ms: int = 0
    worker: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Upkeep:
    """What it works on; `spool_ms`: how long samples wait for a receiver.

    `starts` by server; `append` takes what a target gives at an instant, and ends what it no longer gives.
    """

    store: Store
    receivers: Iterable[str]
    writers: Mapping[str, RemoteWriter]
    spool_ms: int
    starts: Mapping[str, servers.StartWatch]
    append: Callable[[str, Sequence[Sample], int], None]
    troubles: Troubles
    jitter: Callable[[], float]
    hands: Mapping[str, servers.Hands] = field(default_factory=dict)

    def jobs(self) -> list[Job]:
        """The schedule as data."""
        sends = [Job(f"send:{n}", _SEND_MS, partial(self.send, n), offset_ms=700) for n in self.writers]
        starts = [Job(f"start:{n}", _START_MS, partial(self.read_start, n)) for n in self.starts]
        return [
            *starts,
            *sends,
            Job("seal", _SEAL_MS, self.store.seal, offset_ms=800),
            Job("prune", _PRUNE_MS, self.prune, offset_ms=900),
        ]

    def read_start(self, name: str, now_ms: int) -> None:
        """Read on in a server's log while it starts, and keep what it says."""
        state = self.store.servers().get(name)
        if state is None:
            return
        watch = self.starts[name]
        known = self.store.starts(name, limit=2)
        revision = self.hands[name].revision() if name in self.hands else None
        start = watch.look(state, known, now_ms)
        self.troubles.say(f"log of {name}", watch.trouble)
        if start:
            if not known or start.began_at_ms > known[0].began_at_ms:
                start = dataclasses.replace(start, revision=revision)
            self.store.save(Changes(starts=[start]), None)
        samples = servers.start_samples(self.store.starts(name, limit=2), now_ms)
        wanted = remediation.Wishes.of(self.store.settings()).wanted.get(name)
        if any(r.plan.by and r.plan.server == name for r in self.store.live_remediations()):
            wanted = None  # it is on its way
        for metric, number in (("server_revision", revision), ("server_wanted_revision", wanted)):
            if number is not None:
                samples.append(Sample(Labels.of(metric, server=name), now_ms, float(number)))
        self.append(f"start:{name}", samples, now_ms)

    def prune(self, now_ms: int) -> None:
        """Delete what is older than the settings keep, and give up news that is a day old."""
        self.store.prune(now_ms)
        for name in self.receivers:
            rows = notify.expired(self.store.unsent(name, limit=1000), now_ms)
            if rows:
                self.store.save(Changes(notifications=rows), None)

    def send(self, name: str, now_ms: int) -> None:
        """Send on what was saved since the last time, oldest first."""
        state = remote_write.writer_state(*self.store.forwarder(name, now_ms))
        dropped = state.dropped_samples
        for _ in range(_REQUESTS_A_TURN):
            if not remote_write.is_due(state, now_ms):
                break
            limit = _ROWS_ONE_BY_ONE if state.row_by_row else _ROWS_A_REQUEST
            rows = self.store.scrapes_after(state.cursor, limit, now_ms)
            if not rows:
                break
            state = self._send(name, state, rows, now_ms)
            self.store.save_forwarder(name, state.cursor, remote_write.state_json(state), now_ms)
        self._say(name, state, state.dropped_samples - dropped, now_ms)

    def _send(self, name: str, state: WriterState, rows: Sequence[Row], now_ms: int) -> WriterState:
        """One request of the first of these rows."""
        state = remote_write.after_waiting(state, rows, now_ms - self.spool_ms)
        batch = remote_write.take(state, [row for row in rows if row[0] > state.cursor])
        if not batch:
            return state
        try:
            self.writers[name].send([scrape for _, scrape in batch])
        except RemoteWriteError as error:
            return remote_write.after_failure(state, error, batch, now_ms=now_ms, jitter=self.jitter())
        return remote_write.after_success(state, batch)

    def _say(self, name: str, state: WriterState, dropped: int, now_ms: int) -> None:
        """In the log and as metrics."""
        self.troubles.say(f"remote_write {name}", state.error if state.failures else "")
        refused = f"{dropped} samples were left out: {state.error}" if dropped else ""
        self.troubles.say(f"remote_write {name} refuses", refused)
        own = {
            Labels.of("gpuwatch_remote_write_failing", receiver=name): float(bool(state.failures)),
            Labels.of("gpuwatch_remote_write_dropped_samples_total", receiver=name): state.dropped_samples,
        }
        self.store.append(f"send:{name}", now_ms, list(own), [float(value) for value in own.values()])
