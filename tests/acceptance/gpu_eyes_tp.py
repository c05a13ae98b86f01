"""What gpuwatch sees of a vLLM spread over two real GPUs by tensor parallelism; exits 1 if a bar was missed.

usage: gpu_eyes_tp.py MODEL_DIR [PART ...]    needs two GPUs, vLLM, PyTorch and gpuwatch on PYTHONPATH
Some five minutes, of the 30B-A3B shape. A worker is killed under load: /health goes on saying 200 for
seconds, one GPU falls idle, and the other spins. No setting of a GPU is changed. CI has no GPU for it.
"""

import itertools
import sys
import threading
import time
from pathlib import Path

import pynvml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.acceptance.gpu_live import gpuwatch  # noqa: E402
from tests.acceptance.gpu_trials import (  # noqa: E402
    Clients,
    Trials,
    allocator,
    asked_for,
    child,
    end,
    first_verdict,
    ledger,
    serve,
    sleep_and_wake,
    start,
    timed_verdict,
    values,
    verdicts,
    watching,
)

WITHIN_S = 500
DEATH_BAR_S = 1.5
PORT, SLEEPER = 8000, 8002
SLEEPS = "--enable-sleep-mode"  # torch is asked nothing then: see guest/allocator.py


class Observed:
    """What /health and NVML say, five times a second: (seconds, status, (use, watts, GiB) of each GPU)."""

    def __init__(self):
        self.began_s, self.rows, self.stop = time.time(), [], threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def watch(self):
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        while not self.stop.wait(0.2):
            status = asked_for("GET", PORT, "/health", within_s=1)
            self.rows.append((round(time.time() - self.began_s, 1), status, [figures(h) for h in handles]))

    def health_ended_s(self):
        """When /health first said anything but 200."""
        return next((at_s for at_s, status, _ in self.rows if status != 200), float("inf"))

    def show(self):
        self.stop.set()
        self.thread.join(5)
        print("  seconds  /health  GPU by GPU: in use, watts, GiB")
        for _, same in itertools.groupby(self.rows, key=lambda row: (row[1], int(row[0]))):
            at_s, status, gpus = next(same)
            print(f"  {at_s:7}  {status!s:>7}  {gpus}")


def figures(handle):
    return (
        pynvml.nvmlDeviceGetUtilizationRates(handle).gpu,
        pynvml.nvmlDeviceGetPowerUsage(handle) // 1000,
        round(pynvml.nvmlDeviceGetMemoryInfo(handle).used / 2**30, 1),
    )


def killed(trials, state):
    """kill -9 of one of two workers under load: seen before /health does."""
    with Clients(PORT, 16):
        time.sleep(8)
        print("  before", verdicts("spread", time.time() - 3))
        worker = child(state, "spread", "Worker_TP1")
        observed, began_s = Observed(), time.time()
        worker.kill()
        found = first_verdict("spread", began_s, "working".__ne__, 20)
        time.sleep(max(0, began_s + 14 - time.time()))
    observed.show()
    timed_verdict(trials, "kill -9 of a worker: no more working", found, DEATH_BAR_S)
    ended_s = observed.health_ended_s()
    trials.check("seconds for which /health still said 200", ended_s, bool(found) and found[0] < ended_s)
    print("  verdicts", sorted({v[1:]: v for v in reversed(verdicts("spread", began_s))}.values()))
    print("  exits", values('server_process_exits_total{server="spread"}', "process", "role"))
    print(gpuwatch("memory"))
    print(gpuwatch("alerts", "--limit", "8"))


def main():
    model, trials = Path(sys.argv[1]).resolve(), Trials(WITHIN_S, sys.argv[2:])
    servers = {"spread": (PORT, spread(model, PORT)), "sleeper": (SLEEPER, spread(model, SLEEPER, SLEEPS))}
    with watching(servers) as (state, _, _):
        trials.part("start spread", 130, start, state, "spread", PORT)
        trials.part("load", 20, some_load)
        trials.part("ledger", 30, ledger, 2)
        trials.part("allocator", 40, allocator, "spread", "Worker_TP0", "Worker_TP1")
        trials.part("killed", 60, killed, state)
        end(state, "spread")
        trials.part("start sleeper", 130, start, state, "sleeper", SLEEPER)
        trials.part("sleep", 110, sleep_and_wake, "sleeper", SLEEPER, 2)
        print("up", values("up", "source", "server"))
    raise SystemExit(trials.ended())


def spread(model, port, *flags):
    flags = ("--tensor-parallel-size", "2", "--enforce-eager", "--max-model-len", "4096", *flags)
    return lambda guest: serve(model, port, "--gpu-memory-utilization", "0.5", *flags, guest=guest)


def some_load(trials):
    with Clients(PORT, 16) as clients:
        time.sleep(10)
    trials.check("requests that failed", clients.failures(), not clients.failures())


if __name__ == "__main__":
    main()
