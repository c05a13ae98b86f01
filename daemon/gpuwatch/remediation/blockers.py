"""Reasons not to act, asked in order; the first one wins.

Rule 1: a blocker is a function from a `Situation` to a `Reason` or None.
Rule 2: a blocker that cannot tell, blocks: the unknown is a reason.
Rule 3: a blocker never acts, reads no clock and keeps nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

from gpuwatch.records import (
    LIVE_PHASES,
    Alert,
    Phase,
    Remediation,
    ServerPhase,
    ServerState,
    SupervisorPhase,
)

if TYPE_CHECKING:
    from gpuwatch.config import Policy, RemediationSettings

_UNDER_WAY: Final = {SupervisorPhase.ACTIVATING, SupervisorPhase.DEACTIVATING}
_STALE_AFTER_MS: Final = 30_000
FOREVER_MS: Final = 1 << 53
"""A pause that only a person ends."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """`config.RemediationSettings` in milliseconds, for the pure side."""

    cooldown_ms: int
    budget_count: int
    budget_per_ms: int
    verify_for_ms: int
    step_within_ms: int
    just_started_grace_ms: int

    @classmethod
    def of(cls, settings: RemediationSettings) -> Self:
        """Take them from the settings."""
        return cls(
            cooldown_ms=settings.cooldown,
            budget_count=settings.budget.count,
            budget_per_ms=settings.budget.per,
            verify_for_ms=settings.verify_for,
            step_within_ms=settings.step_within,
            just_started_grace_ms=settings.just_started_grace,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """All that a decision about one firing alert may depend on.

    `history` holds the remediations of this server, live ones included, newest first. `quiet_since_ms`
    is the last moment at which gpuwatch itself began or the clock jumped: what it knows from before
    may be wrong. `resumed_at_ms` is when a person last said that it may go on.
    """

    alert: Alert
    policy: Policy | None
    dry_run: bool
    server: ServerState | None
    has_supervisor: bool
    history: Sequence[Remediation]
    limits: Limits
    paused_until_ms: int | None
    resumed_at_ms: int
    started_at_ms: int
    jumped_at_ms: int | None
    now_ms: int


@dataclass(frozen=True, slots=True)
class Reason:
    """Why not: a code of the catalogue in `notify.wording`, and its figures."""

    code: str
    facts: Mapping[str, str]


Blocker = Callable[[Situation], Reason | None]


def _reason(code: str, **facts: object) -> Reason:
    return Reason(code, {name: str(value) for name, value in facts.items()})


def no_policy(s: Situation) -> Reason | None:
    """Nobody said what to do about such alerts."""
    return _reason("no_policy") if s.policy is None else None


def notify_only(s: Situation) -> Reason | None:
    """The policy is to tell people."""
    return _reason("notify_only") if s.policy and not s.policy.steps else None


def no_server(s: Situation) -> Reason | None:
    """The alert names no server that gpuwatch knows."""
    return _reason("no_server") if s.server is None else None


def under_way(s: Situation) -> Reason | None:
    """One live remediation a server."""
    live = [r for r in s.history if r.phase in LIVE_PHASES]
    return _reason("under_way", id=live[0].plan.id) if live else None


def rehearsed(s: Situation) -> Reason | None:
    """In a dry run, saying once for each alert what would be done is enough."""
    same = (
        r
        for r in s.history
        if r.plan.dry_run
        and r.plan.alert_labels == s.alert.labels
        and r.created_at_ms >= s.alert.active_at_ms
    )
    return _reason("observe_mode") if s.dry_run and any(same) else None


def paused(s: Situation) -> Reason | None:
    """A person said stop."""
    if s.paused_until_ms is None or s.now_ms >= s.paused_until_ms:
        return None
    if s.paused_until_ms >= FOREVER_MS:
        return _reason("paused_open")
    return _reason("paused", until=s.paused_until_ms)


def just_started(s: Situation) -> Reason | None:
    """Gpuwatch began a moment ago: a restart of the host starts the server too, and it needs its time."""
    left_ms = s.started_at_ms + s.limits.just_started_grace_ms - s.now_ms
    return _reason("just_started", left=left_ms) if left_ms > 0 else None


def clock_jumped(s: Situation) -> Reason | None:
    """After a jump of the clock, or a sleep of the host, every age is wrong for a while."""
    if s.jumped_at_ms is None:
        return None
    left_ms = s.jumped_at_ms + s.limits.just_started_grace_ms - s.now_ms
    return _reason("clock_jumped", left=left_ms) if left_ms > 0 else None


def stale_data(s: Situation) -> Reason | None:
    """Never act on what was true half a minute ago."""
    age_ms = s.now_ms - s.server.seen_at_ms if s.server else 0
    return _reason("stale_data", age=age_ms) if age_ms > _STALE_AFTER_MS else None


def no_supervisor(s: Situation) -> Reason | None:
    """Nothing is known that could restart this server."""
    return None if s.has_supervisor else _reason("no_supervisor")


def supervisor_unknown(s: Situation) -> Reason | None:
    """The supervisor did not answer: whoever cannot look must not act."""
    if s.server is None or s.server.supervisor.phase is not SupervisorPhase.UNKNOWN:
        return None
    return _reason("supervisor_unknown", detail=s.server.supervisor.detail)


def stopped_by_operator(s: Situation) -> Reason | None:
    """What a person stopped stays stopped."""
    stopped = s.server is not None and s.server.phase is ServerPhase.STOPPED
    return _reason("stopped_by_operator") if stopped else None


def auto_restart(s: Situation) -> Reason | None:
    """Systemd brings it back by itself; two restarts are worse than one."""
    waiting = s.server is not None and s.server.supervisor.phase is SupervisorPhase.AUTO_RESTART
    return _reason("auto_restart") if waiting else None


def starting(s: Situation) -> Reason | None:
    """A server that is coming up is left alone; its start has a deadline of its own."""
    if s.server is None:
        return None
    busy = s.server.supervisor.phase in _UNDER_WAY
    since_ms = s.server.starting_since_ms or (s.now_ms if busy else None)
    return None if since_ms is None else _reason("starting", since=since_ms)


def failed_before(s: Situation) -> Reason | None:
    """After a failure nothing is done to that server until a person says so."""
    failed = (
        r
        for r in s.history
        if r.phase is Phase.FAILED and not r.plan.dry_run and r.since_ms >= s.resumed_at_ms
    )
    last = next(failed, None)
    return _reason("failed_before", id=last.plan.id) if last else None


def cooling_down(s: Situation) -> Reason | None:
    """The effect of the last remediation arrives before the next decision."""
    ended = [r.since_ms for r in _comparable(s) if r.phase not in LIVE_PHASES]
    left_ms = max(ended, default=-s.limits.cooldown_ms) + s.limits.cooldown_ms - s.now_ms
    return _reason("cooling_down", left=left_ms) if ended and left_ms > 0 else None


def budget_spent(s: Situation) -> Reason | None:
    """Successful ones count too: a server that needs a restart every ten minutes needs a person."""
    per_ms = s.limits.budget_per_ms
    done = sum(r.created_at_ms > s.now_ms - per_ms and r.asked_at_ms is not None for r in _comparable(s))
    if s.dry_run:
        done = sum(r.created_at_ms > s.now_ms - per_ms for r in _comparable(s))
    if done < s.limits.budget_count:
        return None
    return _reason("budget_spent", done=done, limit=s.limits.budget_count, per=per_ms)


def _comparable(s: Situation) -> list[Remediation]:
    return [r for r in s.history if r.plan.dry_run == s.dry_run]


BLOCKERS: Final[tuple[Blocker, ...]] = (
    no_policy,
    notify_only,
    no_server,
    under_way,
    rehearsed,
    paused,
    no_supervisor,
    stopped_by_operator,
    just_started,
    clock_jumped,
    stale_data,
    supervisor_unknown,
    auto_restart,
    starting,
    failed_before,
    cooling_down,
    budget_spent,
)


def first_reason(situation: Situation) -> Reason | None:
    """The first blocker's reason; a blocker that raises blocks."""
    for blocker in BLOCKERS:
        try:
            reason = blocker(situation)
        except Exception as error:  # noqa: BLE001 (whatever is wrong with it, it cannot tell, so it blocks)
            return _reason("internal_error", detail=f"{blocker.__name__}: {error!r}")
        if reason:
            return reason
    return None
