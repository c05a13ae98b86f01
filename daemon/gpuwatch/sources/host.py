"""Samples of the host and of the daemon's own process; never of other processes.

Figures go by psutil's names and units until a table makes metrics of them, so that a recording
can hold them as read.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import psutil

from gpuwatch.errors import SourceError
from gpuwatch.records import Labels, Metric, MetricKind, Sample

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class _Reading:
    figure: str
    metric: str
    help: str
    scale: float = 1.0
    kind: MetricKind = MetricKind.GAUGE
    has_path: bool = False


_READINGS: Final = (
    _Reading("cpu_percent", "host_cpu_ratio", "Share of all cores' time that was not idle.", 0.01),
    _Reading("load1", "host_load1", "Processes that run or wait to, averaged over a minute."),
    _Reading("mem_total", "host_memory_total_bytes", "Memory of the host."),
    _Reading("mem_available", "host_memory_available_bytes", "Memory that can be had without swapping."),
    _Reading("swap_used", "host_swap_used_bytes", "Swap in use."),
    _Reading("disk_free", "host_disk_free_bytes", "Space left where the state is kept.", has_path=True),
    _Reading("boot_time", "host_boot_time_seconds", "When the host started, in Unix time."),
    _Reading("own_rss", "gpuwatch_process_resident_memory_bytes", "Resident memory of the daemon."),
    _Reading(
        "own_cpu_seconds",
        "gpuwatch_process_cpu_seconds_total",
        "CPU time that the daemon used.",
        kind=MetricKind.COUNTER,
    ),
)

METRICS: Final = tuple(
    Metric(name=row.metric, kind=row.kind, help=row.help, labels=("path",) if row.has_path else ())
    for row in _READINGS
)


class HostFigures:
    """Reads figures of the host by psutil's names; CPU use is measured between two calls."""

    def __init__(self, state_dir: Path) -> None:
        """`state_dir` is the folder whose free space counts."""
        self._state_dir = state_dir
        self._busy_s, self._total_s = _cpu_seconds()

    def read(self) -> dict[str, float]:
        """Bytes, percent, seconds; a missing folder has no figure. SourceError if the host will not say."""
        try:
            memory = psutil.virtual_memory()
            figures = {
                "load1": os.getloadavg()[0],
                "mem_total": memory.total,
                "mem_available": memory.available,
                "swap_used": psutil.swap_memory().used,
                "boot_time": psutil.boot_time(),
            }
            return figures | self._cpu_percent() | self._disk_free()
        except (OSError, psutil.Error) as error:
            raise SourceError(f"read the host's figures: {error}; is /proc mounted and readable?") from error

    def _cpu_percent(self) -> dict[str, float]:
        busy_s, total_s = _cpu_seconds()
        busy, total = busy_s - self._busy_s, total_s - self._total_s
        self._busy_s, self._total_s = busy_s, total_s
        # The kernel's idle time may step back a little, so that busy is beyond its bounds.
        return {"cpu_percent": min(100.0, max(0.0, 100 * busy / total))} if total > 0 else {}

    def _disk_free(self) -> dict[str, float]:
        try:
            return {"disk_free": psutil.disk_usage(str(self._state_dir)).free}
        except FileNotFoundError:
            return {}


class HostSource:
    """The host, and what the daemon itself costs."""

    name = "host"

    def __init__(self, state_dir: Path, *, interval_ms: int = 1000) -> None:
        """`state_dir` is the folder whose free space counts."""
        self.interval_ms = interval_ms
        self._figures = HostFigures(state_dir)
        self._path = str(state_dir)
        self._own = psutil.Process()

    def read(self, now_ms: int) -> list[Sample]:
        """SourceError if the host will not say."""
        return host_samples(self._figures.read() | self._own_figures(), self._path, now_ms)

    def _own_figures(self) -> dict[str, float]:
        with self._own.oneshot():
            cpu = self._own.cpu_times()
            return {"own_rss": self._own.memory_info().rss, "own_cpu_seconds": cpu.user + cpu.system}


def host_samples(figures: Mapping[str, float], path: str, now_ms: int) -> list[Sample]:
    """Samples of the figures that are there; `path` is where `disk_free` was read."""
    return [
        Sample(
            Labels.of(row.metric, path=path if row.has_path else ""), now_ms, figures[row.figure] * row.scale
        )
        for row in _READINGS
        if row.figure in figures
    ]


def _cpu_seconds() -> tuple[float, float]:
    """(busy, total) of all cores. `guest` times are left out: the kernel counts them in `user` already."""
    times = psutil.cpu_times()
    total = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
    return total - times.idle - getattr(times, "iowait", 0.0), total
