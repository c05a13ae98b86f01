"""Rule files: what is read, and that every mistake is told with file, line and column."""

import textwrap
from pathlib import Path

import pytest

from gpuwatch import rules
from gpuwatch.config.rulefiles import load_rules
from gpuwatch.errors import ConfigError, RuleError

RULES = Path(__file__).parents[2] / "rules"


@pytest.fixture
def written(tmp_path):
    def write(text):
        path = tmp_path / "r.yaml"
        path.write_text(textwrap.dedent(text).lstrip("\n"), encoding="utf-8")
        return path

    return write


def mistakes(path):
    with pytest.raises(ConfigError) as caught:
        load_rules([path])
    return [mistake.replace(str(path), "r.yaml") for mistake in caught.value.mistakes]


GOOD = """
    groups:
      - name: heat
        interval: 5s
        labels: {team: gpu, severity: info}
        rules:
          - alert: Hot
            expr: heat > 80
            for: 1m30s
            keep_firing_for: 500ms
            labels: {severity: critical, empty: ""}
            annotations:
              summary: GPU {{ $labels.gpu }}
          - alert: Cold
            expr: 0
"""


def test_a_rule_file_is_read_as_written(written):
    (group,) = load_rules([written(GOOD)])
    hot, cold = group.rules
    assert (group.name, group.interval_ms) == ("heat", 5000)
    assert (hot.alert, hot.expr, hot.for_ms, hot.keep_firing_for_ms) == ("Hot", "heat > 80", 90_000, 500)
    assert hot.labels == {"team": "gpu", "severity": "critical", "empty": ""}
    assert hot.annotations == {"summary": "GPU {{ $labels.gpu }}"}
    assert (cold.expr, cold.for_ms) == ("0", 0)


def test_the_default_interval_is_gpuwatchs_tick(written):
    (group,) = load_rules([written("groups: [{name: a, rules: []}]")])
    assert group.interval_ms == 1000


def test_an_empty_file_has_no_groups(written):
    assert load_rules([written(""), RULES / "memory.yaml"])[0].name == "memory"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("groups: {}", "r.yaml:1:9: groups must be a list"),
        ("group: []", "r.yaml:1:1: 'group': is unknown in the file; known are groups"),
        ("groups: [{rules: []}]", "r.yaml:1:10: this group has no name"),
        ("groups: [{name: a, interval: 5}]", "r.yaml:1:30: interval: '5' is no duration"),
        ("groups: [{name: a, interval: 1s5m}]", "r.yaml:1:30: interval: '1s5m' is no duration"),
        ("groups: [{name: a, limit: 5}]", "r.yaml:1:20: 'limit': is not supported yet"),
        ("groups: [{name: a, name: b}]", "r.yaml:1:20: 'name' is given twice"),
        ("groups:\n- name: a\n- name: a", "r.yaml:3:3: group 'a' is also at line 2"),
        ("groups: [{name: a, rules: [{expr: b}]}]", "r.yaml:1:28: this rule has no alert name"),
        ("groups: [{name: a, rules: [{alert: b}]}]", "r.yaml:1:28: alert 'b' has no expr"),
        ("groups: [{name: a, rules: [{record: b, expr: c}]}]", "r.yaml:1:29: 'record': recording rules"),
        ("groups: [{name: a, rules: [{alert: b, expr: [c]}]}]", "r.yaml:1:45: expr must be a text"),
        ("groups: [{name: a, rules: [{alert: b, expr: c, fore: 1s}]}]", "r.yaml:1:48: 'fore': is unknown"),
        ("groups: [{name: a, rules: [{alert: b, expr: c, labels: {a-b: c}}]}]", "'a-b' is no label name"),
        ("groups: [{name: a, rules: [{alert: b, expr: c, labels: [d]}]}]", "labels must be a mapping"),
        ("groups: [", "is no YAML"),
    ],
)
def test_a_mistake_is_told_with_its_place(written, text, expected):
    found = mistakes(written(text))
    assert any(expected in mistake for mistake in found), found


def test_all_mistakes_of_all_files_are_told_at_once(written, tmp_path):
    missing = tmp_path / "missing.yaml"
    with pytest.raises(ConfigError) as caught:
        load_rules([written("groups: [{name: a, x: 1, y: 2}]"), missing])
    assert len(caught.value.mistakes) == 3
    assert "cannot be read" in caught.value.mistakes[-1]


@pytest.mark.parametrize(
    ("expr", "place"),
    [
        ("heat > rat(x)", "6:20"),
        ("'heat > rat(x)'", "6:21"),
        ("|\n              heat\n                > rat(x)", "8:19"),
        ("|\n\n              heat\n                > rat(x)", "9:19"),
        (">-\n              heat > rat(x)", "7:22"),
    ],
    ids=["plain", "quoted", "block", "block after an empty line", "folded"],
)
def test_a_mistake_in_an_expression_is_told_at_its_character(written, expr, place):
    head = "# a comment\ngroups:\n  - name: heat\n    rules:\n    - alert: Hot\n      expr: "
    path = written(head + expr + "\n")
    with pytest.raises(RuleError, match="unknown function") as caught:
        rules.compile_groups(load_rules([path]))
    assert f"{caught.value.place.line}:{caught.value.place.column}" == place
