"""The hands: looks at a vLLM server through its supervisor and asks one step of it; never decides which.

To add a supervisor, write `servers/x.py` with a class that has `observe` and `do`, and add one line
to `SUPERVISORS`; `tests/contract/test_supervisors.py` says what it must keep to.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final, Protocol

from gpuwatch.errors import ServerError
from gpuwatch.servers.account import account
from gpuwatch.servers.errands import Errands
from gpuwatch.servers.evidence import evidence
from gpuwatch.servers.hands import Hands, Task
from gpuwatch.servers.observed import observed, unseen
from gpuwatch.servers.phase import Health, HealthAnswer, judge, samples
from gpuwatch.servers.played import PlayedSupervisor
from gpuwatch.servers.process import ProcessSupervisor
from gpuwatch.servers.progress import judge as judge_progress
from gpuwatch.servers.progress import samples as progress_samples
from gpuwatch.servers.revisions import Revisions, interpreter_of
from gpuwatch.servers.sight import sight
from gpuwatch.servers.starts.arguments import redacted
from gpuwatch.servers.starts.log import DockerLog, FileLog, JournalLog
from gpuwatch.servers.starts.watch import StartWatch
from gpuwatch.servers.starts.watch import samples as start_samples
from gpuwatch.servers.systemd import SystemdSupervisor

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from gpuwatch.config import ServerSettings
    from gpuwatch.records import Step, SupervisorState
    from gpuwatch.servers.starts.log import StartLog

__all__ = [
    "SUPERVISORS",
    "Errands",
    "Hands",
    "Health",
    "HealthAnswer",
    "PlayedSupervisor",
    "ProcessSupervisor",
    "Revisions",
    "StartWatch",
    "Supervisor",
    "SystemdSupervisor",
    "Task",
    "account",
    "evidence",
    "interpreter_of",
    "judge",
    "judge_progress",
    "log_of",
    "observed",
    "process_of",
    "progress_samples",
    "redacted",
    "samples",
    "sight",
    "start_samples",
    "start_watch_of",
    "supervisor_of",
    "unseen",
]


class Supervisor(Protocol):
    """What keeps a server's process: systemd, Docker, or gpuwatch itself."""

    command: Sequence[str]
    """Program and arguments that it starts; empty as long as they are not known."""

    def observe(self, now_ms: int) -> SupervisorState:
        """One look, within 2 s; `started_at_ms` is the last start, also of a process that is gone.

        Raises ServerError where the supervisor does not answer; `permanent` if it never will.
        """
        ...

    def do(self, step: Step, *, since_ms: int, now_ms: int) -> None:
        """Ask for a step, or help it on; never wait for it. Asked again until its effect is seen.

        `stop`: all of it must go, and whoever would restart it must not; a stop that is under way is
        not asked again. A stop of ours is seen as `stop_asked` like anybody's; of a server that has ended
        by itself only what it left behind is ended, and it was not asked to stop.
        `start`: a server that is stopped must come; one that runs, or is on its way, is left as it is.
        `restart`: what began before `since_ms` must go and one new process must come.
        Of `start` and `restart`: once a process began at or after `since_ms`, even if it died, and while
        a stop or a start is under way, nothing more is asked. Raises ServerError.
        """
        ...


def systemd_of(server: ServerSettings, state_dir: Path) -> SystemdSupervisor:  # noqa: ARG001 - as all makers
    """The supervisor of a server whose settings name a systemd unit."""
    if server.supervisor is None or server.supervisor.systemd is None:
        raise ServerError(f"supervisor of {server.name}: its settings name no systemd unit", permanent=True)
    return SystemdSupervisor(server.supervisor.systemd)


def process_of(server: ServerSettings, state_dir: Path) -> ProcessSupervisor:
    """The supervisor of a server whose settings give a command; ServerError if they give none."""
    process = server.supervisor.process if server.supervisor else None
    if process is None:
        raise ServerError(
            f"supervisor of {server.name}: its settings give no process.command", permanent=True
        )
    inherited = {name: value for name, value in os.environ.items() if name not in _OURS_ALONE}
    return ProcessSupervisor(
        name=server.name,
        command=process.command,
        state_dir=state_dir,
        log_file=process.log_file or _log_file(server.name, state_dir),
        env=inherited | process.env,
        cwd=process.cwd,
        stop_timeout_ms=process.stop_timeout,
    )


def docker_of(server: ServerSettings, state_dir: Path) -> Supervisor:  # noqa: ARG001 - as all makers
    """The supervisor of a server whose settings name a container, or a service of Compose."""
    docker = server.supervisor.docker if server.supervisor else None
    if docker is None:
        raise ServerError(f"supervisor of {server.name}: its settings name no container", permanent=True)
    from gpuwatch.servers.docker import DockerSupervisor, Engine, Target  # noqa: PLC0415 - for those hosts alone

    target = Target(docker.container, docker.project, docker.service)
    return DockerSupervisor(target, Engine(docker.socket), stop_timeout_ms=docker.stop_timeout)


def start_watch_of(server: ServerSettings, state_dir: Path) -> StartWatch:
    """What follows the starts of a server that has a supervisor, in the log that it keeps."""
    return StartWatch(server.name, log_of(server, state_dir))


def log_of(server: ServerSettings, state_dir: Path) -> StartLog:
    """The log that a server's supervisor keeps."""
    if server.supervisor and server.supervisor.systemd:
        return JournalLog(server.supervisor.systemd)
    docker = server.supervisor.docker if server.supervisor else None
    if docker is not None:
        from gpuwatch.servers.docker import Engine, Target  # noqa: PLC0415 - for those hosts alone

        target = Target(docker.container, docker.project, docker.service)
        return DockerLog(target, Engine(docker.socket))
    process = server.supervisor.process if server.supervisor else None
    log_file = process.log_file if process else None
    return FileLog(log_file or _log_file(server.name, state_dir))


def supervisor_of(server: ServerSettings, state_dir: Path) -> Supervisor:
    """The supervisor that the settings choose, by `SUPERVISORS`."""
    for kind, make in SUPERVISORS.items():
        if getattr(server.supervisor, kind, None) is not None:
            return make(server, state_dir)
    raise ServerError(f"supervisor of {server.name}: its settings choose none", permanent=True)


SUPERVISORS: Final[Mapping[str, Callable[[ServerSettings, Path], Supervisor]]] = {
    "systemd": systemd_of,
    "process": process_of,
    "docker": docker_of,
}
"""What makes a supervisor of a server's settings, by the kind's key in `supervisor:`."""


def _log_file(server: str, state_dir: Path) -> Path:
    return state_dir / f"process-{server}.log"


# What systemd and our unit give to gpuwatch itself: a server must neither feed our watchdog, nor read our
# secrets, nor run without its own asserts and docstrings.
_OURS_ALONE: Final = frozenset(
    {
        "NOTIFY_SOCKET",
        "WATCHDOG_USEC",
        "WATCHDOG_PID",
        "CREDENTIALS_DIRECTORY",
        "INVOCATION_ID",
        "JOURNAL_STREAM",
        "LISTEN_FDS",
        "LISTEN_PID",
        "SYSTEMD_EXEC_PID",
        "STATE_DIRECTORY",
        "CACHE_DIRECTORY",
        "RUNTIME_DIRECTORY",
        "CONFIGURATION_DIRECTORY",
        "GPUWATCH_CONFIG",
        "PYTHONOPTIMIZE",
        "PYTHONNODEBUGRANGES",
        "PYTHONPYCACHEPREFIX",
    }
)
