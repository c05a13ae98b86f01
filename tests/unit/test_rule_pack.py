"""The shipped rules: each is tested, complete, and valid for a real promtool too."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from gpuwatch import catalogue, cli, config, rules
from gpuwatch.config.duration import Duration
from gpuwatch.config.rulefiles import load_rules
from gpuwatch.promql.ast import VectorSelector, walk
from gpuwatch.records import Labels
from gpuwatch.rules.templates import Template

ROOT = Path(__file__).parents[2]
RULES = ROOT / "rules"
FILES = sorted(RULES.glob("*.yaml"))
OPTIONAL = sorted(RULES.glob("optional/*.yaml"))
TESTS = sorted(RULES.glob("tests/*.yaml"))


def alerts_of(files):
    return [rule for group in rules.compile_groups(load_rules(files)) for rule in group.rules]


ALERTS = [*alerts_of(FILES), *alerts_of(OPTIONAL)]
TEXTS = {"summary", "description", "runbook", "summary_zh", "description_zh", "runbook_zh"}
ANY_LABEL = Labels.of("m", gpu="0", uuid="GPU-a", server="main", worker="engine", process="p", source="s")

ON_VLLMS_PAGE = {"process_start_time_seconds"}  # beside what begins with vllm:

every_alert = pytest.mark.parametrize(
    "rule", ALERTS, ids=lambda rule: f"{rule.name}-{rule.rule.labels['severity']}"
)


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_the_rules_pass_their_tests(path):
    done = CliRunner().invoke(cli.main, ["rules", "test", str(path)])
    assert done.exit_code == 0, done.output


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_a_real_promtool_agrees():
    for command in (["check", "rules", *FILES, *OPTIONAL], ["test", "rules", *TESTS]):
        done = subprocess.run(["promtool", *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


def courses(rule):
    """Of each test in which the alert fires: whether it does, moment by moment."""
    for path in TESTS:
        for one in yaml.safe_load(path.read_text(encoding="utf-8"))["tests"]:
            moments = sorted(one["promql_expr_test"], key=lambda moment: Duration.parse(moment["eval_time"]))
            fires = [any(is_of(rule, s["labels"]) for s in m.get("exp_samples", ())) for m in moments]
            if any(fires):
                yield fires


def is_of(rule, series):
    return f'alertname="{rule.name}"' in series and f'severity="{rule.rule.labels["severity"]}"' in series


@every_alert
def test_every_alert_begins_and_ends_in_a_test(rule):
    assert any(not fires[0] and not fires[-1] for fires in courses(rule))


@every_alert
def test_every_alert_says_all_there_is_to_say_in_both_languages(rule):
    assert set(rule.rule.annotations) == TEXTS
    for name, text in rule.rule.annotations.items():
        assert text == text.strip(), name
        assert bool(re.search(r"[\u4e00-\u9fff]", text)) == name.endswith("_zh"), name


@every_alert
def test_every_alert_says_how_bad_it_is_and_what_is_done(rule):
    assert set(rule.rule.labels) == {"severity", "remediation"}
    assert rule.rule.labels["severity"] in {"critical", "warning", "info"}
    assert rule.rule.labels["remediation"] in {"restart", "reconfigure", "return", "limit", "none"}


@every_alert
def test_a_summary_is_one_line_that_names_its_object(rule):
    for name in ("summary", "summary_zh"):
        text = Template(rule.rule.annotations[name]).expand(ANY_LABEL, 0.5)
        assert "\n" not in text
        assert "<error" not in text
        assert len(text) <= 120
        assert "{{" in rule.rule.annotations[name], "alone it tells neither GPU nor server"


@every_alert
def test_every_metric_of_a_rule_is_one_that_is_made(rule):
    for node, _ in walk(rule.expr):
        if isinstance(node, VectorSelector):
            (name,) = (m.value for m in node.matchers if m.name == "__name__")
            assert name.startswith("vllm:") or name in catalogue.CATALOGUE or name in ON_VLLMS_PAGE


def test_only_a_server_that_is_down_or_hangs_is_restarted():
    restarted = {rule.name for rule in ALERTS if rule.rule.labels["remediation"] == "restart"}
    assert restarted == {"VLLMDown", "VLLMEngineHung"}


def test_the_plain_thresholds_are_in_the_wheel_and_loaded_only_by_name():
    assert config.rule_paths(config.load_settings(None)) == FILES
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for path in OPTIONAL:
        assert f'"rules/optional/{path.name}" = "gpuwatch/_rules/optional/{path.name}"' in text


def test_the_page_on_alerts_lists_each_of_them_once():
    page = (ROOT / "docs/alerts.md").read_text(encoding="utf-8")
    drawn = re.findall(r"^\| `(\w+)` \| (\w+) \| (\w+) \| [^|]+ \|$", page, re.MULTILINE)
    labels = [rule.rule.labels for rule in ALERTS]
    assert sorted(drawn) == sorted(
        (rule.name, its["severity"], its["remediation"]) for rule, its in zip(ALERTS, labels, strict=True)
    )
