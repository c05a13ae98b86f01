"""What to do about a firing alert, or a person's wish: a plan, or a `Refusal` that says why nothing. Pure."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from gpuwatch.records import (
    ActionClass,
    Alert,
    AlertState,
    Considered,
    Labels,
    Mode,
    Phase,
    Plan,
    Refusal,
    Remediation,
    Revision,
)
from gpuwatch.remediation.actions import Figures, expanded, kind_of
from gpuwatch.remediation.blockers import BLOCKERS, OF_WISHES, Blocker, first_reason
from gpuwatch.remediation.situation import GPUWATCH, RECONFIGURE, RESTART, Change, Intent, Reason, Situation

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpuwatch.config import Policy

_MODES: Final = tuple(Mode)  # strictest first
_MOST_RIVALS: Final = 3
_OF_MEMORY: Final = frozenset(
    {
        *("memory_share_not_free", "profiling_assert", "runtime_oom"),
        *("kv_cache_too_small", "no_memory_for_cache", "auto_fit_failed"),
    }
)


@dataclass(frozen=True, slots=True)
class Decision:
    """A plan, and the revision that it needs and that is to be saved with it, if there is a new one."""

    plan: Plan
    revision: Revision | None = None


def choose(policies: Sequence[Policy], alert: Alert) -> Policy | None:
    """The first policy whose labels all equal the alert's."""
    for policy in policies:
        if all(alert.labels.get(name) == value for name, value in policy.match.items()):
            return policy
    return None


def decide(situation: Situation, default_mode: Mode) -> Decision | Refusal:
    """Find what the policy comes to here, ask the blockers, and plan it if none objects."""
    return _decided(dataclasses.replace(situation, intent=_intent(situation, default_mode)), BLOCKERS)


def decide_change(situation: Situation, change: Change) -> Decision | Refusal:
    """Plan the arguments that a person asks for; `situation.alert` is `asked`'s, and no policy counts."""
    intent = Intent(
        actions=(RECONFIGURE,),
        kind=ActionClass.RECONFIGURE,
        mode=Mode.AUTO,
        change=change,
        reason=_cannot_change(situation, change),
    )
    return _decided(dataclasses.replace(situation, policy=None, intent=intent), OF_WISHES)


def asked(server: str, change: Change) -> Alert:
    """What stands for an alert where a person asks: it has no rule, so it neither fires nor ends."""
    return Alert(
        rule="",
        labels=Labels.of(server=server),
        annotations={},
        state=AlertState.FIRING,
        value=1.0,
        active_at_ms=change.at_ms,
    )


def begin(plan: Plan, now_ms: int) -> Remediation:
    """The first row of a plan's life."""
    return Remediation(plan=plan, phase=Phase.PLANNED, step_index=0, since_ms=now_ms, created_at_ms=now_ms)


def _intent(s: Situation, default_mode: Mode) -> Intent:
    """What the policy comes to; a fault in finding it is a reason, as with a blocker."""
    try:
        intent = _cured(s)
        kind = _class_of(intent.actions)
        mode = _mode(s, kind, default_mode)
    except Exception as error:  # noqa: BLE001 (who cannot tell, must not act)
        return Intent(reason=Reason.of("internal_error", detail=f"cure: {error!r}"))
    return dataclasses.replace(intent, kind=kind, mode=mode)


def _cured(s: Situation) -> Intent:
    """Only what starts the server anew has to do with why it ended."""
    actions = tuple(s.policy.steps) if s.policy else ()
    if s.server is None or not {RESTART, RECONFIGURE} & set(actions):
        return Intent(actions=actions)
    from gpuwatch.remediation import cure  # noqa: PLC0415 (most hosts never need it)

    return cure.intent(s)


def _class_of(actions: Sequence[str]) -> ActionClass:
    return kind_of(actions) if actions else ActionClass.REVERSIBLE


def _mode(s: Situation, kind: ActionClass, default_mode: Mode) -> Mode:
    """The policy's own, else that of the class; the stricter where a cure is of another class."""
    of_class = s.limits.modes.get(kind, default_mode)
    if s.policy is None or s.policy.mode is None:
        return of_class
    if kind is _class_of(s.policy.steps):
        return s.policy.mode
    return min(s.policy.mode, of_class, key=_MODES.index)


def _cannot_change(s: Situation, change: Change) -> Reason | None:
    """Why a wish can never be carried out as it stands."""
    if s.revisions and s.current is None:
        return Reason("no_revisions")
    if change.revision is not None and s.revision(change.revision) is None:
        return Reason.of("no_such_revision", revision=change.revision)
    wished = s.revision(change.revision) if change.revision is not None else None
    arguments = wished.arguments if wished else change.arguments
    if s.current is not None and arguments == s.current.arguments:
        return Reason.of("already_current", revision=s.current.number)
    return None


def _decided(s: Situation, blockers: tuple[Blocker, ...]) -> Decision | Refusal:
    reason, asked_of = first_reason(s, blockers)
    considered = (*s.intent.considered, *asked_of)
    if reason or s.server is None:
        return Refusal(
            server=s.server.name if s.server else "",
            alert=s.alert.rule,
            alert_labels=s.alert.labels,
            code=reason.code if reason else "no_server",
            facts=reason.facts if reason else {},
            steps=s.intent.actions or tuple(s.policy.steps if s.policy else ()),
            considered=considered,
        )
    return _planned(s, s.server.name, considered)


def _planned(s: Situation, server: str, considered: tuple[Considered, ...]) -> Decision:
    change = s.intent.change
    after, revision = _after(s, server, change) if change else (None, None)
    before = s.current.number if change and s.current else None
    steps, undo = expanded(s.intent.actions, _figures(s, before, after))
    if s.is_dead and (s.intent.kind is ActionClass.RESTART or s.failed_start):
        # A start that fails, or is called off, is no reason for another of what is dead or cannot start.
        undo = tuple(step for step in undo if step.action == "swap")
    plan = Plan(
        id=_plan_id(server, s.alert, s.now_ms),
        server=server,
        alert=s.alert.rule,
        alert_labels=s.alert.labels,
        steps=steps,
        verify_for_ms=s.limits.verify_for_ms,
        mode=s.intent.mode,
        dry_run=s.dry_run,
        policy=s.policy.name if s.policy else "",
        kind=s.intent.kind,
        actions=s.intent.actions,
        undo=undo,
        before=before,
        after=after,
        considered=considered,
        signals=_signals(s, revision or s.revision(after)),
        by=change.by if change and change.by != GPUWATCH else "",
    )
    return Decision(plan, None if plan.dry_run else revision)


def _after(s: Situation, server: str, change: Change) -> tuple[int, Revision | None]:
    """The revision to go to, and the record of it if it is new."""
    if change.revision is not None:
        return change.revision, None
    for r in s.revisions:
        if (r.arguments, r.by, r.why) == (change.arguments, change.by, change.why):
            return r.number, None
    made = Revision(
        server=server,
        number=max((r.number for r in s.revisions), default=0) + 1,
        arguments=change.arguments or {},
        created_at_ms=s.now_ms,
        by=change.by,
        why=change.why,
        parent=s.current.number if s.current else None,
    )
    return made.number, made


def _figures(s: Situation, before: int | None, after: int | None) -> Figures:
    """A first revision has none before it: what can be taken back is taken back to itself."""
    running = s.sight.requests_running or 0
    return Figures(
        limits=s.limits,
        limit=(s.policy.limit if s.policy else 0) or max(running // 2, 1),
        command=tuple(s.policy.command) if s.policy else (),
        command_within_ms=s.policy.command_within if s.policy else 0,
        before=after if before is None else before,
        after=after,
    )


def _signals(s: Situation, after: Revision | None) -> dict[str, str]:
    """What was seen, as far as it was, and the bounds that the proof is held to."""
    sight, least = s.sight, s.limits.least_throughput
    seen: dict[str, object] = {
        "value": s.alert.value if s.alert.rule else None,
        "summary": s.alert.annotations.get("summary"),
        "summary_zh": s.alert.annotations.get("summary_zh"),
        "verdict": sight.verdict,
        "running": sight.requests_running,
        "waiting": sight.requests_waiting,
        "kv_use_ratio": sight.kv_use_ratio,
        "failure": s.starts[0].failure if s.starts else None,
        "tokens_per_s": sight.tokens_per_s or None,
        "least_tokens_per_s": least * sight.tokens_per_s if sight.tokens_per_s else None,
        "kv_cache_tokens_least": _longest_request(after),
        "wanted": s.wanted,
        "why": s.intent.change.why if s.intent.change else None,
        **{f"free_bytes:{gpu}": free for gpu, free in sight.free_bytes.items()},
        **{f"rival_bytes:{gpu} {name}": held for (gpu, name), held in _rivals(s)},
    }
    return {name: str(value) for name, value in seen.items() if value not in {None, ""}}


def _rivals(s: Situation) -> list[tuple[tuple[str, str], int]]:
    """Who else holds most, by GPU and name, where it was memory that the server failed of."""
    if not s.starts or s.starts[0].failure not in _OF_MEMORY:
        return []
    return sorted(s.sight.rival_bytes.items(), key=lambda one: -one[1])[:_MOST_RIVALS]


def _longest_request(revision: Revision | None) -> int | None:
    """The tokens of the longest request that these arguments promise to serve; None if vLLM finds it."""
    length = revision.arguments.get("max_model_len") if revision else None
    return length if isinstance(length, int) and length > 0 else None


def _plan_id(server: str, alert: Alert, now_ms: int) -> str:
    """Short enough to say aloud, the same for the same decision."""
    text = f"{server}|{alert.labels}|{now_ms}"
    return "GW-" + hashlib.sha256(text.encode()).hexdigest()[:6].upper()
