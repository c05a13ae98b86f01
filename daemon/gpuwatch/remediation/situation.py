"""What a decision may depend on, and what it comes to; frozen records that decide nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Self

from gpuwatch.records import ActionClass, Mode, Sight, StartOutcome

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gpuwatch.config import Policy, RemediationSettings
    from gpuwatch.records import Alert, Argument, Considered, Remediation, Revision, ServerStart, ServerState

FOREVER_MS: Final = 1 << 53
"""A pause that only a person ends."""
GPUWATCH: Final = "gpuwatch"
"""Who makes a change that no person asked for."""
RESTART: Final = "restart"
RECONFIGURE: Final = "reconfigure"
CALLED_OFF: Final = frozenset({"aborted_by", "alert_over", "stopped_by_operator"})
"""Outcomes of what was taken back because somebody said so, or all was well again: no cure that failed."""
_HOUR_MS: Final = 3_600_000
_UNSEEN: Final = Sight()


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """`config.RemediationSettings` in milliseconds, for the pure side."""

    cooldown_ms: int
    budget_count: int
    budget_per_ms: int
    verify_for_ms: int
    step_within_ms: int
    just_started_grace_ms: int
    drain_within_ms: int = 60_000
    free_within_ms: int = 120_000
    wait_for_memory_ms: int = 300_000
    hold_for_ms: int = 600_000
    good_after_ms: int = 600_000
    cooldown_most_ms: int = _HOUR_MS
    breaker_count: int = 3
    breaker_per_ms: int = 6 * _HOUR_MS
    least_throughput: float = 0.5
    modes: Mapping[ActionClass, Mode] = field(default_factory=dict)

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
            drain_within_ms=settings.drain_within,
            free_within_ms=settings.free_within,
            wait_for_memory_ms=settings.wait_for_memory,
            hold_for_ms=settings.hold_for,
            good_after_ms=settings.good_after,
            cooldown_most_ms=settings.cooldown_most,
            breaker_count=settings.breaker.count,
            breaker_per_ms=settings.breaker.per,
            least_throughput=settings.least_throughput,
            modes=settings.modes,
        )


@dataclass(frozen=True, slots=True)
class Reason:
    """Why not: a code of the catalogue in `notify.wording`, and its figures."""

    code: str
    facts: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, code: str, **facts: object) -> Self:
        """`Reason.of("under_way", id="GW-1")`."""
        return cls(code, {name: str(value) for name, value in facts.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """Other arguments for a server: a set of them, or a revision that is there already.

    `why` is the code of the cure, or a person's sentence; `by` is who wants it.
    """

    arguments: Mapping[str, Argument] | None = None
    revision: int | None = None
    by: str = GPUWATCH
    why: str = ""
    at_ms: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Intent:
    """What the policy comes to here: its actions, after the cure; or the `reason` why none of them helps."""

    actions: tuple[str, ...] = ()
    kind: ActionClass = ActionClass.REVERSIBLE
    mode: Mode = Mode.OBSERVE
    change: Change | None = None
    reason: Reason | None = None
    considered: tuple[Considered, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """All that a decision about one firing alert may depend on.

    `history` holds the remediations of this server, `all_history` those of all servers, live ones included,
    newest first; `starts` and `revisions` are the server's, newest first. `started_at_ms` and `jumped_at_ms`
    are when gpuwatch itself began and the clock jumped: what it knows from before may be wrong.
    `resumed_at_ms` is when a person last said that it may go on; alerts that began before `skip_until_ms`
    are left alone. `wanted` is the revision that a person wanted last. `intent` is `planner.decide`'s.
    """

    alert: Alert
    policy: Policy | None
    server: ServerState | None
    has_supervisor: bool
    history: Sequence[Remediation]
    limits: Limits
    paused_until_ms: int | None
    resumed_at_ms: int
    started_at_ms: int
    jumped_at_ms: int | None
    now_ms: int
    sight: Sight = _UNSEEN
    starts: Sequence[ServerStart] = ()
    revisions: Sequence[Revision] = ()
    wanted: int | None = None
    bounds: Mapping[str, Sequence[float]] = field(default_factory=dict)
    quantised_model: str = ""
    all_history: Sequence[Remediation] = ()
    skip_until_ms: int = 0
    intent: Intent = Intent()

    @property
    def dry_run(self) -> bool:
        """Whether all is decided and nothing touched."""
        return self.intent.mode is Mode.OBSERVE

    @property
    def is_dead(self) -> bool:
        """Whether the server's process has ended, and nothing will start it by itself."""
        return self.server is not None and self.server.supervisor.is_dead

    @property
    def current(self) -> Revision | None:
        """The revision that the next start will read; None where none is kept, or it cannot be told."""
        return self.revision(self.sight.revision)

    @property
    def failed_start(self) -> ServerStart | None:
        """The last start with the present revision, if that failed."""
        number = self.current.number if self.current else None
        same = (start for start in self.starts if start.revision is not None and start.revision == number)
        last = next(same, None)
        return last if last and last.outcome is StartOutcome.FAILED else None

    def revision(self, number: int | None) -> Revision | None:
        """The revision of that number."""
        return next((r for r in self.revisions if r.number == number), None)
