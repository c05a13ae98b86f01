"""The hands of the simulated host: a supervisor as systemd is, and steps that take time and fail.

Every deed passes `World.deed`, where it is judged at once: what may never be done is caught as it is done.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tests.sim_vllm import SECOND, SERVER, Shape, SimServer

from gpuwatch.errors import ServerError
from gpuwatch.records import Errand, ErrandPhase, Step, SupervisorPhase, SupervisorState

if TYPE_CHECKING:
    from tests.world import World

LAPSES_AFTER_MS = 30 * SECOND
STAGES = (4, 16, 64)
STAGE_MS = 5 * SECOND


@dataclass
class SimSupervisor:
    """Behaves as systemd does: a stop takes its time, and each thing comes once however often it is asked."""

    world: World
    server: SimServer
    stop_takes_ms: int = 2 * SECOND
    unreachable: bool = False
    forbids: bool = False
    restarts_by_itself_after_ms: int | None = None  # Restart=always
    stopping_until_ms: int | None = None
    then_start: bool = False
    restarts: list[int] = field(default_factory=list)  # when gpuwatch began each of its own

    def observe(self, now_ms: int) -> SupervisorState:
        if self.unreachable:
            raise ServerError("supervisor: no answer; is D-Bus up?")
        self.go_on(now_ms)
        server = self.server
        return SupervisorState(
            phase=self._phase(),
            pid=server.pid if server.alive else None,
            started_at_ms=server.started_at_ms,
            stop_asked=server.stop_asked,
            detail="" if server.alive else server.detail,
        )

    def _phase(self) -> SupervisorPhase:
        if self.stopping_until_ms is not None:
            return SupervisorPhase.DEACTIVATING
        if self.server.alive:
            return SupervisorPhase.ACTIVE
        waits = self.restarts_by_itself_after_ms is not None and self.server.died_at_ms is not None
        if waits and not self.server.stop_asked:
            return SupervisorPhase.AUTO_RESTART
        return SupervisorPhase.INACTIVE

    def do(self, step: Step, *, since_ms: int, now_ms: int) -> None:
        if self.unreachable:
            raise ServerError("supervisor: no answer; is D-Bus up?")
        if self.forbids:
            raise ServerError("supervisor: access denied; install the polkit rule", permanent=True)
        self.go_on(now_ms)
        if self.stopping_until_ms is not None or self._began_since(since_ms):
            return
        if step.action == "stop":
            self._stop(now_ms)
        elif step.action == "restart" or not self.server.alive:
            self.then_start = True
            self._stop(now_ms)

    def _began_since(self, since_ms: int) -> bool:
        started_at_ms = self.server.started_at_ms
        return started_at_ms is not None and started_at_ms >= since_ms

    def _stop(self, now_ms: int) -> None:
        server = self.server
        is_there = server.alive or server.orphan_pid is not None
        if is_there or self._phase() is SupervisorPhase.AUTO_RESTART:
            server.stop_asked = not self.then_start
        self.stopping_until_ms = now_ms + (self.stop_takes_ms if is_there else 0)
        self.go_on(now_ms)

    def go_on(self, now_ms: int) -> None:
        """What systemd does by itself."""
        server = self.server
        if self.stopping_until_ms is not None and now_ms >= self.stopping_until_ms:
            self.stopping_until_ms = None
            server.die("killed by signal 15")
            if not server.is_stubborn:
                server.end_orphan()
            if self.then_start:
                self.then_start = False
                server.start()
        waits = self._phase() is SupervisorPhase.AUTO_RESTART
        if waits and now_ms - server.died_at_ms >= self.restarts_by_itself_after_ms:
            server.start()


@dataclass
class SimErrand:
    """A command that runs beside the daemon: when it began, how long it takes, and what becomes of it."""

    began_at_ms: int
    takes_ms: int
    fault: str = ""
    effect: str = ""

    def shown(self, now_ms: int) -> Errand:
        if now_ms < self.began_at_ms + self.takes_ms:
            phase = ErrandPhase.RUNNING
        else:
            phase = ErrandPhase.FAILED if self.fault else ErrandPhase.DONE
        return Errand(phase=phase, began_at_ms=self.began_at_ms, detail=self.fault)


@dataclass
class SimHands:
    """Each step once, however often it is asked; `faults` says which steps fail, and how many times."""

    world: World
    server: SimServer
    supervisor: SimSupervisor
    begun: dict[str, SimErrand] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)  # so many times the step cannot be asked
    refused: set[str] = field(default_factory=set)  # steps that cannot be done for good
    broken: set[str] = field(default_factory=set)  # steps whose command fails
    asked: list[tuple[int, str, str]] = field(default_factory=list)  # when, of which plan, which step

    # -- the contract -----------------------------------------------------------------------------

    def do(self, step: Step, task, now_ms: int):
        self.world.maybe_kill("before the deed", f"before {step.action}")
        self.world.deed(step, task, now_ms)
        if step.action in self.refused:
            raise ServerError(f"{step.action}: not allowed; allow it", permanent=True)
        if self.faults.get(step.action, 0) > 0:
            self.faults[step.action] -= 1
            raise ServerError(f"{step.action}: no answer; is it up?")
        self.asked.append((now_ms, task.id, step.action))
        heard = getattr(self, f"_{step.action}")(step, task, now_ms)
        self.world.maybe_kill("after the deed", f"after {step.action}")
        return heard or {}

    def errands(self):
        now_ms = self.world.now_ms
        return {key: errand.shown(now_ms) for key, errand in self.begun.items()}

    def revision(self) -> int | None:
        return self.world.revisions.current()

    # -- errands -----------------------------------------------------------------------------------

    def _begin(self, task, takes_ms: int, fault: str = "", effect: str = "") -> None:
        self.world.maybe_kill("inside a step")
        self.begun.setdefault(task.key, SimErrand(self.world.now_ms, takes_ms, fault, effect))

    def _fault(self, action: str) -> str:
        return f"{action}: exit status 1" if action in self.broken else ""

    def _capture(self, step, task, now_ms):
        self._begin(task, 3 * SECOND, self._fault("capture"))

    def _run(self, step, task, now_ms):
        self._begin(task, 4 * SECOND, self._fault("run"))

    def _check(self, step, task, now_ms):
        revision = self.world.revision(int(step.args["revision"]))
        self.world.revisions.write(revision)
        shape = Shape(dict(revision.arguments), self.world.gpu.total)
        self._begin(task, 6 * SECOND, shape.mistake() or self._fault("check"))

    def _reset_prefix_cache(self, step, task, now_ms):
        self._begin(task, 2 * SECOND, self._fault("reset_prefix_cache"))

    def _sleep(self, step, task, now_ms):
        self._begin(task, 5 * SECOND, self._fault("sleep"), effect="sleep")

    def _wake(self, step, task, now_ms):
        self._begin(task, 2 * SECOND, self._fault("wake"), effect="wake")

    def go_on(self, now_ms: int) -> None:
        """What the errands bring about when they are through."""
        for errand in self.begun.values():
            if errand.effect and errand.shown(now_ms).phase is ErrandPhase.DONE:
                if self.server.up:
                    self.server.asleep = errand.effect == "sleep"
                errand.effect = ""

    # -- the server's life -------------------------------------------------------------------------

    def _stop(self, step, task, now_ms):
        self.supervisor.do(step, since_ms=task.since_ms, now_ms=now_ms)
        self.world.invariants.restarted(task.id, now_ms)

    def _start(self, step, task, now_ms):
        self._stop(step, task, now_ms)
        self._canary(step, task, now_ms)

    def _swap(self, step, task, now_ms):
        number = int(step.args["revision"])
        if number not in self.world.revisions.files:
            self.world.revisions.write(self.world.revision(number))
        self.world.maybe_kill("inside a step")
        self.world.revisions.swap(number)

    def _await_memory(self, step, task, now_ms):
        """Nothing can be asked of a driver."""

    def _canary(self, step, task, now_ms):
        """A narrow door from the first request on; the cycle asks the probe."""
        if self.server.up and self.server.has_guest:
            self._set("admission", STAGES[0], now_ms)

    # -- doors and limits --------------------------------------------------------------------------

    def _set(self, name: str, value: int | None, now_ms: int) -> None:
        if not (self.server.up and self.server.has_guest):
            raise ServerError(f"limit {SERVER}: no guest answers; is it installed?")
        if value is None:
            self.server.limits.pop(name, None)
        else:
            self.server.limits[name] = value, now_ms + LAPSES_AFTER_MS

    def _drain(self, step, task, now_ms):
        self._set("admission", 0, now_ms)
        if now_ms - task.since_ms >= 3 * step.within_ms // 4:
            self.server.work.drop()

    def _open_door(self, step, task, now_ms):
        stage = (now_ms - task.since_ms) // STAGE_MS
        self._set("admission", STAGES[stage] if stage < len(STAGES) else None, now_ms)

    def _limit_admission(self, step, task, now_ms):
        self._set("admission", int(step.args["limit"]), now_ms)

    def _limit_running(self, step, task, now_ms):
        self._set("running", int(step.args["limit"]), now_ms)

    def _hold(self, step, task, now_ms):
        for name, (value, _) in list(self.server.limits.items()):
            self._set(name, value, now_ms)

    def _lift(self, step, task, now_ms):
        for name in list(self.server.limits):
            self._set(name, None, now_ms)

    def _release_cache(self, step, task, now_ms):
        self._set("nothing", None, now_ms)
        return {"done": "yes", "freed_bytes": "1073741824"}
