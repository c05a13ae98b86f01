"""Rule files: what is read, and that every mistake is told with file, line and column."""

import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest
import yaml

from gpuwatch import rules
from gpuwatch.config.rulefiles import load_rules
from gpuwatch.errors import ConfigError, RuleError

RULES = Path(__file__).parents[2] / "rules"
PACKS = Path(__file__).parents[3] / "shared/conformance/rulepacks"


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


def test_a_recording_rule_and_all_that_a_group_may_say_are_read(written):
    text = """
        groups:
          - name: heat
            query_offset: 30s
            limit: 10
            labels: {team: gpu}
            rules:
              - record: gpu:heat:max
                expr: max(heat)
                labels: {team: infra}
              - {record: käse, expr: "1", for: 0s, annotations: {}, labels: }
    """
    (group,) = load_rules([written(text)])
    first, second = group.rules
    assert (group.query_offset_ms, group.limit) == (30_000, 10)
    assert (first.record, first.alert, first.labels) == ("gpu:heat:max", "", {"team": "infra"})
    assert (second.record, second.labels) == ("käse", {"team": "gpu"})


def test_what_yaml_leaves_open_means_what_a_server_makes_of_it(written):
    text = """
        groups:
          - name: 5
            limit: -1
            interval:
            rules:
              - {alert: A, expr: 1, for: 0, labels: {code: 200, on: yes, none: }}
          - {name: empty, rules: }
    """
    group, empty = load_rules([written(text)])
    assert (group.name, group.limit, group.interval_ms) == ("5", 0, 1000)
    assert group.rules[0].labels == {"code": "200", "on": "yes", "none": ""}
    assert empty.rules == ()


def test_only_the_first_document_of_a_file_counts(written):
    (group,) = load_rules([written("groups: [{name: a}]\n---\ngroups: [{nome: b}]\n--- [")])
    assert group.name == "a"


def test_what_is_nested_without_end_is_refused_and_breaks_nothing(written):
    with pytest.raises(ConfigError, match="nested deeper than 32 levels"):
        load_rules([written("groups: " + "[" * 100_000)])


def test_anchors_and_merged_keys_are_read(written):
    text = """
        groups:
          - name: a
            rules:
              - &hot {alert: Hot, expr: heat > 80, labels: {severity: warning}}
              - {<<: *hot, alert: Hotter}
    """
    (group,) = load_rules([written(text)])
    assert [(rule.alert, rule.expr) for rule in group.rules] == [
        ("Hot", "heat > 80"),
        ("Hotter", "heat > 80"),
    ]


def test_a_prometheus_rule_for_kubernetes_is_its_spec(written):
    text = """
        apiVersion: monitoring.coreos.com/v1
        kind: PrometheusRule
        metadata: {name: heat, labels: {role: alert-rules}}
        spec:
          groups:
            - {name: heat, partial_response_strategy: warn, rules: [{alert: Hot, expr: heat > 80}]}
    """
    (group,) = load_rules([written(text)])
    assert (group.name, group.rules[0].alert, group.rules[0].place.line) == ("heat", "Hot", 6)


def test_what_only_a_prometheus_rule_may_say_is_refused_elsewhere_and_the_reverse(written):
    thanos = "groups: [{name: a, partial_response_strategy: warn}]"
    assert "'partial_response_strategy': is unknown in a group" in mistakes(written(thanos))[0]
    assert "'kind': is unknown" in mistakes(written("kind: Rules\ngroups: []"))[0]
    assert "'groop': is unknown in spec" in mistakes(written("kind: PrometheusRule\nspec: {groop: []}"))[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("groups: {}", "r.yaml:1:9: groups must be a list"),
        ("group: []", "r.yaml:1:1: 'group': is unknown in the file; known are groups"),
        ("groups: [{rules: []}]", "r.yaml:1:10: this group has no name"),
        ("groups: [{name: a, interval: 5}]", "r.yaml:1:30: interval: '5' is no duration"),
        ("groups: [{name: a, interval: 1s5m}]", "r.yaml:1:30: interval: '1s5m' is no duration"),
        ("groups: [{name: a, limit: 5s}]", "r.yaml:1:27: limit must be a whole number, not '5s'"),
        ("groups: [{name: a, limit: '5'}]", "r.yaml:1:27: limit must be a whole number"),
        ("groups: [{name: a, interval: 300y}]", "r.yaml:1:30: interval: is longer than the 292 years"),
        ("groups: [{name: a, query_offset: soon}]", "r.yaml:1:34: query_offset: 'soon' is no duration"),
        ("groups: [~]", "r.yaml:1:10: this group has no name"),
        ("groups: [{name: a, name: b}]", "r.yaml:1:20: 'name' is given twice"),
        ("groups:\n- name: a\n- name: a", "r.yaml:3:3: group 'a' is also at line 2"),
        ("groups: [{name: a, rules: [{expr: b}]}]", "r.yaml:1:28: this rule has no name"),
        ("groups: [{name: a, rules: [~]}]", "r.yaml:1:28: this rule has no name"),
        ("groups: [{name: a, rules: [{alert: b}]}]", "r.yaml:1:28: rule 'b' has no expr"),
        ("groups: [{name: a, rules: [{alert: b, expr: ' '}]}]", "r.yaml:1:28: rule 'b' has no expr"),
        (
            "groups: [{name: a, rules: [{record: b, alert: b, expr: c}]}]",
            "r.yaml:1:28: this rule is alert 'b' and",
        ),
        (
            "groups: [{name: a, rules: [{record: 'b{c=\"d\"}', expr: c}]}]",
            "r.yaml:1:37: record: 'b{c=\"d\"}' is no",
        ),
        ("groups: [{name: a, rules: [{record: b, expr: c, for: 5m}]}]", "r.yaml:1:54: for: is for alerts"),
        (
            "groups: [{name: a, rules: [{record: b, expr: c, keep_firing_for: 5m}]}]",
            "r.yaml:1:66: keep_firing_for: is for alerts",
        ),
        (
            "groups: [{name: a, rules: [{record: b, expr: c, annotations: {d: e}}]}]",
            "r.yaml:1:62: annotations: is for alerts",
        ),
        ("groups: [{name: a, rules: [{alert: b, expr: [c]}]}]", "r.yaml:1:45: expr must be a text"),
        ("groups: [{name: a, rules: [{alert: b, expr: c, fore: 1s}]}]", "r.yaml:1:48: 'fore': is unknown"),
        ("groups: [{name: a, rules: [{alert: b, expr: c, labels: {__name__: c}}]}]", "'__name__' is no"),
        ("groups: [{name: a, labels: {'': c}}]", "r.yaml:1:28: labels: '' is no label name"),
        ("groups: [{name: a, rules: [{alert: b, expr: c, labels: [d]}]}]", "labels must be a mapping"),
        ("groups: [", "is no YAML"),
        ("groups: &a [*a]", "r.yaml:1:9: a group must be a mapping"),
        ("groups: [{name: a, rules: [&b {<<: *b}]}]", "r.yaml: has a part that holds itself"),
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


def test_a_mistake_in_a_label_of_a_group_is_told_at_its_character(written):
    path = written(
        "groups:\n- name: a\n  labels:\n    team: '{{ nosuch }}'\n  rules: [{alert: b, expr: c}]\n"
    )
    with pytest.raises(RuleError, match=r"labels\.team") as caught:
        rules.compile_groups(load_rules([path]))
    assert (caught.value.place.line, caught.value.place.column) == (4, 15)


@pytest.mark.shared
@pytest.mark.skipif(not PACKS.exists(), reason="the developers' shared folder is not here")
@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_the_rule_files_of_others_load_or_are_refused_as_promtool_does(tmp_path):
    """Of an object for Kubernetes promtool is asked for the spec alone."""
    files = sorted(PACKS.rglob("*.y*ml"))
    verdicts = {}
    for path in files:
        loose = tmp_path / "loose.yaml"
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        loose.write_text(yaml.safe_dump(document.get("spec", document)), encoding="utf-8")
        checked = subprocess.run(["promtool", "check", "rules", loose], capture_output=True, check=False)
        verdicts[path.name, path.parent.name] = (checked.returncode == 0, _loads(path))
    assert len(files) > 20
    assert {name: both for name, both in verdicts.items() if both[0] != both[1]} == {}
    assert sum(promtool for promtool, _ in verdicts.values()) > 18


def _loads(path):
    try:
        rules.compile_groups(load_rules([path]))
    except (ConfigError, RuleError):
        return False
    return True
