"""Stories that matter by name, and every fault that random stories found."""

import contextlib

import pytest
from tests.world import HOUR, MINUTE, SECOND, SERVER, START_MS, World

from gpuwatch import remediation, rules
from gpuwatch.promql import Matcher
from gpuwatch.records import Mode, Phase, Place, Rule, RuleGroup, ServerPhase, is_stale
from gpuwatch.store import open_history


@pytest.fixture
def served():
    """Makes a world in which the server serves."""
    with contextlib.ExitStack() as stack:

        def make(**given):
            settings = {
                "mode": Mode.AUTO,
                "just_started_grace": 0,
                "cooldown": 30 * SECOND,
                "verify_for": 10 * SECOND,
            }
            world = stack.enter_context(World(**{**settings, **given}))
            world.server.start()
            world.run_for(30 * SECOND)
            assert world.store.servers()[SERVER].phase is ServerPhase.SERVING
            return world

        yield make


def phases(world):
    return [r.phase for r in reversed(world.store.remediations())]


def why_not(world):
    """Why nothing is done about the server that is down."""
    return [r.code for r in world.store.refusals() if r.alert == "VLLMDown"]


def news(chat, alert="VLLMDown"):
    """What a chat was told of an alert, and of what was done about it."""
    return [m.state for m in chat.received if m.alert == alert]


def seen_now(world, metric):
    """The series of a metric that have not ended, as a rule sees them and as `gpuwatch status` does."""
    matchers = [Matcher("__name__", "=", metric)]
    series = world.store.select(matchers, world.now_ms - 5 * MINUTE, world.now_ms)
    judged = {one.labels for one in series if not is_stale(one.values[-1])}
    with world.view() as view:
        assert judged == {one for one in view.latest(world.now_ms, 5 * MINUTE) if one.metric == metric}
    return judged


def test_a_server_that_dies_is_restarted_and_the_restart_is_verified_and_told(served):
    world = served()
    world.server.die()
    world.run_for(MINUTE)
    assert world.server.well
    assert len(world.supervisor.restarts) == 1
    assert phases(world) == [Phase.SUCCEEDED]
    assert news(world.slack) == ["firing", "resolved", "succeeded"]


def test_what_is_done_begins_within_four_seconds_of_death_and_the_restart_within_ten(served):
    world = served()
    world.server.die()
    died_ms = world.now_ms
    world.run_for(15 * SECOND)
    assert world.hands.asked[0][0] - died_ms <= 4 * SECOND
    assert world.supervisor.restarts[0] - died_ms <= 10 * SECOND


def test_a_busy_server_is_never_restarted(served):
    world = served()
    world.server.busy_since_ms = world.now_ms
    world.run_for(25 * SECOND)
    assert world.supervisor.restarts == []
    assert world.slack.received == []


def test_a_single_failed_health_check_raises_no_alarm(served):
    world = served()
    world.server.wedged = True
    world.tick()
    world.server.wedged = False
    world.run_for(20 * SECOND)
    assert world.slack.received == []


def test_a_start_that_dies_again_is_not_tried_for_ever_without_a_person(served):
    world = served()
    world.server.failing_starts = 50
    world.server.die()
    world.run_for(8 * MINUTE)
    assert len(world.supervisor.restarts) == 2
    assert phases(world) == [Phase.FAILED] * 2
    assert why_not(world) == ["two_failures"]
    world.server.failing_starts = 0
    world.resume()
    world.run_for(2 * MINUTE)
    assert world.server.well


def test_successful_restarts_spend_the_budget_too(served):
    world = served(cooldown=5 * SECOND)
    for _ in range(5):
        world.server.die()
        world.run_for(2 * MINUTE)
    assert len(world.supervisor.restarts) == world.settings.remediation.budget.count
    assert why_not(world) == ["budget_spent"]


def test_in_observe_mode_nothing_is_touched_and_once_it_is_told_what_would_be_done(served):
    world = served(mode=Mode.OBSERVE)
    world.server.die()
    world.run_for(3 * MINUTE)
    assert world.supervisor.restarts == []
    assert phases(world) == [Phase.REHEARSED]
    (message,) = [m for m in world.slack.received if m.alert == "VLLMDown"]
    assert message.decision.code == "observe_mode"
    assert message.decision.dry_run


def test_in_approve_mode_it_waits_for_a_person_and_then_acts(served):
    world = served(mode=Mode.APPROVE)
    world.server.die()
    world.run_for(10 * SECOND)
    assert world.supervisor.restarts == []
    (waiting,) = world.store.live_remediations()
    assert waiting.phase is Phase.AWAITING_APPROVAL
    world.wish({f"word:{waiting.plan.id}": "approved|eve"})
    world.run_for(MINUTE)
    assert phases(world) == [Phase.SUCCEEDED]


def test_an_approval_that_nobody_gives_expires_and_nothing_is_done(served):
    world = served(mode=Mode.APPROVE, approval_expires=20 * SECOND, cooldown=10 * MINUTE)
    world.server.die()
    world.run_for(MINUTE)
    assert phases(world) == [Phase.ABORTED]
    assert world.supervisor.restarts == []


def test_a_pause_stops_what_is_under_way_and_has_it_taken_back(served):
    world = served()
    world.supervisor.stop_takes_ms = 20 * SECOND
    world.server.wedged = True
    world.run_for(10 * SECOND)
    world.pause()
    world.run_for(3 * SECOND)
    assert phases(world) == [Phase.ROLLING_BACK]
    world.run_for(90 * SECOND)
    assert phases(world) == [Phase.ROLLED_BACK]
    assert world.server.well
    assert len(world.supervisor.restarts) == 1


def test_what_an_operator_stopped_stays_stopped(served):
    world = served()
    world.server.stop_by_operator()
    world.run_for(2 * MINUTE)
    assert world.supervisor.restarts == []
    assert world.store.servers()[SERVER].phase is ServerPhase.STOPPED


def test_a_daemon_killed_between_intent_and_deed_does_it_after_its_restart(served):
    world = served()
    world.kill_daemon("before the deed")
    world.server.die()
    world.run_for(2 * MINUTE)
    assert len(world.supervisor.restarts) == 1
    assert phases(world) == [Phase.SUCCEEDED]


def test_a_daemon_killed_after_the_deed_does_not_do_it_twice(served):
    world = served()
    world.kill_daemon("after the deed")
    world.server.die()
    world.run_for(2 * MINUTE)
    assert len(world.supervisor.restarts) == 1
    assert phases(world) == [Phase.SUCCEEDED]


def test_messages_of_an_outage_arrive_in_order_when_the_chat_is_back(served):
    world = served()
    world.slack.down = True
    world.server.die()
    world.run_for(MINUTE)
    assert world.slack.received == []
    world.slack.down = False
    world.run_for(6 * MINUTE)
    assert news(world.slack) == ["firing", "resolved", "succeeded"]
    world.check_all_was_told()


def test_when_the_eyes_fail_nothing_is_concluded(served):
    world = served()
    world.health.hangs = True
    world.run_for(3 * MINUTE)
    assert world.supervisor.restarts == []
    assert world.store.servers()[SERVER].phase is ServerPhase.SERVING


def test_after_the_host_slept_it_waits_before_it_acts(served):
    world = served(just_started_grace=30 * SECOND)
    world.server.die()
    world.jump(60 * MINUTE)
    world.run_for(20 * SECOND)
    assert world.supervisor.restarts == []
    assert [r.code for r in world.store.refusals()] == ["clock_jumped"]
    world.run_for(MINUTE)
    assert world.server.well


def test_a_forbidding_supervisor_fails_the_remediation_and_says_why(served):
    world = served()
    world.supervisor.forbids = True
    world.server.die()
    world.run_for(20 * SECOND)
    (r,) = world.store.remediations()
    assert r.phase is Phase.FAILED
    assert "polkit" in r.facts["detail"]
    assert world.slack.received[-1].state == "failed"


def test_a_lost_gpu_is_told_and_ends_when_it_is_back(served):
    world = served()
    world.nvml.devices[0].lost = True
    world.run_for(30 * SECOND)
    assert ("GPULost", "firing") in [(m.alert, m.state) for m in world.slack.received]
    world.nvml.devices[0].lost = False
    world.run_for(MINUTE)
    assert ("GPULost", "resolved") in [(m.alert, m.state) for m in world.slack.received]


def test_a_server_that_a_hand_restarts_within_the_second_of_its_death_is_left_alone(served):
    """Found as story 43: the last good answer was newer than the new process, which so seemed healthy."""
    world = served()
    world.server.die()
    world.server.start()
    world.run_for(60 * SECOND)
    assert world.supervisor.restarts == []
    assert world.server.well


def test_a_series_that_ended_while_gpuwatch_was_down_has_ended_when_it_is_back(served):
    """Found by kill -9: a process that was gone at the restart was called foreign for five minutes more."""
    world = served()
    waiting = "vllm:num_requests_waiting"
    assert seen_now(world, waiting)
    world.kill_daemon()
    world.server.stop_by_operator()
    world.run_for(30 * SECOND)
    assert not seen_now(world, waiting)
    assert seen_now(world, "gpu_memory_total_bytes")


def test_who_sees_neither_health_nor_supervisor_does_nothing(served):
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


def test_a_full_disk_keeps_neither_a_server_from_its_restart_nor_people_from_the_news(served):
    world = served(cooldown=5 * SECOND)
    world.full_disk(True)
    for _ in range(3):
        world.server.die()
        world.run_for(2 * MINUTE)
    assert "full" in world.store.faults()["state.db"]
    assert len(world.supervisor.restarts) == 3
    assert world.server.well
    assert news(world.slack) == ["firing", "resolved", "succeeded"] * 3
    told = {(m.alert, m.state, m.labels.get("file")) for m in world.ding.received}
    assert ("GpuwatchStoreFailing", "firing", "state.db") in told


def test_all_that_happened_on_a_full_disk_is_saved_once_there_is_room(served):
    world = served(cooldown=5 * SECOND)
    world.full_disk(True)
    for _ in range(3):
        world.server.die()
        world.run_for(2 * MINUTE)
    with world.view() as view:
        assert len(view.remediations()) < 3
    world.full_disk(False)
    world.run_for(10 * SECOND)
    world.check_all_was_saved()
    world.check_all_was_told()
    with world.view() as view:
        assert [r.phase for r in view.remediations()] == [Phase.SUCCEEDED] * 3


def test_a_disk_that_goes_and_comes_back_has_the_whole_history(served):
    world = served()
    began_ms = world.now_ms
    world.gone_disk(True)
    world.server.die()
    world.run_for(MINUTE)
    assert world.store.faults()["state.db"]
    assert len(world.supervisor.restarts) == 1
    assert [m.state for m in world.slack.received if m.alert == "VLLMDown"] == [
        "firing",
        "resolved",
        "succeeded",
    ]
    world.gone_disk(False)
    world.run_for(MINUTE)
    world.check_all_was_saved()
    world.check_all_was_told()
    with open_history(world.folder) as history:
        (track,) = history.tracks([Matcher("__name__", "=", "server_down")], began_ms, world.now_ms)
    assert track.at_ms.tolist() == list(range(began_ms + SECOND, world.now_ms + SECOND, SECOND))


def test_a_daemon_killed_on_a_full_disk_goes_on_from_what_was_saved(served):
    world = served(cooldown=5 * SECOND)
    world.full_disk(True)
    for _ in range(3):
        world.server.die()
        world.run_for(2 * MINUTE)
    world.kill_daemon()
    world.run_for(MINUTE)
    assert world.known.forgotten_restarts
    assert world.server.well
    assert len(world.supervisor.restarts) == 3
    world.full_disk(False)
    world.run_for(10 * SECOND)
    world.check_all_was_saved()
    world.check_all_was_told()


def test_a_pause_is_heeded_by_a_daemon_that_cannot_save(served):
    world = served(cooldown=5 * SECOND)
    world.full_disk(True)
    for _ in range(2):
        world.server.die()
        world.run_for(70 * SECOND)
    assert world.store.faults()["state.db"]
    world.pause()
    world.tick()
    world.server.die()
    world.run_for(MINUTE)
    assert len(world.supervisor.restarts) == 2
    assert why_not(world) == ["paused_open"]


@pytest.mark.parametrize("seconds_after_death", range(6))
def test_a_pause_is_heeded_in_whatever_second_before_the_deed_it_comes(served, seconds_after_death):
    world = served()
    world.server.die()
    world.run_for(seconds_after_death * SECOND)
    restarts = list(world.supervisor.restarts)
    world.pause()
    world.run_for(MINUTE)
    assert world.supervisor.restarts == restarts
    assert restarts or why_not(world) == ["paused_open"]


def test_wishes_left_while_the_daemon_is_down_are_heeded_when_it_is_back(served):
    world = served()
    world.kill_daemon()
    world.pause()
    world.server.die()
    world.run_for(MINUTE)
    assert world.supervisor.restarts == []
    assert why_not(world) == ["paused_open"]
    world.kill_daemon()
    world.resume()
    world.run_for(MINUTE)
    assert len(world.supervisor.restarts) == 1


def test_a_pause_that_may_have_been_lost_with_a_damaged_file_holds_until_a_person_says_otherwise(served):
    world = served()
    world.pause()
    world.run_for(2 * SECOND)
    world.kill_daemon()
    (world.folder / "state.db").write_bytes(b"SQLite format 3" + bytes(8000))
    world.run_for(MINUTE)
    world.server.die()
    world.run_for(MINUTE)
    assert world.supervisor.restarts == []
    assert why_not(world) == ["paused_open"]
    world.kill_daemon()  # that it holds is saved
    world.run_for(MINUTE)
    assert world.supervisor.restarts == []
    world.resume()
    world.run_for(MINUTE)
    assert len(world.supervisor.restarts) == 1
    assert world.server.well


def test_a_daemon_that_began_without_its_state_knows_all_of_it_once_it_can_be_read(served):
    world = served(cooldown=5 * SECOND)
    world.slack.down = True
    world.server.failing_starts = 4
    world.server.die()
    world.run_for(4 * MINUTE)
    assert phases(world) == [Phase.FAILED] * 2
    world.kill_daemon()
    state, aside = world.folder / "state.db", world.folder / "aside"
    state.rename(aside)
    state.mkdir()
    world.run_for(MINUTE)
    assert world.store.faults()["state.db"]
    assert int(world.store.settings()["paused_until_ms"]) == remediation.FOREVER_MS
    state.rmdir()
    aside.rename(state)
    world.server.start()
    world.run_for(MINUTE)
    assert not world.store.faults()["state.db"]
    world.server.die()
    world.run_for(MINUTE)
    assert why_not(world) == ["two_failures"]
    assert len(world.supervisor.restarts) == 2
    world.slack.down = False
    world.jump(10 * MINUTE)
    world.run_for(15 * SECOND)
    world.check_all_was_told()
    world.check_all_was_saved()


def test_an_hour_that_was_sealed_is_whole_and_a_restart_goes_on_from_it(served):
    world = served(start_ms=START_MS // HOUR * HOUR + 58 * MINUTE, seals=True)
    began_ms = world.now_ms
    world.run_for(4 * MINUTE)
    world.jump(2 * HOUR)
    world.server.die()
    world.run_for(3 * MINUTE)
    ended_ms = world.now_ms
    world.kill_daemon()
    world.run_for(30 * SECOND)
    with open_history(world.folder) as history:
        (track,) = history.tracks([Matcher("__name__", "=", "server_down")], began_ms, ended_ms)
        hours = history.hours([Matcher("__name__", "=", "server_down")], 0, ended_ms)
    jumped_ms = began_ms + 4 * MINUTE
    at_ms = [*range(began_ms, jumped_ms, SECOND), *range(jumped_ms + 2 * HOUR, ended_ms, SECOND)]
    assert track.at_ms.tolist() == [each + SECOND for each in at_ms]
    assert len(hours) >= 2
    world.check_all_was_told()


def test_a_pause_left_on_a_disk_that_is_just_back_counts_more_than_the_one_before(served):
    world = served()
    world.pause(world.now_ms + 90 * SECOND)
    world.run_for(5 * SECOND)
    world.gone_disk(True)
    world.server.die()
    world.run_for(20 * SECOND)
    assert world.store.faults()["state.db"]
    world.gone_disk(False)
    world.pause()
    world.run_for(2 * MINUTE)
    assert not world.store.faults()["state.db"]
    assert world.supervisor.restarts == []
    assert why_not(world) == ["paused_open"]
    world.check_all_was_saved()


# ---- rules through restarts and reloads

AT = Place(file="rules/slow.yaml", line=1)


def slow_rules(*more, for_ms=40 * SECOND, record="server:down:max"):
    """The server's death is recorded, and an alert waits for it."""
    given = (
        Rule(record=record, expr="max by (server) (server_down)", place=AT, expr_place=AT),
        Rule(alert="DeadForLong", expr=f"{record} == 1", for_ms=for_ms, place=AT, expr_place=AT),
        *more,
    )
    return rules.compile_groups([RuleGroup(name="slow", interval_ms=SECOND, rules=given, place=AT)])


def states(world):
    return {alert.rule: str(alert.state) for alert in world.store.active_alerts()}


@pytest.fixture
def dying(served):
    """A world under slow rules whose server has been dead for 30 seconds; nobody restarts it."""
    world = served(mode=Mode.OBSERVE, rule_groups=slow_rules())
    world.server.die()
    world.run_for(30 * SECOND)
    assert states(world) == {"DeadForLong": "pending"}
    return world


def seconds_until_it_fires(world):
    for second in range(1, 300):
        world.tick()
        if world.down_until_ms is None and states(world).get("DeadForLong") == "firing":
            return second
    raise AssertionError(states(world))


def test_an_alert_that_waits_goes_on_waiting_after_a_restart_for_what_nobody_saw(dying):
    dying.kill_daemon()
    began_ms = dying.now_ms
    seconds_until_it_fires(dying)
    (alert,) = dying.store.active_alerts()
    away_ms = dying.booted_at_ms - began_ms
    assert away_ms >= SECOND
    assert dying.now_ms - began_ms - away_ms >= 10 * SECOND
    assert alert.fired_at_ms - alert.active_at_ms == 40 * SECOND
    assert [m.state for m in dying.slack.received] == ["firing"]
    dying.server.start()
    dying.run_for(MINUTE)
    dying.check_all_was_told()


def test_an_alert_that_waited_before_an_outage_of_hours_begins_anew(dying):
    dying.kill_daemon()
    dying.jump(2 * HOUR)
    assert seconds_until_it_fires(dying) >= 40


def test_an_alert_that_fires_is_told_once_though_the_daemon_is_killed_again_and_again(served):
    world = served(mode=Mode.OBSERVE, rule_groups=slow_rules(for_ms=0))
    world.server.die()
    world.run_for(10 * SECOND)
    for _ in range(3):
        world.kill_daemon()
        world.run_for(40 * SECOND)
    assert [m.state for m in world.slack.received if m.kind == "alert"] == ["firing"]
    world.server.start()
    world.run_for(MINUTE)
    world.check_all_was_told()
    world.check_all_was_saved()


def test_a_reload_of_the_rules_takes_nothing_from_an_alert_that_waits(dying):
    dying.reload(slow_rules(Rule(alert="New", expr="vector(1)", place=AT, expr_place=AT)))
    assert seconds_until_it_fires(dying) <= 13
    assert states(dying) == {"DeadForLong": "firing", "New": "firing"}


def test_a_rule_that_a_reload_takes_away_leaves_neither_alert_nor_series(served):
    world = served(mode=Mode.OBSERVE, rule_groups=slow_rules(for_ms=0))
    world.server.die()
    world.run_for(10 * SECOND)
    assert seen_now(world, "server:down:max")
    world.reload(())
    world.run_for(3 * SECOND)
    assert states(world) == {}
    assert not seen_now(world, "server:down:max")
    assert not seen_now(world, "ALERTS")
    assert [m.state for m in world.slack.received] == ["firing", "resolved"]
    world.check_all_was_told()


def test_a_rule_that_is_gone_after_a_restart_leaves_no_series(served):
    world = served(mode=Mode.OBSERVE, rule_groups=slow_rules(for_ms=0))
    world.server.die()
    world.run_for(10 * SECOND)
    world.groups = slow_rules(for_ms=0, record="server:dead:max")
    world.kill_daemon()
    world.run_for(30 * SECOND)
    assert seen_now(world, "server:dead:max")
    assert not seen_now(world, "server:down:max")
    assert states(world) == {"DeadForLong": "firing"}


def test_a_rule_that_cannot_be_evaluated_is_counted_until_it_can_or_is_gone(served):
    broken = Rule(record="broken", expr="max(up) * on () (up)", place=AT, expr_place=AT)
    world = served(mode=Mode.OBSERVE, rule_groups=slow_rules(broken))

    def failing():
        (series,) = world.store.select(
            [Matcher("__name__", "=", "gpuwatch_rules_failing")], world.now_ms - MINUTE, world.now_ms
        )
        return series.values[-1]

    assert failing() == 1
    world.reload(())
    world.run_for(2 * SECOND)
    assert failing() == 0


def test_what_promql_remarks_on_a_rule_is_logged_once(served, caplog):
    remarkable = Rule(record="speed", expr="rate(server_down[1m])", place=AT, expr_place=AT)
    served(mode=Mode.OBSERVE, rule_groups=slow_rules(remarkable))
    told = [message for message in caplog.messages if "might not be a counter" in message]
    assert len(told) == 1
    assert "slow/speed" in told[0]
