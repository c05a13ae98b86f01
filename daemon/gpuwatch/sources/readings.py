"""What is asked of NVML and which metrics an answer makes, as tables; asks nothing itself.

A question is an NVML function and its arguments. A reading is a row: the metric, its help and the
conversion from NVML's unit (milliwatt, megahertz, percent, nanosecond) to the base unit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from gpuwatch.records import Metric, MetricKind

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

_COUNTER: Final = MetricKind.COUNTER
_MEGA: Final = 1_000_000
_UNKNOWN_PERFORMANCE_STATE: Final = 32  # NVML_PSTATE_UNKNOWN

NVML_MEMORY_V2: Final = 0x02000028  # nvmlMemory_v2: the struct's size and version, part of the driver's ABI
FIELD_VALUES: Final = "nvmlDeviceGetFieldValues"
FIELD_NAMES: Final = {82: "NVML_FI_DEV_MEMORY_TEMP", 230: "NVML_FI_DEV_GET_GPU_RECOVERY_ACTION"}
CLOCKS_EVENT_REASONS: Final = {
    0x001: "gpu_idle",
    0x002: "applications_clocks_setting",
    0x004: "sw_power_cap",
    0x008: "hw_slowdown",
    0x010: "sync_boost",
    0x020: "sw_thermal_slowdown",
    0x040: "hw_thermal_slowdown",
    0x080: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
}
_VIOLATION_POLICIES: Final = {
    0: "power",
    1: "thermal",
    2: "sync_boost",
    4: "low_utilization",
    5: "reliability",
}
_ECC_ERRORS: Final = {0: "corrected", 1: "uncorrected"}  # nvmlMemoryErrorType_t
_ECC_COUNTERS: Final = {0: "volatile", 1: "aggregate"}  # nvmlEccCounterType_t
_THRESHOLDS: Final = {0: "shutdown", 1: "slowdown", 2: "memory_max", 3: "gpu_max"}
_FIELD_VALUE_TYPES: Final = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")


@dataclass(frozen=True, slots=True)
class Reading:
    """A metric made of an answer; `value` gives base units, or None for no sample."""

    metric: str
    help: str
    value: Callable[[Any], float | None]
    kind: MetricKind = MetricKind.GAUGE
    labels: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """An NVML function of a device; `otherwise` is asked instead where the driver lacks it."""

    function: str
    arguments: tuple[Any, ...]
    readings: tuple[Reading, ...]
    otherwise: Question | None = None


def metrics(questions: tuple[Question, ...]) -> tuple[Metric, ...]:
    """The catalogue rows of a table, one for each metric."""
    found: dict[str, Metric] = {}
    for question in questions:
        for row in question.readings:
            labels = ("gpu", "uuid", *(name for name, _ in row.labels))
            found[row.metric] = Metric(name=row.metric, kind=row.kind, help=row.help, labels=labels)
    return tuple(found.values())


def _ask(function: str, *readings: Reading) -> Question:
    return Question(function, (), readings)


def field_value(field: Any) -> float:  # noqa: ANN401  # nvmlFieldValue_t
    """The value of a field: the member of the union that its type names."""
    return float(getattr(field.value, _FIELD_VALUE_TYPES[field.valueType]))


def _field(i: int) -> Callable[[Any], float | None]:
    return lambda fields: None if fields[i].nvmlReturn else field_value(fields[i])


def _item(i: int) -> Callable[[Sequence[int]], float]:
    return lambda answer: answer[i]


def _is_active(bit: int) -> Callable[[int], float]:
    return lambda reasons: float(bool(reasons & bit))


_MEMORY_V1: Final = (
    Reading("gpu_memory_total_bytes", "Physical device memory.", lambda m: m.total),
    Reading(
        "gpu_memory_used_bytes",
        "Allocated device memory; where no gpu_memory_reserved_bytes is given, the driver's own is in it.",
        lambda m: m.used,
    ),
    Reading("gpu_memory_free_bytes", "Device memory that can be allocated.", lambda m: m.free),
)
_MEMORY_V2: Final = (
    *_MEMORY_V1,
    Reading("gpu_memory_reserved_bytes", "Device memory kept by driver and firmware.", lambda m: m.reserved),
)

READINGS: Final = (
    Question(
        "nvmlDeviceGetMemoryInfo",
        (NVML_MEMORY_V2,),
        _MEMORY_V2,
        otherwise=Question("nvmlDeviceGetMemoryInfo", (), _MEMORY_V1),
    ),
    _ask(
        "nvmlDeviceGetUtilizationRates",
        Reading(
            "gpu_utilization_ratio",
            "Share of time in which a kernel ran; not how busy.",
            lambda u: u.gpu / 100,
        ),
        Reading(
            "gpu_memory_utilization_ratio",
            "Share of time in which device memory was read or written; not how full.",
            lambda u: u.memory / 100,
        ),
    ),
    _ask(
        "nvmlDeviceGetEncoderUtilization",
        Reading(
            "gpu_encoder_utilization_ratio",
            "Share of time in which the video encoder worked.",
            lambda answer: answer[0] / 100,
        ),
    ),
    _ask(
        "nvmlDeviceGetDecoderUtilization",
        Reading(
            "gpu_decoder_utilization_ratio",
            "Share of time in which the video decoder worked.",
            lambda answer: answer[0] / 100,
        ),
    ),
    Question(
        "nvmlDeviceGetTemperature",
        (0,),
        (Reading("gpu_temperature_celsius", "Temperature of the GPU die.", float),),
    ),
    Question(
        FIELD_VALUES,
        (list(FIELD_NAMES),),
        (
            Reading("gpu_memory_temperature_celsius", "Temperature of the device memory.", _field(0)),
            Reading(
                "gpu_recovery_action",
                "What the driver asks for: 0 nothing, 1 reset the GPU, 2 reboot the host, 3 end its use by "
                "peers, 4 end all use and reset, 5 recover the IMEX domain, 6 reset the bus, 7 reboot all.",
                _field(1),
            ),
        ),
    ),
    _ask(
        "nvmlDeviceGetMarginTemperature",
        Reading("gpu_temperature_margin_celsius", "Degrees left before the GPU slows itself down.", float),
    ),
    _ask(
        "nvmlDeviceGetPowerUsage",
        Reading("gpu_power_draw_watts", "Power drawn, averaged by the driver.", lambda mw: mw / 1000),
    ),
    _ask(
        "nvmlDeviceGetEnforcedPowerLimit",
        Reading("gpu_power_limit_watts", "The lowest of all power limits in force.", lambda mw: mw / 1000),
    ),
    _ask(
        "nvmlDeviceGetTotalEnergyConsumption",
        Reading(
            "gpu_energy_joules_total",
            "Energy used since the driver was loaded.",
            lambda mj: mj / 1000,
            _COUNTER,
        ),
    ),
    Question(
        "nvmlDeviceGetClockInfo",
        (1,),
        (Reading("gpu_sm_clock_hertz", "Present clock of the multiprocessors.", lambda mhz: mhz * _MEGA),),
    ),
    Question(
        "nvmlDeviceGetClockInfo",
        (2,),
        (Reading("gpu_memory_clock_hertz", "Present clock of the device memory.", lambda mhz: mhz * _MEGA),),
    ),
    _ask(
        "nvmlDeviceGetCurrentClocksEventReasons",
        Reading(
            "gpu_clocks_event_reasons",
            "Why the clocks are not higher: NVML's nvmlClocksEventReasons bit mask.",
            float,
        ),
        *(
            Reading(
                "gpu_clocks_event_active",
                "1 while this reason holds the clocks back, else 0.",
                _is_active(bit),
                labels=(("reason", reason),),
            )
            for bit, reason in CLOCKS_EVENT_REASONS.items()
        ),
    ),
    *(
        Question(
            "nvmlDeviceGetViolationStatus",
            (policy,),
            (
                Reading(
                    "gpu_violation_seconds_total",
                    "Time for which this policy held the clocks back.",
                    lambda v: v.violationTime / 1e9,
                    _COUNTER,
                    (("policy", name),),
                ),
            ),
        )
        for policy, name in _VIOLATION_POLICIES.items()
    ),
    *(
        Question(
            "nvmlDeviceGetTotalEccErrors",
            (error, counter),
            (
                Reading(
                    "gpu_ecc_errors_total",
                    "Memory errors; volatile: since the driver was loaded, aggregate: in the board's life.",
                    float,
                    _COUNTER,
                    (("error", error_name), ("counter", counter_name)),
                ),
            ),
        )
        for error, error_name in _ECC_ERRORS.items()
        for counter, counter_name in _ECC_COUNTERS.items()
    ),
    _ask(
        "nvmlDeviceGetRemappedRows",
        *(
            Reading(
                "gpu_remapped_rows",
                "Rows of device memory replaced by spare ones.",
                _item(i),
                labels=(("cause", cause),),
            )
            for i, cause in enumerate(("correctable", "uncorrectable"))
        ),
        Reading(
            "gpu_remapped_rows_pending",
            "1 while a row waits for a reset to be replaced.",
            lambda rows: rows[2],
        ),
        Reading("gpu_remapped_rows_failed", "1 after a row could not be replaced.", lambda rows: rows[3]),
    ),
    _ask(
        "nvmlDeviceGetPcieReplayCounter",
        Reading("gpu_pcie_replays_total", "Packets sent again over PCIe.", float, _COUNTER),
    ),
    _ask(
        "nvmlDeviceGetCurrPcieLinkGeneration",
        Reading("gpu_pcie_link_generation", "Present PCIe generation; lower when idle.", float),
    ),
    _ask(
        "nvmlDeviceGetCurrPcieLinkWidth",
        Reading("gpu_pcie_link_width", "Present PCIe lanes.", float),
    ),
    _ask(
        "nvmlDeviceGetPerformanceState",
        Reading(
            "gpu_performance_state",
            "P-state, 0 (highest) to 15.",
            lambda state: None if state == _UNKNOWN_PERFORMANCE_STATE else state,
        ),
    ),
)

STATIC_READINGS: Final = (
    *(
        Question(
            "nvmlDeviceGetTemperatureThreshold",
            (threshold,),
            (
                Reading(
                    "gpu_temperature_threshold_celsius",
                    "Temperature at which this board acts.",
                    float,
                    labels=(("threshold", name),),
                ),
            ),
        )
        for threshold, name in _THRESHOLDS.items()
    ),
    Question(
        "nvmlDeviceGetMaxClockInfo",
        (1,),
        (
            Reading(
                "gpu_sm_clock_max_hertz", "Highest clock of the multiprocessors.", lambda mhz: mhz * _MEGA
            ),
        ),
    ),
    Question(
        "nvmlDeviceGetMaxClockInfo",
        (2,),
        (Reading("gpu_memory_clock_max_hertz", "Highest clock of the memory.", lambda mhz: mhz * _MEGA),),
    ),
    _ask(
        "nvmlDeviceGetMaxPcieLinkGeneration",
        Reading("gpu_pcie_link_generation_max", "Highest PCIe generation of GPU and slot.", float),
    ),
    _ask(
        "nvmlDeviceGetMaxPcieLinkWidth",
        Reading("gpu_pcie_link_width_max", "Most PCIe lanes of GPU and slot.", float),
    ),
    _ask(
        "nvmlDeviceGetPowerManagementLimit",
        Reading("gpu_power_limit_set_watts", "The power limit that was set.", lambda mw: mw / 1000),
    ),
    _ask(
        "nvmlDeviceGetPowerManagementDefaultLimit",
        Reading("gpu_power_limit_default_watts", "The board's own power limit.", lambda mw: mw / 1000),
    ),
    _ask(
        "nvmlDeviceGetPowerManagementLimitConstraints",
        Reading("gpu_power_limit_min_watts", "Lowest power limit that can be set.", lambda mw: mw[0] / 1000),
        Reading("gpu_power_limit_max_watts", "Highest power limit that can be set.", lambda mw: mw[1] / 1000),
    ),
)
