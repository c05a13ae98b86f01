"""Whether tokens come, of a real vLLM server on CPUs by the real daemon: the verdict, and the time to it.

Times run from what was done, or from the last token, to the tick whose sample says so in the store.
GPUWATCH_MIXED_LOAD_S is for how long mixed load must not be taken for a stall.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
import requests
from click.testing import CliRunner
from tests.acceptance import vllm_cpu

from gpuwatch import cli
from gpuwatch.errors import StoreError
from gpuwatch.promql import Matcher
from gpuwatch.store import open_history

PORT = int(os.environ.get("GPUWATCH_VLLM_PORT", "18251"))
MIXED_LOAD_S = float(os.environ.get("GPUWATCH_MIXED_LOAD_S", "60"))
START_S = 240
STALL_S, DEATH_S, IDLE_WEDGE_S = 10.0, 1.5, 25.0
PROCESSES = ("EngineCore", "Worker", "APIServer")
CONFIG = """\
state_dir: {state}
remediation: {{mode: observe}}
servers:
  - name: m
    url: http://127.0.0.1:{port}
    start_deadline: 5m
    canary: {{interval: 30s, timeout: 5s}}
    supervisor:
      process:
        command: [bash, {tool}, serve, {model}, --port, "{port}", --max-num-seqs, "8"{more}]
        env: {{VENV: {venv}, PYTHONPATH: "{path}", GPUWATCH_GUEST_DIR: {guests}, WEDGE: {state}/wedge,
               VLLM_CPU_OMP_THREADS_BIND: nobind}}
"""
# An engine that hangs and is stopped by no signal: the wrapped schedule() waits while a file is there. It is
# called when there is work, so that an idle engine hangs before it took the first of the requests in hand.
# And a step takes at least 20 ms: with a tiny model the clients would take all CPUs.
WEDGE = """
import os, time

def register():
    from vllm.v1.core.sched.scheduler import Scheduler
    plain = Scheduler.schedule
    def schedule(self, *words, **names):
        time.sleep(0.02)
        while os.path.exists(os.environ["WEDGE"]):
            time.sleep(0.1)
        return plain(self, *words, **names)
    Scheduler.schedule = schedule
"""

pytestmark = vllm_cpu.needed


@pytest.fixture
def story(request, model, tmp_path):
    story = Story(tmp_path, model, has_guest=request.param == "guest")
    story.start_gpuwatch()
    try:
        yield story
    finally:
        story.end()


@pytest.mark.parametrize("story", ["guest"], indirect=True)
def test_the_verdict_and_the_time_to_it(story):
    story.starts("the first start")
    story.mixed_load_is_no_stall()
    for process in PROCESSES:
        story.stopped_under_load(process)
    for process in PROCESSES:
        story.stopped_while_idle(process)
    story.hangs_under_load()
    story.hangs_while_idle()
    story.is_paused_and_goes_on()
    story.sleeps_and_wakes()
    for process in PROCESSES:
        story.killed_under_load(process)
        story.starts(f"the start after the death of {process}")
    story.gpuwatch_begins_anew_in_a_stall()
    print("\n".join(story.table))


@pytest.mark.parametrize("story", ["no guest"], indirect=True)
def test_without_a_guest_the_server_is_asked(story):
    """Whether it is paused, and, where nobody counts its requests, for one token now and then."""
    story.starts("the start without a guest")
    story.hangs_under_load()
    story.is_paused_and_goes_on()
    story.hangs_while_idle(within_s=60)
    print("\n".join(story.table))


class Story:
    """The server, the daemon, what is done to them and what the daemon says."""

    def __init__(self, folder, model, *, has_guest):
        self.folder = folder
        self.guests = folder / "guests"
        self.guests.mkdir()
        self.wedge_file = folder / "wedge"
        self.config = folder / "gpuwatch.yaml"
        assert CliRunner().invoke(cli.main, ["guest", "install", str(folder / "lib")]).exit_code == 0
        install_wedge(folder / "plugin")
        self.config.write_text(
            CONFIG.format(
                state=folder,
                port=PORT,
                tool=vllm_cpu.TOOL,
                model=model,
                venv=vllm_cpu.VENV,
                path=f"{folder / 'plugin'}" + f":{folder / 'lib'}" * has_guest,
                more=", --middleware, gpuwatch_guest.admission.Admission" * has_guest,
                guests=self.guests,
            )
        )
        self.daemon = None
        self.table = []
        self.seen = {}  # every process that the server had, by pid

    # -- trials --------------------------------------------------------------------------------------

    def starts(self, what):
        """Watched from its first second: it starts, and then it is idle."""
        began_ms = now_ms()
        self.gpuwatch("server", "start", "m")
        self.until("healthy", START_S, self.healthy)
        self.says(what, "idle/", began_ms, START_S)
        told = self.told(began_ms)
        assert not [verdict for _, verdict in told if verdict.startswith("stalled/")], told
        self.table.append(f"{what}: {[verdict for _, verdict in told]}")

    def mixed_load_is_no_stall(self):
        began_ms = now_ms()
        with Load(self, clients=6, mixed=True) as load:
            time.sleep(MIXED_LOAD_S)
        assert load.errors == []
        told = self.told(began_ms)
        kinds = {verdict for _, verdict in told}
        self.table.append(f"mixed load of {MIXED_LOAD_S:g} s: {len(told)} verdicts, {sorted(kinds)}")
        # Where other work holds the host up, no page may come for ten seconds: that is said, and is no stall.
        kinds -= {"unknown/no_metrics"}
        assert {verdict.partition("/")[0] for verdict in kinds} <= {"working", "idle"}, told

    def stopped_under_load(self, process):
        with Load(self) as load:
            load.runs()
            self.signal(process, signal.SIGSTOP)
            at_ms = now_ms() if process == "APIServer" else load.rests()
            self.says(f"{process} stopped under load", "stalled/process_stopped", at_ms, STALL_S)
            self.signal(process, signal.SIGCONT)
            self.goes_on(load)

    def stopped_while_idle(self, process):
        self.is_idle()
        self.signal(process, signal.SIGSTOP)
        self.says(f"{process} stopped while idle", "stalled/process_stopped", now_ms(), STALL_S)
        self.signal(process, signal.SIGCONT)
        self.is_idle()

    def hangs_under_load(self):
        with Load(self) as load:
            load.runs()
            self.wedge_file.touch()
            self.says("engine hangs under load", "stalled/no_steps", load.rests(), STALL_S)
            self.wedge_file.unlink()
            self.goes_on(load)

    def hangs_while_idle(self, within_s=IDLE_WEDGE_S):
        self.is_idle()
        self.wedge_file.touch()
        time.sleep(5)
        assert self.told()[-1][1] == "idle/no_requests"
        at_ms = now_ms()
        with Load(self, clients=3) as load:
            self.says("engine hung while idle", "stalled/canary_unanswered", at_ms, within_s)
            self.wedge_file.unlink()
            self.goes_on(load)

    def is_paused_and_goes_on(self):
        with Load(self) as load:
            load.runs()
            assert self.post("/pause?mode=keep").status_code == 200
            began_ms = load.rests()
            self.says("paused", "paused/operator", began_ms, STALL_S)
            time.sleep(20)
            assert {verdict.partition("/")[0] for _, verdict in self.told(began_ms)} <= {"working", "paused"}
            self.post("/resume")
            self.goes_on(load)

    def sleeps_and_wakes(self):
        self.is_idle()
        at_ms = now_ms()
        assert self.post("/sleep?level=1").status_code == 200
        self.says("put to sleep", "asleep/", at_ms, STALL_S)
        assert self.post("/wake_up").status_code == 200
        self.is_idle()

    def killed_under_load(self, process):
        with Load(self) as load:
            load.runs()
            at_ms = now_ms()
            self.signal(process, signal.SIGKILL)
            self.says(f"{process} killed", ("stalled/process_died", "down/health"), at_ms, DEATH_S)
        self.says(f"{process} killed, then down", "down/health", at_ms, 60)
        self.until("no process left", 60, self.clear)

    def gpuwatch_begins_anew_in_a_stall(self):
        self.is_idle()
        with Load(self) as load:
            load.runs()
            self.wedge_file.touch()
            self.says("engine hangs under load again", "stalled/no_steps", load.rests(), STALL_S)
            time.sleep(30)
            self.daemon.send_signal(signal.SIGTERM)
            assert self.daemon.wait(30) == 0
            began_ms = now_ms()
            self.start_gpuwatch()
            self.says("gpuwatch began anew", "stalled/no_steps", began_ms, 20)
            first = self.told(began_ms)[0]
            assert first[1] == "stalled/no_steps", "its first word is its last"
            self.wedge_file.unlink()
            self.goes_on(load)

    # -- parts ---------------------------------------------------------------------------------------

    def says(self, what, verdicts, since_ms, within_s):
        """The first verdict that begins with one of these, at or after an instant; noted with its time."""
        verdicts = (verdicts,) if isinstance(verdicts, str) else verdicts
        end = time.monotonic() + within_s + 5
        while time.monotonic() < end:
            for at_ms, verdict in self.told(since_ms):
                if verdict.startswith(verdicts):
                    seconds = (at_ms - since_ms) / 1000
                    self.table.append(f"{what}: {verdict} after {seconds:.1f} s")
                    print(self.table[-1])
                    assert seconds <= within_s
                    return
            time.sleep(0.2)
        pytest.fail(f"{what}: no {verdicts} within {within_s} s, but {self.told(since_ms)}")

    def told(self, since_ms=0):
        """Each verdict with the instant of the tick that first said so, from the one in force on."""
        with contextlib.suppress(StoreError), open_history(self.folder) as history:
            matchers = [Matcher("__name__", "=", "server_progress"), Matcher("server", "=", "m")]
            found = history.select(matchers, since_ms - 1, now_ms() + 60_000)
            samples = sorted(
                (at_ms, f"{s.labels.get('verdict')}/{s.labels.get('reason')}")
                for s in found
                for at_ms, value in zip(s.at_ms, s.values, strict=True)
                if value == 1.0
            )
            return [one for i, one in enumerate(samples) if not i or samples[i - 1][1] != one[1]]
        return []

    def is_idle(self):
        at_ms = now_ms()
        self.until("idle", 60, lambda: [v for _, v in self.told(at_ms) if v.startswith("idle/")])

    def goes_on(self, load):
        """Tokens come again, it is seen, and no request was lost."""
        at_ms = now_ms()
        load.runs()
        self.says("goes on", "working/steps", at_ms, STALL_S)
        assert load.errors == []

    def signal(self, process, number):
        if process == "APIServer":
            pids = [self.leader()]
        else:
            pids = [p.pid for p in self.processes().values() if title(p).startswith(f"VLLM::{process}")]
        assert pids, [title(p) for p in self.processes().values()]
        for pid in pids:
            os.kill(pid, number)

    def leader(self):
        return json.loads((self.folder / "process-m.json").read_text())["leader"]["pid"]

    def processes(self):
        """Those of the server that live, also of one whose main process is gone."""
        with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError, TypeError):
            leader = psutil.Process(self.leader())
            self.seen |= {p.pid: p for p in (leader, *leader.children(recursive=True))}
        return {pid: p for pid, p in self.seen.items() if lives(p)}

    def clear(self):
        """Ends what outlived its server, and says whether nothing is left."""
        for process in self.processes().values():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        return not self.processes()

    def healthy(self):
        self.processes()
        with contextlib.suppress(requests.RequestException):
            return requests.get(f"http://127.0.0.1:{PORT}/health", timeout=5).status_code == 200
        return False

    def post(self, path):
        return requests.post(f"http://127.0.0.1:{PORT}{path}", timeout=60)

    def until(self, what, within_s, question):
        end = time.monotonic() + within_s
        while time.monotonic() < end:
            if question():
                return
            time.sleep(0.3)
        pytest.fail(f"{what}: not within {within_s} s; told: {self.told()[-5:]}")

    def start_gpuwatch(self):
        command = [sys.executable, "-m", "gpuwatch", "run", "--config", str(self.config)]
        env = {**os.environ, "GPUWATCH_GUEST_DIR": str(self.guests)}
        self.daemon = subprocess.Popen(command, env=env)

    def gpuwatch(self, *words):
        command = [sys.executable, "-m", "gpuwatch", *words, "--config", str(self.config)]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout

    def let_go(self):
        """Undo what holds the server up."""
        self.wedge_file.unlink(missing_ok=True)
        for process in self.processes().values():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)

    def end(self):
        """Ours alone: our daemon, and the processes that it started for this test."""
        self.daemon.kill()
        self.daemon.wait()
        ours = self.processes()
        self.clear()
        psutil.wait_procs(ours.values(), timeout=30)


class Load:
    """Clients that stream completions, one after the other, until the end of `with`."""

    def __init__(self, story, clients=4, *, mixed=False):
        self.story, self.mixed = story, mixed
        self.last_token_ms = 0
        self.tokens = 0
        self.errors = []
        self._ends = threading.Event()
        self._threads = [threading.Thread(target=self._client, args=(n,)) for n in range(clients)]

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, failed, *_):
        self._ends.set()
        if failed:  # else the clients would wait for an engine that a trial left hanging
            self.story.let_go()
        for thread in self._threads:
            thread.join()

    def runs(self):
        """Returns when tokens have come for some seconds."""
        before = self.tokens
        self.story.until("tokens", 60, lambda: self.tokens > before + 200)

    def rests(self):
        """When the last token came, once none has come for a second."""
        end = time.monotonic() + 30
        while now_ms() - self.last_token_ms < 1000 and time.monotonic() < end:
            time.sleep(0.05)
        return self.last_token_ms

    def _client(self, number):
        chance = random.Random(number)
        while not self._ends.is_set():
            length = chance.choice([3, 50, 400, 900]) if self.mixed else 8
            tokens = chance.randint(1, 100) if self.mixed else 900
            body = {
                "model": "m",
                "prompt": [chance.randint(5, 500) for _ in range(length)],
                "max_tokens": tokens,
                "ignore_eos": True,
                "stream": True,
            }
            try:
                self._stream(body)
            except requests.RequestException as error:
                self.errors.append(repr(error))
                self._ends.wait(0.5)
            if self.mixed:
                self._ends.wait(chance.choice([0, 0, 0.5, 8]))

    def _stream(self, body):
        url = f"http://127.0.0.1:{PORT}/v1/completions"
        with requests.post(url, json=body, stream=True, timeout=(5, 300)) as response:
            if response.status_code != 200:
                self.errors.append(f"HTTP {response.status_code}")
            for line in response.iter_lines():
                if b'"error"' in line:
                    self.errors.append(line.decode())
                if line and b"[DONE]" not in line:
                    self.tokens += 1
                    self.last_token_ms = now_ms()
                if self._ends.is_set() and not self.mixed:
                    return


def install_wedge(folder):
    """As pip would install it: vLLM finds its plugins by their entry points."""
    about = folder / "wedge-1.dist-info"
    about.mkdir(parents=True)
    (folder / "wedge.py").write_text(WEDGE)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: wedge\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[vllm.general_plugins]\nwedge = wedge:register\n")


def now_ms():
    return int(time.time() * 1000)


def title(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def lives(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
