"""Samples of torch's CUDA allocator in the processes that have a guest, and of what else guests tell.

A CUDA graph's pool looks free between two replays: the counters of each second are corrected by the last
snapshot, and without one the corrected series are left out. Of a server with sleep mode torch tells nothing
(`guest.allocator` says why), but its pools are told by tag.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from gpuwatch.errors import SourceError
from gpuwatch.guest.client import GuestError
from gpuwatch.records import Labels, Metric, MetricKind, Sample
from gpuwatch.sources import limits, ooms
from gpuwatch.sources.gpus import Gpus
from gpuwatch.sources.guests import Guests, Where
from gpuwatch.sources.ooms import Ooms
from gpuwatch.sources.trees import Trees

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from gpuwatch.sources.gpus import Nvml
    from gpuwatch.sources.guests import Device, Figures, Summary

_ALLOCATED: Final = "allocated_bytes.all.current"
_RESERVED: Final = "reserved_bytes.all.current"
SLACK: Final = "cuda_allocator_slack_bytes"
LARGEST: Final = "cuda_allocator_largest_free_block_bytes"
FRAGMENTS: Final = "cuda_allocator_fragments_bytes"
RELEASABLE: Final = "cuda_allocator_releasable_bytes"
GRAPHS: Final = "cuda_graph_pool_bytes"
FRAGMENTATION: Final = "cuda_allocator_fragmentation_ratio"
SLEEP_POOL: Final = "cuda_sleep_pool_bytes"

# PyTorch's own figures (`torch.cuda.memory_stats`) and the metrics they make.
FIGURES: Final = (
    (_ALLOCATED, "cuda_allocator_allocated_bytes", "Bytes that live tensors take."),
    (_RESERVED, "cuda_allocator_reserved_bytes", "Bytes the allocator counts as held of the driver."),
    ("active_bytes.all.current", "cuda_allocator_active_bytes", "Bytes in blocks that are used or awaited."),
    (
        "inactive_split_bytes.all.current",
        "cuda_allocator_inactive_split_bytes",
        "Bytes in free rests of split blocks, which cannot be given back; CUDA graphs use theirs.",
    ),
    ("num_alloc_retries", "cuda_allocator_retries_total", "Allocations that first had to empty the cache."),
    ("num_ooms", "cuda_allocator_ooms_total", "Allocations that failed for want of memory."),
)
_COUNTERS: Final = tuple(name for name, metric, _ in FIGURES if metric.endswith("_total"))
_MOST_COUNTED: Final = 256
_BY_WORKER: Final = ("gpu", "uuid", "worker", "server")


def _metric(name: str, text: str, *labels: str) -> Metric:
    kind = MetricKind.COUNTER if name.endswith("_total") else MetricKind.GAUGE
    return Metric(name=name, kind=kind, help=text, labels=(*_BY_WORKER, *labels))


METRICS: Final = (
    *(_metric(name, text) for _, name, text in FIGURES),
    _metric(SLACK, "Bytes reserved less allocated in torch's own pool: cached, by no tensor used."),
    _metric(LARGEST, "Bytes of the largest free block in torch's own pool."),
    _metric(FRAGMENTS, "Bytes free in torch's own pool that emptying the cache would not give back."),
    _metric(RELEASABLE, "Bytes that emptying the cache would give back to the driver."),
    _metric(
        GRAPHS,
        "Bytes reserved in pools of CUDA graphs, and of the program's own.",
    ),
    _metric(
        FRAGMENTATION,
        "1 less allocated by reserved, in torch's own pool.",
    ),
    _metric(
        SLEEP_POOL,
        "Bytes of vLLM's sleep mode by tag and state: mapped, asleep, or unknown where vLLM notes neither.",
        *("tag", "state"),
    ),
    *ooms.METRICS,
    *limits.METRICS,
)


class AllocatorSource:
    """`cuda_allocator_*` and `cuda_oom_*` of every process that a guest lives in, and what servers admit."""

    name = "allocator"

    def __init__(
        self,
        folder: Path,
        nvml: Nvml,
        trees: Trees | None = None,
        *,
        interval_ms: int = 1000,
        within_s: float = 1.0,
    ) -> None:
        """`folder` need not exist; a read takes at most `within_s`, and once more where a snapshot is due."""
        self.interval_ms = interval_ms
        self._guests = Guests(folder, trees or Trees(), within_s=within_s)
        self._ooms = Ooms(folder, self._guests.server_of)
        self._gpus = Gpus(nvml)
        self._indices: dict[str, str] = {}
        self._counted: dict[Where, dict[int, dict[str, int]]] = {}

    def read(self, now_ms: int) -> list[Sample]:
        """SourceError if the folder may not be read, or what lies in it not be taken."""
        try:
            self._ooms.read(now_ms)
            figures = self._guests.figures(now_ms)
        except GuestError as error:
            raise SourceError(str(error)) from error
        found = [*self._of_allocators(figures)]
        living = {where for where, *_ in found}
        found += [(where, metric, {}, value) for where, metric, value in self._ooms.figures(living)]
        self._learn_indices({where.uuid for where, *_ in found}, now_ms)
        samples = [
            Sample(self._labels(where, metric, more), now_ms, value) for where, metric, more, value in found
        ]
        return samples + [Sample(labels, now_ms, value) for labels, value in self._of_servers(figures)]

    def _of_allocators(self, figures: Iterable[Figures]) -> Iterator[_Found]:
        """By worker and GPU: two processes of one name on one GPU are added up."""
        tables: defaultdict[Where, _Table] = defaultdict(_Table)
        for process in figures:
            summaries = self._guests.summaries(process.pid)
            for device in process.devices:
                where = Where(device.uuid, process.worker, self._guests.server_of(process.pid))
                tables[where].add(device, summaries.get(device.uuid))
                self._count(where, process.pid, device)
        for where, table in tables.items():
            table.count(self._counted[where].values())
            for metric, more, value in table.values():
                yield where, metric, more, value

    def _count(self, where: Where, pid: int, device: Device) -> None:
        """Keep the counts of who is late or gone: a sum that falls would look like a counter begun anew."""
        its = self._counted.pop(where, {})
        its[pid] = {name: device.stats[name] for name in _COUNTERS if name in device.stats}
        if len(its) > _MOST_COUNTED:
            del its[next(iter(its))]
        if len(self._counted) >= _MOST_COUNTED:
            del self._counted[next(iter(self._counted))]
        self._counted[where] = its

    def _of_servers(self, figures: Iterable[Figures]) -> Iterator[tuple[Labels, float]]:
        by_server: defaultdict[str, list[Figures]] = defaultdict(list)
        for process in figures:
            by_server[self._guests.server_of(process.pid)].append(process)
        for server, its in by_server.items():
            if server:
                yield from limits.values(server, its)

    def _learn_indices(self, uuids: set[str], now_ms: int) -> None:
        """NVML is opened for it only where a guest has told of a GPU."""
        if any(uuids):
            with suppress(SourceError):
                self._indices |= {gpu.uuid: str(gpu.index) for gpu in self._gpus.listed(now_ms)}

    def _labels(self, where: Where, metric: str, more: dict[str, str]) -> Labels:
        """Without `gpu` where NVML does not know the GPU: a process numbers those that it sees by itself."""
        return Labels.of(metric, gpu=self._indices.get(where.uuid, ""), **where._asdict(), **more)


_Found = tuple[Where, str, dict[str, str], float]


class _Table:
    """The figures of one worker on one GPU, of one process or of several."""

    def __init__(self) -> None:
        self._stats: defaultdict[str, int] = defaultdict(int)
        self._sleeping: defaultdict[tuple[str, str], int] = defaultdict(int)
        self._summaries: list[Summary] = []
        self._processes = 0

    def add(self, device: Device, summary: Summary | None) -> None:
        for name, value in device.stats.items():
            self._stats[name] += value
        for pool in device.sleep_pools:
            self._sleeping[pool.tag, pool.state] += pool.bytes
        self._summaries += [] if summary is None else [summary]
        self._processes += 1

    def count(self, told: Iterable[dict[str, int]]) -> None:
        """The counters, also of processes that do not answer now."""
        self._stats.update(dict.fromkeys(self._stats.keys() & set(_COUNTERS), 0))
        for its in told:
            for name in its.keys() & self._stats.keys():
                self._stats[name] += its[name]

    def values(self) -> Iterator[tuple[str, dict[str, str], float]]:
        """Metric, labels beside those of the worker, and value."""
        for (tag, state), size in self._sleeping.items():
            yield SLEEP_POOL, {"tag": tag, "state": state}, float(size)
        figures = {metric: self._stats[name] for name, metric, _ in FIGURES if name in self._stats}
        is_seen = bool(figures) and len(self._summaries) == self._processes
        for metric, value in (figures | (self._seen() | self._corrected() if is_seen else {})).items():
            yield metric, {}, float(value)

    def _seen(self) -> dict[str, int]:
        """As the last snapshot found it."""
        inactive, releasable = (self._sum(name) for name in ("inactive_bytes", "releasable_bytes"))
        return {
            LARGEST: max(one.largest_free_block_bytes for one in self._summaries),
            FRAGMENTS: max(0, inactive - releasable),
            RELEASABLE: releasable,
            GRAPHS: self._sum("private_reserved_bytes"),
        }

    def _corrected(self) -> dict[str, float]:
        """Torch's counters of this second less what the last snapshot found in pools that are not its own."""
        if not {_ALLOCATED, _RESERVED} <= self._stats.keys():
            return {}
        reserved = self._stats[_RESERVED]
        own = reserved - self._sum("private_reserved_bytes")
        slack = max(0, reserved - self._stats[_ALLOCATED] - self._sum("private_inactive_bytes"))
        return {SLACK: slack} | ({FRAGMENTATION: min(1.0, slack / own)} if own > 0 else {})

    def _sum(self, name: str) -> int:
        return sum(getattr(one, name) for one in self._summaries)
