"""Where samples come from: NVML, the host, vLLM's server and processes, or a recording; decides nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from gpuwatch import clock
from gpuwatch.guest import wire
from gpuwatch.sources.allocator import AllocatorSource
from gpuwatch.sources.events import EventSource
from gpuwatch.sources.gpus import load_nvml
from gpuwatch.sources.host import HostSource
from gpuwatch.sources.kernel import kernel_source
from gpuwatch.sources.nvml import NvmlSource, NvmlStaticSource
from gpuwatch.sources.probe import ProbeSource
from gpuwatch.sources.processes import PsutilNames
from gpuwatch.sources.procfs import Procfs
from gpuwatch.sources.server_processes import ProcessesSource
from gpuwatch.sources.trees import Trees
from gpuwatch.sources.vllm import HealthSource, MetricsSource, local_session

if TYPE_CHECKING:
    from gpuwatch.config import Settings
    from gpuwatch.records import Sample
    from gpuwatch.sources.record import Recorder
    from gpuwatch.sources.recording import Recording

__all__ = [
    "AllocatorSource",
    "EventSource",
    "HealthSource",
    "HostSource",
    "MetricsSource",
    "NvmlSource",
    "NvmlStaticSource",
    "ProbeSource",
    "ProcessesSource",
    "Procfs",
    "PsutilNames",
    "Source",
    "Trees",
    "aliased",
    "load_nvml",
    "local_session",
    "of_host",
    "open_recording",
    "probes_of",
    "recorder",
]


class Source(Protocol):
    """Gives every series it has at every read, so that one no longer given has ended."""

    name: str
    interval_ms: int

    def read(self, now_ms: int) -> list[Sample]:
        """Samples at `now_ms`, none of them NaN, no series twice; SourceError if the read failed.

        A read takes a bounded time: NVML answers at once, HTTP has time-outs.
        """
        ...


def of_host(settings: Settings, trees: Trees) -> list[Source]:
    """The sources of this host; SourceError if NVIDIA's Python binding is not installed.

    `trees` comes to know which process belongs to which server.
    """
    nvml, every = load_nvml(), settings.sources
    eyes: list[Source] = [
        NvmlSource(nvml, trees=trees, interval_ms=every.nvml_interval),
        NvmlStaticSource(nvml),
        EventSource(nvml),
        HostSource(settings.state_dir, interval_ms=every.host_interval),
        ProcessesSource(trees, settings.servers),
        AllocatorSource(Path(wire.folder()), nvml, trees),
    ]
    if kernel := kernel_source(clock.SystemClock().now_ms() // 1000):
        eyes.append(kernel)
    for server in settings.servers:
        eyes += [
            MetricsSource(server.name, server.url, local_session(), interval_ms=every.metrics_interval),
            HealthSource(server.name, server.url, local_session(), interval_ms=every.health_interval),
        ]
    return aliased(eyes, settings)


def probes_of(settings: Settings) -> dict[str, ProbeSource]:
    """By server, those that ask nothing until they are told to."""
    return {
        server.name: ProbeSource(
            server.name,
            server.url,
            local_session(),
            key_file=server.api_key_file,
            canary_timeout_s=server.canary.timeout / 1000,
        )
        for server in settings.servers
    }


def aliased(eyes: list[Source], settings: Settings) -> list[Source]:
    """The same sources; those whose readings are wanted under other names too give them under both."""
    if "dcgm" not in settings.metrics.aliases:
        return eyes
    from gpuwatch.sources.dcgm import with_dcgm_names  # noqa: PLC0415 (only where it is asked for)

    return with_dcgm_names(eyes, settings.host)


def open_recording(path: Path) -> Recording:
    """A recording at its first tick; SourceError if it is none."""
    from gpuwatch.sources.recording import Recording  # noqa: PLC0415 (a daemon on a host needs none of it)

    return Recording(path)


def recorder(settings: Settings, path: Path) -> Recorder:
    """A recorder of this host, closed by `with`; SourceError if the file exists."""
    servers = {server.name: server.url for server in settings.servers}
    from gpuwatch.sources.record import Recorder  # noqa: PLC0415 (a daemon on a host needs none of it)

    return Recorder(path, load_nvml(), servers, state_dir=settings.state_dir)
