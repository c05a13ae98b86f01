"""What every supervisor keeps to, tried on real processes; systemd's is tried in the acceptance box."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from tests.fake_docker import FakeDocker

from gpuwatch.config import ProcessSettings, ServerSettings, SupervisorSettings
from gpuwatch.errors import ServerError
from gpuwatch.records import Step, SupervisorPhase
from gpuwatch.servers import (
    SUPERVISORS,
    ProcessSupervisor,
    SystemdSupervisor,
    process_of,
    session,
    supervisor_of,
)
from gpuwatch.servers.docker import DockerSupervisor, Engine, Target

STANDIN = Path(__file__).parents[1] / "standin_vllm.py"
RESTART = Step(action="restart", within_ms=60_000)
ACTIVE, ACTIVATING, DEACTIVATING, AUTO_RESTART, INACTIVE, FAILED, _ = SupervisorPhase
PATIENCE_S = 20


def wait_until(question):
    deadline = time.monotonic() + PATIENCE_S
    while not question():
        assert time.monotonic() < deadline, f"never: {question.__name__}"
        time.sleep(0.02)


class Host:
    """A supervisor over a real stand-in, and a clock of its own: a cycle is as long as it says."""

    def __init__(self, folder, *options):
        self.folder = folder
        self.options = options
        self.now_ms = 1_000_000
        self.supervisor = self.new_supervisor()

    def new_supervisor(self, **changes):
        settings = {
            "name": "standin",
            "command": [sys.executable, str(STANDIN), "--port", "0", "--port-file", "port", *self.options],
            "state_dir": self.folder,
            "log_file": self.folder / "standin.log",
            "env": {"PATH": os.environ["PATH"]},
            "cwd": self.folder,
            "stop_timeout_ms": 5_000,
        }
        return ProcessSupervisor(**(settings | changes))

    def observe(self):
        return self.supervisor.observe(self.now_ms)

    def start(self):
        (self.folder / "port").unlink(missing_ok=True)
        self.supervisor.start(self.now_ms)
        return self.when(self.is_healthy)

    def cycle(self, since_ms):
        self.now_ms += 1_000
        self.supervisor.do(RESTART, since_ms=since_ms, now_ms=self.now_ms)

    def restart(self):
        """Ask every cycle, as the daemon does, until a new process is there."""
        self.now_ms += 1_000
        since_ms = self.now_ms

        def is_new():
            self.cycle(since_ms)
            return (self.observe().started_at_ms or 0) >= since_ms

        self.when(is_new)
        return since_ms

    def ask(self, action, since_ms):
        self.now_ms += 1_000
        self.supervisor.do(Step(action=action, within_ms=60_000), since_ms=since_ms, now_ms=self.now_ms)

    def until(self, action, question):
        """Ask for a step every cycle until this is so; gives back since when it was wished."""
        self.now_ms += 1_000
        self.since_ms = since_ms = self.now_ms

        def is_so():
            self.ask(action, since_ms)
            return question()

        wait_until(is_so)
        return since_ms

    def when(self, question):
        """Wait in real time, which the processes live in."""
        wait_until(question)
        return self.observe()

    def is_healthy(self):
        try:
            port = (self.folder / "port").read_text()
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1) as answer:
                return answer.status == 200
        except (OSError, ValueError):
            return False

    def is_gone(self):
        return self.observe().pid is None

    def members(self):
        """Living processes of this folder's server, whatever their session."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                marked = f"GPUWATCH_TEST={self.folder}".encode() in (entry / "environ").read_bytes()
                zombie = marked and ") Z " in (entry / "stat").read_text()
            except OSError:
                continue
            if marked and not zombie:
                found.append(int(entry.name))
        return sorted(found)

    def engine_pid(self):
        (main,) = [pid for pid in self.members() if pid == self.observe().pid]
        (engine,) = [pid for pid in self.members() if pid != main]
        return engine

    def clean_up(self):
        for pid in self.members():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not self.members())


def made(kind, tmp_path):
    """What makes hosts of a kind, and cleans up after them."""
    hosts = []

    def make(*options):
        host = kind(tmp_path, *options)
        if kind is Host:
            host.supervisor.env = {**host.supervisor.env, "GPUWATCH_TEST": str(tmp_path)}
        hosts.append(host)
        return host

    yield make
    for host in hosts:
        host.clean_up()


@pytest.fixture
def host_of(tmp_path):
    yield from made(Host, tmp_path)


@pytest.fixture
def host(host_of):
    return host_of()


def test_each_kind_of_supervisor_is_registered():
    assert set(SUPERVISORS) == {"docker", "process", "systemd"}


def test_settings_choose_the_supervisor(tmp_path):
    unit = ServerSettings(name="a", supervisor=SupervisorSettings(systemd="vllm.service"))
    assert supervisor_of(unit, tmp_path).unit == "vllm.service"
    process = SupervisorSettings(process=ProcessSettings(command=["sleep", "1"], env={"A": "b"}))
    made = supervisor_of(ServerSettings(name="b", supervisor=process), tmp_path)
    assert (made.name, made.command, made.env["A"]) == ("b", ["sleep", "1"], "b")
    with pytest.raises(ServerError, match="choose none"):
        supervisor_of(ServerSettings(name="c"), tmp_path)


def test_a_server_gets_neither_our_watchdog_nor_our_secrets_nor_our_python_options(tmp_path, monkeypatch):
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "CREDENTIALS_DIRECTORY", "PYTHONOPTIMIZE"):
        monkeypatch.setenv(name, "/run/ours")
    process = SupervisorSettings(process=ProcessSettings(command=["sleep", "1"]))
    made = process_of(ServerSettings(name="b", supervisor=process), tmp_path)
    assert "/run/ours" not in made.env.values()


def test_a_server_that_was_never_started_is_inactive(host):
    assert (host.observe().phase, host.observe().started_at_ms) == (INACTIVE, None)


def test_a_started_server_is_active_and_has_a_session_of_its_own(host):
    seen = host.start()
    assert (seen.phase, seen.started_at_ms) == (ACTIVE, host.now_ms)
    assert os.getsid(seen.pid) == seen.pid != os.getsid(0)


def test_starting_a_running_server_changes_nothing(host):
    pid = host.start().pid
    host.supervisor.start(host.now_ms + 1)
    assert host.observe().pid == pid


def test_its_output_is_appended_to_its_log(host):
    (host.folder / "standin.log").write_text("before\n")
    host.start()
    log = (host.folder / "standin.log").read_text()
    assert log.startswith("before\ngpuwatch: life of standin begins, 1000000\nINFO: EngineCore pid=")


def test_it_has_the_environment_that_was_given_and_no_other(host):
    pid = host.start().pid
    lines = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    assert {line.partition(b"=")[0] for line in lines if line} == {
        b"PATH",
        b"GPUWATCH_TEST",
        b"GPUWATCH_SERVER",
        b"GPUWATCH_START_ID",
    }


def test_a_restart_brings_exactly_one_new_process_and_leaves_none_of_the_old(host):
    old = host.start()
    before = set(host.members())
    host.restart()
    new = host.when(host.is_healthy)
    assert (new.phase, new.pid != old.pid) == (ACTIVE, True)
    assert not before & set(host.members())
    assert len(host.members()) == 2


def test_a_restart_that_is_asked_again_does_nothing_more(host):
    host.start()
    since_ms = host.restart()
    pid = host.when(host.is_healthy).pid
    for _ in range(20):
        host.cycle(since_ms)
    assert host.observe().pid == pid


def test_a_restart_that_died_again_is_not_repeated(host):
    host.start()
    since_ms = host.restart()
    os.kill(host.when(host.is_healthy).pid, signal.SIGKILL)
    host.when(host.is_gone)
    for _ in range(20):
        host.cycle(since_ms)
    assert host.observe().pid is None
    assert host.observe().phase is FAILED


def test_the_death_of_the_engine_ends_the_server_with_status_0_and_a_restart_heals_it(host):
    host.start()
    os.kill(host.engine_pid(), signal.SIGKILL)
    dead = host.when(host.is_gone)
    assert (dead.phase, dead.stop_asked, dead.detail) == (INACTIVE, False, "exited with status 0")
    (host.folder / "port").unlink()
    host.restart()
    assert host.when(host.is_healthy).phase is ACTIVE


def test_the_orphans_of_a_dead_server_are_gone_before_the_new_one_comes(host):
    old = host.start()
    engine = host.engine_pid()
    os.kill(old.pid, signal.SIGKILL)
    dead = host.when(host.is_gone)
    assert dead.phase is FAILED
    assert dead.detail.startswith(f"killed by signal 9; its processes [{engine}]")
    with pytest.raises(ServerError, match="restart it instead"):
        host.supervisor.start(host.now_ms)
    host.restart()
    assert engine not in host.members()


def test_a_server_that_ignores_term_is_killed_after_the_timeout(host_of):
    host = host_of("--ignore-term")
    old = host.start()
    since_ms = host.now_ms = host.now_ms + 1_000
    host.supervisor.do(RESTART, since_ms=since_ms, now_ms=host.now_ms)
    assert host.observe().phase is DEACTIVATING
    for _ in range(4):
        host.cycle(since_ms)
    assert host.observe().pid == old.pid
    host.cycle(since_ms)
    host.when(host.is_gone)
    host.cycle(since_ms)
    assert host.observe().started_at_ms >= since_ms


def test_an_old_term_that_was_swallowed_does_not_shorten_the_next_stop(host_of):
    host = host_of("--ignore-term")
    old = host.start()
    host.cycle(since_ms=host.now_ms + 1_000)
    host.now_ms += 3_600_000
    assert host.observe().phase is ACTIVE
    host.cycle(since_ms=host.now_ms)
    assert host.observe().pid == old.pid
    assert host.observe().phase is DEACTIVATING


def test_a_stop_by_an_operator_is_told_from_a_death(host):
    host.start()

    def is_over():
        host.supervisor.stop(host.now_ms)
        return host.is_gone()

    stopped = host.when(is_over)
    assert (stopped.phase, stopped.stop_asked) == (INACTIVE, True)
    assert host.start().stop_asked is False


def test_a_new_daemon_adopts_the_server_of_the_last(host):
    old = host.start()
    host.supervisor = host.new_supervisor(env=host.supervisor.env)
    assert host.observe() == old
    host.restart()
    assert host.when(host.is_healthy).pid != old.pid


def test_a_daemon_that_died_between_start_and_note_does_not_start_twice(host):
    old = host.start()
    state = host.folder / "process-standin.json"
    life = host.supervisor._load()
    state.write_text(
        f'{{"start_id": "{life.start_id}", "started_at_ms": {life.started_at_ms}, "leader": null}}'
    )
    host.supervisor.do(RESTART, since_ms=life.started_at_ms, now_ms=host.now_ms)
    assert host.observe().pid == old.pid
    assert len(host.members()) == 2


def test_a_daemon_that_died_before_the_start_starts_it(host):
    (host.folder / "process-standin.json").write_text(
        f'{{"start_id": "none has it", "started_at_ms": {host.now_ms}, "leader": null}}'
    )
    host.supervisor.do(RESTART, since_ms=host.now_ms, now_ms=host.now_ms)
    assert host.when(host.is_healthy).phase is ACTIVE


def test_the_server_outlives_a_daemon_that_is_killed(host):
    """The daemon is a process of its own here, and is ended as the kernel would."""
    daemon = subprocess.Popen(
        [sys.executable, "-c", DAEMON, str(host.folder), *host.supervisor.command], stdout=subprocess.PIPE
    )
    pid = int(daemon.stdout.readline())
    daemon.kill()
    daemon.wait()
    daemon.stdout.close()
    host.when(host.is_healthy)
    assert (host.observe().phase, host.observe().pid) == (ACTIVE, pid)
    os.kill(pid, signal.SIGKILL)
    assert host.when(host.is_gone).phase is FAILED


DAEMON = """
import os, pathlib, sys, time
from gpuwatch.servers import ProcessSupervisor
folder = pathlib.Path(sys.argv[1])
env = {"PATH": os.environ["PATH"], "GPUWATCH_TEST": str(folder)}
s = ProcessSupervisor(
    name="standin", command=sys.argv[2:], state_dir=folder, log_file=folder / "standin.log",
    env=env, cwd=folder,
)
s.start(1_000_000)
print(s.observe(1_000_000).pid, flush=True)
time.sleep(60)
"""


def test_another_process_with_the_same_number_is_not_ours(host):
    seen = host.start()
    ours = host.supervisor._load().leader
    assert session.is_alive(ours)
    for other in (
        session.Leader(pid=seen.pid, start_ticks=ours.start_ticks - 1, boot_id=ours.boot_id),
        session.Leader(pid=seen.pid, start_ticks=ours.start_ticks, boot_id="the boot before"),
    ):
        assert not session.is_alive(other)
        assert session.members(other) == []


def test_what_cannot_be_started_says_so_and_how_to_cure_it(host):
    host.supervisor = host.new_supervisor(command=["no-such-vllm"])
    with pytest.raises(ServerError, match=r"'no-such-vllm' is no program.*full path") as error:
        host.supervisor.start(host.now_ms)
    assert error.value.permanent
    host.supervisor = host.new_supervisor(log_file=host.folder / "absent" / "x.log")
    with pytest.raises(ServerError, match="can be written"):
        host.supervisor.start(host.now_ms)
    assert host.observe().started_at_ms is None


def test_a_state_file_that_cannot_be_read_is_named(host):
    (host.folder / "process-standin.json").write_text("{")
    with pytest.raises(ServerError, match=r"process-standin\.json"):
        host.observe()


def test_two_gpuwatches_take_turns(host):
    with host.new_supervisor()._locked(), pytest.raises(ServerError, match="another gpuwatch"):
        host.observe()
    host.observe()


@pytest.mark.parametrize("make", [lambda _: SystemdSupervisor("vllm.service"), lambda h: h.supervisor])
def test_an_unknown_step_is_refused_for_good(make, host):
    with pytest.raises(ServerError, match="knows only restart, stop, start") as error:
        make(host).do(Step(action="dance", within_ms=1), since_ms=0, now_ms=0)
    assert error.value.permanent


def test_a_start_waits_for_what_is_left_of_the_last_one(host):
    old = host.start()
    engine = host.engine_pid()
    os.kill(old.pid, signal.SIGKILL)
    host.when(host.is_gone)
    since_ms = host.now_ms = host.now_ms + 1_000
    with pytest.raises(ServerError, match=rf"processes \[{engine}\] of the last one still run") as error:
        host.ask("start", since_ms)
    assert not error.value.permanent
    host.until("stop", lambda: not host.members())
    host.until("start", host.is_healthy)


def test_a_stop_that_was_swallowed_is_taken_back_by_a_start(host_of):
    host = host_of("--ignore-term")
    pid = host.start().pid
    since_ms = host.now_ms = host.now_ms + 1_000
    host.ask("stop", since_ms)
    host.now_ms += 3_600_000
    host.ask("start", since_ms)
    seen = host.observe()
    assert (seen.phase, seen.stop_asked, seen.pid) == (ACTIVE, False, pid)


# What holds of stop and start as steps of their own, over every supervisor; of systemd in the box.


class Container(Host):
    """The same stand-in in a container of an engine that behaves; its clock is the world's."""

    def __init__(self, folder, *options):
        self.engine = FakeDocker(folder / "docker.sock").up()
        command = [sys.executable, str(STANDIN), "--port", "0", "--port-file", "port", *options]
        env = {"PATH": os.environ["PATH"], "GPUWATCH_TEST": str(folder)}
        self.container = self.engine.container("vllm", command, env=env, cwd=folder)
        super().__init__(folder, *options)
        self.stop_timeout_ms = 1_000

    @property
    def now_ms(self):
        return time.time_ns() // 1_000_000

    @now_ms.setter
    def now_ms(self, _):
        """Time passes by itself."""

    def new_supervisor(self, **changes):
        target, engine = Target("vllm"), Engine(self.folder / "docker.sock")
        return DockerSupervisor(target, engine, stop_timeout_ms=getattr(self, "stop_timeout_ms", 5_000))

    def start(self):
        (self.folder / "port").unlink(missing_ok=True)
        self.container.start()
        return self.when(self.is_healthy)

    def clean_up(self):
        self.container.policy = "no"
        super().clean_up()
        self.engine.down()


@pytest.fixture(params=[Host, Container])
def any_of(request, tmp_path):
    yield from made(request.param, tmp_path)


@pytest.fixture
def any_host(any_of):
    return any_of()


def test_a_stop_leaves_nothing_running_and_is_seen_as_asked_for(any_host):
    any_host.start()
    any_host.until("stop", any_host.is_gone)
    seen = any_host.observe()
    assert (seen.phase, seen.stop_asked, seen.pid) == (INACTIVE, True, None)
    assert any_host.members() == []


def test_what_a_dead_server_left_is_stopped_and_its_death_remains_one(any_host):
    os.kill(any_host.start().pid, signal.SIGKILL)
    any_host.when(any_host.is_gone)
    any_host.until("stop", lambda: not any_host.members())
    assert not any_host.observe().stop_asked


def test_while_a_stop_is_under_way_the_server_is_deactivating(any_of):
    host = any_of("--ignore-term")
    host.start()
    host.ask("stop", host.now_ms)
    wait_until(lambda: host.observe().stop_asked)
    assert host.observe().phase is DEACTIVATING


def test_a_server_that_ignores_a_stop_is_killed_with_all_its_processes(any_of):
    host = any_of("--ignore-term")
    host.start()
    host.until("stop", host.is_gone)
    assert host.members() == []


def test_a_stop_that_is_asked_again_does_nothing_to_a_server_that_was_stopped(any_host):
    any_host.start()
    since_ms = any_host.until("stop", any_host.is_gone)
    before = any_host.observe()
    for _ in range(5):
        any_host.ask("stop", since_ms)
    assert any_host.observe() == before


def test_a_start_brings_one_new_process_however_often_it_is_asked(any_host):
    old = any_host.start()
    any_host.until("stop", any_host.is_gone)
    (any_host.folder / "port").unlink()
    since_ms = any_host.until("start", any_host.is_healthy)
    new = any_host.observe()
    for _ in range(5):
        any_host.ask("start", since_ms)
    assert any_host.observe() == new
    assert (new.phase, new.stop_asked, new.pid != old.pid) == (ACTIVE, False, True)
    assert new.started_at_ms >= since_ms
    assert len(any_host.members()) == 2


def test_a_start_that_died_again_is_not_repeated(any_host):
    any_host.start()
    any_host.until("stop", any_host.is_gone)
    (any_host.folder / "port").unlink()
    since_ms = any_host.until("start", any_host.is_healthy)
    os.kill(any_host.observe().pid, signal.SIGKILL)
    any_host.when(any_host.is_gone)
    for _ in range(5):
        any_host.ask("start", since_ms)
    seen = any_host.observe()
    assert (seen.phase, seen.stop_asked, seen.pid) == (FAILED, False, None)


def test_a_start_leaves_a_server_that_runs_as_it_is(any_host):
    before = any_host.start()
    for _ in range(3):
        any_host.ask("start", any_host.now_ms + 1)
    assert any_host.observe() == before


def test_a_daemon_that_died_between_stop_and_start_goes_on_with_either(any_host):
    any_host.start()
    since_ms = any_host.until("stop", any_host.is_gone)
    env = getattr(any_host.supervisor, "env", None)
    any_host.supervisor = any_host.new_supervisor(**({"env": env} if env else {}))
    any_host.ask("stop", since_ms)
    assert (any_host.observe().phase, any_host.observe().stop_asked) == (INACTIVE, True)
    (any_host.folder / "port").unlink()
    any_host.until("start", any_host.is_healthy)
    assert any_host.observe().stop_asked is False


def test_a_restart_is_a_stop_and_a_start_of_one_wish(any_host):
    old = any_host.start()
    (any_host.folder / "port").unlink()
    since_ms = any_host.until("restart", lambda: (any_host.observe().started_at_ms or 0) >= any_host.since_ms)
    new = any_host.when(any_host.is_healthy)
    assert (new.phase, new.stop_asked, new.pid != old.pid) == (ACTIVE, False, True)
    for _ in range(5):
        any_host.ask("restart", since_ms)
    assert any_host.observe() == new


def test_a_host_without_a_system_bus_is_a_passing_fault_with_a_cure(tmp_path):
    supervisor = SystemdSupervisor("vllm.service", bus_address=f"unix:path={tmp_path}/bus")
    with pytest.raises(ServerError, match="systemctl status dbus") as error:
        supervisor.observe(0)
    assert not error.value.permanent
