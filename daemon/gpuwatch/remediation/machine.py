"""How far a remediation has come: a table of phases, asked again each cycle. Pure.

Rule 1: every change of phase is a row of `TRANSITIONS`; docs/remediation.md is drawn from it.
Rule 2: level, not edge: what happened is read off what is seen now, so a daemon that was killed between
any two lines goes on from its row, and nothing is remembered outside it.
Rule 3: a step is asked until its effect is seen; one whose effect is there is never asked.
Rule 4: whatever ends a plan in the middle, what it did is taken back; also in a pause, when nothing begins.
Rule 5: a server that somebody stops is left alone, whatever was done to it.
Rule 6: what is taken back ends and begins a process only where the plan had: a server that was found dead is
left dead. And what lives is not ended for arguments that could not start.
"""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from gpuwatch.records import (
    LIVE_PHASES,
    ActionClass,
    Mode,
    Phase,
    Remediation,
    ServerPhase,
    Step,
    SupervisorPhase,
)
from gpuwatch.remediation.situation import CALLED_OFF
from gpuwatch.remediation.steps import (
    DIED,
    Failed,
    Look,
    Seen,
    began_anew,
    cuts,
    is_deed,
    judged,
    must_succeed,
    over,
    present,
    walked,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gpuwatch.remediation.steps import Found


class Event(enum.StrEnum):
    """What can happen to a remediation; why it did is its outcome."""

    DRY_RUN = "dry run"
    MAY_ACT = "may act"
    MUST_ASK = "must ask"
    APPROVED = "approved"
    DENIED = "denied"
    EXPIRED = "approval expired"
    CALLED_OFF = "called off"
    STEP_DONE = "step done"
    ALL_DONE = "all steps done"
    FAILED = "failed"
    TAKE_BACK = "to be taken back"
    TAKEN_BACK = "taken back"
    HELPED = "helped"


TRANSITIONS: Final[Mapping[tuple[Phase, Event], Phase]] = {
    (Phase.PLANNED, Event.DRY_RUN): Phase.REHEARSED,
    (Phase.PLANNED, Event.MUST_ASK): Phase.AWAITING_APPROVAL,
    (Phase.PLANNED, Event.MAY_ACT): Phase.APPLYING,
    (Phase.PLANNED, Event.CALLED_OFF): Phase.ABORTED,
    (Phase.AWAITING_APPROVAL, Event.APPROVED): Phase.APPLYING,
    (Phase.AWAITING_APPROVAL, Event.DENIED): Phase.ABORTED,
    (Phase.AWAITING_APPROVAL, Event.EXPIRED): Phase.ABORTED,
    (Phase.AWAITING_APPROVAL, Event.CALLED_OFF): Phase.ABORTED,
    (Phase.APPLYING, Event.STEP_DONE): Phase.APPLYING,
    (Phase.APPLYING, Event.ALL_DONE): Phase.VERIFYING,
    (Phase.APPLYING, Event.CALLED_OFF): Phase.ABORTED,
    (Phase.APPLYING, Event.FAILED): Phase.FAILED,
    (Phase.APPLYING, Event.TAKE_BACK): Phase.ROLLING_BACK,
    (Phase.VERIFYING, Event.HELPED): Phase.SUCCEEDED,
    (Phase.VERIFYING, Event.CALLED_OFF): Phase.ABORTED,
    (Phase.VERIFYING, Event.FAILED): Phase.FAILED,
    (Phase.VERIFYING, Event.TAKE_BACK): Phase.ROLLING_BACK,
    (Phase.ROLLING_BACK, Event.STEP_DONE): Phase.ROLLING_BACK,
    (Phase.ROLLING_BACK, Event.TAKEN_BACK): Phase.ROLLED_BACK,
    (Phase.ROLLING_BACK, Event.CALLED_OFF): Phase.ABORTED,
    (Phase.ROLLING_BACK, Event.FAILED): Phase.FAILED,
}

OUTCOMES: Final = frozenset(
    {
        *("dry_run", "denied", "approval_expired", "alert_over", "aborted_by"),
        *("stopped_by_operator", "server_gone", "started_meanwhile"),
        *("step_late", "step_failed", "unknown_step", "not_asked"),
        *("died_again", "revision_refused", "no_guest"),
        *("relapsed", "never_verified", "new_alert", "fewer_kv_tokens", "less_throughput"),
        *("restored", "lifted", "untouched"),
    }
)
"""The codes of the words for all that ends a remediation, or has it taken back."""

_ALIVE: Final = frozenset({SupervisorPhase.ACTIVE, SupervisorPhase.ACTIVATING})
_SHORT_MS: Final = 30_000
# For how long the result may fall short, by code; throughput is counted over the minute past.
_PATIENCE_MS: Final[Mapping[str, int]] = {
    "new_alert": _SHORT_MS,
    "fewer_kv_tokens": _SHORT_MS,
    "less_throughput": 60_000 + _SHORT_MS,
}


@dataclass(frozen=True, slots=True)
class _Move:
    """What happened, and why: a code of `OUTCOMES` where it ends something, and its figures.

    `found` is what became of the present step; False where it was cut short.
    """

    event: Event
    code: str = ""
    facts: Mapping[str, str] = field(default_factory=dict)
    found: Found = False


def advance(remediation: Remediation, seen: Seen, now_ms: int) -> tuple[Remediation, Step | None]:
    """The remediation after this cycle, and the step to ask for now, if any.

    What it returns is to be saved before the step is asked.
    """
    r = _watched(remediation, seen, now_ms)
    while (move := _move(r, seen, now_ms)) is not None:  # all that nothing holds is passed at once
        r = _watched(_moved(r, move, now_ms), seen, now_ms)
    step = present(r)
    if step is not None and is_deed(step.action) and r.asked_at_ms is None:
        r = dataclasses.replace(r, asked_at_ms=now_ms)
    return r, step


def refused(remediation: Remediation, detail: str, now_ms: int) -> Remediation:
    """The remediation whose present step cannot be asked: a hand said no for good, and `detail` says why."""
    r, step = remediation, present(remediation)
    if step is None:
        return r
    if not must_succeed(step.action, r.phase):
        return dataclasses.replace(r, heard={**r.heard, "failed": detail})
    return _moved(r, _failing(r, Failed.of("not_asked", detail=detail)), now_ms)


# -- what has happened -----------------------------------------------------------------------------------


def _move(r: Remediation, seen: Seen, now_ms: int) -> _Move | None:
    """What has happened, by phase; None if nothing has."""
    if r.phase not in LIVE_PHASES:
        return None
    if r.phase is Phase.PLANNED and (r.plan.dry_run or r.plan.mode is Mode.OBSERVE):
        return _Move(Event.DRY_RUN, "dry_run")
    return _called_off(r, seen) or _DECIDE[r.phase](r, seen, now_ms)


def _planned(r: Remediation, _seen: Seen, _now_ms: int) -> _Move:
    return _Move(Event.MAY_ACT if r.plan.mode is Mode.AUTO else Event.MUST_ASK)


def _awaiting(r: Remediation, seen: Seen, now_ms: int) -> _Move | None:
    if seen.word == "approved":
        return _Move(Event.APPROVED, facts={"approved_by": seen.by})
    if seen.word == "denied":
        return _Move(Event.DENIED, "denied", {"by": seen.by})
    if now_ms - r.since_ms >= seen.approval_expires_ms:
        minutes = seen.approval_expires_ms // 60_000
        return _Move(Event.EXPIRED, "approval_expired", {"minutes": str(minutes)})
    return None


def _walking(r: Remediation, seen: Seen, now_ms: int) -> _Move | None:
    """The present step, and after the last one the end of the walk."""
    step = present(r)
    if step is None:
        return _walked_to_the_end(r, seen)
    found = judged(Look(step=step, remediation=r, seen=seen, now_ms=now_ms))
    if isinstance(found, Failed) and must_succeed(step.action, r.phase):
        return _failing(r, found, seen)
    if not found:
        return None
    has_more = r.step_index + 1 < len(walked(r))
    move = _Move(Event.STEP_DONE) if has_more else _walked_to_the_end(r, seen)
    return dataclasses.replace(move, found=found)


def _walked_to_the_end(r: Remediation, seen: Seen) -> _Move:
    if r.phase is Phase.APPLYING:
        return _Move(Event.ALL_DONE)
    if seen.server.phase is ServerPhase.SERVING:
        return _Move(Event.TAKEN_BACK)
    if r.outcome in CALLED_OFF and not r.is_cut:
        return _Move(Event.CALLED_OFF)  # it is as dead as it was found
    return _Move(Event.FAILED, facts={"undo_code": "not_serving"})


def _verifying(r: Remediation, seen: Seen, now_ms: int) -> _Move | None:
    """Well for `verify_for_ms` on end is a success; falling again, or falling short, is not."""
    seconds, since_planned = (str((now_ms - ms) // 1000) for ms in (r.since_ms, r.created_at_ms))
    code = _needs_no_proof(r, seen)
    if code:
        return _Move(Event.HELPED, code, {"seconds": since_planned})
    if seen.server.phase is ServerPhase.DOWN:
        return _failing(r, Failed.of("relapsed"), seen)
    short = _falls_short(r, seen)
    if short and now_ms - int(r.heard[short.code]) >= _PATIENCE_MS[short.code]:
        return _failing(r, short, seen)
    if r.good_since_ms is not None and now_ms - r.good_since_ms >= r.plan.verify_for_ms:
        return _Move(Event.HELPED, "restored", {"seconds": since_planned})
    if now_ms - r.since_ms >= 10 * r.plan.verify_for_ms + 60_000:
        return _failing(r, Failed.of("never_verified", seconds=seconds), seen)
    return None


def _needs_no_proof(r: Remediation, seen: Seen) -> str:
    """The outcome of a plan that touched nothing, or whose limits were held until its alert stayed away."""
    if not _has_deeds(r):
        return "untouched"
    is_limits = r.plan.kind is ActionClass.REVERSIBLE and any(s.action == "hold" for s in r.plan.steps)
    return "lifted" if is_limits and not seen.alert_firing else ""


def _falls_short(r: Remediation, seen: Seen) -> Failed | None:
    """What is amiss with a server that serves and whose alert is over."""
    sight, signals = seen.sight, r.plan.signals
    if seen.new_alerts:
        return Failed.of("new_alert", alerts=", ".join(seen.new_alerts))
    tokens, least = sight.start.kv_cache_tokens if sight.start else None, signals.get("kv_cache_tokens_least")
    if tokens is not None and least and tokens < float(least):
        return Failed.of("fewer_kv_tokens", tokens=tokens, least=least)
    rate, least = sight.tokens_per_s, signals.get("least_tokens_per_s")
    if sight.requests_waiting and rate is not None and least and rate < float(least):
        return Failed.of("less_throughput", rate=round(rate, 1), least=least)
    return None


_DECIDE: Final[Mapping[Phase, Callable[[Remediation, Seen, int], _Move | None]]] = {
    Phase.PLANNED: _planned,
    Phase.AWAITING_APPROVAL: _awaiting,
    Phase.APPLYING: _walking,
    Phase.VERIFYING: _verifying,
    Phase.ROLLING_BACK: _walking,
}


# -- what ends it early ----------------------------------------------------------------------------------


def _called_off(r: Remediation, seen: Seen) -> _Move | None:
    """Whether somebody, or the world, has made an end of it."""
    if _is_stopped_by_hand(r, seen):
        return _Move(Event.CALLED_OFF, "stopped_by_operator")
    if r.phase is Phase.ROLLING_BACK:
        return None
    if _has_gone(r, seen):
        return _Move(Event.CALLED_OFF, "server_gone")
    if seen.paused or seen.word == "abort":
        return _calling_off(r, seen, "aborted_by", {"by": seen.by or "pause"})
    if _comes_up(r, seen):
        return _Move(Event.CALLED_OFF, "started_meanwhile")
    return _calling_off(r, seen, "alert_over", {}) if _is_needless(r, seen) else None


def _calling_off(r: Remediation, seen: Seen, code: str, facts: Mapping[str, str]) -> _Move:
    return _Move(Event.TAKE_BACK if _is_to_be_taken_back(r, seen) else Event.CALLED_OFF, code, facts)


def _failing(r: Remediation, failed: Failed, seen: Seen | None = None) -> _Move:
    """The first failure is what is told; that of taking back stands beside it.

    Without `seen`, as where a hand refuses a step, it is taken for dead.
    """
    step = present(r)
    facts = {"step": step.action, **failed.facts} if step else failed.facts
    if r.phase is Phase.ROLLING_BACK:
        facts = {"undo_code": failed.code, **_prefixed("undo_", facts)}
        return _Move(Event.FAILED, facts=facts, found=failed)
    event = Event.TAKE_BACK if _is_to_be_taken_back(r, seen) else Event.FAILED
    return _Move(event, failed.code, facts, failed)


def _prefixed(prefix: str, facts: Mapping[str, str]) -> dict[str, str]:
    return {prefix + name: value for name, value in facts.items()}


def _is_to_be_taken_back(r: Remediation, seen: Seen | None) -> bool:
    """While it is applied: if the server was touched; later, if there is more to it than a restart."""
    if seen is not None and _has_no_way_back(r, seen):
        return False
    if r.phase is Phase.VERIFYING:
        has_limits = any(step.action == "lift" for step in r.plan.undo)
        return bool(r.plan.undo) and (r.plan.kind is ActionClass.RECONFIGURE or has_limits)
    return r.phase is Phase.APPLYING and r.asked_at_ms is not None and bool(r.plan.undo)


def _has_no_way_back(r: Remediation, seen: Seen) -> bool:
    """Whether it lives, as it would not with the revision before: its undo does not start that."""
    is_alive = seen.server.supervisor.phase in _ALIVE
    starts = any(step.action == "start" for step in r.plan.undo)
    return is_alive and r.plan.kind is ActionClass.RECONFIGURE and not starts


def _is_stopped_by_hand(r: Remediation, seen: Seen) -> bool:
    """Whether somebody else asked for its stop: ours lasts from the step `stop` until a process began."""
    supervisor, step = seen.server.supervisor, present(r)
    if not supervisor.stop_asked:
        return False
    if step is None:  # nothing is done yet, or all is: then a process runs that nobody here asked to stop
        return True
    if step.action == "start":
        return began_anew(r, seen)
    actions = [step.action for step in walked(r)]
    turns = [action for action in actions[: r.step_index + 1] if action in {"stop", "start"}]
    if turns:
        return turns[-1] == "start"
    # What is taken back may have been stopped before the undo began.
    return not (r.phase is Phase.ROLLING_BACK and any(step.action == "stop" for step in r.plan.steps))


def _has_gone(r: Remediation, seen: Seen) -> bool:
    """Whether what reversible steps do ended with the server: another plan has to see to that."""
    is_down = seen.server.phase is ServerPhase.DOWN
    return is_down and r.plan.kind is ActionClass.REVERSIBLE and _has_deeds(r)


def _has_deeds(r: Remediation) -> bool:
    return any(is_deed(step.action) for step in r.plan.steps)


def _comes_up(r: Remediation, seen: Seen) -> bool:
    """Whether somebody else started the server before it was touched; what a person wants goes on."""
    is_untouched = r.phase is Phase.APPLYING and r.asked_at_ms is None
    is_heavy = r.plan.kind is not ActionClass.REVERSIBLE and not r.plan.by
    return is_untouched and is_heavy and seen.server.starting_since_ms is not None


def _is_needless(r: Remediation, seen: Seen) -> bool:
    """Whether it healed by itself before its service was cut; what a person wants waits for no alert."""
    if seen.alert_firing or r.plan.by:
        return False
    if r.phase is not Phase.APPLYING:
        return r.phase is Phase.AWAITING_APPROVAL
    if r.plan.kind is ActionClass.REVERSIBLE or seen.server.phase is not ServerPhase.SERVING:
        return False
    actions = [step.action for step in r.plan.steps]
    return r.asked_at_ms is None or ("stop" in actions and "stop" not in actions[: r.step_index + 1])


# -- the row ---------------------------------------------------------------------------------------------


def _moved(r: Remediation, move: _Move, now_ms: int) -> Remediation:
    """The row after what happened; what was counted and heard until then is over."""
    index = {Event.STEP_DONE: r.step_index + 1, Event.TAKE_BACK: 0}.get(move.event, r.step_index)
    return dataclasses.replace(
        r,
        phase=TRANSITIONS[r.phase, move.event],
        step_index=index,
        since_ms=now_ms,
        good_since_ms=None,
        outcome=move.code or r.outcome,
        facts={**r.facts, **move.facts},
        heard={},
        course=(*r.course, *over(r, move.found, now_ms)),
    )


def _watched(r: Remediation, seen: Seen, now_ms: int) -> Remediation:
    """The row that says since when all is well, what falls short, or its process is gone: each must last."""
    r = dataclasses.replace(r, is_cut=r.is_cut or cuts(r, seen))
    step = present(r)
    if step is not None and Look(step=step, remediation=r, seen=seen, now_ms=now_ms).has_died:
        return dataclasses.replace(r, heard={DIED: str(now_ms), **r.heard})
    if DIED in r.heard:
        r = dataclasses.replace(r, heard={name: said for name, said in r.heard.items() if name != DIED})
    if r.phase is Phase.VERIFYING:
        short = _falls_short(r, seen)
        heard = {short.code: r.heard.get(short.code, str(now_ms))} if short else {}
        is_well = seen.server.phase is ServerPhase.SERVING and not short
    elif step is not None and step.action == "hold":
        heard, is_well = dict(r.heard), True
    else:
        return r
    since_ms = (r.good_since_ms or now_ms) if is_well and not seen.alert_firing else None
    return dataclasses.replace(r, good_since_ms=since_ms, heard=heard)
