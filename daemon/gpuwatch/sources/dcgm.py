"""Gives readings under dcgm-exporter's names, units and labels too, for rules and dashboards made for it.

It asks NVML nothing: each row of the table makes an alias of a sample that a source has read. Names and
units are those of dcgm-exporter up to 4.8; 4.9 renamed most of them. Whole numbers are cut or rounded as
DCGM does. What DCGM measures with counters of its own, `DCGM_FI_PROF_*`, is not there.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from gpuwatch.records import Labels, Sample
from gpuwatch.sources.events import XID_ERRORS, XIDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from gpuwatch.sources import Source

    _Series = tuple[tuple[Labels, Callable[[float], float]], ...]

_NVML_SOURCES: Final = frozenset({"nvml", "nvml_static", "events"})


def _same(value: float) -> float:
    return value


def _whole(value: float) -> float:
    return float(int(value))


def _percent(ratio: float) -> float:
    return float(round(ratio * 100))


def _megahertz(hertz: float) -> float:
    return float(round(hertz / 1e6))


def _mebibytes(value_bytes: float) -> float:
    return float(int(value_bytes) >> 20)


def _millijoules(joules: float) -> float:
    return float(round(joules * 1e3))


def _nanoseconds(seconds: float) -> float:
    return float(round(seconds * 1e9))


@dataclass(frozen=True, slots=True)
class Alias:
    """A name of DCGM's for our metric with these labels; `convert` takes our unit to DCGM's."""

    name: str
    metric: str
    convert: Callable[[float], float] = _same
    labels: tuple[tuple[str, str], ...] = ()


def _ecc(error: str, counter: str) -> tuple[tuple[str, str], ...]:
    return ("error", error), ("counter", counter)


ALIASES: Final = (
    Alias("DCGM_FI_DEV_SM_CLOCK", "gpu_sm_clock_hertz", _megahertz),
    Alias("DCGM_FI_DEV_MEM_CLOCK", "gpu_memory_clock_hertz", _megahertz),
    Alias("DCGM_FI_DEV_MAX_SM_CLOCK", "gpu_sm_clock_max_hertz", _megahertz),
    Alias("DCGM_FI_DEV_MAX_MEM_CLOCK", "gpu_memory_clock_max_hertz", _megahertz),
    Alias("DCGM_FI_DEV_CLOCK_THROTTLE_REASONS", "gpu_clocks_event_reasons"),
    Alias("DCGM_FI_DEV_CLOCKS_EVENT_REASONS", "gpu_clocks_event_reasons"),
    Alias("DCGM_FI_DEV_PSTATE", "gpu_performance_state"),
    Alias("DCGM_FI_DEV_GPU_TEMP", "gpu_temperature_celsius"),
    Alias("DCGM_FI_DEV_MEMORY_TEMP", "gpu_memory_temperature_celsius"),
    Alias("DCGM_FI_DEV_GPU_TEMP_LIMIT", "gpu_temperature_margin_celsius"),
    *(
        Alias(name, "gpu_temperature_threshold_celsius", labels=(("threshold", threshold),))
        for name, threshold in (
            ("DCGM_FI_DEV_SHUTDOWN_TEMP", "shutdown"),
            ("DCGM_FI_DEV_SLOWDOWN_TEMP", "slowdown"),
            ("DCGM_FI_DEV_MEM_MAX_OP_TEMP", "memory_max"),
            ("DCGM_FI_DEV_GPU_MAX_OP_TEMP", "gpu_max"),
        )
    ),
    Alias("DCGM_FI_DEV_POWER_USAGE", "gpu_power_draw_watts"),
    Alias("DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION", "gpu_energy_joules_total", _millijoules),
    Alias("DCGM_FI_DEV_ENFORCED_POWER_LIMIT", "gpu_power_limit_watts", _whole),
    Alias("DCGM_FI_DEV_POWER_MGMT_LIMIT", "gpu_power_limit_set_watts", _whole),
    Alias("DCGM_FI_DEV_POWER_MGMT_LIMIT_DEF", "gpu_power_limit_default_watts", _whole),
    Alias("DCGM_FI_DEV_POWER_MGMT_LIMIT_MIN", "gpu_power_limit_min_watts", _whole),
    Alias("DCGM_FI_DEV_POWER_MGMT_LIMIT_MAX", "gpu_power_limit_max_watts", _whole),
    Alias("DCGM_FI_DEV_GPU_UTIL", "gpu_utilization_ratio", _percent),
    Alias("DCGM_FI_DEV_MEM_COPY_UTIL", "gpu_memory_utilization_ratio", _percent),
    Alias("DCGM_FI_DEV_ENC_UTIL", "gpu_encoder_utilization_ratio", _percent),
    Alias("DCGM_FI_DEV_DEC_UTIL", "gpu_decoder_utilization_ratio", _percent),
    Alias("DCGM_FI_DEV_FB_TOTAL", "gpu_memory_total_bytes", _mebibytes),
    Alias("DCGM_FI_DEV_FB_FREE", "gpu_memory_free_bytes", _mebibytes),
    Alias("DCGM_FI_DEV_FB_USED", "gpu_memory_used_bytes", _mebibytes),
    Alias("DCGM_FI_DEV_FB_RESERVED", "gpu_memory_reserved_bytes", _mebibytes),
    *(
        Alias(name, "gpu_violation_seconds_total", _nanoseconds, (("policy", policy),))
        for name, policy in (
            ("DCGM_FI_DEV_POWER_VIOLATION", "power"),
            ("DCGM_FI_DEV_THERMAL_VIOLATION", "thermal"),
            ("DCGM_FI_DEV_SYNC_BOOST_VIOLATION", "sync_boost"),
            ("DCGM_FI_DEV_LOW_UTIL_VIOLATION", "low_utilization"),
            ("DCGM_FI_DEV_RELIABILITY_VIOLATION", "reliability"),
        )
    ),
    Alias("DCGM_FI_DEV_ECC_SBE_VOL_TOTAL", "gpu_ecc_errors_total", labels=_ecc("corrected", "volatile")),
    Alias("DCGM_FI_DEV_ECC_DBE_VOL_TOTAL", "gpu_ecc_errors_total", labels=_ecc("uncorrected", "volatile")),
    Alias("DCGM_FI_DEV_ECC_SBE_AGG_TOTAL", "gpu_ecc_errors_total", labels=_ecc("corrected", "aggregate")),
    Alias("DCGM_FI_DEV_ECC_DBE_AGG_TOTAL", "gpu_ecc_errors_total", labels=_ecc("uncorrected", "aggregate")),
    *(
        Alias(name, "gpu_remapped_rows", labels=(("cause", cause),))
        for name, cause in (
            ("DCGM_FI_DEV_CORRECTABLE_REMAPPED_ROWS", "correctable"),
            ("DCGM_FI_DEV_UNCORRECTABLE_REMAPPED_ROWS", "uncorrectable"),
        )
    ),
    Alias("DCGM_FI_DEV_ROW_REMAP_PENDING", "gpu_remapped_rows_pending"),
    Alias("DCGM_FI_DEV_ROW_REMAP_FAILURE", "gpu_remapped_rows_failed"),
    Alias("DCGM_FI_DEV_GET_GPU_RECOVERY_ACTION", "gpu_recovery_action"),
    Alias("DCGM_FI_DEV_PCIE_REPLAY_COUNTER", "gpu_pcie_replays_total"),
    Alias("DCGM_FI_DEV_PCIE_LINK_GEN", "gpu_pcie_link_generation"),
    Alias("DCGM_FI_DEV_PCIE_LINK_WIDTH", "gpu_pcie_link_width"),
    Alias("DCGM_FI_DEV_PCIE_MAX_LINK_GEN", "gpu_pcie_link_generation_max"),
    Alias("DCGM_FI_DEV_PCIE_MAX_LINK_WIDTH", "gpu_pcie_link_width_max"),
)
USED_SHARE: Final = "DCGM_FI_DEV_FB_USED_PERCENT"  # a ratio all the same
LAST_XID: Final = "DCGM_FI_DEV_XID_ERRORS"

_BY_METRIC: Final[dict[str, list[Alias]]] = defaultdict(list)
for _alias in ALIASES:
    _BY_METRIC[_alias.metric].append(_alias)


def with_dcgm_names(eyes: Sequence[Source], host: str) -> list[Source]:
    """The same sources; those that read NVML give aliases too, once `nvml_static` has said what a GPU is."""
    names = DcgmNames(host)
    return [_Named(eye, names) if eye.name in _NVML_SOURCES else eye for eye in eyes]


class _Named:
    """A source that gives aliases beside its samples."""

    def __init__(self, eye: Source, names: DcgmNames) -> None:
        self.name = eye.name
        self.interval_ms = eye.interval_ms
        self._eye = eye
        self._names = names

    def read(self, now_ms: int) -> list[Sample]:
        """SourceError as the source's own."""
        samples = self._eye.read(now_ms)
        return [*samples, *self._names.of(samples)]


class DcgmNames:
    """The aliases of one host's GPUs. Its sources read at the same time, each other metrics."""

    def __init__(self, host: str) -> None:
        """`host` is the label `Hostname`."""
        self._host = host
        self._gpus: dict[tuple[str, str], dict[str, str]] = {}
        self._series: dict[Labels, _Series] = {}
        self._xid_counts: dict[Labels, float] = {}
        self._last_xids: dict[tuple[str, str], int] = {}

    def of(self, samples: Sequence[Sample]) -> Iterator[Sample]:
        """What there is of these samples under DCGM's names."""
        by_metric: defaultdict[str, list[Sample]] = defaultdict(list)
        for sample in samples:
            by_metric[sample.labels.metric].append(sample)
        for info in by_metric["gpu_info"]:
            self._learn(info.labels)
        for metric, aliases in _BY_METRIC.items():
            for sample in by_metric[metric]:
                for labels, convert in self._series_of(sample.labels, aliases):
                    yield Sample(labels, sample.at_ms, convert(sample.value))
        yield from self._used_shares(by_metric)
        yield from self._xid_errors(by_metric[XID_ERRORS])

    def _learn(self, info: Labels) -> None:
        gpu = info.get("gpu")
        known = {
            "gpu": gpu,
            "UUID": info.get("uuid"),
            "pci_bus_id": info.get("pci_bus_id"),
            "device": f"nvidia{gpu}",
            "modelName": info.get("name"),
            "Hostname": self._host,
            "DCGM_FI_DRIVER_VERSION": info.get("driver_version"),
        }
        if self._gpus.get(_gpu(info)) != known:
            self._gpus[_gpu(info)] = known
            self._series = {}

    def _series_of(self, labels: Labels, aliases: Sequence[Alias]) -> _Series:
        """Nothing, and nothing remembered, of a GPU that is not known yet."""
        series = self._series
        if labels not in series and _gpu(labels) in self._gpus:
            series[labels] = tuple(
                (self._labels(alias.name, labels), alias.convert)
                for alias in aliases
                if all(labels.get(name) == value for name, value in alias.labels)
            )
        return series.get(labels, ())

    def _used_shares(self, by_metric: Mapping[str, Sequence[Sample]]) -> Iterator[Sample]:
        total, reserved = (
            {_gpu(sample.labels): sample.value for sample in by_metric[metric]}
            for metric in ("gpu_memory_total_bytes", "gpu_memory_reserved_bytes")
        )
        for used in by_metric["gpu_memory_used_bytes"]:
            gpu = _gpu(used.labels)
            room = total[gpu] - reserved.get(gpu, 0.0)
            if gpu in self._gpus and room > 0:
                yield Sample(self._labels(USED_SHARE, used.labels), used.at_ms, used.value / room)

    def _xid_errors(self, counters: Sequence[Sample]) -> Iterator[Sample]:
        """The last Xid of each GPU; of several in one read, one of them."""
        for counter in counters:
            if counter.value > self._xid_counts.get(counter.labels, counter.value):
                self._last_xids[_gpu(counter.labels)] = int(counter.labels.get("xid"))
            self._xid_counts[counter.labels] = counter.value
        for gpu, counter in {_gpu(counter.labels): counter for counter in counters}.items():
            if gpu in self._gpus:
                xid = self._last_xids.get(gpu, 0)
                yield Sample(self._xid_labels(counter.labels, xid), counter.at_ms, float(xid))

    def _xid_labels(self, labels: Labels, xid: int) -> Labels:
        meaning = XIDS.get(xid, "Unknown Error") if xid else "No Error"
        return self._labels(LAST_XID, labels).merged({"err_code": str(xid), "err_msg": meaning})

    def _labels(self, name: str, labels: Labels) -> Labels:
        return Labels.of(name, **self._gpus[_gpu(labels)])


def _gpu(labels: Labels) -> tuple[str, str]:
    return labels.get("gpu"), labels.get("uuid")
