"""What a log says of a start, why it failed, and how a life is followed from records alone."""

import dataclasses
import json
import os
import stat
import sys
from contextlib import closing
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from gpuwatch import cli, rules
from gpuwatch.config.rulefiles import load_rules
from gpuwatch.errors import ServerError
from gpuwatch.records import (
    Labels,
    ServerPhase,
    ServerStart,
    ServerState,
    StartOutcome,
    SupervisorPhase,
    SupervisorState,
)
from gpuwatch.rules.templates import Template
from gpuwatch.servers.starts import failures, lines
from gpuwatch.servers.starts.arguments import arguments_of, configuration_of, redacted
from gpuwatch.servers.starts.log import MOST_BYTES, FileLog, JournalLog, mark
from gpuwatch.servers.starts.watch import METRICS, StartWatch, samples
from gpuwatch.store.state import open_state
from gpuwatch.store.writing import Changes

ROOT = Path(__file__).parents[2]
LOGS = ROOT / "tests/recordings/starts"
GIB = 2**30
BEGAN_MS = 1_795_252_500_000  # 2026-11-21 09:15:00 UTC
STARTING, HEALTHY, FAILED, STOPPED, UNKNOWN = StartOutcome


def recorded(name):
    return (LOGS / f"{name}.log").read_text(encoding="utf-8").splitlines()


def a_start(outcome=STARTING, began_at_ms=BEGAN_MS, **more):
    return ServerStart(server="qwen", began_at_ms=began_at_ms, outcome=outcome, **more)


def read(name, outcome=STARTING):
    return lines.read(a_start(outcome), recorded(name))


# -- figures ---------------------------------------------------------------------------------------


def test_each_worker_has_its_figures_whatever_colours_the_log_has():
    start = read("cuda-0.24-two-workers")
    worker = {name: round(value / GIB, 2) for name, value in start.figures["Worker_TP1"].items()}
    assert start.figures["Worker_TP0"] == start.figures["Worker_TP1"]
    assert worker == {
        "weights_bytes": 3.78,
        "kv_cache_bytes": 111.4,
        "cuda_graphs_bytes": 0.21,
        "cuda_graphs_estimated_bytes": 0.25,
        "activation_peak_bytes": 2.25,
        "non_torch_bytes": 1.4,
        "free_at_start_bytes": 138.9,
        "total_bytes": 139.8,
        "requested_bytes": 118.83,
        "kv_cache_suggested_bytes": 111.06,
        "kv_cache_most_bytes": 131.13,
    }
    assert (start.version, start.kv_cache_tokens, start.max_concurrency) == ("0.24.0", 1_622_304, 396.07)
    assert start.failure == ""


def test_where_one_line_has_weights_and_the_rest_in_one_the_rest_is_told_apart():
    start = read("cuda-0.33-one-process")
    (figures,) = start.figures.values()
    assert figures["weights_bytes"] == round(7.56 * GIB)
    assert figures["non_torch_bytes"] == pytest.approx(1.6 * GIB, abs=2)
    assert (start.version, start.kv_cache_tokens, start.max_concurrency) == ("0.33.0", 804_032, 196.3)


def test_a_real_start_tells_its_cache_and_a_stop_after_it_is_no_failure():
    start = read("cpu-healthy-then-stopped")
    assert start.figures["Worker"] == {"kv_cache_bytes": GIB}
    assert (start.version, start.kv_cache_tokens, start.max_concurrency) == ("0.32.0", 2_097_152, 2048.0)
    assert (start.failure, start.lines) == ("", ())


def test_the_caches_of_several_engines_add_up():
    told = ["(EngineCore_DP0 pid=1) INFO 11-20 12:00:00 [a.py:1] GPU KV cache size: 1,000 tokens"]
    told.append(told[0].replace("DP0", "DP1"))
    assert lines.read(a_start(), told + told).kv_cache_tokens == 2000


@pytest.mark.parametrize("name", sorted(path.stem for path in LOGS.glob("*.log")))
def test_lines_read_twice_or_in_two_looks_say_the_same(name):
    told = recorded(name)
    once = lines.read(a_start(), told)
    assert lines.read(once, told) == once
    half = len(told) // 2
    assert dataclasses.replace(
        lines.read(lines.read(a_start(), told[:half]), told[half:]), facts={}
    ) == dataclasses.replace(once, facts={})


# -- failures --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "failure", "facts"),
    [
        ("cuda-share-not-free", "memory_share_not_free", {"device": "cuda:0", "free": 61.25, "total": 139.8,
                                                          "share": "0.9", "wanted": 125.82}),
        ("cuda-kv-cache-too-small", "kv_cache_too_small", {"max_model_len": "32768", "needed": 4.5,
                                                           "available": 2.06, "longest_model_len": "15008"}),
        ("cpu-kv-cache-too-small", "kv_cache_too_small", {"max_model_len": "3000000", "needed": 1.43,
                                                          "available": 1.0, "longest_model_len": "2097024"}),
        ("cuda-no-memory-for-cache", "no_memory_for_cache", {}),
        ("cuda-auto-fit-failed", "auto_fit_failed", {}),
        ("cuda-oom-while-loading", "runtime_oom", {"gpu": "1", "tried": 2.32, "total": 139.8, "free": 1.1,
                                                   "process": 48.61, "allocated": 46.02,
                                                   "unallocated": 310.5 / 1024}),
        ("cuda-profiling-assert", "profiling_assert", {"free_before": 101.2, "free_after": 130.75}),
        ("cuda-engine-start-timeout", "engine_start_timeout", {"waited_s": "600"}),
        ("cpu-unrecognized-argument", "bad_argument", {"detail": "unrecognized arguments: --swap-space 4"}),
        ("cpu-port-busy", "port_busy", {"port": "18261"}),
        ("cpu-no-such-folder", "model_not_found", {"model": "/nonexistent/model"}),
        ("cpu-no-such-model", "model_not_found", {"model": "acme/absent"}),
        ("cpu-worker-killed-while-starting", "process_died", {}),
        ("cuda-unknown", "unknown", {}),
    ],
)  # fmt: skip
def test_the_first_cause_counts_with_its_figures(name, failure, facts):
    start = read(name)
    assert start.failure == failure
    expected = {
        key if isinstance(value, str) else f"{key}_bytes": value
        if isinstance(value, str)
        else str(round(value * GIB))
        for key, value in facts.items()
    }
    assert start.facts == expected
    assert len(start.lines) == 1


def test_what_a_validation_found_wrong_is_told_from_the_lines_after_it():
    start = read("cpu-unknown-quantization")
    assert (start.failure, start.facts["of"]) == ("bad_argument", "ModelConfig")
    assert start.facts["detail"].startswith("Unknown quantization method: int8. Must be one of")
    told = [
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for CacheConfig",
        "gpu_memory_utilization",
        "  Input should be less than or equal to 1 [type=less_than_equal, input_value=1.2, input_type=float]",
    ]
    assert lines.read(a_start(), told).facts["detail"] == "Input should be less than or equal to 1"


def test_an_error_that_no_class_names_is_told_by_its_line():
    assert read("cuda-unknown").lines == (
        "ImportError: libcudart.so.12: cannot open shared object file: No such file or directory",
    )


def test_a_server_that_died_of_memory_under_load_is_told_so_and_its_requests_mistakes_are_not():
    start = read("cuda-oom-under-load")
    assert start.failure == "runtime_oom"
    assert (start.facts["tried_bytes"], start.facts["gpu"]) == (str(16 * 2**20), "0")


def test_an_engine_that_was_killed_while_it_served_is_a_process_that_died():
    assert read("cpu-engine-killed", HEALTHY).failure == "process_died"


def test_what_was_said_before_it_was_healthy_is_no_failure():
    told = ["ValueError: one of many tries failed", "INFO:     Application startup complete."]
    assert lines.read(a_start(), told) == a_start()


@given(st.lists(st.text(max_size=200), max_size=20))
def test_no_line_whatever_breaks_it(told):
    assert lines.read(a_start(), told).server == "qwen"


TEXTS = ("summary", "runbook", "summary_zh", "runbook_zh")


@pytest.mark.parametrize("text", TEXTS)
def test_each_class_has_words_of_its_own_in_the_alert(text):
    groups = rules.compile_groups(load_rules([ROOT / "rules/server.yaml"]))
    (rule,) = (each for group in groups for each in group.rules if each.name == "VLLMStartFailed")
    template = Template(rule.rule.annotations[text])
    said = {kind: template.expand(Labels.of(server="qwen", failure=kind), 1.0) for kind in failures.KINDS}
    assert len(set(said.values())) == len(failures.KINDS) == 12
    assert all("qwen" in words and "error" not in words and "  " not in words for words in said.values())
    assert all(len(words) <= 120 for words in said.values()) or text.startswith("runbook")


# -- arguments -------------------------------------------------------------------------------------


def test_arguments_are_read_as_text_and_secrets_are_cut_out():
    arguments = read("cuda-0.24-two-workers").arguments
    assert arguments["max_num_batched_tokens"] == "8192"
    assert arguments["model"] == "/models/reranker-4b"
    assert arguments["compilation_config"] == (
        "CompilationConfig(mode=<CompilationMode.VLLM_COMPILE: 3>, cudagraph_capture_sizes=[1, 2, 4])"
    )
    assert arguments["speculative_config"] == (
        "{'model': 'draft', 'hf_token': ***, 'num_speculative_tokens': 3}"
    )
    assert "api_key" not in arguments
    assert "hf_token" not in arguments


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("error: unrecognized arguments: --api-key s3cret --seed 1", "--api-key *** --seed 1"),
        ("'hf_token': 's3cret', 'x': 1", "'hf_token': ***, 'x': 1"),
        ("proxy https://me:s3cret@host/path", "https://host/path"),
        ("AWS_SECRET=s3cret next", "AWS_SECRET=*** next"),
        ("max_num_batched_tokens=8192", "max_num_batched_tokens=8192"),
    ],
)
def test_no_line_that_is_kept_holds_a_secret(said, kept):
    assert kept in redacted(said)
    assert "s3cret" not in redacted(said)


def test_odd_dicts_give_what_can_be_read_of_them():
    assert arguments_of("{}") == {}
    assert arguments_of("nothing of the kind") == {}
    assert arguments_of("{'a': 'it\\'s, {odd}', 'b': \"'\", 'c': [1, {'d': 2}], 'cut': 'of") == {
        "a": "it\\'s, {odd}",
        "b": "'",
        "c": "[1, {'d': 2}]",
    }
    assert len(arguments_of(f"{{'long': '{'x' * 10_000}'}}")["long"]) < 600


@given(st.dictionaries(st.text(), st.one_of(st.text(), st.integers(), st.lists(st.text()), st.none())))
def test_what_python_prints_is_read_by_name(arguments):
    assert arguments_of(repr(arguments)).keys() <= {repr(name)[1:-1] for name in arguments}


def test_a_configuration_is_the_same_where_the_memory_must_be():
    one = configuration_of("0.24.0", {"model": "m", "port": "1", "served_model_name": "a"})
    assert one == configuration_of("0.24.0", {"served_model_name": "b", "model": "m", "host": "::"})
    assert one != configuration_of("0.33.0", {"model": "m"})
    assert one != configuration_of("0.24.0", {"model": "m", "max_num_seqs": "8"})
    assert configuration_of("", {"model": "m"}) == ""


# -- logs ------------------------------------------------------------------------------------------


def test_a_file_gives_each_life_its_own_lines_and_each_line_once(tmp_path):
    path = tmp_path / "qwen.log"
    path.write_text(f"of before\n{mark('qwen', 1000)}a\nb\n{mark('qwen', 2000)}c\nnot whole")
    log = FileLog(path)
    assert list(log.lines(1000, None)) == ["a", "b"]
    assert list(log.lines(1000, 2000)) == []
    assert list(log.lines(2000, None)) == ["c"]
    with path.open("a") as file:
        file.write(" yet\nd\n")
    assert list(log.lines(2000, None)) == ["not whole yet", "d"]
    assert list(FileLog(path).lines(2000, None)) == ["c", "not whole yet", "d"]


def test_a_life_begins_at_its_mark_also_behind_half_a_line_of_the_one_before(tmp_path):
    path = tmp_path / "qwen.log"
    path.write_text(f"{mark('qwen', 1000)}a\nhalf a li{mark('qwen', 2000)}c\n")
    assert list(FileLog(path).lines(2000, None)) == ["c"]
    assert list(FileLog(path).lines(1000, 2000)) == ["a"]


def test_a_file_that_was_truncated_is_read_from_its_begin(tmp_path):
    path = tmp_path / "qwen.log"
    path.write_text(f"{mark('qwen', 1000)}a long line\n")
    log = FileLog(path)
    assert list(log.lines(1000, None)) == ["a long line"]
    path.write_text("new\n")
    assert list(log.lines(1000, None)) == ["new"]


def test_of_a_large_file_only_the_end_is_read(tmp_path):
    path = tmp_path / "qwen.log"
    path.write_text(f"{mark('qwen', 1000)}" + "x" * 99 + "\n" + ("y" * 99 + "\n") * (MOST_BYTES // 100))
    told = list(FileLog(path).lines(1000, None))
    assert len(told) <= MOST_BYTES // 100 + 1
    assert told[-1] == "y" * 99


def test_a_file_that_cannot_be_read_is_told_with_cause_and_cure(tmp_path):
    with pytest.raises(ServerError, match=r"absent\.log: No such file or directory; to cure it, "):
        list(FileLog(tmp_path / "absent.log").lines(1000, None))


class Journal:
    """A `journalctl` that answers from a file of entries as the real one does, and notes how it was asked."""

    def __init__(self, folder):
        self.entries = folder / "entries.json"
        self.asked = folder / "asked"
        self.program = folder / "journalctl"
        self.body = f"""
import json, sys
open({str(self.asked)!r}, "a").write(json.dumps(sys.argv[1:]) + "\\n")
given = dict(zip(sys.argv, sys.argv[1:]))
since, until = (float(given.get(name, "@9e12")[1:]) for name in ("--since", "--until"))
for entry in reversed(json.load(open({str(self.entries)!r}))):
    if since <= int(entry["__REALTIME_TIMESTAMP"]) / 1e6 <= until:
        print(json.dumps(entry))
"""
        self.answers(self.body)

    def answers(self, body):
        self.program.write_text(f"#!{sys.executable}\n{body}")
        self.program.chmod(self.program.stat().st_mode | stat.S_IXUSR)

    def has(self, *entries):
        told = [{"__REALTIME_TIMESTAMP": str(at_ms * 1000), "MESSAGE": text} for at_ms, text in entries]
        self.entries.write_text(json.dumps(told))

    def questions(self):
        return [json.loads(line) for line in self.asked.read_text().splitlines()]


@pytest.fixture
def journal(tmp_path):
    return Journal(tmp_path)


def test_the_journal_gives_a_life_in_its_order_and_goes_on_where_it_was(journal):
    log = JournalLog("vllm.service", os.fspath(journal.program))
    journal.has((500, "of before"), (1000, "a"), (1500, list(b"\x1b[0mb\n\xff")), (1600, None))
    assert list(log.lines(1000, None)) == ["a", "\x1b[0mb", "\ufffd"]
    journal.has((1000, "a"), (1600, "the newest of then"), (1700, "c"), (2000, "of the next"))
    assert list(log.lines(1000, 1999)) == ["the newest of then", "c"]
    first, second = journal.questions()
    assert first[:2] == ["--unit", "vllm.service"]
    assert first[-2:] == ["--since", "@1.000000"]
    assert second[-4:] == ["--since", "@1.600000", "--until", "@1.999000"]


def test_a_journal_that_cannot_be_read_is_told_with_cause_and_cure(journal):
    journal.answers("print('No journal files were opened due to insufficient permissions.'); exit(1)")
    log = JournalLog("vllm.service", os.fspath(journal.program))
    with pytest.raises(ServerError, match=r"insufficient permissions.*group systemd-journal"):
        list(log.lines(1000, None))
    absent = JournalLog("vllm.service", "/nonexistent/journalctl")
    with pytest.raises(ServerError, match="journalctl: No such file or directory"):
        list(absent.lines(1000, None))


def test_a_journal_that_does_not_answer_is_not_waited_for(journal):
    journal.answers("import time; time.sleep(60)")
    log = JournalLog("vllm.service", os.fspath(journal.program), within_s=0.3)
    with pytest.raises(ServerError, match=r"no whole answer within 0\.3 s"):
        list(log.lines(1000, None))


def test_an_empty_journal_is_no_trouble_and_an_endless_one_is_cut(journal):
    log = JournalLog("vllm.service", os.fspath(journal.program))
    journal.answers("print('-- No entries --')")
    assert list(log.lines(1000, None)) == []
    entry = {"__REALTIME_TIMESTAMP": "1000000", "MESSAGE": "x" * 1000}
    journal.answers(f"while True: print({json.dumps(json.dumps(entry))})")
    assert 3000 < len(list(log.lines(1000, None))) <= MOST_BYTES // 1000


# -- lives -----------------------------------------------------------------------------------------


class Script:
    """A log that a test writes, and that may be out of reach."""

    def __init__(self):
        self.told = {}
        self.trouble = ""
        self.looks = 0

    def lines(self, began_at_ms, until_ms):
        self.looks += 1
        self.until_ms = until_ms
        if self.trouble:
            raise ServerError(self.trouble)
        yield from self.told.pop(began_at_ms, [])


class Host:
    """A server as its supervisor and `/health` show it; `look` saves what the watch says."""

    def __init__(self):
        self.log = Script()
        self.watch = StartWatch("qwen", self.log)
        self.rows = {}
        self.now_ms = BEGAN_MS
        self.state = ServerState(
            name="qwen", phase=ServerPhase.UNSEEN, since_ms=BEGAN_MS, seen_at_ms=BEGAN_MS
        )

    def process(self, phase=SupervisorPhase.ACTIVE, began_ms=BEGAN_MS, **more):
        supervisor = SupervisorState(phase=phase, started_at_ms=began_ms, **more)
        self.state = dataclasses.replace(self.state, supervisor=supervisor)

    def starts(self, began_ms=BEGAN_MS):
        self.process(began_ms=began_ms)
        self.is_in(ServerPhase.STARTING)

    def is_in(self, phase):
        healthy_ms = self.now_ms if phase is ServerPhase.SERVING else self.state.last_healthy_ms
        self.state = dataclasses.replace(
            self.state, phase=phase, since_ms=self.now_ms, last_healthy_ms=healthy_ms
        )

    def says(self, *told, began_ms=BEGAN_MS):
        self.log.told[began_ms] = list(told)

    def known(self):
        return [self.rows[key] for key in sorted(self.rows, reverse=True)]

    def look(self, seconds=2):
        self.now_ms += seconds * 1000
        row = self.watch.look(self.state, self.known(), self.now_ms)
        if row is not None:
            self.rows[row.began_at_ms] = row
        return row

    def series(self):
        return {str(s.labels): s.value for s in samples(self.known(), self.now_ms)}


@pytest.fixture
def host():
    return Host()


def test_a_start_is_followed_from_its_process_to_its_health(host):
    assert host.look() is None
    host.starts()
    host.says(*recorded("cuda-0.24-two-workers"))
    assert host.look().outcome is STARTING
    assert host.series() == {}
    host.look(58)
    host.is_in(ServerPhase.SERVING)
    start = host.look()
    assert (start.outcome, start.healthy_at_ms) == (HEALTHY, BEGAN_MS + 62_000)
    assert host.series() == {
        f'server_{what}_bytes{{server="qwen",worker="Worker_TP{n}"}}': round(gib * GIB)
        for what, gib in (("model_weights", 3.78), ("kv_cache", 111.4), ("cuda_graphs", 0.21))
        for n in (0, 1)
    } | {'server_kv_cache_tokens{server="qwen"}': 1_622_304}


def test_a_log_is_read_once_more_after_health_and_then_no_more(host):
    host.starts()
    host.look()
    host.is_in(ServerPhase.SERVING)
    host.look()
    host.says(*recorded("cuda-0.33-one-process"))
    assert host.look().kv_cache_tokens == 804_032
    looks = host.log.looks
    assert [host.look() for _ in range(5)] == [None] * 5
    assert host.log.looks == looks


def test_a_start_that_fails_is_told_until_the_server_is_healthy(host):
    host.starts()
    host.look()
    host.says(*recorded("cuda-share-not-free"))
    host.process(SupervisorPhase.AUTO_RESTART, detail="activating (auto-restart): exited with status 1")
    start = host.look()
    assert (start.outcome, start.failure) == (FAILED, "memory_share_not_free")
    assert start.facts["status"] == "1"
    assert start.ended_at_ms == host.now_ms
    failed = {'server_start_failed{failure="memory_share_not_free",server="qwen"}': 1.0}
    assert host.series() == failed
    host.starts(host.now_ms + 500)
    host.look()
    host.look()
    assert len(host.rows) == 2
    assert host.series() == failed
    host.is_in(ServerPhase.SERVING)
    host.look()
    assert host.series() == {}


def test_what_reaches_the_log_after_the_end_still_counts(host):
    host.starts()
    host.look()
    host.process(SupervisorPhase.FAILED, detail="failed (failed): exited with status 1, result exit-code")
    assert host.look().failure == "unknown"
    host.says(*recorded("cuda-profiling-assert"))
    start = host.look()
    assert (start.failure, start.facts["status"]) == ("profiling_assert", "1")
    assert host.look() is None


@pytest.mark.parametrize(
    ("detail", "outcome", "failure"),
    [
        ("exited with status 2", FAILED, "bad_argument"),
        ("killed by signal 9", FAILED, "process_died"),
        ("killed by signal 15", STOPPED, ""),
        ("main process is gone", FAILED, "unknown"),
        ("exited with status 0", FAILED, "unknown"),
    ],
)
def test_where_the_log_is_silent_the_exit_tells(host, detail, outcome, failure):
    host.starts()
    host.look()
    host.process(SupervisorPhase.INACTIVE, detail=detail)
    start = host.look()
    assert (start.outcome, start.failure) == (outcome, failure)


def test_a_start_that_somebody_stopped_did_not_fail(host):
    host.starts()
    host.look()
    host.says("ValueError: what a process says that is interrupted")
    host.process(SupervisorPhase.INACTIVE, stop_asked=True, detail="exited with status 1")
    start = host.look()
    assert (start.outcome, start.failure, start.facts) == (STOPPED, "", {})
    assert host.look() is None
    assert host.series() == {}


def test_a_life_that_ended_after_it_was_healthy_keeps_its_health_and_says_why(host):
    host.starts()
    host.look()
    host.is_in(ServerPhase.SERVING)
    host.look()
    host.says(*recorded("cuda-oom-under-load")[1:])
    host.is_in(ServerPhase.DOWN)
    host.process(SupervisorPhase.INACTIVE, detail="inactive (dead): exited with status 0")
    start = host.look()
    assert (start.outcome, start.failure, start.facts["status"]) == (HEALTHY, "runtime_oom", "0")
    assert host.series() == {}


def test_a_life_that_was_replaced_unseen_is_over_and_failed_only_if_its_log_says_so(host):
    host.starts()
    host.look()
    host.starts(BEGAN_MS + 3000)
    assert host.look().outcome is UNKNOWN
    assert host.look().began_at_ms == BEGAN_MS + 3000
    host.says(*recorded("cpu-port-busy"), began_ms=BEGAN_MS + 3000)
    host.starts(BEGAN_MS + 9000)
    ended = host.look()
    assert (ended.outcome, ended.failure, ended.ended_at_ms) == (FAILED, "port_busy", BEGAN_MS + 9000)


def test_at_a_replacement_the_health_of_the_old_process_is_not_that_of_the_new(host):
    host.starts()
    host.look()
    host.is_in(ServerPhase.SERVING)
    host.look()
    host.process(began_ms=host.now_ms + 1000)
    host.look()
    assert host.look().outcome is STARTING


def test_a_server_that_served_before_anybody_watched_is_healthy_since_nobody_knows_when(host):
    host.process()
    host.now_ms += 3_600_000
    host.is_in(ServerPhase.SERVING)
    start = host.look()
    assert (start.outcome, start.healthy_at_ms) == (HEALTHY, None)
    assert host.log.until_ms == BEGAN_MS + 1_800_000


def test_another_gpuwatch_goes_on_with_a_start_that_is_under_way(host):
    host.starts()
    told = recorded("cuda-0.33-one-process")
    host.says(*told[:4])
    host.look()
    host.watch = StartWatch("qwen", host.log)
    host.says(*told)
    host.is_in(ServerPhase.SERVING)
    start = host.look()
    assert (start.outcome, start.kv_cache_tokens) == (HEALTHY, 804_032)
    assert len(host.rows) == 1


def test_while_nobody_can_tell_of_the_process_nothing_ends(host):
    host.starts()
    host.look()
    host.process(SupervisorPhase.UNKNOWN, began_ms=None)
    assert host.look() is None


def test_a_log_out_of_reach_is_a_trouble_and_holds_up_no_outcome(host):
    host.log.trouble = "read the journal: no"
    host.starts()
    host.look()
    assert host.watch.trouble == "read the journal: no"
    host.is_in(ServerPhase.SERVING)
    assert host.look().outcome is HEALTHY
    host.log.trouble = ""
    host.look()
    assert host.watch.trouble == ""


def test_every_series_stands_in_the_list_of_metrics(host):
    host.starts()
    host.says(*recorded("cuda-0.24-two-workers"))
    host.look()
    host.is_in(ServerPhase.SERVING)
    host.look()
    failed = [a_start(FAILED, failure="unknown")]
    made = [*samples(host.known(), 0), *samples(failed, 0)]
    labels = {metric.name: set(metric.labels) for metric in METRICS}
    assert {s.labels.metric for s in made} == labels.keys()
    assert all({name for name, _ in s.labels} - {"__name__"} == labels[s.labels.metric] for s in made)


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture
def gpuwatch(tmp_path):
    def run(*words, status=0):
        done = CliRunner().invoke(cli.main, ["server", "starts", *words, "--state-dir", os.fspath(tmp_path)])
        assert done.exit_code == status, done.output
        return done.output

    return run


def test_people_see_how_each_start_went(gpuwatch, tmp_path):
    good = lines.read(a_start(HEALTHY, healthy_at_ms=BEGAN_MS + 69_000), recorded("cuda-0.24-two-workers"))
    failed = lines.read(a_start(FAILED, BEGAN_MS + 90_000), recorded("cuda-kv-cache-too-small"))
    failed = dataclasses.replace(failed, facts={"status": "1", **failed.facts})
    odd = a_start(FAILED, BEGAN_MS - 1, failure="unknown", lines=("ImportError: no such thing",))
    found = open_state(tmp_path, now_ms=BEGAN_MS)
    with closing(found.state):
        found.state.write([Changes(starts=[good, failed, odd])])
    head, *rows = [line.split("  ") for line in gpuwatch("qwen").splitlines()]
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    assert head[0] == "SERVER"
    why = "max model len 32768, needed 4.50 GiB, available 2.06 GiB, longest model len 15008, status 1"
    assert cells[0][3:] == ["failed", "0.20.2", "-", "-", "-", f"kv_cache_too_small; {why}"]
    assert cells[1][2:] == ["1 m 9 s", "healthy", "0.24.0", "2 x 3.78", "2 x 111.40", "1,622,304"]
    assert cells[2][-1] == "unknown; ImportError: no such thing"


def test_programs_see_the_records(gpuwatch, tmp_path):
    start = lines.read(a_start(HEALTHY), recorded("cuda-0.33-one-process"))
    found = open_state(tmp_path, now_ms=BEGAN_MS)
    with closing(found.state):
        found.state.write([Changes(starts=[start])])
    (shown,) = json.loads(gpuwatch("--json"))
    assert shown["figures"]["EngineCore"]["weights_bytes"] == round(7.56 * GIB)
    assert shown["outcome"] == "healthy"


def test_a_server_that_nobody_knows_is_told_and_one_that_never_started_is_none(gpuwatch, tmp_path):
    open_state(tmp_path, now_ms=BEGAN_MS).state.close()
    assert gpuwatch() == "no start has been seen yet\n"
    assert "server starts other: no such server in the settings" in gpuwatch("other", status=1)
