"""The hands with real guests, errands and files: what each step asks for, and what is said if it cannot."""

import contextlib
import json
import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from tests.guests import REGISTER, ROOT, TORCH, Program, wait_for

from gpuwatch.clock import ManualClock
from gpuwatch.config import ACTIONS, ServerSettings
from gpuwatch.errors import ServerError
from gpuwatch.records import ErrandPhase, Revision, Step
from gpuwatch.servers import Errands, Hands, Task
from gpuwatch.servers.revisions import Revisions
from gpuwatch.sources import local_session

DOOR = "import gpuwatch.guest.admission as a\na.Admission(None)\n" + REGISTER
RUNNING, DONE, FAILED = ErrandPhase.RUNNING, ErrandPhase.DONE, ErrandPhase.FAILED
STEP = {"within_ms": 60_000}


class Route(BaseHTTPRequestHandler):
    """Answers each path of `server.answers` with (status, text), any other with 404."""

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append(self.path)
        status, text = self.server.answers.get(self.path, (404, '{"detail":"Not Found"}'))
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def routes():
    with ThreadingHTTPServer(("127.0.0.1", 0), Route) as server:
        server.answers, server.asked = {}, []
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


class Supervisor:
    def __init__(self):
        self.asked = []

    def do(self, step, *, since_ms, now_ms):
        self.asked.append((step.action, since_ms, now_ms))


class Host:
    """A server of made-up processes, and the hands that touch it."""

    def __init__(self, root, url="http://127.0.0.1:9", **settings):
        self.guests = root / "guests"
        self.guests.mkdir()
        self.members, self.supervisor, self.made = [], Supervisor(), {}
        self.python, self.clock, self.session = sys.executable, ManualClock(1000), local_session()
        self.revisions = Revisions("vllm", root / "revisions")
        self.errands = Errands(folder=root / "errands")
        self.settings = ServerSettings(name="vllm", url=url, **settings)

    def hands(self, **more):
        parts = {
            "guests": self.guests,
            "errands": self.errands,
            "revisions": self.revisions,
            "members": lambda: self.members,
            "python": lambda: self.python,
            "revision_of": self.made.get,
            "session": self.session,
            "capture": (sys.executable, "-c", "import sys; print(*sys.argv[1:])"),
            "time": self.clock,
        }
        return Hands(self.settings, self.supervisor, **{**parts, **more})

    def do(self, action, at_ms=0, step=None, **args):
        """One asking, `at_ms` after the step began."""
        args = {name: str(value) for name, value in args.items()}
        task = Task(id="p1", key=f"p1-{action}", since_ms=1000, alert="Alert")
        asked = Step(action=action, args=args, **(step or STEP))
        return self.hands().do(asked, task, 1000 + at_ms)

    def ended(self, action):
        hands = self.hands()
        return wait_for(lambda: (e := hands.errands()[f"p1-{action}"]).phase is not RUNNING and e)

    def limits(self, program):
        """Those in force in a process, its door's among them."""
        figures = program.ask()
        return {"admission": figures.get("admission", {}).get("limit")}


@pytest.fixture
def host(tmp_path, routes):
    made = Host(tmp_path, routes.url)
    yield made
    made.clock.advance(1 << 50)
    for key in made.hands().errands():
        made.ended(key.removeprefix("p1-"))


@contextlib.contextmanager
def api(host, script=DOOR):
    with Program(host.guests, script) as program:
        wait_for(program.socket.exists)
        host.members.append(program.pid)
        yield program


# -- limits ----------------------------------------------------------------------------------------------


def test_a_limit_is_shared_out_among_the_doors_and_lapses_within_30_seconds(host):
    with api(host) as first, api(host) as second, api(host, REGISTER) as engine:
        host.do("limit_admission", limit=5)
        assert sorted(host.limits(p)["admission"] for p in (first, second)) == [2, 3]
        assert "admission" not in engine.ask()
        first.do("from gpuwatch.guest.limits import HELD; import time")
        left_s = float(first.do("print(HELD.limits.until_s - time.monotonic())"))
        assert 20 < left_s <= 30


def test_processes_of_another_server_are_left_alone(host):
    with api(host) as own, api(host) as stranger:
        host.members = [own.pid]
        host.do("limit_admission", limit=1)
        assert (host.limits(own)["admission"], host.limits(stranger)["admission"]) == (1, None)


SCHEDULER = """
import sys, types
from tests import fake_scheduler
fake_scheduler.install(fake_scheduler.ApartScheduler)
scheduler = fake_scheduler.ApartScheduler()
"""


def test_of_an_engine_one_limit_is_changed_the_others_stay_and_a_lift_ends_both(host):
    with api(host, SCHEDULER + REGISTER) as engine, api(host) as door:
        engine.limit(running=5, tokens=64)
        engine.do("scheduler.step()")
        host.do("limit_running", limit=2)
        assert engine.ask()["engine"]["limits"] == {"running": 2, "tokens": 64}
        host.do("limit_admission", limit=9)
        assert engine.ask()["engine"]["limits"] == {"running": 2, "tokens": 64}
        assert host.limits(door)["admission"] == 9
        host.do("lift")
        assert engine.ask()["engine"]["limits"] == {"tokens": 64}
        assert host.limits(door)["admission"] is None


def test_a_limit_on_the_door_replaces_an_older_one_and_a_lift_ends_it(host):
    with api(host) as program:
        program.limit(admission=9)
        held = (
            "from gpuwatch.guest.limits import HELD; l = HELD.limits; print(l.running, l.tokens, l.admission)"
        )
        host.do("limit_admission", limit=2)
        assert program.do(held).split()[2] == "2"
        host.do("lift")
        assert program.do(held).split()[2] == "None"


def test_hold_asks_again_for_what_it_names_even_if_it_had_lapsed(host):
    with api(host) as program:
        host.do("hold", for_ms=60_000, limit_admission=3)
        assert host.limits(program)["admission"] == 3
        host.do("hold", for_ms=60_000)
        assert host.limits(program)["admission"] == 3


def test_a_limit_that_nobody_can_keep_is_an_error_that_says_why(host):
    with pytest.raises(ServerError, match="no process of it has a guest"):
        host.do("limit_running", limit=2)
    with api(host), pytest.raises(ServerError, match="limit_running of vllm: ") as caught:
        host.do("limit_running", limit=2)
    assert not caught.value.permanent, "an engine may be known one asking later"


def test_a_guest_that_hangs_holds_up_nobody(host):
    with api(host) as hangs, api(host) as answers:
        hangs.stop()
        host.do("limit_admission", limit=0)
        assert host.limits(answers)["admission"] == 0


def test_a_folder_of_guests_that_cannot_be_read_is_an_error_with_a_cure(host):
    host.guests.rmdir()
    host.guests.write_text("")
    with pytest.raises(ServerError, match="to cure it"):
        host.do("lift")
    host.do("start")


# -- drain and door ----------------------------------------------------------------------------------------


def test_a_drain_closes_the_door_and_renews_it(host):
    with api(host) as program:
        assert host.do("drain") == {}
        assert host.limits(program)["admission"] == 0
        program.limit()
        assert host.limits(program)["admission"] is None
        host.do("drain", at_ms=44_999)
        assert host.limits(program)["admission"] == 0


ENGINE = """
import asyncio, threading
from types import SimpleNamespace
import gpuwatch.guest.admission as a
class App: pass
class Engine:
    output_processor = SimpleNamespace(request_states={"r1": None, "r2": None})
    async def abort(self, ids, internal=False): self.output_processor.request_states.clear()
async def nothing(*_): pass
async def serve():
    global app
    app = App(); app.state = SimpleNamespace(engine_client=Engine())
    app.state.engine_client.output_handler = asyncio.create_task(asyncio.sleep(1000))
    await a.Admission(nothing)({"type": "lifespan", "app": app}, None, None)
    up.set()
    await asyncio.sleep(1000)
up = threading.Event()
threading.Thread(target=lambda: asyncio.run(serve()), daemon=True).start()
up.wait()
"""


def test_in_the_last_quarter_of_its_time_a_drain_aborts_what_is_left(host, routes):
    with api(host, ENGINE + REGISTER) as program:
        hands = host.hands()
        task = Task(id="p1", key="p1-drain", since_ms=0, alert="A")
        step = Step(action="drain", **STEP)
        heard = [hands.do(step, task, at_ms) for at_ms in (44_999, 45_000, 50_000)]
        assert heard == [{}, {"aborted": "2"}, {"aborted": "2"}]
        assert program.do("print(len(app.state.engine_client.output_processor.request_states))") == "0"
    assert routes.asked == [], "a guest did it"


def test_without_a_guest_that_can_abort_vllms_own_route_is_asked(host, routes):
    routes.answers["/abort_requests"] = 200, '{"aborted": 3}'
    with api(host):
        assert host.do("drain", at_ms=50_000) == {"aborted": "3"}
    assert routes.asked == ["/abort_requests"]


@pytest.mark.parametrize("answer", [(404, "{}"), (200, "no JSON"), (200, "[]"), (200, '{"aborted": "all"}')])
def test_without_that_route_either_the_rest_is_left_to_the_stop(host, routes, answer):
    routes.answers["/abort_requests"] = answer
    assert host.do("drain", at_ms=50_000) == {"aborted": "0"}


def test_the_door_opens_in_stages_and_then_stands_open(host):
    with api(host) as program:
        seen = []
        for at_ms in (0, 4_999, 5_000, 10_000, 14_999, 15_000, 99_000):
            host.do("open_door", at_ms=at_ms)
            seen.append(host.limits(program)["admission"])
    assert seen == [4, 4, 16, 64, 64, None, None]


@pytest.mark.parametrize("action", ["start", "canary"])
def test_a_server_that_comes_up_has_a_narrow_door_from_the_first(host, action):
    with api(host) as program:
        host.do(action)
        assert host.limits(program)["admission"] == 4


# -- the supervisor ----------------------------------------------------------------------------------------


def test_stop_and_start_are_the_supervisors(host):
    host.do("stop", at_ms=5)
    host.do("start", at_ms=7)
    assert host.supervisor.asked == [("stop", 1000, 1005), ("start", 1000, 1007)]


def test_without_a_supervisor_nothing_can_be_stopped(host):
    host.supervisor = None
    with pytest.raises(ServerError, match=r"servers\[\].supervisor") as caught:
        host.do("stop")
    assert caught.value.permanent


def test_what_others_bring_about_is_asked_of_nobody(host):
    assert host.do("await_memory") == {}
    assert host.supervisor.asked == []


# -- memory ------------------------------------------------------------------------------------------------

MIB = 2**20
CUDA = TORCH.format(f"gpus=1, total_bytes=100 * {MIB}") + REGISTER


def test_cached_memory_is_released_by_all_processes_that_use_a_gpu(host):
    with api(host, CUDA) as engine, api(host, CUDA) as worker, api(host):
        for program in (engine, worker):
            program.do("torch.cuda.allocate(0, 60 * 2**20); torch.cuda.free(0, 50 * 2**20)")
        assert host.do("release_cache") == {"done": "yes", "freed_bytes": str(100 * MIB)}


def test_a_release_that_a_guest_refuses_has_failed_and_one_that_it_does_not_answer_is_asked_again(host):
    with api(host, CUDA) as engine:
        engine.do("torch.cuda.allocate(0, 60 * 2**20); torch.cuda.empty_cache = lambda: 1 / 0")
        assert "ZeroDivisionError" in host.do("release_cache")["failed"]
        engine.stop()
        with pytest.raises(ServerError, match="no answer within") as caught:
            host.do("release_cache")
        assert not caught.value.permanent
    host.members.clear()
    with pytest.raises(ServerError, match="no process of it that uses a GPU has a guest"):
        host.do("release_cache")


@pytest.mark.parametrize(
    ("action", "path"),
    [
        ("reset_prefix_cache", "/reset_prefix_cache"),
        ("sleep", "/sleep?level=1"),
        ("wake", "/wake_up"),
    ],
)
def test_routes_are_asked_by_an_errand_once(host, routes, action, path):
    routes.answers[path] = 200, '{"success": true}'
    for at_ms in (0, 1, 2):
        host.do(action, at_ms=at_ms)
    assert host.ended(action).phase is DONE
    host.do(action)
    assert routes.asked == [path]


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ((404, "{}"), "VLLM_SERVER_DEV_MODE=1"),
        ((500, "no pool"), "HTTP 500 no pool"),
        ((200, '{"success": false}'), "requests are in hand"),
    ],
)
def test_a_route_that_does_not_do_it_fails_the_errand_with_the_reason(host, routes, answer, why):
    routes.answers["/reset_prefix_cache"] = answer
    host.do("reset_prefix_cache")
    errand = host.ended("reset_prefix_cache")
    assert errand.phase is FAILED
    assert why in errand.detail


def test_a_server_that_does_not_listen_fails_the_errand(tmp_path):
    host = Host(tmp_path)
    host.do("wake")
    assert "refused" in host.ended("wake").detail


# -- settings ----------------------------------------------------------------------------------------------

SEVEN = Revision(
    server="vllm", number=7, arguments={"model": "m", "max_num_seqs": 8}, created_at_ms=0, by="me"
)
CHECKER = """#!/bin/sh
echo '{"ok": true, "file": "'$3'", "script": "'$1'", "mine": "'$VLLM_X$SECRET'"}'
"""


def test_a_check_writes_the_revision_and_runs_vllms_interpreter_on_it(tmp_path, routes, monkeypatch):
    monkeypatch.setenv("SECRET", "s3cret")
    supervisor = {"process": {"command": ["vllm"], "env": {"VLLM_X": "1"}}}
    host = Host(tmp_path, routes.url, supervisor=settings_of(supervisor))
    host.made[7] = SEVEN
    host.python = str(tmp_path / "python")
    (tmp_path / "python").write_text(CHECKER)
    (tmp_path / "python").chmod(0o755)
    host.do("check", revision=7)
    facts = host.ended("check").facts
    assert facts["file"] == str(host.revisions.path(7))
    assert facts["script"].endswith("offline.py")
    assert facts["mine"] == "1", "its own environment, and none of the daemon's secrets"
    assert host.hands().revision() is None


def settings_of(supervisor):
    import msgspec

    from gpuwatch.config import SupervisorSettings

    return msgspec.convert(supervisor, SupervisorSettings)


def test_a_swap_chooses_the_revision_however_often_it_is_asked(host):
    host.made[7] = SEVEN
    for _ in range(2):
        assert host.do("swap", revision=7) == {"file": "rev-0007.yaml"}
        assert host.hands().revision() == 7


def test_settings_that_cannot_be_had_are_refused_for_good_with_a_cure(host):
    host.made[7] = SEVEN
    cases = [("swap", {}, 8, "gpuwatch config log"), ("check", {"python": str}, 7, r"servers\[\].python")]
    cases.append(("swap", {"revisions": None}, 7, r"servers\[\].revisions"))
    for action, parts, number, cure in cases:
        step = Step(action=action, args={"revision": str(number)}, **STEP)
        with pytest.raises(ServerError, match=cure) as caught:
            host.hands(**parts).do(step, Task(id="p", key="p-x", since_ms=0, alert=""), 0)
        assert caught.value.permanent
    assert host.hands(revisions=None).revision() is None


# -- commands ----------------------------------------------------------------------------------------------


def test_a_capture_is_told_the_plan_and_the_processes(host):
    host.members = [41, 42]
    host.do("capture")
    assert host.ended("capture").detail == "--id p1 --pid 41 --pid 42 vllm"


def test_an_operators_command_finds_what_it_is_about_and_no_secret(host, monkeypatch):
    monkeypatch.setenv("SLACK_URL", "s3cret")
    script = 'echo "$GPUWATCH_SERVER $GPUWATCH_ALERT $GPUWATCH_ID $1"; env >&2; echo "[$SLACK_URL]"'
    host.do("run", command=json.dumps(["/bin/sh", "-c", script, "sh", "a b"]))
    errand = host.ended("run")
    out = (host.errands.folder / "p1-run" / "out").read_text()
    assert out.startswith("vllm Alert p1 a b\n")
    assert (errand.phase, errand.detail) == (DONE, "[]")
    assert "s3cret" not in out
    names = {line.partition("=")[0] for line in out.splitlines()[1:-1]}
    assert names <= {
        *os.environ,
        "GPUWATCH_SERVER",
        "GPUWATCH_ALERT",
        "GPUWATCH_ID",
        "GPUWATCH_ERRAND",
        "PWD",
        "_",
        "SHLVL",
    }


def test_a_command_that_is_not_named_cannot_be_run(host):
    with pytest.raises(ServerError, match="names none") as caught:
        host.do("run")
    assert caught.value.permanent


def test_a_command_that_is_late_is_ended(host):
    host.do("run", step={"within_ms": 5000}, command=json.dumps(["sleep", "1000"]))
    host.clock.advance(5000)
    assert host.ended("run").detail == "not done within 5 s"


# -- in general --------------------------------------------------------------------------------------------


def test_every_action_has_its_steps_and_a_step_that_is_unknown_is_refused_for_good(host):
    known = host.hands()._deeds.keys()
    steps = {
        *ACTIONS,
        "check",
        "stop",
        "await_memory",
        "swap",
        "start",
        "canary",
        "open_door",
        "hold",
        "lift",
        "sleep",
        "wake",
    }
    assert known == steps - {"restart", "reconfigure", "sleep_wake"}
    with pytest.raises(ServerError, match="no such step") as caught:
        host.do("dance")
    assert caught.value.permanent


def test_errands_that_cannot_be_read_are_none(host):
    host.errands.folder.write_text("")
    assert host.hands().errands() == {}


def test_post_runs_with_the_standard_library_alone():
    text = (ROOT / "daemon/gpuwatch/servers/post.py").read_text()
    assert "gpuwatch." not in text.replace("imports nothing of gpuwatch", "")
