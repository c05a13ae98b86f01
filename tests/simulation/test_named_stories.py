"""Stories that matter by name, and every fault that random stories found."""

from tests.world import MINUTE, SECOND, SERVER, World

from gpuwatch.records import Mode, Phase, ServerPhase


def served(**remediation):
    given = {"mode": Mode.AUTO, "just_started_grace": 0, "cooldown": 30 * SECOND, "verify_for": 10 * SECOND}
    world = World(**{**given, **remediation})
    world.server.start()
    world.run_for(30 * SECOND)
    assert world.store.servers()[SERVER].phase is ServerPhase.SERVING
    return world


def phases(world):
    return [r.phase for r in reversed(world.store.remediations())]


def test_a_server_that_dies_is_restarted_and_the_restart_is_verified_and_told():
    world = served()
    world.server.die()
    world.run_for(MINUTE)
    assert world.server.well
    assert len(world.supervisor.restarts) == 1
    assert phases(world) == [Phase.SUCCEEDED]
    assert [m.state for m in world.slack.received] == ["firing", "resolved", "succeeded"]


def test_the_restart_is_asked_within_four_seconds_of_death():
    world = served()
    world.server.die()
    died_ms = world.now_ms
    world.run_for(10 * SECOND)
    assert world.supervisor.restarts[0] - died_ms <= 4 * SECOND


def test_a_busy_server_is_never_restarted():
    world = served()
    world.server.busy_since_ms = world.now_ms
    world.run_for(25 * SECOND)
    assert world.supervisor.restarts == []
    assert world.slack.received == []


def test_a_single_failed_health_check_raises_no_alarm():
    world = served()
    world.server.wedged = True
    world.tick()
    world.server.wedged = False
    world.run_for(20 * SECOND)
    assert world.slack.received == []


def test_a_start_that_dies_again_is_not_tried_again_without_a_person():
    world = served()
    world.server.failing_starts = 5
    world.server.die()
    world.run_for(5 * MINUTE)
    assert len(world.supervisor.restarts) == 1
    assert phases(world) == [Phase.FAILED]
    assert [r.code for r in world.store.refusals()] == ["failed_before"]
    world.server.failing_starts = 0
    world.resume()
    world.run_for(2 * MINUTE)
    assert world.server.well


def test_successful_restarts_spend_the_budget_too():
    world = served(cooldown=5 * SECOND)
    for _ in range(5):
        world.server.die()
        world.run_for(70 * SECOND)
    assert len(world.supervisor.restarts) == world.settings.remediation.budget.count
    assert [r.code for r in world.store.refusals()] == ["budget_spent"]


def test_in_observe_mode_nothing_is_touched_and_once_it_is_told_what_would_be_done():
    world = served(mode=Mode.OBSERVE)
    world.server.die()
    world.run_for(3 * MINUTE)
    assert world.supervisor.restarts == []
    assert phases(world) == [Phase.REHEARSED]
    (message,) = world.slack.received
    assert message.decision.code == "observe_mode"
    assert message.decision.dry_run


def test_in_approve_mode_it_waits_for_a_person_and_then_acts():
    world = served(mode=Mode.APPROVE)
    world.server.die()
    world.run_for(10 * SECOND)
    assert world.supervisor.restarts == []
    (waiting,) = world.store.live_remediations()
    assert waiting.phase is Phase.AWAITING_APPROVAL
    world.wish({f"word:{waiting.plan.id}": "approved|eve"})
    world.run_for(MINUTE)
    assert phases(world) == [Phase.SUCCEEDED]


def test_an_approval_that_nobody_gives_expires_and_nothing_is_done():
    world = served(mode=Mode.APPROVE, approval_expires=20 * SECOND, cooldown=10 * MINUTE)
    world.server.die()
    world.run_for(MINUTE)
    assert phases(world) == [Phase.ABORTED]
    assert world.supervisor.restarts == []


def test_a_pause_stops_what_is_under_way():
    world = served()
    world.supervisor.stop_takes_ms = 20 * SECOND
    world.server.wedged = True
    world.run_for(6 * SECOND)
    world.pause()
    world.run_for(3 * SECOND)
    assert phases(world) == [Phase.ABORTED]


def test_what_an_operator_stopped_stays_stopped():
    world = served()
    world.server.die()
    world.server.stopped_by_operator = True
    world.run_for(2 * MINUTE)
    assert world.supervisor.restarts == []
    assert world.store.servers()[SERVER].phase is ServerPhase.STOPPED


def test_a_daemon_killed_between_intent_and_deed_does_it_after_its_restart():
    world = served()
    world.kill_daemon("before the deed")
    world.server.die()
    world.run_for(2 * MINUTE)
    assert len(world.supervisor.restarts) == 1
    assert phases(world) == [Phase.SUCCEEDED]


def test_a_daemon_killed_after_the_deed_does_not_do_it_twice():
    world = served()
    world.kill_daemon("after the deed")
    world.server.die()
    world.run_for(2 * MINUTE)
    assert len(world.supervisor.restarts) == 1
    assert phases(world) == [Phase.SUCCEEDED]


def test_messages_of_an_outage_arrive_in_order_when_the_chat_is_back():
    world = served()
    world.slack.down = True
    world.server.die()
    world.run_for(MINUTE)
    assert world.slack.received == []
    world.slack.down = False
    world.run_for(6 * MINUTE)
    assert [m.state for m in world.slack.received] == ["firing", "resolved", "succeeded"]


def test_when_the_eyes_fail_nothing_is_concluded():
    world = served()
    world.health.hangs = True
    world.run_for(3 * MINUTE)
    assert world.supervisor.restarts == []
    assert world.store.servers()[SERVER].phase is ServerPhase.SERVING


def test_after_the_host_slept_it_waits_before_it_acts():
    world = served(just_started_grace=30 * SECOND)
    world.server.die()
    world.jump(60 * MINUTE)
    world.run_for(20 * SECOND)
    assert world.supervisor.restarts == []
    assert [r.code for r in world.store.refusals()] == ["clock_jumped"]
    world.run_for(MINUTE)
    assert world.server.well


def test_a_forbidding_supervisor_fails_the_remediation_and_says_why():
    world = served()
    world.supervisor.forbids = True
    world.server.die()
    world.run_for(20 * SECOND)
    (r,) = world.store.remediations()
    assert r.phase is Phase.FAILED
    assert "polkit" in r.facts["detail"]
    assert world.slack.received[-1].state == "failed"


def test_a_lost_gpu_is_told_and_ends_when_it_is_back():
    world = served()
    world.nvml.devices[0].lost = True
    world.run_for(30 * SECOND)
    assert ("GPULost", "firing") in [(m.alert, m.state) for m in world.slack.received]
    world.nvml.devices[0].lost = False
    world.run_for(MINUTE)
    assert ("GPULost", "resolved") in [(m.alert, m.state) for m in world.slack.received]


def test_a_server_that_a_hand_restarts_within_the_second_of_its_death_is_left_alone():
    """Found as story 43: the last good answer was newer than the new process, which so seemed healthy."""
    world = served()
    world.server.die()
    world.server.start()
    world.run_for(60 * SECOND)
    assert world.supervisor.restarts == []
    assert world.server.well


def test_a_series_that_ended_while_gpuwatch_was_down_has_ended_when_it_is_back():
    """Found by kill -9: a process that was gone at the restart was called foreign for five minutes more."""
    world = served()
    waiting = "vllm:num_requests_waiting"
    assert world.store.last(waiting, world.now_ms)
    world.kill_daemon()
    world.server.die()
    world.server.stopped_by_operator = True
    world.run_for(30 * SECOND)
    assert world.store.last(waiting, world.now_ms) == {}
    assert world.store.last("gpu_memory_total_bytes", world.now_ms)


def test_who_sees_neither_health_nor_supervisor_does_nothing():
    """Found as story 342: while the health reader hung, the supervisor's old word still stood."""
    world = served(just_started_grace=20 * SECOND)
    world.server.die()
    world.kill_daemon()
    world.run_for(3 * SECOND)
    while world.down_until_ms is not None:
        world.tick()
    world.run_for(5 * SECOND)
    world.health.hangs = world.supervisor.unreachable = True
    world.run_for(25 * SECOND)
    assert world.supervisor.restarts == []
    assert "supervisor_unknown" in {r.code for r in world.store.refusals()}
