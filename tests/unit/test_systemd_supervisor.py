"""What the systemd supervisor asks, against a manager that behaves as systemd 252 did."""

import pytest

from gpuwatch.errors import ServerError
from gpuwatch.records import Step, SupervisorPhase
from gpuwatch.servers import SystemdSupervisor

HOUR_MS = 3_600_000


class Systemd:
    """One enabled service. Its wall clock may be stepped; its monotonic one only goes on."""

    def __init__(self):
        self.wall_ms = 1_700_000_000_000
        self.up_ms = 10_000
        self.restarts = self.stops = 0
        self.denied = False
        self.job = ""
        self.properties = {"LoadState": "loaded", "Result": "success"}
        self.begin()

    def pass_time(self, ms):
        self.wall_ms += ms
        self.up_ms += ms

    def begin(self):
        self.properties |= {
            "ActiveState": "active",
            "SubState": "running",
            "MainPID": self.up_ms,
            "ExecMainStartTimestamp": self.wall_ms * 1000,
            "ExecMainStartTimestampMonotonic": self.up_ms * 1000,
        }

    def die(self):
        self.properties |= {
            "ActiveState": "inactive",
            "SubState": "dead",
            "MainPID": 0,
            "ExecMainCode": 1,
            "ExecMainExitTimestampMonotonic": self.up_ms * 1000,
            "ActiveExitTimestampMonotonic": self.up_ms * 1000 + 1,
        }

    def stop(self):
        self.die()
        self.properties["ActiveExitTimestampMonotonic"] = self.up_ms * 1000 - 1

    def forget(self):
        self.die()
        self.properties |= {"ExecMainStartTimestamp": 0, "ExecMainStartTimestampMonotonic": 0}

    def call(self, path, interface, call, what):
        match call:
            case ("GetAll", *_):
                assert path == "/org/freedesktop/systemd1/unit/vllm_40a_2eservice"
                job = {"Job": ("(uo)", (7, "/job/7"))} if self.job else {}
                return ({name: ("?", value) for name, value in self.properties.items()} | job,)
            case ("Get", *_):
                return (("s", self.job),)
            case ("RestartUnit", "ss", "vllm@a.service", "replace") if not self.denied:
                self.restarts += 1
                self.pass_time(50)
                self.begin()
                return ("/job/8",)
            case ("StopUnit", "ss", "vllm@a.service", "replace") if not self.denied:
                self.stops += 1
                self.properties["ActiveState"], self.job = "deactivating", "stop"
                return ("/job/9",)
            case _:
                raise ServerError(f"{what}: denied", permanent=True)


@pytest.fixture
def systemd():
    systemd = Systemd()
    systemd.pass_time(HOUR_MS)
    return systemd


@pytest.fixture
def supervisor(systemd):
    return SystemdSupervisor("vllm@a.service", bus=systemd)


def ask(supervisor, systemd, since_ms, action="restart"):
    systemd.pass_time(1_000)
    step = Step(action=action, within_ms=60_000)
    supervisor.do(step, since_ms=since_ms, now_ms=systemd.wall_ms)


def test_a_restart_is_asked_once_however_often_the_step_is(systemd, supervisor):
    systemd.die()
    since_ms = systemd.wall_ms
    for _ in range(5):
        ask(supervisor, systemd, since_ms)
    assert systemd.restarts == 1
    assert supervisor.observe(systemd.wall_ms).started_at_ms >= since_ms


def test_a_later_wish_restarts_again(systemd, supervisor):
    for _ in range(3):
        systemd.pass_time(HOUR_MS)
        ask(supervisor, systemd, systemd.wall_ms)
    assert systemd.restarts == 3


def test_a_new_daemon_knows_by_the_start_time_that_it_was_done(systemd, supervisor):
    since_ms = systemd.wall_ms
    ask(supervisor, systemd, since_ms)
    ask(SystemdSupervisor("vllm@a.service", bus=systemd), systemd, since_ms)
    assert systemd.restarts == 1


def test_a_wall_clock_that_is_stepped_back_does_not_restart_for_ever(systemd, supervisor):
    since_ms = systemd.wall_ms
    systemd.wall_ms -= HOUR_MS
    for _ in range(5):
        ask(supervisor, systemd, since_ms)
    assert systemd.restarts == 1


@pytest.mark.parametrize("state", ["activating", "deactivating"])
def test_a_unit_on_its_way_is_left_alone(systemd, supervisor, state):
    systemd.properties["ActiveState"] = state
    ask(supervisor, systemd, systemd.wall_ms)
    assert systemd.restarts == 0


def test_a_queued_job_is_left_alone(systemd, supervisor):
    systemd.job = "restart"
    ask(supervisor, systemd, systemd.wall_ms)
    assert systemd.restarts == 0


def test_a_queued_stop_shows_as_a_stop_that_was_asked_for(systemd, supervisor):
    systemd.properties["ActiveState"], systemd.job = "deactivating", "stop"
    seen = supervisor.observe(systemd.wall_ms)
    assert (seen.phase, seen.stop_asked) == (SupervisorPhase.DEACTIVATING, True)


def test_a_unit_that_systemd_forgot_is_refused_for_good(systemd, supervisor):
    systemd.forget()
    with pytest.raises(ServerError, match="enable it") as error:
        ask(supervisor, systemd, systemd.wall_ms)
    assert error.value.permanent
    assert systemd.restarts == 0


def test_a_denied_restart_is_an_error(systemd, supervisor):
    systemd.denied = True
    with pytest.raises(ServerError, match="RestartUnit"):
        ask(supervisor, systemd, systemd.wall_ms)


def test_a_stop_is_asked_once_however_often_the_step_is(systemd, supervisor):
    for _ in range(3):
        ask(supervisor, systemd, systemd.wall_ms, "stop")
    systemd.stop()
    systemd.job = ""
    for _ in range(3):
        ask(supervisor, systemd, systemd.wall_ms, "stop")
    assert systemd.stops == 1


@pytest.mark.parametrize("sub_state", ["auto-restart", "start", "start-pre"])
def test_a_stop_ends_a_start_that_is_under_way_and_systemds_own_restart(systemd, supervisor, sub_state):
    systemd.properties |= {"ActiveState": "activating", "SubState": sub_state}
    systemd.job = "" if sub_state == "auto-restart" else "start"
    ask(supervisor, systemd, systemd.wall_ms, "stop")
    assert systemd.stops == 1


def test_a_stop_ends_the_start_half_of_a_restart_by_another(systemd, supervisor):
    systemd.stop()
    systemd.job = "start"
    ask(supervisor, systemd, systemd.wall_ms, "stop")
    assert systemd.stops == 1


@pytest.mark.parametrize("end", ["stop", "die", "forget"])
def test_a_start_restarts_a_unit_that_is_over_once(systemd, supervisor, end):
    getattr(systemd, end)()
    since_ms = systemd.wall_ms
    for _ in range(5):
        ask(supervisor, systemd, since_ms, "start")
    assert systemd.restarts == 1


@pytest.mark.parametrize("state", ["active", "activating", "deactivating"])
def test_a_start_takes_no_unit_down_that_runs_or_is_on_its_way(systemd, supervisor, state):
    systemd.properties["ActiveState"] = state
    ask(supervisor, systemd, systemd.wall_ms + HOUR_MS, "start")
    assert systemd.restarts == 0


def test_a_start_that_died_again_is_not_repeated(systemd, supervisor):
    systemd.stop()
    since_ms = systemd.wall_ms
    ask(supervisor, systemd, since_ms, "start")
    systemd.die()
    ask(supervisor, systemd, since_ms, "start")
    ask(SystemdSupervisor("vllm@a.service", bus=systemd), systemd, since_ms, "start")
    assert systemd.restarts == 1


def test_a_stop_that_we_asked_for_is_one_that_was_asked_for(systemd, supervisor):
    systemd.stop()
    seen = supervisor.observe(systemd.wall_ms)
    assert (seen.phase, seen.stop_asked) == (SupervisorPhase.INACTIVE, True)


@pytest.mark.parametrize("load_state", ["not-found", "masked"])
def test_a_unit_that_cannot_be_loaded_is_an_error_with_a_cure(systemd, supervisor, load_state):
    systemd.die()
    systemd.properties["LoadState"] = load_state
    with pytest.raises(ServerError, match="install or unmask") as error:
        supervisor.observe(systemd.wall_ms)
    assert error.value.permanent
