"""`gpuwatch guest`: what it installs is what vLLM loads, and what it shows is what lives."""

import base64
import hashlib
import json
import os
import signal
import subprocess
import sys

import pytest
from click.testing import CliRunner
from tests.guests import REGISTER, TORCH, Program, environment, sockets, wait_for

import gpuwatch
from gpuwatch import cli
from gpuwatch.guest import client

# As vLLM finds its plugins: by entry point, from what stands on PYTHONPATH.
FIND = """
import sys
from importlib.metadata import entry_points
(found,) = entry_points(group='vllm.general_plugins', name='gpuwatch')
before = set(sys.modules)
register = found.load()
register()
import threading
print(found.dist.version, [t.name for t in threading.enumerate()][1:], 'gpuwatch' in sys.modules)
print(*sorted({n.partition('.')[0] for n in set(sys.modules) - before} - sys.stdlib_module_names))
"""


def gpuwatch_(*words, status=0):
    done = CliRunner().invoke(cli.main, list(map(str, words)))
    assert done.exit_code == status, done.output
    return done.output


def load_as_vllm(installed, folder, *options):
    command = [sys.executable, *options, "-c", FIND]
    env = environment(folder, PYTHONPATH=str(installed))
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=False)


def test_what_is_installed_is_found_by_entry_point_and_needs_nothing_of_gpuwatch(tmp_path):
    said = gpuwatch_("guest", "install", tmp_path / "lib")
    assert said.count("\n") == 1
    assert f"`Environment=PYTHONPATH={tmp_path / 'lib'}`" in said
    done = load_as_vllm(tmp_path / "lib", tmp_path, "-S")
    assert done.stderr == ""
    assert done.stdout == f"{gpuwatch.__version__} ['gpuwatch-guest'] False\ngpuwatch_guest\n"


def test_installing_again_changes_nothing_and_an_older_one_is_replaced(tmp_path):
    gpuwatch_("guest", "install", tmp_path)
    first = tree(tmp_path)
    old, other = tmp_path / "gpuwatch_guest-0.0.1.dist-info", tmp_path / "other-1.0.dist-info"
    for folder in (old, other):
        folder.mkdir()
        (folder / "METADATA").write_text("Name: x\n")
    (tmp_path / "gpuwatch_guest" / "gone.py").write_text("")
    gpuwatch_("guest", "install", tmp_path)
    assert tree(tmp_path) == first | {"other-1.0.dist-info/METADATA": b"Name: x\n"}


def tree(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_its_record_is_pips_and_every_file_may_be_read(tmp_path):
    before = os.umask(0o077)
    try:
        gpuwatch_("guest", "install", tmp_path)
    finally:
        os.umask(before)
    (info,) = tmp_path.glob("gpuwatch_guest-*.dist-info")
    lines = [line.split(",") for line in (info / "RECORD").read_text().splitlines()]
    assert {path for path, _, _ in lines} == set(tree(tmp_path))
    for path, digest, size in lines:
        content = (tmp_path / path).read_bytes()
        hashed = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        assert path.endswith("RECORD") or (digest, size) == (f"sha256={hashed}", str(len(content)))
    assert {p.stat().st_mode & 0o777 for p in tmp_path.rglob("*") if p.is_file()} == {0o644}
    assert {p.stat().st_mode & 0o777 for p in tmp_path.rglob("*") if p.is_dir()} == {0o755}


def test_a_folder_that_cannot_be_written_is_said_to_be_so(tmp_path):
    (tmp_path / "file").write_text("")
    assert "name a folder that may be written" in gpuwatch_("guest", "install", tmp_path / "file/x", status=1)


def test_the_list_shows_each_process_with_its_devices(tmp_path):
    with Program(tmp_path) as plain, Program(tmp_path, TORCH.format("") + REGISTER) as program:
        program.do("torch.cuda.allocate(1, 30 * 2**20)")
        plain.ask()
        program.ask()
        lines = gpuwatch_("guest", "list", "--folder", tmp_path).splitlines()
        rows = {line.split()[0]: line.split()[1:] for line in lines}
        headings = "PROCESS ROLE DEVICE ALLOCATED RESERVED RETRIES OOMS IN FLIGHT LIMITS"
        assert rows["PID"] == headings.split()
        assert rows[str(program.pid)] == ["-c", "process", "cuda:1", "30", "MiB", "40", "MiB", "0", "0"]
        assert rows[str(plain.pid)] == ["-c", "process", "no", "CUDA"]
        shown = json.loads(gpuwatch_("guest", "list", "--json", "--folder", tmp_path))
        assert shown[str(plain.pid)]["cuda"] is False


def test_a_guest_that_does_not_answer_has_a_line_that_says_so(tmp_path):
    with Program(tmp_path) as program:
        program.ask()
        program.stop()
        assert f"guest {program.pid}: no answer within 2 s" in gpuwatch_(
            "guest", "list", "--folder", tmp_path
        )


def test_a_host_without_guests_is_told_how_to_get_them(tmp_path):
    assert "no guest lives in" in gpuwatch_("guest", "list", "--folder", tmp_path / "absent")


def test_stacks_are_for_people(tmp_path):
    with Program(tmp_path, "import time\ndef wedged(): time.sleep(1000)\n" + REGISTER) as program:
        program.begin("wedged()")
        wait_for(program.socket.exists)
        shown = gpuwatch_("guest", "stacks", program.pid, "--folder", tmp_path)
        assert f"MainThread ({program.pid})\n    " in shown
        assert "gpuwatch-guest" in shown


@pytest.mark.parametrize("pid", [1, 99999999])
def test_a_process_without_a_guest_has_no_stacks_to_show(tmp_path, pid):
    said = gpuwatch_("guest", "stacks", pid, "--folder", tmp_path, status=1)
    assert f"guest {pid}: No such file or directory; see gpuwatch guest list" in said


# -- limits ------------------------------------------------------------------------------------------------

# Processes as vLLM's: an API server that started an engine that started a worker, titled as it titles them.
API = """
import os, subprocess, sys, types
import gpuwatch.guest.admission as door, gpuwatch.guest
sys.argv = ["/venv/bin/vllm"]
for _ in range(DOORS): door.Admission(None)
gpuwatch.guest.register()
subprocess.run(["VLLM::EngineCore", "-c", ENGINE], executable=os.environ["PYTHON"])
"""
ENGINE = """
import os, subprocess, sys, types
from tests import fake_scheduler
fake_scheduler.install()
scheduler = fake_scheduler.Scheduler()
scheduler.add(*(fake_scheduler.Request(most=9999) for _ in range(12)))
sys.modules["vllm.v1.engine.core"] = types.ModuleType("vllm.v1.engine.core")
code = "def run_busy_loop(self):\\n    for _ in iter(int, 1): self.scheduler.schedule(), time.sleep(0.01)\\n"
import gpuwatch.guest, time
gpuwatch.guest.register()
work = "import gpuwatch.guest.auto, time; time.sleep(1000)"
worker = subprocess.Popen(["VLLM::Worker_TP0", "-c", work], executable=os.environ["PYTHON"])
exec(compile(code, "/venv/vllm/v1/engine/core.py", "exec"))
run_busy_loop(types.SimpleNamespace(scheduler=scheduler))
"""


class Server:
    """An API server with an engine and a worker below it, each with a guest."""

    def __init__(self, folder, doors=1):
        before = sockets(folder)
        command = [sys.executable, "-c", f"DOORS = {doors}\nENGINE = {ENGINE!r}\n{API}"]
        env = environment(folder, PYTHON=sys.executable)
        self.process = subprocess.Popen(command, env=env, start_new_session=True)
        self.pids = wait_for(lambda: len(found := sockets(folder) - before) == 3 and found)
        roles = {pid: answer["role"] for pid, answer in shown(folder).items() if pid in self.pids}
        self.api, self.engine, self.worker = (
            next(pid for pid, role in roles.items() if role == wanted)
            for wanted in ("api_server", "engine_core", "worker")
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def shown(folder):
    return {
        int(k): v for k, v in json.loads(gpuwatch_("guest", "list", "--json", "--folder", folder)).items()
    }


def rows(text):
    return {line.split()[0]: line.split()[1:] for line in text.splitlines()}


def limit(folder, *words, status=0):
    return gpuwatch_("guest", "limit", *words, "--folder", folder, status=status)


@pytest.mark.parametrize("named", ["api", "engine", "worker"])
def test_a_limit_reaches_the_server_of_any_of_its_processes_and_no_other(tmp_path, named):
    with Server(tmp_path) as server, Server(tmp_path) as other:
        said = limit(tmp_path, getattr(server, named), "--running", 2, "--tokens", 64, "--admission", 5)
        assert rows(said)[str(server.engine)] == ["EngineCore", "2", "64"]
        assert rows(said)[str(server.api)] == ["vllm", "5"]
        assert rows(said)[str(server.worker)] == ["Worker_TP0"]
        assert said.splitlines()[-1] == "for 5m, unless asked again"
        now = shown(tmp_path)
        assert now[server.engine]["engine"]["limits"] == {"running": 2, "tokens": 64}
        assert now[other.engine]["engine"]["limits"] == {}
        assert now[other.api]["admission"]["limit"] is None


def test_each_asking_replaces_all_and_lift_ends_them(tmp_path):
    with Server(tmp_path) as server:
        limit(tmp_path, server.api, "--running", 2)
        limit(tmp_path, server.api, "--admission", 0, "--for", "1h")
        listed = rows(gpuwatch_("guest", "list", "--folder", tmp_path))
        assert listed[str(server.api)] == ["vllm", "api_server", "no", "CUDA", "0", "admission", "0"]
        assert listed[str(server.engine)] == ["EngineCore", "engine_core", "no", "CUDA", "8+4"]
        assert limit(tmp_path, server.api, "--lift").splitlines()[-1] == "no limit is left"
        assert shown(tmp_path)[server.api]["admission"]["limit"] is None


def test_what_no_process_keeps_is_an_error_that_says_why(tmp_path):
    with Server(tmp_path, doors=0) as server:
        said = limit(tmp_path, server.api, "--admission", 3, "--running", 2, status=1)
        assert "admission: no API here was started with `--middleware" in said
        assert rows(said)[str(server.engine)] == ["EngineCore", "2"]


def test_a_limit_is_shared_among_the_api_servers_of_one_server():
    assert client.shares(7, [1, 2, 3]) == {1: 3, 2: 2, 3: 2}
    assert client.shares(2, [1, 2, 3]) == {1: 1, 2: 1, 3: 0}
    assert client.shares(0, [1, 2]) == {1: 0, 2: 0}
    assert client.shares(None, [1, 2]) == {}


def test_a_process_without_a_guest_cannot_be_limited(tmp_path):
    with Program(tmp_path) as program:
        program.ask()
        assert "no process of it has a guest" in limit(tmp_path, 1 << 22, "--running", 2, status=1)


def test_a_guest_that_hangs_is_shown_and_the_limit_fails_if_none_keeps_it(tmp_path):
    with Program(tmp_path) as program:
        program.ask()
        assert "running: no step of the engine" not in limit(tmp_path, program.pid, "--running", 2, status=1)
        program.stop()
        assert "no process of it has a guest" in limit(tmp_path, program.pid, "--running", 2, status=1)


@pytest.mark.parametrize("words", [(), ("--lift", "--running", 2), ("--running", 2, "--for", "2h")])
def test_a_limit_that_makes_no_sense_is_a_mistake_of_use(tmp_path, words):
    limit(tmp_path, os.getpid(), *words, status=2)
