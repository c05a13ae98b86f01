"""Where a vLLM server is in its life, from its health, its supervisor and what it was; pure.

Rule 1: who answers 200 is SERVING.
Rule 2: whose stop was asked for through its supervisor is STOPPED, until a new process comes.
Rule 3: a single look without an answer changes nothing; none for 30 s on end is a failure.
Rule 4: who was healthy and fails is DOWN at once; that a blip raises no alarm is the alert's `for`. The end
        of its process is a failure too: who is silent on its port then is somebody else.
Rule 5: DOWN lasts until healthy again. While a new process comes up, `starting_since_ms` says so,
        until it dies or its start is overdue.
Rule 6: a process that was never healthy is STARTING; when it dies, or its start is overdue, it is DOWN.
Rule 7: never healthy and no process known is UNSEEN: not ours to call down.
Rule 8: an answer from before a process began, or was seen to have ended, is the answer of the one before:
        else a server that was replaced within a second would count as down and not as starting, and be
        restarted. Who answers later is SERVING, also outside its supervisor.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Final

from gpuwatch.records import Labels, Sample, ServerPhase, ServerState, SupervisorPhase, SupervisorState

UNANSWERED_MS: Final = 30_000
_UP: Final = frozenset({SupervisorPhase.ACTIVE, SupervisorPhase.ACTIVATING})
_ALIVE: Final = _UP | {SupervisorPhase.DEACTIVATING}


class Health(enum.StrEnum):
    """One look at vLLM's `GET /health`."""

    OK = "ok"  # 200
    FAILING = "failing"  # refused, reset, 503: the server says no
    UNKNOWN = "unknown"  # timed out or not asked: nobody can tell


@dataclass(frozen=True, slots=True)
class HealthAnswer:
    """The newest look at `/health`, and when it was asked for."""

    health: Health
    asked_at_ms: int


def judge(
    previous: ServerState | None,
    *,
    name: str,
    supervisor: SupervisorState,
    answer: HealthAnswer,
    now_ms: int,
    start_deadline_ms: int,
) -> ServerState:
    """The server now. `start_deadline_ms` is how long a start may take, from process to healthy."""
    was = previous or ServerState(name=name, phase=ServerPhase.UNSEEN, since_ms=now_ms, seen_at_ms=now_ms)
    ends = _ends(was, supervisor, now_ms)
    health = answer.health
    if health is Health.OK and (ends or answer.asked_at_ms <= _past_until_ms(was, supervisor)):
        health = Health.UNKNOWN  # rule 8
    began_ms = None if health is Health.OK else _start_began_ms(was, supervisor, now_ms)
    overdue = began_ms is not None and now_ms - began_ms >= start_deadline_ms
    unanswered_since_ms = (was.unanswered_since_ms or now_ms) if health is Health.UNKNOWN else None
    silent = unanswered_since_ms is not None and now_ms - unanswered_since_ms >= UNANSWERED_MS
    if health is Health.OK:
        phase, reason = ServerPhase.SERVING, ""
    elif supervisor.stop_asked:
        phase, reason = ServerPhase.STOPPED, "its supervisor was asked to stop it"
    elif health is Health.UNKNOWN and not (silent or ends):
        phase, reason = was.phase, was.reason
    else:
        phase, reason = _failing(was, supervisor, starting=began_ms is not None, overdue=overdue)
        if phase is ServerPhase.DOWN and silent:
            reason = f"no answer for {UNANSWERED_MS // 1000} s"
    return ServerState(
        name=name,
        phase=phase,
        since_ms=was.since_ms if phase is was.phase else now_ms,
        seen_at_ms=now_ms,
        starting_since_ms=None if overdue else began_ms,
        last_healthy_ms=answer.asked_at_ms if health is Health.OK else was.last_healthy_ms,
        unanswered_since_ms=unanswered_since_ms,
        supervisor=supervisor,
        reason=reason,
    )


def samples(state: ServerState) -> list[Sample]:
    """`server_down`, `server_stopping`, `server_phase`s; while it starts `server_start_time_seconds`."""
    at_ms = state.seen_at_ms
    down = float(state.phase is ServerPhase.DOWN)
    made = [Sample(Labels.of("server_down", server=state.name), at_ms, down)]
    made += [
        Sample(Labels.of("server_phase", server=state.name, phase=phase), at_ms, float(state.phase is phase))
        for phase in ServerPhase
    ]
    its = state.supervisor
    # A crash too is a deactivating unit, but one whose main process is gone.
    is_stopping = its.stop_asked or (its.phase is SupervisorPhase.DEACTIVATING and its.pid is not None)
    made.append(Sample(Labels.of("server_stopping", server=state.name), at_ms, float(is_stopping)))
    if state.starting_since_ms is not None:
        began_s = state.starting_since_ms / 1000
        made.append(Sample(Labels.of("server_start_time_seconds", server=state.name), at_ms, began_s))
    return made


def _ends(was: ServerState, supervisor: SupervisorState, now_ms: int) -> bool:
    """Whether its process was there at the last look and is gone; a look of long ago tells nothing."""
    is_recent = now_ms - was.seen_at_ms < UNANSWERED_MS
    return supervisor.has_ended and was.supervisor.phase in _ALIVE and is_recent


def _past_until_ms(was: ServerState, supervisor: SupervisorState) -> int:
    """Until when answers are those of a process that is no more: it was replaced, or its end was seen."""
    is_over = supervisor.has_ended and was.phase in {ServerPhase.DOWN, ServerPhase.STOPPED}
    return max(supervisor.started_at_ms or 0, was.since_ms if is_over else 0)


def _start_began_ms(was: ServerState, supervisor: SupervisorState, now_ms: int) -> int | None:
    """When the process that is coming up began; None if none is, or it has been healthy already."""
    if supervisor.has_ended or supervisor.stop_asked:
        return None
    if supervisor.phase not in _UP:  # on its way down, or nobody can tell: as before
        return was.starting_since_ms
    began_ms = supervisor.started_at_ms if supervisor.pid is not None else None
    if began_ms is None:
        return _unknown_start_ms(was, supervisor, now_ms)
    been_healthy = was.last_healthy_ms is not None and began_ms < was.last_healthy_ms
    return None if been_healthy else began_ms


def _unknown_start_ms(was: ServerState, supervisor: SupervisorState, now_ms: int) -> int | None:
    """When a process began of which nobody can tell: as it was, or when it was first seen up."""
    if was.starting_since_ms is not None:
        return was.starting_since_ms
    is_as_it_was = was.supervisor.phase is supervisor.phase and was.last_healthy_ms is not None
    return None if is_as_it_was else now_ms


def _failing(
    was: ServerState, supervisor: SupervisorState, *, starting: bool, overdue: bool
) -> tuple[ServerPhase, str]:
    """Rules 4 to 7: the phase and the reason of a server that is not healthy."""
    gone = supervisor.has_ended
    if overdue:
        return ServerPhase.DOWN, "its start is overdue"
    if was.phase in {ServerPhase.SERVING, ServerPhase.DOWN}:
        return ServerPhase.DOWN, f"its process is gone: {supervisor.detail}" if gone else "/health fails"
    if starting:
        return ServerPhase.STARTING, ""
    if gone and _died_starting(was, supervisor):
        return ServerPhase.DOWN, f"its process ended while starting: {supervisor.detail}"
    return was.phase, was.reason


def _died_starting(was: ServerState, supervisor: SupervisorState) -> bool:
    """Tell a start that failed, seen or between two looks, from a server that rests."""
    if was.phase is not ServerPhase.STOPPED:
        return was.phase is ServerPhase.STARTING
    return supervisor.started_at_ms is not None and supervisor.started_at_ms > was.since_ms
