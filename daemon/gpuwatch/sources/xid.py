"""Counts the Xid errors that NVML tells of as they happen; hears of nothing else and never waits for one.

Rule 1: each GPU has an event set of its own, so that one that is lost makes no other deaf.
Rule 2: a counter is 0 in the read that first gives it, so that `increase()` sees what made it appear.
Rule 3: a GPU that is lost keeps its counters: that it fell off the bus is an Xid too.
Rule 4: a GPU that cannot tell has no counters: 0 would say that nothing happened.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Final

from gpuwatch.errors import SourceError
from gpuwatch.records import Labels, Metric, MetricKind, Sample
from gpuwatch.sources.gpus import TIMEOUT, Gpu, GpuLostError, Gpus, code_of

if TYPE_CHECKING:
    from gpuwatch.sources.gpus import Nvml

XID_ERRORS: Final = "gpu_xid_errors_total"
# Those that say something of the hardware, and the two by which a kernel of the server itself ends it.
XIDS: Final = {
    13: "exception in a kernel",
    31: "page fault of a kernel",
    48: "double-bit ECC error",
    62: "internal controller halted",
    63: "row of memory remapped",
    64: "row could not be remapped",
    74: "NVLink error",
    79: "fallen off the bus",
    92: "many single-bit ECC errors",
    94: "contained memory error",
    95: "uncontained memory error",
    109: "context switch timed out",
    119: "GSP did not answer",
    120: "GSP failed",
    140: "unrecovered ECC error",
    143: "initialisation failed",
}
METRICS: Final = (
    Metric(
        name=XID_ERRORS,
        kind=MetricKind.COUNTER,
        help="Xid errors since gpuwatch began: "
        + ", ".join(f"{xid} {meaning}" for xid, meaning in XIDS.items())
        + "; others appear with their first.",
        labels=("gpu", "uuid", "xid"),
    ),
)

_XID_EVENTS: Final = 0x8  # nvmlEventTypeXidCriticalError; changes of clocks (0x10) come in floods
_MOST_EVENTS: Final = 256
_EVENTS: Final = "events"


class XidSource:
    """`gpu_xid_errors_total` of every GPU that tells of its Xid errors."""

    name = "xid"

    def __init__(self, nvml: Nvml, *, interval_ms: int = 1000) -> None:
        """Registers with the first read; what happened before is not told."""
        self.interval_ms = interval_ms
        self._nvml = nvml
        self._gpus = Gpus(nvml)
        self._sets: dict[str, object] = {}
        self._counts: dict[str, dict[int, int]] = {}
        self._given: set[tuple[str, int]] = set()
        self._series: dict[tuple[int, str, int], Labels] = {}

    def read(self, now_ms: int) -> list[Sample]:
        """The counters, with what happened since the last read; SourceError if NVML as a whole fails."""
        try:
            gpus = self._gpus.listed(now_ms)
            for gpu in gpus:
                self._listen(gpu, now_ms)
        except SourceError:
            self._sets.clear()  # closing NVML ended them
            raise
        return [self._sample(gpu, xid, now_ms) for gpu in gpus for xid in self._counts.get(gpu.uuid, ())]

    def _listen(self, gpu: Gpu, now_ms: int) -> None:
        if gpu.handle is None:
            self._forget(gpu)
            return
        try:
            if gpu.uuid not in self._sets:
                self._register(gpu, now_ms)
            if gpu.uuid in self._sets:
                self._take(gpu, now_ms)
        except GpuLostError:
            self._forget(gpu)
            self._gpus.lose(gpu, now_ms)

    def _register(self, gpu: Gpu, now_ms: int) -> None:
        events = self._gpus.tried(gpu, _EVENTS, partial(self._registered, gpu.handle), now_ms)
        if events is not None:
            self._sets[gpu.uuid] = events
            self._counts.setdefault(gpu.uuid, dict.fromkeys(XIDS, 0))

    def _registered(self, handle: object) -> object:
        events = self._nvml.nvmlEventSetCreate()
        try:
            self._nvml.nvmlDeviceRegisterEvents(handle, _XID_EVENTS, events)
        except self._nvml.NVMLError:
            self._nvml.nvmlEventSetFree(events)
            raise
        return events

    def _take(self, gpu: Gpu, now_ms: int) -> None:
        """Count what waits, as much as a read may take; a set that fails is registered anew."""
        counts = self._counts[gpu.uuid]
        try:
            for _ in range(_MOST_EVENTS):
                xid = int(self._nvml.nvmlEventSetWait_v2(self._sets[gpu.uuid], 0).eventData)
                counts[xid] = counts.get(xid, 0) + 1
        except self._nvml.NVMLError as error:
            if code_of(error) != TIMEOUT:
                self._forget(gpu)
                self._gpus.weigh(error, now_ms)

    def _forget(self, gpu: Gpu) -> None:
        if (events := self._sets.pop(gpu.uuid, None)) is not None:
            with suppress(self._nvml.NVMLError):
                self._nvml.nvmlEventSetFree(events)

    def _sample(self, gpu: Gpu, xid: int, now_ms: int) -> Sample:
        value = self._counts[gpu.uuid][xid] if (gpu.uuid, xid) in self._given else 0
        self._given.add((gpu.uuid, xid))
        return Sample(self._labels(gpu, xid), now_ms, float(value))

    def _labels(self, gpu: Gpu, xid: int) -> Labels:
        key = gpu.index, gpu.uuid, xid
        if key not in self._series:
            self._series[key] = Labels.of(XID_ERRORS, gpu=str(gpu.index), uuid=gpu.uuid, xid=str(xid))
        return self._series[key]
