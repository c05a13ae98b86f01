"""Samples from NVML, NVIDIA's management library; reads only, and never asks for PCIe throughput.

A reading of one H200 takes about 10 ms. PCIe throughput would add 20 ms a direction, because the
driver measures while the caller waits.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any, Final

from gpuwatch.records import Labels, Metric, MetricKind, Sample
from gpuwatch.sources import readings
from gpuwatch.sources.gpus import Gpu, GpuLostError, Gpus
from gpuwatch.sources.processes import Owner, PsutilNames, owner_of
from gpuwatch.sources.readings import Question

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuwatch.sources.gpus import Nvml
    from gpuwatch.sources.processes import ProcessNames
    from gpuwatch.sources.trees import Trees

_PROCESSES: Final = Question("nvmlDeviceGetComputeRunningProcesses", (), ())
_MOST_CACHED: Final = 4096
_ARCHITECTURES: Final = {5: "volta", 6: "turing", 7: "ampere", 8: "ada", 9: "hopper", 10: "blackwell"}
_INFO: Final[tuple[tuple[str, Question, Callable[[Any], str]], ...]] = (
    ("name", Question("nvmlDeviceGetName", (), ()), str),
    ("serial", Question("nvmlDeviceGetSerial", (), ()), str),
    ("vbios_version", Question("nvmlDeviceGetVbiosVersion", (), ()), str),
    ("pci_bus_id", Question("nvmlDeviceGetPciInfo", (), ()), lambda pci: str(pci.busId)),
    ("architecture", Question("nvmlDeviceGetArchitecture", (), ()), lambda n: _ARCHITECTURES.get(n, str(n))),
    (
        "compute_capability",
        Question("nvmlDeviceGetCudaComputeCapability", (), ()),
        lambda version: f"{version[0]}.{version[1]}",
    ),
)
_VERSIONS: Final[tuple[tuple[str, str, Callable[[Any], str]], ...]] = (
    ("driver_version", "nvmlSystemGetDriverVersion", str),
    ("nvml_version", "nvmlSystemGetNVMLVersion", str),
    ("cuda_version", "nvmlSystemGetCudaDriverVersion", lambda v: f"{v // 1000}.{v % 1000 // 10}"),
)

METRICS: Final = (
    *readings.metrics(readings.READINGS),
    *readings.metrics(readings.STATIC_READINGS),
    Metric(
        name="gpu_process_memory_used_bytes",
        kind=MetricKind.GAUGE,
        help="Device memory of all processes of this name; owner is vllm, orphan, foreign or unknown.",
        labels=("gpu", "uuid", "process", "owner", "server", "user", "unit"),
    ),
    Metric(
        name="gpu_info",
        kind=MetricKind.GAUGE,
        help="1; the labels say what this GPU and its driver are.",
        labels=("gpu", "uuid", *(label for label, *_ in _INFO), *(label for label, *_ in _VERSIONS)),
    ),
)


class NvmlSource:
    """What changes by the second. `up{source="nvml",gpu,uuid}` is 0 for a GPU that answers nothing."""

    name = "nvml"

    def __init__(
        self,
        nvml: Nvml,
        *,
        names: ProcessNames | None = None,
        trees: Trees | None = None,
        interval_ms: int = 1000,
    ) -> None:
        """`names` looks up whose the processes are, on this host by default; touches nothing until read.

        `trees` knows which server has which process.
        """
        self.interval_ms = interval_ms
        self._trees = trees
        self._gpus = Gpus(nvml)
        self._names = names or PsutilNames()
        self._process_series: dict[tuple[int, str, Owner], Labels] = {}

    def read(self, now_ms: int) -> list[Sample]:
        """All readings of all GPUs; SourceError if NVML as a whole fails."""
        samples: list[Sample] = []
        for gpu in self._gpus.listed(now_ms):
            answered = self._read_gpu(gpu, now_ms)
            up = Labels.of("up", source=self.name, gpu=str(gpu.index), uuid=gpu.uuid)
            samples.append(Sample(up, now_ms, 1.0 if answered else 0.0))
            samples += answered
        return samples

    def _read_gpu(self, gpu: Gpu, now_ms: int) -> list[Sample]:
        if gpu.handle is None:
            return []
        try:
            samples = _read(self._gpus, gpu, readings.READINGS, now_ms)
            return samples + self._read_processes(gpu, now_ms)
        except GpuLostError:
            self._gpus.lose(gpu, now_ms)
            return []

    def _read_processes(self, gpu: Gpu, now_ms: int) -> list[Sample]:
        used: defaultdict[Owner, int] = defaultdict(int)
        for process in self._gpus.answer(gpu, _PROCESSES, now_ms) or ():
            if process.usedGpuMemory is not None:
                used[owner_of(process.pid, self._names, self._trees)] += process.usedGpuMemory
        return [Sample(self._process_labels(gpu, who), now_ms, float(total)) for who, total in used.items()]

    def _process_labels(self, gpu: Gpu, who: Owner) -> Labels:
        key = gpu.index, gpu.uuid, who
        if key not in self._process_series:
            if len(self._process_series) >= _MOST_CACHED:
                self._process_series.clear()
            self._process_series[key] = Labels.of(
                "gpu_process_memory_used_bytes", gpu=str(gpu.index), uuid=gpu.uuid, **who._asdict()
            )
        return self._process_series[key]


class NvmlStaticSource:
    """What a GPU is and where its limits lie: changes with a driver or a board, so it is read rarely."""

    name = "nvml_static"

    def __init__(self, nvml: Nvml, *, interval_ms: int = 60_000) -> None:
        """Touches nothing until read."""
        self.interval_ms = interval_ms
        self._gpus = Gpus(nvml)

    def read(self, now_ms: int) -> list[Sample]:
        """Limits and `gpu_info` of every GPU that answers; SourceError if NVML as a whole fails."""
        samples: list[Sample] = []
        for gpu in self._gpus.listed(now_ms):
            samples += self._read_gpu(gpu, now_ms)
        return samples

    def _read_gpu(self, gpu: Gpu, now_ms: int) -> list[Sample]:
        if gpu.handle is None:
            return []
        try:
            return [
                *_read(self._gpus, gpu, readings.STATIC_READINGS, now_ms),
                Sample(self._info(gpu, now_ms), now_ms, 1.0),
            ]
        except GpuLostError:
            self._gpus.lose(gpu, now_ms)
            return []

    def _info(self, gpu: Gpu, now_ms: int) -> Labels:
        labels = {"gpu": str(gpu.index), "uuid": gpu.uuid}
        for label, question, text in _INFO:
            answer = self._gpus.answer(gpu, question, now_ms)
            labels[label] = "" if answer is None else text(answer)
        for label, function, text in _VERSIONS:
            answer = self._gpus.version(function)
            labels[label] = "" if answer is None else text(answer)
        return Labels.of("gpu_info", **labels)


def _read(gpus: Gpus, gpu: Gpu, questions: tuple[Question, ...], now_ms: int) -> list[Sample]:
    samples: list[Sample] = []
    for first in questions:
        question, answer = first, gpus.answer(gpu, first, now_ms)
        if answer is None and first.otherwise and gpus.lacks(gpu, first, now_ms):
            question, answer = first.otherwise, gpus.answer(gpu, first.otherwise, now_ms)
        if answer is not None:
            samples += _samples(gpu, question, answer, now_ms)
    return samples


def _samples(gpu: Gpu, question: Question, answer: Any, now_ms: int) -> list[Sample]:  # noqa: ANN401  # NVML's structs
    series = gpu.series.get(question) or _series(gpu, question)
    values = [(labels, row.value(answer)) for labels, row in zip(series, question.readings, strict=True)]
    return [Sample(labels, now_ms, float(value)) for labels, value in values if value is not None]


def _series(gpu: Gpu, question: Question) -> tuple[Labels, ...]:
    gpu.series[question] = tuple(
        Labels.of(row.metric, gpu=str(gpu.index), uuid=gpu.uuid, **dict(row.labels))
        for row in question.readings
    )
    return gpu.series[question]
