"""Whether a server works: the table of the verdicts, what holds of any evidence, stories by the second."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuwatch import servers
from gpuwatch.errors import SourceError
from gpuwatch.records import STALE, Labels, ServerPhase, ServerState, SupervisorPhase, SupervisorState
from gpuwatch.servers import PlayedSupervisor
from gpuwatch.servers.evidence import evidence
from gpuwatch.servers.progress import (
    Engine,
    Evidence,
    Hardware,
    Process,
    Verdict,
    judge,
    samples,
)
from gpuwatch.sources.recording import Recording
from gpuwatch.store import Store

H200 = Path(__file__).parents[1] / "recordings" / "h200-vllm024-incidents.jsonl.xz"
SECOND, MINUTE = 1000, 60_000
START_MS = 1_800_000_000_000
CANARY_INTERVAL_MS = 5 * MINUTE

# -- the table -------------------------------------------------------------------------------------------

BUSY = Engine(name="0", requests=4)
REST = Engine(name="0")
GOOD = Evidence(
    server="qwen",
    at_ms=START_MS,
    phase=ServerPhase.SERVING,
    serving_ms=60 * MINUTE,
    is_paused=False,
    paused_asked_ms=SECOND,
    scraped_ms=SECOND,
    engines=(BUSY,),
    in_flight=4,
    in_flight_ms=MINUTE,
    hardware=Hardware.IDLE,
)


def flat(seconds, **changes):
    engine = {name: changes.pop(name) for name in ("deferred", "has_stepped", "requests") if name in changes}
    longest = changes.pop("longest_s", 0) * SECOND
    busy = replace(BUSY, flat_ms=int(seconds * SECOND), longest_step_ms=longest, **engine)
    return replace(GOOD, engines=(busy,), **changes)


def idle(**changes):
    engine = replace(REST, flat_ms=changes.pop("flat_ms", 0), has_stepped=changes.pop("has_stepped", True))
    return replace(GOOD, **{"engines": (engine,), "in_flight": 0, "in_flight_ms": 0, **changes})


def phase(name, **changes):
    return Evidence(server="qwen", at_ms=START_MS, phase=ServerPhase(name), **changes)


STOPPED = Process(name="EngineCore", stopped_ms=2000)
BLOCKED = Process(name="EngineCore", blocked_ms=30_000)
WORKS, SPINS, UNKNOWN = Hardware.WORKING, Hardware.SPINNING, Hardware.UNKNOWN

TABLE = {
    # rule 1
    "a starting one": (phase("starting"), "starting/loading"),
    "a down one": (phase("down"), "down/health"),
    "a down one that comes back": (phase("down", is_coming_up=True), "starting/coming_back"),
    "a stopped one": (phase("stopped"), "stopped/operator"),
    "one never seen": (phase("unseen"), "unknown/unseen"),
    # rule 2
    "a worker that died": (replace(GOOD, died=("Worker_TP1",)), "stalled/process_died"),
    "also while nobody asks": (idle(died=("Worker_TP1",)), "stalled/process_died"),
    "but not in a stop": (replace(GOOD, died=("EngineCore",), is_stopping=True), "stopped/stopping"),
    "a stop that has not come to that": (replace(GOOD, is_stopping=True), "working/steps"),
    # rule 3
    "a stopped engine": (replace(GOOD, processes=(STOPPED,)), "stalled/process_stopped"),
    "also while nobody asks anything": (idle(processes=(STOPPED,)), "stalled/process_stopped"),
    "also asleep": (idle(processes=(STOPPED,), sleep="discard_all"), "stalled/process_stopped"),
    "also without metrics": (idle(processes=(STOPPED,), scraped_ms=None), "stalled/process_stopped"),
    "one that py-spy looked at": (
        replace(GOOD, processes=(replace(STOPPED, stopped_ms=1999),)),
        "working/steps",
    ),
    # rule 4
    "asleep": (idle(sleep="weights_offloaded"), "asleep/weights_offloaded"),
    "asleep with requests": (flat(100, sleep="discard_all"), "asleep/discard_all"),
    "paused by an operator": (flat(100, is_paused=True), "paused/operator"),
    "paused by gpuwatch": (flat(100, has_own_pause=True), "paused/own"),
    # rule 5
    "metrics of 9 s ago": (replace(GOOD, scraped_ms=9_999), "working/steps"),
    "metrics of 10 s ago": (replace(GOOD, scraped_ms=10_000), "unknown/no_metrics"),
    "none ever": (replace(GOOD, scraped_ms=None, engines=()), "unknown/no_metrics"),
    "none yet": (replace(GOOD, scraped_ms=None, engines=(), serving_ms=9_999), "starting/first_metrics"),
    # rule 6
    "no step for 5.4 s": (flat(5.4), "working/steps"),
    "no step for 5.5 s and all idle": (flat(5.5), "stalled/no_steps"),
    "but something computes": (flat(6, hardware=WORKS), "working/long_step"),
    "but that cannot be seen": (flat(6, hardware=UNKNOWN), "working/long_step"),
    "but it was not asked for a pause": (flat(6, is_paused=None), "working/long_step"),
    "but it never took a step": (flat(6, has_stepped=False), "working/long_step"),
    "but all wait for a grammar": (flat(6, deferred=4), "working/long_step"),
    "of which some do": (flat(6, deferred=3), "stalled/no_steps"),
    "a GPU that spins for 7.4 s": (flat(7.4, hardware=SPINS), "working/long_step"),
    "a GPU that spins for 7.5 s": (flat(7.5, hardware=SPINS), "stalled/spinning"),
    "blocked for 30 s": (flat(30, hardware=WORKS, processes=(BLOCKED,)), "stalled/process_blocked"),
    "blocked for 29 s": (
        flat(30, hardware=WORKS, processes=(replace(BLOCKED, blocked_ms=29_999),)),
        "working/long_step",
    ),
    "blocked, but steps come": (flat(29.9, hardware=WORKS, processes=(BLOCKED,)), "working/long_step"),
    "blocked and idle": (idle(processes=(BLOCKED,)), "idle/no_requests"),
    "a step of 59.9 s": (flat(59.9, hardware=WORKS), "working/long_step"),
    "a step of 60 s": (flat(60, hardware=WORKS), "stalled/long_step"),
    "a step of 60 s where they last 21": (flat(60, hardware=WORKS, longest_s=21), "working/long_step"),
    "a step of 63 s where they last 21": (flat(63, hardware=WORKS, longest_s=21), "stalled/long_step"),
    "a step of 299 s after a stall": (flat(299, hardware=WORKS, longest_s=900), "working/long_step"),
    "a step of 300 s after a stall": (flat(300, hardware=WORKS, longest_s=900), "stalled/long_step"),
    "a first step of 179 s": (flat(179, has_stepped=False), "working/long_step"),
    "a first step of 180 s": (flat(180, has_stepped=False), "stalled/long_step"),
    "one engine of two": (
        replace(GOOD, hardware=WORKS, engines=(BUSY, replace(BUSY, name="1", flat_ms=60_000))),
        "stalled/long_step",
    ),
    # rule 7
    "a canary that no answer came to": (idle(unanswered_ms=11_000), "stalled/canary_unanswered"),
    "while a GPU spins": (idle(unanswered_ms=11_000, hardware=SPINS), "stalled/canary_unanswered"),
    "while something computes": (idle(unanswered_ms=11_000, hardware=WORKS), "working/long_step"),
    "while that cannot be seen": (idle(unanswered_ms=11_000, hardware=UNKNOWN), "working/long_step"),
    "for a minute": (idle(unanswered_ms=60_000, hardware=UNKNOWN), "stalled/canary_unanswered"),
    "at its first step": (idle(unanswered_ms=179_000, has_stepped=False), "working/long_step"),
    "still at its first step": (idle(unanswered_ms=180_000, has_stepped=False), "stalled/canary_unanswered"),
    "paused before": (idle(unanswered_ms=11_000, is_paused=True), "paused/operator"),
    # rule 8
    "at work": (GOOD, "working/steps"),
    "at work between two scrapes": (
        replace(idle(), engines=(replace(REST, has_moved=True),)),
        "working/steps",
    ),
    "tokenising": (idle(in_flight=1), "working/in_api"),
    "no requests": (idle(), "idle/no_requests"),
    "no requests as far as can be told": (idle(in_flight=None), "idle/no_requests"),
}


def verdict(e, interval_ms=CANARY_INTERVAL_MS):
    progress = judge(e, canary_interval_ms=interval_ms)
    return f"{progress.verdict}/{progress.reason}"


@pytest.mark.parametrize(("e", "expected"), TABLE.values(), ids=TABLE.keys())
def test_verdict(e, expected):
    assert verdict(e) == expected


DOUBT = flat(2, is_paused=None, paused_asked_ms=None)
HELD = idle(in_flight=1, in_flight_ms=5000, flat_ms=5000)
QUIET = idle(in_flight=None, flat_ms=CANARY_INTERVAL_MS)
WANTS = {
    "at work: nothing": (GOOD, ""),
    "flat for a scrape: whether it is paused": (DOUBT, "is_paused"),
    "not again at once": (replace(DOUBT, paused_asked_ms=3_999), ""),
    "again after 4 s without an answer that counts": (replace(DOUBT, paused_asked_ms=4_000), "is_paused"),
    "seldom after a no": (flat(20, paused_asked_ms=14_999), ""),
    "but again": (flat(20, paused_asked_ms=15_000), "is_paused"),
    "often after a yes": (flat(20, is_paused=True, paused_asked_ms=4_000), "is_paused"),
    "also when the requests have left": (idle(is_paused=True, paused_asked_ms=4_000), "is_paused"),
    "not where a guest tells": (flat(20, is_paused=True, paused_asked_ms=1_000), ""),
    "not in a pause of our own": (replace(DOUBT, has_own_pause=True), ""),
    "requests in the API alone: a canary": (HELD, "canary"),
    "not within 5 s": (replace(HELD, in_flight_ms=4_999), ""),
    "not within 5 s of a step": (idle(in_flight=1, in_flight_ms=9_000, flat_ms=4_000), ""),
    "not again within 15 s": (replace(HELD, canary_asked_ms=14_999), ""),
    "again after 15 s": (replace(HELD, canary_asked_ms=15_000), "canary"),
    "not while paused": (replace(HELD, is_paused=True), ""),
    "not in our own pause": (replace(HELD, has_own_pause=True), ""),
    "not to a stopped process": (replace(HELD, processes=(STOPPED,)), ""),
    "again while none was answered": (idle(unanswered_ms=15_000, canary_asked_ms=15_000), "canary"),
    "idle, and nobody counts: a canary now and then": (QUIET, "canary"),
    "not sooner": (replace(QUIET, canary_asked_ms=CANARY_INTERVAL_MS - 1), ""),
    "not after a step": (idle(in_flight=None, flat_ms=MINUTE), ""),
    "not where requests are counted": (idle(flat_ms=CANARY_INTERVAL_MS), ""),
    "not while asleep": (replace(QUIET, sleep="discard_all"), ""),
    "without metrics nothing else tells": (replace(QUIET, scraped_ms=None), "canary"),
    "not of a server that is down": (phase("down"), ""),
}


@pytest.mark.parametrize(("e", "wanted"), WANTS.values(), ids=WANTS.keys())
def test_what_should_be_asked(e, wanted):
    assert judge(e, canary_interval_ms=CANARY_INTERVAL_MS).wants == frozenset(wanted.split())


@pytest.mark.parametrize("e", [HELD, QUIET, idle(unanswered_ms=15_000, canary_asked_ms=15_000)])
def test_without_canaries_none_is_wanted(e):
    assert judge(e, canary_interval_ms=None).wants == frozenset()


def test_a_verdict_is_one_series():
    (sample,) = samples(judge(flat(6), canary_interval_ms=None))
    assert str(sample.labels) == 'server_progress{reason="no_steps",server="qwen",verdict="stalled"}'
    assert (sample.at_ms, sample.value) == (START_MS, 1.0)


# -- what holds of any evidence --------------------------------------------------------------------------

spans = st.integers(0, 400_000)
maybe = st.one_of(st.none(), spans)
engines = st.builds(
    Engine,
    name=st.just("0"),
    requests=st.integers(0, 5),
    deferred=st.integers(0, 5),
    flat_ms=spans,
    has_moved=st.booleans(),
    has_stepped=st.booleans(),
    longest_step_ms=spans,
)
evidences = st.builds(
    Evidence,
    server=st.just("qwen"),
    at_ms=st.just(START_MS),
    phase=st.sampled_from(ServerPhase),
    serving_ms=spans,
    is_coming_up=st.booleans(),
    is_stopping=st.booleans(),
    has_own_pause=st.booleans(),
    is_paused=st.sampled_from([None, False, True]),
    paused_asked_ms=maybe,
    sleep=st.sampled_from(["", "discard_all"]),
    scraped_ms=maybe,
    engines=st.lists(engines, max_size=3).map(tuple),
    processes=st.lists(st.builds(Process, name=st.just("p"), stopped_ms=spans, blocked_ms=spans)).map(tuple),
    died=st.sampled_from([(), ("EngineCore",)]),
    in_flight=st.one_of(st.none(), st.integers(0, 5)),
    in_flight_ms=spans,
    hardware=st.sampled_from(Hardware),
    canary_asked_ms=maybe,
    unanswered_ms=maybe,
)
STANDING = Verdict.STALLED


@given(evidences)
def test_every_evidence_has_one_verdict_with_a_reason(e):
    progress = judge(e, canary_interval_ms=CANARY_INTERVAL_MS)
    assert progress.verdict in Verdict
    assert progress.reason
    assert progress.wants <= {"is_paused", "canary"}


@given(evidences)
def test_nobody_is_stalled_while_steps_come_and_its_processes_are_well(e):
    moving = tuple(replace(engine, flat_ms=min(engine.flat_ms, 5_499)) for engine in e.engines)
    e = replace(e, engines=moving, processes=(), died=(), unanswered_ms=None)
    assert judge(e, canary_interval_ms=None).verdict is not STANDING


@given(evidences)
def test_nobody_is_stalled_for_want_of_requests(e):
    resting = tuple(replace(engine, requests=0) for engine in e.engines)
    e = replace(e, engines=resting, processes=(), died=(), unanswered_ms=None)
    assert judge(e, canary_interval_ms=None).verdict is not STANDING


@given(evidences)
def test_nobody_is_stalled_that_sleeps_is_paused_or_does_not_serve(e):
    e = replace(e, processes=(), died=())
    for resting in (
        replace(e, sleep="discard_all"),
        replace(e, is_paused=True),
        replace(e, has_own_pause=True),
        *(replace(e, phase=other) for other in ServerPhase if other is not ServerPhase.SERVING),
    ):
        assert judge(resting, canary_interval_ms=None).verdict is not STANDING


@given(evidences)
def test_who_is_stalled_stays_so_as_time_goes_on_and_nothing_else(e):
    later = replace(e, engines=tuple(replace(g, flat_ms=g.flat_ms + 1000) for g in e.engines))
    if e.unanswered_ms is not None:
        later = replace(later, unanswered_ms=e.unanswered_ms + 1000)
    if judge(e, canary_interval_ms=None).verdict is STANDING:
        assert judge(later, canary_interval_ms=None).verdict is STANDING


@given(evidences)
def test_to_know_less_of_the_hardware_makes_no_stall(e):
    known = judge(replace(e, hardware=Hardware.WORKING), canary_interval_ms=None).verdict
    assert judge(replace(e, hardware=Hardware.UNKNOWN), canary_interval_ms=None).verdict is known


# -- stories ---------------------------------------------------------------------------------------------


@dataclass
class Host:
    """A server with one engine and two workers on two GPUs, as the series of gpuwatch's sources show it.

    Its fields are what it does; `second()` writes what would be read in a second, and judges. What is wanted
    is asked: a question is answered by the next second, or not.
    """

    running: int = 0
    waiting: int = 0
    steps_a_second: float = 0  # 0: none
    kv_grows: bool = False  # the chunks of a long prompt
    shows: bool = True  # whether the gauges follow; those of an engine that hangs do not
    paused: bool = False
    hangs: bool = False  # no answer to is_paused or a canary
    metrics: bool = True
    sleep_level: int = 0
    cores: float = 0.01
    use: dict[str, float] = field(default_factory=lambda: {"GPU-0": 0.0, "GPU-1": 0.0})
    watts: dict[str, float] = field(default_factory=lambda: {"GPU-0": 110.0, "GPU-1": 115.0})
    states: dict[str, str] = field(default_factory=lambda: dict.fromkeys(ROLES, "running"))
    exits: dict[str, int] = field(default_factory=lambda: dict.fromkeys(ROLES, 0))
    in_flight: dict[str, int] = field(default_factory=dict)
    has_gpus: bool = True
    has_tree: bool = True
    asks: bool = True

    def __post_init__(self):
        self.store = Store(3_610_000)
        self.state = ServerState(
            name="qwen", phase=ServerPhase.SERVING, since_ms=START_MS, seen_at_ms=START_MS
        )
        self.now_ms = START_MS
        self.steps = 0.0
        self.kv = 0.0
        self.cpu_s = 0.0
        self.page = (0, 0, 0.0, 0.0)
        self.given = {}
        self.pending = []  # (when it is known, when it was asked, the answers by metric)
        self.asking_until_ms = 0
        self.asked = []
        self.told = []
        self.longest_us = 0

    # what the sources give

    def append(self, target, values):
        ended = self.given.get(target, set()) - values.keys()
        self.given[target] = set(values)
        values = {**values, **dict.fromkeys(ended, STALE)}
        if values:
            self.store.append(target, self.now_ms, list(values), list(values.values()))

    def read(self):
        if self.has_tree:
            self.append("processes", dict(self.process_series()))
        if self.has_gpus:
            self.append("nvml", dict(self.gpu_series()))
        flying = {
            Labels.of("server_requests_in_flight", server="qwen", source=source): float(n)
            for source, n in self.in_flight.items()
        }
        self.append("allocator", flying)
        if self.now_ms % 2000 == 0:
            self.append("metrics:qwen", dict(self.page_series()) if self.metrics else {})

    def process_series(self):
        for process, state in self.states.items():
            labels = {"server": "qwen", "process": process, "role": ROLES[process]}
            yield Labels.of("server_process_exits_total", **labels), float(self.exits[process])
            if state == "gone":
                continue
            for one in ("running", "stopped", "blocked", "zombie"):
                yield Labels.of("server_process_state", state=one, **labels), float(one == state)
            cpu_s = self.cpu_s if process == "EngineCore" else 1.0
            yield Labels.of("server_process_cpu_seconds_total", **labels), cpu_s

    def gpu_series(self):
        for gpu, uuid in enumerate(self.use):
            labels = {"gpu": str(gpu), "uuid": uuid}
            yield Labels.of("gpu_utilization_ratio", **labels), self.use[uuid]
            yield Labels.of("gpu_power_draw_watts", **labels), self.watts[uuid]
            yield Labels.of("gpu_power_limit_watts", **labels), 700.0
            if self.states.get(f"Worker_TP{gpu}") != "gone":
                held = Labels.of("gpu_process_memory_used_bytes", server="qwen", owner="vllm", **labels)
                yield held, 7e10

    def page_series(self):
        if self.shows:
            self.page = (self.running, self.waiting, self.steps // 1, self.kv)
        one = {"server": "qwen", "engine": "0", "model_name": "m"}
        running, waiting, steps, kv = map(float, self.page)
        yield Labels.of("vllm:num_requests_running", **one), running
        yield Labels.of("vllm:num_requests_waiting", **one), waiting
        yield Labels.of("vllm:iteration_tokens_total_count", **one), steps
        yield Labels.of("vllm:kv_cache_usage_perc", **one), kv
        for state, level in (("awake", 0), ("weights_offloaded", 1), ("discard_all", 2)):
            value = float(level == self.sleep_level)
            yield Labels.of("vllm:engine_sleep_state", sleep_state=state, **one), value

    # what goes on

    def second(self, n=1):
        for _ in range(n):
            self.now_ms += SECOND
            self.steps += self.steps_a_second
            self.kv += 0.001 * self.kv_grows
            self.cpu_s += self.cores
            self.answer()
            self.read()
            self.judge()
        return self

    def judge(self):
        began = time.perf_counter_ns()
        e = evidence(self.store, self.state, now_ms=self.now_ms, canary_interval_ms=CANARY_INTERVAL_MS)
        progress = judge(e, canary_interval_ms=CANARY_INTERVAL_MS)
        self.longest_us = max(self.longest_us, (time.perf_counter_ns() - began) // 1000)
        told = f"{progress.verdict}/{progress.reason}"
        if not self.told or self.told[-1][1] != told:
            self.told.append((self.seconds, told))
        if self.asks and progress.wants and self.now_ms >= self.asking_until_ms:
            self.ask(progress.wants)

    def ask(self, wants):
        """One question after the other; what hangs is given up after 2 s, and after 10."""
        asked_ms = known_ms = self.now_ms + 700
        found = {"server_paused": float(self.paused and not self.hangs)}
        known_ms += 2000 * self.hangs
        if "canary" in wants and not self.paused:
            known_ms += 10_000 * self.hangs
            found["server_canary_ok"] = float(not self.hangs)
            self.steps += not self.hangs
        self.pending.append((known_ms, asked_ms, found))
        self.asking_until_ms = known_ms
        self.asked.append((self.seconds, *sorted(wants)))

    def answer(self):
        """An answer stands at the instant of its question; the probe's next read ends its series."""
        due = [one for one in self.pending if one[0] <= self.now_ms]
        self.pending = [one for one in self.pending if one[0] > self.now_ms]
        for _, asked_ms, found in due:
            labels = [Labels.of(metric, server="qwen") for metric in found]
            self.store.append("probe:qwen", asked_ms, labels, list(found.values()))
            self.store.append("probe:qwen", asked_ms + 1, labels, [STALE] * len(labels))

    @property
    def seconds(self):
        return (self.now_ms - START_MS) // SECOND

    def loaded(self, seconds=30):
        """Under load for a while."""
        self.running, self.waiting, self.steps_a_second, self.cores = 4, 2, 30, 1.2
        self.use, self.watts = {"GPU-0": 0.97, "GPU-1": 0.96}, {"GPU-0": 500.0, "GPU-1": 490.0}
        return self.second(seconds)

    def stands(self, **more):
        """Neither steps nor anything that computes; the gauges freeze."""
        self.steps_a_second, self.cores, self.shows, self.hangs = 0, 0.01, False, True
        self.use, self.watts = {"GPU-0": 0.0, "GPU-1": 0.0}, {"GPU-0": 118.0, "GPU-1": 117.0}
        for name, value in more.items():
            setattr(self, name, value)
        return self

    def goes_on(self):
        self.shows, self.hangs = True, False
        return self.loaded(5)

    def since(self, second):
        """What was told from a second on: (seconds after it, verdict)."""
        return [(at - second, told) for at, told in self.told if at > second]


ROLES = {
    "APIServer": "api_server",
    "EngineCore": "engine_core",
    "Worker_TP0": "worker",
    "Worker_TP1": "worker",
}


def resting(seconds=30, **changes):
    """A server that has served, and has no requests now."""
    host = Host(**changes).loaded(10)
    host.running = host.waiting = 0
    return host.stands(shows=True, hangs=False).second(seconds)


def verdicts(host):
    return [told for _, told in host.told]


def test_a_server_under_load_works_and_is_asked_nothing():
    host = Host().loaded(600)
    assert verdicts(host)[-1:] == ["working/steps"]
    assert "stalled" not in str(host.told)
    assert host.asked == []


def test_an_engine_that_hangs_under_load_is_stalled_within_ten_seconds_of_its_last_token():
    host = Host().loaded()
    at = host.seconds
    host.stands().second(20)
    ((after_s, told),) = [one for one in host.since(at) if one[1].startswith("stalled")]
    assert told == "stalled/no_steps"
    assert after_s <= 9
    host.goes_on()
    assert host.told[-1][1] == "working/steps"


def test_a_stopped_engine_is_stalled_at_once_and_over_with_sigcont():
    host = Host().loaded()
    at = host.seconds
    host.stands().states["EngineCore"] = "stopped"
    host.second(20)
    assert host.since(at) == [(3, "stalled/process_stopped")]
    host.states["EngineCore"] = "running"
    host.goes_on()
    assert host.told[-1][1] == "working/steps"


@pytest.mark.parametrize("process", ROLES)
def test_a_stopped_process_is_stalled_also_while_nobody_asks(process):
    host = resting()
    at = host.seconds
    host.states[process] = "stopped"
    assert host.second(5).since(at) == [(3, "stalled/process_stopped")]


def test_an_api_server_that_is_stopped_is_no_riddle_although_its_metrics_hang():
    host = Host().loaded()
    at = host.seconds
    host.stands(metrics=False).states["APIServer"] = "stopped"
    assert host.second(40).since(at) == [(3, "stalled/process_stopped")]


@pytest.mark.parametrize("process", [name for name in ROLES if name != "APIServer"])
@pytest.mark.parametrize("state", ["gone", "zombie"])
def test_a_process_that_ends_is_a_stall_in_the_second_it_ends(process, state):
    host = Host().loaded()
    at = host.seconds
    host.stands().states[process], host.exits[process] = state, 1
    assert host.second(9).since(at) == [(1, "stalled/process_died")]


def test_the_end_of_a_stop_is_no_stall():
    host = resting()
    host.state = replace(
        host.state, supervisor=SupervisorState(phase=SupervisorPhase.DEACTIVATING, stop_asked=True)
    )
    host.states["EngineCore"], host.exits["EngineCore"] = "gone", 1
    assert host.second(3).told[-1][1] == "stopped/stopping"


def test_a_process_that_another_of_its_name_replaced_did_not_die():
    host = resting()
    at = host.seconds
    host.exits["Worker_TP0"] = 1
    assert host.second(5).since(at) == []


def test_an_engine_that_hung_while_idle_is_found_by_the_requests_that_the_api_holds():
    host = resting(in_flight={"admission": 0})
    host.stands()
    at = host.second(60).seconds
    host.in_flight["admission"] = 3
    host.second(40)
    assert [told for _, told in host.since(at)] == ["working/in_api", "stalled/canary_unanswered"]
    assert host.told[-1][0] - at <= 20
    assert host.asked[0][1:] == ("canary",)


def test_what_load_counts_is_believed_once_it_was_seen():
    host = resting(in_flight={"load": 0})
    at = host.stands().second(60).seconds
    host.in_flight["load"] = 1
    host.second(40)
    assert host.since(at)[-1][1] == "stalled/canary_unanswered"


def test_an_engine_that_hung_while_idle_is_found_by_a_canary_where_nobody_counts():
    host = resting(in_flight={"load": 0}).stands().second(400)
    assert verdicts(host)[-1] == "stalled/canary_unanswered"
    assert host.told[-1][0] <= 340
    host.shows, host.hangs = True, False
    assert host.second(30).told[-1][1] == "idle/no_requests"


def test_a_quiet_server_is_asked_for_one_token_every_five_minutes_and_is_idle():
    host = resting(3600)
    assert verdicts(host)[-1] == "idle/no_requests"
    assert "stalled" not in str(host.told)
    assert 10 <= len(host.asked) <= 12


def test_a_quiet_server_whose_requests_are_counted_is_asked_nothing():
    assert resting(1200, in_flight={"admission": 0}).asked == []


def test_a_client_that_reads_slowly_is_no_stall():
    host = resting(in_flight={"admission": 2}).second(600)
    assert verdicts(host)[-1] == "working/in_api"
    assert "stalled" not in str(host.told)
    assert len(host.asked) <= 45


def test_a_pause_is_seen_as_one_and_so_is_its_end():
    host = Host().loaded()
    at = host.seconds
    host.stands(paused=True, hangs=False).second(120)
    assert [told for _, told in host.since(at)] == ["paused/operator"]
    host.paused = False
    host.goes_on()
    assert host.told[-1][1] == "working/steps"


def test_a_pause_that_a_guest_tells_need_not_be_asked_for():
    host = Host().loaded()
    host.stands(paused=True, hangs=False)
    at = host.seconds
    for _ in range(30):
        guest = Labels.of("server_guest_paused", server="qwen")
        host.store.append("guest", host.now_ms + 900, [guest], [1.0])
        host.second(1)
    assert (host.asked, [told for _, told in host.since(at)]) == ([], ["paused/operator"])


def test_a_guest_that_falls_silent_leaves_its_word_behind():
    """As in the first second of a gpuwatch that was restarted, which does not know yet whose guest it is."""
    host = Host(asks=False).loaded()
    host.stands()
    guest = Labels.of("server_guest_paused", server="qwen")
    for _ in range(10):
        host.store.append("guest", host.now_ms + 900, [guest], [0.0])
        host.second(1)
    assert host.told[-1][1] == "stalled/no_steps"
    host.store.append("guest", host.now_ms + 900, [guest], [STALE])
    assert host.second(1).told[-1][1] == "stalled/no_steps"


def test_a_pause_that_gpuwatch_made_by_a_limit_of_nothing_is_its_own():
    host = Host().loaded()
    host.stands(hangs=False).second(1)
    host.store.append(
        "limits", host.now_ms, [Labels.of("server_limit", server="qwen", limit="running")], [0.0]
    )
    assert host.second(1).told[-1][1] == "paused/own"


def test_a_sleep_is_seen_as_one_and_so_is_waking():
    host = resting()
    host.sleep_level = 1
    assert host.second(400).told[-1][1] == "asleep/weights_offloaded"
    assert host.asked == []
    host.sleep_level = 0
    assert host.second(3).told[-1][1] == "idle/no_requests"


def test_a_long_prompt_whose_chunks_fill_the_kv_cache_takes_steps():
    host = Host().loaded()
    host.steps_a_second, host.kv_grows = 0, True
    host.second(300)
    assert set(verdicts(host)) <= {"idle/no_requests", "starting/first_metrics", "working/steps"}


def test_a_step_of_fifty_seconds_that_computes_is_a_long_step():
    host = Host().loaded()
    at = host.seconds
    host.steps_a_second = 0
    host.second(50)
    assert [told for _, told in host.since(at)] == ["working/long_step"]
    host.loaded(10)
    host.steps_a_second = 0
    assert host.second(120).told[-1][1] == "working/long_step", "50 s were normal here"
    assert host.second(60).told[-1][1] == "stalled/long_step"


def test_a_first_request_that_compiles_for_minutes_is_no_stall():
    host = Host(in_flight={"admission": 1}, hangs=True, cores=3.0)
    host.second(170)
    assert set(verdicts(host)) == {"starting/first_metrics", "working/in_api", "working/long_step"}
    host.hangs = False
    assert host.loaded(10).told[-1][1] == "working/steps"


def test_a_lost_worker_whose_partner_spins_is_a_stall_also_where_no_process_is_seen_to_end():
    host = Host().second(20).loaded()
    at = host.seconds
    host.stands(cores=1.0, use={"GPU-0": 1.0, "GPU-1": 0.0}, watts={"GPU-0": 127.0, "GPU-1": 75.0})
    host.second(20)
    ((after_s, told),) = [one for one in host.since(at) if one[1].startswith("stalled")]
    assert told == "stalled/spinning"
    assert after_s <= 12


def test_a_gpu_that_is_hot_computes():
    host = Host().second(20).loaded()
    host.stands(cores=1.0, use={"GPU-0": 1.0, "GPU-1": 1.0}, watts={"GPU-0": 600.0, "GPU-1": 600.0})
    host.second(50)
    assert host.told[-1][1] == "working/long_step"


@pytest.mark.parametrize(
    "blind", [{"has_gpus": False, "has_tree": False}, {"has_tree": False}, {"asks": False}]
)
def test_who_cannot_see_all_takes_a_minute(blind):
    host = Host(**blind).loaded()
    at = host.seconds
    host.stands().second(100)
    ((after_s, told),) = [one for one in host.since(at) if one[1].startswith("stalled")]
    assert told == "stalled/long_step"
    assert 60 <= after_s <= 64


def test_gpus_that_cannot_be_told_apart_from_others_make_it_slow():
    """The server's processes are seen to rest, but on which GPU they are is not."""
    host = Host().loaded()
    at = host.seconds
    host.states = {name: state for name, state in host.states.items() if "Worker" not in name}
    host.use, host.watts = {}, {}
    host.second(10)
    host.stands(use={"GPU-9": 0.0}, watts={"GPU-9": 100.0}).states.update({"Worker_TP0": "gone"})
    host.second(50)
    assert "no_steps" not in str(host.since(at))


def test_a_server_without_gpus_is_judged_by_its_processes():
    host = Host(has_gpus=False).loaded()
    at = host.seconds
    host.stands().second(20)
    assert host.since(at)[-1][1] == "stalled/no_steps"


def test_metrics_that_hang_say_nothing():
    host = Host().loaded()
    at = host.seconds
    host.metrics = False
    host.second(20)
    ((after_s, told),) = host.since(at)
    assert (told, after_s) in {("unknown/no_metrics", 10), ("unknown/no_metrics", 11)}
    host.metrics = True
    assert host.second(3).told[-1][1] == "working/steps"


def test_a_host_that_slept_does_not_call_its_server_stalled():
    host = Host().loaded()
    host.now_ms += 3600 * SECOND
    host.second(2).loaded(10)
    assert "stalled" not in str(host.told)


def test_a_gpuwatch_that_begins_anew_in_a_stall_says_the_same():
    host = Host().loaded()
    host.stands().second(40)
    host.given.clear()
    host.pending.clear()
    host.now_ms += 8 * SECOND
    at = host.seconds
    host.second(1)
    assert host.since(at) == []
    assert host.told[-1][1] == "stalled/no_steps"


def test_requests_that_come_and_go_between_two_scrapes_are_work():
    host = resting()
    at = host.seconds
    host.steps_a_second = 30
    host.second(20)
    host.steps_a_second = 0
    host.second(10)
    assert [told for _, told in host.since(at)] == ["working/steps", "idle/no_requests"]


def test_a_server_that_does_not_serve_is_judged_by_its_phase_alone():
    host = Host().loaded()
    host.state = replace(host.state, phase=ServerPhase.DOWN, since_ms=host.now_ms)
    assert host.second(1).told[-1][1] == "down/health"
    host.state = replace(host.state, starting_since_ms=host.now_ms)
    assert host.second(1).told[-1][1] == "starting/coming_back"
    host.state = replace(host.state, phase=ServerPhase.SERVING, since_ms=host.now_ms + 500)
    host.metrics = False
    assert host.second(1).told[-1][1] == "starting/first_metrics"
    host.metrics = True
    assert host.second(3).told[-1][1] == "working/steps"


# -- a recording -----------------------------------------------------------------------------------------


def test_seven_minutes_of_a_real_gpu_hold_no_stall():
    recording = Recording(H200)
    store, told, state = Store(3_610_000), [], None
    supervisor = PlayedSupervisor(recording.has_server_process)
    sources = recording.sources("qwen")
    given = {}
    for second in range(435):
        now_ms = recording.start_ms + second * SECOND
        found = {}
        for source in sources:
            if now_ms // SECOND * SECOND % source.interval_ms == 0:
                try:
                    found[source.name] = {s.labels: s.value for s in source.read(now_ms)}
                except SourceError:
                    found[source.name] = {}
        for name, values in found.items():
            ended = given.get(name, set()) - values.keys()
            given[name] = set(values)
            row = {**values, **dict.fromkeys(ended, STALE)}
            store.append(name, now_ms, list(row), list(row.values()))
        ok = found["health:qwen"].get(Labels.of("server_health_ok", server="qwen"))
        state = servers.judge(
            state,
            name="qwen",
            supervisor=supervisor.observe(now_ms),
            answer=servers.HealthAnswer(servers.Health.OK if ok else servers.Health.FAILING, now_ms),
            now_ms=now_ms,
            start_deadline_ms=15 * MINUTE,
        )
        e = evidence(store, state, now_ms=now_ms, canary_interval_ms=CANARY_INTERVAL_MS)
        now_told = verdict(e)
        if not told or told[-1][1] != now_told:
            told.append((second, now_told))
    assert "stalled" not in str(told)
    assert [one for _, one in told][:2] == ["unknown/unseen", "starting/loading"]
    assert {"working/steps", "idle/no_requests", "down/health", "starting/coming_back"} <= {
        v for _, v in told
    }
