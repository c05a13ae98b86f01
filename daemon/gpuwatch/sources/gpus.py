"""Opens NVML, keeps the list of GPUs and remembers what each cannot answer; makes no samples.

Rule 1: a GPU is its UUID, and one that is lost keeps its labels.
Rule 2: what a GPU does not support is asked again every ten minutes, not every second.
Rule 3: NVML that cannot be opened is tried again every ten seconds.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

from gpuwatch.errors import SourceError
from gpuwatch.sources.readings import FIELD_VALUES

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from gpuwatch.records import Labels
    from gpuwatch.sources.readings import Question

RETRY_MS: Final = 10_000
ASK_AGAIN_MS: Final = 600_000

# Codes of nvmlReturn_t.
UNINITIALIZED: Final = 1
NO_PERMISSION: Final = 4
DRIVER_NOT_LOADED: Final = 9
TIMEOUT: Final = 10
LIBRARY_NOT_FOUND: Final = 12
FUNCTION_NOT_FOUND: Final = 13
GPU_IS_LOST: Final = 15
LIB_RM_VERSION_MISMATCH: Final = 18
UNKNOWN: Final = 999
_UNSUPPORTED: Final = frozenset({2, 3, NO_PERMISSION, FUNCTION_NOT_FOUND, 25, 26})
_CLOSED: Final = frozenset({UNINITIALIZED, DRIVER_NOT_LOADED, LIBRARY_NOT_FOUND, LIB_RM_VERSION_MISMATCH})
_MOST_INITS: Final = 8

_CAUSES: Final = {
    UNINITIALIZED: "NVML was closed; it is opened again at the next try",
    NO_PERMISSION: "no permission to open /dev/nvidia*; check the unit's DeviceAllow= and its groups",
    DRIVER_NOT_LOADED: "the NVIDIA driver is not loaded; run modprobe nvidia, or see in dmesg why it failed",
    LIBRARY_NOT_FOUND: "libnvidia-ml.so.1 is not there; install the NVIDIA driver, "
    "or in a container use its runtime",
    LIB_RM_VERSION_MISMATCH: "driver and library have different versions, as after an update; "
    "reboot, or stop all GPU processes and reload the nvidia modules",
}


class Nvml(Protocol):
    """The part of pynvml's module that is always there; questions are looked up by name."""

    NVMLError: type[Exception]
    NVMLLibraryMismatchError: type[Exception]

    def nvmlInit(self) -> None:  # noqa: N802  # NVML's name
        """Open NVML; counted."""

    def nvmlShutdown(self) -> None:  # noqa: N802  # NVML's name
        """Take back one nvmlInit."""

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802  # NVML's name
        """The number of GPUs."""
        ...

    def nvmlDeviceGetHandleByIndex(self, index: int, /) -> object:  # noqa: N802  # NVML's name
        """A GPU by its index."""
        ...

    def nvmlDeviceGetUUID(self, handle: object, /) -> str:  # noqa: N802  # NVML's name
        """The identity of a GPU."""
        ...

    def nvmlEventSetCreate(self) -> object:  # noqa: N802  # NVML's name
        """An event set, registered for nothing."""
        ...

    def nvmlDeviceRegisterEvents(self, handle: object, types: int, events: object, /) -> None:  # noqa: N802
        """Have a set told what happens to a GPU from now on; `types` is a bit mask."""

    def nvmlEventSetWait_v2(self, events: object, timeout_ms: int, /) -> Any:  # noqa: ANN401, N802
        """The next event of a set; an error of code `TIMEOUT` if there is none."""
        ...

    def nvmlEventSetFree(self, events: object, /) -> None:  # noqa: N802  # NVML's name
        """Give a set back."""


@dataclass(slots=True)
class Gpu:
    """A GPU that was seen; `handle` is None while it is lost. `series` caches the labels of its readings."""

    index: int
    uuid: str
    handle: object | None
    series: dict[Question, tuple[Labels, ...]] = field(default_factory=dict)


class GpuLostError(Exception):
    """The GPU no longer answers at all; the others may."""


def load_nvml() -> Nvml:
    """NVIDIA's own binding; SourceError if it is not installed. Needs no driver yet."""
    try:
        return cast("Nvml", importlib.import_module("pynvml"))
    except ImportError as error:
        raise SourceError("read NVML: the Python package nvidia-ml-py is missing; install it") from error


def code_of(error: Exception) -> int:
    """NVML's return code; the binding's own mismatch error means that the function is missing."""
    return int(getattr(error, "value", FUNCTION_NOT_FOUND))


class Gpus:
    """The GPUs of this host, as one source sees them."""

    def __init__(self, nvml: Nvml) -> None:
        """Touches nothing until `listed` is called."""
        self._nvml = nvml
        self._errors = (nvml.NVMLError, nvml.NVMLLibraryMismatchError)
        self._open = False
        self._count = -1
        self._gpus: list[Gpu] = []
        self._try_at_ms = 0
        self._failure = ""
        self._ask_at_ms: dict[tuple[str, Hashable], int] = {}

    def listed(self, now_ms: int) -> list[Gpu]:
        """Every GPU seen so far, lost ones too; SourceError while NVML as a whole fails."""
        if not self._open and self._failure and now_ms < self._try_at_ms:
            raise SourceError(self._failure)
        try:
            return self._listed(now_ms)
        except self._errors as error:
            raise self.failed(error, now_ms) from None  # its text says all

    def failed(self, error: Exception, now_ms: int) -> SourceError:
        """Close NVML after an error that concerns it as a whole; gives the error to raise."""
        self._close()
        self._try_at_ms = now_ms + RETRY_MS
        cause = _CAUSES.get(code_of(error), f"{error}; run nvidia-smi to see what it says")
        self._failure = f"read NVML: {cause}"
        return SourceError(self._failure)

    def lose(self, gpu: Gpu, now_ms: int) -> None:
        """Note that a GPU is lost; it is looked for again in a while."""
        gpu.handle = None
        self._try_at_ms = now_ms + RETRY_MS

    def answer(self, gpu: Gpu, question: Question, now_ms: int) -> Any | None:  # noqa: ANN401  # NVML's structs
        """NVML's answer; None if it fails this time or is not supported.

        GpuLostError if the GPU is gone, SourceError if NVML as a whole is.
        """
        return self.tried(gpu, question, partial(self._call, gpu, question), now_ms)

    def tried(self, gpu: Gpu, what: Hashable, call: Callable[[], Any], now_ms: int) -> Any | None:  # noqa: ANN401
        """As `answer`, of any call; `what` is how it is known when it turns out to be unsupported."""
        if self.lacks(gpu, what, now_ms):
            return None
        try:
            return call()
        except self._errors as error:
            self.weigh(error, now_ms)
            if code_of(error) in _UNSUPPORTED:
                self._ask_at_ms[gpu.uuid, what] = now_ms + ASK_AGAIN_MS
            return None

    def weigh(self, error: Exception, now_ms: int) -> None:
        """Raise GpuLostError or SourceError if an error means that the GPU, or NVML as a whole, is gone."""
        code = code_of(error)
        if code == GPU_IS_LOST:
            raise GpuLostError from None
        if code in _CLOSED:
            raise self.failed(error, now_ms) from None

    def lacks(self, gpu: Gpu, what: Hashable, now_ms: int) -> bool:
        """Whether the GPU said that it does not support this, and need not be asked again yet."""
        return self._ask_at_ms.get((gpu.uuid, what), now_ms) > now_ms

    def version(self, function: str) -> Any | None:  # noqa: ANN401  # text or a number
        """The answer of a system query such as nvmlSystemGetDriverVersion; None if it fails."""
        try:
            return getattr(self._nvml, function)()
        except self._errors:
            return None

    def _call(self, gpu: Gpu, question: Question) -> Any:  # noqa: ANN401  # NVML's structs
        function = getattr(self._nvml, question.function, None)
        if function is None:  # an older binding
            raise self._nvml.NVMLError(FUNCTION_NOT_FOUND)
        answer = function(gpu.handle, *question.arguments)
        if question.function == FIELD_VALUES and all(field.nvmlReturn for field in answer):
            raise self._nvml.NVMLError(answer[0].nvmlReturn)
        return answer

    def _listed(self, now_ms: int) -> list[Gpu]:
        if not self._open:
            self._nvml.nvmlInit()
            self._open, self._count = True, -1
        count = self._nvml.nvmlDeviceGetCount()
        search = now_ms >= self._try_at_ms and any(gpu.handle is None for gpu in self._gpus)
        if count != self._count or search:
            self._gpus = self._looked_up(count)
            self._count, self._try_at_ms = count, now_ms + RETRY_MS
        return self._gpus

    def _looked_up(self, count: int) -> list[Gpu]:
        answering = [gpu for i in range(count) if (gpu := self._at(i))]
        seen = {gpu.uuid for gpu in answering}
        lost = [Gpu(old.index, old.uuid, None) for old in self._gpus if old.uuid and old.uuid not in seen]
        taken = {gpu.index for gpu in (*answering, *lost)}
        never_seen = [Gpu(i, "", None) for i in range(count) if i not in taken]
        return sorted((*answering, *lost, *never_seen), key=lambda gpu: (gpu.index, gpu.uuid))

    def _at(self, index: int) -> Gpu | None:
        try:
            handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
            return Gpu(index, self._nvml.nvmlDeviceGetUUID(handle), handle)
        except self._errors as error:
            if code_of(error) in _CLOSED:
                raise
            return None

    def _close(self) -> None:
        """Take back every nvmlInit of this process: only then does the next one start afresh."""
        self._open = False
        for _ in range(_MOST_INITS):
            try:
                self._nvml.nvmlShutdown()
            except self._errors:
                return
