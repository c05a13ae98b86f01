"""The guest in a real vLLM server without GPU: in each process, in nobody's way, and its limits kept."""

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import requests
from click.testing import CliRunner
from tests.acceptance import vllm_cpu
from tests.fake_nvml import FakeNvml
from tests.guests import ask, wait_for

from gpuwatch import cli
from gpuwatch.guest import client
from gpuwatch.sources import AllocatorSource

PORT = 18241
START_S = 240
PROMPTS = [[5, 6, 7], [400, 12, 4, 4, 8], list(range(3, 60))]

pytestmark = vllm_cpu.needed


@pytest.fixture
def guests(tmp_path):
    return install(tmp_path)


def install(root):
    """The folder of the sockets; the guest is installed beside it."""
    folder = root / "guests"
    folder.mkdir()
    assert CliRunner().invoke(cli.main, ["guest", "install", str(root / "lib")]).exit_code == 0
    return folder


class Server:
    """A vLLM server with the guest on its path, and all processes that it had."""

    def __init__(self, model, guests, *options, **env):
        self.log = guests.parent / f"vllm{len(list(guests.parent.glob('vllm*.log')))}.log"
        env = {
            **os.environ,
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else its threads and the clients share one core
            "VENV": str(vllm_cpu.VENV),
            "PYTHONPATH": str(guests.parent / "lib"),
            "GPUWATCH_GUEST_DIR": str(guests),
            **env,
        }
        command = ["bash", vllm_cpu.TOOL, "serve", model, "--port", str(PORT), *options]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        self._processes = {}

    def __enter__(self):
        began = time.monotonic()
        try:
            wait_for(self.is_healthy, START_S)
        except BaseException:
            self.__exit__()
            raise
        print(f"healthy after {time.monotonic() - began:.1f} s: {sorted(self.processes())}")
        return self

    def __exit__(self, *_):
        self.processes()
        for process in self._processes.values():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()
        psutil.wait_procs(self._processes.values(), timeout=30)

    def processes(self):
        """Those that live, by pid."""
        with contextlib.suppress(psutil.NoSuchProcess):
            leader = psutil.Process(self.process.pid)
            self._processes |= {p.pid: p for p in (leader, *leader.children(recursive=True))}
        return {pid: p for pid, p in self._processes.items() if p.is_running()}

    def is_healthy(self):
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        self.processes()
        with contextlib.suppress(requests.RequestException):
            return requests.get(f"http://127.0.0.1:{PORT}/health", timeout=5).status_code == 200
        return False

    def answers(self):
        """The tokens that follow each prompt, which are the same for the same weights."""
        body = {"model": "m", "prompt": PROMPTS, "max_tokens": 24, "temperature": 0, "ignore_eos": True}
        body["return_token_ids"] = True
        answer = requests.post(f"http://127.0.0.1:{PORT}/v1/completions", json=body, timeout=120)
        assert answer.status_code == 200, answer.text
        choices = answer.json()["choices"]
        assert [len(choice["token_ids"]) for choice in choices] == [24] * len(PROMPTS)
        return [choice["token_ids"] for choice in choices]


def test_the_guest_is_in_every_process_and_changes_nothing(model, guests):
    with Server(model, guests) as server:
        answers = figures(guests)
        assert {a["role"] for a in answers.values()} == {"api_server", "engine_core", "worker"}
        assert answers.keys() <= server.processes().keys()
        assert {(a["cuda"], len(a["devices"])) for a in answers.values()} == {(False, 0)}
        print({pid: (a["role"], a["process"], a["rank"], a["worker"]) for pid, a in answers.items()})
        for pid in answers:
            check_stacks(guests, pid)
        with_guest = server.answers()
        assert "Failed to load plugin" not in server.log.read_text()
        check_stale_sockets(guests, server, answers)
    with Server(model, guests, GPUWATCH_GUEST="0") as server:
        assert server.answers() == with_guest
        assert list(guests.iterdir()) == [], "switched off it leaves no trace"


def figures(guests):
    """What every guest says that lives."""
    paths = client.listed(guests)
    answers = client.ask_all(paths, "figures", within_s=20)
    gone = {
        pid for pid, answer in answers.items() if isinstance(answer, client.GuestError) and answer.is_gone
    }
    refused = {pid: str(a) for pid, a in answers.items() if isinstance(a, client.GuestError)}
    assert refused.keys() == gone, refused  # those of short-lived helpers
    return {pid: answer for pid, answer in answers.items() if pid not in gone}


def check_stacks(guests, pid):
    threads = client.ask(guests / f"{pid}.sock", "stacks", within_s=20)["threads"]
    (main,) = [thread for thread in threads if thread["name"] == "MainThread"]
    print(pid, len(threads), main["frames"][:3])
    assert main["native_id"] == pid
    assert any("vllm" in frame for frame in main["frames"])


def check_stale_sockets(guests, server, answers):
    """Killed processes leave their sockets; the source takes them away, and those of no other."""
    source = AllocatorSource(guests, FakeNvml(), within_s=5)
    assert source.read(0) == []
    assert client.listed(guests).keys() == answers.keys()
    (engine,) = [pid for pid, answer in answers.items() if answer["role"] == "engine_core"]
    os.kill(engine, signal.SIGKILL)
    wait_for(lambda: server.process.poll() is not None, 60)
    assert (guests / f"{engine}.sock").exists()
    for process in server.processes().values():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):  # it may be ending by itself
            process.kill()
            process.wait(20)
    source.read(60_000)
    assert client.listed(guests) == {}


# -- live limits -------------------------------------------------------------------------------------------

MOST, URL = 8, f"http://127.0.0.1:{PORT}"
COMPLETION = {"model": "m", "temperature": 0, "ignore_eos": True}


class Limited(Server):
    """A server that runs 8 requests at once, with a door; its guests by role."""

    def __init__(self, model, guests):
        door = "gpuwatch_guest.admission.Admission"
        told = "--enable-logging-iteration-details"
        super().__init__(model, guests, "--max-num-seqs", str(MOST), "--middleware", door, told)
        self.guests = guests

    def __enter__(self):
        super().__enter__()
        self.pids = {answer["role"]: pid for pid, answer in figures(self.guests).items()}
        return self

    def ask(self, role, what="figures", **more):
        return ask(self.guests / f"{self.pids[role]}.sock", what, **more)

    def engine(self):
        return self.ask("engine_core")["engine"]

    def door(self):
        return self.ask("api_server")["admission"]

    def limit(self, *words):
        words = ("guest", "limit", str(self.pids["api_server"]), "--folder", str(self.guests), *words)
        done = CliRunner().invoke(cli.main, words)
        assert done.exit_code == 0, done.output

    def metrics(self):
        """Values by name, with `le` for buckets; the last of a name counts."""
        text = requests.get(f"{URL}/metrics", timeout=20).text
        lines = re.findall(r'^vllm:(\w+){(?:.*le="([^"]+)"|[^}]*)[^}]*} (\S+)$', text, re.MULTILINE)
        return {(name, bound): float(value) for name, bound, value in lines}

    def steps(self):
        """The tokens of each step, of prompts and generated, by its log.

        vLLM's histogram has a prompt as a whole in the step of its last piece.
        """
        found = re.findall(r"(\d+) context tokens, .* (\d+) generation tokens", self.log.read_text())
        return [(int(context), int(generation)) for context, generation in found]

    def generating(self):
        """How many requests had a token of each step."""
        return [generated for _, generated in self.steps() if generated]


@pytest.fixture(scope="module")
def shared_server(model, tmp_path_factory):
    with Limited(model, install(tmp_path_factory.mktemp("limited"))) as server:
        yield server
        assert "Traceback" not in server.log.read_text()


@pytest.fixture
def limited(shared_server):
    yield shared_server
    shared_server.limit("--lift")
    wait_for(lambda: shared_server.engine()["running"] == 0, 120)


PROMPTS_MADE = itertools.count(3)


def complete(most, prompt=8):
    """How many tokens came; no two prompts have a beginning in common that could be cached."""
    body = {**COMPLETION, "prompt": [next(PROMPTS_MADE) % 500] * prompt, "max_tokens": most}
    answer = requests.post(f"{URL}/v1/completions", json=body, timeout=300)
    assert answer.status_code == 200, answer.text
    return answer.json()["usage"]["completion_tokens"]


@contextlib.contextmanager
def load(server, *lengths, prompt=8):
    """As many requests, let go together; in the end each must have had all its tokens."""
    server.limit("--running", "0")
    with ThreadPoolExecutor(len(lengths)) as pool:
        came = [pool.submit(complete, length, prompt) for length in lengths]
        wait_for(lambda: server.engine()["waiting"] == len(lengths), 60)
        yield
        assert [future.result() for future in came] == list(lengths)


def running(server, until):
    """The counts of running requests as they changed, up to `until`."""
    counts = [server.engine()["running"]]

    def is_reached():
        with contextlib.suppress(client.GuestError):  # a busy host may be late by the half second it has
            counts.append(server.engine()["running"])
        return counts[-1] == until

    wait_for(is_reached, 120)
    return [count for count, _ in itertools.groupby(counts)]


def test_a_cap_under_load_drains_and_lifts_and_no_request_fails(limited):
    before = limited.answers()
    with load(limited, *range(200, 840, 80), *[880] * 32):
        assert limited.engine()["running"] == 0
        limited.limit("--lift")
        assert running(limited, MOST)[-1] == MOST
        done = len(limited.generating())
        limited.limit("--running", "2")
        running(limited, 2)
        generating = wait_for(lambda: (counts := limited.generating()[done:]) and 2 in counts and counts)
        drained = [count for count, _ in itertools.groupby(generating[: generating.index(2) + 1])]
        print("drained", drained, limited.engine())
        assert drained == list(range(drained[0], 1, -1)), "one by one, as they end"
        assert drained[0] > 3
        gauges = wait_for(lambda: (m := limited.metrics())["num_requests_running", ""] == 2 and m)
        assert gauges["num_requests_waiting", ""] > 2
        limited.limit("--lift")
        running(limited, MOST)
    assert limited.metrics()["num_preemptions_total", ""] == 0
    assert limited.answers() == before


def test_a_cap_that_nobody_renews_lapses(limited):
    with load(limited, *[900] * 60):
        limited.ask("engine_core", "limit", running=1, for_s=20)
        print(running(limited, 1), running(limited, MOST))
        assert limited.engine()["limits"] == {}


def test_a_cap_on_tokens_makes_steps_smaller_and_no_request_fails(limited):
    largest = []
    for words in (("--lift",), ("--tokens", "256", "--for", "2m"), ("--lift",)):
        done = len(limited.steps())
        with load(limited, *[4] * 16, prompt=700):
            limited.limit(*words)
        largest.append(max(map(sum, limited.steps()[done:])))
    print("largest steps", largest)
    assert largest[1] <= 256
    assert min(largest[0], largest[2]) >= 700


def test_a_closed_door_answers_503_and_streams_in_flight_finish(limited):
    limited.limit("--running", "0")
    streams = [stream(max_tokens=900) for _ in range(3)]
    wait_for(lambda: limited.door()["in_flight"] == 3)
    limited.limit("--admission", "2")
    refused = requests.post(f"{URL}/v1/completions", json={**COMPLETION, "prompt": "x"}, timeout=20)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
    assert refused.json()["error"]["code"] == 503
    for path in ("/health", "/metrics", "/v1/models"):
        assert requests.get(URL + path, timeout=20).status_code == 200
    assert requests.post(f"{URL}/tokenize", json={"model": "m", "prompt": "x"}, timeout=20).status_code == 200
    for one in streams:
        *_, usage, end = [line.removeprefix(b"data: ") for line in one.iter_lines() if line]
        assert (json.loads(usage)["usage"]["completion_tokens"], end) == (900, b"[DONE]")
    wait_for(lambda: limited.door() == {"in_flight": 0, "limit": 2, "refused": 1})
    assert complete(3) == 3
    limited.limit("--lift")


def stream(**more):
    body = {**COMPLETION, "prompt": [5] * 8, "stream": True, "stream_options": {"include_usage": True}}
    answer = requests.post(f"{URL}/v1/completions", json={**body, **more}, stream=True, timeout=300)
    assert answer.status_code == 200
    return answer


def test_clients_that_hang_up_are_no_more_in_flight(limited):
    limited.limit("--running", "0")
    streams = [stream(max_tokens=900) for _ in range(4)]
    body = json.dumps({**COMPLETION, "prompt": [5] * 8, "max_tokens": 900}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}"
    with socket.create_connection(("127.0.0.1", PORT)) as plain:
        plain.sendall(head.encode() + b"\r\n\r\n" + body)
        wait_for(lambda: limited.door()["in_flight"] == 5)
        for one in streams:
            one.close()
    wait_for(lambda: limited.door()["in_flight"] == 0)
    wait_for(lambda: limited.engine()["waiting"] == 0)


def test_aborted_streams_end_cleanly_and_the_server_goes_on_serving(limited):
    asked = [stream(max_tokens=900), stream(max_tokens=900), stream(max_tokens=900, n=2, temperature=1)]
    streams = [(line for line in one.iter_lines() if line) for one in asked]
    begun = [next(one) for one in streams]
    assert all(b'"finish_reason":null' in line for line in begun)
    assert limited.ask("api_server", "abort")["aborted"] == 3
    for one, answers in zip(streams, (1, 1, 2), strict=True):
        *pieces, usage, end = [line.removeprefix(b"data: ") for line in one]
        reasons = [json.loads(piece)["choices"][0]["finish_reason"] for piece in pieces]
        assert (reasons.count("abort"), set(reasons), end) == (answers, {*reasons[:1], "abort"}, b"[DONE]")
        assert 0 < json.loads(usage)["usage"]["completion_tokens"] < 900 * answers
    wait_for(lambda: limited.engine()["running"] == 0 == limited.door()["in_flight"])
    assert limited.ask("api_server", "abort")["aborted"] == 0
    assert complete(5) == 5


def test_requests_that_wait_in_the_engine_are_aborted_too(limited):
    limited.limit("--running", "0")
    streams = [stream(max_tokens=900) for _ in range(3)]
    wait_for(lambda: limited.engine()["waiting"] == 3)
    assert limited.ask("api_server", "abort")["aborted"] == 3
    for one in streams:
        assert [line for line in one.iter_lines() if line][-1] == b"data: [DONE]"
    wait_for(lambda: limited.engine()["waiting"] == 0)


def test_a_pause_is_known_while_the_engine_is_in_it(limited):
    assert limited.engine()["paused"] is False
    assert requests.post(f"{URL}/pause?mode=keep", timeout=20).status_code == 200
    assert limited.engine()["paused"] is True
    assert requests.post(f"{URL}/resume", timeout=20).status_code == 200
    assert limited.engine()["paused"] is False
