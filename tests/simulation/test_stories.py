"""Random incidents on the simulated host: whatever comes, gpuwatch does no harm and loses no word.

GPUWATCH_STORIES says how many (default 1000). A story that fails names its seed; `test_named_stories.py` and
`test_incidents.py` hold what was found this way. One story in ten has all shipped rules, the others those
that something is done about; and many ticks come late, as on a busy host: else a thousand would take an hour.
"""

import contextlib
import os
import random

import pytest
from tests.sim_vllm import GIB, RIVAL_PID
from tests.world import (
    ARGUMENTS,
    BOUNDS,
    MINUTE,
    SECOND,
    SERVER,
    World,
    quick_rules,
    shipped_groups,
)

from gpuwatch import remediation
from gpuwatch.errors import StoreError
from gpuwatch.records import ActionClass, Mode

STORIES = int(os.environ.get("GPUWATCH_STORIES", "1000"))
CHUNK = 20
JUDGED = ("server", "starts", "processes", "remedies")


def a_daemon_kill(world, rng):
    world.kill_daemon(
        rng.choice([None, None, "before the deed", "inside a step", "after the deed", "before sending"])
    )


def a_death(world, rng):
    world.server.failing_starts = rng.choice([0, 0, 0, 1, 2])
    world.server.die()


def a_run_of_deaths(world, rng):
    for _ in range(rng.randrange(2, 4)):
        world.server.die()
        world.run_for(rng.randrange(20, 60) * SECOND, step_ms=5 * SECOND)


def an_operator_is_faster(world, rng):
    if not world.server.alive and world.supervisor.stopping_until_ms is None:
        world.server.start()


def a_death_and_a_hand_that_starts_it(world, rng):
    world.server.die()
    world.run_for(rng.randrange(0, 4) * SECOND)
    an_operator_is_faster(world, rng)


def a_wedge(world, rng):
    world.server.wedged = world.server.up


def a_busy_spell(world, rng):
    world.server.busy_since_ms = world.now_ms if world.server.well and not world.server.busy else None


def an_operator_stops_or_starts(world, rng):
    if world.server.stopped_by_operator:
        world.server.start()
    elif world.supervisor.stopping_until_ms is None and world.server.alive:
        world.server.stop_by_operator()


def a_pause_or_resume(world, rng):
    skip = rng.random() < 0.3
    resume = remediation.wishes.resume(world.now_ms, skip_backlog=skip)
    until_ms = world.now_ms + MINUTE
    rng.choice([world.pause, lambda: world.pause(until_ms), lambda: world.wish(resume)])()


def an_approval(world, rng):
    with contextlib.suppress(StoreError), world.view() as view:
        for r in view.live_remediations():
            world.wish({f"word:{r.plan.id}": rng.choice(["approved|eve", "denied|eve", "abort|eve"])})


def a_rival(world, rng):
    """Somebody else takes what is free, or gives it back."""
    if RIVAL_PID in world.gpu.holders:
        world.gpu.give(RIVAL_PID, at_ms=world.now_ms + SECOND)
    else:
        wanted = rng.choice([2, 6, 12, 30]) * GIB
        world.gpu.take(RIVAL_PID, "python3", max(GIB, min(wanted, world.gpu.free - GIB // 2)))


def a_death_for_which_a_rival_waited(world, rng):
    a_death(world, rng)
    a_rival(world, rng)


def a_stall(world, rng):
    world.server.stalled = world.server.up and not world.server.stalled


def a_sleep_or_waking(world, rng):
    world.server.asleep = world.server.up and not world.server.asleep


def a_crowd(world, rng):
    work = world.server.work
    work.clients, work.tokens_per_request = rng.choice([(0, 4096), (2, 4096), (80, 1024), (40, 16384)])


def an_orphan(world, rng):
    """The main process dies, the engine lives on; not even KILL ends every one of them at once."""
    world.server.orphans_until_ms = world.now_ms + rng.choice([10, 60, 600]) * SECOND
    world.server.is_stubborn = rng.random() < 0.3
    world.server.die("killed by signal 9")


def memory_that_comes_back_late(world, rng):
    world.server.bytes_back_after_ms = rng.choice([0, 2, 10, 45]) * SECOND


def a_busy_port(world, rng):
    world.server.port_busy = not world.server.port_busy


def a_server_without_guest(world, rng):
    world.server.has_guest = not world.server.has_guest


def a_supervisor_that_restarts_by_itself(world, rng):
    after_ms = world.supervisor.restarts_by_itself_after_ms
    world.supervisor.restarts_by_itself_after_ms = None if after_ms else rng.choice([1, 10]) * SECOND


def a_hand_that_fails(world, rng):
    step = rng.choice(["drain", "stop", "swap", "start", "check", "open_door", "lift", "limit_running"])
    kind = rng.choice(["faults", "faults", "refused", "broken"])
    if kind == "faults":
        world.hands.faults[step] = rng.choice([1, 3, 50])
    else:
        getattr(world.hands, kind).symmetric_difference_update({step})


def a_disk_of_settings_that_fails(world, rng):
    world.revisions.fails = not world.revisions.fails


def a_change_that_a_person_wants(world, rng):
    """Some of them good, some of them nonsense, some too much for the GPU."""
    change = rng.choice(
        [
            {"max_num_seqs": rng.choice([8, 32, 128])},
            {"gpu_memory_utilization": rng.choice([0.5, 0.7, 0.95])},
            {"max_model_len": rng.choice([8192, 400_000])},
            {"max_num_batched_tokens": rng.choice([4, 4096])},
            {"nonsense": 1},
        ]
    )
    arguments, revision = {**ARGUMENTS, **change}, None
    if rng.random() < 0.2:
        arguments, revision = None, rng.choice([1, 2, 99])
    world.wish(
        remediation.wishes.change(
            SERVER, arguments=arguments, revision=revision, by="eve", why="wish", at_ms=world.now_ms
        )
    )


def a_lost_gpu(world, rng):
    world.nvml.devices[0].lost = not world.nvml.devices[0].lost


def a_missing_driver(world, rng):
    world.nvml.driver_missing = not world.nvml.driver_missing


def a_deaf_supervisor(world, rng):
    world.supervisor.unreachable = not world.supervisor.unreachable


def a_forbidding_supervisor(world, rng):
    world.supervisor.forbids = not world.supervisor.forbids


def a_hanging_health_reader(world, rng):
    world.health.hangs = not world.health.hangs


def chat_trouble(world, rng):
    chat = rng.choice([world.slack, world.ding])
    kind = rng.choice(["down", "gone", "limited"])
    if kind == "limited":
        chat.limited_until_ms = world.now_ms + rng.randrange(5, 60) * SECOND
    else:
        setattr(chat, kind, not getattr(chat, kind))


def a_clock_jump(world, rng):
    world.jump(rng.choice([2, 70, 3600]) * SECOND)


def a_full_disk(world, rng):
    world.full_disk(not world.is_full)


def a_disk_that_goes_or_comes_back(world, rng):
    world.gone_disk(not world.is_gone)


def deaths_while_nothing_is_saved(world, rng):
    rng.choice([world.full_disk, world.gone_disk])(True)
    a_run_of_deaths(world, rng)
    if rng.random() < 0.5:
        a_daemon_kill(world, rng)


INCIDENTS = [
    a_death,
    a_death,
    a_death,
    a_run_of_deaths,
    an_operator_is_faster,
    a_death_and_a_hand_that_starts_it,
    a_wedge,
    a_busy_spell,
    a_daemon_kill,
    a_daemon_kill,
    an_operator_stops_or_starts,
    a_pause_or_resume,
    an_approval,
    a_rival,
    a_rival,
    a_death_for_which_a_rival_waited,
    a_stall,
    a_sleep_or_waking,
    a_crowd,
    a_crowd,
    an_orphan,
    memory_that_comes_back_late,
    a_busy_port,
    a_server_without_guest,
    a_supervisor_that_restarts_by_itself,
    a_hand_that_fails,
    a_hand_that_fails,
    a_disk_of_settings_that_fails,
    a_change_that_a_person_wants,
    a_change_that_a_person_wants,
    a_change_that_a_person_wants,
    a_lost_gpu,
    a_missing_driver,
    a_deaf_supervisor,
    a_forbidding_supervisor,
    a_hanging_health_reader,
    chat_trouble,
    chat_trouble,
    a_clock_jump,
    a_full_disk,
    a_disk_that_goes_or_comes_back,
    deaths_while_nothing_is_saved,
    deaths_while_nothing_is_saved,
]


def groups(seed: int):
    if seed % 10 == 0:
        return (*shipped_groups(), *quick_rules())
    return (*(group for group in shipped_groups() if group.name in JUDGED), *quick_rules())


@contextlib.contextmanager
def story(seed: int):
    rng = random.Random(seed)
    modes = rng.choice(
        [*[{}] * 6, {ActionClass.RECONFIGURE: Mode.APPROVE}, {ActionClass.REVERSIBLE: Mode.AUTO}]
    )
    with World(
        seed,
        groups(seed),
        arguments=rng.choice([ARGUMENTS, ARGUMENTS, None]),
        server={"bounds": BOUNDS},
        mode=rng.choice([*[Mode.AUTO] * 8, Mode.APPROVE, Mode.OBSERVE]),
        modes=modes,
        cooldown=rng.choice([10, 30]) * SECOND,
        just_started_grace=rng.choice([0, 5, 30]) * SECOND,
        verify_for=10 * SECOND,
        step_within=rng.choice([40, 90]) * SECOND,
        drain_within=rng.choice([5, 20]) * SECOND,
        free_within=rng.choice([20, 60]) * SECOND,
        hold_for=20 * SECOND,
        approval_expires=30 * SECOND,
    ) as world:
        world.server.startup_ms = rng.choice([4, 10, 20]) * SECOND
        world.server.start()
        world.run_for(world.server.startup_ms + 10 * SECOND, step_ms=5 * SECOND)
        for _ in range(rng.randrange(1, 4)):
            rng.choice(INCIDENTS)(world, rng)
            step_ms = rng.choice([1, 2, 5]) * SECOND
            world.run_for(rng.randrange(1, 7) * step_ms, step_ms=step_ms)
        yield world


@pytest.mark.timeout(300)
@pytest.mark.parametrize("chunk", range(-(-STORIES // CHUNK)))
def test_no_incident_makes_gpuwatch_do_harm_or_lose_a_word(chunk):
    for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        try:
            with story(seed) as world:
                world.heal()
                world.run_for(30 * SECOND, step_ms=5 * SECOND)
                world.jump(10 * MINUTE)  # an open circuit or a long back-off of a chat is over by then
                world.run_for(20 * SECOND, step_ms=5 * SECOND)
                world.check_all_was_told()
                world.check_all_was_saved()
        except AssertionError as error:
            raise AssertionError(f"story {seed}: {error}") from error


def test_the_same_seed_tells_the_same_story():
    def told():
        for seed in range(8):
            with story(seed) as world, world.view() as view:
                yield [(i, t.at_ms, t.alert.rule, t.now) for i, t in view.transitions(limit=1000)]

    happened = list(told())
    assert any(happened)
    assert happened == list(told())
