"""What a policy's actions come to here: the same ones, other arguments, patience, or nothing. Pure.

Rule 1: a failure is classified before anything is done about it; what fails again with the same arguments
        is not started with them.
Rule 2: memory that others hold may come back: a server waits `wait_for_memory` before it takes less.
Rule 3: what was changed because memory was short is changed back when it is there again.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING, Final

from gpuwatch.records import Considered, Phase, ServerPhase, ServerStart, StartOutcome
from gpuwatch.remediation import ladder
from gpuwatch.remediation.situation import (
    CALLED_OFF,
    RECONFIGURE,
    RESTART,
    Change,
    Intent,
    Reason,
    Situation,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gpuwatch.records import Argument, Remediation, Revision

NOT_FREE: Final = "memory_share_not_free"
_OOM: Final = "runtime_oom"
_FAILS_AGAIN: Final = frozenset(
    {"kv_cache_too_small", "no_memory_for_cache", "auto_fit_failed", "bad_argument"}
)
_CANNOT_START: Final = _FAILS_AGAIN | {_OOM}
# Failed by what stood beside the server, whatever its arguments are.
_NO_FAULT_OF_ARGUMENTS: Final = frozenset({"port_busy", "profiling_assert"})
_PASSES: Final = _NO_FAULT_OF_ARGUMENTS | {NOT_FREE}  # once what stood beside it is gone
_PREEMPTION_ALERT: Final = "VLLMPreempting"
_UNHELPFUL: Final = frozenset({Phase.FAILED, Phase.ROLLED_BACK})
_NOBODY: Final = 0.02  # of a GPU: what its driver and contexts take, without another process
_DAY_MS: Final = 86_400_000
_ANEW: Final = frozenset({RESTART, RECONFIGURE})
RETURN: Final = "return"
"""The value of a rule's label `remediation` that asks for the wanted arguments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cure:
    """`reconfigure` with a change, a restart without one, nothing with a reason."""

    change: Change | None = None
    reason: Reason | None = None
    considered: tuple[Considered, ...] = ()


_SAME: Final = _Cure(considered=(Considered(option="same_arguments", code="chosen"),))


def intent(s: Situation) -> Intent:
    """Actions that start the server anew, after the cure; class and mode are the planner's."""
    actions = tuple(s.policy.steps) if s.policy else ()
    if RECONFIGURE not in actions:
        cure = _restarted(s)
    elif s.alert.labels.get("remediation") == RETURN:
        cure = _returned(s)
    else:
        cure = _reconfigured(s)
    if cure.reason is None:
        as_one = RECONFIGURE if cure.change else RESTART
        actions = tuple(dict.fromkeys(as_one if name in _ANEW else name for name in actions))
    return Intent(actions=actions, change=cure.change, reason=cure.reason, considered=cure.considered)


def last_good(s: Situation) -> Revision | None:
    """Of the revisions but the present one that served for `good_after` or serve, the one that did last."""
    good = (s.revision(start.revision) for start in s.starts if _was_good(start, s))
    return next((r for r in good if r is not None and r.number != s.sight.revision), None)


def _was_good(start: ServerStart, s: Situation) -> bool:
    if start.outcome is not StartOutcome.HEALTHY or start.healthy_at_ms is None:
        return False
    until_ms = s.now_ms if start.ended_at_ms is None else min(start.ended_at_ms, s.now_ms)
    return start.ended_at_ms is None or until_ms - start.healthy_at_ms >= s.limits.good_after_ms


# -- a restart, and what it becomes --------------------------------------------------------------------------


def _restarted(s: Situation) -> _Cure:
    """The same arguments anew, unless they must fail again or have killed it twice."""
    short, kind = _short_of_memory(s), _what_ended(s)
    if short:
        return _patient(s, short)
    if kind not in _FAILS_AGAIN and not (kind == _OOM and _is_repeated(s)):
        return _SAME
    cure = _changed(s, kind)
    if cure.change:
        return cure
    if kind == _OOM:  # it may well serve for long again
        return dataclasses.replace(_SAME, considered=(*cure.considered, *_SAME.considered))
    return dataclasses.replace(cure, reason=Reason.of("would_fail_again", failure=kind))


def _reconfigured(s: Situation) -> _Cure:
    """Other arguments for what ended the server, or for what the alert says of it."""
    short = _short_of_memory(s)
    if short:
        return _patient(s, short)
    kind = "preemption" if s.alert.rule == _PREEMPTION_ALERT else _what_ended(s)
    if kind == "preemption" and s.server and s.server.phase is not ServerPhase.SERVING:
        return _Cure(reason=Reason("server_not_serving"))
    return _SAME if kind in _PASSES or _is_untried(s) else _changed(s, kind)


def _last_life(s: Situation) -> ServerStart | None:
    """The last one; or the last with the arguments of the next start, if with those it could not start."""
    failed = s.failed_start
    if failed and failed.failure in _CANNOT_START:
        return failed
    return s.starts[0] if s.starts else None


def _what_ended(s: Situation) -> str:
    """The class of failure that ended the last life with these arguments; empty if none did."""
    start = _last_life(s)
    if start is None or _is_untried(s):
        return ""
    is_over = start.ended_at_ms is not None or start.outcome is StartOutcome.FAILED
    return start.failure if is_over else ""


def _is_untried(s: Situation) -> bool:
    """Whether what ended had other arguments than the next start will have."""
    start = _last_life(s)
    if start is None or start.ended_at_ms is None or start.revision is None or s.current is None:
        return False
    return start.revision != s.current.number


def _is_repeated(s: Situation) -> bool:
    """Whether it ran out of memory while it started, or for the second time within a day."""
    since_ms = s.now_ms - _DAY_MS
    deaths = [x for x in s.starts if x.failure == _OOM and (x.ended_at_ms or x.began_at_ms) > since_ms]
    last = _last_life(s)
    return len(deaths) >= 2 or (last is not None and last.outcome is StartOutcome.FAILED)


def _changed(s: Situation, kind: str) -> _Cure:
    """The next arguments by the ladder; back to the last good ones where nothing else can be known."""
    if s.current is None:
        return _Cure(reason=Reason.of("no_revisions"))
    if kind == "bad_argument":
        good = last_good(s)
        facts = {"from": str(s.current.number), "to": str(good.number)} if good else {}
        back = (Considered(option="last_good", code="chosen" if good else "none_yet", facts=facts),)
        if good is None:
            return _Cure(reason=Reason.of("nothing_to_change", failure=kind), considered=back)
        return _Cure(change=Change(revision=good.number, why=kind, at_ms=s.now_ms), considered=back)
    arguments, considered = ladder.next_change(_trouble(s, kind, s.current))
    if arguments is None:
        return _Cure(reason=Reason.of("nothing_to_change", failure=kind or "none"), considered=considered)
    return _Cure(change=Change(arguments=arguments, why=kind, at_ms=s.now_ms), considered=considered)


def _trouble(s: Situation, kind: str, current: Revision) -> ladder.Trouble:
    start = _last_life(s)
    # What an older revision logged says nothing of the present one.
    mine = start if start is not None and start.revision in {None, current.number} else None
    if kind == _OOM and "limit_mm_per_prompt" in current.arguments:
        kind = "multimodal_peak"
    return ladder.Trouble(
        kind=kind,
        arguments=current.arguments,
        facts=mine.facts if mine else {},
        ran=mine.arguments if mine else {},
        version=start.version if start else "",
        free_bytes=s.sight.free_bytes,
        total_bytes=s.sight.total_bytes,
        running=s.sight.requests_running,
        bounds=s.bounds,
        failed=failed_arguments(s.revisions, s.starts, s.history),
        quantised_model=s.quantised_model,
    )


def failed_arguments(
    revisions: Sequence[Revision], starts: Sequence[ServerStart], history: Sequence[Remediation] = ()
) -> list[Mapping[str, Argument]]:
    """The sets of arguments that did not start, ran out of memory while they served, or did not help."""
    bad = {
        start.revision
        for start in starts
        if start.failure not in _NO_FAULT_OF_ARGUMENTS
        and (start.outcome is StartOutcome.FAILED or start.failure == _OOM)
    }
    bad |= {r.plan.after for r in history if r.phase in _UNHELPFUL and r.outcome not in CALLED_OFF}
    return [r.arguments for r in revisions if r.number in bad]


# -- memory that is not free ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Short:
    """The share of a GPU that is free, that is wanted, and since when a start could not have it."""

    free: float
    wanted: float
    since_ms: int


def _short_of_memory(s: Situation) -> _Short | None:
    """Whether a start would not find its share free; None also where that cannot be told.

    What processes of the server itself hold is given back by the stop that comes before each start.
    """
    free, wanted = ladder.free_share(s.sight.free_bytes, s.sight.total_bytes), _share_in_force(s)
    if free is None and _what_ended(s) == NOT_FREE:
        free, wanted = _shares_said(s.starts[0])
    if free is None or wanted is None or free >= wanted or not _is_gone(s):
        return None
    return _Short(free, wanted, _short_since_ms(s))


def _shares_said(start: ServerStart) -> tuple[float | None, float | None]:
    """The shares that were free and wanted, by the failure itself: all there is where no GPU can be read."""
    free, wanted, total = (start.facts.get(f"{name}_bytes") for name in ("free", "wanted", "total"))
    if not (free and wanted and total):
        return None, None
    return int(free) / int(total), int(wanted) / int(total)


def _is_gone(s: Situation) -> bool:
    """Whether neither the server nor what it left behind holds memory; a process of it may outlive that."""
    if s.sight.gpu_holders is not None:
        return s.sight.gpu_holders == 0
    if s.sight.processes is not None:
        return s.sight.processes == 0
    return s.is_dead


def _share_in_force(s: Situation) -> float | None:
    """By the revision; where none is kept, by what the last start logged."""
    if s.current:
        return ladder.share_of(s.current.arguments)
    start = s.starts[0] if s.starts else None
    if start is None or "kv_cache_memory_bytes" in start.arguments:
        return None
    return ladder.Trouble(kind="", arguments={}, ran=start.arguments).number(ladder.SHARE) or ladder.share_of(
        {}
    )


def _short_since_ms(s: Situation) -> int:
    """When the first of those starts ended that failed on end for it, else when the last life ended."""
    down_ms = s.server.since_ms if s.server else s.now_ms
    ends = [start.ended_at_ms or down_ms for start in takewhile(lambda x: x.failure == NOT_FREE, s.starts)]
    if ends:
        return ends[-1]
    return (s.starts[0].ended_at_ms if s.starts else None) or down_ms


def _patient(s: Situation, short: _Short) -> _Cure:
    """Wait, and after a while take what there is."""
    reason = _not_free(s, short)
    if s.now_ms - short.since_ms < s.limits.wait_for_memory_ms:
        return _Cure(
            reason=reason, considered=(Considered(option="wait", code="chosen", facts=reason.facts),)
        )
    waited = Considered(option="wait", code="waited", facts=reason.facts)
    cure = _changed(s, NOT_FREE)
    return dataclasses.replace(
        cure, reason=None if cure.change else reason, considered=(waited, *cure.considered)
    )


def _not_free(s: Situation, short: _Short) -> Reason:
    return Reason.of(
        "memory_not_free",
        free_percent=round(short.free * 100),
        wanted_percent=round(short.wanted * 100),
        growing={None: "unknown", True: "yes", False: "no"}[s.sight.others_growing],
        age=max(s.now_ms - short.since_ms, 0),
    )


# -- back to what a person wanted ----------------------------------------------------------------------------


def _returned(s: Situation) -> _Cure:
    """The wanted revision again, once the memory is back that others took, for which gpuwatch left it."""
    wanted, current = s.revision(s.wanted), s.current
    if wanted is None or current is None:
        return _Cure(reason=Reason.of("no_revisions"))
    if wanted.number == current.number:
        return _Cure(reason=Reason.of("already_current", revision=current.number))
    if current.why not in {NOT_FREE, _OOM}:
        return _Cure(reason=Reason.of("failed_already", revision=wanted.number))
    short = _too_short_for(s, wanted, current)
    if short:
        return _Cure(reason=short)
    facts = {"from": str(current.number), "to": str(wanted.number)}
    return _Cure(
        change=Change(revision=wanted.number, why=RETURN, at_ms=s.now_ms),
        considered=(Considered(option=RETURN, code="chosen", facts=facts),),
    )


def _too_short_for(s: Situation, wanted: Revision, current: Revision) -> Reason | None:
    """Whether what is free and what the server itself holds are too little; who cannot tell says so."""
    free = ladder.free_share(s.sight.free_bytes, s.sight.total_bytes)
    needed, held = ladder.share_of(wanted.arguments), ladder.share_of(current.arguments)
    if free is None or needed is None or held is None:
        return Reason.of("memory_unknown")
    is_held = s.server is not None and s.server.phase is ServerPhase.SERVING and not s.sight.asleep
    there = free + (held if is_held else 0)
    if current.why == _OOM:
        taken = _taken_by_others(s, wanted)
        if taken < _NOBODY:
            return Reason.of("failed_already", revision=wanted.number)
        needed = max(needed, 1 - taken / 2 - ladder.MARGIN)
    return None if there >= needed + ladder.MARGIN else _not_free(s, _Short(there, needed, s.now_ms))


def _taken_by_others(s: Situation, wanted: Revision) -> float:
    """The share that others held when the wanted arguments ran out of memory; 0 if that is not known."""
    for start in s.starts:
        said = [start.facts.get(f"{name}_bytes") for name in ("total", "free", "process")]
        if start.failure == _OOM and start.revision in {None, wanted.number} and all(said):
            total, free, process = (int(figure or 0) for figure in said)
            return 1 - (free + process) / total
    return 0.0
