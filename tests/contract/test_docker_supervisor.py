"""What holds of a container beyond what every supervisor keeps to, against an engine that behaves."""

import contextlib
import gc
import os
import signal
import subprocess
import sys
import time

import pytest
from tests.fake_docker import FakeDocker

from gpuwatch.config import DockerSettings, ServerSettings, SupervisorSettings
from gpuwatch.errors import ServerError
from gpuwatch.records import Step, SupervisorPhase
from gpuwatch.servers import start_watch_of, supervisor_of
from gpuwatch.servers.docker import DockerSupervisor, Engine, Target
from gpuwatch.servers.starts.log import DockerLog

ACTIVE, ACTIVATING, DEACTIVATING, AUTO_RESTART, INACTIVE, FAILED, UNKNOWN = SupervisorPhase
SLEEP = ["/bin/sleep", "600"]
DEAF = ["/bin/sh", "-c", "trap '' TERM; echo deaf; while :; do sleep 0.1; done"]
LABELS = {"com.docker.compose.project": "ai", "com.docker.compose.service": "vllm"}
PATIENCE_S = 20


def wait_until(question):
    deadline = time.monotonic() + PATIENCE_S
    while not question():
        assert time.monotonic() < deadline, "never"
        time.sleep(0.02)


def now_ms():
    return time.time_ns() // 1_000_000


class Host:
    """An engine, and a supervisor of its container `vllm`."""

    def __init__(self, folder):
        self.socket = folder / "docker.sock"
        self.docker = FakeDocker(self.socket).up()
        self.supervisor = self.new_supervisor()

    def new_supervisor(self, target=None, stop_timeout_ms=500):
        target = target or Target("vllm")
        return DockerSupervisor(target, Engine(self.socket), stop_timeout_ms=stop_timeout_ms)

    def run(self, command=SLEEP, name="vllm", **options):
        container = self.docker.container(name, command, **options)
        container.start()
        return container

    def observe(self):
        return self.supervisor.observe(now_ms())

    def is_gone(self):
        return self.observe().pid is None

    def ask(self, action, since_ms):
        self.supervisor.do(Step(action=action, within_ms=60_000), since_ms=since_ms, now_ms=now_ms())

    def until(self, action, question):
        since_ms = now_ms()

        def is_so():
            self.ask(action, since_ms)
            return question()

        wait_until(is_so)
        return since_ms

    def flood(self):
        """As many events of others as the engine remembers."""
        other = self.docker.container("other", SLEEP)
        for _ in range(self.docker.events.maxlen):
            self.docker.note(other, "exec_start")

    def clean_up(self):
        for container in self.docker.containers:
            container.policy = "no"
            with contextlib.suppress(AttributeError, ProcessLookupError):
                os.killpg(container.process.pid, signal.SIGKILL)
        wait_until(lambda: all(c.status not in {"running", "restarting"} for c in self.docker.containers))
        self.docker.down()


@pytest.fixture
def host(tmp_path):
    host = Host(tmp_path)
    yield host
    host.clean_up()


# Which container.


def test_settings_choose_a_container_or_a_service(host, tmp_path):
    host.run(name="ai-vllm-1", labels=LABELS)
    for docker in (
        DockerSettings(container="ai-vllm-1", socket=host.socket),
        DockerSettings(project="ai", service="vllm", socket=host.socket),
    ):
        server = ServerSettings(name="a", supervisor=SupervisorSettings(docker=docker))
        assert supervisor_of(server, tmp_path).observe(now_ms()).phase is ACTIVE
        assert isinstance(start_watch_of(server, tmp_path)._log, DockerLog)


def test_a_one_off_container_of_a_service_is_not_its_server(host):
    host.run(name="ai-vllm-run-1", labels=LABELS | {"com.docker.compose.oneoff": "True"})
    server = host.run(name="ai-vllm-1", labels=LABELS | {"com.docker.compose.oneoff": "False"})
    host.supervisor = host.new_supervisor(Target("", "ai", "vllm"))
    assert host.observe().pid == server.process.pid


def test_a_service_with_two_containers_is_an_error_that_names_them(host):
    host.run(name="ai-vllm-1", labels=LABELS)
    host.run(name="ai-vllm-2", labels=LABELS)
    host.supervisor = host.new_supervisor(Target("", "ai", "vllm"))
    with pytest.raises(ServerError, match=r"service vllm of project ai: it has 2 .* ai-vllm-1, ai-vllm-2;"):
        host.observe()


@pytest.mark.parametrize("target", [Target("vllm"), Target("", "ai", "vllm")])
def test_a_container_that_is_absent_is_a_passing_error_that_names_what_there_is(host, target):
    host.run(name="ollama")
    host.supervisor = host.new_supervisor(target)
    with pytest.raises(ServerError, match="no such container; found ollama; create it") as error:
        host.observe()
    assert not error.value.permanent


def test_a_container_that_was_made_anew_is_the_same_server(host):
    host.run()
    host.observe()
    host.docker.containers[0].name = "old"
    assert host.run().process.pid == host.observe().pid


# What it says of a process.


def test_a_container_that_was_never_started_is_inactive(host):
    host.docker.container("vllm", SLEEP)
    seen = host.observe()
    assert (seen.phase, seen.started_at_ms, seen.stop_asked) == (INACTIVE, None, False)


def test_a_running_container_has_the_pid_of_the_host_and_its_start(host):
    before_ms = now_ms()
    container = host.run()
    seen = host.observe()
    assert (seen.phase, seen.pid, seen.detail) == (ACTIVE, container.process.pid, "running")
    assert before_ms <= seen.started_at_ms <= now_ms()


@pytest.mark.parametrize(
    ("command", "phase", "how"),
    [
        (["/bin/true"], INACTIVE, "exited with status 0"),
        (["/bin/sh", "-c", "exit 3"], FAILED, "exited with status 3"),
        (["/bin/sh", "-c", "kill -9 $$"], FAILED, "killed by signal 9"),
    ],
)
def test_a_process_that_ended_by_itself_is_no_stop_by_anybody(host, command, phase, how):
    host.run(command)
    wait_until(host.is_gone)
    seen = host.observe()
    assert (seen.phase, seen.stop_asked, seen.detail) == (phase, False, f"exited: {how}")


@pytest.mark.parametrize("stop", [lambda c: c.stop(5), lambda c: c.kill("SIGKILL"), lambda c: c.kill("15")])
def test_a_stop_and_a_kill_by_an_operator_are_told_from_a_death(host, stop):
    stop(host.run())
    wait_until(host.is_gone)
    seen = host.observe()
    assert (seen.phase, seen.stop_asked) == (INACTIVE, True)


def test_a_signal_with_another_meaning_is_no_stop(host):
    container = host.run(["/bin/sh", "-c", "trap : HUP; sleep 0.5 & while :; do wait; kill -9 $$; done"])
    container.kill("SIGHUP")
    assert host.observe().stop_asked is False
    wait_until(host.is_gone)
    assert (host.observe().phase, host.observe().stop_asked) == (FAILED, False)


def test_the_containers_own_stop_signal_is_a_stop(host):
    host.run(stop_signal="SIGUSR1").stop(5)
    assert host.observe().stop_asked


def test_a_stop_that_was_swallowed_long_ago_does_not_excuse_a_later_death(host):
    container = host.run(DEAF)
    wait_until(lambda: container.said)
    container.kill("SIGTERM")
    assert host.observe().phase is DEACTIVATING
    container.age(60)
    assert host.observe().phase is ACTIVE
    os.kill(container.process.pid, signal.SIGKILL)
    wait_until(host.is_gone)
    assert (host.observe().phase, host.observe().stop_asked) == (FAILED, False)


def test_a_new_life_has_nothing_of_the_stop_of_the_last(host):
    container = host.run()
    container.stop(5)
    container.start()
    assert (host.observe().phase, host.observe().stop_asked) == (ACTIVE, False)


def test_an_end_that_the_engine_no_longer_remembers_is_unknown_and_nothing_restarts_it(host):
    host.run(["/bin/true"])
    wait_until(lambda: host.docker.containers[0].status == "exited")
    host.flood()
    seen = host.observe()
    assert (seen.phase, seen.stop_asked) == (UNKNOWN, False)
    assert "no longer reach back" in seen.detail
    with pytest.raises(ServerError, match="start it yourself") as error:
        host.ask("restart", now_ms() + 1)
    assert error.value.permanent


def test_an_end_that_was_seen_stays_known_when_the_engine_forgets_it(host):
    host.run(["/bin/false"])
    wait_until(host.is_gone)
    before = host.observe()
    host.flood()
    assert host.observe() == before


@pytest.mark.parametrize("policy", ["always", "unless-stopped"])
def test_what_the_engine_always_restarts_rests_by_somebodys_wish(host, policy):
    host.run(policy=policy).stop(5)
    host.flood()
    assert (host.observe().phase, host.observe().stop_asked) == (INACTIVE, True)


def test_a_start_that_the_engine_failed_at_is_no_stop_by_anybody(host):
    container = host.run(["/bin/true"], policy="always", restart_after_s=600)
    wait_until(lambda: host.observe().phase is AUTO_RESTART)
    container.status, container.error = "exited", "nvidia-container-cli: device error"
    seen = host.observe()
    assert (seen.phase, seen.stop_asked) == (FAILED, False)
    assert "the engine says: nvidia-container-cli: device error" in seen.detail


def test_out_of_memory_is_told(host):
    container = host.run(["/bin/sh", "-c", "kill -9 $$"])
    wait_until(host.is_gone)
    container.oom_killed = True
    assert host.observe().detail == "exited: killed by signal 9, out of the host's memory"


def test_a_paused_container_is_somebodys_wish(host):
    host.run().status = "paused"
    assert (host.observe().phase, host.observe().stop_asked) == (ACTIVE, True)
    host.docker.containers[0].status = "running"
    assert host.observe().stop_asked is False


# Steps.


def test_what_the_engine_restarts_by_itself_is_left_to_it_but_a_stop_ends_that_too(host):
    container = host.run(["/bin/false"], policy="always", restart_after_s=600)
    wait_until(lambda: host.observe().phase is AUTO_RESTART)
    for action in ("restart", "start"):
        host.ask(action, now_ms() + 1)
    assert (container.starts, container.stops) == (1, 0)
    host.until("stop", lambda: host.observe().phase is INACTIVE)
    assert host.observe().stop_asked


@pytest.mark.parametrize("policy", ["always", "unless-stopped", "on-failure"])
def test_a_container_that_was_stopped_stays_so_whatever_its_restart_policy(host, policy):
    container = host.run(policy=policy)
    host.until("stop", host.is_gone)
    time.sleep(0.3)  # the engine restarts within 0.1
    assert (container.status, container.starts) == ("exited", 1)


def test_a_stop_is_asked_once_and_nobody_waits_for_it(host):
    container = host.run()
    container.stop_hangs_for_s = 0.5
    since_ms = now_ms()
    for _ in range(5):
        host.ask("stop", since_ms)
        assert container.status == "running"
    host.until("stop", host.is_gone)
    assert container.stops == 1


def test_a_stop_whose_kill_was_lost_with_an_older_gpuwatch_is_brought_to_its_end(host):
    container = host.run(DEAF)
    wait_until(lambda: container.said)
    since_ms = now_ms() - 7_000
    container.kill("SIGTERM")
    host.ask("stop", since_ms)
    assert (container.status, container.stops) == ("running", 0)
    container.age(7)

    def is_gone():
        host.ask("stop", since_ms)
        return host.is_gone()

    wait_until(is_gone)
    assert container.stops == 0


def test_a_start_that_fails_says_in_the_engines_words_why(host):
    container = host.docker.container("vllm", SLEEP)
    container.start_error = "could not select device driver with capabilities: [[gpu]]"
    with pytest.raises(
        ServerError, match=r"start vllm: the engine says 500: could not select device"
    ) as error:
        host.until("start", lambda: False)
    assert not error.value.permanent
    container.start_error = ""
    host.until("start", lambda: host.observe().phase is ACTIVE)


def test_a_container_that_its_operator_stopped_comes_by_a_start(host):
    container = host.run()
    container.stop(5)
    host.flood()
    host.until("start", lambda: host.observe().phase is ACTIVE)
    assert container.starts == 2


def test_an_unknown_step_is_refused_for_good(host):
    with pytest.raises(ServerError, match="knows only restart, stop, start") as error:
        host.ask("dance", 0)
    assert error.value.permanent


# The engine.


def test_a_socket_that_is_absent_is_a_passing_error_with_a_cure(tmp_path):
    supervisor = DockerSupervisor(Target("vllm"), Engine(tmp_path / "docker.sock"))
    with pytest.raises(ServerError, match=r"docker\.sock .*No such file.*; start Docker, or") as error:
        supervisor.observe(now_ms())
    assert not error.value.permanent


def test_a_socket_that_may_not_be_used_is_an_error_for_good_with_a_cure(host):
    host.socket.chmod(0)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)  # root may use any
        with pytest.raises(ServerError, match=r"Permission denied.*to the socket's group, docker") as error:
            host.observe()
    finally:
        os.seteuid(user)
    assert error.value.permanent


def test_an_engine_that_hangs_is_a_passing_error(host):
    host.run()
    host.observe()
    host.docker.hangs = True
    with pytest.raises(ServerError, match="systemctl status docker") as error:
        host.observe()
    assert not error.value.permanent
    host.docker.hangs = False


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_engine_that_was_restarted_is_met_again(host):
    before = (host.run(), host.observe())[1]
    host.docker.down()
    for _ in range(2):
        with pytest.raises(ServerError, match="start Docker"):
            host.observe()
    gc.collect()  # the package leaves a socket open that it could not connect
    host.docker.up()
    assert host.observe() == before


def test_an_engine_that_answers_otherwise_than_docker_is_an_error(host):
    host.run().inspected = lambda: {"Id": "1"}
    with pytest.raises(ServerError, match=r"look at vllm: the engine's answer is not as Docker's"):
        host.observe()


def test_the_newest_version_that_both_know_is_spoken(host):
    host.docker.api = ("1.24", "1.41")
    host.run()
    host.observe()
    assert host.docker.calls[-1] == "GET /v1.41/events"


def test_a_host_without_the_package_is_told_how_to_install_it(host, monkeypatch):
    monkeypatch.setitem(sys.modules, "docker", None)
    with pytest.raises(ServerError, match=r"pip install 'gpuwatch\[docker\]'") as error:
        host.observe()
    assert error.value.permanent


def test_the_package_is_loaded_by_no_host_without_containers():
    program = "import sys, gpuwatch.servers; print([m for m in sys.modules if m.startswith('docker')])"
    assert subprocess.check_output([sys.executable, "-c", program], text=True) == "[]\n"


# Its log.


def log_of(host):
    return DockerLog(Target("vllm"), Engine(host.socket))


@pytest.mark.parametrize("has_terminal", [False, True])
def test_a_log_gives_what_a_life_wrote_and_then_what_is_new(host, has_terminal):
    program = "trap 'echo three' USR1; echo one; echo two words >&2; while :; do sleep 0.05; done"
    container = host.run(["/bin/sh", "-c", program], has_terminal=has_terminal)
    began_ms, log = host.observe().started_at_ms, log_of(host)
    wait_until(lambda: len(container.said) == 2)
    assert sorted(log.lines(began_ms, None)) == ["one", "two words"]
    container.kill("SIGUSR1")
    wait_until(lambda: len(container.said) == 3)
    assert list(log.lines(began_ms, None))[-1] == "three"
    assert list(log.lines(began_ms, None)) == ["three"]


def test_each_life_has_its_own_lines(host):
    container = host.run(["/bin/sh", "-c", "echo $$; exec sleep 600"])
    wait_until(lambda: container.said)
    first, log = container.process.pid, log_of(host)
    first_ms = host.observe().started_at_ms
    container.stop(5)
    container.start()
    wait_until(lambda: len(container.said) == 2)
    second_ms = host.observe().started_at_ms
    assert list(log.lines(first_ms, second_ms)) == [str(first)]
    assert list(log.lines(second_ms, None)) == [str(container.process.pid)]


def test_a_piece_that_was_cut_off_is_left_for_the_next_look(host):
    container = host.docker.container("vllm", SLEEP)
    long = b"x" * 3_000_000 + b"\n"
    container.said = [(10**18, 1, b"first\n"), (10**18 + 1, 1, long), (10**18 + 2, 1, long)]
    log = log_of(host)
    assert [len(line) for line in log.lines(10**12, None)] == [5, 3_000_000]
    assert [len(line) for line in log.lines(10**12, None)] == [3_000_000]


def test_the_log_of_an_absent_container_is_an_error(host):
    with pytest.raises(ServerError, match="look at vllm: there is no such container"):
        list(log_of(host).lines(0, None))
