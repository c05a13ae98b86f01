"""The guest in a process of its own: what it says, that it starts nothing, and that it does no harm."""

import ast
import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys

import pytest
from tests.fake_torch import MIB
from tests.guests import REGISTER, ROOT, TORCH, Program, environment, sockets, wait_for

from gpuwatch.guest import client, wire

GUEST = ROOT / "daemon/gpuwatch/guest"
WITH_TORCH = TORCH.format("gpus=2, total_bytes=100 * 2**20") + REGISTER


def run(script, folder, **env):
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=environment(folder, **env), check=False
    )
    return done.returncode, done.stdout + done.stderr


# -- what it says ------------------------------------------------------------------------------------


def test_a_process_without_torch_answers_and_loads_none(tmp_path):
    with Program(tmp_path) as program:
        answer = program.ask()
        assert (answer["pid"], answer["cuda"], answer["devices"]) == (program.pid, False, [])
        assert (answer["role"], answer["rank"], answer["worker"]) == ("process", None, "process")
        assert program.do("print('torch' in sys.modules)") == "False"


def test_its_socket_is_for_the_folders_group_alone(tmp_path):
    tmp_path.chmod(0o2770)
    with Program(tmp_path, f"import os\nos.umask(0)\n{REGISTER}") as program:
        program.ask()
        mode = program.socket.stat()
        assert stat.S_IMODE(mode.st_mode) == 0o660
        assert mode.st_gid == tmp_path.stat().st_gid


def test_cuda_that_the_process_did_not_start_is_never_started(tmp_path):
    with Program(tmp_path, WITH_TORCH) as program:
        for what in ("figures", "snapshot", "release"):
            assert program.ask(what)["cuda"] is False
        assert program.do("print(torch.started_by, torch.contexts)") == "[] set()"


def test_figures_are_those_of_the_devices_in_use_and_no_other_is_opened(tmp_path):
    with Program(tmp_path, WITH_TORCH) as program:
        program.do("torch.cuda.allocate(1, 30 * 2**20)")
        (device,) = program.ask()["devices"]
        assert device["device"] == 1
        assert device["uuid"] == "GPU-00000000-0000-0000-0000-000000000001"
        assert device["stats"] == {
            "allocated_bytes.all.current": 30 * MIB,
            "reserved_bytes.all.current": 40 * MIB,
            "active_bytes.all.current": 30 * MIB,
            "inactive_split_bytes.all.current": 3 * MIB,
            "num_alloc_retries": 0,
            "num_ooms": 0,
        }
        assert (device["free_bytes"], device["total_bytes"]) == (60 * MIB, 100 * MIB)
        assert program.do("print(torch.started_by, torch.contexts)") == "['allocate'] {1}"


def test_a_torch_that_tells_less_is_asked_for_less(tmp_path):
    script = TORCH.format("gpus=2, knows_contexts=False, tells_uuids=False") + REGISTER
    with Program(tmp_path, script + "del torch._C._cuda_attach_out_of_memory_observer\n") as program:
        program.do("torch.cuda.allocate(0, 30 * 2**20)")
        (device,) = program.ask()["devices"]
        assert (device["device"], device["uuid"]) == (0, "")
        assert program.do("print(torch.contexts)") == "{0}"


def test_an_error_of_torch_is_the_answer_and_the_next_question_is_answered(tmp_path):
    with Program(tmp_path, WITH_TORCH) as program:
        program.do("torch.cuda.allocate(0, 1); torch.cuda.memory_stats = lambda index: 1 / 0")
        with pytest.raises(client.GuestError, match="ZeroDivisionError"):
            program.ask()
        assert program.ask("snapshot")["cuda"] is True


def test_a_snapshot_tells_segments_and_the_largest_free_block(tmp_path):
    with Program(tmp_path, WITH_TORCH) as program:
        program.do("torch.cuda.allocate(0, 30 * 2**20)")
        (device,) = program.ask("snapshot")["devices"]
        assert (device["segments"], device["blocks"], device["reserved_bytes"]) == (1, 2, 40 * MIB)
        assert device["largest_free_block_bytes"] == device["inactive_bytes"] == 10 * MIB
        assert (device["releasable_bytes"], device["private_pool_segments"]) == (0, 0)


def test_release_gives_back_what_is_cached(tmp_path):
    with Program(tmp_path, WITH_TORCH) as program:
        program.do("torch.cuda.allocate(0, 60 * 2**20); torch.cuda.free(0, 50 * 2**20)")
        (device,) = program.ask("release")["devices"]
        assert device["released_bytes"] == 50 * MIB


def test_stacks_show_where_a_main_thread_hangs(tmp_path):
    with Program(tmp_path, "import time\ndef wedged(): time.sleep(1000)\n" + REGISTER) as program:
        program.begin("wedged()")

        def main_thread():
            return next(t for t in program.ask("stacks")["threads"] if t["name"] == "MainThread")

        frames = wait_for(lambda: [f for f in main_thread()["frames"] if f.endswith(" wedged")])
        assert frames[0].startswith("<string>:")
        assert main_thread()["native_id"] == program.pid


def test_a_question_that_it_does_not_know_is_refused_by_name(tmp_path):
    known = "no more than figures, snapshot, stacks, release"
    with Program(tmp_path) as program, pytest.raises(client.GuestError, match=known):
        program.ask("exit")


@pytest.mark.parametrize(
    ("title", "role", "worker"),
    [
        ("VLLM::EngineCore", "engine_core", "EngineCore"),
        ("VLLM::EngineCore_DP1", "engine_core", "EngineCore_DP1"),
        ("VLLM::Worker_TP1", "worker", "Worker_TP1"),
        ("VLLM::APIServer_0", "api_server", "APIServer_0"),
        ("/opt/vllm serve", "process", "process"),
    ],
)
def test_a_role_is_what_vllm_titles_the_process(tmp_path, title, role, worker):
    script = REGISTER + "import os, sys\nfor line in sys.stdin: exec(line); print('done', flush=True)\n"
    process = subprocess.Popen(
        [title, "-c", script], executable=sys.executable, env=environment(tmp_path), stdin=subprocess.PIPE
    )
    try:
        path = tmp_path / f"{process.pid}.sock"
        wait_for(path.exists)
        answer = client.ask(path, "figures", within_s=10)
        assert (answer["role"], answer["worker"]) == (role, worker)
    finally:
        process.kill()
        process.communicate()


def test_a_training_process_is_known_by_its_rank(tmp_path):
    with Program(tmp_path, RANK="3") as program:
        answer = program.ask()
        assert (answer["role"], answer["rank"], answer["worker"]) == ("process", 3, "rank3")


# -- out of memory -----------------------------------------------------------------------------------


OOM = """
try: torch.cuda.allocate(1, 90 * 2**20)
except torch.cuda.OutOfMemoryError as error: print(error)
"""
OOM_AND_DIE = OOM.replace("print(error)", "os.kill(os.getpid(), 9)")


def one_line(script):
    return f"exec({script!r})"


def with_observer(program):
    """CUDA is started, and the guest has seen it."""
    program.do("torch.cuda.allocate(1, 30 * 2**20)")
    wait_for(lambda: program.do("print(len(torch.observers))") == "1")


def test_an_oom_is_on_disk_when_the_process_is_killed_in_the_next_moment(tmp_path):
    with Program(tmp_path, WITH_TORCH) as program:
        with_observer(program)
        program.begin(one_line(OOM_AND_DIE))
        assert program.process.wait(20) == -signal.SIGKILL
        event = client.take_oom(tmp_path / f"{program.pid}.oom")
        assert (event["asked_bytes"], event["free_bytes"], event["count"]) == (90 * MIB, 60 * MIB, 1)
        assert (event["uuid"][-1], event["worker"], event["limit_bytes"]) == ("1", "process", 100 * MIB)
        assert [p.name for p in tmp_path.iterdir()] == [f"{program.pid}.sock"]


def test_ooms_that_nobody_took_are_counted_in_one_file(tmp_path):
    with Program(tmp_path, WITH_TORCH) as program:
        with_observer(program)
        path = tmp_path / f"{program.pid}.oom"
        program.do(one_line(OOM))
        program.do(one_line(OOM))
        assert stat.S_IMODE(path.stat().st_mode) == 0o640
        assert client.take_oom(path)["count"] == 2
        program.do(one_line(OOM))
        assert client.take_oom(path)["count"] == 1


def test_what_torch_raises_is_its_own_even_where_nothing_can_be_written(tmp_path):
    with Program(tmp_path, WITH_TORCH) as program:
        with_observer(program)
        program.do("os.environ['GPUWATCH_GUEST_DIR'] = '/absent'")
        assert program.do(one_line(OOM)) == f"Tried to allocate {90 * MIB} bytes"


def test_the_observer_is_attached_once_also_over_a_fork(tmp_path):
    with Program(tmp_path, WITH_TORCH) as program:
        with_observer(program)
        program.do(
            "import time; child = os.fork() or (time.sleep(3), print(len(torch.observers)), os._exit(0))"
        )
        assert "1" in program.do("os.waitpid(child, 0)")


# -- fork, spawn, other programs ------------------------------------------------------------------------


def test_a_forked_child_has_a_guest_of_its_own_and_the_parent_keeps_its(tmp_path):
    with Program(tmp_path, "import time\n" + REGISTER) as program:
        program.ask()
        program.begin("child = os.fork() or (time.sleep(1000), os._exit(0)); print('done', flush=True)")
        (child,) = wait_for(lambda: sockets(tmp_path) - {program.pid})
        try:
            assert client.ask(tmp_path / f"{child}.sock", "figures", within_s=10)["pid"] == child
            assert program.ask()["pid"] == program.pid
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_spawned_child_that_imports_it_has_a_guest(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(
        "import multiprocessing as mp, time\n"
        "def work():\n    import gpuwatch.guest.auto\n    time.sleep(1000)\n"
        "if __name__ == '__main__':\n    mp.get_context('spawn').Process(target=work).start()\n"
    )
    with Program(tmp_path, words=("-m", "gpuwatch.guest", str(script))) as program:
        (child,) = wait_for(lambda: sockets(tmp_path) - {program.pid})
        try:
            assert client.ask(tmp_path / f"{child}.sock", "figures", within_s=10)["pid"] == child
        finally:
            os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("how", ["os.fork() or os.execvp('sleep', ['sleep', '1000'])", "popen()"])
def test_a_child_that_becomes_another_program_leaves_no_socket(tmp_path, how):
    popen = "import subprocess\ndef popen(): return subprocess.Popen(['sleep', '1000'], preexec_fn=int).pid\n"
    with Program(tmp_path, popen + REGISTER) as program:
        program.ask()
        child = int(program.do(f"child = {how}; print(child)"))
        try:
            program.do("import time; time.sleep(1)")
            assert sockets(tmp_path) == {program.pid}
            assert program.ask()["pid"] == program.pid
        finally:
            os.kill(child, signal.SIGKILL)


def test_any_script_or_module_can_be_run_with_it(tmp_path):
    script = tmp_path / "some" / "train.py"
    script.parent.mkdir()
    (script.parent / "beside.py").write_text("X = 5\n")
    script.write_text("import sys, threading, beside\n" + SHOW)
    module = tmp_path / "module.py"
    module.write_text("import sys, threading\n" + SHOW)
    shown = "gpuwatch-guest ['a', '-b'] __main__"
    for words in ([script], ["-m", "module"]):
        command = [sys.executable, "-m", "gpuwatch.guest", *words, "a", "-b"]
        env = environment(tmp_path)
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout.strip(), done.stderr) == (7, shown, "")
    done = subprocess.run(command[:3], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.partition(":")[0]) == (1, "usage")


SHOW = "print(threading.enumerate()[-1].name, sys.argv[1:], __name__)\nsys.exit(7)\n"

# -- it is no harm -------------------------------------------------------------------------------------


def test_switched_off_it_leaves_no_trace(tmp_path):
    script = (
        REGISTER
        + "import sys, threading; print(threading.active_count(), 'gpuwatch.guest.plugin' in sys.modules)"
    )
    assert run(script, tmp_path, GPUWATCH_GUEST="0") == (0, "1 False\n")


BROKEN = {
    "no thread can be started": "import threading\nthreading.Thread.start = lambda self: 1 / 0",
    "no fork handlers": "import os\ndel os.register_at_fork",
    "no sockets": "import socket\nsocket.socket = None",
    "a module of its own is missing": "import sys\nsys.modules['gpuwatch.guest.oom'] = None",
    "no argv": "import sys\nsys.argv = None",
    "a torch half imported": "import sys, types\nsys.modules['torch.cuda'] = types.ModuleType('t')",
    "a torch that raises": "import sys, types\nt = sys.modules['torch.cuda'] = types.ModuleType('t')\n"
    "t.is_initialized = lambda: 1 / 0",
    "no file descriptors": "import resource, gpuwatch.guest.plugin\n"
    "resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))",
    "not even the folder's name": "import os\ndel os.environ['GPUWATCH_GUEST_DIR']",
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_whatever_is_broken_the_program_runs_and_nothing_is_printed(tmp_path, broken):
    script = f"{broken}\nimport gpuwatch.guest, time\ngpuwatch.guest.register()\ntime.sleep(1.5)\nprint(5)"
    assert run(script, tmp_path) == (0, "5\n")


@pytest.mark.parametrize("folder", ["/proc/nothing", "x" * 200, "/dev/null"])
def test_a_folder_that_cannot_be_used_is_no_trouble(tmp_path, folder):
    assert run(REGISTER + "import time; time.sleep(0.5); print(5)", tmp_path / folder) == (0, "5\n")


def test_a_folder_that_comes_later_or_comes_back_is_used(tmp_path):
    folder = tmp_path / "guests"
    with Program(folder) as program:
        program.do("import time; time.sleep(0.5)")
        folder.mkdir()
        program.ask()
        program.socket.unlink()
        folder.rmdir()
        folder.mkdir()
        assert program.ask()["pid"] == program.pid


def test_it_ends_with_its_process_and_takes_its_socket_along(tmp_path):
    with Program(tmp_path) as program:
        program.ask()
        assert program.end() == ""
        assert program.process.returncode == 0
        assert list(tmp_path.iterdir()) == []


def test_a_client_that_says_nothing_holds_up_no_other_for_long(tmp_path):
    with Program(tmp_path) as program, contextlib.ExitStack() as held:
        program.ask()
        for said in (b"", b"{", b"x" * 10_000, b"[]\n", b'{"ask":["figures"]}\n', b"\xff\n"):
            silent = held.enter_context(socket.socket(socket.AF_UNIX))
            silent.connect(str(program.socket))
            silent.sendall(said)
        assert program.ask()["pid"] == program.pid


def test_signals_that_the_process_waits_for_are_left_to_it(tmp_path):
    with Program(tmp_path, "import signal\n" + REGISTER) as program:
        program.ask()
        wait = "signal.sigwait({signal.SIGUSR1})"
        program.do("signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})")
        assert program.do(f"os.kill(os.getpid(), signal.SIGUSR1); print({wait}.name)") == "SIGUSR1"


def test_two_installations_in_one_process_are_one_guest(tmp_path):
    second = "import sys, threading\nmine = [sys.modules.pop(n) for n in list(sys.modules) if 'guest' in n]\n"
    with Program(tmp_path, REGISTER + second + REGISTER) as program:
        assert program.ask()["pid"] == program.pid
        names = program.do("print([t.name for t in threading.enumerate()])")
        assert names.count("gpuwatch-guest") == 1


def test_it_loads_nothing_but_the_standard_library(tmp_path):
    script = "import sys; before = set(sys.modules)\n" + REGISTER + SHOW_LOADED
    code, loaded = run(script, tmp_path)
    assert code == 0
    assert {name.partition(".")[0] for name in loaded.split()} <= {"gpuwatch", *sys.stdlib_module_names}
    assert {n for n in loaded.split() if n.startswith("gpuwatch")} == {
        "gpuwatch",
        "gpuwatch.guest",
        *(f"gpuwatch.guest.{n}" for n in ("allocator", "identity", "oom", "plugin", "stacks", "wire")),
    }


SHOW_LOADED = "print(*(set(sys.modules) - before))"


def test_the_daemon_loads_no_more_of_it_than_its_own_end(tmp_path):
    show = "print(*sorted(n for n in sys.modules if n.startswith('gpuwatch.guest')))"
    assert run(f"import sys, gpuwatch.sources\n{show}", tmp_path) == (
        0,
        "gpuwatch.guest gpuwatch.guest.client gpuwatch.guest.wire\n",
    )


@pytest.mark.parametrize("path", sorted(GUEST.glob("*.py")), ids=lambda p: p.name)
def test_it_is_python_3_10_and_imports_relatively(path):
    tree = ast.parse(path.read_text(), feature_version=(3, 10))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            assert node.module.partition(".")[0] in sys.stdlib_module_names
        if isinstance(node, ast.Import):
            assert all(name.name in sys.stdlib_module_names for name in node.names)
        if isinstance(node, ast.ImportFrom) and node.module == "typing":
            assert {n.name for n in node.names} <= {"TYPE_CHECKING", "Any", "Final"}


def test_the_folder_may_be_named_for_both_ends(tmp_path):
    assert wire.DEFAULT_FOLDER == "/run/gpuwatch/guests"
    assert run("from gpuwatch.guest import wire; print(wire.folder())", tmp_path) == (0, f"{tmp_path}\n")
