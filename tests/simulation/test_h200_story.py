"""The story that `gpu_hands.py` plays on a real H200, with its figures on a simulated one, in its time."""

import pytest
from tests import h200
from tests.sim_vllm import RIVAL_PID, SERVER
from tests.world import MINUTE, SECOND, World

from gpuwatch import config
from gpuwatch.records import Mode, Phase

FIRST_START_MS, START_MS = 110 * SECOND, 45 * SECOND  # of the 0.6B shape, eagerly, from a cold disk and after


@pytest.fixture
def host():
    budget = config.BudgetSettings(count=h200.BUDGET["count"], per=config.Duration(h200.BUDGET["per"]))
    settings = {**h200.REMEDIATION, "mode": Mode.AUTO, "budget": budget}
    server = {"bounds": h200.BOUNDS, "start_deadline": config.Duration(4 * MINUTE)}
    with World(0, arguments=h200.ARGUMENTS, server=server, **settings) as world:
        world.gpu.device.memory_total = h200.TOTAL_BYTES
        world.gpu.device.memory_reserved = h200.RESERVED_BYTES
        world.server.startup_ms = FIRST_START_MS
        world.server.start()
        world.run_for(FIRST_START_MS + 20 * SECOND)
        world.server.startup_ms = START_MS
        yield world


def grow(world):
    """What the rival does within a second: it takes what is free, until it has what it wants."""
    _, held = world.gpu.holders.get(RIVAL_PID, ("", 0))
    more = min(world.gpu.free - h200.LEAVES_BYTES, h200.RIVAL_BYTES - held)
    if more > 0:
        world.gpu.take(RIVAL_PID, "python3", held + more)


def story(world):
    """Seconds from the first start to the end, and each remediation, oldest first."""
    began_ms = world.server.started_at_ms

    def run_until(holds, *, rival=True):
        while not holds():
            assert world.now_ms - began_ms < h200.WITHIN_S * SECOND, world.store.remediations()
            if rival:
                grow(world)
            world.tick()

    run_until(lambda: not world.server.alive)
    run_until(lambda: world.server.works and not world.store.live_remediations())
    smaller = world.server.shape.gpu_memory_utilization
    world.gpu.give(RIVAL_PID, at_ms=world.now_ms)
    run_until(lambda: world.revisions.current() == 1 and world.server.works, rival=False)
    run_until(lambda: not world.store.live_remediations(), rival=False)
    return (world.now_ms - began_ms) // SECOND, smaller, world.store.remediations()[::-1]


def actions(done):
    return [(r.plan.alert, r.plan.actions[-1], r.phase) for r in done]


SMALLER = ("VLLMDown", "reconfigure", Phase.SUCCEEDED)
BACK = ("VLLMSettingsReduced", "reconfigure", Phase.SUCCEEDED)
DIED_AGAIN = ("VLLMDown", "restart", Phase.FAILED)  # it began before the rival had all


@pytest.mark.parametrize(
    ("back_after_ms", "expected"),
    [(0, [SMALLER, BACK]), (2 * SECOND, [DIED_AGAIN, SMALLER, BACK])],
    ids=["gone before anybody looks", "gone while the restart begins"],
)
def test_a_rival_of_an_h200_is_survived_and_outlived_within_one_call(host, back_after_ms, expected):
    host.server.bytes_back_after_ms = back_after_ms
    took_s, smaller, done = story(host)
    assert actions(done) == expected
    assert smaller == 0.40
    assert took_s < h200.WITHIN_S - 100
    assert host.store.starts(SERVER, limit=9)[-1].failure == "runtime_oom"
    assert host.server.shape.gpu_memory_utilization == h200.SHARE
