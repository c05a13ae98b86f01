"""Random incidents on the simulated host: whatever comes, gpuwatch does no harm and loses no word.

GPUWATCH_STORIES says how many (default 500). A story that fails names its seed; `test_named_stories.py`
holds what was found this way.
"""

import contextlib
import os
import random

import pytest
from tests.world import GIB, MINUTE, SECOND, World

from gpuwatch.errors import StoreError
from gpuwatch.records import Mode

STORIES = int(os.environ.get("GPUWATCH_STORIES", "500"))
CHUNK = 10


def a_daemon_kill(world, rng):
    world.kill_daemon(
        rng.choice([None, "before the deed", "after the deed", "before sending", "after sending"])
    )


def a_death(world, rng):
    world.server.failing_starts = rng.choice([0, 0, 0, 1, 2])
    world.server.die()


def a_run_of_deaths(world, rng):
    for _ in range(rng.randrange(2, 6)):
        world.server.die()
        world.run_for(rng.randrange(20, 60) * SECOND)


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
    world.server.busy_since_ms = world.now_ms if world.server.up and not world.server.busy else None


def an_operator_stops_or_starts(world, rng):
    if world.server.stopped_by_operator:
        world.server.start()
    elif world.supervisor.stopping_until_ms is None:
        world.server.die()
        world.server.stopped_by_operator = True


def a_pause_or_resume(world, rng):
    rng.choice([world.pause, lambda: world.pause(world.now_ms + MINUTE), world.resume])()


def an_approval(world, rng):
    with contextlib.suppress(StoreError), world.view() as view:
        for r in view.live_remediations():
            world.wish({f"word:{r.plan.id}": rng.choice(["approved|eve", "denied|eve", "abort|eve"])})


def a_rival(world, rng):
    world.nvml.devices[0].processes = [] if world.nvml.devices[0].processes else [(77, "python3", 40 * GIB)]


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


@contextlib.contextmanager
def story(seed: int):
    rng = random.Random(seed)
    with World(
        seed,
        mode=rng.choice([Mode.AUTO, Mode.AUTO, Mode.AUTO, Mode.APPROVE, Mode.OBSERVE]),
        cooldown=rng.choice([10, 30]) * SECOND,
        just_started_grace=rng.choice([0, 5, 30]) * SECOND,
        verify_for=10 * SECOND,
        step_within=rng.choice([40, 90]) * SECOND,
        approval_expires=30 * SECOND,
    ) as world:
        world.server.startup_ms = rng.choice([3, 10, 20]) * SECOND
        world.server.start()
        world.run_for(rng.randrange(5, 30) * SECOND)
        for _ in range(rng.randrange(1, 7)):
            rng.choice(INCIDENTS)(world, rng)
            world.run_for(rng.randrange(1, 25) * SECOND)
        yield world


@pytest.mark.timeout(300)
@pytest.mark.parametrize("chunk", range(-(-STORIES // CHUNK)))
def test_no_incident_makes_gpuwatch_do_harm_or_lose_a_word(chunk):
    for seed in range(chunk * CHUNK, (chunk + 1) * CHUNK):
        try:
            with story(seed) as world:
                world.heal()
                world.run_for(40 * SECOND)
                world.jump(10 * MINUTE)  # an open circuit or a long back-off of a chat is over by then
                world.run_for(15 * SECOND)
                world.check_all_was_told()
                world.check_all_was_saved()
        except AssertionError as error:
            raise AssertionError(f"story {seed}: {error}") from error


def test_the_same_seed_tells_the_same_story():
    happened = []
    for _ in range(2):
        with story(28) as world, world.view() as view:
            happened.append([(i, t.at_ms, t.alert.rule, t.now) for i, t in view.transitions(limit=1000)])
    assert happened[0]
    assert happened[0] == happened[1]
