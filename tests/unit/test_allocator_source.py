"""What is told of an allocator with graphs, sleep mode, expandable segments; what becomes of an OOM."""

import gc
import json
import os
from pathlib import Path

import pytest
from tests.fake_nvml import FakeNvml
from tests.fake_torch import MIB
from tests.guests import REGISTER, TORCH, Pretender, Program, wait_for

from gpuwatch.guest import client
from gpuwatch.records import Labels
from gpuwatch.sources import AllocatorSource, limits
from gpuwatch.sources.guests import Admission, Engine, Figures
from gpuwatch.sources.trees import Identity, Member, Trees

UUID = "GPU-00000000-0000-0000-0000-000000000000"
WITH_TORCH = TORCH.format(f"gpus=1, total_bytes=1000 * {MIB}") + REGISTER
SLEEPY = WITH_TORCH + "sleep = fake_torch.install_sleep_mode(torch)\n"
OLD_SLEEPY = WITH_TORCH + "sleep = fake_torch.install_sleep_mode(torch, notes=False)\n"
SUMMARY = {
    "uuid": UUID,
    "inactive_bytes": 9,
    "largest_free_block_bytes": 3,
    "releasable_bytes": 2,
    "private_reserved_bytes": 20,
    "private_inactive_bytes": 10,
}
STATS = {"reserved_bytes.all.current": 120, "allocated_bytes.all.current": 60}
OOM = {
    "protocol": 1,
    "pid": 77,
    "worker": "EngineCore",
    "device": 0,
    "uuid": UUID,
    "count": 1,
    "asked_bytes": 16,
    "free_bytes": 5,
    "limit_bytes": 99,
    "at_ms": 7500,
}


def ask(program, what="figures"):
    wait_for(program.socket.exists)
    return client.ask(program.socket, what, within_s=10)


def in_mib(figures):
    return {name: value / MIB for name, value in figures.items() if name.endswith("_bytes")}


def summary_of(folder, *lines, script=WITH_TORCH):
    """What the snapshot of device 0 says in MiB once the process has done these lines."""
    with Program(folder, script) as program:
        program.do("torch.cuda.allocate(0, 30 * 2**20)")
        for line in lines:
            program.do(line)
        (device,) = ask(program, "snapshot")["devices"]
        return in_mib(device)


def read(source, now_ms=0):
    """Values by metric, less its prefix, of the samples that name no other worker than this one's."""
    samples = source.read(now_ms)
    assert len({s.labels for s in samples}) == len(samples)
    assert all(isinstance(s.value, float) for s in samples)
    return {s.labels.metric.removeprefix("cuda_"): s.value for s in samples}


def server_of(*pids):
    trees = Trees()
    main = Identity(1, 0)
    trees.replace("qwen", [Member(Identity(pid, 5), "EngineCore", "engine_core", main) for pid in pids])
    return trees


class Guest(Pretender):
    """Answers as the guest of this process, `figures` and `snapshot` as given."""

    def __init__(self, folder, **snapshot):
        super().__init__(folder, self._answer)
        self.heard, self.stats, self.snapshot = [], STATS, {"devices": [SUMMARY], **snapshot}
        self.device, self.figures = {}, {}

    def _answer(self, connection):
        who = {"protocol": 1, "pid": os.getpid(), "worker": "EngineCore"}
        what = json.loads(connection.recv(4096))["ask"]
        self.heard.append(what)
        device = {"device": 0, "uuid": UUID, "stats": self.stats, **self.device}
        said = self.snapshot if what == "snapshot" else {"devices": [device], **self.figures}
        connection.sendall(json.dumps(who | said).encode() + b"\n")


# -- the guest: fragments ----------------------------------------------------------------------------------


def test_the_pool_of_a_cuda_graph_is_neither_free_nor_cached(tmp_path):
    figures = summary_of(tmp_path, "torch.cuda.capture(0, 100 * 2**20, kept=2 * 2**20)")
    assert figures["reserved_bytes"] == 140
    assert (figures["inactive_bytes"], figures["largest_free_block_bytes"]) == (10, 10)
    assert (figures["private_reserved_bytes"], figures["private_inactive_bytes"]) == (100, 98)


def test_a_segment_with_a_tensor_in_it_cannot_be_given_back_and_an_empty_one_can(tmp_path):
    held = summary_of(tmp_path)
    assert (held["inactive_bytes"], held["releasable_bytes"]) == (10, 0)
    whole = "block = {'size': 40 * 2**20, 'state': 'inactive'}"
    alone = "torch.devices[0].segments = lambda i: [fake_torch.segment(i, 1, 40 * 2**20, [block], (0, 0))]"
    assert summary_of(tmp_path, whole, alone)["releasable_bytes"] == 40


@pytest.mark.parametrize(
    ("kind", "blocks", "releasable"),
    [
        ("large", [("active_allocated", 10), ("inactive", 50)], 40),
        ("large", [("active_allocated", 10), ("inactive", 25), ("active_allocated", 5)], 0),
        ("large", [("inactive", 40)], 40),
        ("large", [("active_pending_free", 40)], 0),
        ("small", [("active_allocated", 1), ("inactive", 5)], 4),
    ],
)
def test_of_an_expandable_segment_the_free_pages_can_be_given_back(tmp_path, kind, blocks, releasable):
    lines = (
        f"blocks = [{{'state': s, 'size': n * 2**20}} for s, n in {blocks!r}]",
        "it = fake_torch.segment(0, 1, sum(b['size'] for b in blocks), blocks, (0, 0))",
        f"it |= {{'is_expandable': True, 'segment_type': {kind!r}}}",
        "torch.devices[0].segments = lambda i: [it]",
    )
    assert summary_of(tmp_path, *lines)["releasable_bytes"] == releasable


def test_a_torch_whose_snapshot_takes_no_parameter_gives_one(tmp_path):
    older = "new = torch.cuda.memory_snapshot; torch.cuda.memory_snapshot = lambda mempool_id=None: new()"
    assert summary_of(tmp_path, older)["reserved_bytes"] == 40


def test_a_figure_below_0_is_left_out_and_the_others_are_told(tmp_path):
    with Program(tmp_path, WITH_TORCH) as program:
        program.do("torch.cuda.allocate(0, 30 * 2**20); torch.devices[0].reserved = -5")
        (device,) = ask(program)["devices"]
        assert "reserved_bytes.all.current" not in device["stats"]
        assert device["stats"]["allocated_bytes.all.current"] == 30 * MIB


# -- the guest: sleep mode ----------------------------------------------------------------------------------

LOADED = "weights = sleep.put('weights', 300 * 2**20); sleep.put('kv_cache', 200 * 2**20)"


def pools_of(program):
    (device,) = ask(program)["devices"]
    return {(pool["tag"], pool["state"]): pool["bytes"] / MIB for pool in device["sleep_pools"]}


def test_what_sleep_mode_holds_is_told_by_tag_and_whether_it_is_mapped(tmp_path):
    with Program(tmp_path, SLEEPY) as program:
        program.do(f"torch.cuda.allocate(0, 30 * 2**20); {LOADED}")
        assert pools_of(program) == {("weights", "mapped"): 300, ("kv_cache", "mapped"): 200}
        program.do("sleep.sleep('weights')")
        assert pools_of(program) == {("weights", "asleep"): 300, ("kv_cache", "asleep"): 200}


def test_a_vllm_that_notes_no_sleep_is_known_to_sleep_by_what_lies_in_the_hosts_memory(tmp_path):
    with Program(tmp_path, OLD_SLEEPY) as program:
        program.do(f"torch.cuda.allocate(0, 30 * 2**20); {LOADED}; sleep.sleep('weights')")
        assert pools_of(program) == {("weights", "asleep"): 300, ("kv_cache", "unknown"): 200}


def test_torch_is_asked_for_nothing_that_takes_its_lock_where_sleep_mode_may_hold_it(tmp_path):
    """Its allocator waits for Python's lock with torch's held; who asked would hold the one and wait."""
    with Program(tmp_path, SLEEPY) as program:
        program.do(f"torch.cuda.allocate(0, 30 * 2**20); {LOADED}")
        program.do("torch.cuda.memory_stats = torch.cuda.memory_snapshot = torch.cuda.empty_cache = None")
        (device,) = ask(program)["devices"]
        assert (device["stats"], device["total_bytes"] > 0) == ({}, True)
        for what in ("snapshot", "release"):
            with pytest.raises(client.GuestError, match="sleep mode"):
                ask(program, what)


@pytest.mark.parametrize(
    "broken",
    [
        "sleep.pointer_to_data = 5",
        "sleep.pointer_to_data = {'x': 5}",
        "sleep.pointer_to_data = None",
        "del sleep.pointer_to_data",
        "import sys; sys.modules['vllm.device_allocator.cumem'] = None",
        "import sys; del sys.modules['vllm.device_allocator.cumem'].CuMemAllocator",
    ],
)
def test_a_sleep_mode_of_another_shape_tells_nothing_and_the_figures_go_on(tmp_path, broken):
    with Program(tmp_path, SLEEPY) as program:
        program.do("torch.cuda.allocate(0, 30 * 2**20)")
        program.do(broken)
        assert pools_of(program) == {}


# -- samples -------------------------------------------------------------------------------------------------


def test_slack_is_what_torchs_own_pool_caches_whatever_graphs_hold(tmp_path):
    with Program(tmp_path, WITH_TORCH) as program:
        program.do("torch.cuda.allocate(0, 30 * 2**20); torch.cuda.capture(0, 100 * 2**20)")
        ask(program)
        source = AllocatorSource(tmp_path, FakeNvml(), within_s=5.0)
        figures = in_mib(read(source))
        assert figures["allocator_reserved_bytes"] == 140
        assert figures["allocator_slack_bytes"] == figures["allocator_largest_free_block_bytes"] == 10
        assert (figures["graph_pool_bytes"], figures["allocator_releasable_bytes"]) == (100, 0)
        assert figures["allocator_fragments_bytes"] == 10, "beside a tensor, in a segment that stays"


def test_fragmentation_is_the_share_of_torchs_own_pool_that_no_tensor_uses(tmp_path):
    with Program(tmp_path, WITH_TORCH) as program:
        program.do("torch.cuda.allocate(0, 30 * 2**20); torch.cuda.capture(0, 100 * 2**20)")
        ask(program)
        source = AllocatorSource(tmp_path, FakeNvml(), within_s=5.0)
        assert read(source)["allocator_fragmentation_ratio"] == 0.25
        program.do("torch.cuda.free(0, 20 * 2**20)")
        figures = read(source, 1000)
        assert figures["allocator_slack_bytes"] == 30 * MIB, "of this second, not of the last snapshot"
        assert figures["allocator_largest_free_block_bytes"] == 10 * MIB, "of the last snapshot"


def test_a_series_names_the_server_whose_process_it_is(tmp_path):
    with Guest(tmp_path):
        samples = AllocatorSource(tmp_path, FakeNvml(), server_of(os.getpid())).read(0)
    assert {s.labels.get("server") for s in samples} == {"qwen"}


def test_a_snapshot_is_asked_for_every_30_seconds(tmp_path):
    with Guest(tmp_path) as guest:
        source = AllocatorSource(tmp_path, FakeNvml())
        for now_ms in range(0, 61_000, 1000):
            assert read(source, now_ms)["allocator_slack_bytes"] == 50
        assert (guest.heard.count("figures"), guest.heard.count("snapshot")) == (61, 3)


def test_a_snapshot_that_takes_long_is_asked_for_more_rarely(tmp_path):
    with Guest(tmp_path, took_ms=50.0) as guest:
        source = AllocatorSource(tmp_path, FakeNvml())
        for now_ms in (0, 30_000, 99_000):
            source.read(now_ms)
        assert guest.heard.count("snapshot") == 1
        source.read(100_000)
        assert guest.heard.count("snapshot") == 2


@pytest.mark.parametrize(
    "snapshot",
    [
        {"error": "no"},
        {"devices": [{k: v for k, v in SUMMARY.items() if not k.startswith("private")}]},
        {"devices": [SUMMARY | {"releasable_bytes": -1}]},
        {"took_ms": -1},
    ],
    ids=["refused", "of an older guest", "negative", "ended before it began"],
)
def test_a_snapshot_that_is_none_leaves_the_counters_of_torch_as_they_are(tmp_path, snapshot):
    with Guest(tmp_path, **snapshot) as guest:
        source = AllocatorSource(tmp_path, FakeNvml())
        for now_ms in (0, 1000):
            figures = read(source, now_ms)
            assert figures["allocator_reserved_bytes"] == 120
            assert figures.keys().isdisjoint({"allocator_slack_bytes", "graph_pool_bytes"})
        assert guest.heard == ["figures", "snapshot", "figures"], "it is not left in peace, nor pestered"


@pytest.mark.parametrize(
    ("device", "figures"),
    [
        ({"sleep_pools": [{"tag": "weights", "state": "dreaming", "bytes": 1}]}, {}),
        ({"sleep_pools": [{"tag": 'a"}\n', "state": "mapped", "bytes": 1}]}, {}),
        ({"sleep_pools": [{"tag": "weights", "state": "mapped", "bytes": -1}]}, {}),
        ({"sleep_pools": [{"tag": "weights", "state": "mapped", "bytes": 1}] * 33}, {}),
        ({}, {"admission": {"in_flight": -1, "refused": 0}}),
        ({}, {"admission": {"in_flight": 1.5, "refused": 0}}),
        ({}, {"admission": {"in_flight": 1, "refused": 0, "limit": "many"}}),
        ({}, {"engine": {"paused": "no"}}),
        ({}, {"engine": {"limits": {"running": -1}}}),
        ({}, {"engine": {"limits": {f"n{i}": 1 for i in range(17)}}}),
    ],
)
def test_what_no_guest_would_say_of_sleep_or_limits_gives_no_sample(tmp_path, device, figures):
    with Guest(tmp_path) as guest:
        guest.device, guest.figures = device, figures
        assert read(AllocatorSource(tmp_path, FakeNvml(), server_of(os.getpid()))) == {}


def test_limits_and_requests_that_a_guest_tells_are_its_servers(tmp_path):
    with Guest(tmp_path) as guest:
        guest.figures = {
            "admission": {"in_flight": 3, "refused": 1, "limit": None},
            "engine": {"running": 2, "waiting": 1, "paused": False, "limits": {"running": 4, "other": 1}},
        }
        figures = read(AllocatorSource(tmp_path, FakeNvml(), server_of(os.getpid())))
        told = {name: value for name, value in figures.items() if name.startswith("server_")}
        assert told == {
            "server_guests": 1,  # and one door
            "server_requests_in_flight": 3,
            "server_admission_refused_total": 1,
            "server_limit": 4,
            "server_guest_paused": 0,
        }
        of_nobody = read(AllocatorSource(tmp_path, FakeNvml()))
        assert not any(name.startswith("server_") for name in of_nobody), "nobody knows its server"


def test_counters_that_fell_since_the_snapshot_make_no_negative_slack(tmp_path):
    with Guest(tmp_path) as guest:
        guest.stats = {"reserved_bytes.all.current": 15, "allocated_bytes.all.current": 10}
        figures = read(AllocatorSource(tmp_path, FakeNvml()))
        assert figures["allocator_slack_bytes"] == 0
        assert "allocator_fragmentation_ratio" not in figures


# -- limits --------------------------------------------------------------------------------------------------


def told(*, admission=None, engine=None):
    return Figures(pid=1, worker="w", devices=[], admission=admission, engine=engine)


def series(*figures):
    return {str(labels): value for labels, value in limits.values("qwen", figures)}


def test_api_processes_share_one_door():
    doors = [Admission(in_flight=3, refused=1, limit=4), Admission(in_flight=2, refused=5, limit=3)]
    assert series(*(told(admission=door) for door in doors), told()) == {
        'server_requests_in_flight{server="qwen",source="admission"}': 5,
        'server_admission_refused_total{server="qwen"}': 6,
        'server_limit{limit="admission",server="qwen"}': 7,
        'server_guests{part="guest",server="qwen"}': 3,
        'server_guests{part="door",server="qwen"}': 2,
    }


def test_a_door_of_which_one_half_is_open_has_no_limit():
    doors = [Admission(in_flight=0, refused=0, limit=4), Admission(in_flight=0, refused=0)]
    assert 'server_limit{limit="admission",server="qwen"}' not in series(*(told(admission=d) for d in doors))


def test_of_several_engines_the_lowest_limit_is_told_and_a_pause_of_any():
    engines = [
        Engine(paused=False, limits={"running": 8, "tokens": 512}),
        Engine(paused=True, limits={"running": 2}),
    ]
    assert series(*(told(engine=engine) for engine in engines)) == {
        'server_limit{limit="running",server="qwen"}': 2,
        'server_limit{limit="tokens",server="qwen"}': 512,
        'server_guest_paused{server="qwen"}': 1,
        'server_guests{part="guest",server="qwen"}': 2,
        'server_guests{part="door",server="qwen"}': 0,
    }


def test_what_a_guest_cannot_know_is_no_sample():
    assert series(told(engine=Engine())) == {
        'server_guests{part="guest",server="qwen"}': 1,
        'server_guests{part="door",server="qwen"}': 0,
    }


# -- out of memory -------------------------------------------------------------------------------------------


def leave(folder, **changes):
    event = OOM | changes
    (folder / f"{event['pid']}.oom").write_text(json.dumps(event))


def test_an_oom_tells_what_was_asked_what_was_free_the_limit_and_when(tmp_path):
    leave(tmp_path)
    source = AllocatorSource(tmp_path, FakeNvml())
    assert read(source) == {
        "oom_events_total": 0,
        "oom_asked_bytes": 16,
        "oom_free_bytes": 5,
        "oom_limit_bytes": 99,
        "oom_time_seconds": 7.5,
    }


def test_an_oom_of_an_older_guest_counts_and_tells_less(tmp_path):
    leave(tmp_path)
    event = {k: v for k, v in OOM.items() if k not in {"limit_bytes", "at_ms"}}
    (tmp_path / "77.oom").write_text(json.dumps(event))
    figures = read(AllocatorSource(tmp_path, FakeNvml()))
    assert figures.keys() == {"oom_events_total", "oom_asked_bytes", "oom_free_bytes"}


def test_a_file_outlives_its_count_until_that_is_saved_and_is_counted_once(tmp_path):
    leave(tmp_path)
    source = AllocatorSource(tmp_path, FakeNvml())
    left = []
    for now_ms in range(0, 8000, 1000):
        counted = read(source, now_ms)["oom_events_total"]
        left.append((counted, len(list(tmp_path.iterdir()))))
    assert left == [(0, 1), *[(1, 1)] * 4, *[(1, 0)] * 3]


def test_a_gpuwatch_that_died_before_it_saved_finds_the_oom_again(tmp_path):
    leave(tmp_path, count=3)
    read(AllocatorSource(tmp_path, FakeNvml()))
    next_life = AllocatorSource(tmp_path, FakeNvml())
    assert [read(next_life, now_ms)["oom_events_total"] for now_ms in (2000, 3000)] == [0, 3]


def test_two_errors_of_one_process_are_both_kept_and_both_counted(tmp_path):
    source = AllocatorSource(tmp_path, FakeNvml())
    for now_ms in (0, 1000, 2000):
        leave(tmp_path, asked_bytes=now_ms)
        source.read(now_ms)
    assert (read(source, 3000)["oom_events_total"], read(source, 3000)["oom_asked_bytes"]) == (3, 2000)
    assert len(list(tmp_path.iterdir())) == 3


def test_the_oom_of_a_process_that_is_gone_names_the_server_that_it_was_of(tmp_path):
    trees = server_of(os.getpid())
    source = AllocatorSource(tmp_path, FakeNvml(), trees)
    with Guest(tmp_path):
        source.read(0)
    trees.replace("qwen", [])
    leave(tmp_path, pid=os.getpid())
    found = {s.labels for s in source.read(1000)}
    where = {"gpu": "", "uuid": UUID, "worker": "EngineCore", "server": "qwen"}
    assert Labels.of("cuda_oom_events_total", **where) in {labels.without("gpu") for labels in found}


def test_what_is_left_under_the_name_of_a_claimed_file_must_be_one(tmp_path):
    (tmp_path / "77.oom.5").write_text(json.dumps(OOM | {"pid": 78}))
    (tmp_path / ".77.oom.taken").write_text(json.dumps(OOM))
    assert read(AllocatorSource(tmp_path, FakeNvml())) == {}
    assert list(tmp_path.iterdir()) == []


def test_folders_in_the_place_of_files_cost_no_descriptor(tmp_path):
    source = AllocatorSource(tmp_path, FakeNvml())
    source.read(0)
    gc.collect()  # what other tests left open is not closed while it is counted
    before = len(list(Path("/proc/self/fd").iterdir()))
    for now_ms in range(1, 20):
        (tmp_path / "77.oom").mkdir()
        source.read(now_ms)
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


def test_the_guest_writes_when_it_happened(tmp_path):
    script = "try: torch.cuda.allocate(0, 2000 * 2**20)\nexcept torch.cuda.OutOfMemoryError: pass"
    with Program(tmp_path, WITH_TORCH) as program:
        program.do("torch.cuda.allocate(0, 30 * 2**20)")
        ask(program)
        while program.do("print(len(torch.observers))") != "1":
            pass
        program.do(f"exec({script!r})")
        event = json.loads((tmp_path / f"{program.pid}.oom").read_bytes())
        assert event["at_ms"] == pytest.approx(tmp_path.stat().st_mtime * 1000, abs=60_000)
        assert event["limit_bytes"] == 1000 * MIB
