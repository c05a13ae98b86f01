"""What the cycle does with sources that are late or gone, and what it logs of rules."""

import dataclasses

import msgspec
import pytest
from tests.world import HOUR, MINUTE, SECOND, World

from gpuwatch import rules
from gpuwatch.cycle import Cycle
from gpuwatch.records import AlertState, Mode, Place, Rule, RuleGroup

AT = Place(file="r.yaml", line=1)


def alert(name, expr, **more):
    return Rule(alert=name, expr=expr, place=AT, expr_place=AT, **more)


def record(name, expr, **more):
    return Rule(record=name, expr=expr, place=AT, expr_place=AT, **more)


def group(*given, name="g"):
    return RuleGroup(name=name, interval_ms=SECOND, rules=given, place=AT)


@pytest.fixture
def watched():
    """Makes a world under these rule groups that was watched for half a minute."""
    worlds = []

    def make(*groups):
        world = World(mode=Mode.OBSERVE, rule_groups=rules.compile_groups(groups))
        worlds.append(world)
        world.server.start()
        world.run_for(30 * SECOND)
        return world

    yield make
    for world in worlds:
        world.close()


def firing(world):
    return {a.rule for a in world.store.active_alerts() if a.state is AlertState.FIRING}


def collect(world):
    for source in world.cycle.parts.sources:
        world.cycle.collect(source, world.now_ms)


# ---- a host that slept


def test_after_a_sleep_nothing_is_judged_until_every_source_was_read_again(watched):
    world = watched(group(alert("Warm", "gpu_temperature_celsius > 0")))
    world.clock.advance(HOUR)
    assert world.cycle.tick(world.now_ms).at_ms < world.now_ms
    assert firing(world) == {"Warm"}
    collect(world)
    world.clock.advance(SECOND)
    assert world.cycle.tick(world.now_ms).at_ms == world.now_ms
    assert firing(world) == {"Warm"}
    assert world.cycle.last_report.transitions == ()


def test_after_a_sleep_a_source_that_hangs_is_not_waited_for_without_end(watched):
    world = watched(group(alert("Warm", "gpu_temperature_celsius > 0")))
    world.clock.advance(HOUR)
    world.cycle.tick(world.now_ms)
    world.clock.advance(15 * SECOND)
    assert world.cycle.tick(world.now_ms).at_ms == world.now_ms


# ---- what a reload takes away


def test_a_server_that_a_reload_takes_away_leaves_no_series(watched):
    world = watched(group(alert("Down", "server_down == 1 or up == 0")))
    world.server.die()
    world.run_for(MINUTE)
    assert firing(world) == {"Down"}
    old = world.cycle
    parts = dataclasses.replace(
        old.parts,
        settings=msgspec.structs.replace(world.settings, servers=[]),
        sources=[source for source in old.parts.sources if ":" not in source.name],
        supervisors={},
    )
    world.cycle = Cycle(parts)
    world.cycle.take_over(old)
    collect(world)
    world.clock.advance(SECOND)
    world.cycle.tick(world.now_ms)
    assert firing(world) == set()


# ---- what is logged of rules


def test_rules_of_one_name_are_each_told_and_counted_when_they_fail(watched, caplog):
    broken = "max(up) * on () (up)"
    world = watched(group(alert("Bad", broken), alert("Bad", broken, labels={"severity": "critical"})))
    assert world.cycle.troubles.count("rule ") == 2
    told = [message for message in caplog.messages if "duplicate series" in message]
    assert [message.partition(": ")[0] for message in told] == [
        "rule r.yaml;g/Bad",
        'rule r.yaml;g/Bad{severity="critical"}',
    ]


def test_what_promql_remarks_is_told_of_each_rule_though_they_have_one_name(watched, caplog):
    rate = "rate(server_down[1m])"
    watched(
        group(record("speed", rate), record("speed", rate, labels={"a": "b"})),
        group(record("speed", rate), name="h"),
    )
    told = [message for message in caplog.messages if "might not be a counter" in message]
    assert len(told) == 3


def test_a_group_whose_name_begins_like_anothers_does_not_end_its_troubles(watched, caplog):
    watched(group(record("well", "vector(1)")), group(record("bad", "max(up) * on () (up)"), name="g/x"))
    assert len([message for message in caplog.messages if "g/x/bad" in message]) == 1
