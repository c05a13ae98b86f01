"""gpuwatch beside a real vLLM on a real GPU; prints the transcript that docs/ shows. CI has no GPU for it.

usage: gpu_live.py MODEL_DIR [SECONDS_OF_LOAD]     needs an NVIDIA driver, vLLM and gpuwatch on PYTHONPATH
It starts one vLLM server on loopback through gpuwatch's own process supervisor, loads it, kills its engine,
and waits for gpuwatch to bring it back. It changes no setting of the GPU and ends only what it started.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import requests

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench.run import unit_environment  # noqa: E402
from tests.demo import slack_lines  # noqa: E402
from tests.receivers import DingTalkStandIn, SlackStandIn  # noqa: E402

from gpuwatch import catalogue, store  # noqa: E402
from gpuwatch.sources.readings import READINGS  # noqa: E402

PORT = 8000
URL = f"http://127.0.0.1:{PORT}"
CONFIG = """\
state_dir: {state}
host: h200
remediation: {{mode: auto, just_started_grace: 10s, verify_for: 20s}}
servers:
  - name: qwen
    url: http://127.0.0.1:8000
    start_deadline: 4m
    supervisor:
      process:
        command: [{python}, -m, vllm.entrypoints.cli.main, serve, {model}, --load-format, dummy,
                  --served-model-name, m, --port, "8000", --enforce-eager,
                  --max-model-len, "4096", --max-num-seqs, "32", --gpu-memory-utilization, "0.3"]
receivers:
  - {{name: slack, slack: {{url_file: {state}/slack_url}}}}
  - {{name: dingtalk, lang: zh, dingtalk: {{url_file: {state}/ding_url, secret_file: {state}/ding_secret}}}}
"""
BEGAN = time.monotonic()


def say(text):
    print(f"\n[{time.monotonic() - BEGAN:6.1f} s] {text}", flush=True)


def gpuwatch(*words):
    command = [sys.executable, "-m", "gpuwatch", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return (done.stdout + done.stderr).rstrip()


def wait_for(what, within_s, question):
    end = time.monotonic() + within_s
    while time.monotonic() < end:
        if question():
            say(what)
            return
        time.sleep(0.2)
    raise SystemExit(f"not within {within_s} s: {what}")


def healthy():
    try:
        return requests.get(f"{URL}/health", timeout=5).status_code == 200
    except requests.RequestException:
        return False


class Load:
    """Sixteen clients that ask for completions, until stopped; counts answers and failures."""

    def __init__(self):
        self.stop, self.answered, self.failed = threading.Event(), 0, 0
        self.threads = [threading.Thread(target=self.client, daemon=True) for _ in range(16)]
        for thread in self.threads:
            thread.start()

    def client(self):
        body = {"model": "m", "prompt": list(range(5, 300)), "max_tokens": 128, "ignore_eos": True}
        while not self.stop.is_set():
            try:
                ok = requests.post(f"{URL}/v1/completions", json=body, timeout=60).ok
            except requests.RequestException:
                ok = False
            self.answered, self.failed = self.answered + ok, self.failed + (not ok)
            if not ok:
                self.stop.wait(1)


class Cost:
    """RSS and CPU of two processes over the same seconds."""

    def __init__(self, **processes):
        self.processes = processes
        self.rss = {name: [] for name in processes}
        self.began, self.cpu = time.monotonic(), {n: self.cpu_s(p) for n, p in processes.items()}

    def cpu_s(self, process):
        return sum(process.cpu_times()[:2])

    def look(self):
        for name, process in self.processes.items():
            self.rss[name].append(process.memory_info().rss / 2**20)

    def table(self):
        span = time.monotonic() - self.began
        for name, process in self.processes.items():
            percent = 100 * (self.cpu_s(process) - self.cpu[name]) / span
            median = statistics.median(self.rss[name])
            print(f"  {name:14} RSS {median:6.1f} MiB (median)   CPU {percent:.2f} % of a core")


def show_readings(folder):
    with store.open_read_only(folder) as view:
        latest = view.latest(view.last_tick_ms(), 120_000)
    own = sorted((labels, value) for labels, value in latest.items() if labels.metric.startswith("gpu_"))
    for labels, value in own:
        print(f"  {labels.without('uuid')} {value:.10g}")
    asked = {m.name for m in catalogue.METRICS if m.name.startswith("gpu_")}
    missing = sorted(asked - {labels.metric for labels, _ in own})
    print(f"  {len(own)} GPU series; metrics without a sample here: {missing or 'none'}")
    print(f"  {sum(k.metric.startswith('vllm:') for k in latest)} vllm:* series, {len(latest)} series in all")


def show(chat, name, lines):
    for payload in chat.received:
        print(f"  ┌─ {name}")
        for line in lines(payload):
            print(f"  │ {line}")


def main():
    model, load_s = Path(sys.argv[1]).resolve(), float(sys.argv[2]) if len(sys.argv) > 2 else 130
    state = Path(tempfile.mkdtemp(prefix="gpuwatch-live-"))
    with SlackStandIn() as slack, DingTalkStandIn("SEC-live") as ding:
        (state / "slack_url").write_text(slack.url)
        (state / "ding_url").write_text(ding.url)
        (state / "ding_secret").write_text("SEC-live")
        settings = state / "gpuwatch.yaml"
        settings.write_text(CONFIG.format(state=state, model=model, python=sys.executable))
        os.environ["GPUWATCH_CONFIG"] = str(settings)
        calls = [(q.function, q.arguments) for q in READINGS] + [("nvmlDeviceGetComputeRunningProcesses", ())]
        bare = psutil.Popen([sys.executable, ROOT / "bench/bare_loop.py", "900", json.dumps(calls)])
        environment = unit_environment(str(state))
        first = subprocess.Popen([sys.executable, "-m", "gpuwatch", "run"], env=environment)  # compiles
        time.sleep(10)
        first.terminate()
        first.wait(30)
        daemon = psutil.Popen([sys.executable, "-m", "gpuwatch", "run"], env=environment)
        try:
            story(state, slack, ding, load_s, Cost, daemon, bare)
        finally:
            daemon.send_signal(signal.SIGTERM)
            daemon.wait(30)
            say(f"daemon stopped by SIGTERM; the server runs on: healthy = {healthy()}")
            bare.kill()
            end_server(state)
    say("what Slack's stand-in received")
    show(slack, "Slack", slack_lines)
    say("what DingTalk's stand-in received")
    show(ding, "DingTalk", lambda payload: payload["markdown"]["text"].splitlines())


def story(state, slack, ding, load_s, cost, daemon, bare):
    time.sleep(4)
    say("$ gpuwatch status")
    print(gpuwatch("status"))
    say("$ gpuwatch server start qwen")
    print(gpuwatch("server", "start", "qwen"))
    wait_for("the server is healthy", 240, healthy)
    print(f"  messages during its start: {len(slack.received)}")
    load = Load()
    measured, end = cost(gpuwatch=daemon, bare_loop=bare), time.monotonic() + load_s
    while time.monotonic() < end:
        time.sleep(1)
        measured.look()
    say(f"{load_s:.0f} s of load: {load.answered} answers, {load.failed} failures")
    print(f"  {len(slack.received)} messages")
    print(gpuwatch("status"))
    say("every GPU reading, from the database")
    show_readings(state)
    say("cost over those seconds, beside a bare pynvml loop that makes the same calls")
    measured.table()
    if "GPUWATCH_LIVE_COST_ONLY" in os.environ:
        load.stop.set()
        return
    kill_and_wait(state, slack)
    load.stop.set()
    say("$ gpuwatch status")
    print(gpuwatch("status"))
    print(gpuwatch("alerts", "--limit", "6"))
    say("$ gpuwatch record r.jsonl.xz --for 5s; gpuwatch replay r.jsonl.xz")
    print(gpuwatch("record", str(state / "r.jsonl.xz"), "--for", "5s"))
    print(gpuwatch("replay", str(state / "r.jsonl.xz")) or "  (nothing would have fired)")


def kill_and_wait(state, slack):
    pid = json.loads((state / "process-qwen.json").read_text())["leader"]["pid"]
    engine = next(c for c in psutil.Process(pid).children(recursive=True) if "EngineCor" in c.name())
    say(f"$ kill -9 {engine.pid}   # {engine.name()}, child of vLLM's API server {pid}")
    killed = time.monotonic()
    engine.kill()
    told = lambda word: any(word in json.dumps(p, ensure_ascii=False) for p in slack.received)  # noqa: E731
    wait_for("Slack was told that the server is down", 20, lambda: told("VLLMDown"))
    print(f"  {time.monotonic() - killed:.1f} s after the kill")
    wait_for("healthy again", 240, lambda: restarted(state, pid) and healthy())
    print(f"  {time.monotonic() - killed:.1f} s after the kill")
    wait_for("Slack was told that it is fixed and verified", 90, lambda: told("FIXED"))


def restarted(state, old_pid):
    leader = json.loads((state / "process-qwen.json").read_text())["leader"]
    return bool(leader) and leader["pid"] != old_pid


def end_server(state):
    leader = json.loads((state / "process-qwen.json").read_text())["leader"]
    if leader and psutil.pid_exists(leader["pid"]):
        main_process = psutil.Process(leader["pid"])
        ours = [*main_process.children(recursive=True), main_process]
        for process in ours:
            process.kill()
        psutil.wait_procs(ours, timeout=30)
        say("the server that this script started was ended")


if __name__ == "__main__":
    main()
