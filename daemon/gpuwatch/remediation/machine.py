"""How far a remediation has come: a table of phases, asked again each cycle. Pure.

Rule 1: every change of phase is a row of `TRANSITIONS`; docs/remediation.md is drawn from it.
Rule 2: level, not edge: events are read off what is seen now, so a daemon that was killed between
any two lines goes on from its row.
Rule 3: a step is asked until its effect is seen; asking twice is harmless by the supervisors' contract.
Rule 4: whoever pauses or aborts stops it at once; the server is left as it is.
"""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from gpuwatch.records import LIVE_PHASES, Mode, Phase, Remediation, ServerPhase, Step, SupervisorPhase

if TYPE_CHECKING:
    from collections.abc import Mapping

    from gpuwatch.records import ServerState


class Event(enum.StrEnum):
    """What can happen to a remediation."""

    DRY_RUN = "dry run"
    MAY_ACT = "may act"
    MUST_ASK = "must ask"
    APPROVED = "approved"
    DENIED = "denied"
    EXPIRED = "approval expired"
    ALERT_OVER = "alert over"
    STEP_DONE = "step done"
    ALL_DONE = "all steps done"
    LATE = "late"
    DIED_AGAIN = "died again"
    REFUSED = "supervisor refused"
    HELPED = "helped"
    RELAPSED = "relapsed"
    ABORT = "aborted"


TRANSITIONS: Final[Mapping[tuple[Phase, Event], Phase]] = {
    (Phase.PLANNED, Event.DRY_RUN): Phase.REHEARSED,
    (Phase.PLANNED, Event.MUST_ASK): Phase.AWAITING_APPROVAL,
    (Phase.PLANNED, Event.MAY_ACT): Phase.APPLYING,
    (Phase.PLANNED, Event.ABORT): Phase.ABORTED,
    (Phase.AWAITING_APPROVAL, Event.APPROVED): Phase.APPLYING,
    (Phase.AWAITING_APPROVAL, Event.DENIED): Phase.ABORTED,
    (Phase.AWAITING_APPROVAL, Event.EXPIRED): Phase.ABORTED,
    (Phase.AWAITING_APPROVAL, Event.ALERT_OVER): Phase.ABORTED,
    (Phase.AWAITING_APPROVAL, Event.ABORT): Phase.ABORTED,
    (Phase.APPLYING, Event.STEP_DONE): Phase.APPLYING,
    (Phase.APPLYING, Event.ALL_DONE): Phase.VERIFYING,
    (Phase.APPLYING, Event.LATE): Phase.FAILED,
    (Phase.APPLYING, Event.DIED_AGAIN): Phase.FAILED,
    (Phase.APPLYING, Event.REFUSED): Phase.FAILED,
    (Phase.APPLYING, Event.ABORT): Phase.ABORTED,
    (Phase.VERIFYING, Event.HELPED): Phase.SUCCEEDED,
    (Phase.VERIFYING, Event.RELAPSED): Phase.FAILED,
    (Phase.VERIFYING, Event.LATE): Phase.FAILED,
    (Phase.VERIFYING, Event.ABORT): Phase.ABORTED,
}

OUTCOMES: Final[Mapping[Event, str]] = {
    Event.DRY_RUN: "dry_run",
    Event.DENIED: "denied",
    Event.EXPIRED: "approval_expired",
    Event.ALERT_OVER: "alert_over",
    Event.LATE: "step_late",
    Event.DIED_AGAIN: "died_again",
    Event.REFUSED: "not_asked",
    Event.HELPED: "restored",
    Event.RELAPSED: "relapsed",
    Event.ABORT: "aborted_by",
}
"""The code of the words for each event that ends a remediation."""

_GONE: Final = {SupervisorPhase.INACTIVE, SupervisorPhase.FAILED}


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What the world looks like to one remediation now.

    `word` is what a person said of it: approved, denied, abort, or nothing; `by` is who.
    """

    server: ServerState
    alert_firing: bool
    paused: bool = False
    word: str = ""
    by: str = ""
    approval_expires_ms: int


def advance(remediation: Remediation, seen: Seen, now_ms: int) -> tuple[Remediation, Step | None]:
    """The remediation after this cycle, and the step to ask for now, if any."""
    for _ in range(len(Phase)):  # a phase is passed through at once where nothing holds it
        event, facts = _event(remediation, seen, now_ms)
        if event is None:
            break
        remediation = _moved(remediation, event, facts, now_ms)
    if remediation.phase is Phase.APPLYING:
        return _asked(remediation, now_ms), remediation.plan.steps[remediation.step_index]
    if remediation.phase is Phase.VERIFYING:
        return _watched(remediation, seen, now_ms), None
    return remediation, None


def refused(remediation: Remediation, detail: str, now_ms: int) -> Remediation:
    """The supervisor said no for good."""
    return _moved(remediation, Event.REFUSED, {"detail": detail}, now_ms)


def _event(r: Remediation, seen: Seen, now_ms: int) -> tuple[Event | None, dict[str, str]]:
    """What has happened, by phase; None if nothing has."""
    if r.phase not in LIVE_PHASES:
        return None, {}
    if not r.plan.dry_run and (seen.paused or seen.word == "abort"):
        return Event.ABORT, {"by": seen.by or "pause"}
    match r.phase:
        case Phase.PLANNED:
            return _planned_event(r), {}
        case Phase.AWAITING_APPROVAL:
            return _awaiting_event(r, seen, now_ms)
        case Phase.APPLYING:
            return _applying_event(r, seen, now_ms)
        case _:
            return _verifying_event(r, seen, now_ms)


def _planned_event(r: Remediation) -> Event:
    if r.plan.dry_run:
        return Event.DRY_RUN
    return Event.MAY_ACT if r.plan.mode is Mode.AUTO else Event.MUST_ASK


def _awaiting_event(r: Remediation, seen: Seen, now_ms: int) -> tuple[Event | None, dict[str, str]]:
    if not seen.alert_firing:
        return Event.ALERT_OVER, {}
    if seen.word == "approved":
        return Event.APPROVED, {"by": seen.by}
    if seen.word == "denied":
        return Event.DENIED, {"by": seen.by}
    if now_ms - r.since_ms >= seen.approval_expires_ms:
        return Event.EXPIRED, {"minutes": str(seen.approval_expires_ms // 60_000)}
    return None, {}


def _applying_event(r: Remediation, seen: Seen, now_ms: int) -> tuple[Event | None, dict[str, str]]:
    server, supervisor = seen.server, seen.server.supervisor
    began_anew = supervisor.started_at_ms is not None and supervisor.started_at_ms >= r.since_ms
    serving = server.phase is ServerPhase.SERVING
    if serving and (began_anew or not seen.alert_firing):  # or it healed by itself: then touch nothing
        last = r.step_index + 1 == len(r.plan.steps)
        return (Event.ALL_DONE if last else Event.STEP_DONE), {}
    if began_anew and supervisor.phase in _GONE:
        return Event.DIED_AGAIN, {"detail": supervisor.detail}
    if now_ms - r.since_ms >= r.plan.steps[r.step_index].within_ms:
        return Event.LATE, {"seconds": str((now_ms - r.since_ms) // 1000)}
    return None, {}


def _verifying_event(r: Remediation, seen: Seen, now_ms: int) -> tuple[Event | None, dict[str, str]]:
    """Good for `verify_for_ms` on end is a success; a server that falls again is not."""
    if seen.server.phase is ServerPhase.DOWN:
        return Event.RELAPSED, {}
    if r.good_since_ms is not None and now_ms - r.good_since_ms >= r.plan.verify_for_ms:
        return Event.HELPED, {"seconds": str((now_ms - r.created_at_ms) // 1000)}
    if now_ms - r.since_ms >= 10 * r.plan.verify_for_ms + 60_000:
        return Event.LATE, {"seconds": str((now_ms - r.since_ms) // 1000)}
    return None, {}


def _moved(r: Remediation, event: Event, facts: dict[str, str], now_ms: int) -> Remediation:
    phase = TRANSITIONS[r.phase, event]
    if phase is Phase.APPLYING:
        index = r.step_index + 1 if event is Event.STEP_DONE else r.step_index
        return dataclasses.replace(r, phase=phase, step_index=index, since_ms=now_ms, asked_at_ms=None)
    outcome = "" if phase in LIVE_PHASES else OUTCOMES[event]
    if phase is Phase.FAILED and r.phase is Phase.VERIFYING and event is Event.LATE:
        outcome = "never_verified"
    return dataclasses.replace(r, phase=phase, since_ms=now_ms, outcome=outcome, facts=facts)


def _asked(r: Remediation, now_ms: int) -> Remediation:
    return r if r.asked_at_ms is not None else dataclasses.replace(r, asked_at_ms=now_ms)


def _watched(r: Remediation, seen: Seen, now_ms: int) -> Remediation:
    good = seen.server.phase is ServerPhase.SERVING and not seen.alert_firing
    since_ms = (r.good_since_ms or now_ms) if good else None
    return r if since_ms == r.good_since_ms else dataclasses.replace(r, good_since_ms=since_ms)
