"""What NVML's answers, refusals and losses become."""

import pynvml
import pytest
from tests.fake_nvml import GIB, FakeNvml

from gpuwatch.errors import SourceError
from gpuwatch.sources.nvml import NvmlSource, NvmlStaticSource
from gpuwatch.sources.processes import ProcessIdentity, PsutilNames, owner_of

SECOND, MINUTE = 1000, 60_000


def read(source, now_ms=0):
    """Values by metric and the labels that are not the GPU's."""
    return {
        (
            s.labels.metric,
            *(v for k, v in s.labels if k not in {"__name__", "gpu", "uuid", "source"}),
        ): s.value
        for s in source.read(now_ms)
    }


def gpus_up(source, now_ms):
    return {
        (s.labels.get("gpu"), s.labels.get("uuid")[:12]): s.value
        for s in source.read(now_ms)
        if s.labels.metric == "up"
    }


def source_of(nvml):
    return NvmlSource(nvml, names=nvml)


@pytest.mark.parametrize(
    ("metric", "value"),
    [
        (("gpu_memory_total_bytes",), 80 * GIB),
        (("gpu_memory_used_bytes",), 3 * GIB),
        (("gpu_memory_reserved_bytes",), GIB / 2),
        (("gpu_memory_free_bytes",), 76.5 * GIB),
        (("gpu_utilization_ratio",), 0.5),
        (("gpu_memory_utilization_ratio",), 0.25),
        (("gpu_temperature_celsius",), 40),
        (("gpu_memory_temperature_celsius",), 45),
        (("gpu_temperature_margin_celsius",), 47),
        (("gpu_power_draw_watts",), 100),
        (("gpu_power_limit_watts",), 700),
        (("gpu_energy_joules_total",), 5000),
        (("gpu_sm_clock_hertz",), 1.665e9),
        (("gpu_memory_clock_hertz",), 3.201e9),
        (("gpu_clocks_event_reasons",), 0x44),
        (("gpu_clocks_event_active", "sw_power_cap"), 1),
        (("gpu_clocks_event_active", "hw_thermal_slowdown"), 1),
        (("gpu_clocks_event_active", "gpu_idle"), 0),
        (("gpu_violation_seconds_total", "thermal"), 3),
        (("gpu_ecc_errors_total", "volatile", "uncorrected"), 2),
        (("gpu_ecc_errors_total", "aggregate", "corrected"), 0),
        (("gpu_remapped_rows", "correctable"), 1),
        (("gpu_remapped_rows", "uncorrectable"), 2),
        (("gpu_remapped_rows_pending",), 1),
        (("gpu_remapped_rows_failed",), 0),
        (("gpu_pcie_link_generation",), 5),
        (("gpu_performance_state",), 0),
        (("gpu_encoder_utilization_ratio",), 0.1),
        (("gpu_decoder_utilization_ratio",), 0.05),
        (("gpu_recovery_action",), 1),
        (("gpu_process_memory_used_bytes", "vllm", "VLLM::EngineCore"), 3 * GIB),
    ],
)
def test_a_reading_is_in_base_units(metric, value):
    nvml = FakeNvml()
    gpu = nvml.devices[0]
    gpu.processes = [(7, "VLLM::EngineCore", 3 * GIB)]
    gpu.utilization, gpu.clocks_event_reasons, gpu.recovery_action = 50, 0x44, 1
    gpu.ecc_errors, gpu.remapped_rows = {(1, 0): 2}, (1, 2, 1, 0)
    assert read(source_of(nvml))[metric] == value


def test_what_does_not_change_is_a_source_of_its_own():
    source = NvmlStaticSource(FakeNvml())
    values = read(source)
    assert source.interval_ms == MINUTE
    assert values["gpu_temperature_threshold_celsius", "slowdown"] == 89
    assert values["gpu_power_limit_max_watts",] == 700
    assert values["gpu_power_limit_set_watts",] == 650
    assert values["gpu_power_limit_default_watts",] == 700
    (info,) = [s.labels for s in source.read(0) if s.labels.metric == "gpu_info"]
    assert info.get("driver_version") == "580.159.04"
    assert info.get("cuda_version") == "13.0"
    assert info.get("compute_capability") == "9.0"
    assert info.get("architecture") == "hopper"


def test_a_driver_without_memory_v2_gives_no_reserved_memory_and_counts_it_as_used():
    values = read(source_of(FakeNvml(memory_v2=False)))
    assert ("gpu_memory_reserved_bytes",) not in values
    assert values["gpu_memory_used_bytes",] == GIB / 2


def test_memory_that_fails_once_does_not_change_its_meaning():
    nvml = FakeNvml()
    nvml.fail_once["nvmlDeviceGetMemoryInfo"] = pynvml.NVML_ERROR_UNKNOWN
    assert ("gpu_memory_used_bytes",) not in read(source_of(nvml))


def test_what_is_not_supported_is_asked_again_after_ten_minutes():
    nvml = FakeNvml()
    nvml.unsupported = {"nvmlDeviceGetPowerUsage"}
    source = source_of(nvml)
    for now_ms in range(0, 10 * MINUTE, SECOND):
        assert ("gpu_power_draw_watts",) not in read(source, now_ms)
    assert nvml.calls["nvmlDeviceGetPowerUsage"] == 1
    nvml.unsupported.clear()
    assert read(source, 10 * MINUTE)["gpu_power_draw_watts",] == 100


def test_a_field_that_is_not_supported_is_no_sample_and_the_others_are():
    nvml = FakeNvml()
    nvml.devices[0].recovery_action = None
    source = source_of(nvml)
    for now_ms in (0, SECOND):
        values = read(source, now_ms)
        assert ("gpu_recovery_action",) not in values
        assert values["gpu_memory_temperature_celsius",] == 45
    nvml.devices[0].recovery_action, nvml.devices[0].memory_temperature = 4, None
    values = read(source, 2 * SECOND)
    assert ("gpu_memory_temperature_celsius",) not in values
    assert values["gpu_recovery_action",] == 4


def test_all_fields_are_one_call_and_rarely_asked_where_none_is_supported():
    nvml = FakeNvml()
    source = source_of(nvml)
    read(source, 0)
    assert nvml.calls["nvmlDeviceGetFieldValues"] == 1
    nvml.devices[0].memory_temperature = nvml.devices[0].recovery_action = None
    for now_ms in range(SECOND, MINUTE, SECOND):
        read(source, now_ms)
    assert nvml.calls["nvmlDeviceGetFieldValues"] == 2


def test_a_binding_without_a_function_has_no_sample_of_it():
    class OlderBinding(FakeNvml):
        def __getattribute__(self, name):
            if name == "nvmlDeviceGetMarginTemperature":
                raise AttributeError(name)
            return super().__getattribute__(name)

        def __getattr__(self, name):
            if name == "nvmlDeviceGetMarginTemperature":
                raise AttributeError(name)
            return super().__getattr__(name)

    values = read(source_of(OlderBinding()))
    assert ("gpu_temperature_margin_celsius",) not in values
    assert ("gpu_temperature_celsius",) in values


def test_a_call_that_fails_once_is_missing_once():
    nvml = FakeNvml()
    nvml.fail_once["nvmlDeviceGetTemperature"] = pynvml.NVML_ERROR_UNKNOWN
    source = source_of(nvml)
    first, second = read(source, 0), read(source, SECOND)
    assert ("gpu_temperature_celsius",) not in first
    assert first["up",] == 1
    assert ("gpu_temperature_celsius",) in second


def test_a_lost_gpu_is_down_with_its_labels_and_the_others_go_on():
    nvml = FakeNvml(gpus=2)
    source = source_of(nvml)
    source.read(0)
    nvml.devices[0].lost = True
    for now_ms in (SECOND, 2 * SECOND, MINUTE, 2 * MINUTE):
        assert gpus_up(source, now_ms) == {("0", "GPU-00000000"): 0, ("1", "GPU-00000001"): 1}
        assert {s.labels.get("gpu") for s in source.read(now_ms) if s.labels.metric != "up"} == {"1"}
    nvml.devices[0].lost = False
    assert gpus_up(source, 3 * MINUTE) == {("0", "GPU-00000000"): 1, ("1", "GPU-00000001"): 1}


def test_a_lost_gpu_is_looked_for_every_ten_seconds():
    nvml = FakeNvml(gpus=2)
    source = source_of(nvml)
    source.read(0)
    nvml.devices[0].lost = True
    before = nvml.calls["nvmlDeviceGetHandleByIndex"]
    for now_ms in range(SECOND, 31 * SECOND, SECOND):
        source.read(now_ms)
    assert nvml.calls["nvmlDeviceGetHandleByIndex"] - before == 2 * 2


def test_a_gpu_that_is_lost_from_the_beginning_is_down_without_a_uuid():
    nvml = FakeNvml(gpus=2)
    nvml.devices[1].lost = True
    assert gpus_up(source_of(nvml), 0) == {("0", "GPU-00000000"): 1, ("1", ""): 0}


def test_a_gpu_that_is_no_longer_listed_is_down_and_the_indices_may_shift():
    nvml = FakeNvml(gpus=2)
    source = source_of(nvml)
    source.read(0)
    nvml.devices.pop(0)
    assert gpus_up(source, SECOND) == {("0", "GPU-00000000"): 0, ("0", "GPU-00000001"): 1}


def test_a_missing_driver_says_cause_and_cure_and_is_tried_every_ten_seconds():
    nvml = FakeNvml()
    nvml.driver_missing = True
    source = source_of(nvml)
    for now_ms in range(0, 30 * SECOND, SECOND):
        with pytest.raises(SourceError, match="not loaded; run modprobe nvidia"):
            source.read(now_ms)
    assert nvml.calls["nvmlInit"] == 3
    nvml.driver_missing = False
    assert read(source, 30 * SECOND)["up",] == 1


def test_a_driver_that_goes_away_and_comes_back_is_opened_again():
    nvml = FakeNvml()
    source, static = source_of(nvml), NvmlStaticSource(nvml)
    source.read(0)
    static.read(0)
    nvml.driver_missing = True
    with pytest.raises(SourceError):
        source.read(SECOND)
    assert nvml.inits == 0
    nvml.driver_missing = False
    assert read(source, 12 * SECOND)["up",] == 1


def test_an_updated_driver_says_that_a_reboot_is_due():
    nvml = FakeNvml()
    nvml.version_mismatch = True
    with pytest.raises(SourceError, match="different versions, as after an update; reboot"):
        source_of(nvml).read(0)


def test_processes_of_one_name_are_summed_and_carry_no_pid():
    nvml = FakeNvml()
    nvml.devices[0].processes = [(7, "python3", GIB), (8, "python3", GIB), (9, "python3", None)]
    (sample,) = [s for s in source_of(nvml).read(0) if s.labels.metric == "gpu_process_memory_used_bytes"]
    assert sample.value == 2 * GIB
    assert {name for name, _ in sample.labels} == {"__name__", "gpu", "uuid", "process", "owner"}


class Names(dict):
    def look_up(self, pid):
        return self.get(pid)


@pytest.mark.parametrize(
    ("process", "owner"),
    [
        (ProcessIdentity("VLLM::Worker_TP1", "VLLM::Worker_TP1", 1), "vllm"),
        (ProcessIdentity("python3", "/opt/bin/python3 /opt/bin/vllm serve /models/m", 1), "vllm"),
        (ProcessIdentity("python3", "python3 -m vllm.entrypoints.openai.api_server", 1), "vllm"),
        (ProcessIdentity("ptxas", "ptxas", 20), "vllm"),
        (ProcessIdentity("python3", "python3 train.py", 1), "foreign"),
        (ProcessIdentity("python3", "python3 train.py", 404), "foreign"),
        (None, "unknown"),
    ],
)
def test_a_process_is_vllms_if_an_ancestor_is(process, owner):
    names = Names({20: ProcessIdentity("VLLM::EngineCore", "", 10), 7: process})
    assert owner_of(7, names).owner == owner


@pytest.mark.parametrize(
    ("ancestors", "owner"),
    [
        ([("VLLM::EngineCore", 1), ("systemd", 0)], "orphan"),
        ([("VLLM::EngineCore", 50), ("systemd", 1), ("systemd", 0)], "orphan"),
        ([("VLLM::EngineCore", 50), ("containerd-shim-runc-v2", 1), ("systemd", 0)], "orphan"),
        ([("VLLM::EngineCore", 50), ("python3", 1), ("systemd", 0)], "vllm"),  # a script that uses vLLM
        ([("VLLM::EngineCore", 50), ("vllm serve", 1), ("systemd", 0)], "vllm"),
        ([("VLLM::EngineCore", 1)], "vllm"),  # the parent may not be looked at
    ],
)
def test_a_process_of_vllms_is_an_orphan_if_it_was_adopted(ancestors, owner):
    names, pid = Names({7: ProcessIdentity("VLLM::Worker_TP0", "", 8, "llm", "llm.service")}), 8
    for name, parent in ancestors:
        names[pid] = ProcessIdentity(name, name, parent)
        pid = parent
    its = ("llm", "llm.service") if owner == "orphan" else ("", "")
    assert owner_of(7, names) == ("VLLM::Worker_TP0", owner, "", *its)


def test_foreign_processes_are_told_apart_by_user_and_unit_and_vllms_are_not():
    class OfUsers(FakeNvml):
        def look_up(self, pid):
            command = "vllm serve" if pid > 20 else "train"
            return ProcessIdentity("python3", command, 0, f"user{pid % 2}", "a.service")

    nvml = OfUsers()
    nvml.devices[0].processes = [(pid, "python3", GIB) for pid in (10, 11, 12, 21, 22)]
    used = [s for s in source_of(nvml).read(0) if s.labels.metric == "gpu_process_memory_used_bytes"]
    assert {(s.labels.get("owner"), s.labels.get("user"), s.labels.get("unit")): s.value for s in used} == {
        ("foreign", "user0", "a.service"): 2 * GIB,
        ("foreign", "user1", "a.service"): GIB,
        ("vllm", "", ""): 2 * GIB,
    }


def test_a_process_that_is_its_own_ancestor_ends():
    assert (
        owner_of(7, Names({7: ProcessIdentity("a", "a", 8), 8: ProcessIdentity("b", "b", 7)})).owner
        == "foreign"
    )


def test_real_processes_are_looked_up_and_missing_ones_are_none():
    import os

    names = PsutilNames()
    for _ in range(2):
        seen = names.look_up(os.getpid())
        assert seen.parent_pid == os.getppid()
        assert "python" in seen.command_line or "pytest" in seen.command_line
    assert names.look_up(2**22 + 1) is None
