"""What trials on real GPUs share: parts with a time of their own, servers, clients, what gpuwatch says."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pynvml
import requests

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from bench.run import unit_environment  # noqa: E402
from tests.acceptance.gpu_live import gpuwatch, say  # noqa: E402

LEDGER_BAR, SEEN_BAR_S = 0.02, 6.0
ALLOCATOR = (
    "allocated_bytes reserved_bytes active_bytes inactive_split_bytes slack_bytes largest_free_block_bytes "
    "releasable_bytes fragmentation_ratio retries_total ooms_total"
)


class Trials:
    """Parts, each within its own time and all within one; what missed its bar or raised is kept."""

    def __init__(self, within_s, wanted=()):
        self.end_s, self.wanted, self.missed = time.monotonic() + within_s, wanted, []
        signal.signal(signal.SIGALRM, self.over)

    def over(self, *_):
        raise TimeoutError("the time of this part is over")

    def part(self, name, within_s, body, *arguments):
        """Run a part; what it returns, or None if it was left out or failed."""
        if self.wanted and name not in self.wanted and not name.startswith("start"):
            return None
        left_s = self.end_s - time.monotonic()
        if left_s < 10:
            self.missed.append(f"{name}: no time was left")
            return None
        say(f"{name} (within {min(within_s, left_s):.0f} s)")
        signal.setitimer(signal.ITIMER_REAL, min(within_s, left_s))
        try:
            return body(self, *arguments)
        except (Exception, SystemExit) as error:  # noqa: BLE001 (the other parts are to be seen all the same)
            print(f"  FAILED: {type(error).__name__}: {error}", flush=True)
            self.missed.append(f"{name}: {type(error).__name__}: {error}")
            return None
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def check(self, what, figure, ok):
        print(f"  {'ok    ' if ok else 'MISSED'} {what}: {figure}", flush=True)
        if not ok:
            self.missed.append(f"{what}: {figure}")

    def ended(self):
        say("all bars were met" if not self.missed else "missed:")
        for missed in self.missed:
            print(f"  {missed}")
        return 1 if self.missed else 0


# -- what gpuwatch says ----------------------------------------------------------------------------------


def answer(expression):
    """The `result` of Prometheus' API."""
    text = gpuwatch("query", "--json", expression)
    start = text.find("{")
    if start < 0:
        raise AssertionError(f"{expression}: {text}")
    return json.loads(text[start:])["result"]


def values(expression, *labels):
    """Values by these labels."""
    return {
        "/".join(m["metric"].get(i, "") for i in labels): float(m["value"][1]) for m in answer(expression)
    }


def gibibytes(figures):
    return {key: f"{value / 2**30:.2f} GiB" for key, value in figures.items()}


def verdicts(server, since_s):
    """(seconds after `since_s`, verdict, reason), as they lie in the store."""
    return sorted(
        (round(float(at_s) - since_s, 2), series["metric"]["verdict"], series["metric"].get("reason", ""))
        for series in answer(f'server_progress{{server="{server}"}}[3m]')
        for at_s, _ in series["values"]
        if float(at_s) >= since_s
    )


def until(within_s, question, every_s=0.3):
    """The first answer that is not empty; the last one if none was in time."""
    end_s = time.monotonic() + within_s
    while not (found := question()) and time.monotonic() < end_s:
        time.sleep(every_s)
    return found


def first_verdict(server, since_s, is_wanted, within_s):
    """The first verdict after `since_s` of which this holds; None if there is none in time."""
    return until(within_s, lambda: next((v for v in verdicts(server, since_s) if is_wanted(v[1])), None))


def timed_verdict(trials, what, found, bar_s):
    trials.check(f"{what}, bar {bar_s} s", found or "never", bool(found) and found[0] <= bar_s)


# -- servers ---------------------------------------------------------------------------------------------


def serve(model, port, *flags, guest=None):
    """The command of a server on loopback."""
    path = [f"PYTHONPATH={guest}:{os.environ['PYTHONPATH']}"] if guest else []
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model), "--port", str(port)]
    fixed = ["--load-format", "dummy", "--served-model-name", "m"]
    return ["env", "VLLM_SERVER_DEV_MODE=1", *path, *command, *fixed, *flags]


def asked_for(method, port, path, within_s=5):
    """The status, or the name of what went wrong."""
    try:
        return requests.request(method, f"http://127.0.0.1:{port}{path}", timeout=within_s).status_code
    except requests.RequestException as error:
        return type(error).__name__


def is_healthy(port):
    return asked_for("GET", port, "/health") == 200


def start(trials, state, name, port):
    began_s = time.monotonic()
    print(gpuwatch("server", "start", name))
    healthy = until(200, lambda: is_healthy(port))
    trials.check(f"{name} is healthy after", f"{time.monotonic() - began_s:.0f} s", healthy)
    if not healthy:
        for log in state.glob(f"*{name}*.log"):
            print(log.read_text(errors="replace")[-3000:])


def leader(state, name):
    return psutil.Process(json.loads((state / f"process-{name}.json").read_text())["leader"]["pid"])


def child(state, name, title):
    """The process below a server's main one whose title has these words."""
    below = leader(state, name).children(recursive=True)
    return next(p for p in below if title in " ".join(p.cmdline()) or title[:15] in p.name())


def end(state, *names):
    for name in names:
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, psutil.Error):
            end_tree(leader(state, name))


def end_tree(main):
    ours = [*main.children(recursive=True), main]
    for process in ours:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(ours, timeout=30)


class Clients:
    """Clients that ask one server without end; counts what they were answered."""

    def __init__(self, port, count=16, tokens=128):
        self.port, self.tokens = port, tokens
        self.stop, self.statuses, self.told_when = threading.Event(), Counter(), 0
        self.threads = [threading.Thread(target=self.work, daemon=True) for _ in range(count)]
        for thread in self.threads:
            thread.start()

    def work(self):
        while not self.stop.is_set():
            tokens = self.tokens() if callable(self.tokens) else self.tokens
            status, headers = completion(self.port, tokens)
            self.statuses[status] += 1
            self.told_when += "Retry-After" in headers
            if status != 200:
                self.stop.wait(0.2)

    def failures(self):
        return {status: n for status, n in self.statuses.items() if status != 200}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop.set()
        for thread in self.threads:
            thread.join(5)


def completion(port, tokens, prompt_tokens=295):
    """The status and headers of the answer; the name of the error, and none, where there was no answer."""
    body = {"model": "m", "prompt": [5 + i % 295 for i in range(prompt_tokens)], "max_tokens": tokens}
    try:
        url = f"http://127.0.0.1:{port}/v1/completions"
        reply = requests.post(url, json=body | {"ignore_eos": True}, timeout=60)
    except requests.RequestException as error:
        return type(error).__name__, {}
    return reply.status_code, reply.headers


def running(port):
    page = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=5).text
    return sum(float(n) for n in re.findall(r"^vllm:num_requests_running\{.*\} (\S+)$", page, re.MULTILINE))


# -- parts of more than one script ----------------------------------------------------------------------


def ledger(trials, gpus=1):
    """`gpuwatch memory` beside what NVML says at the same time."""
    print(gpuwatch("memory"))
    books = json.loads(gpuwatch("memory", "--json"))
    books = books["gpus"] if isinstance(books, dict) else books
    trials.check("GPUs with a ledger", len(books), len(books) == gpus)
    for book in books:
        handle = pynvml.nvmlDeviceGetHandleByIndex(int(book["gpu"]))
        used = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2).used
        parts = sum(part["bytes"] for part in book["parts"])
        off = {
            "unexplained": book["unexplained_bytes"] / used,
            "used, beside NVML's": book["used_bytes"] / used - 1,
        }
        for what, share in off.items():
            trials.check(f"GPU {book['gpu']}: {what}", f"{share:+.2%}", abs(share) <= LEDGER_BAR)
        sums = parts + book["unexplained_bytes"], book["total_bytes"]
        trials.check(f"GPU {book['gpu']}: all lines, and NVML's total", sums, sums[0] == sums[1])


def allocator(trials, server, *workers):
    for name in ALLOCATOR.split():
        found = values(f'cuda_allocator_{name}{{server="{server}"}}', "worker", "gpu")
        shown = gibibytes(found) if name.endswith("_bytes") else found
        trials.check(f"cuda_allocator_{name}", shown, {key.split("/")[0] for key in found} >= set(workers))
    used = values(f'gpu_process_memory_used_bytes{{server="{server}"}}', "process", "gpu", "owner")
    trials.check("gpu_process_memory_used_bytes", gibibytes(used), bool(used))
    states = values(f'server_process_state{{server="{server}"}} == 1', "process", "role", "state")
    trials.check("server_process_state", sorted(states), len(states) > len(workers))
    for figure in ("weights_bytes", "kv_cache_bytes", "cuda_graphs_bytes"):
        name = f"server_model_{figure}" if figure == "weights_bytes" else f"server_{figure}"
        print(f"  {name}", gibibytes(values(f'{name}{{server="{server}"}}', "worker")))
    print(gpuwatch("server", "starts", server))


def sleep_and_wake(trials, server, port, gpus=1, within_s=60):
    """Level 1 and back: seen as such, and where the memory went."""
    began_s = time.time()
    said = asked_for("POST", port, "/sleep?level=1", within_s)
    trials.check("POST /sleep", said, said == 200)
    slept_s = time.time()
    print(f"  asleep after {slept_s - began_s:.1f} s")
    try:
        timed_verdict(trials, "asleep", first_verdict(server, slept_s, "asleep".__eq__, 20), SEEN_BAR_S)
        print("  while it fell asleep", sorted({v[1:] for v in verdicts(server, began_s)}))
        time.sleep(3)
        ledger(trials, gpus)
        print("  cuda_sleep_pool_bytes", gibibytes(values("cuda_sleep_pool_bytes", "worker", "tag", "state")))
    finally:
        began_s = time.time()
        said = asked_for("POST", port, "/wake_up", within_s)
    trials.check("POST /wake_up", said, said == 200)
    woke_s = time.time()
    print(f"  awake after {woke_s - began_s:.2f} s")
    said, _ = completion(port, 16)
    trials.check("a request after it", said, said == 200)
    found = first_verdict(server, woke_s, lambda verdict: verdict in {"working", "idle"}, 20)
    timed_verdict(trials, "awake", found, SEEN_BAR_S)
    stalls = [v for v in verdicts(server, slept_s) if v[1] == "stalled"]
    trials.check("stalled in between", stalls, not stalls)
    time.sleep(3)
    ledger(trials, gpus)


# -- all of it ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def watching(servers):
    """(state folder, guests' folder, daemon) with a guest installed and gpuwatch running; ends what it began.

    `servers`: for each name its port, and its command given the folder of the guest.
    """
    state = Path(tempfile.mkdtemp(prefix="gpuwatch-eyes-"))
    guests = state / "guests"
    guests.mkdir(mode=0o3773)
    os.environ |= {"GPUWATCH_GUEST_DIR": str(guests), "GPUWATCH_CONFIG": str(state / "gpuwatch.yaml")}
    print(gpuwatch("guest", "install", str(state / "guest")))
    settings = {"state_dir": str(state), "host": "h200", "servers": []}
    for name, (port, command) in servers.items():
        process = {"process": {"command": command(state / "guest")}}
        one = {"name": name, "url": f"http://127.0.0.1:{port}", "start_deadline": "4m", "supervisor": process}
        settings["servers"].append(one)
    (state / "gpuwatch.yaml").write_text(json.dumps(settings))  # JSON is YAML
    run = [sys.executable, "-m", "gpuwatch", "run", "--log-level", "warning"]
    daemon = subprocess.Popen(run, env=unit_environment(str(state)))
    pynvml.nvmlInit()
    try:
        time.sleep(8)
        yield state, guests, daemon
    finally:
        daemon.send_signal(signal.SIGCONT)
        daemon.terminate()
        print("daemon ended with status", daemon.wait(30))
        end(state, *servers)
