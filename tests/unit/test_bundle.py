"""A bundle of a real store, real guests and processes: all is in it, no secret, never too large or late."""

import json
import os
import stat
import subprocess
import sys
import tarfile
import threading
import time
from contextlib import closing

import pytest
from click.testing import CliRunner
from tests.guests import REGISTER, TORCH, Program

from gpuwatch.cli.capture import capture, redactor
from gpuwatch.clock import SystemClock
from gpuwatch.config import StoreSettings
from gpuwatch.config.size import Size
from gpuwatch.errors import GpuwatchError, ServerError
from gpuwatch.records import (
    STALE,
    Alert,
    AlertState,
    Considered,
    Labels,
    Mode,
    Phase,
    Plan,
    Refusal,
    Remediation,
    Revision,
    ServerPhase,
    ServerStart,
    ServerState,
    StartOutcome,
    Step,
    SupervisorPhase,
    SupervisorState,
)
from gpuwatch.servers import bundle
from gpuwatch.servers.starts.log import mark
from gpuwatch.store import Changes, Disk, Store

SECRETS = [f"s3cret{number}x" for number in range(20)]
NOW_MS = SystemClock().now_ms()
BEGAN_MS = NOW_MS - 600_000
MINUTE = 60_000
GPU, OTHER_GPU = "GPU-00000000-0000-0000-0000-000000000001", "GPU-00000000-0000-0000-0000-000000000002"
SETTINGS = """
state_dir: {state}
servers:
- name: vllm
  api_key_file: {key}
  supervisor:
    process:
      command: [vllm, serve, m, --api-key, {secrets[0]}]
      env: {{ANYTHING: {secrets[1]}}}
      log_file: {log}
- name: other
"""


def telemetry():
    yield Labels.of("vllm:num_requests_running", server="vllm"), 3.0
    yield Labels.of("gpu_process_memory_used_bytes", server="vllm", uuid=GPU), 1e9
    yield Labels.of("gpu_temperature_celsius", gpu="0", uuid=GPU), 60.5
    yield Labels.of("gpu_temperature_celsius", gpu="1", uuid=OTHER_GPU), 61.5
    yield Labels.of("host_memory_free_bytes"), float("nan")
    yield Labels.of("server_info", server="vllm", command=f"--api-key {SECRETS[2]}"), 1.0
    yield Labels.of("vllm:num_requests_running", server="other"), 4.0


def rows(pid):
    labels = Labels.of(server="vllm")
    plan = Plan(
        id="p1", server="vllm", alert="VLLMDown", alert_labels=labels, verify_for_ms=1, mode=Mode.AUTO,
        steps=(Step(action="run", within_ms=1, args={"command": json.dumps(["x", "--token", SECRETS[3]])}),),
        dry_run=False, policy="restart", signals={"note": f"password={SECRETS[4]}"},
        considered=(Considered(option="restart", code="chosen"),),
    )  # fmt: skip
    return Changes(
        servers=[
            ServerState(
                name="vllm", phase=ServerPhase.SERVING, since_ms=BEGAN_MS, seen_at_ms=NOW_MS,
                supervisor=SupervisorState(phase=SupervisorPhase.ACTIVE, pid=pid),
            )
        ],
        starts=[
            ServerStart(
                server="vllm", began_at_ms=BEGAN_MS, outcome=StartOutcome.HEALTHY, version="0.32.0",
                arguments={"max_num_seqs": "8"}, lines=(f"api_key={SECRETS[5]}",), revision=7,
            ),
            ServerStart(server="vllm", began_at_ms=BEGAN_MS - MINUTE, outcome=StartOutcome.FAILED),
            ServerStart(server="vllm", began_at_ms=BEGAN_MS - 2 * MINUTE, outcome=StartOutcome.FAILED),
        ],
        revisions=[
            Revision(
                server="vllm", number=7, arguments={"max_num_seqs": 8, "api_key": [SECRETS[6], SECRETS[7]]},
                created_at_ms=0, by="me",
            )
        ],
        remediations=[
            Remediation(plan=plan, phase=Phase.APPLYING, step_index=0, since_ms=1, created_at_ms=NOW_MS)
        ],
        refusals=[Refusal(server="vllm", alert="A", alert_labels=labels, code="paused")],
        alerts=[
            Alert(
                rule="A", labels=labels, annotations={"x": f"https://hooks.slack.com/services/T0/B0/{SECRETS[8]}"},
                state=AlertState.FIRING, value=1.0, active_at_ms=1,
            )
        ],
    )  # fmt: skip


LOG = [
    mark("vllm", BEGAN_MS - 2 * MINUTE), "of a life long ago\n",
    mark("vllm", BEGAN_MS - MINUTE), "it failed\n",
    mark("vllm", BEGAN_MS),
    *(f"line {number}\n" for number in range(3000)),
    f"INFO args: {{'model': 'm', 'api_key': ['{SECRETS[9]}', '{SECRETS[10]}']}}\n",
    f"the key is odd: <{SECRETS[11]}>\n", f"Authorization: Bearer {SECRETS[12]}\n",
    f"password:\n  {SECRETS[13]}\n", "the last line\n",
]  # fmt: skip


@pytest.fixture
def guests(tmp_path):
    (tmp_path / "guests").mkdir()
    return tmp_path / "guests"


@pytest.fixture
def program(guests):
    script = TORCH.format("gpus=1, total_bytes=100 * 2**20") + REGISTER
    with Program(guests, script, API_KEY=SECRETS[14]) as made:
        made.ask()
        made.do("torch.cuda.allocate(0, 30 * 2**20)")
        yield made


@pytest.fixture
def host(tmp_path, program):
    """A state folder, its settings, and a server whose child has a secret on its command line."""
    state, key, log = tmp_path / "state", tmp_path / "key", tmp_path / "vllm.log"
    state.mkdir()
    key.write_text(SECRETS[11] + "\n")
    log.write_text("".join(LOG))
    (tmp_path / "gpuwatch.yaml").write_text(SETTINGS.format(state=state, key=key, log=log, secrets=SECRETS))
    sleeper = [sys.executable, "-c", "import time; time.sleep(1000)", "--api-key", SECRETS[15]]
    quiet = "stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL"
    program.do(f"import subprocess; c = subprocess.Popen({sleeper!r}, {quiet})")
    found, now_ms = list(telemetry()), SystemClock().now_ms()
    with closing(Store(3_600_000, Disk(state, StoreSettings(min_free=Size(0)), "gpu-a", now_ms))) as store:
        for at_ms in range(now_ms - 20 * MINUTE, now_ms, 10_000):
            store.append("t", at_ms, [labels for labels, _ in found], [value for _, value in found])
        store.append("t", now_ms - 1, [found[0][0]], [STALE])
        store.save(rows(program.pid), now_ms)
    yield tmp_path
    program.do("c.kill(); c.wait()")


def captured(host, *words, ok=True):
    command = ["vllm", "--config", host / "gpuwatch.yaml", "--guests", host / "guests", "--json", *words]
    done = CliRunner().invoke(capture, [str(word) for word in command])
    assert (done.exit_code == 0) == ok, done.output
    return json.loads(done.output) if ok else done


def members(path):
    """Text by name, of the one folder that is in it."""
    with tarfile.open(path) as packed:
        assert {info.mode for info in packed} == {0o600}
        names = packed.getnames()
        return {name.partition("/")[2]: packed.extractfile(name).read().decode() for name in names}


def test_all_that_is_known_of_a_server_is_in_one_file_for_its_owner(host, program):
    said = captured(host, "--id", "p1")
    path = host / "state" / "bundles" / "p1.tar.gz"
    assert (said["bundle"], said["bytes"]) == (str(path), path.stat().st_size)
    assert said["errors"] == ["nvidia-smi.txt: run nvidia-smi: there is no such program"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    found = members(path)
    assert found["errors.txt"].splitlines() == said["errors"]
    told = {name: json.loads(text) for name, text in found.items() if name.endswith(".json")}
    assert told["about.json"]["pids"][0] == program.pid
    assert len(told["about.json"]["pids"]) >= 2, "its child too"
    assert told["server.json"]["phase"] == "serving"
    assert len(told["starts.json"]) == 3
    assert told["arguments.json"] == [
        {"version": "0.32.0", "revision": 7, "arguments": {"max_num_seqs": "8"}}
    ]
    assert told["decision.json"]["plan"]["considered"] == [{"option": "restart", "code": "chosen"}]
    assert (told["refusals.json"][0]["code"], told["alerts.json"][0]["rule"]) == ("paused", "A")
    assert told["revisions.json"][0]["arguments"]["max_num_seqs"] == 8
    assert told["settings.json"]["servers"][0]["supervisor"]["process"]["command"].startswith(
        "vllm serve m --api"
    )
    threads = told["stacks.json"][str(program.pid)]["threads"]
    assert "MainThread" in {thread["name"] for thread in threads}
    assert told["allocators.json"][str(program.pid)]["devices"][0]["reserved_bytes"] == 40 * 2**20
    for name in ("cmdline", "status", "smaps_rollup", "limits"):
        assert f"== {program.pid} {name}\n" in found["processes.txt"]


def test_its_log_is_the_last_2000_lines_of_two_lives(host):
    lines = members(captured(host)["bundle"])["server.log"].splitlines()
    assert len(lines) == 2000
    assert lines[-1] == "the last line"
    assert "of a life long ago" not in lines


def test_a_short_log_has_the_life_before_too(host):
    (host / "vllm.log").write_text("".join(line for line in LOG if not line.startswith("line ")))
    text = members(captured(host)["bundle"])["server.log"]
    assert text.index("it failed") < text.index("the last line")
    assert "of a life long ago" not in text


def test_telemetry_is_of_15_minutes_of_the_server_its_gpus_and_the_host(host):
    lines = members(captured(host)["bundle"])["telemetry.jsonl"].splitlines()
    series = {Labels(one["labels"].items()): one["samples"] for one in map(json.loads, lines)}
    assert {str(labels.without("command")) for labels in series} == {
        str(labels.without("command"))
        for labels, _ in telemetry()
        if labels.get("uuid") != OTHER_GPU and labels.get("server") != "other"
    }
    heat = next(samples for labels, samples in series.items() if labels.metric == "gpu_temperature_celsius")
    assert {value for _, value in heat} == {60.5}
    assert 60 < len(heat) <= 90, "of 120"
    free = next(samples for labels, samples in series.items() if labels.metric == "host_memory_free_bytes")
    assert {value for _, value in free} == {None}


def test_no_secret_reaches_it(host):
    said = captured(host, "--id", "p1")
    path = said["bundle"]
    for name, text in members(path).items():
        assert [secret for secret in SECRETS if secret in text] == [], name
    assert not [secret for secret in SECRETS if secret in repr(said)]


@pytest.mark.parametrize(
    "text",
    [
        "--api-key s3cret", '["vllm", "--api-key", "s3cret"]', r'"[\"x\", \"--hf-token\", \"s3cret\"]"',
        "--api-key=s3cret", '{"password": "s3cret"}', "Authorization: Bearer s3cret", "http://me:s3cret@host/",
        "https://hooks.slack.com/services/T/B/s3cret", "it is pure-s3cret!",
    ],
)  # fmt: skip
def test_what_looks_like_a_secret_or_is_one_is_taken_out(text):
    assert "s3cret" not in redactor(["pure-s3cret"])(text)


def test_without_a_store_without_guests_and_without_processes_the_rest_is_there_and_says_why(host):
    (host / "state" / "metrics.db").write_bytes(b"no database")
    (host / "vllm.log").unlink()
    for one in (host / "guests").iterdir():
        one.unlink()
    said = captured(host, "--pid", "999999999")
    errors = dict(line.split(": ", 1) for line in said["errors"])
    assert errors.keys() >= {"telemetry.jsonl", "server.log", "stacks.json", "allocators.json"}
    found = members(said["bundle"])
    assert "No such file" in found["processes.txt"]
    assert json.loads(found["settings.json"])


def test_a_server_that_is_not_in_the_settings_cannot_be_captured(host):
    command = ["nobody", "--config", str(host / "gpuwatch.yaml")]
    done = CliRunner().invoke(capture, command)
    assert isinstance(done.exception, GpuwatchError)
    assert "there are: vllm, other" in str(done.exception)
    assert isinstance(captured(host, "--id", "../up", ok=False).exception, GpuwatchError)


def test_for_people_it_says_where_the_file_is_and_what_is_missing(host):
    command = ["vllm", "--config", host / "gpuwatch.yaml", "--guests", host / "guests", "--id", "mine"]
    said = CliRunner().invoke(capture, [str(word) for word in command]).output.splitlines()
    assert said[0] == f"{host}/state/bundles/mine.tar.gz: 0.0 MiB"
    assert said[1:] == ["missing: nvidia-smi.txt: run nvidia-smi: there is no such program"]
    settings = host / "gpuwatch.yaml"
    settings.write_text(settings.read_text() + "\nlang: zh\n")
    said = CliRunner().invoke(capture, [str(word) for word in command]).output.splitlines()
    assert said[1].startswith("缺少")


# -- write -------------------------------------------------------------------------------------------------


def plain(text):
    return text


def write(path, parts, redact=plain):
    return bundle.write(path, parts, redact, NOW_MS)


def test_a_part_that_fails_or_hangs_costs_the_others_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "_PART_S", 2)
    hangs = threading.Event()

    def endless():
        yield "begun\n"
        hangs.wait()

    def fails():
        yield "half\n"
        raise OSError(5, "Input/output error")

    written = write(
        tmp_path / "b.tar.gz", {"a": endless, "b": fails, "c": lambda: 1 / 0, "d": lambda: ["fine"]}
    )
    hangs.set()
    found = members(written.path)
    assert {name: found[name] for name in "abd"} == {"a": "begun\n", "b": "half\n", "d": "fine"}
    assert [error.partition(":")[0] for error in written.errors] == ["a", "b", "c"]
    assert "ZeroDivisionError" in written.errors[2]


def test_when_time_is_up_what_is_left_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "WITHIN_S", 0.0)
    written = write(tmp_path / "b.tar.gz", {"a": lambda: ["text"]})
    assert written.errors == ("a: no time was left for it",)


def test_it_never_grows_beyond_its_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "MOST_BYTES", 3 * 2**20)
    noise = os.urandom(2**20).hex()
    parts = {name: lambda: [noise] for name in "abcdef"}
    written = write(tmp_path / "b.tar.gz", parts)
    assert written.size_bytes <= 3 * 2**20
    assert "the bundle is full" in written.errors[-1]
    assert members(written.path)["errors.txt"]


def test_a_part_is_cut_off_at_its_own_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "_MOST_PART_BYTES", 2**20)
    written = write(tmp_path / "b.tar.gz", {"a": lambda: iter(lambda: "x" * 2**18, "")})
    assert written.errors == ("a: cut off after 1 MiB",)
    assert len(members(written.path)["a"]) == 2**20


def test_figures_are_passed_over_and_all_else_is_redacted(tmp_path):
    seen = []

    def redact(text):
        seen.append(text)
        return "***"

    written = write(tmp_path / "b.tar.gz", {"a": lambda: ["[1,2.5e-07],[3,null]", "12345x", "\n"]}, redact)
    assert (members(written.path)["a"], seen) == ("[1,2.5e-07],[3,null]***\n", ["12345x"])


def test_twenty_are_kept_and_the_oldest_go_with_what_was_cut_off(tmp_path):
    for number in range(25):
        old = tmp_path / (f".{number}.tar.gz.new" if number % 2 else f"{number}.tar.gz")
        old.write_bytes(b"")
        os.utime(old, (number, number))
    written = write(tmp_path / "new.tar.gz", {})
    left = sorted(tmp_path.iterdir())
    assert len(left) == 20
    assert written.path in left
    assert tmp_path / "24.tar.gz" in left
    assert tmp_path / "4.tar.gz" not in left


def test_written_again_it_takes_the_place_of_the_old(tmp_path):
    write(tmp_path / "b.tar.gz", {"a": lambda: ["one"]})
    assert members(write(tmp_path / "b.tar.gz", {"a": lambda: ["two"]}).path)["a"] == "two"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_cannot_be_written_is_an_error_with_a_cure(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ServerError, match="to cure it"):
        write(tmp_path / "file" / "b.tar.gz", {})


def test_a_program_that_says_too_much_or_hangs_is_bounded(tmp_path):
    talks = tmp_path / "talks"
    talks.write_text("#!/bin/sh\nhead -c 9000000 /dev/zero | tr '\\0' x\n")
    talks.chmod(0o755)
    assert len("".join(bundle.nvidia_smi(str(talks)))) == 4 * 2**20


def test_a_tree_is_a_process_and_all_below_it():
    child = subprocess.Popen(["sh", "-c", "sleep 1000 & wait"])
    try:
        end = time.monotonic() + 20
        while len(its := bundle.tree_of(child.pid)) < 2 and time.monotonic() < end:
            time.sleep(0.01)
        found = bundle.tree_of(os.getpid())
    finally:
        for pid in bundle.tree_of(child.pid):
            os.kill(pid, 9)
        child.wait()
    assert (its[0], len(its)) == (child.pid, 2)
    assert found[0] == os.getpid()
    assert set(its) < set(found)
    assert bundle.tree_of(None) == bundle.tree_of(2**30) == []
