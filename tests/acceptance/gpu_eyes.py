"""What gpuwatch sees of a real vLLM on one real GPU, and what it costs; exits 1 if a bar was missed.

usage: gpu_eyes.py MODEL_DIR [PART ...]    needs an NVIDIA driver, vLLM, PyTorch and gpuwatch on PYTHONPATH
Six minutes in all, of the 0.6B shape. `watched` and `sleeper` are servers of gpuwatch with a guest in them;
`plain` has neither. Each part has its own time, and one that fails ends no other. No setting of the GPU is
changed; only what this script started is stopped. CI has no GPU for it.
`throughput asking` by name is for a shape that the GPU bounds, as 30B-A3B: a small one is bound by the API
server's one thread, whose turns differ by more than what is to be seen.
"""

import contextlib
import json
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import requests

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.acceptance.gpu_guest import RIVAL  # noqa: E402
from tests.acceptance.gpu_live import gpuwatch  # noqa: E402
from tests.acceptance.gpu_trials import (  # noqa: E402
    Clients,
    Trials,
    allocator,
    asked_for,
    child,
    completion,
    end,
    end_tree,
    first_verdict,
    gibibytes,
    is_healthy,
    leader,
    ledger,
    running,
    serve,
    sleep_and_wake,
    start,
    timed_verdict,
    until,
    values,
    verdicts,
    watching,
)

from gpuwatch.guest import client  # noqa: E402
from gpuwatch.sources import NvmlSource, load_nvml, local_session  # noqa: E402

WITHIN_S = 520
STALL_BAR_S, DEATH_BAR_S = 10.0, 1.5
THROUGHPUT_BAR = 0.995
WATCHED, PLAIN, SLEEPER = 8000, 8001, 8002
TURNS, TURN_S, ASKED = 5, 4, ("nvml", "guests", "metrics", "health")
PAIRS, CLIENTS, TOKENS_EACH = 8, 64, 512
GRAPHS = {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 8, 16, 32, 48, 64]}
BESIDE_EACH_OTHER = (
    *("--kv-cache-memory-bytes", str(6 << 30)),  # a profile of memory is upset by what others allocate
    *("--max-model-len", "4096", "--max-num-batched-tokens", "4096", "--max-num-seqs", str(CLIENTS)),
    *("--compilation-config", json.dumps(GRAPHS)),  # captured, not compiled: that takes minutes
)

# -- parts -----------------------------------------------------------------------------------------------


def release(trials, state, guests):
    """The allocator's cache is given back while 64 requests run."""
    with Clients(WATCHED, 64) as clients:
        completion(WATCHED, 2, 8_000)  # leaves something in the cache
        time.sleep(5)
        engine = child(state, "watched", "EngineCore").pid
        before = values('cuda_allocator_reserved_bytes{server="watched"}', "worker")
        began_s = time.monotonic()
        given = client.ask(client.listed(guests)[engine], "release", within_s=10)
        took_ms = 1000 * (time.monotonic() - began_s)
        trials.check(
            f"given back in {took_ms:.1f} ms", given["devices"], given["devices"][0]["released_bytes"] > 0
        )
        time.sleep(3)
        after = values('cuda_allocator_reserved_bytes{server="watched"}', "worker")
        print("  reserved before and after", gibibytes(before), gibibytes(after))
    trials.check("requests that failed", clients.failures(), not clients.failures())


def limited(state, *options):
    print(gpuwatch("guest", "limit", str(leader(state, "watched").pid), *options))


def caps(trials, state):
    """A cap of 8, then of 2, then none, sixteen clients asking all the time."""
    with Clients(WATCHED, 16, tokens=512) as clients:
        until(10, lambda: running(WATCHED) >= 14)
        for cap in (8, 2):
            limited(state, "--running", str(cap), "--for", "1m")
            began_s = time.monotonic()
            down = until(15, lambda cap=cap: running(WATCHED) <= cap)
            trials.check(f"drained to {cap} after", f"{time.monotonic() - began_s:.1f} s", down)
            seen = [running(WATCHED) for _ in range(30) if not time.sleep(0.1)]
            trials.check(f"at most {cap} run for 3 s", max(seen), max(seen) <= cap)
            print("  ", values('server_limit{server="watched"}', "limit"))
        limited(state, "--lift")
        again = until(15, lambda: running(WATCHED) >= 14)
        trials.check("all run again", running(WATCHED), again)
    trials.check("requests that failed", clients.failures(), not clients.failures())


def admission(trials, state):
    with Clients(WATCHED, 16) as clients:
        time.sleep(2)
        limited(state, "--admission", "4", "--for", "1m")
        time.sleep(5)
        print("  in flight", values('server_requests_in_flight{server="watched"}', "source"))
        print("  refused", values('server_admission_refused_total{server="watched"}'))
        trials.check("/health and /metrics", (is_healthy(WATCHED), running(WATCHED)), is_healthy(WATCHED))
        limited(state, "--lift")
        time.sleep(1)
        refused = clients.statuses[503]
        time.sleep(2)
        trials.check(
            "refused with Retry-After", (refused, clients.told_when), 0 < refused == clients.told_when
        )
        trials.check("refused once lifted", clients.statuses[503] - refused, clients.statuses[503] == refused)
    others = {status: n for status, n in clients.failures().items() if status != 503}
    trials.check("answers other than 200 and 503", others, not others)


def start_plain(_, model):
    """One without guest and gpuwatch."""
    command = serve(model, PLAIN, "--gpu-memory-utilization", "0.25", *BESIDE_EACH_OTHER)
    with Path(tempfile.gettempdir(), "plain.log").open("wb") as log:
        return psutil.Popen(command, stdout=log, stderr=log)


def throughput(trials, daemon):
    """The same requests by turns to the server with guest and daemon, and to one that has neither."""
    healthy = until(200, lambda: is_healthy(PLAIN))
    trials.check("the one without is healthy", healthy, healthy)
    if not healthy:
        print(Path(tempfile.gettempdir(), "plain.log").read_text(errors="replace")[-3000:])
    for port in (WATCHED, PLAIN):
        spent_s(port)
    ratios = []
    for turn in range(PAIRS):
        took_s = {}
        for port in (WATCHED, PLAIN) if turn % 2 else (PLAIN, WATCHED):
            daemon.send_signal(signal.SIGCONT if port == WATCHED else signal.SIGSTOP)
            time.sleep(2)
            took_s[port] = spent_s(port)
        ratios.append(took_s[PLAIN] / took_s[WATCHED])
        rates = {port: round(CLIENTS * TOKENS_EACH / s) for port, s in took_s.items()}
        print(f"  tokens/s {rates}: {ratios[-1]:.4f}", flush=True)
    mean, error = statistics.mean(ratios), statistics.stdev(ratios) / len(ratios) ** 0.5
    what = f"with to without, {PAIRS} pairs: median {statistics.median(ratios):.4f}, mean"
    trials.check(what, f"{mean:.4f} +- {error:.4f}", mean >= THROUGHPUT_BAR)
    print(f"  daemon RSS {psutil.Process(daemon.pid).memory_info().rss / 2**20:.1f} MiB")


def asking(trials, daemon, guests):
    """What each kind of asking costs: one server under one load, asked by turns, tokens by its own count."""
    tables = str(Path(__file__)), str(guests)
    askers = {what: subprocess.Popen([sys.executable, *tables, "ask", what]) for what in ASKED}
    askers["all of gpuwatch"] = daemon
    time.sleep(5)
    for asker in askers.values():
        asker.send_signal(signal.SIGSTOP)
    rates = {what: [] for what in (None, *askers)}
    try:
        with Clients(WATCHED, CLIENTS, lambda: random.randint(400, 600)) as clients:
            time.sleep(10)
            for turn in range(TURNS):
                for what in (*list(rates)[turn % len(rates) :], *list(rates)[: turn % len(rates)]):
                    rates[what].append(rate_while(askers.get(what)))
    finally:
        daemon.send_signal(signal.SIGCONT)
        for what in ASKED:
            askers[what].kill()
    trials.check("requests that failed", clients.failures(), not clients.failures())
    alone = statistics.mean(rates[None])
    for what, found in rates.items():
        mean, error = statistics.mean(found), statistics.stdev(found) / len(found) ** 0.5
        print(f"  {what or 'left alone':16} {mean:7.0f} tokens/s, {mean / alone:.3f} +- {error / alone:.3f}")


def rate_while(asker):
    if asker:
        asker.send_signal(signal.SIGCONT)
    time.sleep(0.5)
    began, began_s = generated(WATCHED), time.monotonic()
    time.sleep(TURN_S)
    rate = (generated(WATCHED) - began) / (time.monotonic() - began_s)
    if asker:
        asker.send_signal(signal.SIGSTOP)
    return rate


def ask(guests, what):
    """One kind of what gpuwatch asks, once a second, for ever."""
    nvml, session = NvmlSource(load_nvml()), local_session()
    while True:
        if what == "nvml":
            nvml.read(0)
        elif what == "guests":
            client.ask_all(client.listed(guests), "figures", within_s=1)
        else:
            session.get(f"http://127.0.0.1:{WATCHED}/{what}", timeout=5)
        time.sleep(1)


def generated(port):
    page = requests.get(f"http://127.0.0.1:{port}/metrics", timeout=10).text
    return sum(
        float(n) for n in re.findall(r"^vllm:generation_tokens_total\{.*\} (\S+)$", page, re.MULTILINE)
    )


def spent_s(port):
    """Seconds that `CLIENTS` clients take for a request of fixed length each."""
    began_s = time.monotonic()
    with ThreadPoolExecutor(CLIENTS) as clients:
        statuses = Counter(clients.map(lambda _: completion(port, TOKENS_EACH)[0], range(CLIENTS)))
    if set(statuses) != {200}:
        raise AssertionError(f"port {port}: {statuses}")
    return time.monotonic() - began_s


def stopped(trials, state):
    """SIGSTOP of the engine under load; /health goes on saying 200."""
    with Clients(WATCHED) as clients:
        time.sleep(8)
        engine = child(state, "watched", "EngineCore")
        began_s = time.time()
        engine.suspend()
        try:
            found = first_verdict("watched", began_s, "stalled".__eq__, 20)
            trials.check("/health says meanwhile", asked_for("GET", WATCHED, "/health"), is_healthy(WATCHED))
        finally:
            engine.resume()
        timed_verdict(trials, "SIGSTOP of the engine: stalled", found, STALL_BAR_S)
        found = first_verdict("watched", time.time(), "working".__eq__, 20)
        timed_verdict(trials, "SIGCONT: working", found, STALL_BAR_S)
    trials.check("requests that failed", clients.failures(), not clients.failures())


def killed(trials, state):
    """kill -9 of the engine under load."""
    with Clients(WATCHED):
        time.sleep(5)
        began_s = time.time()
        child(state, "watched", "EngineCore").kill()
        found = first_verdict("watched", began_s, "working".__ne__, 15)
        timed_verdict(trials, "kill -9 of the engine: not working", found, DEATH_BAR_S)
    time.sleep(3)
    print("  afterwards", verdicts("watched", began_s))
    print("  exits", values('server_process_exits_total{server="watched"}', "process", "role"))
    print(gpuwatch("alerts", "--limit", "5"))


def out_of_memory(trials, state, guests):
    """A rival takes what is free, the engine dies of long prompts, and what it asked for is in the store."""
    engine = child(state, "sleeper", "EngineCore")
    rival = subprocess.Popen([sys.executable, "-c", RIVAL])
    try:
        time.sleep(12)
        with contextlib.suppress(client.GuestError):  # of a server with sleep mode
            client.ask(client.listed(guests)[engine.pid], "release", within_s=10)
        time.sleep(2)
        for _ in range(8):
            threading.Thread(target=completion, args=(SLEEPER, 2, 14_000), daemon=True).start()
        trials.check("the engine is gone", engine.pid, until(45, lambda: not engine.is_running()))
        time.sleep(4)
    finally:
        rival.kill()
    for name in (
        "increase(cuda_oom_events_total[3m])",
        "cuda_oom_asked_bytes[3m]",
        "cuda_oom_free_bytes[3m]",
    ):
        found = values(name if "(" in name else f"last_over_time({name})", "worker", "server")
        trials.check(name, found, any(found.values()))
    print(gpuwatch("server", "starts", "sleeper"))


# -- all of it -------------------------------------------------------------------------------------------


def watched(model, *flags):
    flags = ("--middleware", "gpuwatch_guest.admission.Admission", *flags)
    return lambda guest: serve(model, WATCHED, "--gpu-memory-utilization", "0.25", *flags, guest=guest)


def sleeper(model):
    lengths = ("--max-model-len", "16384", "--max-num-batched-tokens", "16384")
    flags = ("--enable-sleep-mode", "--enforce-eager", "--gpu-memory-utilization", "0.3", *lengths)
    return lambda guest: serve(model, SLEEPER, *flags, guest=guest)


def main():
    model, trials = Path(sys.argv[1]).resolve(), Trials(WITHIN_S, sys.argv[2:])
    beside, flags = bool({"throughput", "asking"} & set(trials.wanted)), ()
    if trials.wanted:
        flags = BESIDE_EACH_OTHER if beside else ("--enforce-eager",)
    servers = {
        "watched": (WATCHED, watched(model, *flags)),
        "sleeper": (SLEEPER, sleeper(model)),
    }
    with watching(servers) as (state, guests, daemon):
        plain = "throughput" in trials.wanted and trials.part("start plain", 5, start_plain, model)
        trials.part("start watched", 200, start, state, "watched", WATCHED)
        if beside:
            trials.part("throughput", 260, throughput, daemon)
            daemon.send_signal(signal.SIGCONT)
            if plain:
                end_tree(plain)
            trials.part("asking", 200, asking, daemon, guests)
        else:
            trials.part("ledger", 20, ledger)
            trials.part("allocator", 30, allocator, "watched", "EngineCore")
            trials.part("release", 30, release, state, guests)
            trials.part("caps", 60, caps, state)
            trials.part("admission", 30, admission, state)
            trials.part("stopped", 60, stopped, state)
            trials.part("killed", 40, killed, state)
        end(state, "watched")
        if not trials.wanted or {"sleep", "oom"} & set(trials.wanted):
            trials.part("start sleeper", 100, start, state, "sleeper", SLEEPER)
        trials.part("sleep", 60, sleep_and_wake, "sleeper", SLEEPER)
        trials.part("oom", 90, out_of_memory, state, guests)
        print(gpuwatch("alerts", "--limit", "20"))
        print("kernel lines", values("host_kernel_events_total > 0", "kind"))
        print("up", values("up", "source", "server"))
    raise SystemExit(trials.ended())


if __name__ == "__main__":
    if sys.argv[2:3] == ["ask"]:
        ask(Path(sys.argv[1]), sys.argv[3])
    main()
