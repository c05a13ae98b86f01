"""Rules: what is refused and where, the life of an alert, and the series that rules write."""

from itertools import pairwise

import pytest

from gpuwatch import promql, rules
from gpuwatch.cli.memory import Memory
from gpuwatch.errors import RuleError
from gpuwatch.promql import Matcher
from gpuwatch.records import AlertState, Labels, Place, Rule, RuleGroup, is_stale

PENDING, FIRING, RESOLVED = AlertState.PENDING, AlertState.FIRING, AlertState.RESOLVED
S = 1000


def place(line=1, column=1):
    return Place(file="r.yaml", line=line, column=column)


def rule(alert="Hot", expr="heat > 80", **more):
    return Rule(alert=alert, expr=expr, place=place(), expr_place=more.pop("expr_place", place()), **more)


def record(name="hot", expr="heat > 80", **more):
    return Rule(record=name, expr=expr, place=place(), expr_place=place(), **more)


def compiled(*given, name="g", **more):
    group = RuleGroup(name=name, interval_ms=S, rules=given, place=place(), **more)
    return rules.compile_groups([group])[0]


class Story:
    """Evaluates a group again and again, as the daemon does, and keeps what it says."""

    def __init__(self, *given, **more):
        self.group = compiled(*given, **more)
        self.memory = Memory()
        self.active = ()
        self.series = {}
        self.written = {}

    def at(self, seconds, **heat):
        """`heat` by GPU: `at(3, a=90)`; returns this evaluation's transitions in short."""
        now_ms = seconds * S
        for gpu in ("a", "b"):
            value = heat.get(gpu, 0.0)
            self.memory.add(Labels.of("heat", gpu=gpu), now_ms, float(value))
        self.evaluation = rules.evaluate(self.group, self.memory, self.active, now_ms, written=self.series)
        self.active = self.evaluation.alerts
        self.series = {**self.series, **self.evaluation.written}
        self.written = {str(s.labels): s.value for s in self.evaluation.samples}
        for sample in self.evaluation.samples:
            self.memory.add(sample.labels, sample.at_ms, sample.value)
        return [(t.alert.labels.get("gpu"), t.was, t.now) for t in self.evaluation.transitions]

    @property
    def failed(self):
        return [failure.what.removeprefix("r.yaml:1:1: ") for failure in self.evaluation.failures]


# ---- the life of an alert


def test_without_for_an_alert_fires_at_once():
    assert Story(rule()).at(0, a=90) == [("a", None, FIRING)]


def test_an_alert_is_pending_until_for_has_passed():
    story = Story(rule(for_ms=2 * S))
    assert story.at(0, a=90) == [("a", None, PENDING)]
    assert story.at(1, a=90) == []
    assert story.at(2, a=90) == [("a", PENDING, FIRING)]
    (alert,) = story.active
    assert (alert.active_at_ms, alert.fired_at_ms) == (0, 2 * S)


def test_a_pending_alert_that_is_gone_starts_anew():
    story = Story(rule(for_ms=2 * S))
    story.at(0, a=90)
    assert story.at(1) == [("a", PENDING, None)]
    assert story.at(2, a=90) == [("a", None, PENDING)]
    assert story.at(3, a=90) == []


def test_a_firing_alert_that_is_gone_is_resolved():
    story = Story(rule())
    story.at(0, a=90)
    assert story.at(1) == [("a", FIRING, RESOLVED)]
    assert story.active == ()
    assert story.evaluation.transitions[0].alert.resolved_at_ms == S


def test_keep_firing_for_outlasts_a_dip():
    story = Story(rule(keep_firing_for_ms=3 * S))
    story.at(0, a=90)
    assert story.at(1) == []
    assert story.at(2, a=95) == []
    assert story.active[0].keep_firing_since_ms is None
    assert story.at(3) == []
    assert story.at(5) == []
    assert story.at(6) == [("a", FIRING, RESOLVED)]


def test_value_and_annotations_are_renewed_only_while_the_element_is_there():
    story = Story(rule(annotations={"summary": "{{ $value }} °C"}, keep_firing_for_ms=9 * S))
    story.at(0, a=90)
    story.at(1, a=91)
    assert (story.active[0].value, story.active[0].annotations["summary"]) == (91, "91 °C")
    story.at(2)
    assert (story.active[0].value, story.active[0].annotations["summary"]) == (91, "91 °C")


def test_each_element_has_a_life_of_its_own():
    story = Story(rule())
    story.at(0, a=90)
    assert story.at(1, a=90, b=90) == [("b", None, FIRING)]
    assert story.at(2, b=90) == [("a", FIRING, RESOLVED)]


def test_alerts_of_other_rules_and_groups_are_passed_over():
    other = Story(rule("Other"))
    other.at(0, a=90)
    evaluation = rules.evaluate(compiled(rule()), Memory(), other.active, S)
    assert evaluation.alerts == evaluation.transitions == evaluation.samples == ()


def test_two_rules_of_one_name_are_told_apart_by_their_labels():
    story = Story(
        rule(expr="heat > 80", labels={"severity": "warning"}),
        rule(expr="heat > 90", labels={"severity": "critical"}),
    )
    story.at(0, a=95)
    assert story.at(1, a=85) == [("a", FIRING, RESOLVED)]
    assert [alert.labels.get("severity") for alert in story.active] == ["warning"]


# ---- rules of one name that no label tells apart


def twins(first="heat > 80", second="heat > 90", **more):
    return Story(rule(expr=first), rule(expr=second, **more))


def test_rules_that_no_label_tells_apart_keep_their_own_alerts():
    story = twins("heat{gpu='a'} > 80", "heat{gpu='b'} > 80")
    assert story.at(0, a=90, b=90) == [("a", None, FIRING), ("b", None, FIRING)]
    assert story.at(1, b=90) == [("a", FIRING, RESOLVED)]
    assert story.at(2, b=90) == []
    assert story.at(3) == [("b", FIRING, RESOLVED)]


def test_what_two_rules_find_with_the_same_labels_is_one_alert_for_as_long_as_either_finds_it():
    story = twins("heat < 50", "heat{gpu='a'} < 90")
    assert story.at(0, b=99) == [("a", None, FIRING)]
    assert story.at(1, a=60, b=99) == []
    assert len(story.active) == 1
    assert story.at(2, a=99, b=99) == [("a", FIRING, RESOLVED)]


def test_an_alert_of_two_rules_speaks_for_the_one_that_found_it_first():
    story = Story(
        rule(expr="heat > 80", annotations={"summary": "warm"}),
        rule(expr="heat > 70", annotations={"summary": "hot"}),
    )
    story.at(0, a=75)
    story.at(1, a=85)
    (alert,) = story.active
    assert alert.annotations == {"summary": "hot"}
    assert alert.value == 85


def test_the_series_of_an_alert_of_two_rules_go_on_when_one_gives_it_up():
    story = twins()
    story.at(0, a=95)
    story.at(1, a=85)
    assert story.written['ALERTS{alertname="Hot",alertstate="firing",gpu="a"}'] == 1


# ---- labels


def test_an_alert_has_the_series_labels_the_rules_and_its_name():
    story = Story(rule(labels={"severity": "critical", "where": "GPU {{ $labels.gpu }}"}))
    story.at(0, a=90)
    assert dict(story.active[0].labels) == {
        "alertname": "Hot",
        "gpu": "a",
        "severity": "critical",
        "where": "GPU a",
    }


def test_an_empty_label_deletes_the_series_own():
    story = Story(rule(expr="max by (gpu) (heat) > 80", labels={"gpu": ""}))
    story.at(0, a=90)
    assert dict(story.active[0].labels) == {"alertname": "Hot"}


def test_a_scalar_makes_one_alert_without_labels():
    evaluation = rules.evaluate(compiled(rule(expr="1")), Memory(), (), 0)
    assert [str(alert.labels) for alert in evaluation.alerts] == ['{alertname="Hot"}']


def test_a_template_may_ask_for_what_the_rules_before_it_wrote():
    asked = '{{ with query "hot" }}{{ . | first | value }}{{ end }}'
    text = asked + " of {{ $externalLabels.site }}, {{ $externalURL }}"
    rule_group = compiled(record(), rule(annotations={"summary": text}))
    memory = Memory()
    memory.add(Labels.of("heat", gpu="a"), 0, 90.0)
    terms = rules.Terms(external_labels={"site": "x"}, external_url="http://g")
    (alert,) = rules.evaluate(rule_group, memory, (), 0, terms=terms).alerts
    assert alert.annotations["summary"] == "90 of x, http://g"


def test_a_query_of_a_template_that_fails_is_told_in_the_text_and_the_alert_fires_all_the_same():
    story = Story(rule(annotations={"summary": '{{ query "heat[" }}'}))
    assert story.at(0, a=90) == [("a", None, FIRING)]
    assert "error expanding template" in story.active[0].annotations["summary"]


# ---- failures


def test_elements_that_would_be_one_alert_fail_the_rule_and_leave_its_alerts_alone():
    story = Story(rule(labels={"gpu": ""}), rule("Other"))
    story.at(0, a=90)
    before = story.active
    assert story.at(1, a=90, b=90) == [("b", None, FIRING)]  # of the other rule, which goes on
    (failure,) = story.evaluation.failures
    assert failure.rule == "Hot"
    assert "same labelset" in failure.what
    assert before[0] in story.active


def test_a_failing_expression_leaves_the_rules_alerts_as_they_were():
    story = Story(rule(expr="heat > on () group_left () scalar_of", for_ms=5 * S))
    story.memory.add(Labels.of("scalar_of", x="1"), 0, 80.0)
    story.at(0, a=90)
    story.memory.add(Labels.of("scalar_of", x="2"), S, 80.0)
    assert story.at(1, a=90) == []
    assert len(story.evaluation.failures) == len(story.active) == 1


# ---- series


def test_alerts_are_series_and_a_change_of_state_ends_the_old_one():
    story = Story(rule(for_ms=S))
    story.at(10, a=90)
    assert story.written == {
        'ALERTS{alertname="Hot",alertstate="pending",gpu="a"}': 1,
        'ALERTS_FOR_STATE{alertname="Hot",gpu="a"}': 10,
    }
    story.at(11, a=90)
    assert story.written['ALERTS{alertname="Hot",alertstate="firing",gpu="a"}'] == 1
    assert is_stale(story.written['ALERTS{alertname="Hot",alertstate="pending",gpu="a"}'])
    assert story.written['ALERTS_FOR_STATE{alertname="Hot",gpu="a"}'] == 10
    story.at(12)
    assert len(story.written) == 2
    assert all(is_stale(value) for value in story.written.values())


# ---- compiling


def test_a_mistake_in_an_expression_is_told_with_file_line_and_column():
    broken = rule(expr="heat\n  > rate(heat)\n", expr_place=place(7, 11))
    with pytest.raises(RuleError, match=r"'g', alert 'Hot'.*expected type range vector") as caught:
        compiled(broken)
    assert str(caught.value.place) == "r.yaml:8:20"


def test_a_mistake_in_a_template_is_told_with_file_line_and_column():
    broken = rule(
        annotations={"summary": "GPU {{ nosuch }}"}, text_places={"annotations.summary": place(9, 20)}
    )
    with pytest.raises(RuleError, match=r"annotations\.summary: .*nosuch") as caught:
        compiled(broken)
    assert str(caught.value.place) == "r.yaml:9:27"


def test_an_alert_that_yields_a_text_or_a_range_is_refused():
    with pytest.raises(RuleError, match="needs an instant vector or a scalar"):
        compiled(rule(expr="heat[5m]"))


def test_a_group_says_how_far_back_it_looks():
    slow = rule("Slow", "rate(heat[10m] offset 5m) > 1")
    assert compiled(rule(), slow).window_ms == 900 * S
    assert compiled(rule(), slow, query_offset_ms=60 * S).window_ms == 960 * S


# ---- recording rules


def test_a_recording_rule_writes_its_result_under_its_own_name_and_labels():
    story = Story(record("gpu:heat:hot", labels={"team": "gpu", "gpu": ""}))
    story.at(5, a=90)
    assert story.written == {'gpu:heat:hot{team="gpu"}': 90}
    assert story.active == ()
    assert story.evaluation.samples[0].at_ms == 5 * S


def test_the_labels_of_a_recording_rule_are_no_templates():
    story = Story(record(labels={"text": "{{ $value }}"}))
    story.at(0, a=90)
    assert story.written == {'hot{gpu="a",text="{{ $value }}"}': 90}


def test_a_scalar_is_recorded_as_one_series():
    story = Story(record("answer", "42"))
    story.at(0)
    assert story.written == {"answer": 42}


def test_a_rule_sees_what_the_rules_before_it_wrote_in_this_evaluation():
    story = Story(record("hot"), record("hotter", "hot + 1"), rule(expr="hotter > 80"))
    assert story.at(0, a=90) == [("a", None, FIRING)]
    assert story.written['hotter{gpu="a"}'] == 91


def test_a_rule_sees_the_alerts_of_the_rules_before_it():
    story = Story(rule(), record("alerts", "count(ALERTS{alertstate='firing'})"))
    story.at(0, a=90, b=90)
    assert story.written["alerts"] == 2


def test_a_rule_sees_what_the_rules_after_it_wrote_the_last_time():
    story = Story(record("late", "hot + 1"), record("hot", "heat"))
    story.at(0, a=1)
    assert "late" not in str(story.written)
    story.at(1, a=5)
    assert story.written['late{gpu="a"}'] == 2


def test_a_range_holds_what_was_written_before_and_now():
    story = Story(record("hot", "heat"), record("count", "count_over_time(hot{gpu='a'}[5s])"))
    for second in range(3):
        story.at(second, a=90)
    assert story.written['count{gpu="a"}'] == 3


def test_a_series_that_a_rule_no_longer_writes_ends():
    story = Story(record())
    story.at(0, a=90)
    story.at(1)
    assert is_stale(story.written['hot{gpu="a"}'])
    story.at(2)
    assert story.written == {}


def test_a_series_that_another_rule_goes_on_with_does_not_end():
    story = Story(record(expr="heat > 80"), record(expr="heat > 0 < 80"))
    story.at(0, a=90)
    story.at(1, a=10)
    assert story.written == {'hot{gpu="a"}': 10}


def test_a_rule_that_writes_one_series_twice_fails_and_its_series_stay_as_they_were():
    story = Story(record(labels={"gpu": ""}))
    story.at(0, a=90)
    story.at(1, a=90, b=90)
    assert story.failed == ["vector contains metrics with the same labelset after applying rule labels"]
    assert story.written == {}
    story.at(2)
    assert is_stale(story.written["hot"])


def test_a_value_that_is_not_a_number_is_recorded():
    story = Story(record("ratio", "heat / 0"))
    story.at(0, a=1)
    assert story.written['ratio{gpu="a"}'] == float("inf")
    assert str(story.written['ratio{gpu="b"}']) == "nan"
    assert not is_stale(story.written['ratio{gpu="b"}'])


# ---- limit, offset, remarks


def test_more_series_than_the_limit_fail_the_rule():
    story = Story(record(), limit=1)
    story.at(0, a=90, b=90)
    assert story.failed == ["exceeded limit of 1 with 2 series"]
    assert story.written == {}


def test_more_alerts_than_the_limit_fail_the_rule_and_end_all_it_had():
    story = Story(rule(), rule("Other"), limit=1)
    story.at(0, a=90)
    assert story.at(1, a=90, b=90) == [("a", FIRING, None), ("a", FIRING, None)]
    assert story.failed == ["exceeded limit of 1 with 2 alerts"] * 2
    assert story.active == ()
    assert story.written == {}
    story.at(2)
    assert all(is_stale(value) for value in story.written.values())
    assert len(story.written) == 4


def test_what_another_rule_of_the_name_finds_outlasts_the_limit():
    story = Story(rule(expr="heat{gpu='a'} > 80"), rule(expr="heat > 90"), limit=1)
    assert story.at(0, a=95) == [("a", None, FIRING)]
    assert story.at(1, a=95, b=95) == []
    assert story.failed == ["exceeded limit of 1 with 2 alerts"]
    assert [alert.held_by for alert in story.active] == [("",)]
    assert story.at(2) == [("a", FIRING, RESOLVED)]


def test_what_another_rule_of_the_name_finds_does_not_count_for_the_limit():
    story = Story(rule(expr="heat{gpu='a'} > 80"), rule(expr="heat > 90"), limit=1)
    story.at(0, a=95)
    assert story.at(1, a=85, b=95) == [("b", None, FIRING)]
    assert story.failed == []


def test_pending_alerts_count_for_the_limit():
    story = Story(rule(for_ms=9 * S), limit=1)
    story.at(0, a=90, b=90)
    assert story.failed == ["exceeded limit of 1 with 2 alerts"]


def test_a_query_offset_moves_the_query_and_what_is_written_but_no_for():
    story = Story(record(), rule(for_ms=2 * S), query_offset_ms=2 * S)
    assert story.at(0, a=90) == []
    assert story.at(1) == []
    assert story.at(2) == [("a", None, PENDING)]
    assert {(str(s.labels), s.at_ms) for s in story.evaluation.samples if s.value == 90} == {
        ('hot{gpu="a"}', 0)
    }
    assert story.active[0].active_at_ms == 2 * S


def test_what_promql_remarks_is_told_and_fails_nothing():
    story = Story(record("speed", "rate(heat[5s])"))
    story.at(0, a=1)
    story.at(1, a=2)
    assert "PromQL info: metric might not be a counter" in story.evaluation.remarks["r.yaml;g/speed"]
    assert story.evaluation.failures == ()
    assert story.written


def test_a_rule_that_takes_more_than_it_may_fails_alone():
    terms = rules.Terms(limits=lambda: promql.Limits(samples=1))
    memory = Memory()
    for gpu in "abc":
        memory.add(Labels.of("heat", gpu=gpu), 0, 90.0)
    evaluation = rules.evaluate(compiled(rule(), rule("Calm", "vector(1)")), memory, (), 0, terms=terms)
    assert [failure.rule for failure in evaluation.failures] == ["Hot"]
    assert [alert.rule for alert in evaluation.alerts] == ["Calm"]


def test_a_rules_templates_share_the_time_that_it_may_take():
    asked = []

    def limits():
        asked.append(0)
        return promql.Limits(is_over=lambda: len(memory.selected) > 2)

    class Counted(Memory):
        selected = ()

        def select(self, matchers, after_ms, upto_ms):
            self.selected = (*self.selected, matchers)
            return super().select(matchers, after_ms, upto_ms)

    memory = Counted()
    for gpu in "abc":
        memory.add(Labels.of("heat", gpu=gpu), 0, 90.0)
    slow = rule(annotations={"all": '{{ query "heat" | len }}'})
    evaluation = rules.evaluate(compiled(slow), memory, (), 0, terms=rules.Terms(limits=limits))
    assert len(asked) == 1
    assert "its templates take too long" in evaluation.failures[0].what
    assert evaluation.alerts == ()


def test_a_bug_that_one_rule_meets_is_told_and_blinds_no_other():
    class Broken(Memory):
        def select(self, matchers, after_ms, upto_ms):
            if Matcher("__name__", "=", "heat") in matchers:
                raise ZeroDivisionError
            return super().select(matchers, after_ms, upto_ms)

    evaluation = rules.evaluate(compiled(rule(), rule("Calm", "vector(1)")), Broken(), (), 0)
    (failure,) = evaluation.failures
    assert isinstance(failure.bug, ZeroDivisionError)
    assert [alert.rule for alert in evaluation.alerts] == ["Calm"]


# ---- what is told apart


def test_rules_have_keys_of_their_own_and_keep_them_when_others_come_before_them():
    first, second = compiled(rule(), rule()).rules
    assert first.key != second.key
    assert compiled(rule("New"), rule()).rules[1].key == first.key


def test_no_names_of_groups_and_rules_make_the_same_key():
    groups = [
        RuleGroup(name=name, interval_ms=S, rules=tuple(map(rule, names)), place=place())
        for name, names in (("g", ("x/y", "x", "x", "x#2")), ("g/x", ("y",)))
    ]
    keys = [rule.key for group in rules.compile_groups(groups) for rule in group.rules]
    assert len(set(keys)) == 5


@pytest.mark.parametrize("interval_ms", [500, 1 * S, 1500, 15 * S, 300 * S])
def test_slots_are_an_interval_apart_and_on_full_seconds_if_that_is(interval_ms):
    group = RuleGroup(name="g", interval_ms=interval_ms, rules=(), place=place())
    (group,) = rules.compile_groups([group])
    slots = sorted({group.slot_ms(now_ms) for now_ms in range(10**12, 10**12 + 4 * interval_ms, 100)})
    assert {after - before for before, after in pairwise(slots)} == {interval_ms}
    assert interval_ms % S or all(slot % S == 0 for slot in slots)


def test_groups_of_one_interval_come_at_different_seconds_wherever_their_file_lies():
    def slot(name, file):
        group = RuleGroup(name=name, interval_ms=60 * S, rules=(), place=Place(file=file, line=1))
        return rules.compile_groups([group])[0].slot_ms(10**12) % (60 * S)

    assert len({slot(name, "r.yaml") for name in "abcdefgh"}) > 4
    assert slot("a", "/etc/gpuwatch/r.yaml") == slot("a", "rules/r.yaml")
