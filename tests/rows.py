"""Rows as a store is given them, and what it is to have no right to write them."""

from __future__ import annotations

import os
from contextlib import contextmanager

from gpuwatch.records import (
    Alert,
    AlertState,
    Labels,
    Mode,
    Notification,
    Phase,
    Plan,
    Refusal,
    Remediation,
    ServerPhase,
    ServerState,
    Step,
    SupervisorPhase,
    SupervisorState,
)

SERVER = ServerState(
    name="qwen",
    phase=ServerPhase.DOWN,
    since_ms=5,
    seen_at_ms=6,
    supervisor=SupervisorState(phase=SupervisorPhase.FAILED, pid=7, detail="exit-code"),
)
REFUSED = Refusal(
    server="qwen",
    alert="ServerDown",
    alert_labels=Labels.of(server="qwen"),
    code="cooling_down",
    facts={"left": "5m"},
)


def alert(rule="GpuMemoryHigh", value=0.97, state=AlertState.FIRING, annotations=None, **labels):
    return Alert(
        rule=rule,
        labels=Labels.of(alertname=rule, **labels),
        annotations={"summary": "显存 97 %"} if annotations is None else annotations,
        state=state,
        value=value,
        active_at_ms=1000,
        fired_at_ms=2000,
    )


def remediation(name="r1", server="qwen", phase=Phase.APPLYING, created_at_ms=1000):
    plan = Plan(
        id=name,
        server=server,
        alert="ServerDown",
        alert_labels=Labels.of(server=server),
        steps=(Step(action="restart", within_ms=600_000),),
        verify_for_ms=120_000,
        mode=Mode.AUTO,
        dry_run=False,
        policy="restart",
    )
    return Remediation(
        plan=plan, phase=phase, step_index=0, since_ms=created_at_ms, created_at_ms=created_at_ms
    )


def message(name, receiver="slack", created_at_ms=1000, body='{"text":"…"}', **more):
    return Notification(
        id=name, receiver=receiver, body=body, created_at_ms=created_at_ms, next_attempt_at_ms=0, **more
    )


@contextmanager
def unprivileged(folder):
    folder.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
