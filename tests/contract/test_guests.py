"""What becomes of what guests say: samples of honest ones, nothing of the others, and all of it in time."""

import json
import math
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest
from click.testing import CliRunner
from tests.fake_nvml import FakeNvml
from tests.fake_torch import MIB
from tests.guests import REGISTER, ROOT, TORCH, Pretender, Program, wait_for

from gpuwatch import cli
from gpuwatch.catalogue import CATALOGUE
from gpuwatch.errors import SourceError
from gpuwatch.guest import client
from gpuwatch.guest.client import GuestError
from gpuwatch.sources import AllocatorSource

UUID = "GPU-00000000-0000-0000-0000-000000000001"
WITH_TORCH = TORCH.format(f"gpus=2, total_bytes=100 * {MIB}") + REGISTER
OOM_AND_DIE = """
try: torch.cuda.allocate(1, 90 * 2**20)
except torch.cuda.OutOfMemoryError: os.kill(os.getpid(), 9)
"""
HONEST = {
    "protocol": 1,
    "pid": os.getpid(),
    "worker": "EngineCore",
    "role": "engine_core",
    "rank": 0,
    "process": "EngineCore",
    "cuda": True,
    "devices": [{"device": 0, "uuid": UUID, "stats": {"num_ooms": 4}, "free_bytes": 1, "total_bytes": 2}],
}
OOM = {
    "protocol": 1,
    "pid": 77,
    "worker": "EngineCore",
    "device": 0,
    "uuid": UUID,
    "count": 1,
    "asked_bytes": 16 * MIB,
    "free_bytes": 5 * MIB,
}


def nvml():
    fake = FakeNvml(gpus=2)
    fake.devices[1].uuid = UUID
    return fake


def source_of(folder, within_s=5.0):
    return AllocatorSource(folder, nvml(), within_s=within_s)


def read(source, now_ms=0):
    """Values by metric and worker, of samples that keep to what every source keeps to."""
    samples = source.read(now_ms)
    assert len({s.labels for s in samples}) == len(samples)
    for sample in samples:
        assert sample.at_ms == now_ms
        assert isinstance(sample.value, float)
        assert math.isfinite(sample.value)
        assert {k for k, _ in sample.labels} <= {"__name__", *CATALOGUE[sample.labels.metric].labels}
    return {(s.labels.metric.removeprefix("cuda_"), s.labels.get("worker")): s.value for s in samples}


def saying(*lines):
    def says(connection):
        connection.recv(4096)
        for line in lines:
            connection.sendall(line)

    return says


def saying_json(**changes):
    return saying(json.dumps({**HONEST, **changes}).encode() + b"\n")


def until_hung_up(connection):
    while connection.recv(4096):
        pass


def dripping(connection):
    for _ in range(200):
        connection.sendall(b" ")
        time.sleep(0.02)


# -- samples ---------------------------------------------------------------------------------------------


def test_a_host_without_the_folder_gives_nothing_and_opens_no_nvml(tmp_path):
    fake = nvml()
    fake.nvmlInit = None
    assert AllocatorSource(tmp_path / "absent", fake).read(0) == []


def test_the_figures_of_a_process_have_its_gpus_index_and_uuid(tmp_path):
    with Program(tmp_path, WITH_TORCH) as program:
        program.do("torch.cuda.allocate(1, 30 * 2**20)")
        program.ask()
        source = source_of(tmp_path)
        assert read(source) == {
            ("allocator_allocated_bytes", "process"): 30 * MIB,
            ("allocator_reserved_bytes", "process"): 40 * MIB,
            ("allocator_active_bytes", "process"): 30 * MIB,
            ("allocator_inactive_split_bytes", "process"): 3 * MIB,
            ("allocator_retries_total", "process"): 0,
            ("allocator_ooms_total", "process"): 0,
            ("oom_events_total", "process"): 0,
            ("allocator_slack_bytes", "process"): 10 * MIB,
            ("allocator_largest_free_block_bytes", "process"): 10 * MIB,
            ("allocator_fragments_bytes", "process"): 10 * MIB,
            ("allocator_releasable_bytes", "process"): 0,
            ("allocator_fragmentation_ratio", "process"): 0.25,
            ("graph_pool_bytes", "process"): 0,
        }
        assert {(s.labels.get("gpu"), s.labels.get("uuid")) for s in source.read(1)} == {("1", UUID)}


def test_a_gpu_that_nvml_does_not_know_has_no_index(tmp_path):
    other = [{"device": 0, "uuid": "MIG-5", "stats": {"num_ooms": 1}}]
    with Pretender(tmp_path, saying_json(devices=other)):
        assert {s.labels.get("gpu") for s in source_of(tmp_path).read(0)} == {""}


def test_processes_of_one_name_on_one_gpu_are_added_up(tmp_path):
    with Program(tmp_path, WITH_TORCH) as one, Program(tmp_path, WITH_TORCH) as two:
        for program in (one, two):
            program.do("torch.cuda.allocate(1, 30 * 2**20)")
            program.ask()
        assert read(source_of(tmp_path))["allocator_allocated_bytes", "process"] == 60 * MIB


# -- out of memory ---------------------------------------------------------------------------------------


def test_an_oom_of_a_process_that_is_gone_is_counted_once_with_what_was_asked_and_free(tmp_path):
    source = source_of(tmp_path)
    with Program(tmp_path, WITH_TORCH) as program:
        program.do("torch.cuda.allocate(1, 30 * 2**20)")
        wait_for(lambda: program.do("print(len(torch.observers))") == "1")
        assert read(source)["oom_events_total", "process"] == 0
        program.begin(f"exec({OOM_AND_DIE!r})")
        assert program.process.wait(20) == -signal.SIGKILL
        for now_ms in (1000, 2000, 60_000):
            figures = read(source, now_ms)
            assert figures.pop(("oom_time_seconds", "process")) > 0
            assert figures == {
                ("oom_events_total", "process"): 1,
                ("oom_limit_bytes", "process"): 100 * MIB,
                ("oom_asked_bytes", "process"): 90 * MIB,
                ("oom_free_bytes", "process"): 60 * MIB,
            }
    assert list(tmp_path.iterdir()) == [], "the file, and the socket of the dead"


def leave(folder, content, name="77.oom"):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    (folder / name).write_bytes(text)


def test_a_counter_that_nobody_saw_before_begins_at_0(tmp_path):
    leave(tmp_path, OOM | {"count": 3})
    source = source_of(tmp_path)
    assert [read(source, now_ms)["oom_events_total", "EngineCore"] for now_ms in (0, 1)] == [0, 3]
    leave(tmp_path, OOM | {"asked_bytes": 7})
    figures = read(source, 2)
    assert (figures["oom_events_total", "EngineCore"], figures["oom_asked_bytes", "EngineCore"]) == (4, 7)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1]",
        b"[" * 100_000,
        b" " * 1_000_000,
        OOM | {"pid": 78},
        OOM | {"protocol": 2},
        OOM | {"count": 0},
        OOM | {"count": 10**9},
        OOM | {"asked_bytes": -1},
        OOM | {"free_bytes": math.inf},
        OOM | {"asked_bytes": True},
        OOM | {"worker": 'x"}\n'},
        OOM | {"uuid": "0"},
        {k: v for k, v in OOM.items() if k != "free_bytes"},
    ],
)
def test_a_file_that_no_guest_would_leave_counts_for_nothing_and_is_gone(tmp_path, content):
    leave(tmp_path, content)
    source = source_of(tmp_path)
    assert (read(source), read(source, 1)) == ({}, {})
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_file_is_not_read(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text(json.dumps(OOM))
    (tmp_path / "77.oom").symlink_to(secret)
    os.mkfifo(tmp_path / "78.oom")
    (tmp_path / "79.oom").mkdir()
    source = source_of(tmp_path)
    assert (read(source), read(source, 1)) == ({}, {})
    assert secret.exists()


# -- guests that are none ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "says",
    [
        saying(b"SSH-2.0-OpenSSH_9.2\r\n"),
        saying(b"\n"),
        saying(b"\xff\xfe\n"),
        saying(b"[]\n"),
        saying(b"[" * 50_000 + b"\n"),
        saying(b'{"protocol":1'),
        saying(b"x" * 100_000),
        saying_json(protocol=2),
        saying_json(pid=1),
        saying_json(error="no \x1b[2J"),
        saying_json(worker="a/b"),
        saying_json(worker=""),
        saying_json(worker="w\n"),
        saying_json(worker=7),
        saying_json(devices=None),
        saying_json(devices=[{"device": 0}] * 3),
        saying_json(devices=[HONEST["devices"][0]] * 33),
        *(
            saying_json(devices=[HONEST["devices"][0] | {"stats": {"num_ooms": wrong}}])
            for wrong in (-1, 1.5, "1", None, True, math.nan, math.inf, 2**63)
        ),
        saying_json(devices=[HONEST["devices"][0] | {"uuid": 'GPU-1"\n'}]),
    ],
)
def test_what_no_guest_would_say_gives_no_sample(tmp_path, says):
    with Pretender(tmp_path, says) as pretender:
        source = source_of(tmp_path)
        assert read(source) == {}
        assert read(source, 4999) == {}
        assert pretender.asked == 1, "it is left in peace for five seconds"
        assert read(source, 5000) == {}
        assert pretender.asked == 2


def test_an_honest_answer_is_believed(tmp_path):
    with Pretender(tmp_path, saying_json()):
        assert read(source_of(tmp_path))["allocator_ooms_total", "EngineCore"] == 4


def test_a_process_that_listens_for_another_is_not_believed(tmp_path):
    with Pretender(tmp_path, saying_json(pid=os.getppid()), pid=os.getppid()) as pretender:
        assert read(source_of(tmp_path)) == {}
        with pytest.raises(GuestError, match=f"process {os.getpid()} listens in its place"):
            client.ask(pretender.path, "figures")


@pytest.mark.parametrize("hangs", [until_hung_up, dripping])
def test_a_guest_that_hangs_is_passed_over_and_the_others_are_heard(tmp_path, hangs):
    with Program(tmp_path, WITH_TORCH) as honest, Pretender(tmp_path, hangs):
        honest.do("torch.cuda.allocate(1, 30 * 2**20)")
        honest.ask()
        source = source_of(tmp_path, within_s=1.0)
        for now_ms in (0, 1000):
            assert read(source, now_ms)["allocator_allocated_bytes", "process"] == 30 * MIB


def test_a_stopped_process_is_passed_over_and_is_back_when_it_goes_on(tmp_path):
    with Program(tmp_path, WITH_TORCH) as program:
        program.do("torch.cuda.allocate(1, 30 * 2**20)")
        program.ask()
        source = source_of(tmp_path, within_s=3)
        program.stop()
        assert read(source) == {}
        program.process.send_signal(signal.SIGCONT)
        wait_for(lambda: program.ask()["cuda"])
        assert read(source, 5000)["allocator_allocated_bytes", "process"] == 30 * MIB


def test_the_socket_of_a_killed_process_is_removed_and_one_of_the_living_is_not(tmp_path):
    with Program(tmp_path) as living, Program(tmp_path) as killed:
        living.ask()
        killed.ask()
        killed.process.kill()
        killed.process.wait()
        assert killed.socket.exists()
        read(source_of(tmp_path))
        assert (killed.socket.exists(), living.socket.exists()) == (False, True)


def test_names_that_are_no_pids_are_left_alone(tmp_path):
    for name in ("x.sock", "-1.sock", "².sock", ".5.sock", "5.sock.bak", "notes"):
        (tmp_path / name).write_text("")
    assert read(source_of(tmp_path)) == {}
    assert len(list(tmp_path.iterdir())) == 6


def test_names_without_end_do_not_grow_without_end(tmp_path):
    source = source_of(tmp_path)
    for number in range(300):
        leave(tmp_path, OOM | {"worker": f"w{number}"})
        source.read(number)
    assert len(source.read(300)) == 256 * 3


@pytest.mark.skipif(os.getuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_a_source_error(tmp_path):
    tmp_path.chmod(0o300)
    with pytest.raises(SourceError, match="member of the folder's group"):
        source_of(tmp_path).read(0)


def test_a_folder_that_is_none_is_a_source_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match="list the guests in"):
        source_of(tmp_path / "file").read(0)


# -- who may -------------------------------------------------------------------------------------------------

GPUWATCH, VLLM, OTHER = 65_531, 65_532, 65_533
PYTHON = shutil.which("python3", path="/usr/bin:/usr/local/bin")  # one that every user may run
SERVE = "import gpuwatch_guest.auto, time; time.sleep(1000)"
LOOK = """
import pathlib, sys
from gpuwatch_guest import client
folder, pid = pathlib.Path(sys.argv[1]), int(sys.argv[2])
asked = lambda: client.ask(folder / f"{pid}.sock", "figures")["pid"] == pid
for look in (asked, lambda: len(client.listed(folder))):
    try: print(look())
    except client.GuestError as error: print(str(error).partition(": ")[2])
"""


@pytest.fixture
def shared_folder():
    """As systemd-tmpfiles makes it, with the guest installed beside it."""
    with tempfile.TemporaryDirectory() as name:
        root, folder = Path(name), Path(name) / "guests"
        root.chmod(0o755)
        assert CliRunner().invoke(cli.main, ["guest", "install", str(root)]).exit_code == 0
        (line,) = [
            line
            for line in (ROOT / "systemd/gpuwatch.tmpfiles").read_text().splitlines()
            if "/guests" in line
        ]
        mode, user, group = line.split()[2:5]
        assert (user, group) == ("gpuwatch", "gpuwatch")
        folder.mkdir()
        os.chown(folder, GPUWATCH, GPUWATCH)
        folder.chmod(int(mode, 8))
        yield folder


def as_user(user, folder, *words, **options):
    env = {
        "PYTHONPATH": str(folder.parent),
        "GPUWATCH_GUEST_DIR": str(folder),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    whose = {"user": user, "group": user, "extra_groups": []}
    return subprocess.Popen([PYTHON, "-c", *words], cwd="/", env=env, text=True, **whose, **options)


def seen_by(user, folder, pid):
    looking = as_user(user, folder, LOOK, str(folder), str(pid), stdout=subprocess.PIPE)
    return looking.communicate(timeout=30)[0].splitlines()


@pytest.mark.skipif(os.getuid() != 0 or not PYTHON, reason="becomes other users")
def test_gpuwatch_alone_sees_and_asks_the_guest_of_a_user_in_no_group_of_its(shared_folder):
    guest = as_user(VLLM, shared_folder, SERVE)
    try:
        wait_for((shared_folder / f"{guest.pid}.sock").exists)
        assert seen_by(GPUWATCH, shared_folder, guest.pid) == ["True", "1"]
        refused = ["Permission denied", "Permission denied; to cure it, be a member of the folder's group"]
        assert seen_by(OTHER, shared_folder, guest.pid) == refused
        assert seen_by(VLLM, shared_folder, guest.pid) == ["True", refused[1]]
    finally:
        guest.kill()
        guest.wait()
    gone = as_user(
        GPUWATCH,
        shared_folder,
        "import os, sys; os.unlink(sys.argv[1])",
        str(shared_folder / f"{guest.pid}.sock"),
    )
    assert gone.wait(20) == 0, "gpuwatch takes away what the dead left"
