"""Where the memory of each GPU is, as a ledger that sums to NVML's total; a pure function of series' values.

What a process holds is NVML's word. Its parts come of three witnesses, each of whom may be absent: the lines
of vLLM's start (weights, KV cache, CUDA graphs), the guest in the process (tensors, cache, sleep mode), and
vLLM's own page (the use of the KV cache, whether it sleeps). Where they say more than NVML, NVML is believed.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from gpuwatch.records import Labels

WEIGHTS: Final = "weights"
KV_CACHE: Final = "KV cache"
GRAPHS: Final = "CUDA graphs"
TENSORS: Final = "tensors"
ACTIVATIONS: Final = "activations"
CACHED: Final = "cached by the allocator"
CONTEXT: Final = "CUDA context and libraries"
ALL: Final = "all that it holds"
DRIVER: Final = "driver"
FREE: Final = "free"

_TITLE: Final = "VLLM::"
_ENGINE: Final = re.compile(r"_DP(\d+)")  # vLLM's number of the engine, as in `EngineCore_DP1`
_MOST_COMM: Final = 15  # where the kernel cuts the name of a process off
_POOLS: Final = {"weights": WEIGHTS, "kv_cache": KV_CACHE, "cudagraph": GRAPHS}  # sleep mode's tags
_CLAMPED: Final = "more was told, but NVML says that the process holds no more"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One line: `owner` is a server's process, another process, or the GPU's own; never below 0."""

    owner: str
    what: str
    bytes: int
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuLedger:
    """The parts and `unexplained_bytes`, which may be below 0, sum to `total_bytes` exactly."""

    gpu: str
    uuid: str
    total_bytes: int
    used_bytes: int
    free_bytes: int
    parts: tuple[Part, ...]

    @property
    def unexplained_bytes(self) -> int:
        """What NVML counts as used and nobody said to hold; below 0 where more was said than there is."""
        return self.total_bytes - sum(part.bytes for part in self.parts)


def ledgers(values: Mapping[Labels, float]) -> list[GpuLedger]:
    """One for each GPU that tells its memory; `values` are the newest of all series, none of them stale."""
    told = _Told(values)
    return [_ledger(gpu, uuid, told) for gpu, uuid in sorted(told.gpus(), key=lambda it: (len(it[0]), it))]


class _Process(NamedTuple):
    """A process as NVML sees it, by `gpu_process_memory_used_bytes`."""

    uuid: str
    name: str
    owner: str
    server: str
    user: str
    unit: str
    used_bytes: int

    @property
    def title(self) -> str:
        """`Worker_TP1` of `VLLM::Worker_TP1`."""
        return self.name.removeprefix(_TITLE)

    def is_called(self, worker: str) -> bool:
        """Whether this may be the process that is called `worker` elsewhere."""
        is_cut = len(self.name) == _MOST_COMM and worker.startswith(self.title)
        return self.title == worker or is_cut


class _Told:
    """The values by metric, and questions to them."""

    def __init__(self, values: Mapping[Labels, float]) -> None:
        self._by_metric: defaultdict[str, list[tuple[Labels, float]]] = defaultdict(list)
        for labels, value in values.items():
            self._by_metric[labels.metric].append((labels, value))

    def gpus(self) -> list[tuple[str, str]]:
        return [(labels.get("gpu"), labels.get("uuid")) for labels, _ in self._of("gpu_memory_total_bytes")]

    def of_gpu(self, metric: str, uuid: str) -> int | None:
        found = [value for labels, value in self._of(metric) if labels.get("uuid") == uuid]
        return int(found[0]) if found else None

    def processes(self, uuid: str) -> list[_Process]:
        """Servers first, then orphans, then the others; within that the largest first."""
        order = {"vllm": 0, "orphan": 1}
        found = [
            _Process(
                uuid,
                labels.get("process"),
                labels.get("owner"),
                labels.get("server"),
                labels.get("user"),
                labels.get("unit"),
                int(value),
            )
            for labels, value in self._of("gpu_process_memory_used_bytes")
            if labels.get("uuid") == uuid
        ]
        return sorted(found, key=lambda p: (order.get(p.owner, 2), p.server, -p.used_bytes, p.name))

    def guest(self, metric: str, process: _Process) -> list[tuple[Labels, int]]:
        """What a guest told of a process, matched by GPU, name and, where both name one, server."""
        return [
            (labels, int(value))
            for labels, value in self._of(metric)
            if labels.get("uuid") == process.uuid
            and process.is_called(labels.get("worker"))
            and process.server in {"", labels.get("server") or process.server}
        ]

    def guest_sum(self, metric: str, process: _Process) -> int:
        """The sum of what a guest told; 0 if it told nothing."""
        return sum(size for _, size in self.guest(metric, process))

    def start(self, metric: str, process: _Process) -> tuple[int, str] | None:
        """What the start said of a process, and who said it: workers of one server are alike."""
        its = [
            (labels, int(value))
            for labels, value in self._of(metric)
            if process.server in {"", labels.get("server")}
        ]
        if len({labels.get("server") for labels, _ in its}) != 1:
            return None  # of none, or nobody knows of which
        own = [it for it in its if process.is_called(it[0].get("worker"))]
        alike = [it for it in its if _kind(it[0].get("worker")) == _kind(process.title)]
        if not own and not alike:
            return None
        labels, size = max(own or alike, key=lambda it: it[1])
        return size, "" if own else f"as {labels.get('worker')} told"

    def kv_usage(self, process: _Process) -> float | None:
        """0 to 1, of the process's engine, or where its name tells none of all that its server has."""
        its = {
            labels.get("engine"): value
            for labels, value in self._of("vllm:kv_cache_usage_perc")
            if labels.get("server") == process.server
        }
        own = _ENGINE.search(process.title)
        found = [its[own[1]]] if own and own[1] in its else [*its.values()]
        return sum(found) / len(found) if found else None

    def sleeps(self, server: str) -> bool:
        """Whether vLLM's own page says that it gave memory back: level 0, a pause, is no such sleep."""
        states = {
            labels.get("sleep_state"): value
            for labels, value in self._of("vllm:engine_sleep_state")
            if labels.get("server") == server
        }
        is_awake = states.pop("awake", 1.0)
        return not is_awake and (not states or any(states.values()))

    def _of(self, metric: str) -> list[tuple[Labels, float]]:
        return self._by_metric.get(metric, [])


def _kind(worker: str) -> str:
    """`Worker` of `Worker_TP1`."""
    return worker.partition("_")[0]


def _ledger(gpu: str, uuid: str, told: _Told) -> GpuLedger:
    total, used, free = (told.of_gpu(f"gpu_memory_{what}_bytes", uuid) for what in ("total", "used", "free"))
    reserved = told.of_gpu("gpu_memory_reserved_bytes", uuid)
    parts = [part for process in told.processes(uuid) for part in _of_process(process, told)]
    if reserved is not None:
        parts.append(Part(owner="GPU", what=DRIVER, bytes=reserved, note="kept by driver and firmware"))
    parts.append(Part(owner="GPU", what=FREE, bytes=free or 0))
    return GpuLedger(
        gpu=gpu,
        uuid=uuid,
        total_bytes=total or 0,
        used_bytes=used or 0,
        free_bytes=free or 0,
        parts=tuple(parts),
    )


def _of_process(process: _Process, told: _Told) -> Iterable[Part]:
    if process.owner != "vllm":
        whose = (f"user {process.user}" if process.user else "", process.unit)
        kinds = {"orphan": "an orphan: its server is gone", "unknown": "nobody may look at it"}
        note = ", ".join(text for text in (kinds.get(process.owner, ""), *whose) if text)
        return [Part(owner=process.name, what=ALL, bytes=process.used_bytes, note=note)]
    owner = " ".join(word for word in (process.server, process.title) if word)
    account = _Account(owner, process.used_bytes)
    _book(account, process, told)
    return account.parts


@dataclass(slots=True)
class _Account:
    """Parts of what one process holds: each takes of what is left, in the order of booking."""

    owner: str
    left_bytes: int
    parts: list[Part] = field(default_factory=list)

    def book(self, what: str, size: int, *notes: str) -> None:
        """A part of `size`, or what is left if that is less."""
        taken = max(0, min(size, self.left_bytes))
        told = (*notes, _CLAMPED if taken < size else "")
        note = "; ".join(text for text in told if text)
        self.parts.append(Part(owner=self.owner, what=what, bytes=taken, note=note))
        self.left_bytes -= taken

    def rest(self, what: str) -> None:
        """All that is left."""
        self.book(what, self.left_bytes)


def _book(account: _Account, process: _Process, told: _Told) -> None:
    """Weights, KV cache and graphs first: these are known best; then the allocator's; the rest is CUDA's."""
    kept = _of_vllm(account, process, told) + told.guest_sum("cuda_sleep_pool_bytes", process)
    if not told.guest("cuda_allocator_allocated_bytes", process):
        account.rest(f"{ACTIVATIONS}, cache, {CONTEXT}" if account.parts else ALL)
        return
    tensors = told.guest_sum("cuda_allocator_allocated_bytes", process)
    account.book(ACTIVATIONS if kept else TENSORS, max(0, tensors - kept))
    account.book(CACHED, _cached(process, told, tensors))
    account.rest(CONTEXT)


def _of_vllm(account: _Account, process: _Process, told: _Told) -> int:
    """Book what vLLM allocates at its start.

    Gives how much of it torch counts among its tensors, less what the guest tells of sleep mode.
    """
    pools = _sleep_pools(process, told)
    tensors = 0
    for what, metric in (
        (WEIGHTS, "server_model_weights_bytes"),
        (KV_CACHE, "server_kv_cache_bytes"),
        (GRAPHS, "server_cuda_graphs_bytes"),
    ):
        use = _use(told.kv_usage(process)) if what == KV_CACHE else ""
        if what in pools:
            pool = pools[what]
            account.book(what, pool.mapped, use if pool.mapped else "", _asleep(pool.asleep))
        elif (start := _at_start(what, metric, process, told)) is not None:
            size, who = start
            is_asleep = what != GRAPHS and told.sleeps(process.server)
            account.book(what, 0 if is_asleep else size, *((_asleep(size),) if is_asleep else (use, who)))
            tensors += 0 if what == GRAPHS else size
    return tensors


def _at_start(what: str, metric: str, process: _Process, told: _Told) -> tuple[int, str] | None:
    """As the start's lines say, else for CUDA graphs what the guest found in their pools."""
    start = told.start(metric, process)
    if start is None and what == GRAPHS and (pools := told.guest_sum("cuda_graph_pool_bytes", process)):
        return pools, "their pools alone"
    return start


class _Pool(NamedTuple):
    mapped: int
    asleep: int


def _sleep_pools(process: _Process, told: _Told) -> dict[str, _Pool]:
    """What the guest says of sleep mode; of a vLLM that notes neither, its page says whether it is mapped."""
    found: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0])
    sleeps = told.sleeps(process.server)
    for labels, size in told.guest("cuda_sleep_pool_bytes", process):
        what = _POOLS.get(labels.get("tag"))
        if what is not None:
            state = labels.get("state")
            found[what][state == "asleep" or (state == "unknown" and sleeps)] += size
    return {what: _Pool(*sizes) for what, sizes in found.items()}


def _cached(process: _Process, told: _Told, tensors: int) -> int:
    """Slack in torch's own pool; before the first snapshot all that is reserved and not allocated."""
    if told.guest("cuda_allocator_slack_bytes", process):
        return told.guest_sum("cuda_allocator_slack_bytes", process)
    return max(0, told.guest_sum("cuda_allocator_reserved_bytes", process) - tensors)


def _use(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.0%} in use"


def _asleep(size: int) -> str:
    return f"asleep: {size / (1 << 30):.2f} GiB given back" if size else ""
