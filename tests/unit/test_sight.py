"""What can be seen of a server for the steps of a remediation: each field, and what is not known."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuwatch.promql import Series
from gpuwatch.records import (
    STALE,
    Errand,
    ErrandPhase,
    Labels,
    Mode,
    Phase,
    Plan,
    Remediation,
    ServerPhase,
    ServerStart,
    ServerState,
    Sight,
    StartOutcome,
)
from gpuwatch.servers.account import account
from gpuwatch.servers.sight import sight
from gpuwatch.store import Store

SECOND, MINUTE = 1000, 60_000
MIB, GIB = 2**20, 2**30
START_MS = 1_800_000_000_000
STATE = ServerState(name="qwen", phase=ServerPhase.SERVING, since_ms=START_MS, seen_at_ms=START_MS)
TOTAL = 140 * GIB


def process(name="EngineCore", role="engine_core", state="running"):
    labels = {"server": "qwen", "process": name, "role": role}
    return {
        Labels.of("server_process_state", state=one, **labels): float(one == state)
        for one in ("running", "stopped", "blocked", "zombie")
    }


def exits(name="EngineCore", role="engine_core", count=0):
    return {Labels.of("server_process_exits_total", server="qwen", process=name, role=role): float(count)}


def gpu(uuid="GPU-0", free=20 * GIB, up=1.0):
    labels = {"gpu": uuid[-1], "uuid": uuid}
    return {
        Labels.of("gpu_memory_free_bytes", **labels): float(free),
        Labels.of("gpu_memory_total_bytes", **labels): float(TOTAL),
        Labels.of("up", source="nvml", **labels): up,
    }


def held(size=100 * GIB, uuid="GPU-0", process="VLLM::EngineCore", owner="vllm", server="qwen"):
    labels = {"gpu": uuid[-1], "uuid": uuid, "process": process, "owner": owner, "server": server}
    return {Labels.of("gpu_process_memory_used_bytes", **labels): float(size)}


def page(running=0, waiting=0, engine="0", tokens=0.0, awake=1.0, kv_use=0.0):
    one = {"server": "qwen", "engine": engine, "model_name": "m"}
    return {
        Labels.of("vllm:num_requests_running", **one): float(running),
        Labels.of("vllm:num_requests_waiting", **one): float(waiting),
        Labels.of("vllm:generation_tokens_total", **one): float(tokens),
        Labels.of("vllm:kv_cache_usage_perc", **one): kv_use,
        Labels.of("vllm:engine_sleep_state", sleep_state="awake", **one): float(awake),
        Labels.of("vllm:engine_sleep_state", sleep_state="discard_all", **one): float(not awake),
    }


def guest(in_flight=0, limit=None, running=None):
    labels = {"server": "qwen"}
    values = {Labels.of("server_requests_in_flight", source="admission", **labels): float(in_flight)}
    values[Labels.of("server_guest_paused", **labels)] = 0.0
    if limit is not None:
        values[Labels.of("server_limit", limit="admission", **labels)] = float(limit)
    if running is not None:
        values[Labels.of("server_limit", limit="running", **labels)] = float(running)
    return values


@dataclass
class Host:
    """Series as the sources write them: what a target no longer gives ends."""

    now_ms: int = START_MS
    store: Store = field(default_factory=lambda: Store(3_660_000))
    given: dict[str, set[Labels]] = field(default_factory=dict)

    def second(self, n=1, **targets):
        for _ in range(n):
            self.now_ms += SECOND
            for target, values in targets.items():
                ended = self.given.get(target, set()) - values.keys()
                self.given[target] = set(values)
                all_values = {**values, **dict.fromkeys(ended, STALE)}
                if all_values:
                    self.store.append(target, self.now_ms, list(all_values), list(all_values.values()))
        return self

    def sight(self, **more):
        asked = {"starts": [], "errands": {}, "revision": None, **more}
        return sight(self.store, STATE, now_ms=self.now_ms, **asked)


def test_of_a_server_of_which_nothing_is_read_nothing_is_known():
    assert Host().sight() == Sight()


def test_what_the_hands_know_is_handed_on_with_the_newest_start():
    starts = [
        ServerStart(server="qwen", began_at_ms=at_ms, outcome=StartOutcome.HEALTHY) for at_ms in (2000, 1000)
    ]
    errands = {"GW-1-capture": Errand(phase=ErrandPhase.DONE, began_at_ms=5)}
    seen = Host().sight(starts=starts, errands=errands, revision=7)
    assert (seen.start, seen.errands, seen.revision) == (starts[0], errands, 7)


# -- requests and limits ---------------------------------------------------------------------------------


def test_requests_are_those_of_all_engines_while_the_page_is_fresh():
    host = Host().second(page=page(3, 2) | page(1, 0, engine="1"))
    seen = host.sight()
    assert (seen.requests_running, seen.requests_waiting) == (4, 2)
    host.now_ms += 10 * SECOND
    assert host.sight().requests_running == 4
    host.now_ms += 1
    assert host.sight().requests_running is None


def test_the_use_of_the_kv_cache_is_that_of_the_fullest_engine_while_the_page_is_fresh():
    host = Host().second(page=page(kv_use=0.25) | page(engine="1", kv_use=0.75))
    assert host.sight().kv_use_ratio == 0.75
    assert host.second(page={}).sight().kv_use_ratio is None


def test_requests_of_a_page_that_ended_are_not_known_at_once():
    seen = Host().second(page=page(3)).second(page={}).sight()
    assert seen.requests_running is None


def test_a_door_counts_and_a_limit_holds_until_the_guest_is_gone():
    host = Host().second(guests=guest(in_flight=5, limit=0, running=2))
    seen = host.sight()
    assert (seen.in_flight, seen.doors, seen.guests) == (5, 1, 1)
    assert (seen.admission_limit, seen.running_limit) == (0, 2)
    seen = host.second(guests=guest(in_flight=1)).sight()
    assert (seen.in_flight, seen.admission_limit, seen.running_limit) == (1, None, None)
    seen = host.second(guests={}).sight()
    assert (seen.in_flight, seen.doors, seen.guests) == (None, 0, 0)


def test_a_load_that_the_server_tells_itself_is_no_door():
    load = {Labels.of("server_requests_in_flight", server="qwen", source="load"): 4.0}
    seen = Host().second(page=load).sight()
    assert (seen.in_flight, seen.doors) == (None, 0)


def test_guests_that_count_themselves_are_believed():
    told = {
        Labels.of("server_guests", server="qwen", part=part): n for part, n in (("guest", 5.0), ("door", 2.0))
    }
    seen = Host().second(guests=guest() | told).sight()
    assert (seen.guests, seen.doors) == (5, 2)


def test_an_engine_that_sleeps_is_asleep_until_it_wakes():
    host = Host().second(page=page(awake=0))
    assert host.sight().asleep
    assert not host.second(page=page(awake=1)).sight().asleep


def test_the_verdict_is_the_one_that_is_true_now():
    verdicts = [
        {Labels.of("server_progress", server="qwen", verdict=verdict, reason="r"): 1.0}
        for verdict in ("working", "stalled")
    ]
    host = Host().second(progress=verdicts[0]).second(progress=verdicts[1])
    assert host.sight().verdict == "stalled"


def test_a_canary_counts_when_it_was_asked_if_it_was_answered():
    ok = Labels.of("server_canary_ok", server="qwen")
    host = Host().second(probe={ok: 1.0})
    asked_ms = host.now_ms
    host.second(probe={}).second(20).second(probe={ok: 0.0}).second(probe={})
    assert host.sight().canary_ok_at_ms == asked_ms


def test_throughput_is_of_this_life_alone_and_of_ten_seconds_at_least():
    host = Host()
    for second in range(30):
        host.second(page=page(tokens=1000 + 50 * second))
    assert host.sight().tokens_per_s == pytest.approx(50)
    host.second(page={}).second(5)
    assert host.sight().tokens_per_s is None
    for second in range(10):
        host.second(page=page(tokens=8 * second))
    assert host.sight().tokens_per_s is None
    assert host.second(page=page(tokens=80)).sight().tokens_per_s == pytest.approx(8)


# -- processes -------------------------------------------------------------------------------------------


def test_living_processes_are_counted_less_helpers_and_zombies():
    living = process() | process("Worker", "worker", "stopped") | process("api", "api_server")
    dead = process("helper", "helper") | process("Worker_TP1", "worker", "zombie")
    assert Host().second(processes=living | dead).sight().processes == 3


def test_after_the_last_process_none_lives_which_the_count_of_ends_tells():
    host = Host().second(processes=process() | exits())
    assert host.second(processes=exits(count=1)).sight().processes == 0


def test_where_nobody_sees_processes_their_number_is_not_known():
    assert Host().second(processes=process()).second(processes={}).sight().processes is None


# -- GPUs ------------------------------------------------------------------------------------------------


def test_figures_are_of_the_gpus_that_the_server_uses_alone():
    host = Host().second(nvml=gpu() | gpu("GPU-1") | held())
    seen = host.sight()
    assert (seen.free_bytes, seen.total_bytes) == ({"GPU-0": 20 * GIB}, {"GPU-0": TOTAL})
    assert seen.gpu_holders == 1


def test_a_server_that_is_gone_is_seen_gone_on_the_gpus_that_it_used_last():
    host = Host().second(nvml=gpu() | gpu("GPU-1") | held() | held(uuid="GPU-1"))
    host.second(1800, nvml=gpu(free=130 * GIB) | gpu("GPU-1", free=120 * GIB))
    seen = host.sight()
    assert seen.gpu_holders == 0
    assert seen.free_bytes == {"GPU-0": 130 * GIB, "GPU-1": 120 * GIB}


def test_an_orphan_that_nobody_is_known_for_holds_what_the_server_held():
    orphan = held(owner="orphan", server="") | held(owner="orphan", server="", uuid="GPU-1")
    host = Host().second(nvml=gpu() | gpu("GPU-1") | held())
    seen = host.second(nvml=gpu() | gpu("GPU-1") | orphan).sight()
    assert seen.gpu_holders == 1
    assert seen.others_growing is False


def test_the_orphan_of_another_server_is_not_this_one_s():
    host = Host().second(nvml=gpu() | held() | held(owner="orphan", server="other"))
    assert host.sight().gpu_holders == 1


@pytest.mark.parametrize("nvml", [gpu(up=0.0) | held(), {}], ids=["lost", "silent"])
def test_without_nvml_nobody_knows_who_holds_memory(nvml):
    seen = Host().second(nvml=gpu() | held()).second(nvml=nvml).sight()
    assert (seen.gpu_holders, seen.others_growing) == (None, None)


def test_of_a_server_that_was_on_no_gpu_nvml_tells_nothing():
    seen = Host().second(nvml=gpu()).sight()
    assert (seen.gpu_holders, seen.others_growing, seen.free_steady_since_ms) == (None, None, None)


def test_free_memory_is_steady_since_it_last_moved_by_256_mib():
    host = Host().second(nvml=gpu(free=20 * GIB) | held())
    host.second(nvml=gpu(free=90 * GIB))
    host.second(nvml=gpu(free=130 * GIB))
    moved_ms = host.now_ms
    host.second(4, nvml=gpu(free=130 * GIB + 100 * MIB))
    assert host.sight().free_steady_since_ms == moved_ms
    assert host.second(nvml=gpu(free=130 * GIB + 256 * MIB)).sight().free_steady_since_ms > moved_ms


def test_free_memory_is_steady_when_that_of_every_gpu_is():
    both = held() | held(uuid="GPU-1")
    host = Host().second(5, nvml=gpu() | gpu("GPU-1") | both)
    host.second(nvml=gpu() | gpu("GPU-1", free=30 * GIB) | both)
    assert host.sight().free_steady_since_ms == host.now_ms


def test_free_memory_that_crept_is_not_steady():
    host = Host()
    for second in range(30):
        host.second(nvml=gpu(free=20 * GIB + second * 50 * MIB) | held())
    assert host.sight().free_steady_since_ms == host.now_ms - 5 * SECOND


def other(size, name="train.py"):
    return held(size, process=name, owner="foreign", server="")


def test_rivals_are_those_who_hold_memory_of_its_gpus_now_and_are_not_its_own():
    both = gpu() | gpu("GPU-1") | held() | other(10 * GIB) | held(GIB, "GPU-1", "nvtop", "foreign", "")
    host = Host().second(nvml=both | other(2 * GIB, "gone") | held(owner="orphan", server=""))
    host.second(nvml=both | held(3 * GIB, process="VLLM::EngineCore", server="other"))
    expected = {("GPU-0", "train.py"): 10 * GIB, ("GPU-0", "VLLM::EngineCore"): 3 * GIB}
    assert host.sight().rival_bytes == expected


def test_two_of_one_name_are_one_rival():
    users = [
        Labels.of(
            "gpu_process_memory_used_bytes", uuid="GPU-0", process="python3", owner="foreign", user=user
        )
        for user in ("ann", "bob")
    ]
    host = Host().second(nvml=gpu() | held() | dict.fromkeys(users, float(GIB)))
    assert host.sight().rival_bytes == {("GPU-0", "python3"): 2 * GIB}


def test_somebody_else_who_holds_what_he_held_does_not_grow():
    host = Host().second(60, nvml=gpu() | held() | other(10 * GIB))
    assert host.sight().others_growing is False


def test_somebody_else_who_takes_more_grows_for_a_minute():
    host = Host().second(60, nvml=gpu() | held() | other(10 * GIB))
    host.second(nvml=gpu() | held() | other(10 * GIB + 257 * MIB))
    assert host.sight().others_growing is True
    host.second(59, nvml=gpu() | held() | other(10 * GIB + 257 * MIB))
    assert host.sight().others_growing is False


def test_who_came_just_now_grows_and_who_left_does_not():
    host = Host().second(60, nvml=gpu() | held())
    assert host.second(nvml=gpu() | held() | other(300 * MIB)).sight().others_growing is True
    assert host.second(nvml=gpu() | held()).sight().others_growing is False


def test_the_server_s_own_growth_is_not_another_s():
    host = Host().second(60, nvml=gpu() | held(90 * GIB))
    assert host.second(nvml=gpu() | held(100 * GIB)).sight().others_growing is False


def test_when_nvml_comes_back_nobody_counts_as_new():
    host = Host().second(5, nvml=gpu() | held() | other(10 * GIB)).second(5, nvml={})
    assert host.second(nvml=gpu() | held() | other(10 * GIB)).sight().others_growing is False


# -- odd data --------------------------------------------------------------------------------------------


class Odd:
    """A querier that gives each series that it has of a metric that is asked for, whatever else is asked."""

    def __init__(self, series):
        self.series = series

    def select(self, matchers, after_ms, upto_ms):
        names = next(m.value for m in matchers if m.name == "__name__").split("|")
        return [one for one in self.series if one.labels.metric in names]


METRICS = sorted({labels.metric for labels in page() | guest(1, 2, 3) | gpu() | held() | process() | exits()})
COUNTED = ["server_canary_ok", "server_phase", "server_process_start_time_seconds"]
COUNTED += ["vllm:request_success_total", "http_requests_total", "server_admission_refused_total"]
NUMBERS = st.sampled_from([0.0, 1.0, -1.0, 1.7e308, math.nan, STALE, math.inf, -math.inf])
LABELS = st.dictionaries(
    st.sampled_from(["server", "uuid", "owner", "state", "role", "source", "limit", "part", "engine"]),
    st.sampled_from(["", "qwen", "admission", "orphan", "nvml", "GPU-0", "\n|("]),
)


@st.composite
def odd_series(draw):
    values = draw(st.lists(NUMBERS, min_size=1, max_size=5))
    labels = Labels.of(draw(st.sampled_from([*METRICS, *COUNTED])), **draw(LABELS))
    return Series(labels, [START_MS + 1000 * i for i in range(len(values))], values)


PLAN = Plan(
    id="GW-1",
    server="qwen",
    alert="VLLMDown",
    alert_labels=Labels(),
    steps=(),
    verify_for_ms=0,
    mode=Mode.AUTO,
    dry_run=False,
    policy="p",
)
ENDED = Remediation(
    plan=PLAN, phase=Phase.FAILED, step_index=0, since_ms=START_MS, created_at_ms=START_MS + 1000
)


@given(st.lists(odd_series(), max_size=12))
def test_odd_data_raises_nothing(series):
    now_ms = START_MS + 5000
    seen = sight(Odd(series), STATE, starts=[], errands={}, revision=None, now_ms=now_ms)
    assert isinstance(seen, Sight)
    costs = account(Odd(series), ENDED, ended_at_ms=now_ms)
    assert all(isinstance(cost, float) for cost in costs.values())
