"""`gpuwatch rules test` and `check` as people call them; what lint remarks, and what it passes over."""

from pathlib import Path
from textwrap import dedent
from xml.etree import ElementTree as ET

import msgspec
import pytest
from click.testing import CliRunner

from gpuwatch import promql, rules
from gpuwatch.cli import main
from gpuwatch.cli.lint import Inventory, lint
from gpuwatch.cli.memory import Memory, Until
from gpuwatch.cli.ruletests.notation import series_of, values_of
from gpuwatch.config.rulefiles import load_rules
from gpuwatch.errors import QueryError
from gpuwatch.records import Labels, is_stale
from gpuwatch.store import METRICS_DB

ROOT = Path(__file__).parents[2]
HOT = """
groups:
  - name: heat
    rules:
      - record: gpu:hottest
        expr: max by (gpu) (heat)
      - alert: Hot
        expr: gpu:hottest > 80
        for: 2m
        labels: {severity: warning}
        annotations: {summary: "GPU {{ $labels.gpu }} is at {{ $value }}"}
"""
HOT_TEST = """
rule_files: ["*rules.yaml"]
evaluation_interval: 1m
tests:
  - name: it gets hot
    input_series:
      - {series: 'heat{gpu="0"}', values: "70 90x3 70"}
    alert_rule_test:
      - {eval_time: 2m, alertname: Hot}
      - eval_time: 3m59s
        alertname: Hot
        exp_alerts:
          - exp_labels: {severity: warning, gpu: "0"}
            exp_annotations: {summary: GPU 0 is at 90}
      - {eval_time: 5m, alertname: Hot, exp_alerts: []}
    promql_expr_test:
      - expr: ALERTS
        eval_time: 1m
        exp_samples:
          - {labels: 'ALERTS{alertname="Hot", alertstate="pending", gpu="0", severity="warning"}', value: 1}
      - {expr: gpu:hottest, eval_time: 1m, exp_samples: [{labels: 'gpu:hottest{gpu="0"}', value: 90}]}
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.delenv("GPUWATCH_CONFIG", raising=False)

    def written(name, text):
        path = tmp_path / name
        path.write_text(dedent(text), encoding="utf-8")
        return path

    return written


def call(*given):
    return CliRunner().invoke(main, ["rules", *map(str, given)])


def run(write, test, *options, rules=HOT):
    write("rules.yaml", rules)
    return call("test", write("test.yaml", test), *options)


# ---- rules test


def test_a_test_that_passes_says_so_in_a_line(write, tmp_path):
    done = run(write, HOT_TEST)
    assert done.output == f"{tmp_path}/test.yaml: SUCCESS, 1 test\n"
    assert done.exit_code == 0


def test_a_failure_names_the_place_what_was_expected_and_what_came(write, tmp_path):
    done = run(write, HOT_TEST.replace("GPU 0 is at 90", "GPU 0 is hot"))
    assert done.exit_code == 1
    assert done.output == dedent(
        f"""\
        {tmp_path}/test.yaml: FAILED, 1 of 1 test
          it gets hot
            {tmp_path}/test.yaml:10:9: alert Hot at 3m59s
              expected:
                {{alertname="Hot", gpu="0", severity="warning"}}
                  summary: "GPU 0 is hot"
              got:
                {{alertname="Hot", gpu="0", severity="warning"}}
                  summary: "GPU 0 is at 90"
        """
    )


def test_a_diff_marks_the_lines_that_differ(write):
    done = run(write, HOT_TEST.replace("GPU 0 is at 90", "GPU 0 is hot"), "--diff")
    assert '        -   summary: "GPU 0 is hot"\n' in done.output
    assert '        +   summary: "GPU 0 is at 90"\n' in done.output
    assert '          {alertname="Hot", gpu="0", severity="warning"}\n' in done.output


def test_a_wrong_value_of_an_expression_is_shown_beside_the_right_one(write):
    done = run(write, HOT_TEST.replace("value: 90", "value: 91"))
    assert (
        'expected:\n        gpu:hottest{gpu="0"} 91\n      got:\n        gpu:hottest{gpu="0"} 90\n'
        in done.output
    )


def test_only_the_tests_that_are_named_run(write):
    two = HOT_TEST + "  - {name: nothing, promql_expr_test: [{expr: heat, exp_samples: [{value: 1}]}]}\n"
    assert run(write, two, "--run", "hot$").exit_code == 0
    assert run(write, two, "--run", "no.hing", "--run", "xyz").exit_code == 1
    assert "no regex" in run(write, two, "--run", "(").output


def test_a_rule_that_fails_ends_its_test(write):
    twice = HOT.replace("max by (gpu) (heat)", "heat * on () other")
    test = HOT_TEST.replace("70 90x3 70", "90x9")
    one = """- {series: 'other{a="%d"}', values: 1x9}\n      """
    series = one % 1 + one % 2 + "- {series: 'heat{"
    done = run(write, test.replace("- {series: 'heat{", series), rules=twice)
    assert done.exit_code == 1
    assert done.output.count("rule gpu:hottest: ") == 1
    assert "alert Hot at" not in done.output


def test_groups_go_in_the_order_that_the_test_names(write):
    later = """
    groups:
      - {name: first in the file, rules: [{record: b, expr: a}]}
      - {name: second in the file, rules: [{record: a, expr: vector(1)}]}
    """
    test = """
    rule_files: [rules.yaml]
    tests: [{promql_expr_test: [{expr: b, exp_samples: [{labels: b, value: 1}]}]}]
    """
    assert run(write, test, rules=later).exit_code == 1
    order = "    group_eval_order: [second in the file, first in the file]\n"
    assert run(write, test.rstrip(" ") + order, rules=later).exit_code == 0


def test_a_neighbouring_number_is_the_same_only_if_the_file_says_so(write):
    test = """
    tests:
      - input_series: [{series: x, values: 2.9999999999999996}]
        promql_expr_test: [{expr: x, exp_samples: [{labels: x, value: 3}]}]
    """
    assert run(write, test).exit_code == 1
    assert run(write, test + "fuzzy_compare: true").exit_code == 0


def test_a_test_may_begin_at_any_time(write):
    test = """
    tests:
      - start_timestamp: 2026-01-01T00:00:00Z
        interval: 30s
        input_series: [{series: x, values: "1 2 3"}]
        promql_expr_test:
          - {expr: time(), eval_time: 5m, exp_samples: [{value: 1767225900}]}
          - {expr: timestamp(x), eval_time: 1m, exp_samples: [{value: 1767225660}]}
    """
    assert run(write, test).exit_code == 0, run(write, test).output


def test_samples_after_the_last_evaluation_are_not_seen(write):
    test = """
    evaluation_interval: 1m
    tests:
      - interval: 30s
        input_series: [{series: x, values: "1 2 3 4"}]
        promql_expr_test: [{expr: x, eval_time: 90s, exp_samples: [{labels: x, value: 3}]}]
    """
    assert run(write, test).exit_code == 0, run(write, test).output


def test_a_subquery_without_a_step_goes_by_the_evaluation_interval(write):
    test = """
    evaluation_interval: 15s
    tests:
      - promql_expr_test:
          - {expr: "count_over_time(vector(1)[1m:])", eval_time: 5m, exp_samples: [{value: 4}]}
    """
    assert run(write, test).exit_code == 0, run(write, test).output


def test_external_labels_and_the_address_reach_the_templates(write):
    told = HOT.replace(
        "GPU {{ $labels.gpu }} is at {{ $value }}", "{{ $externalLabels.host }} {{ $externalURL }}"
    )
    test = HOT_TEST.replace("GPU 0 is at 90", "gpu-a http://x") + "    external_labels: {host: gpu-a}\n"
    done = run(write, test + "    external_url: http://x\n", rules=told)
    assert done.exit_code == 0, done.output


def test_a_rule_file_that_is_not_there_is_told_and_no_failure(write):
    done = run(write, "rule_files: [missing.yaml]\ntests: []")
    assert done.exit_code == 0
    assert "WARNING: no rule file matches" in done.output


def test_a_check_of_an_alert_that_no_rule_gives_is_told(write, tmp_path):
    done = run(write, HOT_TEST.replace("alertname: Hot}", "alertname: Hott}"))
    assert f"{tmp_path}/test.yaml:9:9: WARNING: no rule is called Hott\n" in done.output


def test_all_mistakes_of_a_test_file_are_told_with_their_places(write, tmp_path):
    done = run(
        write,
        """\
        rule_file: [x]
        evaluation_interval: 1 minute
        tests:
          - input_series: [{series: x, value: 1}]
            alert_rule_test: [{eval_time: 1m}]
            promql_expr_test: [{expr: x, exp_samples: [{value: "1"}, {value: 1, value: 2}]}]
            start_timestamp: yesterday
        """,
    )
    assert done.exit_code == 1
    places = [
        line.split(": ")[0].removeprefix(f"  {tmp_path}/test.yaml:") for line in done.output.splitlines()[1:]
    ]
    assert sorted(places) == ["1:1", "2:22", "4:32", "5:23", "6:56", "6:73", "7:22"]
    assert (
        "'rule_file': is unknown in a test file; known are evaluation_interval, fuzzy_compare" in done.output
    )


def test_mistakes_within_a_text_are_told_with_their_column(write, tmp_path):
    def failure(series="x", values="1", expr="x"):
        test = f"""\
        tests:
          - input_series:
              - series: '{series}'
                values: '{values}'
            promql_expr_test:
              - expr: {expr}
                exp_samples: [{{labels: x, value: 1}}]
        """
        return run(write, test).output.splitlines()[2].strip().removeprefix(f"{tmp_path}/test.yaml:")

    assert failure(series="x{a=1}").startswith("3:22: ")
    assert failure(values="1 2 three").startswith("4:22: 'three' is no item of a series; write 1,")
    assert (
        failure(values="1 {{sum:3}}")
        == "4:20: gpuwatch has no native histograms: write the classic _bucket series"
    )
    assert failure(expr="sum(x").startswith("6:20: sum(x at 0s: ")


def test_an_expected_sample_that_cannot_be_read_hides_no_other_failure(write, tmp_path):
    done = run(write, HOT_TEST.replace("GPU 0 is at 90", "cold").replace("gpu:hottest{", "gpu:hottest{{"))
    assert f"{tmp_path}/test.yaml:10:9: alert Hot at 3m59s" in done.output
    assert f"{tmp_path}/test.yaml:21:80: gpu:hottest at 1m: " in done.output


def test_a_test_that_holds_itself_is_a_mistake(write, tmp_path):
    done = run(write, "tests: [&a {<<: *a}]")
    assert done.output == (
        f"{tmp_path}/test.yaml: FAILED\n  {tmp_path}/test.yaml: has a part that holds itself\n"
    )
    assert done.exit_code == 1


def test_yaml_anchors_and_merged_keys_are_understood(write):
    test = """
    tests:
      - input_series:
          - &x {series: x, values: "1 2"}
          - {<<: *x, series: y}
        promql_expr_test: [{expr: y, eval_time: 1m, exp_samples: [{labels: y, value: 2}]}]
    """
    assert run(write, test).exit_code == 0, run(write, test).output


def test_junit_tells_each_test_and_each_file_that_could_not_be_read(write, tmp_path):
    write("rules.yaml", HOT)
    files = [
        write("right.yaml", HOT_TEST),
        write("wrong.yaml", HOT_TEST.replace("GPU 0 is at 90", '"\\x01"')),
        write("broken.yaml", "tests: {}"),
    ]
    done = call("test", *files, "--junit", tmp_path / "junit.xml")
    assert done.exit_code == 1
    suites = {Path(suite.get("name")).stem: suite for suite in ET.parse(tmp_path / "junit.xml").getroot()}
    figures = {
        name: [suite.get(key) for key in ("tests", "failures", "errors")] for name, suite in suites.items()
    }
    assert figures == {"right": ["1", "0", "0"], "wrong": ["1", "1", "0"], "broken": ["0", "0", "1"]}
    (failure,) = suites["wrong"].iter("failure")
    assert failure.get("message").endswith("alert Hot at 3m59s")


def test_debug_shows_every_series_at_the_end(write):
    done = run(write, HOT_TEST, "--debug")
    assert 'heat{gpu="0"}\n  70.0 @[0]\n  90.0 @[60]\n' in done.output
    assert 'gpu:hottest{gpu="0"}\n  70.0 @[0]\n' in done.output


# ---- the notation of series


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1 -2 +3.5 1e3 .5", [1, -2, 3.5, 1000, 0.5]),
        ("_ _x2", [None, None, None]),
        ("1x2", [1, 1, 1]),
        ("0+10x3", [0, 10, 20, 30]),
        ("-2-2x1", [-2, -4]),
        ("1x0 Inf -inf+1x1", [1, float("inf"), float("-inf"), float("-inf")]),
        ("", []),
    ],
)
def test_values_are_those_that_are_written(text, expected):
    assert values_of(text) == expected


def test_steps_are_added_one_by_one():
    assert values_of("0+0.1x3")[3] == 0.1 + 0.1 + 0.1 != 0.3


def test_a_series_ends_where_stale_stands():
    assert [is_stale(value) for value in values_of("1 stale 2")] == [False, True, False]


@pytest.mark.parametrize("text", ["1+1", "stalex2", "_+1x2", "1x-2", "0x0x0", "1,2", "Infx2", "1x99999999"])
def test_what_is_no_value_is_refused(text):
    with pytest.raises(QueryError):
        values_of(f"1 {text}")


def test_a_series_without_labels_has_none():
    assert series_of("") == series_of(" {} ") == Labels()
    assert series_of('{"a.b", c="1"}') == Labels([("__name__", "a.b"), ("c", "1")])


@pytest.mark.parametrize("text", ["x > 1", 'x{a=~"1"}', 'x{a!="1"}'])
def test_what_is_no_series_is_refused(text):
    with pytest.raises(QueryError):
        series_of(text)


def test_memory_gives_what_was_added_up_to_the_instant():
    memory, x = Memory(), Labels.of("x")
    for at_ms, value in ((20, 2.0), (10, 1.0), (20, 9.0), (30, 3.0)):
        memory.add(x, at_ms, value)
    matcher = promql.Matcher("__name__", "=", "x")
    assert memory.select([matcher], 10, 30) == [promql.Series(x, [20, 30], [2.0, 3.0])]
    assert Until(memory, 20).select([matcher], 0, 30) == [promql.Series(x, [10, 20], [1.0, 2.0])]
    assert Until(memory, 5).select([matcher], 0, 30) == []


# ---- rules check


def test_rules_that_are_right_are_counted(write, tmp_path):
    done = call("check", write("rules.yaml", HOT), "--state-dir", tmp_path)
    assert done.output == (
        f"checked without what this host stores: there is no {tmp_path / METRICS_DB}\n"
        f"{tmp_path}/rules.yaml: SUCCESS, 2 rules\n"
    )
    assert done.exit_code == 0


def test_every_mistake_of_every_rule_is_told(write, tmp_path):
    path = write(
        "rules.yaml",
        """\
        groups:
          - name: a
            rules:
              - {alert: One, expr: sum(x}
              - {alert: Two, expr: up == 0, annotations: {summary: "{{ if }}"}}
              - {alert: Four, for: soon, expr: up == 0}
              - {}
          - name: b
            rules:
              - {alert: Three, expr: up ==}
        """,
    )
    done = call("check", path, "--lint", "none")
    assert done.exit_code == 1
    first, *mistakes = done.output.splitlines()
    assert first == f"{tmp_path}/rules.yaml: FAILED, 6 mistakes"
    assert [line.split(":")[1] for line in mistakes] == ["4", "5", "6", "7", "7", "10"]
    assert "7:9: this rule has no expr" in done.output


def test_a_key_that_is_no_text_is_a_mistake(write):
    path = write("rules.yaml", "groups: [{name: a, rules: [{alert: A, expr: up, ? [x] : 1}]}]")
    done = call("check", path, "--lint", "none")
    assert f"{path}: FAILED, 1 mistake\n  {path}:1:51: a key of a rule must be a text\n" == done.output


def test_a_folder_stands_for_its_rule_files_and_nothing_for_those_in_force(write, tmp_path):
    (tmp_path / "some").mkdir()
    write("some/a.yaml", HOT), write("some/b.yml", HOT)
    assert call("check", tmp_path / "some", "--lint", "none").output.count("SUCCESS") == 2
    settings = write("gpuwatch.yaml", f"rules: [{tmp_path}/some/b.yml]")
    done = call("check", "--config", settings, "--lint", "none")
    assert done.output == f"{tmp_path}/some/b.yml: SUCCESS, 2 rules\n"
    (tmp_path / "none").mkdir()
    without = write("without.yaml", f"rules: [{tmp_path}/none]")
    for given in ([tmp_path / "none"], ["--config", without]):
        assert f"there is no rule file in {tmp_path}/none" in call("check", *given).output


def test_a_remark_is_no_mistake_unless_that_is_asked_for(write, tmp_path):
    path = write("rules.yaml", "groups: [{name: a, rules: [{alert: A, expr: count(up) == 0}]}]")
    warned = call("check", path, "--state-dir", tmp_path)
    assert "SUCCESS, 1 rule, 1 remark\n" in warned.output
    assert f"{path}:1:55: alert A: nothing is ever == 0 here" in warned.output
    assert warned.exit_code == 0
    assert call("check", path, "--state-dir", tmp_path, "--lint", "error").exit_code == 3
    assert ", 1 remark" not in call("check", path, "--lint", "none").output


# ---- lint


GPU = {"gpu": "0", "uuid": "GPU-a"}
SERVER = {"server": "main", "engine": "0", "model_name": "m"}
STORED = [
    Labels.of("up", source="nvml"),
    Labels.of("up", source="metrics", server="main"),
    Labels.of("gpu_temperature_celsius", **GPU),
    Labels.of("gpu_memory_used_bytes", **GPU),
    Labels.of("gpu_ecc_errors_total", error="uncorrected", counter="volatile", **GPU),
    Labels.of("server_down", server="main"),
    Labels.of("vllm:num_preemptions_total", **SERVER),
    Labels.of("vllm:num_requests_running", **SERVER),
    Labels.of("vllm:wait_seconds_bucket", le="1", **SERVER),
    Labels.of("vllm:wait_seconds_sum", **SERVER),
    Labels.of("vllm:wait_seconds_count", **SERVER),
    Labels.of("requests_total", job="web"),
]


def remarks(write, expr, *, stored=STORED, **rule):
    named = {"alert": "A"} if "record" not in rule else {}
    text = msgspec.json.encode(
        {"groups": [{"name": "g", "rules": [{**named, "expr": expr, **rule}]}]}
    ).decode()
    groups = rules.compile_groups(load_rules([write("lint.yaml", text)]))
    return [finding.what for finding in lint(groups, Inventory.of(stored))]


@pytest.mark.parametrize(
    ("expr", "expected"),
    [
        ("rate(vllm:num_preemptions[5m]) > 0", "did you mean vllm:num_preemptions_total?"),
        ("gpu_temprature_celsius > 90", "did you mean gpu_temperature_celsius?"),
        ("DCGM_FI_DEV_GPU_TEMP > 90", "the metric DCGM_FI_DEV_GPU_TEMP was never seen on this host"),
        ("vllm:num_preemptions_total > 5", "take rate() or increase()"),
        ("sum(avg_over_time(gpu_ecc_errors_total[5m])) > 5", "take rate() or increase()"),
        ("vllm:wait_seconds_sum > 5", "take rate() or increase()"),
        ("rate(gpu_memory_used_bytes[5m]) > 0", "take deriv() or delta()"),
        ("rate(vllm:num_requests_running[5m]) > 0", "take deriv() or delta()"),
        ('up{source="a", source="b"} == 0', 'source="a" and source="b" exclude each other'),
        ('up{source="a", source!~"a|b"} == 0', 'source="a" and source!~"a|b" exclude each other'),
        (
            'gpu_temperature_celsius{device="0"} > 90',
            "has the label device, so this selects nothing; they have gpu, uuid",
        ),
        ('increase(gpu_ecc_errors_total{error="uncorrectable"}[5m]) > 0', "did you mean 'uncorrected'?"),
        ('gpu_temperature_celsius{gpu="8"} > 90', "seen were '0'"),
        (
            "sum by (instance) (gpu_memory_used_bytes) > 1",
            "by (instance): nothing here has the label instance",
        ),
        ("sum by (GPU, gpu) (gpu_memory_used_bytes) > 1", "by (GPU): nothing here has the label GPU"),
        ("sum without (uuids) (gpu_memory_used_bytes) > 1", "did you mean uuid?"),
        (
            "gpu_memory_used_bytes > on (host) gpu_temperature_celsius",
            "on (host): neither side has this label",
        ),
        (
            "server_down == 1 and on (gpu) gpu_memory_used_bytes",
            "on (gpu): the left side never has this label",
        ),
        (
            "gpu_memory_used_bytes and on (server) server_down",
            "on (server): the left side never has this label",
        ),
        ("count(up) == 0", "count() of nothing is nothing, not 0"),
        ("0 == count(up)", "count() of nothing is nothing, not 0"),
        ("count_over_time(up[5m]) < 1", "absent() tells what is not there"),
        ("absent(up) == 0", "absent() is 1 or nothing"),
        ("up > 5 and up < 3", "nothing is ever > 5 and < 3 here"),
        ("3 > (up > 5)", "nothing is ever < 3 and > 5 here"),
        ("up == 1 and (up == 2 unless server_down)", "nothing is ever == 1 and == 2 here"),
        ("up > 1 + 2 * 2 and up < -1", "nothing is ever > 5 and < -1 here"),
        ("up == 1234567 and up == 1234568", "nothing is ever == 1234567 and == 1234568 here"),
        ("up > NaN", "nothing is ever > nan here"),
        ("up > +Inf", "nothing is ever > inf here"),
        ("up > bool 5", '"bool" makes 0 or 1 of a comparison'),
        ("time() - 5", "a scalar is always there"),
    ],
)
def test_what_looks_mistaken_is_remarked(write, expr, expected):
    assert expected in "\n".join(remarks(write, expr))


@pytest.mark.parametrize(
    "expr",
    [
        "1",
        "vector(1)",
        "absent(gpu_temperature_celsius)",
        "gpu_memory_temperature_celsius > 90",  # ours, though this host's GPU does not tell it
        'ALERTS{alertstate="firing", alertname="X"} == 1',
        "increase(vllm:num_preemptions_total[5m]) > 0",
        "changes(requests_total[1h]) > 3 and requests_total",
        "requests_total unless requests_total offset 1h",
        "absent(requests_total) or count(requests_total) > 3",
        "histogram_quantile(0.9, sum by (le, server) (rate(vllm:wait_seconds_bucket[5m]))) > 1",
        "resets(gpu_temperature_celsius[5m]) > 3",
        'up{gpu="", source!="metrics"} == 0',
        'server_down{server=~"main|other"} == 1',
        'gpu_ecc_errors_total{error="corrected"} and on () vector(0) > 1 unless up',
        "count(up) == 0 or vector(1)",
        "count(up) > 1",
        "up > 5 and on () up < 3",
        "up > 5 and up{source='nvml'} < 3",
        "up > 3 < 5",
        "up > 1e17",
        "up < 1e300",
        "up > -Inf < 5",
        "up == +Inf",
        "up != NaN",
        "sum by (__name__, gpu) (gpu_memory_used_bytes) > 1",
        "sum without (instance) (gpu_memory_used_bytes) > 1",
        "server_down == 1 and on (server) up",
        "label_replace(up, 'host', '$1', 'source', '(.*)') > on (host) group_left sum by (host) (foo)",
        "sum by (gpu) ({__name__=~'gpu_.*'}) > 1",
    ],
)
def test_what_is_right_or_doubtful_is_passed_over(write, expr):
    assert remarks(write, expr, stored=[*STORED, Labels.of("foo", host="a")]) == []


def test_without_a_database_only_the_expression_and_the_catalogue_speak(write):
    assert (
        remarks(write, "rate(vllm:num_preemptions[5m]) > 0 and DCGM_FI_DEV_GPU_TEMP > 9", stored=None) == []
    )
    assert len(remarks(write, "vllm:num_preemptions_total > 5", stored=None)) == 1
    assert len(remarks(write, "gpu_temperature_celsius{device='0'} > 90", stored=None)) == 1


def test_before_the_first_server_answered_none_of_its_metrics_is_missed(write):
    assert remarks(write, "vllm:num_requests_waiting > 5", stored=[Labels.of("up", source="nvml")]) == []


def test_what_a_recording_rule_makes_is_known(write):
    rule = {"record": "gpu:hottest", "expr": "max by (gpu) (gpu_temperature_celsius)"}
    groups = [{"name": "g", "rules": [rule, {"alert": "A", "expr": "gpu:hottest > 90"}]}]
    path = write("rules.yaml", msgspec.json.encode({"groups": groups}).decode())
    compiled = rules.compile_groups(load_rules([path]))
    assert lint(compiled, Inventory.of(STORED, ["gpu:hottest"])) == []
    assert len(lint(compiled, Inventory.of(STORED))) == 1


def test_a_recording_rule_may_compare_as_it_likes(write):
    assert remarks(write, "up > bool 5", record="up:high") == []


def test_a_template_that_names_a_label_that_is_never_there_is_remarked(write):
    texts = {"summary": "{{ $labels.gpu }} {{ $labels.uuid }} {{ $labels.severity }}"}
    found = remarks(
        write,
        "max by (gpu) (gpu_temperature_celsius) > 90",
        annotations=texts,
        labels={"severity": "warning"},
    )
    assert len(found) == 2
    assert "$labels.severity is always empty" in found[1]
    assert "it is the rule's own: write its value" in found[1]
    assert "$labels.uuid is always empty" in found[0]


def test_a_label_that_holds_the_value_is_remarked(write):
    (found,) = remarks(
        write, "up == 0", labels={"value": "{{ $value }}"}, annotations={"summary": "{{ $value }}"}
    )
    assert found.startswith("labels.value holds $value: each new value is a new alert")


def test_two_rules_of_the_same_name_and_labels_are_remarked(write):
    rule = {"alert": "A", "expr": "up == 0"}
    other = {**rule, "labels": {"severity": "warning"}}
    text = msgspec.json.encode({"groups": [{"name": "g", "rules": [rule, other, rule]}]}).decode()
    (found,) = lint(rules.compile_groups(load_rules([write("rules.yaml", text)])), Inventory.of(None))
    assert "the same name and labels as at" in found.what


# ---- on a host


def test_the_shipped_rules_give_no_false_alarm_on_a_recorded_host(write, recorded_host):
    settings = write("gpuwatch.yaml", f"state_dir: {recorded_host.state_dir}")
    files = [*(ROOT / "rules").glob("*.yaml"), *(ROOT / "rules/optional").glob("*.yaml")]
    done = call("check", "--config", settings, *files, "--lint", "error")
    assert done.exit_code == 0, done.output
    assert " remark" not in done.output
    assert "without what this host stores" not in done.output


def test_what_a_recorded_host_stores_is_what_lint_goes_by(write, recorded_host):
    path = write(
        "rules.yaml", "groups: [{name: a, rules: [{alert: A, expr: 'rate(vllm:num_preemptions[5m]) > 0'}]}]"
    )
    done = call("check", path, "--state-dir", recorded_host.state_dir)
    assert done.output.endswith("was never seen on this host; did you mean vllm:num_preemptions_total?\n")


def test_a_database_that_cannot_be_read_is_told_and_no_obstacle(write, tmp_path):
    (tmp_path / METRICS_DB).write_bytes(b"no database" * 1000)
    done = call("check", write("rules.yaml", HOT), "--state-dir", tmp_path)
    assert done.exit_code == 0
    assert "checked without what this host stores: " in done.output
