"""A host with one real vLLM server whose settings gpuwatch keeps; and a rival for the memory of its GPU.

Where a CPU build of vLLM stands in, to rehearse, there is neither GPU nor rival.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pynvml
from tests import h200
from tests.acceptance.gpu_live import gpuwatch, say
from tests.acceptance.gpu_trials import asked_for, is_healthy, until

from gpuwatch import remediation, store
from gpuwatch.errors import ServerError, StoreError
from gpuwatch.records import LIVE_PHASES
from gpuwatch.servers.revisions import Revisions

GIB = 1 << 30
OUT = Path(os.environ.get("OUT") or tempfile.gettempdir())
ON_CPU = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
# Takes all but a little of what is free, and what is given back later too, until it has what it wants.
RIVAL = """
import sys, time, torch
most, leaves, held, had = int(sys.argv[1]), int(sys.argv[2]), [], 0
while True:
    free, _ = torch.cuda.mem_get_info()
    size = min(free - leaves, 8 << 30, most - had)
    if size <= 2 << 20:
        time.sleep(0.05)
        continue
    try:
        held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        had += size
        print(had, flush=True)
    except torch.OutOfMemoryError:
        time.sleep(0.05)
"""


@dataclass(frozen=True)
class Place:
    """Where models lie, and vLLM's interpreter; `rehearses` is without a GPU."""

    models: Path
    python: str = sys.executable
    rehearses: bool = False

    def settings(self, shape, port, **more):
        """What stands in the first settings file of a server of that shape."""
        fixed = {"model": str(self.models / ("tiny" if self.rehearses else shape)), "port": port}
        fixed |= {"load-format": "dummy", "served-model-name": "m", "enforce-eager": True}
        fixed["middleware"] = ["gpuwatch_guest.admission.Admission"]
        if self.rehearses:
            more = {"max-model-len": 1024, "max-num-seqs": 8} | {
                name: value for name, value in more.items() if name in {"hf-overrides", "runner"}
            }
        return fixed | more


class Host:
    """A folder with all that gpuwatch knows, the daemon, and its server `name`; ends what it began."""

    def __init__(self, place, name, base, *, bounds=None, rules="", policies=()):
        self.place, self.name, self.port, self.base = place, name, base["port"], base
        self.state = Path(tempfile.mkdtemp(prefix=f"gpuwatch-hands-{name}-"))
        self.guests, self.daemon, self.rival = self.state / "guests", None, None
        self.guests.mkdir(mode=0o3773)
        os.environ |= {
            "GPUWATCH_GUEST_DIR": str(self.guests),
            "GPUWATCH_CONFIG": str(self.state / "gpuwatch.yaml"),
        }
        print(gpuwatch("guest", "install", str(self.state / "guest")))
        self.python = own_python(self.state / "python")
        settings = self._configuration(bounds or {})
        if rules:
            (self.state / "rules.yaml").write_text(rules)
            settings |= {"rules": [str(self.state / "rules.yaml")], "policies": list(policies)}
        (self.state / "gpuwatch.yaml").write_text(json.dumps(settings))  # JSON is YAML
        (self.state / "base.yaml").write_text(json.dumps(base))

    def _configuration(self, bounds):
        folder, python = self.state / "revisions", self.place.python
        env = {name: value for name, value in os.environ.items() if name.startswith(("VLLM_", "HF_"))}
        env |= ON_CPU if self.place.rehearses else {}
        env["PYTHONPATH"] = f"{self.state / 'guest'}:{os.environ['PYTHONPATH']}"
        env["GPUWATCH_GUEST_DIR"] = str(self.guests)
        vllm = [python, "-m", "vllm.entrypoints.cli.main", "serve", "--config", str(folder / "current.yaml")]
        server = {
            "name": self.name,
            "url": f"http://127.0.0.1:{self.port}",
            "start_deadline": "4m",
            "revisions": str(folder),
            "python": python,
            "bounds": bounds,
            "supervisor": {"process": {"command": vllm, "env": env, "stop_timeout": "20s"}},
        }
        spans = {name: f"{ms}ms" for name, ms in h200.REMEDIATION.items()}
        often = {"count": h200.BUDGET["count"], "per": f"{h200.BUDGET['per']}ms"}
        healing = {"mode": "auto", "budget": often, "breaker": often, **spans}
        return {"state_dir": str(self.state), "host": "h200", "remediation": healing, "servers": [server]}

    # -- the daemon, and what a person types ---------------------------------------------------------

    def start_gpuwatch(self):
        with (self.state / "daemon.log").open("ab") as log:
            command = [self.python, "-m", "gpuwatch", "run"]
            self.daemon = subprocess.Popen(command, stdout=log, stderr=log)
        until(20, lambda: self.rows(lambda rows: rows.last_tick_ms()))

    def kill_gpuwatch(self):
        self.daemon.kill()
        self.daemon.wait(10)

    def wish(self, *words, why):
        print(gpuwatch("config", *words, "--why", why, "--yes"))

    # -- what is so ---------------------------------------------------------------------------------

    def rows(self, ask, default=None):
        """What the store answers; a store that is just being made answers nothing."""
        with contextlib.suppress(StoreError), store.open_read_only(self.state) as rows:
            return ask(rows)
        return default

    def newest(self):
        """The last remediation; None if there is none."""
        return next(iter(self.rows(lambda rows: rows.remediations(limit=1), [])), None)

    def newest_id(self):
        newest = self.newest()
        return newest.plan.id if newest else ""

    def step(self):
        """What is being done; empty if nothing is."""
        newest = self.newest()
        at = remediation.present(newest) if newest else None
        return at.action if at else ""

    def ended(self, after, within_s):
        """The first remediation that came after that one, once it is over; None if it is not in time."""

        def over():
            newest = self.newest()
            is_new = newest is not None and newest.plan.id != after
            return newest if is_new and newest.phase not in LIVE_PHASES else None

        return until(within_s, over)

    def is_well(self, after):
        """Whether something was done since that remediation, nothing more is, and the server serves."""
        newest = self.newest()
        is_over = newest is not None and newest.plan.id != after and newest.phase not in LIVE_PHASES
        return is_over and is_healthy(self.port)

    def starts(self):
        """The newest first."""
        return self.rows(lambda rows: rows.starts(self.name, 20), [])

    def revisions(self):
        return {r.number: r for r in self.rows(lambda rows: rows.revisions(self.name), [])}

    def current(self):
        """The revision that the next start reads."""
        with contextlib.suppress(ServerError):
            return Revisions(self.name, self.state / "revisions").current()
        return None

    def in_use(self):
        """The revision of the process that lives."""
        newest = next(iter(self.starts()), None)
        return newest.revision if newest and newest.ended_at_ms is None else None

    def share(self, number):
        return self.revisions()[number].arguments.get("gpu_memory_utilization")

    def seen(self):
        """All of it in words, the memory of the GPU apart."""
        newest, said = self.newest(), [f"/health {asked_for('GET', self.port, '/health', 1)}"]
        said.append(f"revision {self.current()}")
        if newest:
            what = self.step() if newest.phase in LIVE_PHASES else newest.outcome
            said.append(f"{newest.plan.id} {newest.phase} {what}")
        refused = self.rows(lambda rows: {r.code for r in rows.refusals()}, set()) - {"notify_only"}
        return ", ".join([*said, *(f"not now: {code}" for code in sorted(refused))])

    def follow(self, within_s, is_over):
        """Say each change of what is seen; the seconds until it is over, None if it is not in time."""
        began_s, last = time.monotonic(), ""
        while (age_s := time.monotonic() - began_s) < within_s:
            seen = self.seen()
            if seen != last:
                print(f"  {age_s:6.1f} s  {seen}{memory()}", flush=True)
                last = seen
            if is_over():
                return round(age_s, 1)
            time.sleep(0.3)
        return None

    # -- the end ------------------------------------------------------------------------------------

    def keep(self):
        """All logs, rows and captures as one file in `$OUT`; what a person would read, on the screen."""
        say(f"what is kept of {self.name}")
        for words in (("history", self.name), ("config", "log", self.name), ("server", "starts", self.name)):
            print(f"$ gpuwatch {' '.join(words)}\n{gpuwatch(*words)}\n")
        done = self.rows(lambda rows: rows.remediations(limit=50), [])
        texts = {f"why-{r.plan.id}.txt": gpuwatch("why", r.plan.id) for r in done}
        texts["history.json"] = gpuwatch("history", self.name, "--json")
        texts["config-log.json"] = gpuwatch("config", "log", self.name, "--json")
        with tarfile.open(OUT / f"hands-{self.name}.tar.xz", "w:xz") as tar:
            for name, text in texts.items():
                kept = tarfile.TarInfo(name)
                kept.size = len(text.encode())
                tar.addfile(kept, io.BytesIO(text.encode()))
            for path in (*self.state.glob("*.log"), *self.state.glob("*.yaml"), self.state / "bundles"):
                if path.exists():
                    tar.add(path, path.name)

    def end_rival(self):
        """Leave the GPU to the server."""
        if self.rival:
            self.rival.kill()

    def __enter__(self):
        self.start_gpuwatch()
        return self

    def __exit__(self, *_):
        self.end_rival()
        self.daemon.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.daemon.wait(15)
        self.daemon.kill()
        end_all_of(self.state)
        self.keep()


class Rival:
    """Another's process on the GPU that wants `most` bytes, and takes what it can get of them."""

    def __init__(self, most, log):
        self.log, self.most = log, most
        with log.open("wb") as out:
            words = [sys.executable, "-c", RIVAL, str(most), str(h200.LEAVES_BYTES)]
            self.process = subprocess.Popen(words, stdout=out, stderr=out)

    @property
    def held(self):
        said = self.log.read_text().split()
        return int(said[-1]) if said and said[-1].isdecimal() else 0

    @property
    def has_all_there_is(self):
        """Whether little is left, or it wants no more."""
        free, _ = gpu_bytes() or (0, 0)
        return self.held == self.most or (self.held > 0 and free < 4 * h200.LEAVES_BYTES)

    def kill(self):
        self.process.kill()
        self.process.wait(30)


def gpu_bytes():
    """(free, used) of GPU 0 by NVML; None where there is none."""
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        found = pynvml.nvmlDeviceGetMemoryInfo(handle, version=pynvml.nvmlMemory_v2)
    except pynvml.NVMLError:
        return None
    return found.free, found.used


def memory():
    found = gpu_bytes()
    return f"; free {found[0] / GIB:.1f} GiB, used {found[1] / GIB:.1f} GiB" if found else ""


def own_python(folder):
    """An interpreter that finds gpuwatch without PYTHONPATH, which a capture is not told."""
    try:
        words = [sys.executable, "-m", "venv", "--without-pip", str(folder)]
        subprocess.run(words, check=True, capture_output=True, timeout=60)
        (packages,) = folder.glob("lib/python3*/site-packages")
    except (subprocess.SubprocessError, OSError, ValueError) as error:
        print(f"  no interpreter of its own, so no captures: {error}")
        return sys.executable
    paths = [path for path in sys.path if Path(path).is_dir() and Path(path).is_absolute()]
    (packages / "gpuwatch.pth").write_text("".join(f"{path}\n" for path in paths))
    return str(folder / "bin" / "python")


def end_all_of(folder):
    """Kill every process that was begun in this folder's name, and all that is in a session of one."""
    json_files = folder.glob("process-*.json")
    leaders = {(json.loads(file.read_bytes()).get("leader") or {}).get("pid") for file in json_files}
    ours = [p for p in psutil.process_iter() if p.pid != os.getpid() and _is_of(p, str(folder), leaders)]
    for process in ours:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(ours, timeout=30)


def _is_of(process, folder, leaders):
    with contextlib.suppress(psutil.Error, ProcessLookupError):
        return os.getsid(process.pid) in leaders or any(folder in word for word in process.cmdline())
    return False
