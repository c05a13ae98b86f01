"""What gpuwatch's hands do for a real vLLM on one H200; exits 1 if something did not end as it should.

usage: gpu_hands.py MODELS_DIR [--rehearse PYTHON] [PART ...]
Needs an NVIDIA driver, vLLM, PyTorch and gpuwatch on PYTHONPATH. Parts: rival (5 minutes), refused (2),
killed (5), all of one server of the 0.6B shape; reranker (6), of another; light (4), of a third. One call
holds nine minutes, so name them; a first start takes two more. Each has its own time, and one that fails
ends no other. No setting of the GPU is changed; only what this script started is stopped. $OUT gets logs and
captures.
CI has no GPU for it.
With `--rehearse` a CPU build of vLLM stands in, which that interpreter has: what dies is killed, by no rival.
"""

import argparse
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import requests

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests import h200  # noqa: E402
from tests.acceptance.gpu_host import GIB, Host, Place, Rival, gpu_bytes  # noqa: E402
from tests.acceptance.gpu_live import gpuwatch, say  # noqa: E402
from tests.acceptance.gpu_trials import (  # noqa: E402
    Clients,
    Trials,
    child,
    completion,
    is_healthy,
    until,
    values,
)

from gpuwatch.guest import client  # noqa: E402
from gpuwatch.records import Phase  # noqa: E402

WITHIN_S = h200.WITHIN_S - 40  # what is kept, and the end of all
PORT, RERANKER_PORT, LIGHT_PORT = 8010, 8011, 8012
KILLED_AT = ("await_memory", "swap", "start")
# 5.6 GiB, of which weights and activations leave less than the 4.4 GiB that one such request needs.
TOO_LITTLE = ("gpu_memory_utilization=0.04", "max_model_len=40960")
# What a card of 24 GiB takes; gpu_memory_utilization is of this GPU.
OF_24_GIB = {"gpu_memory_utilization": 0.16, "max_model_len": 4096, "max_num_seqs": 32}
IMPORTED = ("vllm.v1.engine.core", "vllm.entrypoints.openai.api_server", "vllm.model_executor.models.qwen3")
AS_A_RERANKER = {
    "architectures": ["Qwen3ForSequenceClassification"],
    "classifier_from_token": ["no", "yes"],
    "is_original_qwen3_reranker": True,
}

# Each begins every 90 s and is over after ten, so that its cure is proved.
LIGHT = {"reset_prefix_cache": 0, "sleep_wake": 45}
LIGHT_RULES = "groups:\n- name: light\n  interval: 1s\n  rules:\n" + "".join(
    f"""  - alert: {name}
    expr: server_phase{{phase="serving"}} == 1 and on () ((vector(time()) - {at_s}) % 90 < 10)
    labels: {{severity: info, remediation: {name}}}
"""
    for name, at_s in LIGHT.items()
)

# -- a server, and what is wished of it ------------------------------------------------------------------


def warm(_, place):
    """Read vLLM from the disk: what it takes the first time is nobody's start."""
    words = [place.python, "-c", "import " + ", ".join(IMPORTED)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=170, check=False)
    print(done.stderr[-500:] if done.returncode else "  it is read")


def first(trials, host):
    """The first revision, by a person's wish; the daemon starts the server with it."""
    host.wish("set", host.name, "--file", str(host.state / "base.yaml"), why="as it was")
    took_s = host.follow(200, lambda: host.is_well(""))
    trials.check(f"{host.name} serves with its first revision after", f"{took_s} s", bool(took_s))
    shown(host.newest())
    if not took_s:
        print((host.state / f"process-{host.name}.log").read_text(errors="replace")[-3000:])


def shown(*done):
    for r in done:
        if r is None:
            print("  nothing was done")
            continue
        plan = r.plan
        print(f"  {plan.id} for {plan.alert or plan.by}: {', '.join(plan.actions)}: {r.phase}, {r.outcome}")
        print(f"    revision {plan.before} -> {plan.after}; {dict(r.facts)}")
        cost = {name: round(value, 1) for name, value in r.account.items()}
        print(f"    {cost}", flush=True)


def moved(trials, host, within_s, *words, why):
    """What became of a wish, once it is over; the seconds stand in the transcript."""
    before = host.newest_id()
    host.wish(*words, why=why)
    took_s = host.follow(within_s, lambda: host.ended(before, 0))
    done = host.newest()
    shown(done)
    trials.check(f"{why}: over after", f"{took_s} s", bool(took_s))
    return done


# -- parts -----------------------------------------------------------------------------------------------


def rival(trials, host):
    """Another takes the memory, the server dies of it, lives on with less, and gets it back."""
    before, wanted = host.newest_id(), host.current()
    with Clients(host.port, 8) as clients:
        time.sleep(6)
        try:
            die(trials, host)
            took_s = host.follow(240, lambda: host.is_well(before) and is_as_hoped(host, wanted))
            trials.check("well again after", f"{took_s} s", bool(took_s))
            told_of_death(trials, host, wanted)
            if host.rival and took_s:
                beside_the_rival(trials, host, wanted)
                back_again(trials, host, wanted)
        finally:
            host.end_rival()
    print("  answers", dict(clients.statuses))
    print(gpuwatch("alerts", "--limit", "20"))


def die(trials, host):
    """The engine's end, of the rival; where there is none, by a signal."""
    engine = child(host.state, host.name, "EngineCor")
    if host.place.rehearses:
        engine.kill()
        say(f"$ kill -9 {engine.pid}   # the engine")
    else:
        host.rival = Rival(h200.RIVAL_BYTES, host.state / "rival.log")
        until(30, lambda: host.rival.has_all_there_is)
        print(f"  the rival holds {host.rival.held / GIB:.1f} GiB, free {gpu_bytes()[0] / GIB:.2f} GiB")
        run_out_of_memory(host, engine)
    gone = until(3, lambda: not is_alive(engine))
    say("the engine is gone" if gone else "the engine lives")
    if not gone:
        raise AssertionError(f"{engine} did not die; the rival: {host.rival.log.read_text()[-500:]}")


def run_out_of_memory(host, engine):
    """What the allocator has in stock is given back, the rival takes it, and long prompts want it."""
    end_s = time.monotonic() + 60
    while is_alive(engine) and time.monotonic() < end_s:
        with contextlib.suppress(client.GuestError, KeyError, OSError):
            print("  given back", client.ask(client.listed(host.guests)[engine.pid], "release", within_s=10))
        time.sleep(1)
        for _ in range(8):
            threading.Thread(target=long_prompt, args=(host.port,), daemon=True).start()
        until(8, lambda: not is_alive(engine))


def long_prompt(port):
    """One that no prefix cache knows."""
    body = {"model": "m", "prompt": [random.randrange(5, 150_000) for _ in range(14_000)], "max_tokens": 2}
    with contextlib.suppress(requests.RequestException):
        requests.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=30)


def is_alive(process):
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def is_as_hoped(host, wanted):
    return host.place.rehearses or host.current() != wanted


def told_of_death(trials, host, wanted):
    """What gpuwatch knows of it: the class, the evidence, how long nobody was served."""
    starts = host.starts()
    died = next((s for s in starts if s.revision == wanted and s.ended_at_ms and s.healthy_at_ms), None)
    expected = {"process_died"} if host.place.rehearses else {"runtime_oom"}
    trials.check("its death is classed as", died and died.failure, bool(died) and died.failure in expected)
    if died and starts[0].healthy_at_ms:
        print(f"  from death to healthy {(starts[0].healthy_at_ms - died.ended_at_ms) / 1000:.1f} s")
        print(f"  {died.failure} {dict(died.facts)} {died.lines[-1:]}")
    print("  starts, newest first", [(s.revision, str(s.outcome), s.failure) for s in starts])
    since_ms = died.ended_at_ms if died else 0
    found = host.rows(lambda rows: rows.remediations(since_ms=since_ms), [])
    shown(*reversed(found))
    kept = sorted(path.name for path in (host.state / "bundles").glob("*"))
    trials.check("evidence of each", kept, all(any(r.plan.id in name for name in kept) for r in found))
    for r in found:
        print(f"$ gpuwatch why {r.plan.id}\n{gpuwatch('why', r.plan.id)}\n")


def beside_the_rival(trials, host, wanted):
    share, wanted_share = host.share(host.current()), host.share(wanted)
    trials.check("on a share of", share, h200.LEAST_SHARE <= share < wanted_share)
    held = host.rival.process.poll() is None and host.rival.held
    trials.check("the rival still holds", f"{held / GIB:.1f} GiB", held == h200.RIVAL_BYTES)
    said, _ = completion(host.port, 16)
    trials.check("a request is answered", said, said == 200)


def back_again(trials, host, wanted):
    """The rival ends; `return` brings what a person wanted."""
    before = host.newest_id()
    say("the rival ends")
    host.end_rival()
    took_s = host.follow(200, lambda: host.is_well(before) and host.current() == wanted)
    trials.check("with the wanted revision again after", f"{took_s} s", bool(took_s))
    done = host.newest()
    shown(done)
    what = (done.plan.alert, done.phase, host.in_use())
    trials.check("by", what, what == ("VLLMSettingsReduced", Phase.SUCCEEDED, wanted))


def refused(trials, host):
    """A revision that passes the check, and cannot start."""
    revision = host.current()
    with socket.create_server(("127.0.0.1", 0)) as taken:  # for want of a GPU that could be too small
        port = taken.getsockname()[1]
        words = (f"port={port}",) if host.place.rehearses else TOO_LITTLE
        done = moved(trials, host, 170, "set", host.name, *words, why="it does not fit")
    said = (done.phase, done.outcome)
    trials.check("it is taken back", said, said == (Phase.ROLLED_BACK, "died_again"))
    failed = next((s for s in host.starts() if s.revision == done.plan.after), None)
    print(f"  the start said: {failed and (failed.failure, dict(failed.facts))}")
    serves = until(30, lambda: is_healthy(host.port))
    trials.check("revision in use", host.in_use(), serves and host.in_use() == host.current() == revision)
    print(f"$ gpuwatch why {done.plan.id}\n{gpuwatch('why', done.plan.id)}\n")


def killed(trials, host, step):
    """Kill -9 of gpuwatch as a reconfiguration is at this step."""
    before, both = host.newest_id(), {host.current(), max(host.revisions()) + 1}
    sequences = 8 if host.revisions()[host.current()].arguments["max_num_seqs"] != 8 else 4
    host.wish("set", host.name, f"max_num_seqs={sequences}", why=f"killed at {step}")
    # A swap takes 0.2 s.
    until(80, lambda: host.newest_id() != before and host.step() == step, every_s=0.02)
    host.kill_gpuwatch()
    at = host.step()
    say(f"$ kill -9 {host.daemon.pid}   # gpuwatch, at the step {at}")
    time.sleep(2)
    host.start_gpuwatch()
    took_s = host.follow(100, lambda: host.ended(before, 0))
    done = host.newest()
    shown(done)
    trials.check(f"killed at {step}", at, at == step)
    ended = done.phase in {Phase.SUCCEEDED, Phase.ROLLED_BACK}
    trials.check("it goes on, or takes back, within", f"{took_s} s", bool(took_s) and ended)
    serves = until(30, lambda: is_healthy(host.port))
    use = (host.in_use(), host.current())
    trials.check("one of both revisions is in use", use, serves and use[0] == use[1] and use[0] in both)


class Rerankers(Clients):
    """Clients that have documents ranked."""

    def work(self):
        body = {"model": "m", "query": "what is it", "documents": ["it is this " * 40, "it is that " * 40]}
        while not self.stop.is_set():
            try:
                url = f"http://127.0.0.1:{self.port}/rerank"
                status = requests.post(url, json=body, timeout=60).status_code
            except requests.RequestException as error:
                status = type(error).__name__
            self.statuses[status] += 1
            self.stop.wait(0.05 if status == 200 else 0.5)


def reranker(trials, host):
    """From vLLM's defaults to what a card of 24 GiB takes, and back."""
    on_cpu = host.place.rehearses
    defaults = host.current()
    measured(trials, host, "defaults", lambda gib: on_cpu or gib > 100)
    less = {"max_model_len": 512, "max_num_seqs": 4} if on_cpu else OF_24_GIB
    words = [f"{name}={value}" for name, value in less.items()]
    done = moved(trials, host, 150, "set", host.name, *words, why="to 24 GiB")
    trials.check("it is proved", (done.phase, done.outcome), done.phase is Phase.SUCCEEDED)
    measured(trials, host, "24 GiB", lambda gib: on_cpu or gib < 24)
    done = moved(trials, host, 170, "rollback", host.name, str(defaults), why="and back")
    trials.check("it is proved", (done.phase, done.outcome), done.phase is Phase.SUCCEEDED)
    measured(trials, host, "defaults again", lambda gib: on_cpu or gib > 100)
    trials.check("revision in use", host.in_use(), host.in_use() == host.current() == defaults)
    asked = values(f'max_over_time(server_canary_ok{{server="{host.name}"}}[15m])', "server")
    trials.check("its canaries were answered", asked, set(asked.values()) == {1.0})


def measured(trials, host, what, is_right):
    """What it takes with the settings that it has, sixteen clients asking for some seconds."""
    with Rerankers(host.port, 16) as clients:
        time.sleep(15)
    trials.check("documents are ranked", dict(clients.statuses), clients.statuses[200] > 0)
    start = host.starts()[0]
    took_s = ((start.healthy_at_ms or 0) - start.began_at_ms) / 1000
    print(
        f"  {what}: revision {start.revision}, {start.kv_cache_tokens} tokens, healthy after {took_s:.0f} s"
    )
    used = (gpu_bytes() or (0, 0))[1] / GIB
    trials.check(f"{what}: used by NVML", f"{used:.1f} GiB", is_right(used))


def light(trials, host):
    """What needs no new process, on a live server: each once, at its time."""
    wanted = {"reset_prefix_cache"} if host.place.rehearses else LIGHT.keys()  # CPUs do not sleep
    with Clients(host.port, 4):
        time.sleep(15)  # prompts that are known

    def done():
        found = host.rows(lambda rows: rows.remediations(limit=20), [])
        return {r.plan.alert: r for r in found if r.plan.alert in LIGHT and r.phase is Phase.SUCCEEDED}

    took_s = host.follow(150, lambda: done().keys() >= wanted)
    shown(*done().values())
    trials.check("each was done and proved within", f"{took_s} s", bool(took_s))
    for r in done().values():
        print(f"$ gpuwatch why {r.plan.id}\n{gpuwatch('why', r.plan.id)}\n")
    said, _ = completion(host.port, 16)
    trials.check("a request is answered", said, said == 200)


# -- all of it -------------------------------------------------------------------------------------------


def options():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=Path, metavar="MODELS_DIR")
    parser.add_argument("--rehearse", metavar="PYTHON", help="the interpreter of a CPU build of vLLM")
    parser.add_argument("parts", nargs="*", metavar="PART", help="rival, refused, killed, reranker, light")
    return parser.parse_intermixed_args()


def parts_of_one(trials, place):
    """One server of the 0.6B shape, for all but the reranker."""
    figures = {name.replace("_", "-"): value for name, value in h200.ARGUMENTS.items()}
    base = place.settings("qwen3-0.6b", PORT, **figures)
    with Host(place, "m", base, bounds=h200.BOUNDS) as host:
        trials.part("start m", 210, first, host)
        trials.part("rival", 480, rival, host)
        trials.part("refused", 210, refused, host)
        for step in KILLED_AT:
            trials.part("killed", 200, killed, host, step)


def parts_of_reranker(trials, place):
    base = place.settings("qwen3-reranker-4b", RERANKER_PORT, **{"hf-overrides": AS_A_RERANKER})
    with Host(place, "r", base) as host:
        trials.part("start r", 210, first, host)
        trials.part("reranker", 480, reranker, host)


def parts_of_light(trials, place):
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # the routes that reset and sleep
    more = {} if place.rehearses else {"enable-sleep-mode": True}
    base = place.settings("qwen3-0.6b", LIGHT_PORT, **more, **{"gpu-memory-utilization": 0.3})
    policies = [{"name": name, "match": {"remediation": name}, "steps": [name]} for name in LIGHT]
    with Host(place, "l", base, rules=LIGHT_RULES, policies=policies) as host:
        trials.part("start l", 210, first, host)
        trials.part("light", 200, light, host)


def main():
    given = options()
    place = Place(given.models.resolve())
    if given.rehearse:
        place = Place(given.models.resolve(), given.rehearse, rehearses=True)
        say("a rehearsal, on CPUs: no GPU, no rival, a tiny model")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to end"))
    trials = Trials(3600 if place.rehearses else WITHIN_S, given.parts)
    if not place.rehearses:
        trials.part("start of Python", 175, warm, place)
    if not given.parts or {"rival", "refused", "killed"} & set(given.parts):
        parts_of_one(trials, place)
    if not given.parts or "reranker" in given.parts:
        parts_of_reranker(trials, place)
    if not given.parts or "light" in given.parts:
        parts_of_light(trials, place)
    raise SystemExit(trials.ended())


if __name__ == "__main__":
    main()
