"""A simulated host: a GPU, a vLLM server, its supervisor and two chats, all of which behave, and can fail.

The real cycle, the real rules and the real databases in a folder run on it; `sim_vllm` is the server and
`sim_hands` what moves it. One seed decides everything that happens. After every tick the `invariants` are
checked.
"""

from __future__ import annotations

import contextlib
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import msgspec
from tests.fake_nvml import FakeNvml
from tests.invariants import ALL, Invariants, Known, remediation_settings
from tests.sim_hands import SimHands, SimSupervisor
from tests.sim_vllm import (
    SERVER,
    SimGpu,
    SimGuests,
    SimHealth,
    SimLog,
    SimMetrics,
    SimProbe,
    SimProcesses,
    SimRevisions,
    SimServer,
)

from gpuwatch import assembly, config, notify, remediation, rules, servers
from gpuwatch.clock import ManualClock
from gpuwatch.config.size import Size
from gpuwatch.cycle import Cycle, Parts
from gpuwatch.errors import NotifyError, StoreError
from gpuwatch.records import Place, Revision, Rule, RuleGroup, Step
from gpuwatch.sources import Trees
from gpuwatch.sources.nvml import NvmlSource
from gpuwatch.store import Audit, Changes, ReadStore, leave_wish, open_read_only

SECOND, MINUTE, HOUR = 1000, 60_000, 3_600_000
START_MS = 1_800_000_000_000
GIB = 1 << 30
SHM = Path("/dev/shm")  # there a sync costs nothing
UNLIMITED_PAGES = 1 << 30
FULL = 1 << 60  # more than any filesystem has free


class Killed(BaseException):
    """The daemon died here, as by kill -9."""


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


class World:
    """Everything, and the switches. `tick()` is one second; to be closed at the end.

    Hours are sealed, by a process each, only where `seals`. Where `arguments` are given, they are
    revision 1 of the server's settings; `server` holds more of its `config.ServerSettings`.
    """

    def __init__(
        self,
        seed: int = 0,
        rule_groups: tuple[rules.CompiledGroup, ...] | None = None,
        *,
        start_ms: int = START_MS,
        seals: bool = False,
        arguments: Mapping[str, Any] | None = None,
        policies: Sequence[config.Policy] = config.DEFAULT_POLICIES,
        server: Mapping[str, Any] | None = None,
        **remediation,
    ) -> None:
        self._temporary = tempfile.TemporaryDirectory(dir=SHM if SHM.is_dir() else None)
        self._mount = Path(self._temporary.name) / "mount"
        self._away = Path(self._temporary.name) / "away"
        self.folder = self._mount / "gpuwatch"
        self.random = random.Random(seed)
        self.clock = ManualClock(start_ms)
        given = {"start_deadline": config.Duration(60 * SECOND), **(server or {})}
        if arguments is not None:
            given["revisions"] = self.folder / "revisions"
        self.settings = config.Settings(
            host="sim",
            state_dir=self.folder,
            store=config.StoreSettings(min_free=Size(0)),
            servers=[config.ServerSettings(name=SERVER, **given)],
            remediation=remediation_settings(**remediation),
            policies=list(policies),
        )
        self.groups = shipped_groups() if rule_groups is None else rule_groups
        self.seals = seals
        self.nvml = FakeNvml()
        self.gpu = SimGpu(self.nvml.devices[0])
        self.trees = Trees()
        self.revisions = SimRevisions(are_kept=arguments is not None)
        self.server = SimServer(self)
        self.supervisor = SimSupervisor(self, self.server)
        self.hands = SimHands(self, self.server, self.supervisor)
        self.slack, self.ding = SimChat(self, "slack"), SimChat(self, "ding")
        self.health, self.metrics, self.probe = SimHealth(self), SimMetrics(self), SimProbe(self)
        self.log = SimLog(self.server)
        self.invariants = Invariants(self)
        self.kill_at: str | None = None
        self.down_until_ms: int | None = None
        self.is_full = False
        self.booted_at_ms = self.health_hangs_ms = 0
        self.jumped_at_ms = 0
        self._unsaved_since_ms: int | None = None
        self.boot()
        if arguments is not None:
            self._keep_first_revision(dict(arguments))

    def _keep_first_revision(self, arguments: dict[str, Any]) -> None:
        """As a person's first `gpuwatch config set` has left it."""
        first = Revision(server=SERVER, number=1, arguments=arguments, created_at_ms=self.now_ms, by="eve")
        self.revisions.write(first)
        self.revisions.swap(1)
        self.store.save(Changes(revisions=[first], settings={f"wanted:{SERVER}": "1"}), None)

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

    @property
    def known(self) -> Known:
        return self.invariants.known

    def revision(self, number: int) -> Revision:
        """What gpuwatch knows of a revision, as its hands ask for it."""
        return next(r for r in self.store.revisions(SERVER) if r.number == number)

    def next_arguments(self) -> Mapping[str, Any]:
        """What the next start will read."""
        return self.server.arguments if self.revisions.in_use is None else self.revisions.arguments()

    def boot(self) -> None:
        """Start the daemon on whatever is on disk; StoreError if there is none."""
        self.booted_at_ms = self.now_ms
        self.store = assembly.open_store(self.settings, self.groups, self.now_ms)
        self.known.heard = dict(self.known.wishes)
        self.store.reload(self.now_ms)
        self.cycle = self._cycle()
        self.due_ms: dict[str, int] = {}

    def _cycle(self) -> Cycle:
        nvml = NvmlSource(self.nvml, names=self.nvml, trees=self.trees)
        others = [SimGuests(self), self.health, self.metrics, self.probe]
        return Cycle(
            Parts(
                settings=self.settings,
                store=self.store,
                sources=[SimProcesses(self), nvml, *others],  # whose a process is, is known before it is told
                groups=self.groups,
                supervisors={SERVER: self.supervisor},
                notifiers={"slack": self.slack, "ding": self.ding},
                started_at_ms=self.booted_at_ms,
                jitter=self.random.random,
                trees=self.trees,
                probes={SERVER: self.probe},
                starts={SERVER: servers.StartWatch(SERVER, self.log)},
                hands={SERVER: self.hands},
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
            self.settings, remediation=remediation_settings(**remediation)
        )

    def tick(self, ms: int = SECOND) -> None:
        """One second goes by, or a few; the daemon runs if it is up; then the invariants hold."""
        self.clock.advance(ms)
        self.health_hangs_ms = self.health_hangs_ms + ms if self.health.hangs else 0
        self.supervisor.go_on(self.now_ms)
        self.server.go_on(self.now_ms)
        self.hands.go_on(self.now_ms)
        if self.down_until_ms is not None and not self._is_up_again():
            return
        if self.is_full:
            self._press()
        try:
            self._run_jobs()
        except Killed:
            self.invariants.check(killed=True)
            self._die([1, 2, 5, 30])
            return
        self.invariants.check()

    def run_for(self, ms: int, *, step_ms: int = SECOND) -> None:
        """`step_ms`: a tick each so often, as on a host that is busy."""
        for _ in range(ms // step_ms):
            self.tick(step_ms)

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
        if not self.unsaved():
            self._unsaved_since_ms = None
        elif self._unsaved_since_ms is None:
            self._unsaved_since_ms = self.now_ms

    def unsaved(self) -> list[Changes]:
        return self.store._writer._changes

    def _die(self, down_s: list[int]) -> None:
        """As by kill -9: what is in memory alone is gone."""
        self.down_until_ms = self.now_ms + self.random.choice(down_s) * SECOND
        lost = list(self.unsaved())
        since_ms = self.now_ms if self._unsaved_since_ms is None else self._unsaved_since_ms
        self._unsaved_since_ms = None
        self._drop_memory()
        if not lost:
            return
        with open_read_only(self._away / "gpuwatch" if self.is_gone else self.folder) as view:
            self.known.forget(
                ticks={t.at_ms for changes in lost for t in changes.transitions},
                since_ms=since_ms,
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

    def maybe_kill(self, *where: str) -> None:
        if self.kill_at in where:
            self.kill_at = None
            raise Killed

    def jump(self, ms: int) -> None:
        """The host slept, or its clock was set."""
        self.clock.advance(ms)
        if ms > MINUTE:
            self.jumped_at_ms = self.now_ms

    def deed(self, step: Step, task, now_ms: int) -> None:
        """A hand is asked for a step."""
        self.invariants.deed(step, task.id, now_ms)

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

    def check_all_was_told(self) -> None:
        self.invariants.all_was_told()

    def check_all_was_saved(self) -> None:
        self.invariants.all_was_saved()

    def heal(self) -> None:
        """End every fault, so that what is owed can be paid."""
        self.hands.faults.clear()
        self.hands.refused.clear()
        self.hands.broken.clear()
        self.revisions.fails = self.server.port_busy = False
        self.slack.down = self.slack.gone = self.ding.down = self.ding.gone = False
        self.slack.limited_until_ms = self.ding.limited_until_ms = 0
        self.supervisor.unreachable = self.supervisor.forbids = self.health.hangs = False
        self.kill_at = None
        self.full_disk(False)
        self.gone_disk(False)


ARGUMENTS = {
    "model": "sim/14B",
    "gpu_memory_utilization": 0.85,
    "max_model_len": 32768,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 8192,
}
BOUNDS = {
    "gpu_memory_utilization": [0.5, 0.9],
    "max_model_len": [4096, 32768],
    "max_num_seqs": [8, 128],
    "max_num_batched_tokens": [1024, 16384],
}


def quick_rules() -> tuple[rules.CompiledGroup, ...]:
    """As the shipped ones of those names, and sooner."""
    preempts = "rate(vllm:num_preemptions_total[20s]) > 0.1"
    reduced = "server_revision != on (server) group_left () server_wanted_revision"
    return _compiled(
        "quick",
        _rule("VLLMSettingsReduced", reduced, 5 * SECOND, remediation="return"),
        _rule("VLLMPreempting", preempts, 5 * SECOND, remediation="reconfigure"),
        _rule("VLLMQueueGrowing", "vllm:num_requests_waiting > 10", 10 * SECOND, remediation="limit"),
    )


def _rule(alert: str, expr: str, for_ms: int, **labels: str) -> Rule:
    at = Place(file="tests/story.yaml", line=1)
    return Rule(alert=alert, expr=expr, for_ms=for_ms, labels=labels, place=at, expr_place=at)


def _compiled(name: str, *given: Rule) -> tuple[rules.CompiledGroup, ...]:
    at = Place(file="tests/story.yaml", line=1)
    if name not in _cache:
        group = RuleGroup(name=name, interval_ms=SECOND, rules=given, place=at)
        _cache[name] = rules.compile_groups([group])
    return _cache[name]


_cache: dict[str, tuple[rules.CompiledGroup, ...]] = {}


def shipped_groups() -> tuple[rules.CompiledGroup, ...]:
    """The rules that gpuwatch ships, compiled once."""
    if "shipped" not in _cache:
        folder = Path(__file__).parent.parent / "rules"
        _cache["shipped"] = rules.compile_groups(config.load_rules(sorted(folder.glob("*.yaml"))))
    return _cache["shipped"]
