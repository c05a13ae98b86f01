"""Who a process on a GPU belongs to: vLLM, somebody else, or nobody can tell; never touches a process.

Rule 1: vLLM's is what a vLLM command started, or what has its title.
Rule 2: an orphan is what has its title, and was adopted by whoever takes in those whose parent has ended.
Rule 3: where an ancestor may not be looked at, nobody is called an orphan.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import psutil

from gpuwatch.sources.procfs import Procfs, unit_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gpuwatch.sources.trees import Trees

VLLM: Final = "vllm"
FOREIGN: Final = "foreign"
ORPHAN: Final = "orphan"
UNKNOWN: Final = "unknown"

_VLLM_TITLE: Final = "VLLM::"  # vLLM names its engine and workers so
_VLLM_COMMANDS: Final = ("vllm serve", "vllm.entrypoints")
# The first process of a host or a container, or of a user's session, takes in whose parent has ended.
_ADOPTERS: Final = (
    "systemd",
    "init",
    "tini",
    "dumb-init",
    "docker-init",
    "catatonit",
    "conmon",
    "containerd-shim",
)
_FIRST_PID: Final = 1
_MOST_ANCESTORS: Final = 32
_MOST_CACHED: Final = 4096


class ProcessIdentity(NamedTuple):
    """What tells whose a process is; `command_line` is its words joined by blanks.

    `unit` is the systemd unit that it runs in. User and unit are empty where nobody can tell.
    """

    name: str
    command_line: str
    parent_pid: int
    user: str = ""
    unit: str = ""


class Owner(NamedTuple):
    """Whose the memory of a process is; `user` and `unit` of those alone that are not a living server's."""

    process: str
    owner: str
    server: str = ""
    user: str = ""
    unit: str = ""


class ProcessNames(Protocol):
    """Looks processes up by pid."""

    def look_up(self, pid: int) -> ProcessIdentity | None:
        """None if there is no such process or it may not be looked at."""
        ...


class PsutilNames:
    """The processes of this host, as psutil shows them."""

    def __init__(self) -> None:
        """Starts with nothing remembered."""
        self._host = Procfs()
        self._words: dict[tuple[int, float, str], tuple[str, str, str]] = {}

    def look_up(self, pid: int) -> ProcessIdentity | None:
        """Command line, user and unit are read once for a process and title; the rest is one small file."""
        try:
            process = psutil.Process(pid)
            with process.oneshot():
                name = process.name()
                key = pid, process.create_time(), name
                if key not in self._words:
                    self._remember(key, process)
                command_line, user, unit = self._words[key]
                return ProcessIdentity(name, command_line, process.ppid(), user, unit)
        except psutil.Error:
            return None

    def _remember(self, key: tuple[int, float, str], process: psutil.Process) -> None:
        if len(self._words) >= _MOST_CACHED:
            self._words.clear()
        user = ""
        with suppress(psutil.Error):
            user = process.username()
        self._words[key] = " ".join(process.cmdline()), user, unit_of(self._host.cgroup(key[0]))


def owner_of(pid: int, names: ProcessNames, trees: Trees | None = None) -> Owner:
    """By what `trees` knows of it, else by rules 1 to 3; `unknown` if it is not to be seen."""
    seen = names.look_up(pid)
    if seen is None:
        return Owner(UNKNOWN, UNKNOWN)
    member = trees.member(pid) if trees else None
    known = member and (ORPHAN if member.is_orphan else VLLM)
    owner = known or _owner_by_ancestors(seen, names)
    server = trees.server_of(pid) if trees else ""
    return Owner(seen.name, owner, server, *((seen.user, seen.unit) if owner != VLLM else ()))


def _owner_by_ancestors(seen: ProcessIdentity, names: ProcessNames) -> str:
    """Rules 1 to 3."""
    line = _line(seen, names)
    if any(vllm_command(process.command_line) for process in line):
        return VLLM
    titled = [place for place, process in enumerate(line) if process.name.startswith(_VLLM_TITLE)]
    if not titled:
        return FOREIGN
    top, above = line[titled[-1]], line[titled[-1] + 1 :]
    is_adopted = above and (top.parent_pid == _FIRST_PID or above[0].name.startswith(_ADOPTERS))
    return ORPHAN if is_adopted else VLLM


def _line(seen: ProcessIdentity, names: ProcessNames) -> list[ProcessIdentity]:
    """A process and its ancestors, as far as they may be looked at."""
    line: list[ProcessIdentity] = []
    ancestor: ProcessIdentity | None = seen
    while ancestor is not None and len(line) < _MOST_ANCESTORS:
        line.append(ancestor)
        ancestor = names.look_up(ancestor.parent_pid) if ancestor.parent_pid else None
    return line


def is_vllm(process: ProcessIdentity) -> bool:
    """By the title that vLLM sets, or the command that starts it."""
    return process.name.startswith(_VLLM_TITLE) or vllm_command(process.command_line) != ""


def vllm_command(command_line: str) -> str:
    """The words that show a vLLM command, empty if none do."""
    return next((words for words in _VLLM_COMMANDS if words in command_line), "")


class RecordedNames:
    """The processes of a recording's tick: mappings with `pid`, `ppid`, `name` and `cmdline`."""

    def __init__(self) -> None:
        """Knows nobody until a tick is set."""
        self._processes: dict[int, ProcessIdentity] = {}

    def set(self, processes: Sequence[Mapping[str, object]]) -> None:
        """Take over the processes of a tick."""
        self._processes = recorded_processes(processes)

    def look_up(self, pid: int) -> ProcessIdentity | None:
        """None for a process that was not recorded."""
        return self._processes.get(pid)


def recorded_processes(processes: Sequence[Mapping[str, object]]) -> dict[int, ProcessIdentity]:
    """A recording's processes by pid."""
    return {
        int(str(p["pid"])): ProcessIdentity(str(p["name"]), str(p["cmdline"]), int(str(p["ppid"])))
        for p in processes
    }
