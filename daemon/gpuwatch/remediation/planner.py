"""What to do about a firing alert: a `Plan`, or a `Refusal` that says why nothing. Pure."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from gpuwatch.records import Alert, Mode, Phase, Plan, Refusal, Remediation, Step
from gpuwatch.remediation.blockers import Situation, first_reason

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpuwatch.config import Policy


def choose(policies: Sequence[Policy], alert: Alert) -> Policy | None:
    """The first policy whose labels all equal the alert's."""
    for policy in policies:
        if all(alert.labels.get(name) == value for name, value in policy.match.items()):
            return policy
    return None


def decide(situation: Situation, default_mode: Mode) -> Plan | Refusal:
    """Ask the blockers; if none objects, plan the policy's steps."""
    s = situation
    reason = first_reason(s)
    if reason or s.server is None or s.policy is None:
        return Refusal(
            server=s.server.name if s.server else "",
            alert=s.alert.rule,
            alert_labels=s.alert.labels,
            code=reason.code if reason else "no_policy",
            facts=reason.facts if reason else {},
            steps=tuple(s.policy.steps) if s.policy else (),
        )
    return Plan(
        id=_plan_id(s.server.name, s.alert, s.now_ms),
        server=s.server.name,
        alert=s.alert.rule,
        alert_labels=s.alert.labels,
        steps=tuple(Step(action=name, within_ms=s.limits.step_within_ms) for name in s.policy.steps),
        verify_for_ms=s.limits.verify_for_ms,
        mode=s.policy.mode or default_mode,
        dry_run=s.dry_run,
        policy=s.policy.name,
    )


def begin(plan: Plan, now_ms: int) -> Remediation:
    """The first row of a plan's life."""
    return Remediation(plan=plan, phase=Phase.PLANNED, step_index=0, since_ms=now_ms, created_at_ms=now_ms)


def _plan_id(server: str, alert: Alert, now_ms: int) -> str:
    """Short enough to say aloud, the same for the same decision."""
    text = f"{server}|{alert.labels}|{now_ms}"
    return "GW-" + hashlib.sha256(text.encode()).hexdigest()[:6].upper()
