"""Incidents that operators of other projects wrote about, each a story on the simulated host."""

import contextlib

import pytest
from tests.sim_vllm import GIB, RIVAL_PID, SERVER
from tests.world import ARGUMENTS, BOUNDS, MINUTE, SECOND, World, quick_rules, shipped_groups

from gpuwatch import config, remediation
from gpuwatch.records import ActionClass, Mode, Phase, ServerPhase, StartOutcome

JUDGED = ("server", "starts", "processes", "remedies")
STEPS_OF_A_CHANGE = ("check", "drain", "stop", "await_memory", "swap", "start", "canary", "open_door")


@pytest.fixture
def served():
    """Makes a world in which a server serves whose settings gpuwatch keeps."""
    with contextlib.ExitStack() as stack:

        def make(*, serves=True, arguments=ARGUMENTS, server=None, **given):
            settings = {
                "mode": Mode.AUTO,
                "just_started_grace": 0,
                "cooldown": 10 * SECOND,
                "verify_for": 10 * SECOND,
                "drain_within": 20 * SECOND,
                "free_within": 40 * SECOND,
                "hold_for": 20 * SECOND,
            }
            groups = (*(g for g in shipped_groups() if g.name in JUDGED), *quick_rules())
            world = stack.enter_context(
                World(
                    0,
                    groups,
                    arguments=arguments,
                    server={"bounds": BOUNDS, **(server or {})},
                    **{**settings, **given},
                )
            )
            world.server.start()
            world.run_for(40 * SECOND)
            if serves:
                assert world.store.servers()[SERVER].phase is ServerPhase.SERVING
            return world

        yield make


def ends(world):
    """Each remediation that touched the server or would have, oldest first: how it ended, and why."""
    return [(r.phase, r.outcome) for r in reversed(world.store.remediations())]


def phases(world):
    return [phase for phase, _ in ends(world)]


def why_not(world, alert="VLLMDown"):
    return [r.code for r in world.store.refusals() if r.alert == alert]


def told(world, kind="remediation"):
    return [m.state for m in world.slack.received if m.kind == kind]


def asked(world, action):
    """When a step was asked, first and again."""
    return [at_ms for at_ms, _, step in world.hands.asked if step == action]


def wish(world, **change):
    arguments = {**ARGUMENTS, **change}
    row = remediation.wishes.change(SERVER, arguments=arguments, by="eve", why="test", at_ms=world.now_ms)
    world.wish(row)


def rival(world, gib):
    world.gpu.take(RIVAL_PID, "python3", int(gib * GIB))


def no_rival(world):
    world.gpu.give(RIVAL_PID, at_ms=world.now_ms)


def run_until(world, holds, within_ms=3 * MINUTE):
    for _ in range(within_ms // SECOND):
        if world.down_until_ms is None and holds():
            return
        world.tick()
    raise AssertionError(f"not within {within_ms} ms: {ends(world)}, {world.store.refusals()}")


def present_step(world):
    """The step that the live remediation is at; empty if there is none."""
    for r in world.store.live_remediations():
        if r.phase is Phase.APPLYING:
            return r.plan.steps[r.step_index].action
    return ""


def check_words_and_rows(world):
    world.check_all_was_told()
    world.check_all_was_saved()


# ---- restarts


def test_restarts_that_each_succeed_are_budgeted_and_rest_longer_each_time(served):
    world = served()
    for _ in range(8):
        world.server.die()
        world.run_for(90 * SECOND)
        if not world.server.alive:
            break
    assert phases(world) == [Phase.SUCCEEDED] * 3
    assert len(world.supervisor.restarts) == world.settings.remediation.budget.count
    assert why_not(world) == ["budget_spent"]
    rests = [
        b.created_at_ms - a.since_ms
        for a, b in zip(*(world.store.remediations()[::-1][i:] for i in (0, 1)), strict=False)
    ]
    assert rests[1] >= 2 * 10 * SECOND


def test_a_restart_waits_until_the_memory_of_the_dead_is_free(served):
    world = served()
    world.server.bytes_back_after_ms = 20 * SECOND
    world.server.die()
    died_ms = world.now_ms
    world.run_for(90 * SECOND)
    assert world.server.well
    assert world.server.started_at_ms - died_ms >= 20 * SECOND
    assert [s.outcome for s in world.store.starts(SERVER, limit=5)] == [StartOutcome.HEALTHY] * 2


def test_an_orphan_that_holds_memory_is_ended_before_the_next_start(served):
    world = served()
    world.server.orphans_until_ms = world.now_ms + 10 * MINUTE
    world.server.die("killed by signal 9")
    world.run_for(90 * SECOND)
    assert world.server.well
    assert world.server.lives == 2
    assert phases(world) == [Phase.SUCCEEDED]


def test_while_an_orphan_cannot_be_ended_nothing_is_started_into_its_memory_and_a_person_is_told(served):
    world = served(step_within=40 * SECOND)
    world.server.orphans_until_ms = world.now_ms + 10 * MINUTE
    world.server.is_stubborn = True
    world.server.die("killed by signal 9")
    world.run_for(3 * MINUTE)
    assert world.server.lives == 1
    assert asked(world, "start") == []
    assert set(phases(world)) <= {Phase.FAILED}
    assert "failed" in told(world)


def test_a_restart_of_gpuwatch_itself_tells_nothing_again_and_does_nothing_again(served):
    world = served()
    world.server.die()
    run_until(world, lambda: phases(world) == [Phase.SUCCEEDED])
    world.run_for(40 * SECOND)
    heard, restarts = list(world.slack.received), list(world.supervisor.restarts)
    for _ in range(3):
        world.kill_daemon()
        world.run_for(40 * SECOND)
    assert world.slack.received == heard
    assert world.supervisor.restarts == restarts
    check_words_and_rows(world)


def test_one_miss_of_health_or_ten_seconds_of_silence_are_no_death(served):
    world = served()
    world.server.wedged = True
    world.tick()
    world.server.wedged = False
    world.run_for(10 * SECOND)
    world.server.busy_since_ms = world.now_ms
    world.run_for(10 * SECOND)
    world.server.busy_since_ms = None
    world.run_for(30 * SECOND)
    assert world.store.remediations() == []
    assert world.slack.received == []


def test_a_server_that_its_supervisor_starts_again_is_left_to_it(served):
    world = served()
    world.supervisor.restarts_by_itself_after_ms = 10 * SECOND
    world.server.die()
    world.run_for(90 * SECOND)
    assert world.server.well
    assert world.supervisor.restarts == []


def test_a_server_that_somebody_starts_while_evidence_is_taken_is_left_to_come_up(served):
    """Found as story 30: the capture takes seconds, and then a server was stopped that was starting."""
    world = served()
    world.server.die()
    run_until(world, lambda: present_step(world) == "capture")
    world.server.start()
    world.run_for(90 * SECOND)
    assert world.server.lives == 2
    assert ends(world) == [(Phase.ABORTED, "started_meanwhile")]


def test_a_short_halt_is_left_alone_and_a_long_one_ends_in_a_restart(served):
    world = served()
    world.server.stalled = True
    world.run_for(20 * SECOND)
    world.server.stalled = False
    world.run_for(40 * SECOND)
    assert world.store.remediations() == []
    world.server.stalled = True
    world.run_for(2 * MINUTE)
    assert world.server.works
    assert phases(world) == [Phase.SUCCEEDED]


def test_what_an_operator_stops_in_the_middle_of_a_restart_stays_stopped(served):
    world = served()
    world.server.die()
    run_until(world, lambda: world.server.alive)
    world.run_for(3 * SECOND)
    world.server.stop_by_operator()
    world.run_for(3 * MINUTE)
    assert not world.server.alive
    assert ends(world) == [(Phase.ABORTED, "stopped_by_operator")]


# ---- arguments


def test_arguments_that_cannot_work_are_not_tried_for_ever(served):
    world = served(serves=False, arguments={**ARGUMENTS, "nonsense": 1})
    world.run_for(10 * MINUTE)
    assert world.server.lives == 1
    assert world.supervisor.restarts == []
    assert world.store.starts(SERVER, limit=1)[0].failure == "bad_argument"
    assert why_not(world)[0] in {"would_fail_again", "nothing_to_change"}


def test_nonsense_that_a_person_wants_is_refused_by_the_check_and_the_server_serves_on(served):
    world = served()
    wish(world, nonsense=1)
    world.run_for(90 * SECOND)
    assert world.server.lives == 1
    assert ends(world) == [(Phase.FAILED, "revision_refused")]
    assert world.revisions.current() == 1


def test_a_change_that_a_person_wants_is_made_and_no_request_is_lost(served):
    world = served()
    wish(world, max_num_seqs=32)
    run_until(world, lambda: phases(world) == [Phase.SUCCEEDED])
    assert world.server.works
    assert world.server.shape.max_num_seqs == 32
    assert world.server.revision == world.revisions.current() == 2
    assert world.server.work.aborted == 0
    assert world.store.settings()[f"wanted:{SERVER}"] == "2"
    check_words_and_rows(world)


def test_a_revision_that_cannot_start_is_rolled_back(served):
    world = served()
    wish(world, max_model_len=400_000)
    run_until(world, lambda: phases(world) == [Phase.ROLLED_BACK])
    assert world.server.works
    assert world.server.revision == world.revisions.current() == 1
    assert ends(world) == [(Phase.ROLLED_BACK, "died_again")]
    assert "rolled_back" in told(world)
    world.run_for(2 * MINUTE)
    assert world.server.lives == 3


def test_a_length_that_does_not_fit_is_made_shorter_within_bounds(served):
    arguments = {**ARGUMENTS, "gpu_memory_utilization": 0.5}
    world = served(serves=False, arguments=arguments)
    run_until(world, lambda: Phase.SUCCEEDED in phases(world), 5 * MINUTE)
    assert world.server.works
    assert 4096 <= world.server.shape.max_model_len < 32768
    assert world.server.shape.gpu_memory_utilization == 0.5


def test_preemption_ends_with_fewer_requests_at_once(served):
    world = served()
    world.server.work.clients, world.server.work.tokens_per_request = 20, 5000
    run_until(world, lambda: Phase.SUCCEEDED in phases(world), 5 * MINUTE)
    assert 8 <= world.server.shape.max_num_seqs < 20
    assert world.server.works


def test_arguments_that_did_not_help_are_not_tried_a_second_time(served):
    world = served(budget=config.BudgetSettings(count=6))
    world.server.work.clients, world.server.work.tokens_per_request = 20, 16384
    run_until(world, lambda: Phase.ROLLED_BACK in phases(world), 6 * MINUTE)
    world.run_for(2 * MINUTE)
    tried = [r.plan.after for r in world.store.remediations() if r.asked_at_ms is not None]
    assert len(set(tried)) == len(tried)


def test_a_rival_costs_the_server_a_smaller_share_until_it_is_gone(served):
    world = served(budget=config.BudgetSettings(count=6))
    rival(world, 6)
    run_until(world, lambda: not world.server.alive)
    assert world.store.remediations() == []
    run_until(world, lambda: world.server.works and world.revisions.current() != 1, 6 * MINUTE)
    assert world.server.shape.gpu_memory_utilization < 0.85
    reduced = world.store.remediations()[0]
    assert reduced.plan.signals[f"rival_bytes:{world.gpu.device.uuid} python3"] == str(6 * GIB)
    world.run_for(2 * MINUTE)
    assert world.server.works
    no_rival(world)
    run_until(world, lambda: world.revisions.current() == 1 and world.server.works, 6 * MINUTE)
    run_until(world, lambda: not world.store.live_remediations())
    assert world.server.shape.gpu_memory_utilization == 0.85
    assert phases(world)[-2:] == [Phase.SUCCEEDED] * 2
    check_words_and_rows(world)


def test_memory_that_a_rival_took_after_a_death_is_waited_for_before_the_share_shrinks(served):
    world = served()
    world.server.die()
    world.run_for(3 * SECOND)
    rival(world, 20)
    world.run_for(4 * MINUTE)
    assert world.revisions.current() == 1
    assert "memory_not_free" in why_not(world)
    run_until(world, lambda: world.server.works, 4 * MINUTE)
    assert world.server.shape.gpu_memory_utilization < 0.6


def test_memory_that_comes_back_in_time_leaves_the_settings_as_they_are(served):
    world = served()
    world.server.die()
    world.run_for(3 * SECOND)
    rival(world, 20)
    world.run_for(2 * MINUTE)
    no_rival(world)
    run_until(world, lambda: world.server.works)
    assert world.revisions.current() == 1


def test_a_port_in_use_is_no_reason_to_change_arguments(served):
    world = served()
    world.server.port_busy = True  # by somebody who accepts connections and never answers
    died_ms = world.now_ms
    world.server.die()
    run_until(world, lambda: "failed" in told(world))
    (done,) = world.store.remediations(SERVER, limit=9)
    assert (done.plan.alert, done.facts["failure"]) == ("VLLMDown", "port_busy")
    assert world.supervisor.restarts[0] - died_ms <= 10 * SECOND
    world.run_for(5 * MINUTE)
    assert world.revisions.current() == 1
    assert len(world.supervisor.restarts) <= 2
    assert "failed" in told(world)


# ---- in the middle of a change


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", STEPS_OF_A_CHANGE)
def test_killed_at_any_step_of_a_change_the_server_ends_in_one_of_the_two_revisions(served, step, when):
    world = served()
    world.kill_daemon(f"{when} {step}")
    wish(world, max_num_seqs=32)
    run_until(world, lambda: ends(world) and not world.store.live_remediations(), 4 * MINUTE)
    assert world.kill_at is None
    assert world.server.works
    wanted = {Phase.SUCCEEDED: 2, Phase.ROLLED_BACK: 1}[phases(world)[-1]]
    assert world.server.revision == world.revisions.current() == wanted
    world.run_for(20 * SECOND)
    check_words_and_rows(world)
    with world.view() as rows:
        (saved,) = rows.remediations()
    walked = tuple(past.action for past in saved.course if not past.is_undo)
    assert walked == STEPS_OF_A_CHANGE[: len(walked) if wanted == 1 else None]
    assert [p.ended_at_ms for p in saved.course[:-1]] == [p.began_at_ms for p in saved.course[1:]]


@pytest.mark.parametrize("step", STEPS_OF_A_CHANGE)
def test_a_pause_in_the_middle_of_a_change_takes_it_back_and_nothing_new_begins(served, step):
    world = served()
    world.server.bytes_back_after_ms = 8 * SECOND
    wish(world, max_num_seqs=32)
    run_until(world, lambda: present_step(world) == step)
    world.pause()
    run_until(world, lambda: not world.store.live_remediations(), 4 * MINUTE)
    assert phases(world) in ([Phase.ABORTED], [Phase.ROLLED_BACK])
    assert world.server.works
    assert world.server.revision == world.revisions.current() == 1
    world.server.die()
    world.run_for(MINUTE)
    assert len(world.store.remediations()) == 1
    assert not world.server.alive


@pytest.fixture
def dead(served):
    """A world whose server is dead, and is to have other settings because a person wants them."""
    world = served(mode=Mode.OBSERVE)
    world.server.die()
    world.run_for(10 * SECOND)
    wish(world, max_num_seqs=32)
    return world


@pytest.mark.parametrize("step", ["check", "swap", "start"])
def test_a_pause_before_a_dead_server_was_started_leaves_it_dead_with_the_settings_of_before(dead, step):
    world = dead
    world.kill_daemon(f"before {step}")
    while world.down_until_ms is None:
        world.tick()
    world.pause()
    run_until(world, lambda: ends(world) and not world.store.live_remediations())
    assert phases(world)[-1] is Phase.ABORTED
    assert world.revisions.current() == 1
    world.run_for(MINUTE)
    assert (world.server.lives, world.server.alive) == (1, False)


@pytest.mark.parametrize("step", ["start", "canary", "open_door"])
def test_a_pause_after_a_dead_server_was_started_ends_with_the_settings_of_before(dead, step):
    world = dead
    run_until(world, lambda: present_step(world) == step)
    world.pause()
    run_until(world, lambda: not world.store.live_remediations(), 4 * MINUTE)
    assert phases(world)[-1] is Phase.ROLLED_BACK
    assert world.server.works
    assert world.server.revision == world.revisions.current() == 1


def test_a_server_that_starts_with_neither_settings_is_not_tried_with_those_of_before_again(served):
    too_small = {**ARGUMENTS, "gpu_memory_utilization": 0.5}
    world = served(serves=False, arguments=too_small, just_started_grace=MINUTE)
    world.server.failing_starts = 1
    run_until(world, lambda: Phase.FAILED in phases(world), 5 * MINUTE)
    assert (world.server.lives, world.revisions.current()) == (2, 1)
    world.run_for(5 * MINUTE)
    assert why_not(world) == ["would_fail_again"]
    assert (world.server.lives, world.revisions.current()) == (2, 1)
    check_words_and_rows(world)


def test_a_stop_by_hand_in_the_middle_of_a_change_is_respected(served):
    world = served()
    wish(world, max_num_seqs=32)
    run_until(world, lambda: present_step(world) == "drain")
    world.server.stop_by_operator()
    world.run_for(2 * MINUTE)
    assert not world.server.alive
    assert ends(world) == [(Phase.ABORTED, "stopped_by_operator")]
    assert world.revisions.current() in {1, 2}


@pytest.mark.parametrize("step", ["stop", "swap", "start", "open_door"])
def test_a_step_that_cannot_be_asked_for_a_while_is_asked_again(served, step):
    world = served()
    world.hands.faults[step] = 3
    wish(world, max_num_seqs=32)
    run_until(world, lambda: phases(world) == [Phase.SUCCEEDED])
    assert world.server.revision == 2


@pytest.mark.parametrize("step", ["swap", "start"])
def test_a_step_that_cannot_be_done_for_good_is_taken_back_or_told(served, step):
    world = served()
    world.hands.refused.add(step)
    wish(world, max_num_seqs=32)
    run_until(world, lambda: ends(world) and not world.store.live_remediations(), 4 * MINUTE)
    assert phases(world) == ([Phase.ROLLED_BACK] if step == "swap" else [Phase.FAILED])
    if step == "swap":
        # To take it back the server is started again, which is no swap.
        assert world.server.works
    assert world.revisions.current() == 1
    assert set(told(world)) & {"failed", "rolled_back"}


# ---- enough is enough


def test_after_two_failures_a_person_is_told_and_nothing_more_is_done(served):
    world = served()
    world.server.failing_starts = 50
    world.server.die()
    world.run_for(15 * MINUTE)
    assert phases(world) == [Phase.FAILED] * 2
    assert why_not(world) == ["two_failures"]
    assert told(world).count("failed") == 2
    world.server.failing_starts = 0
    world.resume()
    world.run_for(3 * MINUTE)
    assert world.server.works


def test_an_open_breaker_is_closed_by_a_person_who_may_skip_the_backlog(served):
    world = served(breaker=config.BudgetSettings(count=1))
    world.server.failing_starts = 1
    world.server.die()
    run_until(world, lambda: phases(world) == [Phase.FAILED])
    world.run_for(5 * MINUTE)
    assert why_not(world) == ["breaker_open"]
    world.wish(remediation.wishes.resume(world.now_ms, skip_backlog=True))
    world.run_for(3 * MINUTE)
    assert why_not(world) == ["backlog_skipped"]
    assert not world.server.alive
    world.server.start()
    world.run_for(MINUTE)
    world.server.die()
    world.run_for(2 * MINUTE)
    assert world.server.works


def test_a_crowd_is_held_back_and_let_in_again(served):
    world = served()
    world.server.work.clients, world.server.work.tokens_per_request = 80, 1024
    run_until(world, lambda: world.server.limit("running") is not None)
    world.server.work.clients = 2
    run_until(world, lambda: phases(world) == [Phase.SUCCEEDED])
    assert world.server.limit("running") is None
    assert world.server.lives == 1


def test_a_class_of_actions_that_needs_approval_waits_for_it_while_others_go_on(served):
    world = served(modes={ActionClass.RECONFIGURE: Mode.APPROVE})
    world.server.work.clients, world.server.work.tokens_per_request = 20, 5000
    run_until(world, world.store.live_remediations)
    world.run_for(20 * SECOND)
    (waiting,) = world.store.live_remediations()
    assert waiting.phase is Phase.AWAITING_APPROVAL
    assert world.hands.asked == []
    world.wish(remediation.wishes.word(waiting.plan.id, "approved", "eve"))
    run_until(world, lambda: Phase.SUCCEEDED in phases(world))
    assert world.revisions.current() == 2


def test_in_observe_mode_a_change_is_decided_and_nothing_is_touched(served):
    world = served(mode=Mode.OBSERVE)
    world.server.work.clients, world.server.work.tokens_per_request = 20, 5000
    world.run_for(MINUTE)
    assert Phase.REHEARSED in phases(world)
    assert set(phases(world)) == {Phase.REHEARSED}
    assert world.hands.asked == []
    assert world.revisions.files.keys() == {1}
