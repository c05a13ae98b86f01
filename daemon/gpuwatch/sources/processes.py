"""Who a process on a GPU belongs to: vLLM, somebody else, or nobody can tell; never touches a process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import psutil

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

VLLM: Final = "vllm"
FOREIGN: Final = "foreign"
UNKNOWN: Final = "unknown"

_VLLM_TITLE: Final = "VLLM::"  # vLLM names its engine and workers so
_VLLM_COMMANDS: Final = ("vllm serve", "vllm.entrypoints")
_MOST_ANCESTORS: Final = 32
_MOST_CACHED: Final = 4096


class ProcessIdentity(NamedTuple):
    """What tells whose a process is; `command_line` is its words joined by blanks."""

    name: str
    command_line: str
    parent_pid: int


class ProcessNames(Protocol):
    """Looks processes up by pid."""

    def look_up(self, pid: int) -> ProcessIdentity | None:
        """None if there is no such process or it may not be looked at."""
        ...


class PsutilNames:
    """The processes of this host, as psutil shows them."""

    def __init__(self) -> None:
        """Starts with nothing remembered."""
        self._command_lines: dict[tuple[int, float, str], str] = {}

    def look_up(self, pid: int) -> ProcessIdentity | None:
        """The command line is read once for a process and title; the rest is one small file."""
        try:
            process = psutil.Process(pid)
            with process.oneshot():
                name = process.name()
                key = pid, process.create_time(), name
                if key not in self._command_lines:
                    self._remember(key, " ".join(process.cmdline()))
                return ProcessIdentity(name, self._command_lines[key], process.ppid())
        except psutil.Error:
            return None

    def _remember(self, key: tuple[int, float, str], command_line: str) -> None:
        if len(self._command_lines) >= _MOST_CACHED:
            self._command_lines.clear()
        self._command_lines[key] = command_line


def owner_of(pid: int, names: ProcessNames) -> tuple[str, str]:
    """(process name, owner): `vllm` if it or an ancestor is one of vLLM's, `unknown` if not to be seen."""
    seen = names.look_up(pid)
    if seen is None:
        return UNKNOWN, UNKNOWN
    ancestor: ProcessIdentity | None = seen
    for _ in range(_MOST_ANCESTORS):
        if ancestor is None:
            break
        if is_vllm(ancestor):
            return seen.name, VLLM
        ancestor = names.look_up(ancestor.parent_pid) if ancestor.parent_pid else None
    return seen.name, FOREIGN


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
