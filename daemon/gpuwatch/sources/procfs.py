"""Small reads of /proc and of control groups; what is gone or denied is None or nothing, never an error."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

from gpuwatch.errors import SourceError
from gpuwatch.sources.trees import Identity

if TYPE_CHECKING:
    from collections.abc import Sequence

TICKS_A_SECOND: Final = os.sysconf("SC_CLK_TCK")
PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")

_MOST_BYTES: Final = 32 * 1024
_HIERARCHIES: Final = ("", "unified", "systemd")  # of version 2, of both together, of version 1
# Units that hold more than what systemd started in them.
_SHARED: Final = ("session-", "user@", "init.", "docker-", "libpod-", "crio-", "cri-containerd-")
_CONTAINER_ID: Final = 64


class Stat(NamedTuple):
    """Of /proc/PID/stat. `name` is cut at 15 bytes; state, CPU time and memory are the kernel's own words."""

    identity: Identity
    name: str
    state: str
    parent_pid: int
    cpu_ticks: int
    resident_pages: int

    @property
    def is_over(self) -> bool:
        """Ended, though nobody may have asked how yet."""
        return self.state in "ZXx"


class Procfs:
    """The processes of this host, or of made-up folders."""

    def __init__(self, proc: str = "/proc", cgroups: str = "/sys/fs/cgroup") -> None:
        """Reads nothing yet."""
        self._proc = proc
        self._cgroups = cgroups

    def pids(self) -> frozenset[int]:
        """All processes that may be seen; SourceError if the folder may not be read."""
        try:
            names = os.listdir(self._proc)  # noqa: PTH208 (each second, a Path a process costs more than all)
        except OSError as error:
            what = f"list the processes in {self._proc}: {error.strerror}"
            raise SourceError(f"{what}; is it mounted and readable?") from error
        return frozenset(int(name) for name in names if name.isdecimal())

    def stat(self, pid: int) -> Stat | None:
        """None if it is gone or may not be looked at. Never waits for the process, whatever its state."""
        start, end, rest = self._read(f"{pid}/stat").partition(b"(")[2].rpartition(b")")
        fields = rest.split()
        if not end or len(fields) < 22:
            return None
        return Stat(
            identity=Identity(pid, int(fields[19])),
            name=start.decode(errors="replace"),
            state=chr(fields[0][0]),
            parent_pid=int(fields[1]),
            cpu_ticks=int(fields[11]) + int(fields[12]),
            resident_pages=int(fields[21]),
        )

    def words(self, pid: int) -> tuple[str, ...]:
        """Its command line. May wait for a process that hangs in the kernel: not to be asked each second."""
        text = self._read(f"{pid}/cmdline").decode(errors="replace")
        return tuple(text.rstrip("\0 ").split("\0")) if text else ()

    def boot_time_s(self) -> int:
        """When the host started, in Unix time; 0 if it will not say."""
        for line in self._read("stat").splitlines():
            if line.startswith(b"btime "):
                return int(line.split()[1])
        return 0

    def cgroup(self, pid: int) -> str:
        """The control group that systemd put it in, as a path; empty if that is not known."""
        found = ""
        for line in self._read(f"{pid}/cgroup").decode(errors="replace").splitlines():
            hierarchy, controllers, path = (*line.split(":", 2), "", "")[:3]
            if controllers == "name=systemd" or (hierarchy == "0" and path != "/"):
                found = path
        return found

    def cgroup_pids(self, cgroup: str) -> list[int]:
        """The processes of a control group, without those of groups below it."""
        for hierarchy in _HIERARCHIES:
            with suppress(OSError):
                folder = os.path.join(self._cgroups, hierarchy, cgroup.lstrip("/"))  # noqa: PTH118 (of text)
                with open(f"{folder}/cgroup.procs", "rb") as file:  # noqa: PTH123 (each second)
                    return [int(pid) for pid in file.read().split()]
        return []

    def _read(self, name: str) -> bytes:
        try:
            file = os.open(f"{self._proc}/{name}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            return b""
        try:
            return os.read(file, _MOST_BYTES)
        except OSError:
            return b""
        finally:
            os.close(file)


def unit_of(cgroup: str) -> str:
    """The systemd unit that a control group is of; empty for none. A container's id is cut to 12 digits."""
    units = [part for part in cgroup.split("/") if part.endswith((".service", ".scope"))]
    if not units:
        return ""
    stem, dot, kind = units[-1].rpartition(".")
    prefix, dash, container = stem.rpartition("-")
    return f"{prefix}{dash}{container[:12]}{dot}{kind}" if len(container) == _CONTAINER_ID else units[-1]


def is_of_one_server(cgroup: str, beside: Sequence[str]) -> bool:
    """Whether a control group holds a server alone: a unit of its own, in which none of `beside` is.

    `beside` are the groups of the server's parent and of gpuwatch: who was started by a shell, a container's
    first process or gpuwatch shares the group with others.
    """
    unit = cgroup.rpartition("/")[2]
    is_unit = unit.endswith((".service", ".scope")) and not unit.startswith(_SHARED)
    return is_unit and cgroup not in beside
