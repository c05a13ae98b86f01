"""A systemd box: a Debian container with systemd, D-Bus and polkit as PID 1, gpuwatch installed as shipped.

`GPUWATCH_BOX` names the folder of the container's root tree; it is built there (a minute, network) if absent.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
TOOL = PROJECT.parent / "shared" / "tools" / "systemd_box.sh"
HERE = Path(__file__).parent / "box"
UNIT = "vllm-standin.service"
MADE_BY_TESTS = ("forgotten.service", "looping.service", "masked.service")
COMMAND = "/opt/gpuwatch/bin/gpuwatch"
NEEDS = {
    f"{TOOL} is absent": TOOL.exists(),
    "needs root": os.geteuid() == 0,
    "needs systemd-nspawn": shutil.which("systemd-nspawn") is not None,
    "needs debootstrap": shutil.which("debootstrap") is not None,
}
LACKING = [reason for reason, there in NEEDS.items() if not there]
needed = [
    pytest.mark.acceptance,
    pytest.mark.shared,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(LACKING), reason="; ".join(LACKING)),
]


def wait_until(question, patience_s=20, note=lambda: ""):
    deadline = time.monotonic() + patience_s
    while not question():
        assert time.monotonic() < deadline, f"not within {patience_s} s. {note()}"
        time.sleep(0.1)


class Box:
    """The container; shares the network with the host, so the stand-in is reached from here."""

    def __init__(self, *binds):
        """`binds` are folders of the host, `FROM:TO`, that it sees and cannot write."""
        self.root = Path(os.environ.get("GPUWATCH_BOX", Path(tempfile.gettempdir()) / "gpuwatch-box"))
        self.binds = binds
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    def tool(self, *arguments, **options):
        return subprocess.run(
            ["bash", str(TOOL), *arguments],
            env={**os.environ, "BOX": str(self.root)},
            capture_output=True,
            text=True,
            check=options.pop("check", True),
            **options,
        )

    def boot(self):
        """Build and boot it; True if it was not up already as it is to be."""
        if not (self.root / "usr/lib/systemd/systemd").exists():
            self.tool("build", timeout=500)
        # The container lives on when this command is done: it must not hold our pipe.
        was_up = self.tool("status").stdout.startswith("up")
        if was_up and self.binds:
            self.tool("stop")
            was_up = False
        binds = " ".join(f"--bind-ro={bind}" for bind in self.binds)
        command, env = ["bash", str(TOOL), "boot"], {**os.environ, "BOX": str(self.root), "BOX_OPTS": binds}
        subprocess.run(
            command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True, timeout=60
        )
        return not was_up

    def run(self, *command, check=True):
        done = self.tool("exec", *command, check=False, timeout=120)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return (done.stdout if check else done.stdout + done.stderr).strip()

    def put(self, source, target, **replacements):
        text = Path(source).read_text()
        for old, new in replacements.items():
            text = text.replace(old, new)
        path = self.root / target
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def configure(self, **replacements):
        self.put(
            HERE / "gpuwatch.yaml", "etc/gpuwatch/gpuwatch.yaml", **{"@PORT@": str(self.port)}, **replacements
        )

    def show(self, unit, name):
        return self.run("systemctl", "show", unit, "--property", name, "--value")

    def log(self):
        """What gpuwatch has said since its last start."""
        run = self.show("gpuwatch", "InvocationID")
        return self.run("journalctl", f"_SYSTEMD_INVOCATION_ID={run}", "--no-pager", "-o", "cat")

    def is_healthy(self):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=1) as answer:
                return answer.status == 200
        except OSError:
            return False

    def is_dead(self):
        return self.show(UNIT, "ActiveState") in {"inactive", "failed"}

    def kill_engine(self):
        """As the out-of-memory killer would; vLLM then leaves with status 0."""
        engine = self.run("pgrep", "-P", self.show(UNIT, "MainPID"))
        self.run("kill", "-9", *engine.split())

    def is_active(self, unit="gpuwatch"):
        return self.show(unit, "ActiveState") == "active"


def install(box):
    wheels = box.root / "root" / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--disable-pip-version-check"]
    constraints = ["-c", str(PROJECT / "constraints.txt")]
    subprocess.run([*pip, *constraints, "-w", str(wheels), str(PROJECT)], check=True, capture_output=True)
    port = {"@PORT@": str(box.port)}
    box.put(PROJECT / "systemd/gpuwatch.service", "etc/systemd/system/gpuwatch.service")
    box.put(PROJECT / "systemd/gpuwatch.sysusers", "usr/lib/sysusers.d/gpuwatch.conf")
    box.put(PROJECT / "systemd/gpuwatch.tmpfiles", "usr/lib/tmpfiles.d/gpuwatch.conf")
    units = ", ".join(f'"{unit}"' for unit in ("vllm.service", UNIT, *MADE_BY_TESTS))
    rule = {'"vllm.service"': units}
    box.put(PROJECT / "systemd/gpuwatch.polkit.rules", "etc/polkit-1/rules.d/50-gpuwatch.rules", **rule)
    box.put(PROJECT / "tests/standin_vllm.py", "opt/standin/standin_vllm.py")
    box.put(HERE / "supervise.py", "opt/standin/supervise.py")
    box.put(HERE / UNIT, f"etc/systemd/system/{UNIT}", **port)
    box.configure()
    done = box.tool("script", str(HERE / "install.sh"), check=False, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
