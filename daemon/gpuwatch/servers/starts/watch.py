"""Follows each life of a server from its start to its end, by records alone; asks nothing of the server.

Rule 1: a life begins with a process that its supervisor names by the instant it began; it has one row.
Rule 2: it is healthy once its server serves. A start that ends before that has failed, unless somebody
        stopped it; nobody knows how one ended that was replaced unseen, and whose log gives no cause.
Rule 3: the log is read while a start is under way, and twice at each turn: what a process said last may
        reach the journal after its end was seen. Never while a server serves.
Rule 4: the row alone says how far a start has come, so another gpuwatch goes on with it.
"""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Final

from gpuwatch.errors import ServerError
from gpuwatch.records import (
    Labels,
    Metric,
    MetricKind,
    Sample,
    ServerPhase,
    ServerStart,
    StartOutcome,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gpuwatch.records import ServerState
    from gpuwatch.servers.starts.log import StartLog

_EXIT: Final = re.compile(r"(?P<how>exited with status|killed by signal) (?P<number>\d+)")
_LONGEST_START_MS: Final = 1_800_000
_EXIT_FACTS: Final = ("status", "signal")
_STOPPING_SIGNALS: Final = frozenset({"1", "2", "15"})  # HUP, INT, TERM: somebody's wish
_BAD_ARGUMENT_STATUS: Final = "2"  # argparse's
_FIGURES: Final = {
    "server_model_weights_bytes": "weights_bytes",
    "server_kv_cache_bytes": "kv_cache_bytes",
    "server_cuda_graphs_bytes": "cuda_graphs_bytes",
}


def _gauge(name: str, text: str, *labels: str) -> Metric:
    return Metric(name=name, kind=MetricKind.GAUGE, help=text, labels=("server", *labels))


METRICS: Final = (
    _gauge("server_start_failed", "1 from a start that failed until the server is healthy.", "failure"),
    _gauge("server_model_weights_bytes", "Weights, as the start that serves now logged them.", "worker"),
    _gauge("server_kv_cache_bytes", "KV cache, as the start that serves now logged it.", "worker"),
    _gauge("server_cuda_graphs_bytes", "CUDA graphs, as the start that serves now logged them.", "worker"),
    _gauge("server_kv_cache_tokens", "Tokens that the KV cache holds, by the log of the start."),
)


def samples(known: Sequence[ServerStart], now_ms: int) -> list[Sample]:
    """The series of one server, whose starts are given newest first."""
    concluded = next((start for start in known if start.outcome is not StartOutcome.STARTING), None)
    if concluded is not None and concluded.outcome is StartOutcome.FAILED:
        labels = Labels.of("server_start_failed", server=concluded.server, failure=concluded.failure)
        return [Sample(labels, now_ms, 1.0)]
    if not known or known[0].outcome is not StartOutcome.HEALTHY or known[0].ended_at_ms is not None:
        return []
    start = known[0]
    made = [
        Sample(Labels.of(metric, server=start.server, worker=worker), now_ms, figures[name])
        for worker, figures in sorted(start.figures.items())
        for metric, name in _FIGURES.items()
        if name in figures
    ]
    if start.kv_cache_tokens is not None:
        labels = Labels.of("server_kv_cache_tokens", server=start.server)
        made.append(Sample(labels, now_ms, float(start.kv_cache_tokens)))
    return made


class StartWatch:
    """The starts of one server. `trouble` is why its log cannot be read, empty where it can."""

    def __init__(self, server: str, log: StartLog) -> None:
        """`log` is asked only in `look`."""
        self.trouble = ""
        self._server = server
        self._log = log
        self._owed_ms: int | None = None  # the life whose log is to be read once more

    def look(self, state: ServerState, known: Sequence[ServerStart], now_ms: int) -> ServerStart | None:
        """The row that is new or changed, to be saved before the next look; None if nothing is.

        `known` are the rows of the server, newest first. One row a look: where a life ended and another
        began, the next look tells of that.
        """
        last = known[0] if known else None
        if last is not None:
            followed = self._followed(last, state, now_ms)
            if followed != last:
                return followed
        began_ms = state.supervisor.started_at_ms
        if began_ms is None or (last is not None and began_ms <= last.began_at_ms):
            return None
        return self._begun(state, began_ms)

    def _begun(self, state: ServerState, began_ms: int) -> ServerStart:
        """A life that was not known: a start that is seen, or one that nobody saw."""
        start = ServerStart(server=self._server, began_at_ms=began_ms, outcome=StartOutcome.STARTING)
        if not _serves(state, began_ms):
            return self._read(start, None)
        # What it said since would hide what its start said.
        healthy = dataclasses.replace(start, outcome=StartOutcome.HEALTHY)
        return _forgiven(self._read(healthy, began_ms + _LONGEST_START_MS))

    def _followed(self, start: ServerStart, state: ServerState, now_ms: int) -> ServerStart:
        """The life as it stands now."""
        next_ms = _next_began_ms(start, state)
        if start.ended_at_ms is not None:
            return self._reread(start, next_ms)
        if next_ms is not None or state.supervisor.has_ended:
            return self._over(start, state, next_ms, now_ms)
        if start.outcome is not StartOutcome.STARTING:
            return self._reread(start, next_ms)
        read = self._read(start, None)
        if not _serves(state, start.began_at_ms):
            return read
        self._owed_ms = start.began_at_ms
        return _healthy(read, state)

    def _over(self, start: ServerStart, state: ServerState, next_ms: int | None, now_ms: int) -> ServerStart:
        """The life that ended, and how."""
        is_seen = state.supervisor.started_at_ms == start.began_at_ms
        how = _exit(state.supervisor.detail) if is_seen else {}
        read = dataclasses.replace(self._read(start, next_ms), ended_at_ms=next_ms or now_ms)
        if is_seen and (state.supervisor.stop_asked or how.get("signal") in _STOPPING_SIGNALS):
            return _stopped(read)
        self._owed_ms = start.began_at_ms
        return _concluded(read, how, is_seen=is_seen)

    def _reread(self, start: ServerStart, next_ms: int | None) -> ServerStart:
        """The life with what was not in the log yet when its turn was seen."""
        if self._owed_ms != start.began_at_ms:
            return start
        self._owed_ms = None
        read = self._read(start, next_ms)
        if start.ended_at_ms is None:
            return _forgiven(read)
        how = {name: start.facts[name] for name in _EXIT_FACTS if name in start.facts}
        return _concluded(read, how, is_seen=start.outcome is StartOutcome.FAILED)

    def _read(self, start: ServerStart, until_ms: int | None) -> ServerStart:
        from gpuwatch.servers.starts import lines  # noqa: PLC0415 (patterns that only a start needs)

        try:
            read = lines.read(start, self._log.lines(start.began_at_ms, until_ms))
        except ServerError as error:
            self.trouble = str(error)
            return start
        self.trouble = ""
        return read


def _serves(state: ServerState, began_ms: int) -> bool:
    """Whether this very process was healthy: at a replacement the phase is that of the one before."""
    healthy_ms = state.last_healthy_ms
    return state.phase is ServerPhase.SERVING and healthy_ms is not None and healthy_ms > began_ms


def _healthy(start: ServerStart, state: ServerState) -> ServerStart:
    since_ms = state.since_ms if state.since_ms > start.began_at_ms else state.last_healthy_ms
    return _forgiven(dataclasses.replace(start, outcome=StartOutcome.HEALTHY, healthy_at_ms=since_ms))


def _forgiven(start: ServerStart) -> ServerStart:
    """The start without a failure: it became healthy, or was stopped."""
    return dataclasses.replace(start, failure="", facts={}, lines=())


def _stopped(start: ServerStart) -> ServerStart:
    was_healthy = start.outcome is StartOutcome.HEALTHY
    return _forgiven(start if was_healthy else dataclasses.replace(start, outcome=StartOutcome.STOPPED))


def _next_began_ms(start: ServerStart, state: ServerState) -> int | None:
    """When the life after this one began; None if there is none."""
    began_ms = state.supervisor.started_at_ms
    return began_ms if began_ms is not None and began_ms > start.began_at_ms else None


def _concluded(start: ServerStart, how: Mapping[str, str], *, is_seen: bool) -> ServerStart:
    """A life that nobody stopped: whether its start failed, and of what. `how` it ended, as facts."""
    outcome, failure = start.outcome, start.failure or _failure_by_exit(how)
    if outcome is not StartOutcome.HEALTHY:
        outcome = StartOutcome.FAILED if failure or is_seen else StartOutcome.UNKNOWN
        failure = failure or ("unknown" if is_seen else "")
    facts = {**start.facts, **how} if failure else {}
    return dataclasses.replace(start, outcome=outcome, failure=failure, facts=facts)


def _exit(detail: str) -> dict[str, str]:
    """How a supervisor says that a process ended, as facts: a `status` or a `signal`."""
    found = _EXIT.search(detail)
    return {_EXIT_FACTS[found["how"].startswith("killed")]: found["number"]} if found else {}


def _failure_by_exit(how: Mapping[str, str]) -> str:
    """The class that the exit alone tells; empty for none."""
    if "signal" in how:
        return "process_died"
    if how.get("status") == _BAD_ARGUMENT_STATUS:
        return "bad_argument"
    return "" if how.get("status", "0") == "0" else "unknown"
