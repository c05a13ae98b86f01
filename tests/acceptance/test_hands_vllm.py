"""Other settings for a real vLLM server on CPUs, by the real daemon: proved under load, or taken back."""

import contextlib
import json
import os
import socket
import subprocess
import sys

import psutil
import pytest
from click.testing import CliRunner
from tests.acceptance import vllm_cpu
from tests.acceptance.hands import Operator, wait_for

from gpuwatch import cli
from gpuwatch.remediation.steps import present

PORT = 18261
URL = f"http://127.0.0.1:{PORT}"
CONFIG = """\
state_dir: {state}
remediation:
  mode: auto
  just_started_grace: 1s
  cooldown: 0s
  verify_for: 5s
  budget: {{count: 100, per: 1h}}
  breaker: {{count: 100, per: 1h}}
servers:
  - name: m
    url: {url}
    start_deadline: 5m
    revisions: {state}/revisions
    bounds: {{max_model_len: [256, 1024], max_num_seqs: [1, 16]}}
    supervisor:
      process:
        command: [{venv}/bin/vllm, serve, --config, {state}/revisions/current.yaml]
        env: {{PYTHONPATH: "{path}", GPUWATCH_GUEST_DIR: {guests}, VLLM_CPU_OMP_THREADS_BIND: nobind,
               VLLM_CPU_KVCACHE_SPACE: "1", VLLM_NO_USAGE_STATS: "1", HF_HUB_OFFLINE: "1"}}
        stop_timeout: 20s
"""
BASE = """\
model: {model}
port: {port}
load-format: dummy
enforce-eager: true
max-model-len: 1024
max-num-seqs: 8
served-model-name: m
middleware: [gpuwatch_guest.admission.Admission]
"""

# Each takes a minute and a half; all of them: check, drain, stop, swap, start, canary, open_door.
KILLED_AT = os.environ.get("GPUWATCH_KILLED_AT", "start").split(",")

pytestmark = vllm_cpu.needed


class Host(Operator):
    """The daemon, the server that it keeps, and who types."""

    def __init__(self, folder, model):
        self.folder, self.state, self.guests = folder, folder, folder / "guests"
        self.settings, self.url = folder / "revisions", URL
        self.guests.mkdir()
        assert CliRunner().invoke(cli.main, ["guest", "install", str(folder / "lib")]).exit_code == 0
        self.config, self.base = folder / "gpuwatch.yaml", folder / "base.yaml"
        given = {"state": folder, "url": URL, "venv": vllm_cpu.VENV, "path": folder / "lib"}
        self.config.write_text(CONFIG.format(**given, guests=self.guests))
        self.base.write_text(BASE.format(model=model, port=PORT))
        self.daemon = None

    def start_gpuwatch(self):
        env = {**os.environ, "GPUWATCH_GUEST_DIR": str(self.guests)}
        command = [sys.executable, "-m", "gpuwatch", "run", "--config", str(self.config)]
        self.daemon = subprocess.Popen(command, env=env)

    def kill_gpuwatch(self):
        self.daemon.kill()
        self.daemon.wait()

    def gpuwatch(self, *words):
        command = [sys.executable, "-m", "gpuwatch", *words, "--config", str(self.config)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def processes(self):
        """Whatever the daemon started as this server: it leads a session of its own."""
        state = json.loads((self.folder / "process-m.json").read_text())
        leader = (state["leader"] or {}).get("pid")
        return [p for p in psutil.process_iter() if leader and session_of(p.pid) == leader and is_alive(p)]

    def end(self):
        if self.daemon:
            self.kill_gpuwatch()
        with contextlib.suppress(FileNotFoundError):
            ours = self.processes()
            for process in ours:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(ours, timeout=30)


def session_of(pid):
    with contextlib.suppress(ProcessLookupError):
        return os.getsid(pid)
    return None


def is_alive(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


@pytest.fixture(scope="module")
def host(model, tmp_path_factory):
    host = Host(tmp_path_factory.mktemp("hands"), model)
    host.start_gpuwatch()
    try:
        wait_for((host.folder / "state.db").exists, 20)
        host.gpuwatch("config", "set", "m", "--file", str(host.base), "--why", "as it was", "--yes")
        assert host.ended("")["phase"] == "succeeded"
        assert host.is_healthy()
        yield host
    finally:
        host.end()


def test_other_settings_come_under_load_and_no_request_that_ran_is_lost(host):
    host.changes_under_load()


def test_settings_that_vllm_refuses_touch_nothing(host):
    before, revision = host.last_id(), host.current()
    leader = host.processes()[0].pid
    host.set("max_model_len=100000")
    done = host.ended(before)
    assert (done["phase"], done["outcome"]) == ("failed", "revision_refused")
    assert host.current() == revision
    assert host.processes()[0].pid == leader
    assert host.is_healthy()


@vllm_cpu.shown_too_by("test_hands_box.py")
def test_settings_that_cannot_start_are_taken_back(host):
    before, revision = host.last_id(), host.current()
    with socket.create_server(("127.0.0.1", 0)) as taken:  # which the check cannot know
        host.set(f"port={taken.getsockname()[1]}")
        done = host.ended(before)
    assert (done["phase"], done["outcome"]) == ("rolled_back", "died_again")
    assert host.current() == revision
    wait_for(host.is_healthy, 60)


@vllm_cpu.shown_too_by("test_hands_box.py")
def test_an_engine_that_dies_is_back_with_the_same_settings(host):
    before, revision = host.last_id(), host.current()
    (engine,) = [p for p in host.processes() if "EngineCor" in p.name()]
    engine.kill()
    done = host.ended(before)
    assert (done["phase"], done["actions"]) == ("succeeded", ["capture", "restart"])
    assert host.current() == revision
    assert host.is_healthy()
    assert list((host.folder / "bundles").glob(f"{done['id']}*"))


def is_at(remediation, step):
    at = present(remediation)
    return at is not None and at.action == step


@pytest.mark.parametrize("step", KILLED_AT)
def test_gpuwatch_killed_at_a_step_ends_in_one_of_both(host, step):
    before = host.last_id()
    wanted = 8 if host.revisions()[host.current()]["arguments"]["max_num_seqs"] != 8 else 4
    both = {host.current(), max(host.revisions()) + 1}
    host.set(f"max_num_seqs={wanted}", why=f"killed at {step}")
    with contextlib.suppress(BaseException):
        wait_for(lambda: (r := host.last()).plan.id != before and is_at(r, step), 60, every_s=0.05)
    host.kill_gpuwatch()
    host.start_gpuwatch()
    done = host.ended(before)
    assert done["phase"] in {"succeeded", "rolled_back"}
    assert host.current() in both
    wait_for(host.is_healthy, 60)
