"""When groups are evaluated, and what goes on through a restart, a host that slept and a reload."""

from itertools import pairwise

import pytest

from gpuwatch import rules
from gpuwatch.cli.memory import Memory
from gpuwatch.records import AlertState, Labels, Place, Rule, RuleGroup, is_stale

PENDING, FIRING, RESOLVED = AlertState.PENDING, AlertState.FIRING, AlertState.RESOLVED
S, MINUTE, HOUR = 1000, 60_000, 3_600_000
START_MS = 1_800_000_000_000
AT = Place(file="r.yaml", line=1)


def alert(name="Hot", expr="heat > 80", **more):
    return Rule(alert=name, expr=expr, place=AT, expr_place=AT, **more)


def record(name="hot", expr="heat > 80"):
    return Rule(record=name, expr=expr, place=AT, expr_place=AT)


def group(*given, name="g", interval_ms=S, **more):
    return RuleGroup(name=name, interval_ms=interval_ms, rules=given, place=AT, **more)


class Shelf(Memory):
    """Samples that can be read and written."""

    def append(self, target, at_ms, labels, values):
        for series, value in zip(labels, values, strict=True):
            self.add(series, at_ms, value)


class Host:
    """One GPU whose heat is seen each second while somebody watches."""

    def __init__(self, *groups, **figures):
        self.samples = Shelf()
        self.now_ms = START_MS
        self.alerts = ()
        self.outage = rules.Outage(**figures)
        self.judge = self.told = None
        self.start(*groups)

    def start(self, *groups, watched_until_ms=None):
        """Begin, or begin again on the alerts that were saved."""
        compiled = rules.compile_groups(groups)
        self.judge = rules.Judge(compiled, watched_until_ms=watched_until_ms, outage=self.outage)

    def reload(self, *groups):
        old = self.judge
        self.start(*groups)
        self.judge.take_over(old)

    def tick(self, heat=0.0, after_ms=S):
        """Time goes by and all is judged; what changed, in short."""
        self.now_ms += after_ms
        self.samples.add(Labels.of("heat"), self.now_ms // S * S, float(heat))
        self.verdict = self.judge.judge(self.samples, self.alerts, self.now_ms)
        self.alerts = self.verdict.alerts
        return [(t.was, t.now) for t in self.verdict.transitions]

    def run(self, seconds, heat=0.0):
        return [change for _ in range(seconds) for change in self.tick(heat)]

    def seconds_until(self, change, heat):
        for second in range(1, 5000):
            if change in self.tick(heat):
                return second
        raise AssertionError(f"{change} never came")

    def present(self, name):
        """The series of a name that have not ended."""
        found = self.samples.select((), self.now_ms - 5 * MINUTE, self.now_ms)
        return {str(s.labels) for s in found if s.labels.metric == name and not is_stale(s.values[-1])}


# ---- slots


def evaluated(host, ticks, after_ms=S):
    """The instants of evaluation in so many ticks."""
    instants = []
    for _ in range(ticks):
        host.tick(after_ms=after_ms)
        if host.verdict.evaluations:
            instants.append(host.samples.select((), 0, host.now_ms)[-1].at_ms[-1])
    return instants


def test_a_group_is_evaluated_when_the_watch_begins_and_then_at_its_slots_alone():
    host = Host(group(record("one", "vector(1)"), interval_ms=15 * S))
    assert evaluated(host, 1) == [host.now_ms]
    instants = evaluated(host, 60)
    assert len(instants) == 4
    assert {after - before for before, after in pairwise(instants)} == {15 * S}


def test_the_time_of_evaluation_is_the_slots_also_if_the_tick_comes_late():
    host = Host(group(record("one", "vector(1)"), interval_ms=15 * S))
    first = evaluated(host, 16)[-1]
    (late,) = evaluated(host, 1, after_ms=20 * S)
    assert (late - first) % (15 * S) == 0


def test_a_change_is_told_when_it_is_noticed_and_dated_by_its_slot():
    host = Host(group(alert(), record("one", "vector(1)"), interval_ms=15 * S))
    host.tick()
    while not evaluated(host, 1):
        pass
    assert host.tick(90, after_ms=20 * S) == []
    assert host.tick(90, after_ms=15 * S) == [(None, FIRING)]
    (change,) = host.verdict.transitions
    assert change.at_ms == host.now_ms
    assert change.alert.fired_at_ms == host.now_ms - 5 * S


def test_ticks_that_come_after_the_full_second_judge_what_was_read_at_it():
    host = Host(group(alert()))
    host.now_ms += 300
    assert host.tick(90) == [(None, FIRING)]
    assert host.alerts[0].active_at_ms % S == 300


def test_what_was_missed_is_counted_and_not_made_up_for():
    host = Host(group(record("one", "vector(1)"), interval_ms=5 * S))
    host.run(10)
    assert host.judge.missed == 0
    assert len(evaluated(host, 1, after_ms=20 * S)) == 1
    assert host.judge.missed == 3


# ---- restart


def restart_after(host, away_ms, *groups):
    until_ms = host.now_ms
    host.now_ms += away_ms - S
    host.start(*groups, watched_until_ms=until_ms)


@pytest.mark.parametrize("away_ms", [2 * S, 40 * S, 30 * MINUTE])
def test_a_pending_alert_waits_for_the_time_that_nobody_saw(away_ms):
    hot = group(alert(for_ms=10 * S))
    host = Host(hot)
    host.run(7, heat=90)
    restart_after(host, away_ms, hot)
    assert host.seconds_until((PENDING, FIRING), heat=90) == 4


def test_after_a_long_outage_a_pending_alert_begins_anew():
    hot = group(alert(for_ms=10 * S))
    host = Host(hot)
    host.run(7, heat=90)
    restart_after(host, HOUR + 2 * S, hot)
    assert host.tick(90) == [(PENDING, None), (None, PENDING)]
    assert host.seconds_until((PENDING, FIRING), heat=90) == 10


def test_if_nobody_knows_how_long_the_outage_was_a_pending_alert_begins_anew():
    hot = group(alert(for_ms=10 * S))
    host = Host(hot)
    host.run(7, heat=90)
    host.start(hot)
    assert host.tick(90) == [(PENDING, None), (None, PENDING)]


def test_an_alert_with_a_long_for_waits_at_least_the_grace_period_after_an_outage():
    hot = group(alert(for_ms=20 * S))
    host = Host(hot, grace_ms=15 * S)
    host.run(19, heat=90)
    restart_after(host, 3 * S, hot)
    assert host.seconds_until((PENDING, FIRING), heat=90) == 16


def test_a_firing_alert_goes_on_firing_through_an_outage_of_any_length():
    hot = group(alert())
    host = Host(hot)
    host.run(3, heat=90)
    restart_after(host, 5 * HOUR, hot)
    assert host.tick(90) == []
    assert host.tick(10) == [(FIRING, RESOLVED)]


def test_keep_firing_for_goes_on_through_an_outage():
    hot = group(alert(keep_firing_for_ms=10 * S))
    host = Host(hot)
    host.run(3, heat=90)
    host.run(4)
    restart_after(host, 4 * S, hot)
    assert host.seconds_until((FIRING, RESOLVED), heat=0) == 4


def test_the_series_of_an_alert_that_is_gone_after_a_restart_ends():
    hot = group(alert())
    host = Host(hot)
    host.run(3, heat=90)
    restart_after(host, 4 * S, hot)
    host.tick(10)
    assert host.present("ALERTS") == host.present("ALERTS_FOR_STATE") == set()


def test_a_recorded_series_of_before_a_restart_ends_once_its_rule_had_its_turn():
    hot = group(record(), interval_ms=15 * S)
    host = Host(hot)
    host.run(16, heat=90)
    restart_after(host, 4 * S, hot)
    host.judge.end_unless_written([Labels.of("hot")])
    host.tick(10)
    assert host.present("hot") == set()


# ---- a host that slept


def test_a_host_that_slept_did_not_watch():
    hot = group(alert(for_ms=10 * S))
    host = Host(hot)
    host.run(7, heat=90)
    assert host.tick(90, after_ms=10 * MINUTE) == []
    assert host.seconds_until((PENDING, FIRING), heat=90) == 3


def test_a_tick_that_is_late_takes_nothing_from_the_time_that_was_watched():
    host = Host(group(alert(for_ms=10 * S)))
    host.run(7, heat=90)
    assert host.tick(90, after_ms=5 * S) == [(PENDING, FIRING)]


def test_no_alert_ends_for_what_was_not_read_while_the_host_slept():
    host = Host(group(alert(), interval_ms=15 * S))
    host.run(15, heat=90)
    assert host.tick(90, after_ms=HOUR + 7 * S) == []
    assert host.run(15, heat=90) == []


# ---- reload


def test_a_reload_keeps_alerts_slots_and_series():
    rule_group = group(alert(for_ms=10 * S), record())
    host = Host(rule_group)
    host.run(7, heat=90)
    host.reload(rule_group)
    assert host.tick(10) == [(PENDING, None)]
    assert host.present("hot") == host.present("ALERTS") == set()


def test_a_reload_takes_no_time_from_a_pending_alert():
    host = Host(group(alert(for_ms=10 * S)))
    host.run(7, heat=90)
    host.reload(group(alert(for_ms=10 * S)), group(alert("New"), name="new"))
    assert host.seconds_until((PENDING, FIRING), heat=90) == 4


def test_an_alert_whose_rule_is_gone_ends_and_its_end_is_told_if_it_fired():
    host = Host(group(alert(), alert("Slow", for_ms=HOUR)))
    host.run(3, heat=90)
    host.reload(group(alert("Other", "heat > 99")))
    assert sorted(host.tick(90), key=str) == [(FIRING, RESOLVED), (PENDING, None)]
    assert host.alerts == ()
    assert host.verdict.ended[0].resolved_at_ms == host.now_ms


def test_the_series_of_a_rule_that_is_gone_end_unless_another_writes_them():
    host = Host(group(record("a"), record("b")))
    host.run(3, heat=90)
    host.reload(group(record("b"), name="moved"))
    host.tick(90)
    assert host.present("a") == set()
    assert host.present("b") == {"b"}


def test_a_rule_that_fails_after_a_reload_leaves_the_series_of_before():
    host = Host(group(record("a"), name="gone"), group(record("b")))
    host.run(3, heat=90)
    broken = record("c", "heat * on () group_left () {__name__=~'heat|a'}")
    host.reload(group(record("b"), broken))
    host.tick(90)
    assert host.verdict.evaluations["r.yaml;g"].failures
    assert host.present("a") == {"a"}


def test_what_the_old_judge_still_does_while_a_reload_goes_on_is_known_to_the_new_one():
    host = Host(group(record()))
    host.tick(10)
    old = host.judge
    host.reload(group(record()))
    new, host.judge = host.judge, old
    host.tick(90)
    host.judge = new
    host.tick(10)
    assert host.present("hot") == set()


def test_nothing_is_forgotten_in_two_reloads_at_once():
    host = Host(group(record(), alert(for_ms=10 * S)))
    host.run(7, heat=90)
    host.reload(group(alert(for_ms=10 * S)))
    host.reload(group(alert(for_ms=10 * S), alert("New")))
    assert host.seconds_until((PENDING, FIRING), heat=90) == 4
    assert host.present("hot") == set()


def test_a_group_that_comes_back_or_has_another_interval_begins_at_once_and_missed_nothing():
    slow, fast = (group(record("one", "vector(1)"), interval_ms=ms) for ms in (60 * S, 5 * S))
    host = Host(slow)
    host.run(130)
    host.reload()
    host.run(200)
    for changed in (slow, fast, slow):
        host.reload(changed)
        assert len(evaluated(host, 1)) == 1
        host.run(61)
    assert host.judge.missed == 0


def test_an_alert_of_two_rules_ends_when_the_one_that_is_left_gives_it_up():
    host = Host(group(alert(), alert(expr="heat > 50")))
    host.run(2, heat=90)
    assert host.alerts[0].held_by == ("", "2")
    host.reload(group(alert()))
    assert host.tick(60) == [(FIRING, RESOLVED)]


# ---- groups among one another


def test_a_group_sees_what_the_groups_before_it_wrote_in_this_tick():
    host = Host(group(record()), group(alert(expr="hot"), name="after"))
    assert host.tick(90) == [(None, FIRING)]


def test_groups_of_one_name_in_two_files_do_not_disturb_each_other():
    other = RuleGroup(
        name="g",
        interval_ms=S,
        rules=(record("b", "vector(2)"),),
        place=Place(file="s.yaml", line=1),
    )
    host = Host(group(record("a", "vector(1)")), other)
    host.run(2)
    assert host.present("a") == {"a"}
    assert host.present("b") == {"b"}
    assert len(host.verdict.evaluations) == 2
