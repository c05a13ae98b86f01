"""`make bench`: what gpuwatch costs, beside a bare loop, as medians of one run; writes bench/results.json.

With an NVIDIA driver the daemon watches this very host (GPUWATCH_BENCH_CONFIG may name its settings);
without one it plays the H200 recording at real speed.
"""

import argparse
import importlib
import json
import lzma
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pynvml

from gpuwatch.sources.readings import READINGS

ROOT = Path(__file__).resolve().parent.parent
RECORDING = ROOT / "tests/recordings/h200-vllm024-incidents.jsonl.xz"
WARM_UP_S = 8


def has_driver():
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return False
    return True


def nvml_calls():
    asked = [(q.function, q.arguments) for q in READINGS]
    return json.dumps([*asked, ("nvmlDeviceGetComputeRunningProcesses", ())])


def unit_environment(cache):
    """What systemd/gpuwatch.service gives the daemon: its Environment= lines."""
    unit = (ROOT / "systemd/gpuwatch.service").read_text().replace("%C", cache)
    words = [w for line in unit.splitlines() if line.startswith("Environment=") for w in line[12:].split()]
    return {**os.environ, "PYTHONDONTWRITEBYTECODE": "", **dict(word.split("=", 1) for word in words)}


def watch(command, seconds, environment=None):
    """Median RSS in MiB and CPU in percent of a core over `seconds`, after warming up (0: only that)."""
    process = psutil.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT, env=environment
    )
    try:
        time.sleep(WARM_UP_S)
        began, cpu = time.monotonic(), sum(process.cpu_times()[:2])
        rss = []
        while time.monotonic() - began < seconds:
            time.sleep(1)
            rss.append(process.memory_info().rss)
        if not rss:
            return 0.0, 0.0
        used = sum(process.cpu_times()[:2]) - cpu
        return statistics.median(rss) / 2**20, 100 * used / (time.monotonic() - began)
    finally:
        process.terminate()
        process.wait(30)


def bench_daemon(seconds):
    live = has_driver()
    with tempfile.TemporaryDirectory() as state:
        settings = Path(state) / "gpuwatch.yaml"
        settings.write_text(f"state_dir: {state}\n")
        given = os.environ.get("GPUWATCH_BENCH_CONFIG", str(settings))
        daemon = [sys.executable, "-m", "gpuwatch", "run", "--log-level", "error", "--config", given]
        if not live:  # a plain copy: the dictionary of an xz decoder is no part of the daemon
            plain = Path(state) / "recording.jsonl"
            plain.write_bytes(lzma.decompress(RECORDING.read_bytes()))
            daemon += ["--recording", str(plain)]
        bare = [sys.executable, "bench/bare_loop.py", str(seconds + 60), nvml_calls()]
        bare_rss, bare_cpu = watch(bare, seconds)
        environment = unit_environment(state)
        watch(daemon, 0, environment)  # the first start compiles
        rss, cpu = watch(daemon, seconds, environment)
    beside = "bare pynvml loop, " + ("same calls on this host" if live else "no driver, so no calls")
    yield "daemon.rss_over_bare_loop", rss - bare_rss, "MiB", 40, f"{beside}: {bare_rss:.1f}"
    yield "daemon.rss", rss, "MiB", None, f"{beside}: {bare_rss:.1f}"
    yield "daemon.cpu", cpu, "% of a core", None, f"{beside}: {bare_cpu:.2f}"


def bench_replay(_seconds):
    """The whole decision path without waiting: how much faster than life it runs."""
    began = time.perf_counter()
    replay = [sys.executable, "-m", "gpuwatch", "replay", str(RECORDING), "--json"]
    subprocess.run(replay, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT)
    yield (
        "replay.speed",
        435 / (time.perf_counter() - began),
        "x real time",
        None,
        "435 s recorded on an H200",
    )


def bench_beside(module):
    """The bench of a module beside this one, loaded when it is run: each needs more than the daemon does."""
    return lambda seconds: importlib.import_module(module).bench(seconds)


BENCHES = {
    "daemon": bench_daemon,
    "replay": bench_replay,
    "store": bench_beside("store"),
    "rules": bench_beside("rules"),
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", choices=BENCHES)
    parser.add_argument("--seconds", type=int, default=40)
    given = parser.parse_args()
    results = []
    print(f"{'name':38} {'value':>9} {'unit':12} {'bar':>6}  beside")
    for name, bench in BENCHES.items():
        if given.only in {None, name}:
            for row in bench(given.seconds):
                result = dict(zip(("name", "value", "unit", "bar", "beside"), row, strict=True))
                results.append(result)
                bar = "" if result["bar"] is None else f"≤ {result['bar']}"
                figures = f"{result['name']:38} {result['value']:9.3f} {result['unit']:12}"
                print(f"{figures} {bar:>6}  {result['beside']}", flush=True)
    (ROOT / "bench/results.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
