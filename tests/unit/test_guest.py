"""The guest in a process of its own: what it says, that it starts nothing, and that it does no harm."""

import ast
import asyncio
import contextlib
import json
import math
import os
import signal
import socket
import stat
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests import fake_scheduler
from tests.fake_torch import MIB
from tests.guests import LOOP, REGISTER, ROOT, TORCH, Program, ask, environment, sockets, wait_for

from gpuwatch.guest import admission, client, limits, scheduler, wire

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
    known = "no more than figures, snapshot, stacks, release, limit, abort"
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


def taken(path):
    """What the file says, which is gone then."""
    event = json.loads(path.read_bytes())
    path.unlink()
    return event


def test_an_oom_is_on_disk_when_the_process_is_killed_in_the_next_moment(tmp_path):
    with Program(tmp_path, WITH_TORCH) as program:
        with_observer(program)
        program.begin(one_line(OOM_AND_DIE))
        assert program.process.wait(20) == -signal.SIGKILL
        event = taken(tmp_path / f"{program.pid}.oom")
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
        assert taken(path)["count"] == 2
        program.do(one_line(OOM))
        assert taken(path)["count"] == 1


def test_what_torch_raises_is_its_own_even_where_nothing_can_be_written(tmp_path):
    with Program(tmp_path, WITH_TORCH) as program:
        with_observer(program)
        program.do("os.environ['GPUWATCH_GUEST_DIR'] = '/absent'")
        assert program.do(one_line(OOM)) == f"Tried to allocate {90 * MIB} bytes"


def test_the_observer_is_attached_once_also_over_a_fork(tmp_path):
    with Program(tmp_path, WITH_TORCH) as program:
        with_observer(program)
        said = "print(len(torch.observers), flush=True)"
        program.do(f"import time; child = os.fork() or (time.sleep(3), {said}, os._exit(0))")
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

# -- live limits: the engine ---------------------------------------------------------------------------

ENGINE = """
import sys, types
from tests import fake_scheduler
fake_scheduler.install(fake_scheduler.{})
engine = types.SimpleNamespace(scheduler=fake_scheduler.{}())
scheduler = engine.scheduler
"""
OLD, NEW = ENGINE.format("Scheduler", "Scheduler"), ENGINE.format("ApartScheduler", "ApartScheduler")
# As vLLM's engine: the main thread is in a loop whose only variable is the engine.
BUSY_LOOP = """
sys.modules["vllm.v1.engine.core"] = types.ModuleType("vllm.v1.engine.core")
loop = '''
def run_busy_loop(self):
    exec(LOOP, globals())
'''
exec(compile(loop, "/venv/vllm/v1/engine/core.py", "exec"))
"""
IN_LOOP = f"{BUSY_LOOP}LOOP = {LOOP!r}\nrun_busy_loop(engine)\n"
UNTOUCHED = (
    "print(fake_scheduler.Scheduler.schedule.__qualname__, hasattr(type(scheduler).schedule, 'of_gpuwatch'))"
)


@pytest.fixture
def fresh():
    """No limit before, none after, and no vLLM."""
    yield
    limits.HELD.limits = limits.NONE
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        del sys.modules[name]


def hold(for_s=600, **asked):
    limits.HELD.take({"for_s": for_s, **asked})
    return scheduler.keep(limits.HELD.limits, may_have_engine=True)


@pytest.fixture(params=["Scheduler", "ApartScheduler"])
def engine(request, fresh):
    """A scheduler of each generation, of a class of its own: what the guest wraps stays so."""
    kind = type(request.param, (getattr(fake_scheduler, request.param),), {})
    fake_scheduler.install(kind)
    return kind()


def vllms_own(engine):
    gates = [getattr(engine, name, None) for name in ("max_num_running_reqs", "max_num_active_reqs")]
    return (*gates, engine.max_num_scheduled_tokens)


def test_a_cap_drains_as_requests_end_and_never_cuts_what_runs(engine):
    own = vllms_own(engine)
    engine.add(*(fake_scheduler.Request(most=4 + number) for number in range(8)))
    engine.add(*(fake_scheduler.Request(most=5) for _ in range(12)))
    engine.step()
    assert len(engine.running) == 8
    hold(running=2)
    running = []
    while engine.running or engine.waiting:
        engine.step()
        running.append(len(engine.running))
        assert vllms_own(engine) == own
    assert running == sorted(running[:7], reverse=True) + running[7:]
    assert max(running[7:]) == 2
    assert len(engine.finished) == 20


def test_lifted_or_lapsed_it_runs_as_many_as_before(engine):
    for end in (hold, lambda: setattr(limits.HELD, "limits", limits.Limits(running=2))):
        engine.add(*(fake_scheduler.Request(most=50) for _ in range(16)))
        assert hold(running=2) in (({"running": 2}, {}), ({}, {"running": NOT_YET}))
        engine.step()
        assert len(engine.running) == 2
        end()
        engine.step()
        assert len(engine.running) == 8
        engine.running, engine.waiting = [], []


NOT_YET = "no step of the engine was seen yet: ask again"


def test_a_cap_of_none_holds_all_and_lets_them_go_again(engine):
    engine.add(fake_scheduler.Request(), fake_scheduler.Request())
    hold(running=0)
    assert engine.step() == 0
    hold()
    engine.step()
    assert len(engine.running) == 2


def test_a_cap_above_vllms_own_changes_nothing(engine):
    engine.add(*(fake_scheduler.Request(most=9) for _ in range(20)))
    hold(running=100, tokens=10**6)
    engine.step()
    assert len(engine.running) == 8


def test_the_naive_cap_would_have_ended_the_engine():
    engine = fake_scheduler.Scheduler()
    engine.add(*(fake_scheduler.Request(most=9) for _ in range(4)))
    engine.step()
    engine.max_num_running_reqs = 1
    with pytest.raises(AssertionError):
        engine.step()


def test_a_cap_on_tokens_holds_in_each_step_and_prompts_get_through(engine):
    engine.add(*(fake_scheduler.Request(prompt=200, most=2) for _ in range(6)))
    hold(tokens=64)
    steps = []
    while engine.running or engine.waiting:
        steps.append(engine.step())
    assert max(steps) == 64
    assert len(engine.finished) == 6


def test_a_cap_on_tokens_leaves_decoding_and_a_block_of_a_prompt(engine):
    engine.num_spec_tokens = 3
    engine.add(*(fake_scheduler.Request(most=9) for _ in range(8)))
    engine.step()
    engine.add(fake_scheduler.Request(prompt=500))
    hold(tokens=1)
    hold(tokens=1)
    assert engine.step() == 8 * 4
    engine.running.pop()
    assert engine.step() == 7 * 4 + 16, "what decodes, and a block of the prompt"


@pytest.mark.parametrize(
    ("setting", "why"),
    [
        ("scheduler_config.enable_chunked_prefill = False", "chunked prefill is off"),
        ("need_mamba_block_aligned_split = True", "Mamba's blocks"),
        ("vllm_config.model_config.is_diffusion = True", "whole canvas"),
        ("__class__.max_num_encoder_input_tokens = 5", None),
    ],
)
def test_a_cap_on_tokens_that_could_hold_a_request_for_ever_is_refused(engine, setting, why):
    engine.scheduler_config = type("Config", (fake_scheduler._Config,), {})()
    exec(f"engine.{setting}")
    hold(running=7)
    engine.step()
    applied, lacks = hold(tokens=64, running=3)
    assert applied == ({"running": 3} if why else {"running": 3, "tokens": 64})
    assert (why in lacks["tokens"]) if why else lacks == {}


def test_images_that_are_not_split_refuse_a_cap_on_tokens(engine):
    engine.max_num_encoder_input_tokens = 5
    engine.scheduler_config = type("Config", (fake_scheduler._Config,), {"disable_chunked_mm_input": True})()
    hold(tokens=64)
    engine.step()
    assert "--disable-chunked-mm-input" in hold(tokens=64)[1]["tokens"]


def test_an_error_of_vllms_own_step_is_its_own_and_its_values_are_back(engine):
    own = vllms_own(engine)
    engine.may_admit = lambda: 1 / 0
    engine.add(fake_scheduler.Request())
    hold(running=1, tokens=64)
    with pytest.raises(ZeroDivisionError):
        engine.step()
    assert vllms_own(engine) == own


def test_sessions_that_wait_for_input_are_counted(engine):
    engine.num_waiting_for_streaming_input = 3
    engine.add(*(fake_scheduler.Request(most=9) for _ in range(9)))
    hold(running=2)
    engine.step()
    assert len(engine.running) <= 3


@given(
    st.sampled_from(["Scheduler", "ApartScheduler"]),
    st.integers(0, 4),
    st.lists(
        st.tuples(
            st.lists(st.tuples(st.integers(1, 300), st.integers(1, 6)), max_size=4),
            st.none() | st.integers(0, 12),
            st.none() | st.integers(1, 500),
        ),
        max_size=40,
    ),
)
def test_whatever_is_asked_when_no_step_fails_and_every_request_ends(kind, spec, story):
    kind = type(kind, (getattr(fake_scheduler, kind),), {})
    fake_scheduler.install(kind)
    engine = kind()
    engine.num_spec_tokens, own = spec, vllms_own(engine)
    try:
        for requests, running, tokens in story:
            engine.add(*(fake_scheduler.Request(*request) for request in requests))
            hold(running=running, tokens=tokens)
            before = len(engine.running)
            engine.step()
            assert vllms_own(engine) == own
            assert running is None or len(engine.running) <= max(running, before)
        hold()
        for _ in range(400):
            engine.step()
        assert (engine.running, engine.waiting) == ([], [])
    finally:
        hold()


def test_until_a_limit_is_asked_for_vllms_class_is_untouched(tmp_path):
    with Program(tmp_path, OLD + REGISTER + IN_LOOP) as program:
        program.ask()
        assert program.do(UNTOUCHED) == "Scheduler.schedule False"
        assert program.limit(running=2)["applied"] == {"running": 2}
        assert program.do(UNTOUCHED) == "Scheduler.schedule True"


@pytest.mark.parametrize("kind", [OLD, NEW])
def test_the_engine_tells_what_it_has_in_hand_and_whether_it_is_paused(tmp_path, kind):
    with Program(tmp_path, kind + REGISTER + IN_LOOP) as program:
        assert program.ask()["engine"] == {"running": 0, "waiting": 0, "paused": False, "limits": {}}
        program.do("scheduler.add(*(fake_scheduler.Request(most=99) for _ in range(12)))")
        program.do("scheduler.step(); scheduler._pause_state = fake_scheduler.PauseState.PAUSED_ALL")
        program.limit(running=3, tokens=100)
        assert program.ask()["engine"] == {
            "running": 8,
            "waiting": 4,
            "paused": True,
            "limits": {"running": 3, "tokens": 100},
        }
        program.limit()
        program.do("del scheduler._pause_state")
        engine = program.ask()["engine"]
        assert (engine["paused"], engine["limits"]) == (None, {})


def test_an_engine_that_is_not_the_main_threads_is_known_after_a_step_under_a_limit(tmp_path):
    with Program(tmp_path, NEW + REGISTER) as program:
        assert "engine" not in program.ask()
        assert program.limit(running=2)["lacks"] == {"running": NOT_YET}
        program.do("scheduler.step()")
        assert program.limit(running=2) == {
            **program.limit(running=2),
            "applied": {"running": 2},
            "lacks": {},
        }
        program.do("del scheduler, engine; import gc; gc.collect()")
        assert "engine" not in program.ask(), "it keeps nothing of vLLM's alive"


def test_a_limit_goes_over_a_fork_and_lapses_there_too(tmp_path):
    with Program(tmp_path, "import time\n" + NEW + REGISTER + IN_LOOP) as program:
        program.limit(running=2)
        program.begin("child = os.fork() or (time.sleep(1000), os._exit(0)); print('done', flush=True)")
        (child,) = wait_for(lambda: sockets(tmp_path) - {program.pid})
        try:
            assert ask(tmp_path / f"{child}.sock", "figures")["engine"]["limits"] == {"running": 2}
            ask(tmp_path / f"{child}.sock", "limit", running=2, for_s=0.01)
            wait_for(lambda: ask(tmp_path / f"{child}.sock", "figures")["engine"]["limits"] == {})
            assert program.ask()["engine"]["limits"] == {"running": 2}
        finally:
            os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize(
    "asked",
    [
        {"running": -1},
        {"running": True},
        {"running": 2.0},
        {"tokens": 0},
        {"admission": "3"},
        {"running": 2, "for_s": 0},
        {"running": 2, "for_s": 3601},
        {"running": 2, "for_s": None},
        {"running": 2**31},
    ],
)
def test_a_limit_that_is_none_is_refused_and_the_one_before_stays(tmp_path, asked):
    with Program(tmp_path, NEW + REGISTER + IN_LOOP) as program:
        program.limit(running=5)
        with pytest.raises(client.GuestError, match="must be"):
            program.limit(**asked)
        assert program.ask()["engine"]["limits"] == {"running": 5}


UNKNOWN = {
    "no attribute": ("scheduler.__dict__.clear(); scheduler.running = []", "max_num_running_reqs"),
    "another type": ("scheduler.max_num_active_reqs = scheduler.max_num_running_reqs = '8'", "is a str"),
    "its own schedule": (
        "scheduler.__class__ = type('Mine', (type(scheduler),), {'schedule': lambda self: {}})",
        "Mine has a schedule() of its own",
    ),
    "not Python": ("fake_scheduler.ApartScheduler.schedule = len", "with a schedule() in Python"),
    "no class": ("del sys.modules['vllm.v1.core.sched.scheduler'].Scheduler", "with a schedule() in Python"),
    "no module": ("del sys.modules['vllm.v1.core.sched.scheduler']", "with a schedule() in Python"),
}


@pytest.mark.parametrize(("change", "why"), UNKNOWN.values(), ids=UNKNOWN)
def test_a_vllm_that_it_does_not_know_is_read_and_left_as_it_is(tmp_path, change, why):
    with Program(tmp_path, NEW + REGISTER + f"{change}\n" + IN_LOOP) as program:
        program.do("before = dict(vars(scheduler)), type(scheduler).schedule")
        assert program.ask()["pid"] == program.pid
        answer = program.limit(running=2)
        assert answer["applied"] == {}
        assert why in answer["lacks"]["running"]
        assert program.do("print(before == (dict(vars(scheduler)), type(scheduler).schedule))") == "True"
        assert program.ask().get("engine", {}).get("limits", {}) == {}


def test_where_no_engine_is_there_is_nothing_to_cap_and_that_is_said(tmp_path):
    with Program(tmp_path) as program:
        lacks = program.limit(running=2, tokens=64, admission=3)["lacks"]
        assert lacks.keys() == {"running", "tokens", "admission"}
        assert "--middleware gpuwatch_guest.admission.Admission" in lacks["admission"]
        assert program.do("print('vllm' in sys.modules)") == "False"


# -- live limits: the API --------------------------------------------------------------------------------


class Api:
    """An ASGI application behind the door; each request stays until it is told to end."""

    def __init__(self):
        self.app, self.seen, self.end = admission.Admission(self), [], asyncio.Event()

    async def __call__(self, scope, receive, send):
        self.seen.append(scope["path"])
        await self.end.wait()
        await send({"type": "http.response.start", "status": 200, "headers": []})

    def request(self, path="/v1/completions", **scope):
        """The task, and what was sent."""
        sent = []

        async def receive():
            return {"type": "websocket.connect"}

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": path, **scope}
        return asyncio.create_task(self.app(scope, receive, send)), sent


def in_flight():
    return admission.figures()["admission"]


@pytest.fixture
def door(fresh):
    """One that nobody went through yet."""
    admission._DOOR.__init__()


WORK = """
/v1/completions /v1/chat/completions /v1/chat/completions/batch /v1/embeddings /v1/score /v1/rerank /v2/rerank
/v1/responses /v1/messages /v1/audio/transcriptions /v2/embed /inference/v1/generate /cohere/v2/chat
/invocations /pooling /score /rerank /classify /generative_scoring /generate /v1/systemone /v1/completions/
""".split()
NO_WORK = """
/health /metrics /tokenize /detokenize /v1/load_lora_adapter /v1/unload_lora_adapter /pause /resume /sleep
/wake_up /collective_rpc /abort_requests /v1/responses/resp_1/cancel /v1/messages/count_tokens /
/v1/completions/render /cohere/v2/chat/render /v1/chat/completions/derender /reset_prefix_cache
/fault_tolerance/apply /scale_elastic_ep
""".split()


def test_it_counts_what_works_the_engine_and_nothing_else(door):
    async def story():
        api = Api()
        tasks = [api.request(path)[0] for path in (*WORK, *NO_WORK)]
        tasks += [api.request(method=method)[0] for method in ("GET", "HEAD", "OPTIONS")]
        tasks += [api.request(type="lifespan")[0], api.request("/api/v1/completions", root_path="/api")[0]]
        await asyncio.sleep(0)
        assert len(api.seen) == len(tasks)
        assert in_flight() == {"in_flight": len(WORK) + 1, "limit": None, "refused": 0}
        api.end.set()
        await asyncio.gather(*tasks)
        assert in_flight()["in_flight"] == 0

    asyncio.run(story())


def test_above_the_limit_it_answers_503_and_those_within_finish(door):
    async def story():
        api = Api()
        running = [api.request() for _ in range(3)]
        await asyncio.sleep(0)
        limits.HELD.take({"admission": 2, "for_s": 60})
        refused, said = api.request()
        await refused
        start, body = said
        headers = dict(start["headers"])
        assert (start["status"], headers[b"retry-after"]) == (503, b"5")
        assert int(headers[b"content-length"]) == len(body["body"])
        assert json.loads(body["body"])["error"]["code"] == 503
        health, _ = api.request("/health", method="GET")
        api.end.set()
        await asyncio.gather(health, *(task for task, _ in running))
        assert [sent[0]["status"] for _, sent in running] == [200] * 3
        assert in_flight() == {"in_flight": 0, "limit": 2, "refused": 1}
        task, sent = api.request()
        await task
        assert sent[0]["status"] == 200

    asyncio.run(story())


def test_a_client_that_hangs_up_and_an_application_that_fails_are_no_more_in_flight(door):
    async def story():
        api = Api()
        gone, _ = api.request()
        await asyncio.sleep(0)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        api.end = None
        failed, _ = api.request()
        with pytest.raises(AttributeError):
            await failed
        assert in_flight()["in_flight"] == 0

    asyncio.run(story())


def test_a_websocket_is_counted_and_refused_before_it_is_accepted(door):
    async def story():
        api = Api()
        limits.HELD.take({"admission": 1, "for_s": 60})
        scope = {"type": "websocket", "method": None}
        first, _ = api.request("/v1/realtime", **scope)
        await asyncio.sleep(0)
        second, sent = api.request("/v1/realtime", **scope)
        await second
        assert sent == [{"type": "websocket.close", "code": 1013}]
        api.end.set()
        await first

    asyncio.run(story())


def test_closed_by_0_and_open_again_when_it_lapses(door):
    async def story():
        api = Api()
        api.end.set()
        for held, status in (
            (limits.Limits(admission=0, until_s=math.inf), 503),
            (limits.Limits(admission=0), 200),
        ):
            limits.HELD.limits = held
            task, sent = api.request()
            await task
            assert sent[0]["status"] == status

    asyncio.run(story())


def test_a_client_that_is_gone_before_it_is_refused_is_no_error(door):
    async def story():
        api = Api()
        limits.HELD.take({"admission": 0, "for_s": 60})

        async def gone(*_):
            raise OSError("gone")

        await api.app({"type": "http", "method": "POST", "path": "/v1/completions"}, gone, gone)

    asyncio.run(story())


def test_switched_off_the_door_stands_open_and_counts_nothing(door, monkeypatch):
    monkeypatch.setenv("GPUWATCH_GUEST", "0")

    async def story():
        api = Api()
        api.end.set()
        limits.HELD.take({"admission": 0, "for_s": 60})
        task, sent = api.request()
        await task
        assert sent[0]["status"] == 200
        assert admission.figures() == {}

    asyncio.run(story())


def test_the_door_is_limited_by_the_socket_and_tells_its_count(tmp_path):
    script = "import gpuwatch.guest.admission as a\ndoor = a.Admission(None)\n"  # before the guest's thread
    with Program(tmp_path, script + REGISTER) as program:
        assert program.ask()["admission"] == {"in_flight": 0, "limit": None, "refused": 0}
        answer = program.limit(admission=3, running=2)
        assert answer["applied"] == {"admission": 3}
        assert program.ask()["admission"]["limit"] == 3
        program.limit(admission=3, for_s=0.01)
        wait_for(lambda: program.ask()["admission"]["limit"] is None)


# -- the requests in flight --------------------------------------------------------------------------------

VLLM_API = """
import asyncio, threading
from types import SimpleNamespace
import gpuwatch.guest.admission as a

class Engine:
    def __init__(self, states, parents=()):
        self.asked = []
        self.output_processor = SimpleNamespace(request_states=dict.fromkeys(states))
        if parents:
            self.output_processor.parent_requests = {{
                name: SimpleNamespace(child_requests=set(children)) for name, children in parents}}
        self.output_handler = asyncio.get_running_loop().create_task(asyncio.sleep(1000))
    async def abort(self, request_id{takes}):
        self.asked.append((sorted(request_id), {given}, threading.current_thread().name))
        if not request_id: raise AssertionError
        self.output_processor.request_states.clear()
        self.output_processor.parent_requests = {{}}

class App: pass

async def nothing(*_): pass

async def serve():
    global app
    app = App()
    app.state = SimpleNamespace(engine_client=Engine({requests}))
    await a.Admission(nothing)({{"type": "lifespan", "app": app}}, None, None)
    threading.Event.set(up)
    await asyncio.sleep(1000)

up = threading.Event()
threading.Thread(target=lambda: asyncio.run(serve()), name="api", daemon=True).start()
up.wait()
"""


def api(requests, takes=", internal=False", given="internal"):
    return VLLM_API.format(requests=requests, takes=takes, given=given) + REGISTER


def test_all_requests_in_flight_are_aborted_on_the_apis_own_loop(tmp_path):
    with Program(tmp_path, api('["r1", "r2"]')) as program:
        assert program.ask("abort")["aborted"] == 2
        assert program.ask("abort")["aborted"] == 0
        assert program.do("print(app.state.engine_client.asked)") == "[(['r1', 'r2'], True, 'api')]"


def test_several_answers_of_one_request_are_aborted_by_their_parent(tmp_path):
    with Program(tmp_path, api('["r1", "0_p", "1_p"], {"p": ["0_p", "1_p"]}.items()')) as program:
        assert program.ask("abort")["aborted"] == 2
        assert program.do("print(app.state.engine_client.asked[0][0])") == "['p', 'r1']"


def test_a_vllm_whose_abort_knows_one_kind_of_name_is_told_no_other(tmp_path):
    with Program(tmp_path, api('["r1"]', takes="", given="None")) as program:
        assert program.ask("abort")["aborted"] == 1
        assert program.do("print(app.state.engine_client.asked)") == "[(['r1'], None, 'api')]"


NO_ENGINE = {
    "no door": (REGISTER, "--middleware gpuwatch_guest.admission.Admission"),
    "no request yet": (
        "import gpuwatch.guest.admission as a\na.Admission(None)\n" + REGISTER,
        "was seen here",
    ),
    "an application that is gone": (api('["r1"]') + "del app\n", "was seen here"),
    "no engine client": (api('["r1"]') + "del app.state.engine_client\n", "was seen here"),
    "another engine client": (
        api('["r1"]') + "del app.state.engine_client.output_processor\n",
        "no attribute",
    ),
    "an abort that fails": (
        api('["r1"]') + "app.state.engine_client.abort = lambda ids: 1 / 0\n",
        "ZeroDivision",
    ),
    "a loop that hangs": (
        api('["r1"]')
        + "import time\nloop = app.state.engine_client.output_handler.get_loop()\n"
        + "loop.call_soon_threadsafe(time.sleep, 1000)\n",
        "did not come to it within 0.4 s",
    ),
}


@pytest.mark.parametrize(("script", "why"), NO_ENGINE.values(), ids=NO_ENGINE)
def test_where_requests_cannot_be_aborted_the_reason_is_said_and_nothing_is_printed(tmp_path, script, why):
    with Program(tmp_path, script) as program:
        with pytest.raises(client.GuestError, match=why) as caught:
            program.ask("abort")
        assert caught.value.is_refusal
        assert program.ask()["pid"] == program.pid
        assert program.do("print(5)") == "5"


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
        *(f"gpuwatch.guest.{n}" for n in PARTS),
    }


PARTS = "abort admission allocator identity limits oom plugin scheduler stacks wire".split()
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
