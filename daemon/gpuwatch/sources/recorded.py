"""The sources of a recording: the real ones over what was recorded; never asks the machine it runs on."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final, cast

from gpuwatch.errors import SourceError
from gpuwatch.records import Labels, Sample
from gpuwatch.sources.allocator import FIGURES
from gpuwatch.sources.events import EventSource
from gpuwatch.sources.exposition import Exposition
from gpuwatch.sources.gpus import FUNCTION_NOT_FOUND, GPU_IS_LOST, TIMEOUT, Nvml, load_nvml
from gpuwatch.sources.host import host_samples
from gpuwatch.sources.nvml import NvmlSource, NvmlStaticSource
from gpuwatch.sources.processes import RecordedNames
from gpuwatch.sources.readings import FIELD_NAMES
from gpuwatch.sources.vllm import HealthAnswer, health_samples

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from gpuwatch.sources import Source
    from gpuwatch.sources.recording import Recording

VERSIONS: Final = {
    "nvmlSystemGetDriverVersion": "driver",
    "nvmlSystemGetNVMLVersion": "nvml",
    "nvmlSystemGetCudaDriverVersion": "cuda",
}
_REFUSALS: Final = frozenset(
    {
        "BrokenPipeError",
        "ConnectionAbortedError",
        "ConnectionError",
        "ConnectionRefusedError",
        "ConnectionResetError",
        "RemoteDisconnected",
    }
)
_DOUBLE: Final = 0  # NVML_VALUE_TYPE_DOUBLE


@dataclass(slots=True)
class _EventSet:
    gpu: int = -1
    types: int = 0
    told: int = 0


class RecordedNvml:
    """Stands in for pynvml's module: answers from recorded answers, refuses with the recorded errors.

    A GPU without a single recorded answer is lost; a function that was not recorded is not found.
    """

    def __init__(self, recording: Recording, part: str) -> None:
        """`part` is `present` for what changes or `static` for what does not."""
        nvml = load_nvml()
        self.NVMLError = nvml.NVMLError
        self.NVMLLibraryMismatchError = nvml.NVMLLibraryMismatchError
        self._recording = recording
        self._part = part

    def nvmlInit(self) -> None:  # noqa: N802  # NVML's name
        """Refuses if the host's NVML did."""
        self.nvmlDeviceGetCount()

    def nvmlShutdown(self) -> None:  # noqa: N802  # NVML's name
        """There is nothing to close."""
        raise self._refusal(1)

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802  # NVML's name
        """The GPUs recorded now."""
        if error := self._recording.present.get("nvml_error"):
            raise self._refusal(int(error["code"]))
        return len(self._recording.present["devices"])

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:  # noqa: N802  # NVML's name
        """The index itself."""
        self._device(index)
        return index

    def nvmlDeviceGetUUID(self, handle: int) -> str:  # noqa: N802  # NVML's name
        """Recorded once, with what does not change."""
        return str(self._recording.static["devices"][handle]["nvmlDeviceGetUUID"])

    def nvmlDeviceGetFieldValues(self, handle: int, ids: Sequence[int]) -> list[SimpleNamespace]:  # noqa: N802
        """Recorded by name; each field has an answer or an error of its own."""
        fields = self._device(handle).get("fields", {})
        return [_field(fields.get(FIELD_NAMES.get(i, ""), {"code": FUNCTION_NOT_FOUND})) for i in ids]

    def nvmlDeviceGetSupportedEventTypes(self, handle: int) -> int:  # noqa: N802  # NVML's name
        """Recorded with what does not change; refuses where the recorder did not ask."""
        known = self._recording.static["devices"][handle]
        return int(self._believed(known, "nvmlDeviceGetSupportedEventTypes"))

    def nvmlEventSetCreate(self) -> _EventSet:  # noqa: N802  # NVML's name
        """Refuses if the recorder heard of no events."""
        if self._recording.present.get("events") is None:
            raise self._refusal(FUNCTION_NOT_FOUND)
        return _EventSet()

    def nvmlDeviceRegisterEvents(self, handle: int, types: int, events: _EventSet) -> None:  # noqa: N802
        """From the present tick on."""
        events.gpu, events.types = handle, types
        events.told = sum(at_ms < self._recording.present_ms for at_ms, _ in self._recording.events)

    def nvmlEventSetWait_v2(self, events: _EventSet, _timeout_ms: int) -> Any:  # noqa: ANN401, N802
        """The next one recorded up to now."""
        while events.told < len(self._recording.events):
            _, event = self._recording.events[events.told]
            events.told += 1
            if event["gpu"] == events.gpu and event["eventType"] & events.types:
                return _struct(event)
        self._device(events.gpu)
        raise self._refusal(TIMEOUT)

    def nvmlEventSetFree(self, events: _EventSet) -> None:  # noqa: N802  # NVML's name
        """There is nothing to free."""

    def __getattr__(self, function: str) -> Callable[..., Any]:
        """Every other function, by its name and arguments as recorded."""
        if not function.startswith("nvml"):
            raise AttributeError(function)
        if key := VERSIONS.get(function):
            return partial(self._version, key)
        return partial(self._answer, function)

    def _answer(self, function: str, handle: int, *arguments: object) -> Any:  # noqa: ANN401  # NVML's structs
        return self._believed(self._device(handle), answer_key(function, arguments))

    def _believed(self, answers: Mapping[str, Any], key: str) -> Any:  # noqa: ANN401  # NVML's structs
        answer = answers.get(key, {"code": FUNCTION_NOT_FOUND})
        if isinstance(answer, dict) and "code" in answer:
            raise self._refusal(int(answer["code"]))
        return _struct(answer)

    def _version(self, key: str) -> Any:  # noqa: ANN401  # text or a number
        if (version := self._recording.static.get(key)) is None:
            raise self._refusal(FUNCTION_NOT_FOUND)
        return version

    def _device(self, index: int) -> Mapping[str, Any]:
        present: Mapping[str, Any] = self._recording.present["devices"][index]
        if not present:
            raise self._refusal(GPU_IS_LOST)
        return present if self._part == "present" else self._recording.static["devices"][index]

    def _refusal(self, code: int) -> Exception:
        return self.NVMLError(code)


def answer_key(function: str, arguments: Sequence[object]) -> str:
    """How a recording names an answer: `nvmlDeviceGetTemperature(0)`, without arguments the name alone."""
    return f"{function}({','.join(map(str, arguments))})" if arguments else function


class _Played:
    """A source of the recording: moves it to now, and gives nothing where it holds nothing."""

    def __init__(
        self, recording: Recording, name: str, interval_ms: int, read: Callable[[int], list[Sample]]
    ) -> None:
        self.name = name
        self.interval_ms = interval_ms
        self._recording = recording
        self._read = read

    def read(self, now_ms: int) -> list[Sample]:
        """SourceError where the recording has a gap, is over, or holds what no host would answer."""
        self._recording.seek(now_ms)
        if not self._recording.covers(now_ms):
            cause = self._recording.fault or "it has nothing for this moment"
            raise SourceError(f"play {self.name} of {self._recording.path}: {cause}")
        try:
            return self._read(now_ms)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            what = f"play {self.name} of {self._recording.path}: not a recording's answer"
            raise SourceError(f"{what}: {type(error).__name__}: {error}") from error


def recorded_sources(recording: Recording, servers: Sequence[str]) -> list[Source]:
    """The sources of the recorded host; `servers` are the names that its servers get."""
    names = RecordedNames()
    # The protocol's members beyond the declared ones are answered by __getattr__, which mypy cannot see.
    nvml = NvmlSource(cast("Nvml", RecordedNvml(recording, "present")), names=names)
    static = NvmlStaticSource(cast("Nvml", RecordedNvml(recording, "static")))
    events = EventSource(cast("Nvml", RecordedNvml(recording, "present")))

    def read_nvml(now_ms: int) -> list[Sample]:
        names.set(recording.present.get("processes", ()))
        return nvml.read(now_ms)

    played: list[Source] = [
        _Played(recording, nvml.name, nvml.interval_ms, read_nvml),
        _Played(recording, static.name, static.interval_ms, static.read),
        _Played(recording, events.name, events.interval_ms, events.read),
        _Played(recording, "host", 1000, partial(_host, recording)),
        _Played(recording, "allocator", 1000, partial(_allocator, recording)),
    ]
    for server in servers:
        page = partial(_metrics, recording, server, Exposition(server=server))
        played.append(_Played(recording, f"metrics:{server}", 2000, page))
        played.append(_Played(recording, f"health:{server}", 1000, partial(_health, recording, server)))
    return played


def _host(recording: Recording, now_ms: int) -> list[Sample]:
    figures = recording.present["host"]
    return host_samples(figures, str(figures.get("disk_path", "/")), now_ms)


def _allocator(recording: Recording, now_ms: int) -> list[Sample]:
    """Workers are told apart by their device: a pid would make new series at every restart."""
    values: dict[Labels, float] = {}
    for worker in (recording.present.get("torch") or {}).values():
        gpu = str(worker["device"])
        uuid = str(recording.static["devices"][int(gpu)]["nvmlDeviceGetUUID"])
        for figure, metric, _ in FIGURES:
            labels = Labels.of(metric, gpu=gpu, uuid=uuid, worker=f"rank{gpu}")
            values[labels] = values.get(labels, 0.0) + float(worker["stats"][figure])
    return [Sample(labels, now_ms, value) for labels, value in values.items()]


def _metrics(recording: Recording, server: str, exposition: Exposition, now_ms: int) -> list[Sample]:
    page = recording.of_server("vllm_metrics", server)
    if page is None:
        cause = recording.of_server("vllm_metrics_error", server) or "no answer"
        raise SourceError(f"read /metrics of server {server!r} in {recording.path}: {cause}")
    return exposition.samples(page, now_ms)


def _health(recording: Recording, server: str, now_ms: int) -> list[Sample]:
    status = recording.of_server("vllm_health", server)
    error = "" if status is not None else str(recording.of_server("vllm_health_error", server))
    if error and error not in _REFUSALS and "timeout" not in error.lower():
        raise SourceError(f"ask /health of server {server!r} in {recording.path}: {error}")
    return health_samples(server, HealthAnswer(status=status, error=error), now_ms)


def _field(answer: Any) -> SimpleNamespace:  # noqa: ANN401  # a number, or a mapping with the error's code
    if isinstance(answer, dict):
        return SimpleNamespace(nvmlReturn=int(answer["code"]))
    return SimpleNamespace(nvmlReturn=0, valueType=_DOUBLE, value=SimpleNamespace(dVal=answer))


def _struct(answer: Any) -> Any:  # noqa: ANN401  # JSON in, NVML's shapes out
    if isinstance(answer, dict):
        return SimpleNamespace(**answer)
    return [_struct(item) for item in answer] if isinstance(answer, list) else answer
