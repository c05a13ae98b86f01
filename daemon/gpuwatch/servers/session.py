"""Sessions of processes as Linux sees them: spawns a leader, finds the living members, never waits.

A process is told from a later one with the same number by the boot and by its start time in ticks
since that boot, read from /proc/PID/stat. psutil's create time moves when the wall clock is stepped.
"""

from __future__ import annotations

import contextlib
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_APPEND: Final = os.O_WRONLY | os.O_APPEND | os.O_CREAT
_PROC: Final = Path("/proc")
_ENDED: Final = frozenset("ZXx")  # a zombie holds no memory and serves nobody


@dataclass(frozen=True, slots=True)
class Leader:
    """Who leads a session: its number is the session's."""

    pid: int
    start_ticks: int
    boot_id: str


@dataclass(frozen=True, slots=True)
class _Stat:
    """The fields of /proc/PID/stat that matter here."""

    pid: int
    state: str
    session: int
    start_ticks: int


def note(log_file: Path, line: str) -> None:
    """Append a line to the log that `spawn` goes on with; OSError."""
    file = os.open(log_file, _APPEND, 0o640)
    try:
        os.write(file, line.encode())
    finally:
        os.close(file)


def spawn(program: list[str], env: Mapping[str, str], log_file: Path) -> Leader:
    """Start `program` as leader of a session of its own; OSError if that fails.

    Standard input is /dev/null, output is appended to `log_file`; signals are as a shell gives them.
    """
    pid = os.posix_spawn(
        program[0],
        program,
        env,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, str(log_file), _APPEND, 0o640),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
        setsigmask=[],
        setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],  # Python ignores these two
    )
    stat = _stat(pid)  # it is our child and not reaped yet, so it is there even if it has ended
    return Leader(pid=pid, start_ticks=stat.start_ticks if stat else 0, boot_id=_boot_id())


def is_alive(leader: Leader) -> bool:
    """Whether this very process runs, and is not a zombie."""
    stat = _stat(leader.pid)
    return stat is not None and _is_same(stat, leader) and stat.state not in _ENDED


def members(leader: Leader) -> list[int]:
    """The living processes of its session, the leader included, also after its death."""
    if leader.boot_id != _boot_id():
        return []
    stat = _stat(leader.pid)
    if stat is not None and not _is_same(stat, leader):
        return []  # Linux gives a number anew only when no session bears it
    return [s.pid for s in _stats() if s.session == leader.pid and s.start_ticks >= leader.start_ticks]


def find(variable: str, value: str) -> Leader | None:
    """The living session leader that was started with this variable in its environment."""
    wanted = f"{variable}={value}".encode()
    for stat in _stats():
        if stat.session == stat.pid:
            with contextlib.suppress(OSError):  # another user's, or just gone
                if wanted in (_PROC / str(stat.pid) / "environ").read_bytes().split(b"\0"):
                    return Leader(pid=stat.pid, start_ticks=stat.start_ticks, boot_id=_boot_id())
    return None


def reap(leader: Leader) -> tuple[bool, int | None]:
    """Whether a process that is not alive has ended, and how if it was our child (minus the signal).

    The main thread of a process that is killed is a zombie before its other threads have gone; until
    then the kernel gives no status, and it may still hold what it held.
    """
    try:
        pid, status = os.waitpid(leader.pid, os.WNOHANG)
    except ChildProcessError:
        return True, None
    return bool(pid), os.waitstatus_to_exitcode(status) if pid else None


def send(number: signal.Signals, pids: Sequence[int]) -> None:
    """Send a signal to each that is still there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _is_same(stat: _Stat, leader: Leader) -> bool:
    return stat.start_ticks == leader.start_ticks and leader.boot_id == _boot_id()


def _stats() -> list[_Stat]:
    found = (_stat(int(entry.name)) for entry in os.scandir(_PROC) if entry.name.isdigit())
    return [stat for stat in found if stat is not None and stat.state not in _ENDED]


def _stat(pid: int) -> _Stat | None:
    try:
        text = (_PROC / str(pid) / "stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold spaces and brackets
    return _Stat(pid=pid, state=fields[0], session=int(fields[3]), start_ticks=int(fields[19]))


def _boot_id() -> str:
    return (_PROC / "sys/kernel/random/boot_id").read_text().strip()
