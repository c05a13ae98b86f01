"""The phase of a server from what memory holds of it: the newest answer of `/health`; asks nobody else."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

from gpuwatch.records import ServerPhase, ServerState
from gpuwatch.servers.look import Look, last
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
    look = Look(querier, server, now_ms, 0)
    late, ok = (_newest(look, f"server_health_{name}") for name in ("timeout", "ok"))
    if late is None:
        return None
    if late[1] or ok is None:
        return HealthAnswer(Health.UNKNOWN, late[0])
    return HealthAnswer(Health.OK if ok[1] else Health.FAILING, late[0])


def _newest(look: Look, metric: str) -> tuple[int, float] | None:
    """The newest sample of a server's metric, unless it ended or is old."""
    found = [
        sample for s in look.at(metric, _LOOKBACK_MS) if (sample := last(s)) and sample[0] == s.at_ms[-1]
    ]
    return max(found, default=None)
