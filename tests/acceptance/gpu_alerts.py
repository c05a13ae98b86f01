"""Alerts that only a live server shows, on a real GPU: a stall, a sleep, a rival. CI has no GPU for it.

usage: gpu_alerts.py MODEL_DIR     needs an NVIDIA driver, vLLM, PyTorch and gpuwatch on PYTHONPATH
It starts one vLLM server on loopback, stops its engine (SIGSTOP) under load and lets it go on, puts it to
sleep and wakes it, and lets a process of its own take memory; it says when each alert fired and was over.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import requests

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.acceptance.gpu_live import URL, Load, end_server, gpuwatch, healthy, say, wait_for  # noqa: E402

SETTINGS = """\
state_dir: {state}
host: h200
servers:
  - name: qwen
    url: http://127.0.0.1:8000
    start_deadline: 4m
    supervisor:
      process:
        command: [env, VLLM_SERVER_DEV_MODE=1, {python}, -m, vllm.entrypoints.cli.main, serve, {model},
                  --load-format, dummy, --served-model-name, m, --port, "8000", --enforce-eager,
                  --enable-sleep-mode, --max-model-len, "4096", --gpu-memory-utilization, "0.3"]
"""
RIVAL = "import torch, time; held = torch.empty(12 << 30, dtype=torch.uint8, device='cuda'); time.sleep(25)"


def firing():
    active = json.loads(gpuwatch("alerts", "--json"))["active"]
    return {alert["alert"] for alert in active if alert["state"] == "firing"}


def fires_and_ends(alert, within_s, end):
    """How long the alert took to fire; then `end` is called, and it must be over."""
    began = time.monotonic()
    wait_for(f"{alert} fires", within_s, lambda: alert in firing())
    print(f"  after {time.monotonic() - began:.0f} s; firing: {sorted(firing())}")
    end()
    ended = time.monotonic()
    wait_for(f"{alert} is over", 150, lambda: alert not in firing())
    print(f"  after {time.monotonic() - ended:.0f} s; firing: {sorted(firing())}")


def story(state):
    print(gpuwatch("server", "start", "qwen"))
    wait_for("the server is healthy", 240, healthy)
    load = Load()
    time.sleep(20)
    print("  firing under load:", sorted(firing()))
    leader = json.loads((state / "process-qwen.json").read_text())["leader"]["pid"]
    engine = next(c for c in psutil.Process(leader).children(recursive=True) if "EngineCor" in c.name())
    say(f"$ kill -STOP {engine.pid}   # {engine.name()}, sixteen requests running; /health says 200")
    engine.send_signal(signal.SIGSTOP)
    fires_and_ends("VLLMEngineStalled", 20, lambda: engine.send_signal(signal.SIGCONT))
    print(f"  healthy = {healthy()}, {load.answered} answers, {load.failed} failures")
    load.stop.set()
    time.sleep(5)
    say("POST /sleep?level=1")
    requests.post(f"{URL}/sleep?level=1", timeout=60).raise_for_status()
    fires_and_ends("VLLMAsleep", 120, lambda: requests.post(f"{URL}/wake_up", timeout=60))
    say("a process of another takes 12 GiB for 25 s")
    rival = subprocess.Popen([sys.executable, "-c", RIVAL])
    fires_and_ends("GPUMemoryForeignProcess", 60, rival.wait)
    print(gpuwatch("alerts", "--limit", "12"))


def main():
    state = Path(tempfile.mkdtemp(prefix="gpuwatch-alerts-"))
    settings = state / "gpuwatch.yaml"
    settings.write_text(
        SETTINGS.format(state=state, model=Path(sys.argv[1]).resolve(), python=sys.executable)
    )
    os.environ["GPUWATCH_CONFIG"] = str(settings)
    daemon = subprocess.Popen([sys.executable, "-m", "gpuwatch", "run", "--log-level", "warning"])
    try:
        time.sleep(10)
        story(state)
    finally:
        daemon.terminate()
        say(f"daemon ended with status {daemon.wait(30)}")
        end_server(state)


if __name__ == "__main__":
    main()
