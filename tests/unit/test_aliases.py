"""Readings under dcgm-exporter's names: units, labels, and that what is written for it finds them."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tests.fake_nvml import GIB, FakeNvml

from gpuwatch import config, promql, sources
from gpuwatch.errors import ConfigError
from gpuwatch.sources import EventSource, NvmlSource, NvmlStaticSource
from gpuwatch.sources.dcgm import ALIASES, LAST_XID, USED_SHARE, with_dcgm_names

ROOT = Path(__file__).parents[2]
H200 = ROOT / "tests/recordings/h200-vllm024-incidents.jsonl.xz"
PACKS = ROOT.parent / "shared/conformance/rulepacks"
SECOND = 1000
MIB = 1 << 20

# What dcgm-exporter 4.8 shows of the GPU below: NVML's own answers in the units of its counter list.
SHOWN = {
    "DCGM_FI_DEV_SM_CLOCK": 1665,
    "DCGM_FI_DEV_MEM_CLOCK": 3201,
    "DCGM_FI_DEV_MAX_SM_CLOCK": 1980,
    "DCGM_FI_DEV_MAX_MEM_CLOCK": 3201,
    "DCGM_FI_DEV_CLOCK_THROTTLE_REASONS": 0x44,
    "DCGM_FI_DEV_CLOCKS_EVENT_REASONS": 0x44,
    "DCGM_FI_DEV_PSTATE": 0,
    "DCGM_FI_DEV_GPU_TEMP": 40,
    "DCGM_FI_DEV_MEMORY_TEMP": 45,
    "DCGM_FI_DEV_GPU_TEMP_LIMIT": 47,
    "DCGM_FI_DEV_SHUTDOWN_TEMP": 95,
    "DCGM_FI_DEV_SLOWDOWN_TEMP": 89,
    "DCGM_FI_DEV_MEM_MAX_OP_TEMP": 95,
    "DCGM_FI_DEV_GPU_MAX_OP_TEMP": 87,
    "DCGM_FI_DEV_POWER_USAGE": 79.591,
    "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION": 2_408_489_123,
    "DCGM_FI_DEV_ENFORCED_POWER_LIMIT": 700,
    "DCGM_FI_DEV_POWER_MGMT_LIMIT": 650,
    "DCGM_FI_DEV_POWER_MGMT_LIMIT_DEF": 700,
    "DCGM_FI_DEV_POWER_MGMT_LIMIT_MIN": 200,
    "DCGM_FI_DEV_POWER_MGMT_LIMIT_MAX": 700,
    "DCGM_FI_DEV_GPU_UTIL": 57,
    "DCGM_FI_DEV_MEM_COPY_UTIL": 28,
    "DCGM_FI_DEV_ENC_UTIL": 11,
    "DCGM_FI_DEV_DEC_UTIL": 5,
    "DCGM_FI_DEV_FB_TOTAL": 81_920,
    "DCGM_FI_DEV_FB_FREE": 78_335,  # cut, not rounded
    "DCGM_FI_DEV_FB_USED": 3_072,
    "DCGM_FI_DEV_FB_RESERVED": 512,
    USED_SHARE: (3 * GIB + 5) / (79.5 * GIB),
    LAST_XID: 0,
    "DCGM_FI_DEV_POWER_VIOLATION": 1_500_000_000,
    "DCGM_FI_DEV_THERMAL_VIOLATION": 3_000_000_000,
    "DCGM_FI_DEV_SYNC_BOOST_VIOLATION": 4_500_000_000,
    "DCGM_FI_DEV_LOW_UTIL_VIOLATION": 7_500_000_000,
    "DCGM_FI_DEV_RELIABILITY_VIOLATION": 9_000_000_000,
    "DCGM_FI_DEV_ECC_SBE_VOL_TOTAL": 1,
    "DCGM_FI_DEV_ECC_DBE_VOL_TOTAL": 2,
    "DCGM_FI_DEV_ECC_SBE_AGG_TOTAL": 3,
    "DCGM_FI_DEV_ECC_DBE_AGG_TOTAL": 4,
    "DCGM_FI_DEV_CORRECTABLE_REMAPPED_ROWS": 5,
    "DCGM_FI_DEV_UNCORRECTABLE_REMAPPED_ROWS": 6,
    "DCGM_FI_DEV_ROW_REMAP_PENDING": 1,
    "DCGM_FI_DEV_ROW_REMAP_FAILURE": 0,
    "DCGM_FI_DEV_GET_GPU_RECOVERY_ACTION": 2,
    "DCGM_FI_DEV_PCIE_REPLAY_COUNTER": 0,
    "DCGM_FI_DEV_PCIE_LINK_GEN": 5,
    "DCGM_FI_DEV_PCIE_LINK_WIDTH": 16,
    "DCGM_FI_DEV_PCIE_MAX_LINK_GEN": 5,
    "DCGM_FI_DEV_PCIE_MAX_LINK_WIDTH": 16,
}
LABELS = {
    "gpu": "0",
    "UUID": "GPU-00000000-0000-0000-0000-000000000000",
    "pci_bus_id": "00000000:00:06.0",
    "device": "nvidia0",
    "modelName": "NVIDIA Fake",
    "Hostname": "gpu-7",
    "DCGM_FI_DRIVER_VERSION": "580.159.04",
}


def busy(nvml):
    gpu = nvml.devices[0]
    gpu.memory_used, gpu.utilization, gpu.clocks_event_reasons = 3 * GIB + 5, 57, 0x44
    gpu.power_mw, gpu.energy_mj = 79_591, 2_408_489_123
    gpu.ecc_errors = {(0, 0): 1, (1, 0): 2, (0, 1): 3, (1, 1): 4}
    gpu.remapped_rows, gpu.recovery_action = (5, 6, 1, 0), 2
    return nvml


def eyes_of(nvml):
    """The aliased sources in an order in which `nvml_static` is read first."""
    return with_dcgm_names([NvmlStaticSource(nvml), NvmlSource(nvml, names=nvml), EventSource(nvml)], "gpu-7")


def aliases(eyes, now_ms=0):
    return [s for eye in eyes for s in eye.read(now_ms) if s.labels.metric.startswith("DCGM_")]


def test_every_alias_has_the_value_and_the_unit_that_dcgm_exporter_shows():
    samples = aliases(eyes_of(busy(FakeNvml())))
    assert {s.labels.metric: s.value for s in samples} == SHOWN
    assert len(samples) == len(SHOWN)
    assert all(isinstance(s.value, float) for s in samples)
    assert {alias.name for alias in ALIASES} | {USED_SHARE, LAST_XID} == set(SHOWN)


def test_an_alias_has_the_labels_of_dcgm_exporter_and_no_others():
    for sample in aliases(eyes_of(FakeNvml())):
        labels = dict(sample.labels.without("__name__"))
        if sample.labels.metric == LAST_XID:
            assert (labels.pop("err_code"), labels.pop("err_msg")) == ("0", "No Error")
        assert labels == LABELS


def test_a_source_keeps_its_own_samples_and_name():
    nvml = busy(FakeNvml())
    plain = NvmlSource(nvml, names=nvml)
    (named,) = with_dcgm_names([NvmlSource(nvml, names=nvml)], "h")
    assert (named.name, named.interval_ms) == (plain.name, plain.interval_ms)
    assert named.read(0) == plain.read(0)  # and no alias as long as nobody said what the GPU is


def test_aliases_ask_nvml_nothing():
    nvml, beside = FakeNvml(), FakeNvml()
    eyes = eyes_of(nvml)
    plain = (NvmlStaticSource(beside), NvmlSource(beside, names=beside), EventSource(beside))
    for now_ms in (0, SECOND):
        aliases(eyes, now_ms)
        for source in plain:
            source.read(now_ms)
    assert nvml.calls == beside.calls


def test_the_last_xid_stays_until_the_next():
    nvml = FakeNvml(gpus=2)
    eyes = eyes_of(nvml)

    def last(now_ms):
        found = [s for s in aliases(eyes, now_ms) if s.labels.metric == LAST_XID]
        return [(s.value, s.labels.get("err_code"), s.labels.get("err_msg")) for s in found]

    none = (0, "0", "No Error")
    assert last(0) == [none, none]
    nvml.xid(1, 79)
    assert last(SECOND) == [none, (79, "79", "fallen off the bus")]
    assert last(2 * SECOND) == [none, (79, "79", "fallen off the bus")]
    nvml.xid(1, 137)
    assert last(3 * SECOND) == [none, (79, "79", "fallen off the bus")]  # counted from the next read
    assert last(4 * SECOND) == [none, (137, "137", "Unknown Error")]


def test_a_lost_gpu_has_no_aliases_but_its_last_xid():
    nvml = FakeNvml(gpus=2)
    eyes = eyes_of(nvml)
    aliases(eyes)
    nvml.devices[1].lost = True
    lost = {s.labels.metric for s in aliases(eyes, SECOND) if s.labels.get("gpu") == "1"}
    assert lost == {LAST_XID}


def test_a_new_driver_changes_the_label():
    class Updated(FakeNvml):
        driver = "580.159.04"

        def nvmlSystemGetDriverVersion(self):
            return self.driver

    nvml = Updated()
    eyes = eyes_of(nvml)
    aliases(eyes)
    nvml.driver = "590.1"
    assert {s.labels.get("DCGM_FI_DRIVER_VERSION") for s in aliases(eyes, SECOND)} == {"590.1"}


def test_a_driver_without_memory_v2_shows_no_reserved_memory_and_the_share_of_all():
    nvml = FakeNvml(memory_v2=False)
    shown = {s.labels.metric: s.value for s in aliases(eyes_of(nvml))}
    assert "DCGM_FI_DEV_FB_RESERVED" not in shown
    assert shown[USED_SHARE] == 0.5 / 80


# -- the setting -------------------------------------------------------------------------------------


def test_names_that_are_not_known_are_refused_with_their_place(tmp_path):
    path = tmp_path / "gpuwatch.yaml"
    path.write_text("metrics:\n  aliases:\n    - dcgm\n    - nvidia_smi\n")
    with pytest.raises(ConfigError) as caught:
        config.load_settings(path)
    assert str(caught.value) == (f"{path}:4: metrics.aliases[1]: unknown names 'nvidia_smi'; known: dcgm")


def test_sources_are_aliased_only_where_it_is_asked_for():
    script = """
import sys
from gpuwatch import config, sources
from gpuwatch.config.settings import MetricsSettings
sources.of_host(config.Settings(), sources.Trees())
assert "gpuwatch.sources.dcgm" not in sys.modules
settings = config.Settings(metrics=MetricsSettings(aliases=["dcgm"]))
print(*(type(eye).__name__ for eye in sources.of_host(settings, sources.Trees()) if eye.name != "kernel"))
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout.split() == [*["_Named"] * 3, "HostSource", "ProcessesSource", "AllocatorSource"]


# -- a real GPU, and what is written for dcgm-exporter ------------------------------------------------


@pytest.fixture(scope="module")
def h200():
    """The aliases of a recorded H200 under load, and the tick that they come from."""
    recording = sources.open_recording(H200)
    now_ms = recording.start_ms + 380 * SECOND
    eyes = with_dcgm_names(recording.sources(), "gpu-7")
    aliases(eyes, now_ms)
    return Host(aliases(eyes, now_ms)), recording.present


class Host:
    """Answers queries at the instant of its samples."""

    def __init__(self, samples):
        self.samples = samples
        self.at_ms = samples[0].at_ms

    def select(self, matchers, after_ms, upto_ms):
        return [
            promql.Series(s.labels, [s.at_ms], [s.value])
            for s in self.samples
            if after_ms < s.at_ms <= upto_ms and all(m.matches(s.labels.get(m.name)) for m in matchers)
        ]

    def ask(self, expr):
        return promql.evaluate(promql.parse(expr), self, self.at_ms).value


def test_a_real_h200_is_shown_as_nvml_answered(h200):
    host, tick = h200
    nvml, static = tick["devices"][0], tick["static"]["devices"][0]
    expected = {
        "DCGM_FI_DEV_GPU_TEMP": nvml["nvmlDeviceGetTemperature(0)"],
        "DCGM_FI_DEV_MEMORY_TEMP": nvml["fields"]["NVML_FI_DEV_MEMORY_TEMP"],
        "DCGM_FI_DEV_POWER_USAGE": nvml["nvmlDeviceGetPowerUsage"] / 1000,
        "DCGM_FI_DEV_TOTAL_ENERGY_CONSUMPTION": nvml["nvmlDeviceGetTotalEnergyConsumption"],
        "DCGM_FI_DEV_SM_CLOCK": nvml["nvmlDeviceGetClockInfo(1)"],
        "DCGM_FI_DEV_MEM_CLOCK": nvml["nvmlDeviceGetClockInfo(2)"],
        "DCGM_FI_DEV_GPU_UTIL": nvml["nvmlDeviceGetUtilizationRates"]["gpu"],
        "DCGM_FI_DEV_FB_USED": nvml["nvmlDeviceGetMemoryInfo"]["used"] // MIB,
        "DCGM_FI_DEV_FB_FREE": nvml["nvmlDeviceGetMemoryInfo"]["free"] // MIB,
        "DCGM_FI_DEV_FB_TOTAL": nvml["nvmlDeviceGetMemoryInfo"]["total"] // MIB,
        "DCGM_FI_DEV_POWER_VIOLATION": nvml["nvmlDeviceGetViolationStatus(0)"]["violationTime"],
        "DCGM_FI_DEV_CLOCKS_EVENT_REASONS": nvml["nvmlDeviceGetCurrentClocksEventReasons"],
        "DCGM_FI_DEV_ENC_UTIL": nvml["nvmlDeviceGetEncoderUtilization"][0],
        "DCGM_FI_DEV_SLOWDOWN_TEMP": static["nvmlDeviceGetTemperatureThreshold(1)"],
    }
    shown = {s.labels.metric: s.value for s in host.samples}
    assert {name: shown[name] for name in expected} == expected
    assert shown["DCGM_FI_DEV_POWER_VIOLATION"] > 10**9


# Names of the counter list that dcgm-exporter comes with, but for those that need DCGM's own counters
# (DCGM_FI_PROF_*), NVLink's and the vGPU licence; the H200's driver gave no reserved memory to that recorder.
SHIPPED = """
SM_CLOCK MEM_CLOCK MEMORY_TEMP GPU_TEMP POWER_USAGE TOTAL_ENERGY_CONSUMPTION PCIE_REPLAY_COUNTER GPU_UTIL
MEM_COPY_UTIL ENC_UTIL DEC_UTIL XID_ERRORS FB_FREE FB_USED UNCORRECTABLE_REMAPPED_ROWS
CORRECTABLE_REMAPPED_ROWS ROW_REMAP_FAILURE
""".split()
DASHBOARD = (
    'DCGM_FI_DEV_GPU_TEMP{instance=~".*", gpu=~"0|1"}',
    'avg(DCGM_FI_DEV_GPU_TEMP{gpu=~".+"})',
    'sum(DCGM_FI_DEV_POWER_USAGE{gpu=~".+"})',
    'DCGM_FI_DEV_SM_CLOCK{gpu=~".+"} * 1000000',
    "DCGM_FI_DEV_FB_USED / (DCGM_FI_DEV_FB_USED + DCGM_FI_DEV_FB_FREE) * 100",
    "avg by (Hostname, modelName) (DCGM_FI_DEV_GPU_UTIL)",
    "DCGM_FI_DEV_XID_ERRORS * on (UUID) group_left (modelName) (DCGM_FI_DEV_GPU_TEMP * 0 + 1)",
)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_recorded_h200_has_what_dcgm_exporter_shows_by_default(h200, name):
    assert len(h200[0].ask(f"DCGM_FI_DEV_{name}")) == 1


@pytest.mark.parametrize("query", DASHBOARD)
def test_a_dashboards_query_finds_the_recorded_h200(h200, query):
    assert len(h200[0].ask(query)) == 1


def dcgm_rules():
    for path in sorted(PACKS.rglob("*.y*ml")) if PACKS.is_dir() else ():
        text = path.read_text()
        if "DCGM_FI_" in text:
            document = yaml.safe_load(text)
            for group in document.get("spec", document)["groups"]:
                yield from (rule["expr"] for rule in group["rules"] if "DCGM_FI_" in rule["expr"])


@pytest.mark.shared
@pytest.mark.skipif(not PACKS.is_dir(), reason="needs the shared folder")
def test_the_rules_of_others_for_dcgm_find_the_recorded_h200(h200):
    asked = list(dcgm_rules())
    assert len(asked) >= 7
    for expr in asked:
        assert h200[0].ask(expr), expr
