"""`gpuwatch guest`: what it installs is what vLLM loads, and what it shows is what lives."""

import base64
import hashlib
import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner
from tests.guests import REGISTER, TORCH, Program, environment, wait_for

import gpuwatch
from gpuwatch import cli

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
        assert rows["PID"] == ["PROCESS", "ROLE", "DEVICE", "ALLOCATED", "RESERVED", "RETRIES", "OOMS"]
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
