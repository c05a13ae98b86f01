"""Which events of a tick people are told, as messages and rows of the outbox; pure.

Rule 1: an alert's beginning and end are told; a pending alert is nobody's business yet.
Rule 2: what is done about an alert is told with its beginning; what comes later is told by itself.
Rule 3: the row and the change that causes it are saved in one transaction, by the caller.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final, cast, get_args

from gpuwatch.notify.message import Decision, Message, Severity, State
from gpuwatch.records import LIVE_PHASES, Alert, AlertState, Labels, Notification, Phase, Plan, ServerPhase

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from gpuwatch.records import Refusal, Remediation, ServerState, Transition

_TOLD: Final = {AlertState.FIRING, AlertState.RESOLVED}
_QUIET_PHASES: Final = {Phase.VERIFYING}


def messages_of_tick(
    *,
    transitions: Iterable[Transition],
    decisions: Mapping[tuple[str, Labels], Plan | Refusal],
    remediations: Iterable[Remediation],
    before: Iterable[Remediation],
    host: str,
    now_ms: int,
) -> list[Message]:
    """What people are told of one tick, in order. `before` are the remediations that were live before it."""
    told = [t for t in transitions if t.now in _TOLD]
    identities = {(t.alert.rule, t.alert.labels) for t in told}
    messages = [about_alert(t, decisions.get((t.alert.rule, t.alert.labels)), host) for t in told]
    phases = {r.plan.id: r.phase for r in before}
    for r in remediations:
        is_told = r.plan.id not in phases and (r.plan.alert, r.plan.alert_labels) in identities
        if phases.get(r.plan.id) is not r.phase and r.phase not in _QUIET_PHASES and not is_told:
            messages.append(about_remediation(r, host, now_ms))
    return messages


def about_alert(t: Transition, decision: Plan | Refusal | None, host: str) -> Message:
    """An alert began (with what is done about it) or is over."""
    alert = t.alert
    return Message(
        id=incident_id(alert),
        kind="alert",
        state="firing" if t.now is AlertState.FIRING else "resolved",
        severity=_severity(alert.labels),
        host=host,
        alert=alert.rule,
        at_ms=t.at_ms,
        since_ms=alert.active_at_ms,
        server=alert.labels.get("server") or (decision.server if decision else ""),
        labels=dict(alert.labels),
        value=alert.value if alert.value == alert.value and abs(alert.value) != float("inf") else None,
        annotations=dict(alert.annotations),
        decision=_decision(decision) if decision and t.now is AlertState.FIRING else None,
    )


def about_remediation(r: Remediation, host: str, now_ms: int) -> Message:
    """A remediation came to a phase that people want to know of."""
    return Message(
        id=r.plan.id,
        kind="remediation",
        state=_state(r.phase),
        severity="critical" if r.phase is Phase.FAILED else _severity(r.plan.alert_labels),
        host=host,
        alert=r.plan.alert,
        at_ms=now_ms,
        since_ms=r.created_at_ms,
        server=r.plan.server,
        labels=dict(r.plan.alert_labels),
        decision=_decision(r.plan),
        outcome_code=r.outcome,
        outcome_facts=dict(r.facts),
    )


def outbox(messages: Sequence[Message], receivers: Iterable[str], now_ms: int) -> list[Notification]:
    """A row for each message and receiver. The id says what is told, so a row cannot be doubled."""
    return [
        Notification(
            id=f"{m.id}/{m.kind}/{m.state}/{m.at_ms}/{receiver}",
            receiver=receiver,
            body=m.to_json(),
            created_at_ms=now_ms,
            next_attempt_at_ms=now_ms,
        )
        for m in messages
        for receiver in receivers
    ]


def summary(
    states: Iterable[ServerState],
    firing: Sequence[Alert],
    remediations: Iterable[Remediation],
    refusals: Sequence[Refusal],
) -> str:
    """One sentence for the log and for systemd's STATUS."""
    parts = [f"{s.name} {s.phase}" for s in states if s.phase is not ServerPhase.UNSEEN] or ["no server seen"]
    names = sorted({alert.rule for alert in firing})
    parts.append(f"firing: {', '.join(names)}" if names else "all quiet")
    parts += [f"{r.plan.id}: {r.phase}" for r in remediations if r.phase in LIVE_PHASES]
    why = sorted({r.code for r in refusals if r.steps})
    parts += [f"not acting: {', '.join(why)}"] if why else []
    return "; ".join(parts)


def log_lines(
    transitions: Iterable[Transition], remediations: Iterable[Remediation], before: Mapping[str, Phase]
) -> list[str]:
    """A line for each change that people are told of; nothing in a quiet tick. `before`: phases by id."""
    lines = [f"alert {t.alert.rule} {t.now} {t.alert.labels}" for t in transitions if t.now in _TOLD]
    for r in remediations:
        if before.get(r.plan.id) is not r.phase:
            dry = " (dry run)" if r.plan.dry_run else ""
            lines.append(
                f"remediation {r.plan.id} {r.phase}{dry} server={r.plan.server} {r.outcome}".rstrip()
            )
    return lines


def incident_id(alert: Alert) -> str:
    """The same for all messages of one alert from its beginning to its end; short enough to say aloud."""
    text = f"{alert.rule}|{alert.labels}|{alert.active_at_ms}"
    return "GW-" + hashlib.sha256(text.encode()).hexdigest()[:6].upper()


def _decision(decision: Plan | Refusal) -> Decision:
    if not isinstance(decision, Plan):
        return Decision(code=decision.code, facts=dict(decision.facts), steps=decision.steps)
    return Decision(
        code="observe_mode" if decision.dry_run else "plan",
        steps=decision.actions or tuple(step.action for step in decision.steps),
        mode=str(decision.mode),
        dry_run=decision.dry_run,
        remediation_id=decision.id,
    )


def _state(phase: Phase) -> State:
    return "planned" if phase is Phase.REHEARSED else cast("State", str(phase))


def _severity(labels: Labels) -> Severity:
    named = labels.get("severity")
    return cast("Severity", named) if named in get_args(Severity) else "warning"
