"""Keeps a server as a plain process on hosts without systemd; adopts it, never owns it.

gpuwatch may stop, crash or be upgraded: the server runs on, and the next gpuwatch finds it by the state
file. Every step is asked again until done, so nothing here waits. Under systemd use a unit instead: a
service that stops takes all processes of its control group with it, this server too.

Rule 1: the server leads its own session, and a new one is started only when that session is empty:
        vLLM's EngineCore outlives a dead API server and holds its GPU memory.
Rule 2: TERM goes to the main process first, as vLLM's API server wants, or to all once it is dead; KILL goes
        to all after `stop_timeout_ms`, for vLLM may swallow a TERM.
Rule 3: the intent to start is on disk before the start, and its id in the child's environment: whoever finds
        the intent without a pid looks for the child before starting another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import signal
import threading
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from gpuwatch.errors import ServerError
from gpuwatch.records import SupervisorPhase, SupervisorState
from gpuwatch.servers import session
from gpuwatch.servers.starts.log import mark

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from gpuwatch.records import Step

START_ID: Final = "GPUWATCH_START_ID"
SERVER: Final = "GPUWATCH_SERVER"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Life:
    """One life of the server: the state file. `wanted` is false once its stop was asked for."""

    start_id: str
    started_at_ms: int
    leader: session.Leader | None = None
    stop_asked_at_ms: int | None = None
    wanted: bool = True
    exit_status: int | None = None  # negative: the signal that ended it; None: running, or not our child


@dataclass(kw_only=True)
class ProcessSupervisor:
    """The server `name`, started as `command` in `cwd` with `env` as its whole environment.

    Its output is appended to `log_file`. `state_dir` holds `process-NAME.json`.
    """

    name: str
    command: Sequence[str]
    state_dir: Path
    log_file: Path
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: Path | None = None
    stop_timeout_ms: int = 30_000
    _turn: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    def observe(self, now_ms: int) -> SupervisorState:
        """Whether its main process lives, and how it ended; reaps it if it is our child."""
        with self._locked():
            life, alive = self._look()
            if life is None:
                return SupervisorState(phase=SupervisorPhase.INACTIVE, detail="never started by gpuwatch")
            return self._state(life, now_ms, alive=alive)

    def do(self, step: Step, *, since_ms: int, now_ms: int) -> None:
        """`stop`: TERM, after `stop_timeout_ms` KILL; `start`: a new life; `restart`: the two in turn."""
        with self._locked():
            life, alive = self._look()
            match step.action:
                case "restart":
                    self._restart(life, since_ms, now_ms)
                case "stop" if life and life.wanted and not alive:  # it ended by itself, and that remains so
                    self._is_cleared(life, since_ms, now_ms)
                case "stop":
                    self._stop(life, since_ms, now_ms)
                case "start" if alive and life:
                    self._let_run(life, now_ms)
                case "start" if not _began_since(life, since_ms):
                    self._refuse_remains(life)
                    self._spawn(now_ms)
                case "start":  # it began, and ended again: that is for others to judge
                    return
                case _:
                    raise ServerError(
                        f"{step.action} of {self.name}: process supervisor knows only restart, stop, start",
                        permanent=True,
                    )

    def start(self, now_ms: int) -> str:
        """Start it unless it runs; says which. ServerError if remains of the last one still run."""
        with self._locked():
            life, alive = self._look()
            if alive and life and life.leader:
                return f"{self.name} runs already as process {life.leader.pid}"
            self._refuse_remains(life)
            leader = self._spawn(now_ms)
        return f"{self.name} is starting as process {leader.pid}; its log is {self.log_file}"

    def stop(self, now_ms: int) -> None:
        """Ask it to stop for good; call again until `observe` says INACTIVE, for KILL to follow TERM."""
        with self._locked():
            life, _ = self._look()
            self._stop(life, now_ms, now_ms)

    def _restart(self, life: _Life | None, since_ms: int, now_ms: int) -> None:
        if not _began_since(life, since_ms) and (life is None or self._is_cleared(life, since_ms, now_ms)):
            self._spawn(now_ms)

    def _stop(self, life: _Life | None, since_ms: int, now_ms: int) -> None:
        if life is None:
            return
        # The first call asks; later ones go on from there: their own time is no new wish.
        if not life.wanted and life.stop_asked_at_ms is not None:
            since_ms = life.stop_asked_at_ms
        life = dataclasses.replace(life, wanted=False)
        self._save(life)
        self._is_cleared(life, since_ms, now_ms)

    def _let_run(self, life: _Life, now_ms: int) -> None:
        """Take the wish back that it stop, once its time is over: it swallowed the TERM and runs on."""
        if not life.wanted and not self._is_stopping(life, now_ms):
            self._save(dataclasses.replace(life, wanted=True, stop_asked_at_ms=None))

    def _refuse_remains(self, life: _Life | None) -> None:
        members = session.members(life.leader) if life and life.leader else []
        if members:
            raise ServerError(
                f"start {self.name}: processes {members} of the last one still run; restart it instead"
            )

    def _look(self) -> tuple[_Life | None, bool]:
        """The state file, put right by what really runs, and whether the main process is alive."""
        life = self._load()
        if life is None:
            return None, False
        if life.leader is None:
            life = dataclasses.replace(life, leader=session.find(START_ID, life.start_id))
            if life.leader is None:
                return life, False
            self._save(life)
        # Asked once, and before reaping: what dies in between is alive until the next look.
        alive = session.is_alive(life.leader)
        if alive or life.exit_status is not None:
            return life, alive
        ended, status = session.reap(life.leader)
        if status is not None:
            life = dataclasses.replace(life, exit_status=status)
            self._save(life)
        return life, not ended

    def _state(self, life: _Life, now_ms: int, *, alive: bool) -> SupervisorState:
        pid = life.leader.pid if alive and life.leader else None
        return SupervisorState(
            phase=self._alive_phase(life, now_ms) if alive else _ended_phase(life),
            pid=pid,
            started_at_ms=life.started_at_ms,
            stop_asked=not life.wanted,
            detail=f"running as process {pid}" if alive else _how_it_ended(life),
        )

    def _alive_phase(self, life: _Life, now_ms: int) -> SupervisorPhase:
        """DEACTIVATING for as long as the stop may take; who swallowed the TERM is ACTIVE again."""
        stopping = self._is_stopping(life, now_ms) or not life.wanted
        return SupervisorPhase.DEACTIVATING if stopping else SupervisorPhase.ACTIVE

    def _is_stopping(self, life: _Life, now_ms: int) -> bool:
        asked_ms = life.stop_asked_at_ms
        return asked_ms is not None and now_ms - asked_ms <= self.stop_timeout_ms

    def _is_cleared(self, life: _Life, since_ms: int, now_ms: int) -> bool:
        """Whether the session is empty; if not, ask it to be (rules 1 and 2)."""
        members = session.members(life.leader) if life.leader else []
        if life.leader is None or not members:
            return True
        main_alive = session.is_alive(life.leader)
        if life.stop_asked_at_ms is None or life.stop_asked_at_ms < since_ms:
            # The signal first, then the row: killed between the two, it is sent twice, which harms nobody.
            self._send(signal.SIGTERM, [life.leader.pid] if main_alive else members)
            self._save(dataclasses.replace(life, stop_asked_at_ms=now_ms))
        elif now_ms - life.stop_asked_at_ms >= self.stop_timeout_ms:
            self._send(signal.SIGKILL, members)
        elif not main_alive:
            self._send(signal.SIGTERM, members)
        return False

    def _send(self, number: signal.Signals, pids: Sequence[int]) -> None:
        try:
            session.send(number, pids)
        except PermissionError as error:
            raise ServerError(
                f"send {number.name} to {self.name}, processes {pids}: {error}; run it as our own user",
                permanent=True,
            ) from error

    def _spawn(self, now_ms: int) -> session.Leader:
        life = _Life(start_id=uuid.uuid4().hex, started_at_ms=now_ms)
        program = self._program()
        self._save(life)
        env = {**self.env, SERVER: self.name, START_ID: life.start_id}
        try:
            session.note(self.log_file, mark(self.name, now_ms))
            leader = session.spawn(program, env, self.log_file)
        except OSError as error:
            self._path("json").unlink(missing_ok=True)
            raise ServerError(
                f"start {self.name}: {error}; see that {self.log_file} can be written"
            ) from error
        self._save(dataclasses.replace(life, leader=leader))
        return leader

    def _program(self) -> list[str]:
        """The argument list, its program found; posix_spawn knows no directory, so `env` changes to it."""
        path = shutil.which(self.command[0], path=self.env.get("PATH", os.defpath))
        if path is None:
            raise ServerError(
                f"start {self.name}: {self.command[0]!r} is no program that can be run;"
                " give its full path in `supervisor.process.command`",
                permanent=True,
            )
        program = [path, *self.command[1:]]
        return ["/usr/bin/env", "-C", str(self.cwd), *program] if self.cwd else program

    def _path(self, suffix: str) -> Path:
        return self.state_dir / f"process-{self.name}.{suffix}"

    def _load(self) -> _Life | None:
        try:
            row: dict[str, Any] = json.loads(self._path("json").read_bytes())
            leader = row.pop("leader")
            return _Life(**row, leader=session.Leader(**leader) if leader else None)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ServerError(
                f"read {self._path('json')}: {error!r}; if {self.name} does not run, remove the file",
                permanent=True,
            ) from error

    def _save(self, life: _Life) -> None:
        path, new = self._path("json"), self._path("json.new")
        try:
            with new.open("w") as file:
                json.dump(dataclasses.asdict(life), file)
                file.flush()
                os.fsync(file.fileno())
            new.replace(path)
        except OSError as error:
            raise ServerError(f"write {path}: {error}; make room or correct its owner") from error

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Our threads wait for each other, for milliseconds; of two gpuwatches the second asks again."""
        path = self._path("lock")
        try:
            file = path.open("a")
        except OSError as error:
            raise ServerError(f"lock {path}: {error}; create the directory or correct its owner") from error
        with self._turn, file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ServerError(f"look at {self.name}: another gpuwatch is at it; ask again") from error
            yield


def _began_since(life: _Life | None, since_ms: int) -> bool:
    return life is not None and life.leader is not None and life.started_at_ms >= since_ms


def _ended_phase(life: _Life) -> SupervisorPhase:
    clean = life.exit_status == 0 or not life.wanted
    return SupervisorPhase.INACTIVE if clean else SupervisorPhase.FAILED


def _how_it_ended(life: _Life) -> str:
    remains = session.members(life.leader) if life.leader else []
    tail = f"; its processes {remains} still run" if remains else ""
    if life.exit_status is None:
        return f"main process is gone{tail}"
    how = "exited with status" if life.exit_status >= 0 else "killed by signal"
    return f"{how} {abs(life.exit_status)}{tail}"
