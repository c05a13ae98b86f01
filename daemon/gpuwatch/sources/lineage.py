"""Finds the processes of one vLLM server and names them; judges nothing and touches none.

Rule 1: the root is what the supervisor told, else the one process whose command line serves our port.
Rule 2: members are the root, its descendants, and all else in its control group if that is its alone.
Rule 3: once a member, always one, also when its parent has ended; pid and start time say that it is the same.
Rule 4: the main process is the first in each line whose command serves vLLM, else the root. What started one
        is a helper.
Rule 5: a member whose main process is gone is an orphan, and so is what was there before the root began.
"""

from __future__ import annotations

import os
import re
from itertools import dropwhile, zip_longest
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Final
from urllib.parse import urlsplit

from gpuwatch.sources.procfs import is_of_one_server
from gpuwatch.sources.trees import Identity, Member

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from gpuwatch.sources.procfs import Procfs, Stat

MAIN: Final = "APIServer"
API_SERVER: Final = "api_server"
HELPER: Final = "helper"

# VLLM_PROCESS_NAME_PREFIX may put another word before the colons. The coordinator's end is the engines' end.
_TITLE: Final = re.compile(r"[^\s:]+::((APIServer|EngineCore|Worker|DPCoordinator)(?:_\S+)?)")
_ROLES: Final = {
    "APIServer": API_SERVER,
    "EngineCore": "engine_core",
    "Worker": "worker",
    "DPCoordinator": "engine_core",
}
_DEFAULT_PORT: Final = 8000
_LOOPBACK: Final = re.compile(r"localhost|127\.[0-9.]+|::1")
_NOBODY: Final = Identity(0, 0)
_MOST_NAME: Final = 48


class Lineage:
    """The members of one server, from look to look."""

    def __init__(self, host: Procfs, known: Iterable[Member] = ()) -> None:
        """`known` are members of before."""
        self._host = host
        self._root = _NOBODY
        self._root_wraps = False
        self._serving: set[Identity] = set()  # main processes by their command
        self._cgroup = ""
        self._living = {member.identity: member for member in known}
        self._zombies: dict[Identity, Member] = {}
        self._times_named: dict[tuple[Identity, str], int] = {}

    @property
    def has_root(self) -> bool:
        """Whether the root lived at the last look."""
        return self._root in self._living

    @property
    def members(self) -> Sequence[Member]:
        """Those that lived at the last look."""
        return tuple(self._living.values())

    def take_root(self, pid: int) -> bool:
        """Whether this is a process that lives and was not the root: it is from now on."""
        stat = self._host.stat(pid)
        if stat is None or stat.is_over or stat.identity == self._root:
            return False
        self._root = stat.identity
        self._root_wraps = False
        beside = [self._host.cgroup(other) for other in (stat.parent_pid, os.getpid())]
        cgroup = self._host.cgroup(pid)
        self._cgroup = cgroup if is_of_one_server(cgroup, beside) else ""
        self._join(stat, self._root)
        return True

    def look(self, born: Mapping[int, Sequence[Stat]]) -> tuple[list[tuple[Member, Stat]], list[Member]]:
        """Those that are there, each with what it does; and those that ended since the last look.

        `born` are the processes that may be new, by parent. One that ended is among the first as long as its
        parent has not asked how.
        """
        stats = [self._host.stat(identity.pid) for identity in (*self._living, *self._zombies)]
        present = {stat.identity: stat for stat in stats if stat is not None}
        ended = [m for i, m in self._living.items() if i not in present or present[i].is_over]
        for member in ended:
            del self._living[member.identity]
        zombies = [*self._zombies.values(), *ended]
        self._zombies = {member.identity: member for member in zombies if member.identity in present}
        for identity in tuple(self._living):
            self._read_title(present[identity])
        present |= {stat.identity: stat for stat in self._grow(born)}
        self._name()
        return [(m, present[m.identity]) for m in (*self._living.values(), *self._zombies.values())], ended

    def _grow(self, born: Mapping[int, Sequence[Stat]]) -> list[Stat]:
        """Rule 2."""
        joined = []
        parents = list(self._living.values())
        for parent in parents:
            for stat in born.get(parent.identity.pid, ()):
                if self._join(stat, parent.main):
                    joined.append(stat)
                    parents.append(self._living[stat.identity])
        known = {identity.pid for identity in self._living}
        for pid in self._host.cgroup_pids(self._cgroup) if self._cgroup else ():
            stray = None if pid in known else self._host.stat(pid)
            if stray is not None and self._join(stray, self._main_of_stray(stray)):
                joined.append(stray)
        return joined

    def _main_of_stray(self, stat: Stat) -> Identity:
        return self._root if stat.identity.start_ticks >= self._root.start_ticks else _NOBODY

    def _join(self, stat: Stat, main: Identity) -> bool:
        if stat.is_over or stat.identity in self._living:
            return False
        self._living[stat.identity] = Member(stat.identity, HELPER, HELPER, main)
        self._read_title(stat)
        return True

    def _read_title(self, stat: Stat) -> None:
        """A title changes the short name too, not at the very instant: it is read twice for each of those."""
        identity, key = stat.identity, (stat.identity, stat.name)
        times = self._times_named.get(key, 0)
        words = self._host.words(identity.pid) if times < 2 and stat.state != "D" else ()
        if not words:
            return
        self._times_named[key] = times + 1
        process, role = titled(words[0])
        if any(m.identity.pid == stat.parent_pid and m.process == process for m in self._living.values()):
            process = role = HELPER  # a fork that has its parent's title, and no part of its own
        member = self._living[identity]._replace(process=process, role=role)
        if role == HELPER and serves(words) and member.main not in self._serving:
            self._serving.add(identity)
            member = member._replace(main=identity)
        self._living[identity] = member

    def _name(self) -> None:
        """Rules 4 and 5."""
        self._serving &= {member.main for member in self._living.values()}
        began = self._root.start_ticks
        self._root_wraps |= any(i.start_ticks >= began and i != self._root for i in self._serving)
        mains = self._serving | (set() if self._root_wraps else {self._root})
        for identity, member in self._living.items():
            if member.role == HELPER or member.process == MAIN:
                process, role = (MAIN, API_SERVER) if identity in mains else (HELPER, HELPER)
                member = member._replace(process=process, role=role)  # noqa: PLW2901
            self._living[identity] = member._replace(is_orphan=member.main not in self._living)
        self._times_named = {key: n for key, n in self._times_named.items() if key[0] in self._living}


def titled(word: str) -> tuple[str, str]:
    """(`Worker_TP1`, its role) for a title `VLLM::Worker_TP1`; a helper for any other word."""
    title = _TITLE.fullmatch(word)
    if title is None:
        return HELPER, HELPER
    return re.sub(r"[^A-Za-z0-9_.:-]", "_", title[1])[:_MOST_NAME], _ROLES[title[2]]


def serves(words: Sequence[str]) -> bool:
    """Whether a command line is a vLLM server's own, and not of a shell, `uv run` or what else starts one."""
    if words and PurePosixPath(words[0]).name.startswith("python"):
        words = tuple(dropwhile(lambda word: word.startswith("-") and word != "-m", words[1:]))
        if words[:1] == ("-m",):
            return "".join(words[1:2]).startswith("vllm.entrypoints")
    return len(words) > 1 and PurePosixPath(words[0]).name == "vllm" and words[1] == "serve"


def port_of(words: Sequence[str]) -> int:
    """The port that a server's command line gives it. One in a file of `--config` is not seen."""
    for word, following in zip_longest(words, words[1:], fillvalue=""):
        option, equals, value = word.partition("=")
        if option == "--port" and (value if equals else following).isdecimal():
            return int(value if equals else following)
    return _DEFAULT_PORT


def local_port(url: str) -> int | None:
    """The port of an address on this host; None for any other."""
    try:
        parts = urlsplit(url)
        port = parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        return None
    return port if _LOOPBACK.fullmatch(parts.hostname or "") else None


def servers_by_port(host: Procfs, pids: Iterable[int]) -> dict[int, list[int]]:
    """The processes that serve vLLM; of one and its forked children, which look the same at first, the one.

    A process that waits in the kernel is passed over: to ask for its words may mean to wait with it.
    """
    stats = {pid: stat for pid in pids if (stat := host.stat(pid)) and stat.state not in "DZXx"}
    words = {pid: host.words(pid) for pid in stats}
    found: dict[int, list[int]] = {}
    for pid, stat in stats.items():
        if serves(words[pid]) and not serves(words.get(stat.parent_pid, ())):
            found.setdefault(port_of(words[pid]), []).append(pid)
    return found
