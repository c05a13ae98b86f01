"""What gpuwatch may never do, whatever comes: asked at each deed, each second, and at a story's end.

A kill loses what was not on disk. What gpuwatch then cannot know, and only that, it may do or tell again;
what anybody can see of a server, that it serves, starts, is busy or was stopped by hand, it must heed still.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.sim_vllm import SECOND, SERVER

from gpuwatch import config, notify
from gpuwatch.records import (
    LIVE_PHASES,
    ActionClass,
    AlertState,
    Mode,
    Phase,
    Remediation,
    StartOutcome,
    Step,
    Transition,
)
from gpuwatch.servers.phase import UNANSWERED_MS

if TYPE_CHECKING:
    from tests.world import World

ALL = 100_000
TOLD = {AlertState.FIRING, AlertState.RESOLVED}
HARMLESS = {"capture", "check", "await_memory", "canary"}  # the server does not notice
LAPSED_MS = 60 * SECOND
SAME_AGAIN = {"kv_cache_too_small", "no_memory_for_cache", "auto_fit_failed", "bad_argument"}
IS_DOWN = {"VLLMDown", "VLLMStartFailed"}
PAGED = {Phase.FAILED: "failed", Phase.ROLLED_BACK: "rolled_back"}


@dataclass
class Known:
    """What gpuwatch knows, or must know again after a restart, followed from outside.

    `forget` is told what a kill took before it was on disk, and that alone is taken off.
    """

    remediations: dict[str, Remediation] = field(default_factory=dict)
    transitions: set[tuple[int, str, str]] = field(default_factory=set)
    wishes: dict[str, str] = field(default_factory=dict)
    heard: dict[str, str] = field(default_factory=dict)  # the wishes as a tick has found them
    restarts: dict[str, tuple[int, int]] = field(default_factory=dict)  # by plan: done when, planned when
    forgotten_restarts: set[int] = field(default_factory=set)
    forgotten_ticks: set[int] = field(default_factory=set)

    def forget(self, ticks: set[int], since_ms: int, saved: list[Remediation]) -> None:
        self.forgotten_ticks |= ticks
        lost = {plan for plan, (at_ms, _) in self.restarts.items() if at_ms >= since_ms}
        self.forgotten_restarts |= {self.restarts.pop(plan)[0] for plan in lost}
        self.transitions = {t for t in self.transitions if t[0] not in ticks}
        self.remediations = {r.plan.id: r for r in saved}


class Invariants:
    """Looks at a world from outside."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.known = Known()
        self._justified: set[str] = set()  # the plans whose first deed was due
        self._lived: set[str] = set()  # the plans in whose time the server had a process, as far as was seen
        self._unheld_since_ms: int | None = None

    # -- at the moment of a deed: a wrong one is worse than a missed one -----------------------------

    def deed(self, step: Step, plan_id: str, now_ms: int) -> None:
        live = [r for r in self.world.store.live_remediations() if r.plan.server == SERVER]
        assert [r.plan.id for r in live] == [plan_id], f"{step.action} of {plan_id} while {live} live"
        r = live[0]
        assert not r.plan.dry_run, "a dry run touched the server"
        if step.action == "check":
            self._check_bounds()
        if step.action in HARMLESS:
            return
        undoes = r.phase is Phase.ROLLING_BACK
        assert undoes or now_ms >= paused_until_ms(self.known.wishes), f"{step.action} while paused"
        is_wished = bool(r.plan.by)
        assert is_wished or self._may_act(r), f"{step.action} in observe mode"
        if r.plan.id not in self._justified:
            self._check_is_due(r, now_ms)
            self._justified.add(r.plan.id)
        if step.action in {"stop", "start"}:
            assert not self.world.server.stopped_by_operator, "touched what an operator had stopped"
        if step.action == "start" and not undoes:
            self._check_may_start(r)
        if step.action == "start" and undoes:
            assert plan_id in self._lived, (
                f"{plan_id}: started a dead server to take back that nothing was started"
            )

    def restarted(self, plan_id: str, now_ms: int) -> None:
        """A stop or a start of this plan was taken by the supervisor; a restart is one, with its undo."""
        if plan_id in self.known.restarts:
            return
        r = next(r for r in self.world.store.live_remediations() if r.plan.id == plan_id)
        budget = self.world.settings.remediation.budget
        before = [at_ms for _, at_ms in self.known.restarts.values() if at_ms > r.created_at_ms - budget.per]
        assert r.plan.by or len(before) < budget.count, (
            f"more than {budget.count} restarts in {budget.per} ms"
        )
        self.known.restarts[plan_id] = now_ms, r.created_at_ms
        self.world.supervisor.restarts.append(now_ms)

    def _may_act(self, r: Remediation) -> bool:
        policies = [p for p in self.world.settings.policies if p.name == r.plan.policy]
        settings = self.world.settings.remediation
        modes = {settings.mode, *settings.modes.values(), *(p.mode for p in policies)} - {None}
        return modes != {Mode.OBSERVE}

    def _check_is_due(self, r: Remediation, now_ms: int) -> None:
        server = self.world.server
        fires = any(
            (a.rule, a.labels) == (r.plan.alert, r.plan.alert_labels) and a.state is AlertState.FIRING
            for a in self.world.store.active_alerts()
        )
        is_due = r.plan.by or fires or not server.works
        assert is_due, f"{r.plan.id}: touched a server without a reason"
        if r.plan.kind is ActionClass.REVERSIBLE:
            return
        assert not server.stopped_by_operator, "restarted what an operator had stopped"
        if r.plan.by:
            return
        assert not (server.alive and not server.up), "restarted a server that was starting"
        if r.plan.alert not in IS_DOWN:
            return
        silent_ms = now_ms - server.busy_since_ms if server.well and server.busy else UNANSWERED_MS
        assert silent_ms >= UNANSWERED_MS, "restarted a server that was merely busy"
        assert server.busy or not server.well, "restarted a server that was well"

    def _check_may_start(self, r: Remediation) -> None:
        """A set of arguments that is known to fail is not started again, but for a person."""
        if r.plan.by:
            return
        given = {name: str(value) for name, value in self.world.next_arguments().items()}
        failed = [
            s.failure
            for s in self.world.store.starts(SERVER, limit=50)
            if s.outcome is StartOutcome.FAILED and s.failure in SAME_AGAIN and dict(s.arguments) == given
        ]
        assert not failed, f"{r.plan.id}: started again what had failed: {failed[0]} with {given}"

    # -- after each second -------------------------------------------------------------------------

    def check(self, *, killed: bool = False) -> None:
        world, report = self.world, self.world.cycle.last_report
        live = world.store.live_remediations() if killed or report.remediations else []
        assert len({r.plan.server for r in live}) == len(live), "two live remediations on one server"
        # No tick changes more of them, and none changes without being reported, unless it was killed.
        for r in world.store.remediations(limit=6) if killed or report.remediations else ():
            before = self.known.remediations.get(r.plan.id)
            if before == r:
                continue
            if before is None and not r.plan.dry_run:
                self._check_begun(r)
            if before is not None and before.phase not in LIVE_PHASES:
                assert before.phase is r.phase, f"{r.plan.id} left its end {before.phase} for {r.phase}"
            elif r.phase not in LIVE_PHASES:
                self._check_ended(r)
            assert not r.plan.dry_run or r.phase is Phase.REHEARSED, "a dry run went further than words"
            self.known.remediations[r.plan.id] = r
        if self.world.server.alive or self.world.supervisor.unreachable:
            self._lived |= {r.plan.id for r in live}
        self._check_limits(live)
        self.known.transitions |= {told(t) for t in report.transitions if t.now in TOLD}
        self.known.heard = dict(self.known.wishes)
        assert world.cycle.troubles.internal_errors == 0, world.cycle.troubles.present

    def _check_begun(self, r: Remediation) -> None:
        """What must hold when gpuwatch decides to act, seen from outside."""
        world, limits = self.world, self.world.settings.remediation
        assert r.created_at_ms >= paused_until_ms(self.known.heard), "began while paused"
        assert not world.supervisor.unreachable, "began without knowing what the supervisor sees"
        assert not world.health.hangs or world.health_hangs_ms < 30 * SECOND, "began on old news"
        if r.plan.by:
            return
        past = [p for p in self.known.remediations.values() if p.plan.id != r.plan.id and not p.plan.dry_run]
        assert r.created_at_ms - world.booted_at_ms >= limits.just_started_grace, "began when just started"
        assert r.created_at_ms - world.jumped_at_ms >= limits.just_started_grace, "began after a jump of time"
        if r.plan.kind is ActionClass.REVERSIBLE:
            return
        past = [p for p in past if p.plan.kind is not ActionClass.REVERSIBLE]
        ended = [p.since_ms for p in past if p.phase not in LIVE_PHASES]
        assert r.created_at_ms - max(ended, default=0) >= limits.cooldown, (
            "began before the cooldown was over"
        )
        recent = [p for p in past if p.asked_at_ms and p.created_at_ms > r.created_at_ms - limits.budget.per]
        unwished = [p for p in recent if not p.plan.by]
        assert len(unwished) < limits.budget.count, "began although the budget was spent"
        resumed_ms = int(self.known.wishes.get("resumed_at_ms", "0"))
        own = [p for p in past if not p.plan.by and p.since_ms >= resumed_ms]
        failed = [p for p in own if p.phase is Phase.FAILED]
        assert len(failed) < 2, "began although two had failed and nobody had looked"
        server = world.server
        is_coming_up = server.alive and not server.up and world.supervisor.restarts[-1:] != [r.created_at_ms]
        assert not is_coming_up, "began while the server was starting"

    def _check_ended(self, r: Remediation) -> None:
        """In which state it leaves the server."""
        world, server, plan = self.world, self.world.server, r.plan
        if r.phase is Phase.ROLLED_BACK:
            assert server.up or world.health.hangs, f"{plan.id} rolled back to a server that does not serve"
        if plan.kind is not ActionClass.RECONFIGURE or plan.dry_run or r.phase is Phase.REHEARSED:
            return
        current = world.revisions.current()
        assert current in {plan.before, plan.after}, f"{plan.id} ended at revision {current}"
        wanted = {Phase.SUCCEEDED: plan.after, Phase.ROLLED_BACK: plan.before}.get(r.phase, current)
        assert current == wanted, f"{plan.id} {r.phase} at revision {current}, not {wanted}"
        if server.alive and r.phase in {Phase.SUCCEEDED, Phase.ROLLED_BACK}:
            assert server.revision == wanted, f"{plan.id} {r.phase}: revision {server.revision} serves"

    def _check_limits(self, live: list[Remediation]) -> None:
        server, now_ms = self.world.server, self.world.now_ms
        is_held = any(server.limit(name) is not None for name in ("admission", "running"))
        if live or not is_held:
            self._unheld_since_ms = None
            return
        self._unheld_since_ms = self._unheld_since_ms or now_ms
        assert now_ms - self._unheld_since_ms <= LAPSED_MS, "a limit outlived its remediation"

    def _check_bounds(self) -> None:
        """What gpuwatch itself changed lies within the operator's bounds."""
        bounds = self.world.settings.servers[0].bounds
        rows = {revision.number: revision for revision in self.world.store.revisions(SERVER)}
        for revision in rows.values():
            if revision.by != "gpuwatch" or revision.parent not in rows:
                continue
            before = rows[revision.parent].arguments
            for name, value in revision.arguments.items():
                if isinstance(value, int | float) and value != before.get(name):
                    least, most = bounds[name]
                    assert least <= value <= most, f"revision {revision.number}: {name} {value} out of bounds"

    # -- at the end of a story ---------------------------------------------------------------------

    def all_was_told(self) -> None:
        """Every beginning and end of an alert reached each chat, in order, and each failure a person."""
        with self.world.view() as view:
            happened = [told(t) for _, t in view.transitions(limit=ALL) if t.now in TOLD]
            failed = {(r.plan.id, PAGED[r.phase]) for r in view.remediations(limit=ALL) if r.phase in PAGED}
        for chat in (self.world.slack, self.world.ding):
            messages = [(m.at_ms, m.alert, m.state) for m in once(chat.received) if m.kind == "alert"]
            kept = [each for each in messages if each[0] not in self.known.forgotten_ticks]
            assert kept == happened, f"{chat.name} was told {kept}, happened {happened}"
            paged = {(m.id, m.state) for m in chat.received if m.kind == "remediation"}
            assert failed <= paged, f"{chat.name} was not told of {failed - paged}"

    def all_was_saved(self) -> None:
        """The disk has what the memory has, and all that ever happened."""
        store = self.world.store
        assert not any(store.faults().values()), store.faults()
        assert not self.world.unsaved()
        with self.world.view() as view:
            happened = {told(t) for _, t in view.transitions(limit=ALL)}
            for name in ("active_alerts", "live_remediations", "refusals", "receivers", "settings"):
                held, saved = getattr(store, name)(), getattr(view, name)()
                assert saved == held, f"{name}: saved is {saved}, held {held}"
            saved = {r.plan.id: r for r in view.remediations(limit=ALL)}
        assert self.known.transitions <= happened, sorted(self.known.transitions - happened)
        assert saved == self.known.remediations


def told(t: Transition) -> tuple[int, str, str]:
    return t.at_ms, t.alert.rule, str(t.now)


def paused_until_ms(wishes: Mapping[str, str]) -> int:
    return int(wishes.get("paused_until_ms", "0"))


def once(messages: list[notify.Message]) -> list[notify.Message]:
    """A message sent twice around a kill is the same message."""
    seen, found = set(), []
    for message in messages:
        key = (message.id, message.kind, message.state, message.at_ms)
        if key not in seen:
            seen.add(key)
            found.append(message)
    return found


def remediation_settings(**given) -> config.RemediationSettings:
    durations = {k: config.Duration(v) if isinstance(v, int) else v for k, v in given.items()}
    return config.RemediationSettings(**durations)
