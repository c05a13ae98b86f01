"""Whether a vLLM server works, from what can be seen of it now; pure, and without a memory of its own.

The first of these rules that applies gives the verdict.

Rule 1: what the phase says of a server that does not serve: it starts, is down, was stopped, was never seen.
Rule 2: an engine, worker or API process that ended, while the server still says 200, is a stall; while
        the server is being stopped it is the stop.
Rule 3: such a process that a signal or a debugger has held for 2 s is a stall, also while nobody asks.
Rule 4: who was put to sleep, or told to pause, is not to be blamed for standing still.
Rule 5: without fresh metrics nobody can tell, unless a canary does (rule 7).
Rule 6: requests in hand and no step is a stall after 5.5 s if nothing computes, after 7.5 s if a GPU spins
        without drawing power, after 30 s if a process is blocked in the kernel, and else when the step has
        lasted longer than steps do: a long prompt and the compilation of a first request are work.
Rule 7: a canary without an answer is a request in hand that the gauges do not show: they freeze with the
        engine.
Rule 8: who has requests works, also if they are in the API alone, or came and went between two scrapes;
        who has none is idle.

What is not known makes it slower, never wrong: the short spans of rule 6 need all of an engine that has
stepped before, requests that wait for nothing but the engine, processes and GPUs that can be seen, and a
server that was asked whether it is paused. What more should be asked is in `wants`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from gpuwatch.records import CANARY, IS_PAUSED, Labels, Sample, ServerPhase

if TYPE_CHECKING:
    from collections.abc import Callable


_STOPPED_MS: Final = 2_000
_NO_STEPS_MS: Final = 5_500  # three scrapes without a step, however they are spaced
_SPINNING_MS: Final = 7_500
_BLOCKED_MS: Final = 30_000
_LONG_STEP_MS: Final = 60_000  # or three times the longest step of late, if that is more
_LONGEST_STEP_MS: Final = 300_000  # but no more than this: the longest of late may have been a stall
_FIRST_STEP_MS: Final = 180_000  # it compiles
_BLIND_MS: Final = 10_000  # five scrapes
_IN_API_MS: Final = 5_000  # tokenising takes less
_DOUBT_MS: Final = 2_000  # a scrape without a step
_ASK_AGAIN_MS: Final = 15_000
_ASK_PAUSED_AGAIN_MS: Final = 4_000
_MOST_FLAT_MS: Final = 290_000  # evidence looks no further back


class Verdict(enum.StrEnum):
    """Whether tokens come, and if not, whether they should."""

    WORKING = "working"
    IDLE = "idle"
    STALLED = "stalled"  # they should come and do not, whatever /health says
    PAUSED = "paused"
    ASLEEP = "asleep"
    STARTING = "starting"
    DOWN = "down"
    STOPPED = "stopped"
    UNKNOWN = "unknown"


class Hardware(enum.StrEnum):
    """What the server's processes and GPUs did in the last seconds."""

    UNKNOWN = "unknown"  # some of it cannot be seen
    IDLE = "idle"  # neither CPU nor GPU
    SPINNING = "spinning"  # GPUs at 100 % that draw what an idle one does; the others idle
    WORKING = "working"


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """One of the server's engines by its last scrape."""

    name: str
    requests: int = 0  # running and waiting
    deferred: int = 0  # of those: waiting for a grammar or for another host's KV cache
    flat_ms: int = 0  # for how long no scrape has shown anything that a step changes
    has_moved: bool = False  # from the scrape before the last one to the last
    has_stepped: bool = True  # since its API server began
    longest_step_ms: int = 0  # of the last hour, requests in hand; only told when a step lasts long


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """An engine, worker or API process that is held up: for how long it has been stopped or blocked."""

    name: str
    stopped_ms: int = 0
    blocked_ms: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What is known of a server at `at_ms`. None: not known. Spans end now."""

    server: str
    at_ms: int
    phase: ServerPhase
    serving_ms: int = 0  # how long it has been in `phase`
    is_coming_up: bool = False  # a new process, although it is down
    is_stopping: bool = False  # somebody asked its supervisor for that
    has_own_pause: bool = False  # gpuwatch holds it
    is_paused: bool | None = None  # by somebody else; as of after the last step
    paused_asked_ms: int | None = None  # how long ago that was asked, or told by a guest
    sleep: str = ""  # the sleep state, empty while awake
    scraped_ms: int | None = None  # how old the newest metrics are
    engines: tuple[Engine, ...] = ()
    processes: tuple[Process, ...] = ()
    died: tuple[str, ...] = ()  # processes that ended since it serves, and were not replaced
    in_flight: int | None = None  # requests that the API holds
    in_flight_ms: int = 0  # for how long it has held any
    hardware: Hardware = Hardware.UNKNOWN  # looked at only where nothing moves
    canary_asked_ms: int | None = None  # how long ago the last answer, or none, was to a question asked then
    unanswered_ms: int | None = None  # since the first of the canaries that no answer and no step came after

    @property
    def flat_ms(self) -> int:
        """For how long no engine took a step."""
        return min((engine.flat_ms for engine in self.engines), default=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """The verdict, why, and what should be asked of the server to be surer: `is_paused`, `canary`."""

    server: str
    at_ms: int
    verdict: Verdict
    reason: str
    wants: frozenset[str] = frozenset()


def judge(evidence: Evidence, *, canary_interval_ms: int | None) -> Progress:
    """Whether the server works. `canary_interval_ms`: least span between two canaries of an idle server.

    None: no canaries at all.
    """
    verdict, reason = next(found for rule in _RULES if (found := rule(evidence)))
    wants = set()
    if verdict not in _SETTLED:
        wants |= {IS_PAUSED} if _wants_is_paused(evidence) else set()
        wants |= {CANARY} if canary_interval_ms and _wants_canary(evidence, canary_interval_ms) else set()
    return Progress(
        server=evidence.server,
        at_ms=evidence.at_ms,
        verdict=verdict,
        reason=reason,
        wants=frozenset(wants),
    )


def samples(progress: Progress) -> list[Sample]:
    """`server_progress`, the one series that is true now."""
    labels = Labels.of(
        "server_progress", server=progress.server, verdict=progress.verdict, reason=progress.reason
    )
    return [Sample(labels, progress.at_ms, 1.0)]


def _not_serving(e: Evidence) -> tuple[Verdict, str] | None:
    """Rule 1."""
    match e.phase:
        case ServerPhase.SERVING:
            return None
        case ServerPhase.STARTING:
            return Verdict.STARTING, "loading"
        case ServerPhase.DOWN:
            return (Verdict.STARTING, "coming_back") if e.is_coming_up else (Verdict.DOWN, "health")
        case ServerPhase.STOPPED:
            return Verdict.STOPPED, "operator"
        case ServerPhase.UNSEEN:
            return Verdict.UNKNOWN, "unseen"


def _died(e: Evidence) -> tuple[Verdict, str] | None:
    """Rule 2."""
    if not e.died:
        return None
    return (Verdict.STOPPED, "stopping") if e.is_stopping else (Verdict.STALLED, "process_died")


def _held(e: Evidence) -> tuple[Verdict, str] | None:
    """Rule 3."""
    if any(process.stopped_ms >= _STOPPED_MS for process in e.processes):
        return Verdict.STALLED, "process_stopped"
    return None


def _resting(e: Evidence) -> tuple[Verdict, str] | None:
    """Rule 4."""
    if e.sleep:
        return Verdict.ASLEEP, e.sleep
    if e.has_own_pause:
        return Verdict.PAUSED, "own"
    return (Verdict.PAUSED, "operator") if e.is_paused else None


def _blind(e: Evidence) -> tuple[Verdict, str] | None:
    """Rule 5."""
    if e.scraped_ms is None and e.serving_ms < _BLIND_MS:
        return Verdict.STARTING, "first_metrics"
    return (Verdict.UNKNOWN, "no_metrics") if e.scraped_ms is None or e.scraped_ms >= _BLIND_MS else None


def _flat(e: Evidence) -> tuple[Verdict, str] | None:
    """Rule 6."""
    reasons = (_why_flat(engine, e) for engine in e.engines if engine.requests)
    return next(((Verdict.STALLED, reason) for reason in reasons if reason), None)


def _why_flat(engine: Engine, e: Evidence) -> str:
    """Why an engine with requests in hand counts as stalled; empty if it does not."""
    flat_ms = engine.flat_ms
    is_plain = engine.has_stepped and engine.requests > engine.deferred and e.is_paused is not None
    if is_plain and e.hardware is Hardware.IDLE and flat_ms >= _NO_STEPS_MS:
        return "no_steps"
    if is_plain and e.hardware is Hardware.SPINNING and flat_ms >= _SPINNING_MS:
        return "spinning"
    if flat_ms >= _BLOCKED_MS and any(process.blocked_ms >= _BLOCKED_MS for process in e.processes):
        return "process_blocked"
    return "long_step" if flat_ms >= _patience_ms(engine) else ""


def _patience_ms(engine: Engine) -> int:
    """How long a step may last while nothing shows that it does not work."""
    if not engine.has_stepped:
        return _FIRST_STEP_MS
    return min(max(_LONG_STEP_MS, 3 * engine.longest_step_ms), _LONGEST_STEP_MS)


def _unanswered(e: Evidence) -> tuple[Verdict, str] | None:
    """Rule 7: the canary's own time has passed already."""
    if e.unanswered_ms is None or any(engine.requests for engine in e.engines):
        return None
    is_plain = all(engine.has_stepped for engine in e.engines)
    rests = e.hardware in {Hardware.IDLE, Hardware.SPINNING}
    patience_ms = max((_patience_ms(engine) for engine in e.engines), default=_LONG_STEP_MS)
    if (is_plain and rests) or e.unanswered_ms >= patience_ms:
        return Verdict.STALLED, "canary_unanswered"
    return _blind(e) or (Verdict.WORKING, "long_step")


def _busy(e: Evidence) -> tuple[Verdict, str]:
    """Rule 8."""
    flat_ms = max((engine.flat_ms for engine in e.engines if engine.requests), default=None)
    if flat_ms is not None:
        return Verdict.WORKING, "long_step" if flat_ms >= _NO_STEPS_MS else "steps"
    if any(engine.has_moved for engine in e.engines):
        return Verdict.WORKING, "steps"
    return (Verdict.WORKING, "in_api") if e.in_flight else (Verdict.IDLE, "no_requests")


_RULES: Final[tuple[Callable[[Evidence], tuple[Verdict, str] | None], ...]] = (
    _not_serving,
    _died,
    _held,
    _resting,
    _unanswered,
    _blind,
    _flat,
    _busy,
)
# A question would change nothing, or nobody would answer.
_SETTLED: Final = frozenset({Verdict.ASLEEP, Verdict.STARTING, Verdict.DOWN, Verdict.STOPPED})


def _wants_is_paused(e: Evidence) -> bool:
    """Whether it stands still, or stood still when it was asked last, and may have been paused."""
    stands_still = any(engine.requests and engine.flat_ms >= _DOUBT_MS for engine in e.engines)
    if not (stands_still or e.is_paused) or e.has_own_pause:
        return False
    again_ms = _ASK_AGAIN_MS if e.is_paused is False else _ASK_PAUSED_AGAIN_MS
    return e.paused_asked_ms is None or e.paused_asked_ms >= again_ms


def _wants_canary(e: Evidence, interval_ms: int) -> bool:
    """Whether a request of our own tells what nothing else does."""
    is_unseen = e.phase is not ServerPhase.SERVING
    is_explained = is_unseen or e.is_paused or e.has_own_pause or _died(e) or _held(e)
    if is_explained or any(engine.requests for engine in e.engines):
        return False
    asked_ms = interval_ms if e.canary_asked_ms is None else e.canary_asked_ms
    if e.unanswered_ms is not None or (e.in_flight_ms >= _IN_API_MS and e.flat_ms >= _IN_API_MS):
        return asked_ms >= min(_ASK_AGAIN_MS, interval_ms)
    if _blind(e):
        return asked_ms >= interval_ms
    return e.in_flight is None and e.flat_ms >= min(interval_ms, _MOST_FLAT_MS) and asked_ms >= interval_ms
