"""What a remediation cost and gave, by the series of its time."""

from __future__ import annotations

import pytest

from gpuwatch.records import STALE, Labels, Mode, PastStep, Phase, Plan, Remediation, Step, StepEnd
from gpuwatch.servers.account import account
from gpuwatch.store import Store

SECOND, MINUTE = 1000, 60_000
GIB = 2**30
START_MS = 1_800_000_000_000
BY_REASON = ("stop", "length", "abort", "error", "repetition")


class Host:
    """A server's series, second by second; what it does is set from outside."""

    def __init__(self):
        self.store = Store(7_200_000)
        self.now_ms = START_MS
        self.given = {}
        self.knows_processes = True
        self.begin()

    def begin(self):
        """A new life of its process."""
        self.born_ms = self.now_ms
        self.serving = True
        self.ended = dict.fromkeys(BY_REASON, 0)
        self.tokens = self.http_5xx = self.rejected = self.refused = 0
        self.running, self.memory, self.tokens_a_second = 0, 100 * GIB, 50
        return self

    def die(self):
        self.serving = False
        return self

    def second(self, n=1, *, scraped=True):
        for _ in range(n):
            self.now_ms += SECOND
            self.tokens += self.tokens_a_second
            phase = Labels.of("server_phase", server="qwen", phase="serving")
            self.append("server", {phase: float(self.serving)})
            self.append("page", self.page() if self.serving and scraped else {})
            refused = {Labels.of("server_admission_refused_total", server="qwen"): float(self.refused)}
            self.append("guests", refused if self.serving else {})
            self.append("nvml", self.gpu() if self.serving else {})
            self.append("processes", self.process() if self.serving and self.knows_processes else {})
        return self

    def page(self):
        one = {"server": "qwen", "engine": "0", "model_name": "m"}
        values = {
            Labels.of("vllm:request_success_total", finished_reason=reason, **one): float(count)
            for reason, count in self.ended.items()
        }
        values[Labels.of("vllm:num_requests_running", **one)] = float(self.running)
        values[Labels.of("vllm:num_requests_waiting", **one)] = 0.0
        values[Labels.of("vllm:generation_tokens_total", **one)] = float(self.tokens)
        rejected = Labels.of("vllm:admission_rejections_total", server="qwen", reason="max_num_queued_reqs")
        values[rejected] = float(self.rejected)
        ok = Labels.of("http_requests_total", server="qwen", handler="/v1/completions", status="2xx")
        values[ok] = 1000.0
        if self.http_5xx:  # such a series is not there before the first
            failed = Labels.of("http_requests_total", server="qwen", handler="/v1/completions", status="5xx")
            values[failed] = float(self.http_5xx)
        return values

    def gpu(self):
        labels = {
            "server": "qwen",
            "process": "VLLM::EngineCore",
            "owner": "vllm",
            "gpu": "0",
            "uuid": "GPU-0",
        }
        return {Labels.of("gpu_process_memory_used_bytes", **labels): float(self.memory)}

    def process(self):
        labels = {"server": "qwen", "process": "vllm", "role": "api_server"}
        return {Labels.of("server_process_start_time_seconds", **labels): self.born_ms / 1000}

    def append(self, target, values):
        ended = self.given.get(target, set()) - values.keys()
        self.given[target] = set(values)
        values = {**values, **dict.fromkeys(ended, STALE)}
        if values:
            self.store.append(target, self.now_ms, list(values), list(values.values()))

    def account(self, began_ms, server="qwen", course=()):
        plan = Plan(
            id="GW-1",
            server=server,
            alert="VLLMDown",
            alert_labels=Labels(),
            steps=(Step(action="restart", within_ms=1),),
            verify_for_ms=0,
            mode=Mode.AUTO,
            dry_run=False,
            policy="p",
        )
        ended = Remediation(
            plan=plan,
            phase=Phase.SUCCEEDED,
            step_index=0,
            since_ms=self.now_ms,
            created_at_ms=began_ms,
            course=tuple(course),
        )
        return dict(account(self.store, ended, ended_at_ms=self.now_ms))


def test_of_a_server_that_nobody_read_nothing_is_known():
    assert Host().second().account(START_MS, server="other") == {}


def test_what_went_before_the_remediation_is_not_its_own():
    host = Host()
    host.ended["stop"], host.ended["abort"], host.refused, host.rejected = 100, 7, 3, 2
    host.second(120)
    began_ms = host.now_ms
    host.ended["stop"], host.ended["length"], host.ended["abort"] = 104, 1, 8
    host.refused, host.rejected = 8, 3
    found = host.second(10).account(began_ms)
    assert found["requests_finished"] == 5
    assert found["requests_aborted"] == 1
    assert found["requests_refused"] == 6
    assert found["seconds_without_service"] == 0


def test_a_counter_that_begins_anew_is_counted_in_each_life():
    host = Host()
    host.ended["stop"] = 100
    host.second(60)
    began_ms = host.now_ms
    host.ended["stop"] = 103
    host.second(5).die().second(30).begin()
    host.ended["stop"] = 2
    host.second(5)
    host.ended["stop"] = 6
    assert host.second(5).account(began_ms)["requests_finished"] == 9


def test_a_new_life_is_seen_also_where_it_has_counted_further_than_the_last():
    host = Host()
    host.ended["stop"] = 3
    host.second(60)
    began_ms = host.now_ms
    host.second(5).die().second(30).begin()
    host.ended["stop"] = 10
    assert host.second(5).account(began_ms)["requests_finished"] == 10


def test_a_page_that_was_not_read_for_a_while_is_no_new_life():
    host = Host()
    host.ended["stop"] = 3
    host.second(60)
    began_ms = host.now_ms
    host.second(5, scraped=False)
    host.ended["stop"] = 10
    assert host.second(5).account(began_ms)["requests_finished"] == 7


def test_of_a_server_that_was_down_all_counts_that_its_new_life_has_counted():
    host = Host().die().second(60)
    began_ms = host.now_ms
    host.second(30).begin()
    host.ended["stop"] = 4
    assert host.second(5).account(began_ms)["requests_finished"] == 4


def test_a_total_that_was_never_read_before_is_no_increase():
    host = Host()
    host.born_ms -= 60 * MINUTE
    host.ended["stop"] = 1_000_000
    assert host.second(5).account(START_MS - 5 * SECOND)["requests_finished"] == 0


def test_requests_in_hand_when_the_process_ended_were_aborted():
    host = Host().second(60)
    began_ms = host.now_ms
    host.running = 4
    host.second(5).die().second(30).begin().second(5)
    assert host.account(began_ms)["requests_aborted"] == 4
    host.running = 6  # of the life that goes on
    assert host.second(5).account(began_ms)["requests_aborted"] == 4


def test_requests_in_hand_at_a_stop_that_nothing_followed_were_aborted():
    host = Host().second(60)
    began_ms = host.now_ms
    host.running = 4
    assert host.second(5).die().second(30).account(began_ms)["requests_aborted"] == 4


def test_a_restart_after_a_drain_aborts_none():
    host = Host().second(60)
    host.running = 4
    began_ms = host.second(5).now_ms
    host.running = 0
    host.ended["stop"] = 4
    found = host.second(2).die().second(30).begin().second(5).account(began_ms)
    assert (found["requests_finished"], found["requests_aborted"]) == (4, 0)


def test_what_failed_is_counted_once_and_vllm_s_own_refusals_are_none_of_it():
    host = Host().second(60)
    began_ms = host.now_ms
    host.ended["error"], host.ended["abort"], host.rejected, host.http_5xx = 2, 1, 3, 8
    found = host.second(5).account(began_ms)
    assert found["requests_aborted"] == 1 + 5
    assert found["requests_refused"] == 3


def test_time_without_service_is_time_in_any_other_phase():
    host = Host().second(60)
    began_ms = host.now_ms
    found = host.second(10).die().second(30).begin().second(20).account(began_ms)
    assert found["seconds_without_service"] == 30


def slept(from_ms, until_ms, end=StepEnd.DONE):
    half_ms = (from_ms + until_ms) // 2
    spans = {"sleep": (from_ms, half_ms), "wake": (half_ms, until_ms)}
    return [
        PastStep(
            action=name, began_at_ms=begin, ended_at_ms=over, end=end if name == "sleep" else StepEnd.DONE
        )
        for name, (begin, over) in spans.items()
    ]


def test_time_asleep_is_without_service_though_health_answers_and_counts_once_where_it_died_too():
    host = Host().second(60)
    began_ms = host.now_ms
    its = slept(began_ms + 2500, began_ms + 9000)
    assert host.second(10).account(began_ms, course=its)["seconds_without_service"] == 6.5
    its = slept(began_ms + 8000, began_ms + 14_000)
    assert host.die().second(10).account(began_ms, course=its)["seconds_without_service"] == 12


def test_a_server_that_could_not_be_put_to_sleep_served():
    host = Host().second(60)
    began_ms = host.now_ms
    its = slept(began_ms + 2500, began_ms + 9000, StepEnd.LATE)
    assert host.second(10).account(began_ms, course=its)["seconds_without_service"] == 0


def test_time_without_service_begins_with_the_remediation():
    host = Host().second(10).die().second(40)
    began_ms = host.now_ms
    assert host.second(25).begin().second(5).account(began_ms)["seconds_without_service"] == 26


@pytest.mark.parametrize(("serves_then", "seconds"), [(True, 0), (False, 101)])
def test_time_that_nobody_watched_counts_if_it_ended_without_service(serves_then, seconds):
    host = Host().second(60)
    began_ms = host.now_ms
    host.die().second()
    host.now_ms += 100 * SECOND
    host.serving = serves_then
    host.append("server", {Labels.of("server_phase", server="qwen", phase="serving"): float(serves_then)})
    assert host.account(began_ms)["seconds_without_service"] == pytest.approx(seconds, abs=1)


def test_memory_and_throughput_are_told_as_they_were_last_before_and_as_they_are():
    host = Host().second(90).die().second(60)
    began_ms = host.now_ms
    host.second(30).begin()
    host.memory, host.tokens_a_second = 80 * GIB, 40
    found = host.second(30).account(began_ms)
    assert (found["memory_before_bytes"], found["memory_after_bytes"]) == (100 * GIB, 80 * GIB)
    assert found["tokens_per_s_before"] == pytest.approx(50)
    assert found["tokens_per_s_after"] == pytest.approx(40)


def test_a_server_that_is_gone_has_no_memory_and_no_throughput_after():
    host = Host().second(90)
    began_ms = host.now_ms
    found = host.die().second(60).account(began_ms)
    assert {"memory_before_bytes", "tokens_per_s_before"} <= found.keys()
    assert not {"memory_after_bytes", "tokens_per_s_after"} & found.keys()


def test_without_the_times_at_which_processes_began_a_total_that_fell_still_begins_anew():
    host = Host()
    host.knows_processes = False
    host.ended["stop"] = 100
    host.second(60)
    began_ms = host.now_ms
    host.ended["stop"] = 103
    host.second(5).die().second(30).begin()
    host.ended["stop"] = 2
    assert host.second(5).account(began_ms)["requests_finished"] == 5
