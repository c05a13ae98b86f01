"""Figures of torch's CUDA allocator, which guests in the watched processes tell; changes nothing there.

Rule 1: a guest that does not answer in time is passed over, and left in peace for a while.
Rule 2: what a guest says is checked before it is believed: whose it is, names, numbers, sizes.
Rule 3: a counter is 0 in the read that first gives it, so that `increase()` sees what made it appear.
Rule 4: an out-of-memory error is counted from the file that it leaves, whether its process lives or not.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
from msgspec import Meta

from gpuwatch.errors import SourceError
from gpuwatch.guest import client
from gpuwatch.guest.client import GuestError
from gpuwatch.records import Labels, Metric, MetricKind, Sample
from gpuwatch.sources.gpus import Gpus

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from gpuwatch.sources.gpus import Nvml

# PyTorch's own figures (`torch.cuda.memory_stats`) and the metrics they make.
FIGURES: Final = (
    ("allocated_bytes.all.current", "cuda_allocator_allocated_bytes", "Bytes that live tensors take."),
    (
        "reserved_bytes.all.current",
        "cuda_allocator_reserved_bytes",
        "Bytes the allocator holds of the driver.",
    ),
    ("active_bytes.all.current", "cuda_allocator_active_bytes", "Bytes in blocks that are used or awaited."),
    (
        "inactive_split_bytes.all.current",
        "cuda_allocator_inactive_split_bytes",
        "Bytes in free rests of split blocks, which cannot be given back.",
    ),
    ("num_alloc_retries", "cuda_allocator_retries_total", "Allocations that first had to empty the cache."),
    ("num_ooms", "cuda_allocator_ooms_total", "Allocations that failed for want of memory."),
)
OOM_EVENTS: Final = "cuda_oom_events_total"
OOM_ASKED: Final = "cuda_oom_asked_bytes"
OOM_FREE: Final = "cuda_oom_free_bytes"

METRICS: Final = tuple(
    Metric(
        name=name,
        kind=MetricKind.COUNTER if name.endswith("_total") else MetricKind.GAUGE,
        help=text,
        labels=("gpu", "uuid", "worker"),
    )
    for name, text in (
        *((name, text) for _, name, text in FIGURES),
        (
            OOM_EVENTS,
            "Out-of-memory errors that processes left word of, also in the moment before their end.",
        ),
        (OOM_ASKED, "Bytes that the last allocation to fail had asked for."),
        (OOM_FREE, "Bytes that the driver had free when the last allocation failed."),
    )
)

_MOST_GUESTS: Final = 128
_MOST_TALLIES: Final = 256
_MOST_ANSWER_BYTES: Final = 64 * 1024
_REST_MS: Final = 5000

_Bytes = Annotated[int, Meta(ge=0, le=1 << 60)]
_Index = Annotated[int, Meta(ge=0, le=1023)]
_Name = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_.:-]{1,48}\Z")]
_Uuid = Annotated[str, Meta(pattern=r"\A((GPU|MIG)-[A-Za-z0-9/-]{1,64})?\Z")]


class _Device(msgspec.Struct):
    device: _Index
    uuid: _Uuid
    stats: dict[str, _Bytes]


class _Figures(msgspec.Struct):
    worker: _Name
    devices: Annotated[list[_Device], Meta(max_length=32)]


class _Oom(msgspec.Struct):
    worker: _Name
    device: _Index
    uuid: _Uuid
    count: Annotated[int, Meta(ge=1, le=1_000_000)]
    asked_bytes: _Bytes
    free_bytes: _Bytes


@dataclass(slots=True)
class _Tally:
    """The out-of-memory errors of one worker on one GPU; `told` once its 0 has been given."""

    count: int = 0
    asked_bytes: int = 0
    free_bytes: int = 0
    told: bool = False


class AllocatorSource:
    """`cuda_allocator_*` and `cuda_oom_*` of every process that a guest lives in."""

    name = "allocator"

    def __init__(self, folder: Path, nvml: Nvml, *, interval_ms: int = 1000, within_s: float = 1.0) -> None:
        """`folder` need not exist; `within_s` bounds a read, whatever the guests do."""
        self.interval_ms = interval_ms
        self._folder = folder
        self._within_s = within_s
        self._gpus = Gpus(nvml)
        self._indices: dict[str, str] = {}
        self._rest_until_ms: dict[int, int] = {}
        self._tallies: dict[tuple[str, str], _Tally] = {}

    def read(self, now_ms: int) -> list[Sample]:
        """SourceError if the folder may not be read, or what lies in it not be taken."""
        try:
            sockets = client.listed(self._folder)
            self._take_ooms()
        except GuestError as error:
            raise SourceError(str(error)) from error
        values = _values(self._answers(sockets, now_ms))
        self._learn_indices({uuid for _, uuid, _ in values} | {uuid for uuid, _ in self._tallies}, now_ms)
        samples = [
            Sample(self._labels(metric, uuid, worker), now_ms, float(value))
            for (metric, uuid, worker), value in values.items()
        ]
        return samples + self._oom_samples({(uuid, worker) for _, uuid, worker in values}, now_ms)

    def _answers(self, sockets: Mapping[int, Path], now_ms: int) -> list[_Figures]:
        self._rest_until_ms = {pid: at for pid, at in self._rest_until_ms.items() if at > now_ms}
        awake = [pid for pid in sorted(sockets) if pid not in self._rest_until_ms][:_MOST_GUESTS]
        asked = {pid: sockets[pid] for pid in awake}
        found = []
        answers = client.ask_all(asked, "figures", within_s=self._within_s, most_bytes=_MOST_ANSWER_BYTES)
        for pid, answer in answers.items():
            try:
                found.append(_believed(answer))
            except GuestError as error:
                self._pass_over(pid, sockets[pid], error, now_ms)
        return found

    def _pass_over(self, pid: int, path: Path, error: GuestError, now_ms: int) -> None:
        """A socket that nobody listens at is what a killed process left."""
        if error.is_gone:
            with suppress(OSError):
                path.unlink()
        else:
            self._rest_until_ms[pid] = now_ms + _REST_MS

    def _take_ooms(self) -> None:
        for path in client.listed(self._folder, ".oom").values():
            try:
                event = msgspec.convert(client.take_oom(path), _Oom)
            except PermissionError as error:
                cure = f"to cure it, make this user the owner of {self._folder}"
                raise SourceError(f"take {path}: {error.strerror}; {cure}") from error
            except (GuestError, OSError, msgspec.ValidationError):
                continue  # not what a guest leaves
            self._count(event)

    def _count(self, event: _Oom) -> None:
        tally = self._tally(event.uuid, event.worker)
        tally.count += event.count
        tally.asked_bytes, tally.free_bytes = event.asked_bytes, event.free_bytes

    def _tally(self, uuid: str, worker: str) -> _Tally:
        """Of names without end the oldest are forgotten."""
        if (uuid, worker) not in self._tallies and len(self._tallies) >= _MOST_TALLIES:
            del self._tallies[next(iter(self._tallies))]
        return self._tallies.setdefault((uuid, worker), _Tally())

    def _oom_samples(self, living: set[tuple[str, str]], now_ms: int) -> list[Sample]:
        """Of those who told their figures, and of those who had an error, for as long as gpuwatch runs."""
        self._tallies = {key: t for key, t in self._tallies.items() if t.count or key in living}
        for uuid, worker in sorted(living - self._tallies.keys()):
            self._tally(uuid, worker)
        samples = []
        for (uuid, worker), tally in self._tallies.items():
            figures = {OOM_EVENTS: tally.count if tally.told else 0}
            if tally.count:
                figures |= {OOM_ASKED: tally.asked_bytes, OOM_FREE: tally.free_bytes}
            tally.told = True
            samples += [
                Sample(self._labels(metric, uuid, worker), now_ms, float(value))
                for metric, value in figures.items()
            ]
        return samples

    def _learn_indices(self, uuids: set[str], now_ms: int) -> None:
        """NVML is opened for it only where a guest has told of a GPU."""
        if any(uuids):
            with suppress(SourceError):
                self._indices |= {gpu.uuid: str(gpu.index) for gpu in self._gpus.listed(now_ms)}

    def _labels(self, metric: str, uuid: str, worker: str) -> Labels:
        """Without `gpu` where NVML does not know the GPU: a process numbers those that it sees by itself."""
        return Labels.of(metric, gpu=self._indices.get(uuid, ""), uuid=uuid, worker=worker)


def _believed(answer: dict[str, Any] | GuestError) -> _Figures:
    if isinstance(answer, GuestError):
        raise answer
    try:
        return msgspec.convert(answer, _Figures)
    except msgspec.ValidationError as error:
        raise GuestError(f"guest {answer['pid']}: {client.printable(error)}") from None


def _values(answers: list[_Figures]) -> dict[tuple[str, str, str], int]:
    """By metric, uuid and worker: two processes of one name on one GPU are added up."""
    values: dict[tuple[str, str, str], int] = {}
    for answer in answers:
        for device in answer.devices:
            for figure, metric, _ in FIGURES:
                if figure in device.stats:
                    key = metric, device.uuid, answer.worker
                    values[key] = values.get(key, 0) + device.stats[figure]
    return values
