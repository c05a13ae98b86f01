"""Counts the Xid and ECC errors that NVML tells of as they happen; hears of nothing else and never waits.

Rule 1: each GPU has an event set of its own, so that one that is lost makes no other deaf.
Rule 2: a counter is 0 in the read that first gives it, so that `increase()` sees what made it appear.
Rule 3: a GPU that is lost keeps its counters: that it fell off the bus is an Xid too.
Rule 4: a GPU that cannot tell has no counters: 0 would say that nothing happened.
"""

from __future__ import annotations

import weakref
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from gpuwatch.errors import SourceError
from gpuwatch.records import Labels, Metric, MetricKind, Sample
from gpuwatch.sources.gpus import FUNCTION_NOT_FOUND, TIMEOUT, Gpu, GpuLostError, Gpus, code_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gpuwatch.sources.gpus import Nvml

XID_ERRORS: Final = "gpu_xid_errors_total"
ECC_EVENTS: Final = "gpu_ecc_events_total"
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
    Metric(
        name=ECC_EVENTS,
        kind=MetricKind.COUNTER,
        help="ECC errors that the driver told of since gpuwatch began: single_bit corrected, double_bit not.",
        labels=("gpu", "uuid", "kind"),
    ),
)


class _Counter(NamedTuple):
    """A counter of one GPU: the metric, and its one label beside the GPU's."""

    metric: str
    label: str
    value: str


# nvmlEventType*. Not among them: changes of clocks (0x10), which come in floods.
_XID: Final = 0x8
_ECC: Final = {
    0x1: _Counter(ECC_EVENTS, "kind", "single_bit"),
    0x2: _Counter(ECC_EVENTS, "kind", "double_bit"),
}
_WANTED: Final = _XID | 0x1 | 0x2
_SUPPORTED: Final = "nvmlDeviceGetSupportedEventTypes"
_MOST_EVENTS: Final = 256
_EVENTS: Final = "events"


class EventSource:
    """`gpu_xid_errors_total` and `gpu_ecc_events_total` of every GPU that tells of such errors."""

    name = "events"

    def __init__(self, nvml: Nvml, *, interval_ms: int = 1000) -> None:
        """Registers with the first read; what happened before is not told."""
        self.interval_ms = interval_ms
        self._nvml = nvml
        self._gpus = Gpus(nvml)
        self._sets: dict[str, object] = {}
        weakref.finalize(self, _free, nvml, self._sets)  # a reload makes another source
        self._counts: dict[str, dict[_Counter, int]] = {}
        self._given: set[tuple[str, _Counter]] = set()
        self._series: dict[tuple[int, str, _Counter], Labels] = {}

    def read(self, now_ms: int) -> list[Sample]:
        """The counters, with what happened since the last read; SourceError if NVML as a whole fails."""
        try:
            gpus = self._gpus.listed(now_ms)
            for gpu in gpus:
                self._listen(gpu, now_ms)
        except SourceError:
            self._sets.clear()  # closing NVML ended them
            raise
        return [self._sample(gpu, one, now_ms) for gpu in gpus for one in self._counts.get(gpu.uuid, ())]

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
        offered = self._gpus.tried(gpu, _SUPPORTED, partial(self._offered, gpu.handle), now_ms)
        types = (offered or 0) & _WANTED or _XID
        events = self._gpus.tried(gpu, _EVENTS, partial(self._registered, gpu.handle, types), now_ms)
        if events is not None:
            self._sets[gpu.uuid] = events
            self._counts[gpu.uuid] = dict.fromkeys(_counters(types), 0) | self._counts.get(gpu.uuid, {})

    def _offered(self, handle: object) -> int:
        """The types that this GPU can tell of; an older binding cannot ask."""
        function: Any = getattr(self._nvml, _SUPPORTED, None)
        if function is None:
            raise self._nvml.NVMLError(FUNCTION_NOT_FOUND)
        return int(function(handle))

    def _registered(self, handle: object, types: int) -> object:
        events = self._nvml.nvmlEventSetCreate()
        try:
            self._nvml.nvmlDeviceRegisterEvents(handle, types, events)
        except self._nvml.NVMLError:
            self._nvml.nvmlEventSetFree(events)
            raise
        return events

    def _take(self, gpu: Gpu, now_ms: int) -> None:
        """Count what waits, as much as a read may take; a set that fails is registered anew."""
        counts = self._counts[gpu.uuid]
        try:
            for _ in range(_MOST_EVENTS):
                event = self._nvml.nvmlEventSetWait_v2(self._sets[gpu.uuid], 0)
                counter = _ECC.get(int(event.eventType)) or _of_xid(int(event.eventData))
                counts[counter] = counts.get(counter, 0) + 1
        except self._nvml.NVMLError as error:
            if code_of(error) != TIMEOUT:
                self._forget(gpu)
                self._gpus.weigh(error, now_ms)

    def _forget(self, gpu: Gpu) -> None:
        if (events := self._sets.pop(gpu.uuid, None)) is not None:
            with suppress(self._nvml.NVMLError):
                self._nvml.nvmlEventSetFree(events)

    def _sample(self, gpu: Gpu, counter: _Counter, now_ms: int) -> Sample:
        value = self._counts[gpu.uuid][counter] if (gpu.uuid, counter) in self._given else 0
        self._given.add((gpu.uuid, counter))
        return Sample(self._labels(gpu, counter), now_ms, float(value))

    def _labels(self, gpu: Gpu, counter: _Counter) -> Labels:
        key = gpu.index, gpu.uuid, counter
        if key not in self._series:
            own = {counter.label: counter.value}
            self._series[key] = Labels.of(counter.metric, gpu=str(gpu.index), uuid=gpu.uuid, **own)
        return self._series[key]


def _free(nvml: Nvml, sets: dict[str, object]) -> None:
    for events in sets.values():
        with suppress(nvml.NVMLError):
            nvml.nvmlEventSetFree(events)


def _of_xid(xid: int) -> _Counter:
    return _Counter(XID_ERRORS, "xid", str(xid))


def _counters(types: int) -> Iterator[_Counter]:
    """Those that begin with 0 where these types are told of."""
    if types & _XID:
        yield from map(_of_xid, XIDS)
    yield from (counter for kind, counter in _ECC.items() if types & kind)
