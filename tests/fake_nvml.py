"""An NVML that behaves: GPUs whose figures can be set, and switches for what goes wrong with real ones."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace

import pynvml

from gpuwatch.sources.processes import ProcessIdentity

GIB = 1 << 30


class FakeEventSet:
    """What was registered and has not been waited for; `opening` is the nvmlInit it belongs to."""

    def __init__(self, opening):
        self.opening = opening
        self.gpu = None
        self.types = 0
        self.waiting = []
        self.freed = False


@dataclass
class FakeGpu:
    """One GPU, in NVML's own units. A process is (pid, name, bytes); bytes None: the driver will not say."""

    uuid: str
    memory_total: int = 80 * GIB
    memory_reserved: int = GIB // 2
    memory_used: int | None = None  # None: what the processes take
    temperature: int = 40
    memory_temperature: int = 45
    temperature_margin: int = 47
    recovery_action: int | None = 0  # None: the driver is too old
    utilization: int = 0
    power_mw: int = 100_000
    energy_mj: int = 5_000_000
    clocks_event_reasons: int = 1
    ecc_errors: dict[tuple[int, int], int] = field(default_factory=dict)
    remapped_rows: tuple[int, int, int, int] = (0, 0, 0, 0)
    event_types: int = 0x1F  # ECC, P-states, Xid, clocks
    processes: list[tuple[int, str, int | None]] = field(default_factory=list)
    lost: bool = False

    @property
    def used(self) -> int:
        if self.memory_used is not None:
            return self.memory_used
        return sum(used or 0 for _, _, used in self.processes)


class FakeNvml:
    """Looks like pynvml's module. `unsupported` and `fail_once` hold function names; `calls` counts them."""

    NVMLError = pynvml.NVMLError
    NVMLLibraryMismatchError = pynvml.NVMLLibraryMismatchError

    def __init__(self, gpus: int = 1, *, memory_v2: bool = True) -> None:
        self.devices = [FakeGpu(f"GPU-{i:08d}-0000-0000-0000-000000000000") for i in range(gpus)]
        self.memory_v2 = memory_v2
        self.driver_missing = False
        self.version_mismatch = False
        self.unsupported: set[str] = set()
        self.fail_once: dict[str, int] = {}
        self.calls: Counter[str] = Counter()
        self.inits = 0
        self.openings = 0
        self.event_sets: list[FakeEventSet] = []

    # -- the whole ---------------------------------------------------------------------------------

    def nvmlInit(self):
        self.calls["nvmlInit"] += 1
        if self.driver_missing:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
        if self.version_mismatch:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)
        self.openings += self.inits == 0
        self.inits += 1

    def nvmlShutdown(self):
        if not self.inits:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)
        self.inits -= 1

    def nvmlDeviceGetCount(self):
        self._enter("nvmlDeviceGetCount")
        return len(self.devices)

    def nvmlSystemGetDriverVersion(self):
        self._enter("nvmlSystemGetDriverVersion")
        return "580.159.04"

    def nvmlSystemGetNVMLVersion(self):
        self._enter("nvmlSystemGetNVMLVersion")
        return "13.580.159.04"

    def nvmlSystemGetCudaDriverVersion(self):
        self._enter("nvmlSystemGetCudaDriverVersion")
        return 13000

    # -- one GPU; a handle is the GPU itself ----------------------------------------------------------

    def nvmlDeviceGetHandleByIndex(self, index):
        return self._gpu("nvmlDeviceGetHandleByIndex", self.devices[index])

    def nvmlDeviceGetMemoryInfo(self, handle, version=None):
        gpu = self._gpu("nvmlDeviceGetMemoryInfo", handle)
        if version is None:
            used = gpu.used + gpu.memory_reserved
            return SimpleNamespace(total=gpu.memory_total, used=used, free=gpu.memory_total - used)
        if not self.memory_v2:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND)
        free = gpu.memory_total - gpu.used - gpu.memory_reserved
        return SimpleNamespace(
            version=version, total=gpu.memory_total, reserved=gpu.memory_reserved, used=gpu.used, free=free
        )

    def nvmlDeviceGetFieldValues(self, handle, ids):
        gpu = self._gpu("nvmlDeviceGetFieldValues", handle)
        return [self._field(i, _FIELDS[i](gpu)) for i in ids]

    def _field(self, i, value):
        if value is None:
            return SimpleNamespace(fieldId=i, nvmlReturn=pynvml.NVML_ERROR_NOT_SUPPORTED)
        return SimpleNamespace(fieldId=i, nvmlReturn=0, valueType=1, value=SimpleNamespace(uiVal=value))

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        gpu = self._gpu("nvmlDeviceGetComputeRunningProcesses", handle)
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, _, used in gpu.processes]

    def __getattr__(self, function):
        """Every other function of a device, from the table below; AttributeError if it is not there."""
        if function not in _ANSWERS:
            raise AttributeError(function)
        return lambda handle, *arguments: _ANSWERS[function](self._gpu(function, handle), *arguments)

    # -- events --------------------------------------------------------------------------------------

    def happen(self, index, event_type, data):
        """Tell every set that is registered for such an event of this GPU."""
        for events in self.event_sets:
            if events.gpu is self.devices[index] and events.types & event_type and not events.freed:
                events.waiting.append(SimpleNamespace(eventType=event_type, eventData=data))

    def xid(self, index, number):
        self.happen(index, pynvml.nvmlEventTypeXidCriticalError, number)

    def nvmlEventSetCreate(self):
        self._enter("nvmlEventSetCreate")
        self.event_sets.append(FakeEventSet(self.openings))
        return self.event_sets[-1]

    def nvmlDeviceRegisterEvents(self, handle, types, events):
        events.gpu = self._gpu("nvmlDeviceRegisterEvents", handle)
        if types & ~events.gpu.event_types:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        events.types |= types

    def nvmlEventSetWait_v2(self, events, timeout_ms):
        self._enter("nvmlEventSetWait_v2")
        assert timeout_ms == 0, "a source does not wait"
        if events.freed or events.opening != self.openings:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        if events.waiting:
            return events.waiting.pop(0)
        lost = events.gpu is not None and events.gpu.lost
        raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST if lost else pynvml.NVML_ERROR_TIMEOUT)

    def nvmlEventSetFree(self, events):
        self._enter("nvmlEventSetFree")
        assert not events.freed, "freed twice"
        assert events.opening == self.openings, "freed after NVML was closed"
        events.freed = True

    # -- whose processes these are ---------------------------------------------------------------------

    def look_up(self, pid):
        """A `ProcessNames`: knows every process on a GPU, its name being its command too."""
        for gpu in self.devices:
            for seen, name, _ in gpu.processes:
                if seen == pid:
                    return ProcessIdentity(name, name, 1)
        return None

    # -- what goes wrong ---------------------------------------------------------------------------------

    def _enter(self, function):
        self.calls[function] += 1
        if self.driver_missing or not self.inits:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)
        if function in self.fail_once:
            raise pynvml.NVMLError(self.fail_once.pop(function))
        if function in self.unsupported:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    def _gpu(self, function, gpu):
        self._enter(function)
        if gpu.lost:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)
        return gpu


_FIELDS = {
    pynvml.NVML_FI_DEV_MEMORY_TEMP: lambda gpu: gpu.memory_temperature,
    pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION: lambda gpu: gpu.recovery_action,
}
_ANSWERS = {
    "nvmlDeviceGetUUID": lambda gpu: gpu.uuid,
    "nvmlDeviceGetName": lambda gpu: "NVIDIA Fake",
    "nvmlDeviceGetSerial": lambda gpu: "0000000000000",
    "nvmlDeviceGetVbiosVersion": lambda gpu: "96.00.A5.00.1A",
    "nvmlDeviceGetPciInfo": lambda gpu: SimpleNamespace(busId="00000000:00:06.0"),
    "nvmlDeviceGetArchitecture": lambda gpu: 9,
    "nvmlDeviceGetCudaComputeCapability": lambda gpu: (9, 0),
    "nvmlDeviceGetUtilizationRates": lambda gpu: SimpleNamespace(
        gpu=gpu.utilization, memory=gpu.utilization // 2
    ),
    "nvmlDeviceGetEncoderUtilization": lambda gpu: [gpu.utilization // 5, 100_000],
    "nvmlDeviceGetDecoderUtilization": lambda gpu: [gpu.utilization // 10, 100_000],
    "nvmlDeviceGetTemperature": lambda gpu, sensor: gpu.temperature,
    "nvmlDeviceGetMarginTemperature": lambda gpu: gpu.temperature_margin,
    "nvmlDeviceGetPowerUsage": lambda gpu: gpu.power_mw,
    "nvmlDeviceGetEnforcedPowerLimit": lambda gpu: 700_000,
    "nvmlDeviceGetTotalEnergyConsumption": lambda gpu: gpu.energy_mj,
    "nvmlDeviceGetClockInfo": lambda gpu, clock: {0: 1665, 1: 1665, 2: 3201, 3: 1545}[clock],
    "nvmlDeviceGetCurrentClocksEventReasons": lambda gpu: gpu.clocks_event_reasons,
    "nvmlDeviceGetViolationStatus": lambda gpu, policy: SimpleNamespace(
        referenceTime=0, violationTime=(policy + 1) * 1_500_000_000
    ),
    "nvmlDeviceGetTotalEccErrors": lambda gpu, error, counter: gpu.ecc_errors.get((error, counter), 0),
    "nvmlDeviceGetRemappedRows": lambda gpu: gpu.remapped_rows,
    "nvmlDeviceGetPcieReplayCounter": lambda gpu: 0,
    "nvmlDeviceGetCurrPcieLinkGeneration": lambda gpu: 5,
    "nvmlDeviceGetCurrPcieLinkWidth": lambda gpu: 16,
    "nvmlDeviceGetSupportedEventTypes": lambda gpu: gpu.event_types,
    "nvmlDeviceGetPerformanceState": lambda gpu: 0,
    "nvmlDeviceGetTemperatureThreshold": lambda gpu, threshold: (95, 89, 95, 87)[threshold],
    "nvmlDeviceGetMaxClockInfo": lambda gpu, clock: {1: 1980, 2: 3201}[clock],
    "nvmlDeviceGetMaxPcieLinkGeneration": lambda gpu: 5,
    "nvmlDeviceGetMaxPcieLinkWidth": lambda gpu: 16,
    "nvmlDeviceGetPowerManagementLimit": lambda gpu: 650_000,
    "nvmlDeviceGetPowerManagementDefaultLimit": lambda gpu: 700_000,
    "nvmlDeviceGetPowerManagementLimitConstraints": lambda gpu: [200_000, 700_000],
}
