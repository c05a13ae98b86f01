"""A real vLLM server without GPU, as a plain process of gpuwatch: it is back when its engine has died."""

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial

import psutil
import pytest
import requests
from tests.acceptance import vllm_cpu
from tests.receivers import DingTalkStandIn, SlackStandIn

from gpuwatch.notify import Tone
from gpuwatch.records import Phase, ServerPhase
from gpuwatch.store import open_read_only

PORT = 18231
# The field that names the alert; the runbook of another alert names this one too.
ABOUT = re.compile(r"(Alert|告警)\W{1,8}VLLMDown")
ALL_TOLD = [Tone.FIRING, Tone.RESOLVED, Tone.FIXED]
CONFIG = """\
state_dir: {state}
remediation: {{mode: auto, just_started_grace: 2s, verify_for: 10s, cooldown: 0s}}
servers:
  - name: m
    url: http://127.0.0.1:{port}
    start_deadline: 5m
    supervisor:
      process:
        command: [bash, {tool}, serve, {model}, --port, "{port}"]
        env: {{VENV: {venv}}}
receivers:
  - {{name: slack, slack: {{url_file: {state}/slack_url}}}}
  - {{name: dingtalk, lang: zh, dingtalk: {{url_file: {state}/ding_url, secret_file: {state}/ding_secret}}}}
"""

pytestmark = [*vllm_cpu.needed, vllm_cpu.shown_too_by("test_hands_box.py, all but the chats,")]


def test_an_engine_that_is_killed_is_back_through_gpuwatch_and_both_chats_know(model, tmp_path):
    with SlackStandIn() as slack, DingTalkStandIn("SEC-v") as ding:
        story = Story(write_config(tmp_path, model, slack, ding), slack, ding)
        assert not story.healthy(), f"somebody else answers on port {PORT}"
        story.start_gpuwatch()
        try:
            story.server_starts_and_is_not_called_down()
            story.engine_dies_and_is_back()
            story.server_outlives_gpuwatch()
            story.gpuwatch_dies_while_it_heals()
        finally:
            story.end()


def write_config(folder, model, slack, ding):
    (folder / "slack_url").write_text(slack.url)
    (folder / "ding_url").write_text(ding.url)
    (folder / "ding_secret").write_text("SEC-v")
    config = folder / "gpuwatch.yaml"
    config.write_text(
        CONFIG.format(state=folder, port=PORT, tool=vllm_cpu.TOOL, model=model, venv=vllm_cpu.VENV)
    )
    return config


class Story:
    """What happens, and the parts it is made of."""

    def __init__(self, config, slack, ding):
        self.config, self.slack, self.ding = config, slack, ding
        self.daemon = None
        self.sessions = set()  # of the servers that were started here
        self.began_s = time.monotonic()

    def server_starts_and_is_not_called_down(self):
        self.began_s = time.monotonic()
        self.gpuwatch("server", "start", "m")
        self.wait_for("healthy", 240, self.healthy)
        self.wait_for("seen as serving", 20, lambda: self.seen().phase is ServerPhase.SERVING)
        assert self.told(self.slack) == self.told(self.ding) == [], "a server that is starting is not down"
        self.answers_a_prompt()

    def engine_dies_and_is_back(self):
        old = self.engine_dies(told_before=[])
        self.server_comes_back(old)
        self.all_is_told(times=1)

    def server_outlives_gpuwatch(self):
        pid = self.leader()
        self.daemon.send_signal(signal.SIGTERM)
        assert self.daemon.wait(30) == 0
        assert self.healthy(), "gpuwatch took the server down with itself"
        seen_ms = self.seen().seen_at_ms
        self.start_gpuwatch()
        self.wait_for("seen by the next gpuwatch", 20, lambda: self.seen().seen_at_ms > seen_ms + 5000)
        assert (self.seen().phase, self.seen().supervisor.pid) == (ServerPhase.SERVING, pid)
        assert self.told(self.slack) == self.told(self.ding) == ALL_TOLD, "a restart is no news"

    def gpuwatch_dies_while_it_heals(self):
        """The next gpuwatch goes on with the remediation, and starts no second server."""
        old = self.engine_dies(told_before=ALL_TOLD)
        self.daemon.kill()
        self.daemon.wait()
        assert self.remediations() == [Phase.APPLYING, Phase.SUCCEEDED]
        self.start_gpuwatch()
        self.server_comes_back(old)
        self.all_is_told(times=2)

    # -- what happens more than once ---------------------------------------------------------------

    def engine_dies(self, told_before):
        """The processes that the server had, once both chats have the alarm."""
        old = self.processes()
        print(f"the engine dies; there are {[process.name() for process in old]}")
        (engine,) = self.engines()
        self.began_s = time.monotonic()
        engine.kill()
        for chat in (self.slack, self.ding):
            alarm = partial(self.is_told, chat, [*told_before, Tone.FIRING])
            self.wait_for(f"alarm in {chat.name}", 15, alarm)
        return old

    def server_comes_back(self, old):
        self.wait_for("old processes gone", 60, lambda: not any(map(is_running, old)))
        self.wait_for("new engine", 240, self.engines)
        self.wait_for("healthy again", 240, self.healthy)
        self.answers_a_prompt()

    def all_is_told(self, times):
        for chat in (self.slack, self.ding):
            self.wait_for(f"success in {chat.name}", 60, partial(self.is_told, chat, ALL_TOLD * times))
        assert self.remediations() == [Phase.SUCCEEDED] * times
        assert self.servers() == [self.leader()], "there is more than one server"
        assert len(self.engines()) == 1

    # -- the parts ---------------------------------------------------------------------------------

    def start_gpuwatch(self):
        command = [sys.executable, "-m", "gpuwatch", "run", "--config", str(self.config)]
        self.daemon = subprocess.Popen(command)

    def gpuwatch(self, *words):
        command = [sys.executable, "-m", "gpuwatch", *words, "--config", str(self.config)]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    def seen(self):
        """The server as gpuwatch sees it."""
        with open_read_only(self.config.parent) as view:
            return view.servers()["m"]

    def remediations(self):
        """Newest first, as a user is shown them."""
        return [r["phase"] for r in json.loads(self.gpuwatch("status", "--json"))["remediations"]]

    def leader(self):
        """The server's main process by the state file; None between two of them."""
        leader = json.loads((self.config.parent / "process-m.json").read_text())["leader"]
        if leader is None:
            return None
        self.sessions.add(leader["pid"])
        return leader["pid"]

    def processes(self):
        """The living processes of the servers that were started here, also of one whose leader is dead."""
        self.leader()
        return [p for p in psutil.process_iter() if session_of(p.pid) in self.sessions and is_running(p)]

    def engines(self):
        return [p for p in self.processes() if name_of(p).startswith("VLLM::EngineCor")]

    def servers(self):
        """Who was started on our port, whether the state file knows of it or not."""
        every = psutil.process_iter(["cmdline"])
        return [p.pid for p in every if str(PORT) in (p.info["cmdline"] or []) and is_running(p)]

    def healthy(self):
        with contextlib.suppress(requests.RequestException):
            return requests.get(f"http://127.0.0.1:{PORT}/health", timeout=5).status_code == 200
        return False

    def answers_a_prompt(self):
        body = {"model": "m", "prompt": [5, 6, 7], "max_tokens": 8, "ignore_eos": True}
        answer = requests.post(f"http://127.0.0.1:{PORT}/v1/completions", json=body, timeout=60)
        assert answer.json()["usage"]["completion_tokens"] == 8

    def told(self, chat):
        """What a chat was told of the server, in order; not that this host has no GPU.

        What comes twice at once is one message, which was under way when gpuwatch was killed.
        """
        texts = [json.dumps(payload, ensure_ascii=False) for payload, _ in itertools.groupby(chat.received)]
        return [tone_of(text) for text in texts if ABOUT.search(text.replace("\\n", " "))]

    def is_told(self, chat, tones):
        return self.told(chat) == tones

    def wait_for(self, what, within_s, question):
        end = time.monotonic() + within_s
        while time.monotonic() < end:
            if question():
                print(f"{what}: {time.monotonic() - self.began_s:.1f} s")
                return
            time.sleep(0.2)
        pytest.fail(f"{what}: not within {within_s} s; told: {self.told(self.slack)}")

    def end(self):
        """Ours alone: our daemon, and the sessions that gpuwatch started for this test."""
        self.daemon.kill()
        self.daemon.wait()
        with contextlib.suppress(FileNotFoundError):
            ours = self.processes()
            for process in ours:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(ours, timeout=30)


def tone_of(text):
    (tone,) = [tone for tone in Tone if tone.value in text]
    return tone


def is_running(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def name_of(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.name()
    return ""


def session_of(pid):
    with contextlib.suppress(ProcessLookupError):
        return os.getsid(pid)
    return None
