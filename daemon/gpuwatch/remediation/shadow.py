"""What became of a problem that was left alone, which scores a dry run; pure, and changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Final, Literal

from gpuwatch.records import AlertState, StartOutcome

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gpuwatch.records import Remediation, ServerStart, Transition

_BY_ITSELF_WITHIN_MS: Final = (
    60_000  # a supervisor waits no longer between two lives, and no person is faster
)


@dataclass(frozen=True, slots=True)
class Shadow:
    """How long after the dry run the alert was over, None if it goes on; and who saw to it."""

    cleared_after_ms: int | None
    by: Literal["itself", "person", "still"]


def score(
    rehearsed: Remediation, transitions: Iterable[Transition], starts: Iterable[ServerStart], now_ms: int
) -> Shadow:
    """Score a dry run by what came after it, in any order; what lies after `now_ms` is not seen."""
    plan, since_ms = rehearsed.plan, rehearsed.created_at_ms
    ends = [
        t.at_ms
        for t in transitions
        if t.now is AlertState.RESOLVED
        and t.alert.identity == (plan.alert, plan.alert_labels)
        and since_ms <= t.at_ms <= now_ms
    ]
    if not ends:
        return Shadow(None, "still")
    cleared_ms = min(ends)
    lives = sorted((x for x in starts if x.server == plan.server), key=lambda x: x.began_at_ms)
    by_person = any(
        _by_person(before, after)
        for before, after in pairwise(lives)
        if since_ms < after.began_at_ms <= cleared_ms
    )
    return Shadow(cleared_ms - since_ms, "person" if by_person else "itself")


def _by_person(before: ServerStart, after: ServerStart) -> bool:
    """Whether somebody began the second life: other arguments, a stop that was asked for, or a late start."""
    if before.configuration and after.configuration and before.configuration != after.configuration:
        return True
    if before.outcome is StartOutcome.STOPPED or (before.ended_at_ms is not None and not before.failure):
        return True
    return before.ended_at_ms is not None and after.began_at_ms - before.ended_at_ms > _BY_ITSELF_WITHIN_MS
