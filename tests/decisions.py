"""What a decision is given where nothing speaks against it: the server `m` that died, and its alert."""

from __future__ import annotations

import dataclasses

from gpuwatch import config
from gpuwatch.records import (
    Alert,
    AlertState,
    Labels,
    ServerPhase,
    ServerState,
    SupervisorPhase,
    SupervisorState,
)
from gpuwatch.remediation import Limits, Situation

NOW = 1_800_000_000_000
SECOND, MINUTE, HOUR = 1000, 60_000, 3_600_000
LIMITS = Limits(
    cooldown_ms=5 * MINUTE,
    budget_count=3,
    budget_per_ms=HOUR,
    verify_for_ms=30 * SECOND,
    step_within_ms=10 * MINUTE,
    just_started_grace_ms=MINUTE,
)


def server(
    phase=ServerPhase.DOWN,
    supervisor=SupervisorPhase.INACTIVE,
    *,
    started_at_ms=None,
    stop_asked=False,
    **more,
):
    its = SupervisorState(phase=supervisor, started_at_ms=started_at_ms, stop_asked=stop_asked, detail="gone")
    return ServerState(name="m", phase=phase, since_ms=NOW - MINUTE, seen_at_ms=NOW, supervisor=its, **more)


def serving(started_at_ms=NOW - MINUTE, **more):
    return server(ServerPhase.SERVING, SupervisorPhase.ACTIVE, started_at_ms=started_at_ms, **more)


def alert(rule="VLLMDown", **labels):
    """One that fires, which a restart would cure."""
    return Alert(
        rule=rule,
        labels=Labels.of(alertname=rule, server="m", **{"remediation": "restart", **labels}),
        annotations={"summary": "Server m is down"},
        state=AlertState.FIRING,
        value=1.0,
        active_at_ms=NOW - 3000,
        fired_at_ms=NOW,
    )


def situation(**changes):
    whole = Situation(
        alert=alert(),
        policy=config.DEFAULT_POLICIES[0],
        server=server(),
        has_supervisor=True,
        history=[],
        limits=LIMITS,
        paused_until_ms=None,
        resumed_at_ms=0,
        started_at_ms=NOW - HOUR,
        jumped_at_ms=None,
        now_ms=NOW,
    )
    return dataclasses.replace(whole, **changes)
