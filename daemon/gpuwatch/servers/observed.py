"""The phase of a server from what memory holds of it: the newest answer of `/health`; asks nobody else."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

from gpuwatch.promql import Matcher
from gpuwatch.records import ServerPhase, ServerState, is_stale
from gpuwatch.servers.phase import Health, HealthAnswer, judge

if TYPE_CHECKING:
    from gpuwatch.config import ServerSettings
    from gpuwatch.promql import Querier
    from gpuwatch.records import SupervisorState

_LOOKBACK_MS: Final = 15_000


def unseen(name: str, now_ms: int) -> ServerState:
    """A server of which nothing is known."""
    return ServerState(name=name, phase=ServerPhase.UNSEEN, since_ms=now_ms, seen_at_ms=now_ms)


def observed(
    server: ServerSettings,
    was: ServerState | None,
    supervisor: SupervisorState,
    querier: Querier,
    now_ms: int,
) -> tuple[ServerState, bool]:
    """The server now, and whether anything was seen of it.

    Blindness says nothing about a server: it stays as it was last seen.
    """
    answer = _health(server.name, querier, now_ms)
    if answer is None:
        return dataclasses.replace(was or unseen(server.name, now_ms), supervisor=supervisor), False
    state = judge(
        was,
        name=server.name,
        supervisor=supervisor,
        answer=answer,
        now_ms=now_ms,
        start_deadline_ms=server.start_deadline,
    )
    return state, True


def _health(server: str, querier: Querier, now_ms: int) -> HealthAnswer | None:
    """The newest answer of `/health`; None if it was not asked of late."""
    at_ms, is_late = _newest("server_health_timeout", server, querier, now_ms)
    if is_late is None:
        return None
    _, is_ok = _newest("server_health_ok", server, querier, now_ms)
    if is_late or is_ok is None:
        return HealthAnswer(Health.UNKNOWN, at_ms)
    return HealthAnswer(Health.OK if is_ok else Health.FAILING, at_ms)


def _newest(metric: str, server: str, querier: Querier, now_ms: int) -> tuple[int, float | None]:
    """The newest sample of a server's metric, unless it ended or is old."""
    matchers = [Matcher("__name__", "=", metric), Matcher("server", "=", server)]
    for series in querier.select(matchers, now_ms - _LOOKBACK_MS, now_ms):
        if series.values and not is_stale(series.values[-1]):
            return series.at_ms[-1], series.values[-1]
    return now_ms, None
