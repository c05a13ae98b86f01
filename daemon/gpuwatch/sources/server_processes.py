"""Samples of the processes of each configured server: state, memory, CPU time, age, ends; signals none.

Rule 1: of several processes of one name memory and CPU time are added up, and the worst state counts.
Rule 2: an end is counted under the name that the process had, once, and from 0. Nobody misses a helper or an
        orphan: the end of one is not counted.
Rule 3: the count outlives the process, so that a restart goes on counting.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from gpuwatch.records import Labels, Metric, MetricKind, Sample
from gpuwatch.sources.exits import Exits
from gpuwatch.sources.lineage import HELPER, Lineage, local_port, servers_by_port
from gpuwatch.sources.procfs import PAGE_BYTES, TICKS_A_SECOND, Procfs

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from gpuwatch.config import ServerSettings
    from gpuwatch.sources.procfs import Stat
    from gpuwatch.sources.trees import Identity, Member, Trees

STATE: Final = "server_process_state"
EXITS: Final = "server_process_exits_total"
_FIGURES: Final = (
    ("server_process_resident_memory_bytes", MetricKind.GAUGE, "Resident memory of a server's process."),
    ("server_process_cpu_seconds_total", MetricKind.COUNTER, "CPU time that a server's process used."),
    ("server_process_start_time_seconds", MetricKind.GAUGE, "Unix time at which a server's process began."),
    (
        "server_process_orphaned",
        MetricKind.GAUGE,
        "1 for a server's process that lives although its main process is gone, else 0.",
    ),
)
_LABELS: Final = ("server", "process", "role")

METRICS: Final = (
    Metric(
        name=STATE,
        kind=MetricKind.GAUGE,
        help="1 for the state that a server's process is in: running, stopped, blocked or zombie.",
        labels=(*_LABELS, "state"),
    ),
    *(Metric(name=name, kind=kind, help=text, labels=_LABELS) for name, kind, text in _FIGURES),
    Metric(
        name=EXITS,
        kind=MetricKind.COUNTER,
        help="Ends of processes of this name, for whatever cause.",
        labels=_LABELS,
    ),
)

# By the kernel's letters, every other letter being of one that runs or could; the first is the worst.
_STATES: Final = (("stopped", "Tt"), ("blocked", "D"), ("running", ""), ("zombie", "ZXx"))
_SEARCH_MS: Final = 10_000
_MOST_NAMES: Final = 64


@dataclass(slots=True)
class _Server:
    """One server: where it is looked for (None: nowhere), its processes, and its ends by name and role."""

    name: str
    port: int | None
    lineage: Lineage
    exits: dict[tuple[str, str], int] = field(default_factory=dict)


class ProcessesSource:
    """`server_process_*`, and what `trees` knows. `wakes` is readable from an end until the next read."""

    name = "processes"

    def __init__(
        self,
        trees: Trees,
        servers: Iterable[ServerSettings],
        *,
        interval_ms: int = 1000,
        host: Procfs | None = None,
    ) -> None:
        """Goes on from the members that `trees` knows. `host` is this one by default."""
        self.interval_ms = interval_ms
        self._host = host or Procfs()
        self._trees = trees
        self._servers = [
            _Server(s.name, local_port(s.url), Lineage(self._host, trees.members(s.name))) for s in servers
        ]
        self._seen: frozenset[int] = frozenset()
        self._searched_at_ms: int | None = None
        self._boot_time_s = 0
        self._exits = Exits(self._is_alive)
        self.wakes = self._exits.wakes
        self._labels: dict[tuple[str, str], tuple[Labels, ...]] = {}

    def close(self) -> None:
        """Give the descriptors back; a read after that gives the same samples and is woken by nothing."""
        self._exits.close()

    def read(self, now_ms: int) -> list[Sample]:
        """No series of a server of which no process was ever seen. SourceError if /proc may not be read."""
        self._boot_time_s = self._boot_time_s or self._host.boot_time_s()
        pids = self._host.pids()
        is_new_root = self._take_roots(pids, now_ms)
        born = self._by_parent(pids if is_new_root else pids - self._seen)
        self._seen = pids
        samples = [sample for server in self._servers for sample in self._read_server(server, born, now_ms)]
        self._exits.watch(m.identity for server in self._servers for m in server.lineage.members)
        return samples

    def _take_roots(self, pids: Iterable[int], now_ms: int) -> bool:
        """Whether a server has another root than at the last read."""
        taken, unknown = [], []
        for server in self._servers:
            told = self._trees.root(server.name)
            if told is not None:
                taken.append(server.lineage.take_root(told))
            elif server.port is not None and not server.lineage.has_root:
                unknown.append(server)
        return any([*taken, *self._search(unknown, pids, now_ms)])

    def _search(self, unknown: Sequence[_Server], pids: Iterable[int], now_ms: int) -> list[bool]:
        """Of two processes that serve one port nobody can tell which is meant: neither."""
        at_ms = self._searched_at_ms
        if not unknown or (at_ms is not None and now_ms - at_ms < _SEARCH_MS):
            return []
        self._searched_at_ms = now_ms
        found = servers_by_port(self._host, pids)
        sole = [(server, found.get(server.port or 0, ())) for server in unknown]
        return [server.lineage.take_root(pids[0]) for server, pids in sole if len(pids) == 1]

    def _by_parent(self, pids: Iterable[int]) -> Mapping[int, list[Stat]]:
        born: defaultdict[int, list[Stat]] = defaultdict(list)
        for stat in map(self._host.stat, pids):
            if stat is not None:
                born[stat.parent_pid].append(stat)
        return born

    def _read_server(self, server: _Server, born: Mapping[int, Sequence[Stat]], now_ms: int) -> list[Sample]:
        present, ended = server.lineage.look(born)
        self._trees.replace(server.name, server.lineage.members)
        _count(server, present, ended)
        by_process: defaultdict[str, list[tuple[Member, Stat]]] = defaultdict(list)
        for member, stat in present:
            by_process[member.process].append((member, stat))
        values = {key: float(count) for key, count in self._exit_values(server).items()}
        for those in by_process.values():
            values |= self._values(server.name, those)
        return [Sample(labels, now_ms, value) for labels, value in values.items()]

    def _exit_values(self, server: _Server) -> dict[Labels, int]:
        return {
            Labels.of(EXITS, server=server.name, process=process, role=role): count
            for (process, role), count in server.exits.items()
        }

    def _values(self, server: str, those: Sequence[tuple[Member, Stat]]) -> dict[Labels, float]:
        """Rule 1, for the processes of one name."""
        stats = [stat for _, stat in those]
        # One left behind by the server before may hang for ever: it says nothing of this one.
        own = [stat for member, stat in those if not member.is_orphan] or stats
        states = {_state(stat.state) for stat in own}
        present = next(state for state, _ in _STATES if state in states)
        newest = max(stat.identity.start_ticks for stat in stats)
        figures = (
            sum(stat.resident_pages for stat in stats) * PAGE_BYTES,
            sum(stat.cpu_ticks for stat in stats) / TICKS_A_SECOND,
            self._boot_time_s + newest / TICKS_A_SECOND,
            any(member.is_orphan and not stat.is_over for member, stat in those),
        )
        values = [state == present for state, _ in _STATES] + list(figures)
        return dict(zip(self._series(server, those[0][0]), map(float, values), strict=True))

    def _series(self, server: str, member: Member) -> tuple[Labels, ...]:
        """In the order of `_values`: the states, then the figures."""
        key = server, member.process
        if key not in self._labels:
            who = {"server": server, "process": member.process, "role": member.role}
            self._labels[key] = (
                *(Labels.of(STATE, **who, state=state) for state, _ in _STATES),
                *(Labels.of(name, **who) for name, *_ in _FIGURES),
            )
        return self._labels[key]

    def _is_alive(self, identity: Identity) -> bool:
        stat = self._host.stat(identity.pid)
        return stat is not None and stat.identity == identity


def _state(letter: str) -> str:
    return next((state for state, letters in _STATES if letter in letters), "running")


def _count(server: _Server, present: Iterable[tuple[Member, Stat]], ended: Sequence[Member]) -> None:
    """Rules 2 and 3. A name that none has any more is forgotten if none of that name ever ended."""
    for name in sorted({_name(member) for member, _ in present if member.role != HELPER}):
        if len(server.exits) < _MOST_NAMES:
            server.exits.setdefault(name, 0)
    for member in ended:
        if _name(member) in server.exits and not member.is_orphan:
            server.exits[_name(member)] += 1
    here = {_name(member) for member, _ in present}
    server.exits = {name: count for name, count in server.exits.items() if count or name in here}


def _name(member: Member) -> tuple[str, str]:
    return member.process, member.role
