"""The shipped rules: each is tested, complete, and valid for a real promtool too."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner
from tests import promtool

from gpuwatch import cli, rules, sources
from gpuwatch.config.rulefiles import load_rules
from gpuwatch.promql.ast import VectorSelector, walk
from gpuwatch.records import Labels
from gpuwatch.rules.templates import Template
from gpuwatch.sources import catalogue

RULES = Path(__file__).parents[2] / "rules"
RECORDING = Path(__file__).parents[1] / "recordings/h200-vllm024-incidents.jsonl.xz"
FILES = sorted(RULES.glob("*.yaml"))
TESTS = sorted(RULES.glob("tests/*.yaml"))
GROUPS = rules.compile_groups(load_rules(FILES))
ALERTS = [rule for group in GROUPS for rule in group.rules]
TEXTS = {"summary", "description", "runbook", "summary_zh", "description_zh", "runbook_zh"}
ANY_LABEL = Labels.of("m", gpu="0", uuid="GPU-a", server="main", worker="engine", process="p", source="s")

every_alert = pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule.name)


@pytest.mark.parametrize("path", TESTS, ids=lambda path: path.stem)
def test_the_rules_pass_their_tests(path):
    assert promtool.run(path) == []


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_a_real_promtool_agrees():
    for command in (["check", "rules", *FILES], ["test", "rules", *TESTS]):
        done = subprocess.run(["promtool", *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@every_alert
def test_every_alert_fires_in_a_test(rule):
    assert any(f'alertname="{rule.name}"' in path.read_text(encoding="utf-8") for path in TESTS)


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
    assert rule.rule.labels["remediation"] in {"restart", "none"}


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
            assert name.startswith("vllm:") or name in catalogue.CATALOGUE


def test_only_a_server_that_is_down_is_restarted():
    assert [rule.name for rule in ALERTS if rule.rule.labels["remediation"] == "restart"] == ["VLLMDown"]


# Seconds of the recording between which each alert begins to fire, and by when it is over.
INCIDENTS = {
    "VLLMPreempting": (124, 213, 225),
    "VLLMKVCacheFull": (124, 213, 215),
    "GPUMemoryForeignProcess": (222, 235, 300),
    "GPUMemoryHeadroomLow": (262, 270, 290),
    "VLLMDown": (274, 278, 321),
}


def test_the_recorded_incidents_of_a_real_gpu_are_told_and_nothing_else():
    start_s = sources.open_recording(RECORDING).start_ms / 1000
    fired, over = {}, {}
    done = CliRunner().invoke(cli.main, ["replay", str(RECORDING), "--rules", str(RULES), "--json"])
    for line in filter(lambda line: line.startswith("{"), done.output.splitlines()):
        event = json.loads(line)
        if event["kind"] == "alert":
            seen = {"firing": fired, "resolved": over}.get(event["state"], {})
            seen.setdefault(event["alert"], event["t"] - start_s)
    assert fired.keys() == INCIDENTS.keys()
    for alert, (after, before, ends) in INCIDENTS.items():
        assert after <= fired[alert] <= before, alert
        assert over[alert] <= ends, alert
