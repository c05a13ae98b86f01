"""Runs promtool's rule unit tests over our own engine; knows no test framework."""

import re
from pathlib import Path

import yaml

from gpuwatch import promql, rules
from gpuwatch.config.rulefiles import load_rules
from gpuwatch.records import STALE, AlertState, Labels

_UNIT_MS = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}
_ITEM = re.compile(
    r"(?P<first>_|stale|[-+]?[\d.]+(?:e[-+]?\d+)?|[-+]?Inf|NaN)(?P<step>[-+][\d.]+(?:e[-+]?\d+)?)?(?:x(?P<times>\d+))?"
)


class Memory:
    """A querier over samples kept by series and time."""

    def __init__(self):
        self.samples = {}

    def add(self, labels, at_ms, value):
        self.samples.setdefault(labels, {})[at_ms] = value

    def select(self, matchers, after_ms, upto_ms):
        found = []
        for labels, points in self.samples.items():
            if all(m.matches(labels.get(m.name)) for m in matchers):
                kept = sorted((at, value) for at, value in points.items() if after_ms < at <= upto_ms)
                if kept:
                    found.append(promql.Series(labels, [at for at, _ in kept], [v for _, v in kept]))
        return found


def run(path: Path) -> list[str]:
    """What fails of a test file, a line each."""
    document = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)  # 0x30 is no number here
    files = [file for pattern in document["rule_files"] for file in sorted(path.parent.glob(pattern))]
    groups = rules.compile_groups(load_rules(files))
    step_ms = duration_ms(document.get("evaluation_interval", "1m"))
    failures = []
    for index, test in enumerate(document["tests"]):
        name = test.get("name", f"tests[{index}]")
        failures += [f"{path.name}: {name}: {what}" for what in _run_test(test, groups, step_ms)]
    return failures


def duration_ms(text):
    return sum(int(n) * _UNIT_MS[unit] for n, unit in re.findall(r"(\d+)(ms|[smhd])", str(text)))


def values(text):
    """`1 2 _ stale 0+10x3`: a value a step, None for a gap."""
    result = []
    for item in text.split():
        match = _ITEM.fullmatch(item)
        if match is None:
            raise ValueError(f"{item!r} is no item of a series")
        times = int(match["times"] or 0)
        if match["first"] == "_":
            result += [None] * max(times, 1)
        elif match["first"] == "stale":
            result += [STALE] * (times + 1)
        else:
            first, step = float(match["first"]), float(match["step"] or 0)
            result += [first + step * i for i in range(times + 1)]
    return result


def series(text):
    """The labels of `name{a="b"}`."""
    return Labels((m.name, m.value) for m in promql.parse(text).matchers)


def _run_test(test, groups, step_ms):
    memory = Memory()
    interval_ms = duration_ms(test.get("interval", f"{step_ms}ms"))
    for given in test.get("input_series", []):
        for index, value in enumerate(values(given["values"])):
            if value is not None:
                memory.add(series(given["series"]), index * interval_ms, value)
    alert_tests, expr_tests = test.get("alert_rule_test", []), test.get("promql_expr_test", [])
    until_ms = max(duration_ms(one["eval_time"]) for one in [*alert_tests, *expr_tests])
    history = {}
    active = []
    for now_ms in range(0, until_ms + 1, step_ms):
        after = []
        for group in groups:
            evaluation = rules.evaluate(group, memory, active, now_ms)
            if evaluation.failures:
                return [f"at {now_ms} ms: {failure.rule}: {failure.what}" for failure in evaluation.failures]
            for sample in evaluation.samples:
                memory.add(sample.labels, sample.at_ms, sample.value)
            after += evaluation.alerts
        history[now_ms] = active = after
    return [
        *(what for one in alert_tests for what in _check_alerts(one, history, step_ms)),
        *(what for one in expr_tests for what in _check_expr(one, memory)),
    ]


def _check_alerts(one, history, step_ms):
    at_ms = duration_ms(one["eval_time"])
    expected = sorted(
        (
            Labels({**alert.get("exp_labels", {}), "alertname": one["alertname"]}.items()),
            alert.get("exp_annotations", {}),
        )
        for alert in one.get("exp_alerts") or []
    )
    got = sorted(
        (alert.labels, dict(alert.annotations))
        for alert in history[at_ms // step_ms * step_ms]
        if alert.rule == one["alertname"] and alert.state is AlertState.FIRING
    )
    if got != expected:
        yield f"{one['alertname']} at {one['eval_time']}: expected {expected}, got {got}"


def _check_expr(one, memory):
    result = promql.evaluate(promql.parse(one["expr"]), memory, duration_ms(one["eval_time"])).value
    got = sorted(result if isinstance(result, list) else [(Labels(), result)])
    expected = sorted(
        (series(sample["labels"]), float(sample["value"])) for sample in one.get("exp_samples") or []
    )
    if got != expected:
        shown = [f"{labels} {value}" for labels, value in got]
        yield f"{one['expr']} at {one['eval_time']}: got {shown}"
