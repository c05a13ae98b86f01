"""How each step is judged by what is seen now: done, not yet, or failed. Pure.

Rule 1: a judge looks at what is there, never at what was asked: a step that is done already is passed.
Rule 2: what cannot be told decides nothing where something else can; where nothing can, the supervisor does.
Rule 3: only what was seen since the step began proves that it was done now.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias

from gpuwatch.records import (
    ErrandPhase,
    PastStep,
    Phase,
    Remediation,
    ServerPhase,
    Sight,
    StartOutcome,
    Step,
    StepEnd,
)

if TYPE_CHECKING:
    from gpuwatch.records import ServerStart, ServerState

_STEADY_MS: Final = 3_000
_OPENED_AFTER_MS: Final = 15_000  # the stages of the door
_NO_GUEST_AFTER_MS: Final = 10_000  # a guest that is not heard for less may have been busy
_VERDICT_AFTER_MS: Final = 3_000  # a verdict of now was made with what was seen before
_READ_WITHIN_MS: Final = 5_000  # what a process said last, after its end was seen
_GRAIN_MS: Final = 100  # a tick's instant is rounded, so that a process may begin before the step that asked
_OF_THE_PROCESS: Final = frozenset({"stop", "await_memory", "start", "canary"})
_UNCLEAR: Final = frozenset({"", "unknown", "process_died"})  # the rest of the log may say it better
DIED: Final = "died_ms"
"""What is heard of a step whose process ended: when that was seen."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What the world looks like to one remediation now.

    `word` is what a person said of it: approved, denied, abort, or nothing; `by` is who. `new_alerts` are
    the rules that fire for its server, did not when it was planned, and are not its own.
    """

    server: ServerState
    alert_firing: bool
    paused: bool = False
    word: str = ""
    by: str = ""
    approval_expires_ms: int
    sight: Sight = field(default_factory=Sight)
    new_alerts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Failed:
    """Why something failed: a code of the catalogue in `notify.wording`, and its figures."""

    code: str
    facts: Mapping[str, str]

    @classmethod
    def of(cls, code: str, **facts: object) -> Failed:
        """`Failed.of("step_late", seconds=60)`."""
        return cls(code, {name: str(value) for name, value in facts.items()})


Found: TypeAlias = bool | Failed
"""Whether a step is done; or why it never will be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """One look at the present step of a remediation."""

    step: Step
    remediation: Remediation
    seen: Seen
    now_ms: int

    @property
    def sight(self) -> Sight:
        """What is seen of the server."""
        return self.seen.sight

    @property
    def age_ms(self) -> int:
        """Since when the step is the present one."""
        return self.now_ms - self.remediation.since_ms

    @property
    def serves(self) -> bool:
        """Whether `/health` answers 200."""
        return self.seen.server.phase is ServerPhase.SERVING

    @property
    def is_gone(self) -> bool:
        """Whether its process ended and nothing will start it by itself."""
        return self.seen.server.supervisor.is_dead

    @property
    def start(self) -> ServerStart | None:
        """The row of the server's last process; None where it speaks of one before that."""
        start, supervisor = self.sight.start, self.seen.server.supervisor
        return start if start and start.began_at_ms == supervisor.started_at_ms else None

    @property
    def has_died(self) -> bool:
        """Whether the process that the step waits for has ended, and nothing will start it by itself."""
        if self.serves or not self.is_gone:
            return False
        is_anew = began_anew(self.remediation, self.seen)
        return self.step.action == "canary" or (self.step.action == "start" and is_anew)

    def stays(self, revision: str | None) -> bool:
        """Whether it serves and nobody stops it, with that revision; any will do for None."""
        if not self.serves or self.seen.server.supervisor.stop_asked:
            return False
        return revision is None or (self.start is not None and self.start.revision == int(revision))


Judge: TypeAlias = Callable[[Look], Found]


@dataclass(frozen=True, slots=True)
class StepKind:
    """How a step is judged, whether it fails when it is late, and whether it touches the server.

    A step that does not fail when it is late does not fail at all: the plan goes on without it.
    """

    judge: Judge
    late_fails: bool
    is_deed: bool


def walked(r: Remediation) -> tuple[Step, ...]:
    """The steps that are walked in the phase that it is in."""
    match r.phase:
        case Phase.APPLYING:
            return r.plan.steps
        case Phase.ROLLING_BACK:
            return undo_of(r)
        case _:
            return ()


def undo_of(r: Remediation) -> tuple[Step, ...]:
    """What takes it back as it stands: a process is ended and begun only where its own steps had."""
    return tuple(step for step in r.plan.undo if r.is_cut or step.action not in _OF_THE_PROCESS)


def present(r: Remediation) -> Step | None:
    """The step that it is at; None in a phase without steps."""
    steps = walked(r)
    return steps[r.step_index] if r.step_index < len(steps) else None


def began_anew(r: Remediation, seen: Seen) -> bool:
    """Whether a process of the server began since the present step did."""
    started_at_ms = seen.server.supervisor.started_at_ms
    return started_at_ms is not None and started_at_ms >= r.since_ms - _GRAIN_MS


def cuts(r: Remediation, seen: Seen) -> bool:
    """Whether its present step may end a process that lives, or is seen to have begun one.

    A stop counts as soon as it is asked: what it may have ended must come again. A start counts once it is
    seen: what it has not begun must not be begun to take it back.
    """
    step = present(r)
    if r.phase is not Phase.APPLYING or step is None or step.action not in {"stop", "start"}:
        return False
    return not seen.server.supervisor.is_dead or began_anew(r, seen)


def is_deed(action: str) -> bool:
    """Whether that step touches the server or its settings; one that nobody knows may have."""
    return action not in STEPS or STEPS[action].is_deed


def over(r: Remediation, found: Found, now_ms: int) -> tuple[PastStep, ...]:
    """The present step as one that ended now, by what it was found to be: False where it was cut short.

    Nothing in a phase without steps.
    """
    step = present(r)
    if step is None:
        return ()
    end, detail = StepEnd.DONE if found else StepEnd.CALLED_OFF, ""
    if isinstance(found, Failed):
        end = StepEnd.LATE if found.code == "step_late" else StepEnd.FAILED
        detail = found.facts.get("detail", "")
    past = PastStep(
        action=step.action,
        began_at_ms=r.since_ms,
        ended_at_ms=now_ms,
        end=end,
        is_undo=r.phase is Phase.ROLLING_BACK,
        detail=detail,
    )
    return (past,)


def must_succeed(action: str, phase: Phase) -> bool:
    """Whether a plan fails with that step; with one that nobody knows, too.

    What is taken back is started also where the memory is not: a start that fails says why, and the server
    counts as down; one that was stopped and only waited for would stay stopped.
    """
    if phase is Phase.ROLLING_BACK and action == "await_memory":
        return False
    return action not in STEPS or STEPS[action].late_fails


def errand_key(r: Remediation, step: Step) -> str:
    """The name of the errand of a step."""
    undo = "undo-" if r.phase is Phase.ROLLING_BACK else ""
    return f"{r.plan.id}-{undo}{step.action}"


def judged(look: Look) -> Found:
    """What has become of a step, its deadline included."""
    kind = STEPS.get(look.step.action)
    if kind is None:  # a row of another version of gpuwatch
        return Failed.of("unknown_step")
    found = _found(look, kind)
    if found is False and look.age_ms >= look.step.within_ms:
        return Failed.of("step_late", seconds=look.age_ms // 1000)
    return found


def _found(look: Look, kind: StepKind) -> Found:
    detail = look.remediation.heard.get("failed")
    found = kind.judge(look)
    return Failed.of("step_failed", detail=detail) if found is False and detail is not None else found


# -- the judges ------------------------------------------------------------------------------------------


def _drained(look: Look) -> Found:
    """A door that is shut, and nobody behind it; a server that gives no tokens finishes nothing."""
    sight = look.sight
    if not sight.doors or not look.serves or sight.verdict == "stalled":
        return True
    in_hand = (sight.requests_running, sight.requests_waiting, sight.in_flight)
    return sight.admission_limit == 0 and not any(in_hand)


def _stopped(look: Look) -> Found:
    if _is_kept(look):
        return True
    return look.is_gone and not look.sight.processes


def _memory_is_free(look: Look) -> Found:
    if _is_kept(look):
        return True
    sight = look.sight
    holders = sight.processes if sight.gpu_holders is None else sight.gpu_holders
    steady_since_ms = sight.free_steady_since_ms
    if steady_since_ms is not None:  # what stood still while the server held it is not yet back
        steady_since_ms = max(steady_since_ms, look.seen.server.since_ms)
    return not holders and (steady_since_ms is None or look.now_ms - steady_since_ms >= _STEADY_MS)


def _is_kept(look: Look) -> bool:
    revision = look.step.args.get("keep_revision")
    return revision is not None and look.stays(revision)


def _swapped(look: Look) -> Found:
    return look.sight.revision == int(look.step.args["revision"])


def _started(look: Look) -> Found:
    """A new process that serves; where something is taken back, the old one will do as well."""
    r, seen = look.remediation, look.seen
    if look.serves and began_anew(r, seen):
        return True
    if r.phase is Phase.ROLLING_BACK and look.stays(look.step.args.get("revision")):
        return True
    if look.has_died:
        return _dead(look)
    return _died_again(look, look.sight.start) if _has_failed(look) else False


def _dead(look: Look) -> Found:
    """A failure once the log has told of what the process died, or is not going to."""
    start = look.start
    is_told = start is not None and start.ended_at_ms is not None and start.failure not in _UNCLEAR
    died_ms = int(look.remediation.heard.get(DIED, look.now_ms))
    return _died_again(look, start) if is_told or look.now_ms - died_ms >= _READ_WITHIN_MS else False


def _died_again(look: Look, start: ServerStart | None) -> Failed:
    failure = start.failure if start else ""
    return Failed.of("died_again", detail=look.seen.server.supervisor.detail, failure=failure)


def _has_failed(look: Look) -> bool:
    """Whether a start since then failed, though its supervisor may be about to try the same once more."""
    start = look.sight.start
    is_new = start is not None and start.began_at_ms >= look.remediation.since_ms - _GRAIN_MS
    return is_new and start is not None and start.outcome is StartOutcome.FAILED and not look.serves


def _answered(look: Look) -> Found:
    """By the canary, or by whoever else uses the server."""
    ok_at_ms = look.sight.canary_ok_at_ms
    if ok_at_ms is not None and ok_at_ms >= look.remediation.since_ms:
        return True
    if look.sight.verdict == "working" and look.age_ms >= _VERDICT_AFTER_MS:
        return True
    return _dead(look) if look.has_died else False


def _opened(look: Look) -> Found:
    if not look.sight.doors:
        return True
    return look.sight.admission_limit is None and look.age_ms >= _OPENED_AFTER_MS


def _admission_limited(look: Look) -> Found:
    return _limited(look, look.sight.admission_limit, look.sight.doors)


def _running_limited(look: Look) -> Found:
    return _limited(look, look.sight.running_limit, look.sight.guests)


def _limited(look: Look, limit: int | None, guests: int) -> Found:
    if not guests:
        return Failed.of("no_guest") if look.age_ms >= _NO_GUEST_AFTER_MS else False
    return limit is not None and limit <= int(look.step.args["limit"]) * guests  # each keeps its own


def _held(look: Look) -> Found:
    since_ms = look.remediation.good_since_ms
    return since_ms is not None and look.now_ms - since_ms >= int(look.step.args["for_ms"])


def _lifted(look: Look) -> Found:
    return look.sight.admission_limit is None and look.sight.running_limit is None


def _done_by_errand(code: str) -> Judge:
    """Done when its errand is, or when the hand was told so; its failure has that code."""

    def judge(look: Look) -> Found:
        if look.remediation.heard.get("done") == "yes":
            return True
        errand = look.sight.errands.get(errand_key(look.remediation, look.step))
        if errand is None or errand.phase is ErrandPhase.RUNNING:
            return False
        return errand.phase is ErrandPhase.DONE or Failed.of(code, detail=errand.detail)

    return judge


def _captured(look: Look) -> Found:
    """Of a server whose processes are gone nothing more is lost: its file is written while it starts anew."""
    is_begun = errand_key(look.remediation, look.step) in look.sight.errands
    if is_begun and look.is_gone and look.sight.processes == 0:
        return True
    return _DONE_BY_ERRAND(look)


_DONE_BY_ERRAND: Final = _done_by_errand("step_failed")
_ASKED: Final = StepKind(_DONE_BY_ERRAND, late_fails=True, is_deed=True)

STEPS: Final[Mapping[str, StepKind]] = {
    "capture": StepKind(_captured, late_fails=False, is_deed=False),
    "run": _ASKED,
    "check": StepKind(_done_by_errand("revision_refused"), late_fails=True, is_deed=False),
    "drain": StepKind(_drained, late_fails=False, is_deed=True),
    "stop": StepKind(_stopped, late_fails=True, is_deed=True),
    "await_memory": StepKind(_memory_is_free, late_fails=True, is_deed=False),
    "swap": StepKind(_swapped, late_fails=True, is_deed=True),
    "start": StepKind(_started, late_fails=True, is_deed=True),
    "canary": StepKind(_answered, late_fails=True, is_deed=False),
    "open_door": StepKind(_opened, late_fails=False, is_deed=True),
    "limit_admission": StepKind(_admission_limited, late_fails=True, is_deed=True),
    "limit_running": StepKind(_running_limited, late_fails=True, is_deed=True),
    "hold": StepKind(_held, late_fails=False, is_deed=True),
    "lift": StepKind(_lifted, late_fails=False, is_deed=True),
    "release_cache": _ASKED,
    "reset_prefix_cache": _ASKED,
    "sleep": _ASKED,
    "wake": _ASKED,
}
