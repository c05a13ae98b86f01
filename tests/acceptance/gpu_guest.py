"""The guest in a real vLLM on a real GPU: the allocator from inside, and a death by want of memory.

usage: gpu_guest.py MODEL_DIR     needs an NVIDIA driver, vLLM, PyTorch and gpuwatch on PYTHONPATH
It starts one vLLM server on loopback with the guest on its PYTHONPATH, shows its figures beside NVML's, has
its cache given back, lets a process of its own take what is free, and asks for long prompts until the engine
dies of want of memory. CI has no GPU for it.
"""

import contextlib
import json
import os
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

from tests.acceptance.gpu_live import URL, Load, end_server, gpuwatch, healthy, say, wait_for  # noqa: E402

from gpuwatch.guest import client  # noqa: E402

SETTINGS = """\
state_dir: {state}
host: h200
servers:
  - name: qwen
    url: http://127.0.0.1:8000
    start_deadline: 4m
    supervisor:
      process:
        command: [env, "PYTHONPATH={guest}:{path}", {python}, -m, vllm.entrypoints.cli.main, serve, {model},
                  --load-format, dummy, --served-model-name, m, --port, "8000", --enforce-eager,
                  --max-model-len, "16384", --max-num-batched-tokens, "16384",
                  --gpu-memory-utilization, "0.3"]
"""
# Takes all but 64 MiB, and what is given back later too.
RIVAL = """
import time, torch
held = []
while True:
    free, _ = torch.cuda.mem_get_info()
    size = min(free - (64 << 20), 8 << 30)
    if size > (2 << 20):
        try:
            held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        except torch.OutOfMemoryError:
            pass
    else:
        time.sleep(0.05)
"""
FIGURES = ("allocated_bytes", "reserved_bytes", "inactive_split_bytes", "retries_total", "ooms_total")


def asked(expression):
    """Values by label `worker`, as Prometheus' API gives them."""
    text = gpuwatch("query", "--json", expression)
    start = text.find("{")
    return {
        one["metric"].get("worker", ""): float(one["value"][1]) for one in json.loads(text[start:])["result"]
    }


def long_prompts():
    body = {"model": "m", "prompt": list(range(5, 300)) * 50, "max_tokens": 2}
    with contextlib.suppress(requests.RequestException):
        requests.post(f"{URL}/v1/completions", json=body, timeout=60)


def engine_of(state):
    leader = json.loads((state / "process-qwen.json").read_text())["leader"]["pid"]
    return next(c for c in psutil.Process(leader).children(recursive=True) if "EngineCor" in c.name())


def story(state, guests):
    print(gpuwatch("server", "start", "qwen"))
    wait_for("the server is healthy", 240, healthy)
    load = Load()
    time.sleep(15)
    say("$ gpuwatch guest list")
    print(gpuwatch("guest", "list"))
    for name in FIGURES:
        print(f"  cuda_allocator_{name}", asked(f"cuda_allocator_{name}"))
    print("  NVML, of the engine:", asked('gpu_process_memory_used_bytes{owner!="foreign"}'))
    engine = engine_of(state)
    sockets = client.listed(guests)
    say("the cache is given back, sixteen requests running")
    print(" ", client.ask(sockets[engine.pid], "release", within_s=10))
    time.sleep(3)
    print("  reserved now:", asked("cuda_allocator_reserved_bytes"), f"{load.failed} failures")
    load.stop.set()
    say("a process of another takes all that is free; then long prompts")
    rival = subprocess.Popen([sys.executable, "-c", RIVAL])
    try:
        time.sleep(15)
        client.ask(client.listed(guests)[engine.pid], "release", within_s=10)
        time.sleep(2)
        for _ in range(8):
            threading.Thread(target=long_prompts, daemon=True).start()
        wait_for("the engine is gone", 90, lambda: not engine.is_running())
        time.sleep(4)
        print("  cuda_oom_events_total:", asked("increase(cuda_oom_events_total[5m])"))
        print("  asked:", asked("last_over_time(cuda_oom_asked_bytes[5m])"))
        print("  free:", asked("last_over_time(cuda_oom_free_bytes[5m])"))
        print(gpuwatch("alerts", "--limit", "8"))
    finally:
        rival.kill()


def main():
    state = Path(tempfile.mkdtemp(prefix="gpuwatch-guest-"))
    guests = state / "guests"
    guests.mkdir(mode=0o3773)
    os.environ["GPUWATCH_GUEST_DIR"] = str(guests)
    print(gpuwatch("guest", "install", str(state / "guest")))
    settings = state / "gpuwatch.yaml"
    given = {"model": Path(sys.argv[1]).resolve(), "python": sys.executable, "path": os.environ["PYTHONPATH"]}
    settings.write_text(SETTINGS.format(state=state, guest=state / "guest", **given))
    os.environ["GPUWATCH_CONFIG"] = str(settings)
    daemon = subprocess.Popen([sys.executable, "-m", "gpuwatch", "run", "--log-level", "warning"])
    try:
        time.sleep(10)
        story(state, guests)
    finally:
        daemon.terminate()
        say(f"daemon ended with status {daemon.wait(30)}")
        end_server(state)


if __name__ == "__main__":
    main()
