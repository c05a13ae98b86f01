"""Reasons not to act, asked in order; the first one wins.

Rule 1: a blocker is a function from a `Situation` to a `Reason` or None.
Rule 2: a blocker that cannot tell, blocks: the unknown is a reason.
Rule 3: a blocker never acts, reads no clock and keeps nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from gpuwatch.records import (
    LIVE_PHASES,
    ActionClass,
    Considered,
    Phase,
    ServerPhase,
    SupervisorPhase,
)
from gpuwatch.remediation.situation import CALLED_OFF, FOREVER_MS, Reason, Situation

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gpuwatch.records import Remediation

_UNDER_WAY: Final = {SupervisorPhase.ACTIVATING, SupervisorPhase.DEACTIVATING}
_STALE_AFTER_MS: Final = 30_000
_UNHELPFUL: Final = {Phase.FAILED, Phase.ROLLED_BACK}
_FAILURES_MOST: Final = 2
_OF_GUESTS: Final = frozenset({"release_cache", "limit_running"})
_LIMITS: Final = frozenset({"limit_admission", "limit_running"})
_OF_SERVING: Final = frozenset({*_OF_GUESTS, *_LIMITS, "reset_prefix_cache", "sleep_wake"})

Blocker = Callable[[Situation], Reason | None]


# -- what anybody may see ------------------------------------------------------------------------------------


def no_policy(s: Situation) -> Reason | None:
    """Nobody said what to do about such alerts."""
    return Reason("no_policy") if s.policy is None else None


def notify_only(s: Situation) -> Reason | None:
    """The policy is to tell people."""
    return Reason("notify_only") if s.policy and not s.policy.steps else None


def no_server(s: Situation) -> Reason | None:
    """The alert names no server that gpuwatch knows."""
    return Reason("no_server") if s.server is None else None


def under_way(s: Situation) -> Reason | None:
    """One live remediation a server."""
    live = [r for r in s.history if r.phase in LIVE_PHASES]
    return Reason.of("under_way", id=live[0].plan.id) if live else None


def rehearsed(s: Situation) -> Reason | None:
    """In a dry run, saying once for each alert what would be done is enough."""
    same = (
        r
        for r in s.history
        if r.plan.dry_run
        and r.plan.alert_labels == s.alert.labels
        and r.created_at_ms >= s.alert.active_at_ms
    )
    return Reason("observe_mode") if s.dry_run and any(same) else None


# -- what people said ----------------------------------------------------------------------------------------


def paused(s: Situation) -> Reason | None:
    """A person said stop."""
    if s.paused_until_ms is None or s.now_ms >= s.paused_until_ms:
        return None
    if s.paused_until_ms >= FOREVER_MS:
        return Reason("paused_open")
    return Reason.of("paused", until=s.paused_until_ms)


def backlog_skipped(s: Situation) -> Reason | None:
    """A person said: go on, but leave alone what was there by then."""
    skipped = s.alert.active_at_ms < s.skip_until_ms
    return Reason.of("backlog_skipped", until=s.skip_until_ms) if skipped else None


def stopped_by_operator(s: Situation) -> Reason | None:
    """What a person stopped stays stopped."""
    stopped = s.server is not None and s.server.phase is ServerPhase.STOPPED
    return Reason("stopped_by_operator") if stopped else None


# -- whether what is seen can be trusted, and the server be touched ------------------------------------------


def no_supervisor(s: Situation) -> Reason | None:
    """Nothing is known that could touch this server."""
    return None if s.has_supervisor else Reason("no_supervisor")


def just_started(s: Situation) -> Reason | None:
    """Gpuwatch began a moment ago: a restart of the host starts the server too, and it needs its time."""
    left_ms = s.started_at_ms + s.limits.just_started_grace_ms - s.now_ms
    return Reason.of("just_started", left=left_ms) if left_ms > 0 else None


def clock_jumped(s: Situation) -> Reason | None:
    """After a jump of the clock, or a sleep of the host, every age is wrong for a while."""
    if s.jumped_at_ms is None:
        return None
    left_ms = s.jumped_at_ms + s.limits.just_started_grace_ms - s.now_ms
    return Reason.of("clock_jumped", left=left_ms) if left_ms > 0 else None


def stale_data(s: Situation) -> Reason | None:
    """Never act on what was true half a minute ago."""
    age_ms = s.now_ms - s.server.seen_at_ms if s.server else 0
    return Reason.of("stale_data", age=age_ms) if age_ms > _STALE_AFTER_MS else None


def supervisor_unknown(s: Situation) -> Reason | None:
    """The supervisor did not answer: whoever cannot look must not act."""
    if s.server is None or s.server.supervisor.phase is not SupervisorPhase.UNKNOWN:
        return None
    return Reason.of("supervisor_unknown", detail=s.server.supervisor.detail)


def auto_restart(s: Situation) -> Reason | None:
    """Systemd brings it back by itself; two restarts are worse than one."""
    waiting = s.server is not None and s.server.supervisor.phase is SupervisorPhase.AUTO_RESTART
    return Reason("auto_restart") if waiting else None


def end_unread(s: Situation) -> Reason | None:
    """What ended it stands in its log, which is read within a second or two: the cure depends on it."""
    start = s.starts[0] if s.starts else None
    if s.server is None or start is None or not s.is_dead:
        return None
    started_at_ms = s.server.supervisor.started_at_ms or 0
    is_open = start.ended_at_ms is None and start.began_at_ms == started_at_ms
    return Reason("end_unread") if is_open or start.began_at_ms < started_at_ms else None


def starting(s: Situation) -> Reason | None:
    """A server that is coming up is left alone; its start has a deadline of its own."""
    if s.server is None:
        return None
    busy = s.server.supervisor.phase in _UNDER_WAY
    since_ms = s.server.starting_since_ms or (s.now_ms if busy else None)
    return None if since_ms is None else Reason.of("starting", since=since_ms)


# -- what single actions need --------------------------------------------------------------------------------


def server_not_serving(s: Situation) -> Reason | None:
    """What is asked of a server that serves cannot be asked of one that does not."""
    is_needed = not _OF_SERVING.isdisjoint(s.intent.actions)
    serves = s.server is not None and s.server.phase is ServerPhase.SERVING
    return Reason("server_not_serving") if is_needed and not serves else None


def no_guest(s: Situation) -> Reason | None:
    """Limits and memory given back are work of the guest in vLLM's processes."""
    if "limit_admission" in s.intent.actions and not s.sight.doors:
        return Reason("no_guest")
    return Reason("no_guest") if not _OF_GUESTS.isdisjoint(s.intent.actions) and not s.sight.guests else None


def load_unknown(s: Situation) -> Reason | None:
    """A limit of half of what runs needs to know what runs."""
    is_needed = not _LIMITS.isdisjoint(s.intent.actions) and s.policy is not None and not s.policy.limit
    return Reason("load_unknown") if is_needed and s.sight.requests_running is None else None


def others_growing(s: Situation) -> Reason | None:
    """Memory that is given back goes to whoever waits for it, and the next long prompt kills the engine."""
    growing = s.sight.others_growing
    if "release_cache" not in s.intent.actions or growing is False:
        return None
    return Reason("others_growing" if growing else "others_unknown")


def no_revisions(s: Situation) -> Reason | None:
    """Arguments are changed only where gpuwatch keeps them, and knows which ones are in force."""
    is_needed = "reconfigure" in s.intent.actions
    return Reason("no_revisions") if is_needed and s.current is None else None


# -- how much was done already -------------------------------------------------------------------------------


def breaker_open(s: Situation) -> Reason | None:
    """Too many remediations, of all servers, did not help; it stays open until a person resumes."""
    ends = sorted(_unhelpful_ends(s, s.all_history), reverse=True)
    count, per_ms = max(s.limits.breaker_count, 1), s.limits.breaker_per_ms
    bursts = zip(ends, ends[count - 1 :], strict=False)
    if not any(newest - oldest <= per_ms for newest, oldest in bursts):
        return None
    return Reason.of("breaker_open", done=len(ends), limit=count, per=per_ms)


def two_failures(s: Situation) -> Reason | None:
    """Twice it did not help: the server stays as it is, and a person must look."""
    ends = _unhelpful_ends(s, _comparable(s))
    return Reason.of("two_failures", done=len(ends)) if len(ends) >= _FAILURES_MOST else None


def budget_spent(s: Situation) -> Reason | None:
    """Successful ones count too: a server that needs a restart every ten minutes needs a person."""
    done = len(_within_budget(s))
    if done < s.limits.budget_count:
        return None
    return Reason.of("budget_spent", done=done, limit=s.limits.budget_count, per=s.limits.budget_per_ms)


def cooling_down(s: Situation) -> Reason | None:
    """The effect of the last remediation arrives before the next decision; the rest doubles with each."""
    ended = [r.since_ms for r in _comparable(s) if r.phase not in LIVE_PHASES]
    if not ended:
        return None
    doublings = min(max(len(_within_budget(s)) - 1, 0), 32)
    rest_ms = min(s.limits.cooldown_ms << doublings, max(s.limits.cooldown_most_ms, s.limits.cooldown_ms))
    left_ms = max(ended) + rest_ms - s.now_ms
    return Reason.of("cooling_down", left=left_ms) if left_ms > 0 else None


def no_cure(s: Situation) -> Reason | None:
    """The failure is known, and what the policy names would not cure it."""
    return s.intent.reason


def _unhelpful_ends(s: Situation, history: Iterable[Remediation]) -> list[int]:
    """When those ended that did not help, since a person last resumed; what a person wanted is left out."""
    return [
        r.since_ms
        for r in history
        if r.phase in _UNHELPFUL
        and not _is_called_off(r)
        and not r.plan.dry_run
        and not r.plan.by
        and r.since_ms >= s.resumed_at_ms
    ]


def _is_called_off(r: Remediation) -> bool:
    """Taken back because somebody said so, or nothing was amiss any more: no cure that failed."""
    return r.phase is Phase.ROLLED_BACK and r.outcome in CALLED_OFF


def _within_budget(s: Situation) -> list[Remediation]:
    since_ms = s.now_ms - s.limits.budget_per_ms
    return [r for r in _comparable(s) if r.created_at_ms > since_ms and (s.dry_run or _touched(r))]


def _touched(r: Remediation) -> bool:
    """Whether it did anything: what is aborted after a deed ends otherwise, or was asked for a step."""
    return r.phase is not Phase.ABORTED or r.asked_at_ms is not None


def _comparable(s: Situation) -> list[Remediation]:
    """Those that cost the server the same: what is lifted again does not use up its restarts."""
    is_reversible = s.intent.kind is ActionClass.REVERSIBLE
    return [
        r
        for r in s.history
        if r.plan.dry_run == s.dry_run and (r.plan.kind is ActionClass.REVERSIBLE) == is_reversible
    ]


BLOCKERS: Final[tuple[Blocker, ...]] = (
    no_policy,
    notify_only,
    no_server,
    under_way,
    rehearsed,
    paused,
    backlog_skipped,
    breaker_open,
    no_supervisor,
    stopped_by_operator,
    just_started,
    clock_jumped,
    stale_data,
    supervisor_unknown,
    auto_restart,
    end_unread,
    starting,
    server_not_serving,
    no_guest,
    load_unknown,
    others_growing,
    no_revisions,
    two_failures,
    budget_spent,
    cooling_down,
    no_cure,
)
OF_WISHES: Final[tuple[Blocker, ...]] = (
    no_server,
    under_way,
    paused,
    no_supervisor,
    stopped_by_operator,
    just_started,
    clock_jumped,
    stale_data,
    supervisor_unknown,
    starting,
    no_cure,
)
"""Those that hold for what a person asks too: the others guard against gpuwatch's own zeal."""
PASSING: Final = frozenset(
    {
        "under_way",
        "paused",
        "paused_open",
        "stopped_by_operator",
        "just_started",
        "clock_jumped",
        "stale_data",
        "supervisor_unknown",
        "starting",
    }
)
"""Codes that are over by themselves, or by a word: a wish that meets one waits."""


def first_reason(
    situation: Situation, blockers: Iterable[Blocker] = BLOCKERS
) -> tuple[Reason | None, tuple[Considered, ...]]:
    """The first blocker's reason, and each that was asked up to it; a blocker that raises blocks."""
    asked: list[Considered] = []
    for blocker in blockers:
        try:
            reason = blocker(situation)
        except Exception as error:  # noqa: BLE001 (whatever is wrong with it, it cannot tell, so it blocks)
            reason = Reason.of("internal_error", detail=f"{blocker.__name__}: {error!r}")
        option = f"blocker:{blocker.__name__}"
        if reason:
            return reason, (*asked, Considered(option=option, code=reason.code, facts=reason.facts))
        asked.append(Considered(option=option, code="passed"))
    return None, tuple(asked)
