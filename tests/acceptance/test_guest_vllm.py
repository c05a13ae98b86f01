"""The guest in a real vLLM server without GPU: in each of its processes, and in nobody's way."""

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import requests
from click.testing import CliRunner
from tests.fake_nvml import FakeNvml
from tests.guests import wait_for

from gpuwatch import cli
from gpuwatch.guest import client
from gpuwatch.sources import AllocatorSource

ROOT = Path(__file__).parents[2]
TOOL = ROOT.parent / "shared" / "tools" / "vllm_cpu.sh"
BUILD = Path(os.environ.get("GPUWATCH_VLLM_BUILD", ROOT / "build" / "vllm"))
VENV = Path(os.environ.get("VENV", BUILD / "venv"))
PORT = 18241
START_S = 240
PROMPTS = [[5, 6, 7], [400, 12, 4, 4, 8], list(range(3, 60))]

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.shared,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not TOOL.exists(), reason="needs ../shared/tools/vllm_cpu.sh"),
]


@pytest.fixture(scope="module")
def model():
    if not (VENV / "bin" / "vllm").exists():
        VENV.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["bash", TOOL, "install", VENV], check=True, timeout=900)
    if not (BUILD / "models").exists():
        env = {**os.environ, "VENV": str(VENV)}
        subprocess.run(["bash", TOOL, "model", BUILD / "models"], check=True, timeout=300, env=env)
    return BUILD / "models" / "tiny"


@pytest.fixture
def guests(tmp_path):
    """The folder of the sockets; the guest is installed beside it."""
    folder = tmp_path / "guests"
    folder.mkdir()
    assert CliRunner().invoke(cli.main, ["guest", "install", str(tmp_path / "lib")]).exit_code == 0
    return folder


class Server:
    """A vLLM server with the guest on its path, and all processes that it had."""

    def __init__(self, model, guests, **env):
        self.log = guests.parent / f"vllm{len(list(guests.parent.glob('vllm*.log')))}.log"
        env = {
            **os.environ,
            "VENV": str(VENV),
            "PYTHONPATH": str(guests.parent / "lib"),
            "GPUWATCH_GUEST_DIR": str(guests),
            **env,
        }
        command = ["bash", TOOL, "serve", model, "--port", str(PORT)]
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
        process.kill()
        with contextlib.suppress(psutil.TimeoutExpired):
            process.wait(20)
    source.read(60_000)
    assert client.listed(guests) == {}
