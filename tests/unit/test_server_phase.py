"""Server in, phase out: the rules of `servers.phase` as stories of looks."""

from dataclasses import replace

import pytest

from gpuwatch.errors import ServerError
from gpuwatch.records import ServerPhase, Step, SupervisorPhase, SupervisorState
from gpuwatch.servers import PlayedSupervisor
from gpuwatch.servers.phase import Health, HealthAnswer, judge, samples
from gpuwatch.servers.unit import Unit, state

OK, FAILING, UNKNOWN = Health
UNSEEN, STARTING, SERVING, DOWN, STOPPED = ServerPhase
DEADLINE_MS = 60_000


def up(started_s=0, pid=7):
    return SupervisorState(phase=SupervisorPhase.ACTIVE, pid=pid, started_at_ms=started_s * 1000)


def gone(started_s=0, *, stop_asked=False, phase=SupervisorPhase.INACTIVE):
    detail = "inactive (dead): exited with status 0"
    return SupervisorState(phase=phase, started_at_ms=started_s * 1000, stop_asked=stop_asked, detail=detail)


NEVER = SupervisorState(phase=SupervisorPhase.INACTIVE)
NO_WORD = SupervisorState(phase=SupervisorPhase.UNKNOWN, detail="no answer from the bus")
GOING = SupervisorState(phase=SupervisorPhase.DEACTIVATING, pid=7, started_at_ms=0)
STOPPING = replace(GOING, stop_asked=True)
COMING = SupervisorState(phase=SupervisorPhase.ACTIVATING)


def after(*looks):
    """The state after looks of (second, supervisor, health)."""
    server = None
    for second, supervisor, health in looks:
        server = judge(
            server,
            name="qwen",
            supervisor=supervisor,
            answer=HealthAnswer(health, second * 1000),
            now_ms=second * 1000,
            start_deadline_ms=DEADLINE_MS,
        )
    return server


HEALTHY = (10, up(), OK)

STORIES = {
    "a server that answers is serving": ([HEALTHY], SERVING),
    "one that runs outside its supervisor is serving": ([(10, NEVER, OK)], SERVING),
    "a never seen one without a process is not down": ([(10, NEVER, FAILING)], UNSEEN),
    "a never seen one that failed before we came is not ours": ([(10, gone(), FAILING)], UNSEEN),
    "a starting one is not down": ([(10, up(), FAILING)], STARTING),
    "nor is it while its supervisor has no pid yet": ([(10, COMING, FAILING)], STARTING),
    "a start is overdue at its deadline": ([(10, up(), FAILING), (60, up(), FAILING)], DOWN),
    "also of one first seen then": ([(100, up(), FAILING)], DOWN),
    "but not for one look without an answer": ([(100, up(), UNKNOWN)], UNSEEN),
    "a start that dies is down": ([(10, up(), FAILING), (20, gone(), FAILING)], DOWN),
    "a start of which nobody can tell goes on": ([(10, up(), FAILING), (20, NO_WORD, FAILING)], STARTING),
    "a start that is restarted goes on": ([(10, up(), FAILING), (20, GOING, FAILING)], STARTING),
    "the first failure of a healthy one is down at once": ([HEALTHY, (15, up(), FAILING)], DOWN),
    "so is the death of its process": ([HEALTHY, (15, gone(), FAILING)], DOWN),
    "and waiting for an automatic restart": (
        [HEALTHY, (15, gone(phase=SupervisorPhase.AUTO_RESTART), FAILING)],
        DOWN,
    ),
    "down lasts while the new process comes up": (
        [HEALTHY, (15, gone(), FAILING), (20, up(18), FAILING)],
        DOWN,
    ),
    "down ends with health": ([HEALTHY, (15, gone(), FAILING), (20, up(18), OK)], SERVING),
    "one look without an answer changes nothing": ([HEALTHY, (15, up(), UNKNOWN)], SERVING),
    "nor do 29 s": ([HEALTHY, (15, up(), UNKNOWN), (44, up(), UNKNOWN)], SERVING),
    "no answer for 30 s on end is down": ([HEALTHY, (15, up(), UNKNOWN), (45, up(), UNKNOWN)], DOWN),
    "an answer in between begins anew": (
        [HEALTHY, (15, up(), UNKNOWN), (40, up(), OK), (45, up(), UNKNOWN)],
        SERVING,
    ),
    "time in which nobody looked is not silence": ([HEALTHY, (900, up(), UNKNOWN)], SERVING),
    "the end of its process is down though somebody keeps silent on its port": (
        [HEALTHY, (15, gone(), UNKNOWN)],
        DOWN,
    ),
    "and stays so while they do": ([HEALTHY, (15, gone(), UNKNOWN), (16, gone(), UNKNOWN)], DOWN),
    "and is so though it answered just before": ([HEALTHY, (15, gone(), OK), (16, gone(), UNKNOWN)], DOWN),
    "who answers after that is serving": ([HEALTHY, (15, gone(), OK), (16, gone(), OK)], SERVING),
    "a starting one that ends is down though somebody keeps silent on its port": (
        [(10, up(), UNKNOWN), (11, up(), FAILING), (20, gone(), UNKNOWN)],
        DOWN,
    ),
    "one look without an answer of one that runs outside its supervisor changes nothing": (
        [(10, NEVER, OK), (11, NEVER, UNKNOWN)],
        SERVING,
    ),
    "nor of one whose supervisor cannot be asked": ([HEALTHY, (15, NO_WORD, UNKNOWN)], SERVING),
    "a stop that is asked for is stopped at once": ([HEALTHY, (15, STOPPING, FAILING)], STOPPED),
    "a server that drains still serves": ([HEALTHY, (15, STOPPING, OK)], SERVING),
    "and stays so when done": ([HEALTHY, (15, gone(stop_asked=True), FAILING)], STOPPED),
    "and when the supervisor forgets": (
        [HEALTHY, (15, gone(stop_asked=True), FAILING), (20, NEVER, FAILING)],
        STOPPED,
    ),
    "a stopped one that is started starts": (
        [HEALTHY, (15, gone(stop_asked=True), FAILING), (20, up(18), FAILING)],
        STARTING,
    ),
    "and if that dies between two looks, it is down": (
        [HEALTHY, (15, gone(stop_asked=True), FAILING), (20, gone(18), FAILING)],
        DOWN,
    ),
    "a down one that an operator stops is stopped": (
        [HEALTHY, (15, up(), FAILING), (20, gone(stop_asked=True), FAILING)],
        STOPPED,
    ),
}


@pytest.mark.parametrize(("looks", "phase"), STORIES.values(), ids=STORIES.keys())
def test_phase(looks, phase):
    assert after(*looks).phase is phase


def looked(was, *, supervisor, health, asked_s, now_s):
    """The state after one look at an answer that was asked for earlier."""
    return judge(
        was,
        name="qwen",
        supervisor=supervisor,
        answer=HealthAnswer(health, int(asked_s * 1000)),
        now_ms=int(now_s * 1000),
        start_deadline_ms=DEADLINE_MS,
    )


@pytest.mark.parametrize("stop_asked", [False, True])
def test_the_last_answer_of_a_process_that_ended_does_not_bring_it_back(stop_asked):
    server, over = after(HEALTHY), gone(stop_asked=stop_asked)
    for now_s in (11, 12, 13):  # the next question hangs for ten seconds
        server = looked(server, supervisor=over, health=OK, asked_s=10.9, now_s=now_s)
        assert server.phase is (STOPPED if stop_asked else DOWN)
    server = looked(server, supervisor=NEVER, health=OK, asked_s=10.9, now_s=14)
    assert server.phase is (STOPPED if stop_asked else DOWN)
    server = looked(server, supervisor=over, health=OK, asked_s=14.9, now_s=15)
    assert server.phase is SERVING


def test_what_a_supervisor_said_long_ago_is_no_end_seen_now():
    """gpuwatch was off, the unit ended, and a person runs the server by hand."""
    was = after(HEALTHY)
    assert looked(was, supervisor=gone(), health=UNKNOWN, asked_s=900, now_s=900).phase is SERVING
    assert looked(was, supervisor=gone(), health=OK, asked_s=900, now_s=900).phase is SERVING


STARTS = {
    "a starting one has a start": ([(10, up(4), FAILING)], 4_000),
    "none once it serves": ([(10, up(4), FAILING), (20, up(4), OK)], None),
    "none of a hung one that was healthy": ([HEALTHY, (15, up(), FAILING)], None),
    "a new process of a down one": ([HEALTHY, (15, up(), FAILING), (20, up(18), FAILING)], 18_000),
    "the same while nothing is known of it": (
        [HEALTHY, (15, up(), FAILING), (20, up(18), FAILING), (25, NO_WORD, FAILING)],
        18_000,
    ),
    "none once it died": (
        [HEALTHY, (15, up(), FAILING), (20, up(18), FAILING), (25, gone(18), FAILING)],
        None,
    ),
    "none once it is overdue": ([HEALTHY, (15, up(), FAILING), (78, up(18), FAILING)], None),
    "from the first look where the supervisor has no pid": (
        [(10, COMING, FAILING), (15, COMING, FAILING)],
        10_000,
    ),
    "not that of the process before": ([HEALTHY, (15, replace(COMING, started_at_ms=0), FAILING)], 15_000),
}


@pytest.mark.parametrize(("looks", "began_ms"), STARTS.values(), ids=STARTS.keys())
def test_start(looks, began_ms):
    assert after(*looks).starting_since_ms == began_ms


def test_since_is_when_the_phase_was_entered():
    server = after(HEALTHY, (15, up(), FAILING), (20, gone(), FAILING))
    assert (server.since_ms, server.seen_at_ms, server.last_healthy_ms) == (15_000, 20_000, 10_000)


def test_a_down_server_says_why():
    assert after(HEALTHY, (15, gone(), FAILING)).reason.endswith("exited with status 0")
    assert after(HEALTHY, (15, up(), UNKNOWN), (45, up(), UNKNOWN)).reason == "no answer for 30 s"
    assert after((100, up(), FAILING)).reason == "its start is overdue"


def test_only_down_counts_as_down_in_samples():
    for looks, phase in STORIES.values():
        by_name = {str(sample.labels): sample.value for sample in samples(after(*looks))}
        assert by_name['server_down{server="qwen"}'] == (phase is DOWN)
        phases = {name: value for name, value in by_name.items() if name.startswith("server_phase")}
        assert [name for name, value in phases.items() if value] == [
            f'server_phase{{phase="{phase}",server="qwen"}}'
        ]
        assert len(phases) == len(ServerPhase)


def test_when_a_start_began_is_told_only_while_it_lasts():
    assert [s.value for s in samples(after((10, up(4), FAILING))) if "start" in s.labels.metric] == [4.0]
    assert not [s for s in samples(after(HEALTHY)) if "start" in s.labels.metric]


def test_a_healthy_one_that_misses_a_look_has_not_started_anew_because_nobody_knows_when_it_began():
    nameless = up(pid=None)
    seen = [(10, COMING, FAILING), (20, nameless, OK)]
    assert after(*seen[:1]).starting_since_ms == 10_000
    assert after(*seen, (30, nameless, UNKNOWN)).starting_since_ms is None
    assert after(*seen, (30, nameless, FAILING)).starting_since_ms is None
    assert after(*seen, (30, gone(), FAILING), (40, nameless, FAILING)).starting_since_ms == 40_000


# Properties as systemd 252 gave them; monotonic times in microseconds.
ACTIVE = Unit(
    load_state="loaded",
    active_state="active",
    sub_state="running",
    result="success",
    main_pid=42,
    main_code=0,
    main_status=0,
    main_start_us=1_700_000_000_000_000,
    main_start_monotonic_us=1000,
    main_exit_monotonic_us=0,
    active_exit_monotonic_us=0,
    restarts=0,
    job_path="",
)


def dead(*, left, exited, result="success", code=1, status=0):
    return replace(
        ACTIVE,
        active_state="inactive" if result == "success" else "failed",
        sub_state="dead" if result == "success" else "failed",
        result=result,
        main_pid=0,
        main_code=code,
        main_status=status,
        active_exit_monotonic_us=left,
        main_exit_monotonic_us=exited,
    )


ENDS = {
    "exit 0 by itself": (dead(left=2001, exited=2000), "", False),
    "killed from outside": (dead(left=2001, exited=2000, result="signal", code=2, status=9), "", False),
    "stopped, exit 0": (dead(left=2000, exited=2001), "", True),
    "stopped, ended by TERM": (dead(left=2000, exited=2001, code=2, status=15), "", True),
    "stopped, exit 3": (dead(left=2000, exited=2001, result="exit-code", status=3), "", True),
    "stopped, ignored TERM": (dead(left=2000, exited=2001, result="timeout", code=2, status=9), "", True),
    "out of memory, ended by systemd": (dead(left=2000, exited=2001, result="oom-kill", code=2), "", False),
    "watchdog": (dead(left=2000, exited=2001, result="watchdog", code=2, status=6), "", False),
    "stopped before it was active": (dead(left=0, exited=2000, code=2, status=15), "", True),
    "died before it was active": (dead(left=0, exited=2000, result="exit-code", status=1), "", False),
    "a stop under way": (replace(ACTIVE, active_state="deactivating"), "stop", True),
    "a restart under way": (replace(ACTIVE, active_state="deactivating"), "restart", False),
    "running": (ACTIVE, "", False),
}


@pytest.mark.parametrize(("unit", "job_type", "asked"), ENDS.values(), ids=ENDS.keys())
def test_a_stop_that_was_asked_for_is_told_from_every_other_end(unit, job_type, asked):
    assert state(unit, job_type).stop_asked is asked


def test_a_unit_between_stop_and_start_of_a_restart_is_activating():
    assert state(dead(left=2000, exited=2001), "start").phase is SupervisorPhase.ACTIVATING


def test_the_detail_says_how_it_ended():
    assert state(dead(left=2001, exited=2000), "").detail == "inactive (dead): exited with status 0"
    killed = dead(left=2001, exited=2000, result="signal", code=2, status=9)
    assert state(killed, "").detail == "failed (failed): killed by signal 9, result signal"


def test_a_recorded_server_is_seen_and_left_alone():
    there = {1_000: True, 2_000: False, 3_000: True, 4_000: None}
    played = PlayedSupervisor(there.get)
    seen = []
    for now_ms in there:
        seen.append(played.observe(now_ms))
        with pytest.raises(ServerError, match="cannot be acted on"):
            played.do(Step(action="restart", within_ms=1), since_ms=now_ms, now_ms=now_ms)
    assert [s.phase for s in seen] == ["active", "failed", "active", "unknown"]
    assert [s.started_at_ms for s in seen] == [1_000, 1_000, 3_000, None]


def test_a_server_that_is_replaced_within_a_second_is_starting_whatever_the_old_one_had_answered():
    was = after(HEALTHY)
    late = judge(
        was,
        name="qwen",
        supervisor=up(started_s=11),
        answer=HealthAnswer(OK, 10_900),  # asked before the new process began
        now_ms=12_000,
        start_deadline_ms=DEADLINE_MS,
    )
    assert late.last_healthy_ms == 10_000
    failing = judge(
        late,
        name="qwen",
        supervisor=up(started_s=11),
        answer=HealthAnswer(FAILING, 12_900),
        now_ms=13_000,
        start_deadline_ms=DEADLINE_MS,
    )
    assert (failing.phase, failing.starting_since_ms) == (DOWN, 11_000)
