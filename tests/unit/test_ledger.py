"""The ledger of a GPU's memory: it sums to NVML's total, whoever of its witnesses is absent or wrong."""

import json
import random
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner

from gpuwatch.cli import main
from gpuwatch.config import StoreSettings
from gpuwatch.config.size import Size
from gpuwatch.ledger import ledgers
from gpuwatch.records import Labels, ServerPhase, ServerStart, ServerState, StartOutcome
from gpuwatch.sources import open_recording
from gpuwatch.store import Changes, Disk, Store

GIB = 2**30
H200_BYTES, DRIVER_BYTES = 143_771 * 2**20, 645 * 2**20
# (weights, KV cache, CUDA graphs or None, NVML's used with the driver's 0.6 in it), GiB: an H200, vLLM 0.24.
MEASURED = {
    "0.6B, 30 %, graphs": (1.12, 39.67, None, 43.9),
    "4B, defaults, eager": (7.56, 119.89, None, 131.2),
    "4B, 85 %": (7.56, 110.42, None, 119.7),
    "4B, 16 %": (7.56, 13.96, None, 23.2),
    "4B, 16 %, graphs": (7.56, 13.79, 0.17, 23.2),
}


class Host:
    """The series of a host with one H200, in GiB; each method adds to it."""

    def __init__(self, used=1.0, *, gpu="0", reserved=DRIVER_BYTES / GIB):
        self.values, self.gpu, self.uuid = {}, gpu, f"GPU-{gpu}"
        self.board(used, reserved)

    def put(self, metric, gib, **labels):
        self.values[Labels.of(metric, **labels)] = float(round(gib * GIB))
        return self

    def here(self, metric, gib, **labels):
        return self.put(metric, gib, gpu=self.gpu, uuid=self.uuid, **labels)

    def board(self, used, reserved, gpu=None):
        self.gpu = gpu or self.gpu
        self.uuid = f"GPU-{self.gpu}"
        total = H200_BYTES / GIB
        self.here("gpu_memory_total_bytes", total).here("gpu_memory_used_bytes", used)
        self.here("gpu_memory_free_bytes", total - used - (reserved or 0))
        return self if reserved is None else self.here("gpu_memory_reserved_bytes", reserved)

    def process(self, gib, process="VLLM::EngineCore", owner="vllm", server="qwen", **labels):
        metric = "gpu_process_memory_used_bytes"
        return self.here(metric, gib, process=process, owner=owner, server=server, **labels)

    def start(self, weights=None, kv=None, graphs=None, worker="EngineCore", server="qwen"):
        for name, gib in (("model_weights", weights), ("kv_cache", kv), ("cuda_graphs", graphs)):
            if gib is not None:
                self.put(f"server_{name}_bytes", gib, server=server, worker=worker)
        return self

    def guest(self, worker="EngineCore", server="qwen", **gib):
        for name, value in gib.items():
            metric = f"cuda_{name}_bytes" if name == "graph_pool" else f"cuda_allocator_{name}_bytes"
            self.here(metric, value, worker=worker, server=server)
        return self

    def asleep(self, **states):
        """`weights=("asleep", 7.56)`."""
        for tag, (state, gib) in states.items():
            self.here("cuda_sleep_pool_bytes", gib, worker="EngineCore", server="qwen", tag=tag, state=state)
        return self

    def ledger(self):
        (one,) = ledgers(self.values)
        assert sum(part.bytes for part in one.parts) + one.unexplained_bytes == one.total_bytes
        assert all(part.bytes >= 0 for part in one.parts)
        return one

    def lines(self):
        """GiB by what, of the parts that are no process of others and not the GPU's own."""
        return {p.what: round(p.bytes / GIB, 2) for p in self.ledger().parts if p.owner != "GPU"}

    def notes(self):
        return {part.what: part.note for part in self.ledger().parts if part.note}


# -- the lines of one server -----------------------------------------------------------------------------


@pytest.mark.parametrize("measured", MEASURED.values(), ids=MEASURED)
def test_of_measured_servers_all_but_two_in_a_hundred_is_explained(measured):
    weights, kv_cache, graphs, used = measured
    host = Host(used - DRIVER_BYTES / GIB).process(used - 0.61).start(weights, kv_cache, graphs)
    lines = host.lines()
    assert (lines["weights"], lines["KV cache"]) == (weights, kv_cache)
    assert lines.get("CUDA graphs") == graphs
    assert abs(host.ledger().unexplained_bytes) <= 0.02 * used * GIB


def test_with_a_start_and_a_guest_each_gib_has_a_line():
    host = Host(43.9).process(43.3).start(1.12, 39.67, 0.25)
    host.guest(allocated=41.53, reserved=42.83, slack=1.05, graph_pool=0.2)
    assert host.lines() == {
        "weights": 1.12,
        "KV cache": 39.67,
        "CUDA graphs": 0.25,
        "activations": 0.74,
        "cached by the allocator": 1.05,
        "CUDA context and libraries": 0.47,
    }


def test_without_a_guest_what_the_start_does_not_tell_is_one_line():
    rest = "activations, cache, CUDA context and libraries"
    assert Host(23.2).process(22.6).start(7.56, 13.96).lines() == {
        "weights": 7.56,
        "KV cache": 13.96,
        rest: 1.08,
    }


def test_without_a_start_what_tensors_take_is_one_line():
    assert Host(43.9).process(43.3).guest(allocated=41.53, reserved=42.58).lines() == {
        "tensors": 41.53,
        "cached by the allocator": 1.05,
        "CUDA context and libraries": 0.72,
    }


def test_without_either_a_process_is_one_line():
    assert Host(43.9).process(43.3).lines() == {"all that it holds": 43.3}


def test_the_use_of_the_kv_cache_is_that_of_its_server():
    host = Host(23.2).process(22.6).start(7.56, 13.96)
    for server, use in (("qwen", 0.2), ("qwen", 0.4), ("other", 1.0)):
        host.values[Labels.of("vllm:kv_cache_usage_perc", server=server, engine=str(use))] = use
    assert host.notes()["KV cache"] == "30% in use"


def test_of_several_engines_each_has_its_own_use():
    host = Host(23.2).process(22.6, "VLLM::EngineCore_DP1").start(7.56, 13.96, worker="EngineCore_DP1")
    for engine, use in (("0", 0.2), ("1", 0.4)):
        host.values[Labels.of("vllm:kv_cache_usage_perc", server="qwen", engine=engine)] = use
    assert host.notes()["KV cache"] == "40% in use"


def test_graphs_that_no_line_told_of_are_what_their_pools_hold():
    host = Host(43.9).process(43.3).start(1.12, 39.67).guest(allocated=41.5, reserved=42.8, graph_pool=0.2)
    assert host.lines()["CUDA graphs"] == 0.2
    assert host.notes()["CUDA graphs"] == "their pools alone"


def test_no_part_is_more_than_nvml_says_that_the_process_holds():
    host = Host(20).process(19.4).start(7.56, 13.96, 1.0).guest(allocated=21.6, reserved=22.4)
    assert host.lines() == {
        "weights": 7.56,
        "KV cache": 11.84,
        "CUDA graphs": 0.0,
        "activations": 0.0,
        "cached by the allocator": 0.0,
        "CUDA context and libraries": 0.0,
    }
    more = "more was told, but NVML says that the process holds no more"
    assert {what for what, note in host.notes().items() if note == more} == {
        "KV cache",
        "CUDA graphs",
        "activations",
        "cached by the allocator",
    }


# -- sleep mode ------------------------------------------------------------------------------------------


def test_what_is_asleep_is_given_back_and_counted_nowhere():
    host = Host(2.1).process(1.5).start(7.56, 13.96).guest(allocated=21.9, reserved=22.4, slack=0.2)
    host.asleep(weights=("asleep", 7.56), kv_cache=("asleep", 13.96))
    assert host.lines() == {
        "weights": 0.0,
        "KV cache": 0.0,
        "activations": 0.38,
        "cached by the allocator": 0.2,
        "CUDA context and libraries": 0.92,
    }
    assert host.notes()["KV cache"] == "asleep: 13.96 GiB given back"


def test_weights_that_woke_before_the_cache_are_told_apart():
    host = Host(10).process(9.4).guest(allocated=21.9, reserved=22.4, slack=0.2)
    lines = host.asleep(weights=("mapped", 7.56), kv_cache=("asleep", 13.96)).lines()
    assert (lines["weights"], lines["KV cache"], lines["activations"]) == (7.56, 0.0, 0.38)


@pytest.mark.parametrize(("awake", "weights"), [(1.0, 7.56), (0.0, 0.0)])
def test_of_a_vllm_that_notes_no_sleep_its_own_page_tells(awake, weights):
    host = Host(23.2).process(22.6).guest(allocated=21.9, reserved=22.4)
    host.asleep(weights=("unknown", 7.56))
    host.values[Labels.of("vllm:engine_sleep_state", server="qwen", sleep_state="awake")] = awake
    assert host.lines()["weights"] == weights


def test_without_a_guest_its_own_page_tells_that_it_sleeps():
    host = Host(2.1).process(1.5).start(7.56, 13.96)
    host.values[Labels.of("vllm:engine_sleep_state", server="qwen", sleep_state="awake")] = 0.0
    assert host.lines()["weights"] == 0.0
    assert host.notes()["weights"] == "asleep: 7.56 GiB given back"


# -- whose it is -----------------------------------------------------------------------------------------


def test_each_worker_has_the_figures_of_its_own_gpu_and_name():
    host = Host(52).process(51.4, "VLLM::Worker_TP0").guest("Worker_TP0", allocated=50.0, reserved=50.6)
    host.start(28.5, 20.1, worker="Worker_TP0").start(28.4, 20.1, worker="Worker_TP1")
    host.board(52, DRIVER_BYTES / GIB, gpu="1").process(51.4, "VLLM::Worker_TP1")
    first, second = ledgers(host.values)
    assert next((p.what, p.bytes) for p in first.parts) == ("weights", round(28.5 * GIB))
    assert next((p.what, p.bytes) for p in second.parts) == ("weights", round(28.4 * GIB))
    assert len(first.parts) > len(second.parts), "only the first has a guest"


def test_a_worker_that_told_nothing_is_like_its_peers():
    host = Host(52).process(51.4, "VLLM::Worker_TP1").start(28.5, 20.1, worker="Worker_TP0")
    assert host.lines()["weights"] == 28.5
    assert host.notes()["weights"] == "as Worker_TP0 told"


def test_an_api_server_with_a_context_holds_no_weights():
    host = Host(2).process(0.5, "vllm").start(7.56, 13.96)
    assert host.lines() == {"all that it holds": 0.5}


def test_a_name_that_the_kernel_cut_off_is_known():
    host = Host(23.2).process(22.6, "VLLM::EngineCor").start(7.56, 13.96).guest(allocated=21.9, reserved=22.4)
    assert host.lines()["activations"] == 0.38


def test_two_servers_on_one_gpu_are_told_apart():
    host = Host(60).process(22.6).process(30.0, server="other")
    host.start(7.56, 13.96).start(20.0, 8.0, server="other").guest(allocated=21.9, reserved=22.4)
    weights = {p.owner: p.bytes / GIB for p in host.ledger().parts if p.what == "weights"}
    assert weights == {"qwen EngineCore": pytest.approx(7.56), "other EngineCore": 20.0}


def test_where_nobody_knows_the_server_the_only_one_that_started_is_meant():
    host = Host(23.2).process(22.6, server="").start(7.56, 13.96)
    assert host.lines()["weights"] == 7.56
    host.start(9.0, server="other")
    assert "weights" not in host.lines()


def test_other_processes_are_told_by_name_and_user_and_orphans_by_what_they_are():
    host = Host(30).process(4.0, "python3", "foreign", "", user="anna", unit="train.service")
    host.process(22.6, "VLLM::EngineCore", "orphan", user="vllm").process(1.0, "unknown", "unknown", "")
    assert [(p.owner, p.note) for p in host.ledger().parts[:3]] == [
        ("VLLM::EngineCore", "an orphan: its server is gone, user vllm"),
        ("python3", "user anna, train.service"),
        ("unknown", "nobody may look at it"),
    ]


# -- the sum ---------------------------------------------------------------------------------------------


def test_what_nobody_explains_has_a_sign():
    assert Host(30).process(22.0).ledger().unexplained_bytes == 8 * GIB
    assert Host(20).process(22.0).ledger().unexplained_bytes == -2 * GIB


def test_gpus_come_in_the_order_of_their_numbers():
    host = Host()
    for gpu in ("10", "2"):
        host.board(1.0, None, gpu=gpu)
    assert [one.gpu for one in ledgers(host.values)] == ["0", "2", "10"]


def test_whatever_is_told_no_part_is_negative_and_all_sum_to_the_total():
    dice = random.Random(5)
    for _ in range(500):
        host = Host(dice.uniform(0, 139), reserved=dice.choice([None, 0.6]))
        for name in dice.sample(["VLLM::EngineCore", "VLLM::Worker_TP0", "python3"], dice.randint(0, 3)):
            owner = "foreign" if name == "python3" else dice.choice(["vllm", "orphan"])
            host.process(dice.uniform(0, 140), name, owner, dice.choice(["", "qwen", "other"]))
        for worker in dice.sample(["EngineCore", "Worker_TP0", "Worker_TP1"], dice.randint(0, 3)):
            host.start(*(dice.choice([None, dice.uniform(0, 140)]) for _ in range(3)), worker=worker)
            names = dice.sample(["allocated", "reserved", "slack", "graph_pool"], dice.randint(0, 4))
            host.guest(worker, **{name: dice.uniform(0, 140) for name in names})
        if dice.random() < 0.3:
            state = dice.choice(["mapped", "asleep", "unknown"])
            host.asleep(weights=(state, dice.uniform(0, 140)), other=(state, 1.0))
        host.ledger()


def test_a_host_without_gpus_has_no_ledger():
    assert ledgers({}) == []


def test_of_a_recorded_h200_under_vllm_nothing_but_the_drivers_own_is_unexplained():
    recording = open_recording(Path(__file__).parents[1] / "recordings/h200-vllm024-incidents.jsonl.xz")
    (nvml,) = [source for source in recording.sources("qwen") if source.name == "nvml"]
    samples = nvml.read(recording.start_ms + 100_000)
    (one,) = ledgers({sample.labels: sample.value for sample in samples})
    assert 0 < one.unexplained_bytes < DRIVER_BYTES


# -- the command -----------------------------------------------------------------------------------------

NOW = 1_795_200_000_000


def server_state(phase):
    return ServerState(name="qwen", phase=phase, since_ms=NOW, seen_at_ms=NOW)


GOOD = ServerStart(
    server="qwen",
    began_at_ms=NOW - 3_600_000,
    outcome=StartOutcome.HEALTHY,
    healthy_at_ms=NOW - 3_560_000,
    figures={"EngineCore": {"weights_bytes": 7.56 * GIB, "kv_cache_bytes": 13.96 * GIB}},
    kv_cache_tokens=101_616,
)


@pytest.fixture
def store(tmp_path):
    with closing(Store(3_600_000, Disk(tmp_path, StoreSettings(min_free=Size(0)), "h", NOW))) as found:
        yield found


def save(store, host, phase=ServerPhase.SERVING, at_ms=NOW):
    store.append("nvml", at_ms, list(host.values), list(host.values.values()))
    store.save(Changes(servers=[server_state(phase)], starts=[GOOD]), at_ms)
    store.close()


def memory(folder, *words, ok=True):
    result = CliRunner().invoke(main, ["memory", "--state-dir", str(folder), *words])
    assert (result.exit_code == 0) == ok, result.output
    return result.output


def test_the_table_adds_up_to_what_nvml_calls_total(store, tmp_path):
    save(
        store, Host(23.2).process(22.6).start(7.56, 13.96).process(0.5, "python3", "foreign", "", user="anna")
    )
    text = memory(tmp_path)
    rows = [line[2:] for line in text.splitlines() if line.startswith("  ")]
    assert rows[0].split() == ["OWNER", "WHAT", "GiB", "%"]
    assert rows[1].split() == ["qwen", "EngineCore", "weights", "7.56", "5.4"]
    assert "user anna" in next(row for row in rows if row.startswith("python3"))
    assert rows[-1].split() == ["total", "140.40", "100.0"]
    figures = [float(cell) for row in rows[1:-2] for cell in row.split() if cell.lstrip("+-")[-3:-2] == "."]
    assert sum(figures) == pytest.approx(140.40, abs=0.05)


def test_for_programs_the_parts_and_the_rest_are_bytes(store, tmp_path):
    save(store, Host(23.2).process(22.6).start(7.56, 13.96))
    (gpu,) = json.loads(memory(tmp_path, "--json"))["gpus"]
    assert sum(part["bytes"] for part in gpu["parts"]) + gpu["unexplained_bytes"] == gpu["total_bytes"]
    assert gpu["parts"][0]["what"] == "weights"
    assert gpu["parts"][0]["ratio"] == pytest.approx(7.56 / 140.4, abs=1e-3)


def test_one_gpu_is_named_by_index_or_uuid_and_another_is_refused(store, tmp_path):
    save(store, Host().board(2.0, None, gpu="1"))
    for name in ("1", "GPU-1"):
        assert [gpu["gpu"] for gpu in json.loads(memory(tmp_path, "--gpu", name, "--json"))["gpus"]] == ["1"]
    assert "there are: 0, 1" in memory(tmp_path, "--gpu", "7", ok=False)


def test_an_old_drivers_own_share_is_said_to_be_in_the_rest(store, tmp_path):
    save(store, Host(23.2, reserved=None).process(22.6))
    assert "+0.60" in (row := next(line for line in memory(tmp_path).splitlines() if "unexplained" in line))
    assert row.endswith("the driver's own is in it")


def test_a_server_that_is_down_is_shown_as_it_last_started_well(store, tmp_path):
    save(store, Host(1.0), ServerPhase.DOWN)
    text = memory(tmp_path)
    assert "qwen is down; when it last started well" in text
    assert "EngineCore: weights 7.56 GiB, KV cache 13.96 GiB" in text
    assert "KV cache for 101,616 tokens" in text


def test_a_server_that_serves_is_shown_as_it_is_alone(store, tmp_path):
    save(store, Host(23.2).process(22.6))
    assert "last started well" not in memory(tmp_path)


def test_what_was_told_long_before_the_last_tick_is_not_used(store, tmp_path):
    old = Host(23.2).process(22.6).start(7.56, 13.96)
    store.append("start:qwen", NOW - 11_000, list(old.values), list(old.values.values()))
    save(store, Host(23.2).process(22.6))
    assert "weights" not in memory(tmp_path)


def test_a_host_that_has_read_no_gpu_says_so(store, tmp_path):
    store.close()
    assert "no GPU has been read" in memory(tmp_path)
