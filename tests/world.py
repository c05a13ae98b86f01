"""A simulated host: GPUs, a vLLM server, its supervisor and two chats, all of which behave, and can fail.

The real cycle, the real rules and the real databases in a folder run on it. One seed decides everything
that happens. After every tick the invariants are checked: what gpuwatch may never do, whatever comes.

A kill loses what was not on disk. What gpuwatch then cannot know, and only that, it may do or tell again;
what anybody can see of a server, that it serves, starts, is busy or was stopped by hand, it must heed still.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import msgspec
from tests.fake_nvml import FakeNvml

from gpuwatch import assembly, config, notify, remediation, rules
from gpuwatch.clock import ManualClock
from gpuwatch.config.size import Size
from gpuwatch.cycle import Cycle, Parts
from gpuwatch.errors import NotifyError, ServerError, SourceError, StoreError
from gpuwatch.records import (
    LIVE_PHASES,
    AlertState,
    Labels,
    Phase,
    Remediation,
    Sample,
    Step,
    SupervisorPhase,
    SupervisorState,
    Transition,
)
from gpuwatch.servers.phase import UNANSWERED_MS
from gpuwatch.sources.nvml import NvmlSource
from gpuwatch.store import Audit, Changes, ReadStore, leave_wish, open_read_only

SECOND, MINUTE, HOUR = 1000, 60_000, 3_600_000
START_MS = 1_800_000_000_000
GIB = 1 << 30
SERVER = "qwen"
SHM = Path("/dev/shm")  # there a sync costs nothing
ALL = 100_000
UNLIMITED_PAGES = 1 << 30
FULL = 1 << 60  # more than any filesystem has free
TOLD = {AlertState.FIRING, AlertState.RESOLVED}


class Killed(BaseException):
    """The daemon died here, as by kill -9."""


@dataclass
class SimServer:
    """A vLLM server: starts slowly, serves, dies with exit status 0, hangs, answers late."""

    world: World
    startup_ms: int = 20 * SECOND
    started_at_ms: int | None = None
    died_at_ms: int | None = None
    busy_since_ms: int | None = None  # alive and well, and too busy to answer /health in time
    wedged: bool = False  # /health answers 503
    failing_starts: int = 0  # so many next starts die half-way
    stopped_by_operator: bool = False
    running: int = 0

    @property
    def busy(self) -> bool:
        return self.busy_since_ms is not None

    @property
    def alive(self) -> bool:
        now_ms = self.world.now_ms
        return self.started_at_ms is not None and (self.died_at_ms is None or now_ms < self.died_at_ms)

    @property
    def up(self) -> bool:
        return self.alive and self.world.now_ms - self.started_at_ms >= self.startup_ms

    @property
    def well(self) -> bool:
        return self.up and not self.wedged

    def start(self) -> None:
        self.started_at_ms, self.died_at_ms = self.world.now_ms, None
        self.busy_since_ms = None
        self.wedged = self.stopped_by_operator = False
        if self.failing_starts:
            self.failing_starts -= 1
            self.died_at_ms = self.world.now_ms + self.startup_ms // 2

    def die(self) -> None:
        if self.alive:
            self.died_at_ms = self.world.now_ms


@dataclass
class SimSupervisor:
    """Behaves as systemd does: a restart stops first, takes its time, and comes once however often asked."""

    world: World
    server: SimServer
    stop_takes_ms: int = 2 * SECOND
    unreachable: bool = False
    forbids: bool = False
    stopping_until_ms: int | None = None
    restarts: list[int] = field(default_factory=list)

    def observe(self, now_ms: int) -> SupervisorState:
        if self.unreachable:
            raise ServerError("supervisor: no answer; is D-Bus up?")
        self._go_on(now_ms)
        server = self.server
        if self.stopping_until_ms is not None:
            phase = SupervisorPhase.DEACTIVATING
        elif server.alive:
            phase = SupervisorPhase.ACTIVE
        else:
            phase = SupervisorPhase.INACTIVE
        return SupervisorState(
            phase=phase,
            pid=4242 if server.alive else None,
            started_at_ms=server.started_at_ms,
            stop_asked=server.stopped_by_operator,
            detail="exit status 0" if phase is SupervisorPhase.INACTIVE else "",
        )

    def do(self, step: Step, *, since_ms: int, now_ms: int) -> None:
        self.world.maybe_kill("before the deed")
        if self.unreachable:
            raise ServerError("supervisor: no answer; is D-Bus up?")
        if self.forbids:
            raise ServerError("supervisor: access denied; install the polkit rule", permanent=True)
        self._go_on(now_ms)
        started_since = self.server.started_at_ms is not None and self.server.started_at_ms >= since_ms
        if self.stopping_until_ms is None and not started_since:
            self.world.check_restart_is_due(now_ms)
            self.restarts.append(now_ms)
            self.stopping_until_ms = now_ms + (self.stop_takes_ms if self.server.alive else 0)
            self._go_on(now_ms)
        self.world.maybe_kill("after the deed")

    def _go_on(self, now_ms: int) -> None:
        if self.stopping_until_ms is not None and now_ms >= self.stopping_until_ms:
            self.stopping_until_ms = None
            self.server.start()


@dataclass
class SimChat:
    """A receiver that is down, rate limited or gone when told to be; keeps what it got."""

    world: World
    name: str
    pace: notify.Pace = field(default_factory=lambda: notify.Pace(burst=50, per_ms=1000))
    down: bool = False
    gone: bool = False
    limited_until_ms: int = 0
    received: list[notify.Message] = field(default_factory=list)

    def send(self, message: notify.Message) -> None:
        self.world.maybe_kill("before sending")
        if self.gone:
            raise NotifyError(f"{self.name}: HTTP 404", broken=True)
        if self.down:
            raise NotifyError(f"{self.name}: connection refused")
        if self.world.now_ms < self.limited_until_ms:
            raise NotifyError(
                f"{self.name}: HTTP 429", retry_after_ms=self.limited_until_ms - self.world.now_ms
            )
        self.received.append(message)
        self.world.maybe_kill("after sending")


@dataclass
class SimHealth:
    world: World
    name: str = f"health:{SERVER}"
    interval_ms: int = 1000
    hangs: bool = False

    def read(self, now_ms: int) -> list[Sample]:
        server = self.world.server
        if self.hangs:
            raise SourceError("health: the reader hangs")
        timeout = server.up and server.busy
        samples = [Sample(Labels.of("server_health_timeout", server=SERVER), now_ms, float(timeout))]
        if not timeout:
            samples.append(Sample(Labels.of("server_health_ok", server=SERVER), now_ms, float(server.well)))
        return samples


@dataclass
class SimMetrics:
    world: World
    name: str = f"metrics:{SERVER}"
    interval_ms: int = 2000

    def read(self, now_ms: int) -> list[Sample]:
        server = self.world.server
        if not server.up or server.wedged:
            raise SourceError("metrics: connection refused")
        figures = {
            "vllm:num_requests_running": float(server.running),
            "vllm:num_requests_waiting": 0.0,
            "vllm:kv_cache_usage_perc": 0.2,
            "vllm:num_preemptions_total": 0.0,
        }
        return [Sample(Labels.of(name, server=SERVER), now_ms, value) for name, value in figures.items()]


@dataclass
class Known:
    """What gpuwatch knows, or must know again after a restart, followed from outside.

    `forget` is told what a kill took before it was on disk, and that alone is taken off.
    """

    remediations: dict[str, Remediation] = field(default_factory=dict)
    transitions: set[tuple[int, str, str]] = field(default_factory=set)
    wishes: dict[str, str] = field(default_factory=dict)
    heard: dict[str, str] = field(default_factory=dict)  # the wishes as a tick has found them
    forgotten_restarts: set[int] = field(default_factory=set)
    forgotten_ticks: set[int] = field(default_factory=set)

    def forget(self, ticks: set[int], restarts: set[int], saved: list[Remediation]) -> None:
        self.forgotten_ticks |= ticks
        self.forgotten_restarts |= restarts
        self.transitions = {t for t in self.transitions if t[0] not in ticks}
        self.remediations = {r.plan.id: r for r in saved}


class World:
    """Everything, and the switches. `tick()` is one second; to be closed at the end.

    Hours are sealed, by a process each, only where `seals`.
    """

    def __init__(
        self,
        seed: int = 0,
        rule_groups: tuple[rules.CompiledGroup, ...] | None = None,
        *,
        start_ms: int = START_MS,
        seals: bool = False,
        **remediation,
    ) -> None:
        self._temporary = tempfile.TemporaryDirectory(dir=SHM if SHM.is_dir() else None)
        self._mount = Path(self._temporary.name) / "mount"
        self._away = Path(self._temporary.name) / "away"
        self.folder = self._mount / "gpuwatch"
        self.random = random.Random(seed)
        self.clock = ManualClock(start_ms)
        self.settings = config.Settings(
            host="sim",
            state_dir=self.folder,
            store=config.StoreSettings(min_free=Size(0)),
            servers=[config.ServerSettings(name=SERVER, start_deadline=config.Duration(60 * SECOND))],
            remediation=_remediation_settings(**remediation),
        )
        self.groups = shipped_groups() if rule_groups is None else rule_groups
        self.seals = seals
        self.nvml = FakeNvml()
        self.server = SimServer(self)
        self.supervisor = SimSupervisor(self, self.server)
        self.slack, self.ding = SimChat(self, "slack"), SimChat(self, "ding")
        self.health, self.metrics = SimHealth(self), SimMetrics(self)
        self.known = Known()
        self.kill_at: str | None = None
        self.down_until_ms: int | None = None
        self.is_full = False
        self.booted_at_ms = self.health_hangs_ms = 0
        self.jumped_at_ms = 0
        self._unsaved_since_ms: int | None = None
        self.boot()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self.down_until_ms is None:
            self._drop_memory()
        self._temporary.cleanup()

    @property
    def now_ms(self) -> int:
        return self.clock.now_ms()

    def boot(self) -> None:
        """Start the daemon on whatever is on disk; StoreError if there is none."""
        self.booted_at_ms = self.now_ms
        self.store = assembly.open_store(self.settings, self.groups, self.now_ms)
        self.known.heard = dict(self.known.wishes)
        self.store.reload(self.now_ms)
        self.cycle = self._cycle()
        self.due_ms: dict[str, int] = {}

    def _cycle(self) -> Cycle:
        return Cycle(
            Parts(
                settings=self.settings,
                store=self.store,
                sources=[NvmlSource(self.nvml, names=self.nvml), self.health, self.metrics],
                groups=self.groups,
                supervisors={SERVER: self.supervisor},
                notifiers={"slack": self.slack, "ding": self.ding},
                started_at_ms=self.booted_at_ms,
                jitter=self.random.random,
            )
        )

    def reload(self, rule_groups: tuple[rules.CompiledGroup, ...]) -> None:
        """The operator edits the rules and reloads."""
        self.groups = rule_groups
        old, self.cycle = self.cycle, self._cycle()
        self.cycle.take_over(old)

    def view(self) -> ReadStore:
        """What is on disk, as the command line sees it; StoreError."""
        return open_read_only(self.folder)

    def configure(self, **remediation) -> None:
        """The operator edits the settings; takes effect at the next boot or reload."""
        self.settings = msgspec.structs.replace(
            self.settings, remediation=_remediation_settings(**remediation)
        )

    def tick(self) -> None:
        """One second goes by; the daemon runs if it is up; then the invariants hold."""
        self.clock.advance(SECOND)
        self.health_hangs_ms = self.health_hangs_ms + SECOND if self.health.hangs else 0
        self.supervisor._go_on(self.now_ms)
        if self.down_until_ms is not None and not self._is_up_again():
            return
        if self.is_full:
            self._press()
        try:
            self._run_jobs()
        except Killed:
            self.check()
            self._die([1, 2, 5, 30])
            return
        self.check()

    def run_for(self, ms: int) -> None:
        for _ in range(ms // SECOND):
            self.tick()

    def _is_up_again(self) -> bool:
        if self.now_ms < self.down_until_ms:
            return False
        try:
            self.boot()
        except StoreError:  # systemd tries again
            self.down_until_ms = self.now_ms + 5 * SECOND
            return False
        self.down_until_ms = None
        return True

    def _run_jobs(self) -> None:
        for job in self.cycle.jobs():
            if self.now_ms >= self.due_ms.get(job.name, 0) and (self.seals or job.name != "seal"):
                self.due_ms[job.name] = self.now_ms + job.every_ms
                self.cycle.guarded(job, self.now_ms)
        if not self._unsaved():
            self._unsaved_since_ms = None
        elif self._unsaved_since_ms is None:
            self._unsaved_since_ms = self.now_ms

    def _unsaved(self) -> list[Changes]:
        return self.store._writer._changes

    def _die(self, down_s: list[int]) -> None:
        """As by kill -9: what is in memory alone is gone."""
        self.down_until_ms = self.now_ms + self.random.choice(down_s) * SECOND
        lost = list(self._unsaved())
        since_ms = self.now_ms if self._unsaved_since_ms is None else self._unsaved_since_ms
        self._unsaved_since_ms = None
        self._drop_memory()
        if not lost:
            return
        with open_read_only(self._away / "gpuwatch" if self.is_gone else self.folder) as view:
            self.known.forget(
                ticks={t.at_ms for changes in lost for t in changes.transitions},
                restarts={at_ms for at_ms in self.supervisor.restarts if at_ms >= since_ms},
                saved=view.remediations(limit=ALL),
            )

    def _drop_memory(self) -> None:
        writer, self.store._writer = self.store._writer, None
        writer.disk.close()
        self.store.close()

    # -- faults ----------------------------------------------------------------------------------

    def kill_daemon(self, where: str | None = None) -> None:
        """Now, or at the named point the next time it is passed."""
        if where is not None:
            self.kill_at = where
        elif self.down_until_ms is None:
            self._die([1, 3, 20])

    def maybe_kill(self, where: str) -> None:
        if self.kill_at == where:
            self.kill_at = None
            raise Killed

    def jump(self, ms: int) -> None:
        """The host slept, or its clock was set."""
        self.clock.advance(ms)
        if ms > MINUTE:
            self.jumped_at_ms = self.now_ms

    def pause(self, until_ms: int | None = None) -> None:
        self.wish(remediation.wishes.pause(until_ms or remediation.FOREVER_MS))

    def resume(self) -> None:
        self.wish(remediation.wishes.resume(self.now_ms))

    def wish(self, settings) -> None:
        """What the command line does, with or without a daemon; without a disk it says no."""
        audit = Audit(at_ms=self.now_ms, who="eve", what="wish")
        with contextlib.suppress(StoreError):
            leave_wish(self.folder, settings, audit=audit)
            for name, value in settings.items():
                self.known.wishes.pop(name, None)
                if value is not None:
                    self.known.wishes[name] = value

    def full_disk(self, full: bool) -> None:
        """A real SQLITE_FULL: no file of the daemon may grow by a page more, and there is no ballast."""
        self.is_full = full
        self._press()

    def _press(self) -> None:
        """Limit the files as the disk is; again and again, because some are opened anew."""
        if self.down_until_ms is not None or self.is_gone:
            return
        disk = self.store._writer.disk
        disk.settings = msgspec.structs.replace(
            self.settings.store, min_free=FULL if self.is_full else Size(0)
        )
        if disk.metrics is not None:
            disk._limit(disk.metrics)
        if disk.state is not None:
            with disk.state._database.reading("see how large it is") as connection:
                pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
                pages = pages if self.is_full else UNLIMITED_PAGES
                connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
        if self.is_full:
            disk._ballast.drop()

    @property
    def is_gone(self) -> bool:
        return self._away.exists()

    def gone_disk(self, gone: bool) -> None:
        """The filesystem of the folder goes away with all that is open on it, or comes back."""
        if gone and not self.is_gone:
            self._mount.rename(self._away)
            self._mount.touch()  # no folder can be made in its place
        elif not gone and self.is_gone:
            self._mount.unlink()
            self._away.rename(self._mount)
            self._press()

    # -- what may never happen --------------------------------------------------------------------

    def check_restart_is_due(self, now_ms: int) -> None:
        """Asked at the moment of the deed: a wrong restart is worse than a missed one."""
        server = self.server
        silent_ms = now_ms - server.busy_since_ms if server.up and server.busy else UNANSWERED_MS
        assert silent_ms >= UNANSWERED_MS, "restarted a server that was merely busy"
        assert not server.stopped_by_operator, "restarted what an operator had stopped"
        assert not (server.alive and not server.up), "restarted a server that was starting"
        assert server.busy or not server.well, "restarted a server that was well"
        assert now_ms >= _paused_until_ms(self.known.wishes), "acted while paused"
        assert self.settings.remediation.mode != config.RemediationSettings().mode, "acted in observe mode"
        budget = self.settings.remediation.budget
        known = set(self.supervisor.restarts) - self.known.forgotten_restarts
        recent = [at_ms for at_ms in known if at_ms > now_ms - budget.per]
        assert len(recent) < budget.count, f"more than {budget.count} restarts in {budget.per} ms"

    def check_begun(self, r: Remediation) -> None:
        """What must hold when gpuwatch decides to act, seen from outside."""
        limits, server = self.settings.remediation, self.server
        past = [p for p in self.known.remediations.values() if p.plan.id != r.plan.id and not p.plan.dry_run]
        ended = [p.since_ms for p in past if p.phase not in LIVE_PHASES]
        assert r.created_at_ms - max(ended, default=0) >= limits.cooldown, (
            "began before the cooldown was over"
        )
        assert r.created_at_ms >= _paused_until_ms(self.known.heard), "began while paused"
        resumed_ms = int(self.known.wishes.get("resumed_at_ms", "0"))
        failed = [p for p in past if p.phase is Phase.FAILED and p.since_ms >= resumed_ms]
        assert not failed, "began although one had failed and nobody had looked"
        recent = [p for p in past if p.asked_at_ms and p.created_at_ms > r.created_at_ms - limits.budget.per]
        assert len(recent) < limits.budget.count, "began although the budget was spent"
        assert r.created_at_ms - self.booted_at_ms >= limits.just_started_grace, "began when just started"
        assert r.created_at_ms - self.jumped_at_ms >= limits.just_started_grace, "began after a jump of time"
        assert not self.supervisor.unreachable, "began without knowing what the supervisor sees"
        assert not self.health.hangs or self.health_hangs_ms < 30 * SECOND, "began on old news"
        is_coming_up = server.alive and not server.up and self.supervisor.restarts[-1:] != [r.created_at_ms]
        assert not is_coming_up, "began while the server was starting"

    def check(self) -> None:
        live = self.store.live_remediations()
        assert len({r.plan.server for r in live}) == len(live), "two live remediations on one server"
        for r in self.store.remediations(limit=50):
            before = self.known.remediations.get(r.plan.id)
            if before is None and not r.plan.dry_run:
                self.check_begun(r)
            if before is not None and before.phase not in LIVE_PHASES:
                assert before.phase is r.phase, f"{r.plan.id} left its end {before.phase} for {r.phase}"
            assert not r.plan.dry_run or r.phase is Phase.REHEARSED, "a dry run went further than words"
            self.known.remediations[r.plan.id] = r
        self.known.transitions |= {told(t) for t in self.cycle.last_report.transitions if t.now in TOLD}
        self.known.heard = dict(self.known.wishes)
        assert self.cycle.troubles.internal_errors == 0, self.cycle.troubles.present

    def check_all_was_told(self) -> None:
        """At the end: every beginning and end of an alert reached each chat, in order."""
        with self.view() as view:
            happened = [told(t) for _, t in view.transitions(limit=ALL) if t.now in TOLD]
        for chat in (self.slack, self.ding):
            messages = [(m.at_ms, m.alert, m.state) for m in _once(chat.received) if m.kind == "alert"]
            kept = [each for each in messages if each[0] not in self.known.forgotten_ticks]
            assert kept == happened, f"{chat.name} was told {kept}, happened {happened}"

    def check_all_was_saved(self) -> None:
        """At the end: the disk has what the memory has, and all that ever happened."""
        assert not any(self.store.faults().values()), self.store.faults()
        assert not self._unsaved()
        with self.view() as view:
            happened = {told(t) for _, t in view.transitions(limit=ALL)}
            for name in ("active_alerts", "live_remediations", "refusals", "receivers", "settings"):
                held, saved = getattr(self.store, name)(), getattr(view, name)()
                assert saved == held, f"{name}: saved is {saved}, held {held}"
            saved = {r.plan.id: r for r in view.remediations(limit=ALL)}
        assert self.known.transitions <= happened, sorted(self.known.transitions - happened)
        assert saved == self.known.remediations

    def heal(self) -> None:
        """End every fault, so that what is owed can be paid."""
        self.slack.down = self.slack.gone = self.ding.down = self.ding.gone = False
        self.slack.limited_until_ms = self.ding.limited_until_ms = 0
        self.supervisor.unreachable = self.supervisor.forbids = self.health.hangs = False
        self.kill_at = None
        self.full_disk(False)
        self.gone_disk(False)


def told(t: Transition) -> tuple[int, str, str]:
    return t.at_ms, t.alert.rule, str(t.now)


def _paused_until_ms(wishes: Mapping[str, str]) -> int:
    return int(wishes.get("paused_until_ms", "0"))


def _once(messages: list[notify.Message]) -> list[notify.Message]:
    """A message sent twice around a kill is the same message."""
    seen, once = set(), []
    for message in messages:
        key = (message.id, message.kind, message.state, message.at_ms)
        if key not in seen:
            seen.add(key)
            once.append(message)
    return once


def _remediation_settings(**given) -> config.RemediationSettings:
    durations = {k: config.Duration(v) if isinstance(v, int) else v for k, v in given.items()}
    return config.RemediationSettings(**durations)


_cache: dict[str, tuple[rules.CompiledGroup, ...]] = {}


def shipped_groups() -> tuple[rules.CompiledGroup, ...]:
    """The rules that gpuwatch ships, compiled once."""
    if "shipped" not in _cache:
        folder = Path(__file__).parent.parent / "rules"
        _cache["shipped"] = rules.compile_groups(config.load_rules(sorted(folder.glob("*.yaml"))))
    return _cache["shipped"]
