"""Alerting rules: what is refused and where, and the life of an alert, evaluation by evaluation."""

import json
from pathlib import Path

import pytest
from tests.promtool import Memory

from gpuwatch import rules
from gpuwatch.errors import RuleError
from gpuwatch.records import AlertState, Labels, Place, Rule, RuleGroup, is_stale
from gpuwatch.rules.templates import Template, TemplateError

GOLDEN = Path(__file__).parents[3] / "shared/conformance/templates/golden.json"
PENDING, FIRING, RESOLVED = AlertState.PENDING, AlertState.FIRING, AlertState.RESOLVED
S = 1000


def place(line=1, column=1):
    return Place(file="r.yaml", line=line, column=column)


def rule(alert="Hot", expr="heat > 80", **more):
    return Rule(alert=alert, expr=expr, place=place(), expr_place=more.pop("expr_place", place()), **more)


def compiled(*given, name="g"):
    group = RuleGroup(name=name, interval_ms=S, rules=given, place=place())
    return rules.compile_groups([group])[0]


class Story:
    """Evaluates a group again and again, as the daemon does, and keeps what it says."""

    def __init__(self, *given):
        self.group = compiled(*given)
        self.memory = Memory()
        self.active = ()
        self.written = {}

    def at(self, seconds, **heat):
        """`heat` by GPU: `at(3, a=90)`; returns this evaluation's transitions in short."""
        now_ms = seconds * S
        for gpu in ("a", "b"):
            value = heat.get(gpu, 0.0)
            self.memory.add(Labels.of("heat", gpu=gpu), now_ms, float(value))
        self.evaluation = rules.evaluate(self.group, self.memory, self.active, now_ms)
        self.active = self.evaluation.alerts
        self.written = {str(s.labels): s.value for s in self.evaluation.samples}
        return [(t.alert.labels.get("gpu"), t.was, t.now) for t in self.evaluation.transitions]


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


def test_an_alert_without_a_rule_is_an_orphan():
    story = Story(rule(), rule("Gone"))
    story.at(0, a=90)
    orphans = rules.orphans([compiled(rule())], story.active)
    assert [alert.rule for alert in orphans] == ["Gone"]


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
        annotations={"summary": "GPU {{ query }}"}, text_places={"annotations.summary": place(9, 20)}
    )
    with pytest.raises(RuleError, match=r"annotations\.summary: the function 'query'") as caught:
        compiled(broken)
    assert str(caught.value.place) == "r.yaml:9:27"


def test_an_alert_that_yields_a_text_or_a_range_is_refused():
    with pytest.raises(RuleError, match="needs an instant vector or a scalar"):
        compiled(rule(expr="heat[5m]"))


def test_two_rules_whose_alerts_nothing_tells_apart_are_refused():
    with pytest.raises(RuleError, match="no label tells the two apart"):
        compiled(rule(), rule(expr="heat > 90"))


def test_a_group_says_how_far_back_it_looks():
    assert compiled(rule(), rule("Slow", "rate(heat[10m] offset 5m) > 1")).window_ms == 900 * S


# ---- templates


@pytest.mark.parametrize(
    ("template", "value", "text"),
    [
        ("{{ $value }}", 1234567, "1.234567e+06"),
        ("{{ $value }}", 0.0001, "0.0001"),
        ("{{ $value }}", 1e-5, "1e-05"),
        ("{{ $value }}", float("inf"), "+Inf"),
        ("{{ $value | humanize }}", 1234567, "1.235M"),
        ("{{ $value | humanize }}", 0.0123, "12.3m"),
        ("{{ $value | humanize1024 }}B", 150754820096, "140.4GiB"),
        ("{{ $value | humanizePercentage }}", 0.01234, "1.234%"),
        ("{{ $value | humanizeDuration }}", 93784, "1d 2h 3m 4s"),
        ("{{ $value | humanizeDuration }}", 0.0025, "2.5ms"),
        ('{{ printf "%.1f of %d%%: %s %v" $value 10 $labels.gpu $labels.none }}', 2.25, "2.2 of 10%: a "),
        ('{{ printf "%d" $value }}', 1, "%!d(float64=1)"),  # Go says so, and so do we
        ('{{ printf "%.2f" $value | humanize }}', 1500, "1.5k"),
        ("{{ $labels }}", 1, "map[gpu:a]"),
        ("a {{- /* trimmed */ -}} b {{ `c` -}}\n d", 1, "ab cd"),
        ("{{ .Labels.gpu }}={{ .Value }}", 3, "a=3"),
        ("{{ ($labels.gpu) }}", 1, "a"),
        ("{{ $labels.gpu | humanize }}", 1, "<error expanding template: humanize needs a number, not 'a'>"),
    ],
)
def test_templates_print_as_prometheus_does(template, value, text):
    assert Template(template).expand(Labels.of(gpu="a"), float(value)) == text


@pytest.mark.parametrize(
    ("template", "position"),
    [
        ("GPU {{ $labels.gpu", 4),
        ("{{ if $value }}x{{ end }}", 3),
        ("{{ nosuch $value }}", 3),
        ("{{ $other }}", 3),
        ("{{ $labels.a.b }}", 3),
        ("{{ }}", 3),
        ("{{ $value | $value }}", 12),
        ("{{ humanize }}", 3),
        ('{{ printf "%q" $value }}', 10),
        ("{{ printf $value }}", 3),
        ("{{ ($value }}", 11),
    ],
)
def test_templates_beyond_the_subset_are_refused_with_their_place(template, position):
    with pytest.raises(TemplateError) as caught:
        Template(template)
    assert caught.value.position == position


@pytest.mark.shared
@pytest.mark.skipif(not GOLDEN.exists(), reason="the developers' shared folder is not here")
def test_texts_are_those_of_a_real_prometheus():
    different, same = [], 0
    for case in json.loads(GOLDEN.read_text())["cases"]:
        try:
            template = Template(case["template"])
        except TemplateError:
            continue
        assert "expected" in case, f"Prometheus refuses {case['template']}"
        labels = Labels([("__name__", "golden"), ("case", str(case["id"])), *case["labels"].items()])
        text = template.expand(labels, float(case["value"]))
        # Errors are worded differently; durations beyond 292 years overflow there.
        if text == case["expected"]:
            same += 1
        elif not ("<error" in text and "<error" in case["expected"]) and abs(float(case["value"])) < 1e20:
            different.append((case["template"], text, case["expected"]))
    assert same > 1800
    assert [case for case in different if "%!f(string=" not in case[1]] == []
