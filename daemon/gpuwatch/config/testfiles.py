"""Decodes unit tests of rules, in promtool's format, strictly and each thing with its place; runs none."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Final

from gpuwatch.config.nodes import NodeReader, is_null
from gpuwatch.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import yaml

    from gpuwatch.records import Place

DEFAULT_INTERVAL_MS: Final = 60_000

_FILE_KEYS: Final = frozenset(
    {"rule_files", "evaluation_interval", "group_eval_order", "tests", "fuzzy_compare"}
)
_TEST_KEYS: Final = frozenset(
    {
        *("name", "interval", "input_series", "alert_rule_test", "promql_expr_test"),
        *("external_labels", "external_url", "start_timestamp"),
    }
)
_SERIES_KEYS: Final = frozenset({"series", "values"})
_ALERT_CHECK_KEYS: Final = frozenset({"eval_time", "alertname", "exp_alerts"})
_ALERT_KEYS: Final = frozenset({"exp_labels", "exp_annotations"})
_EXPR_CHECK_KEYS: Final = frozenset({"expr", "eval_time", "exp_samples"})
_SAMPLE_KEYS: Final = frozenset({"labels", "value", "histogram"})


@dataclass(frozen=True, slots=True, kw_only=True)
class InputSeries:
    """A series that a test gives: `series` and `values` in the notation of rule tests."""

    series: str
    values: str
    series_place: Place
    values_place: Place


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedAlert:
    """An alert that must fire; `labels` without the alert's name."""

    labels: Mapping[str, str]
    annotations: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class AlertCheck:
    """Which alerts of one name fire `after_ms` after the test's start; no others of that name may."""

    alert: str
    after_ms: int
    expected: tuple[ExpectedAlert, ...]
    place: Place


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpectedSample:
    """One element that an expression must give; `labels` as PromQL writes them."""

    labels: str
    value: float
    place: Place


@dataclass(frozen=True, slots=True, kw_only=True)
class ExprCheck:
    """What an expression gives `after_ms` after the test's start, once all rules were evaluated."""

    expr: str
    after_ms: int
    expected: tuple[ExpectedSample, ...]
    place: Place
    expr_place: Place


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitTest:
    """One test: series with a value each `interval_ms` from `start_ms` on, and what must come of them."""

    name: str
    interval_ms: int
    start_ms: int
    series: tuple[InputSeries, ...]
    alerts: tuple[AlertCheck, ...]
    exprs: tuple[ExprCheck, ...]
    external_labels: Mapping[str, str] = field(default_factory=dict)
    external_url: str = ""
    place: Place


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitTestFile:
    """The tests of a file; all groups of `rule_files` are evaluated every `interval_ms`.

    `rule_files` are patterns relative to the file's folder. Groups named in `group_order` go first.
    """

    path: Path
    rule_files: tuple[str, ...]
    interval_ms: int
    group_order: tuple[str, ...]
    is_fuzzy: bool
    tests: tuple[UnitTest, ...]


def load_unit_tests(path: Path) -> UnitTestFile:
    """The tests of a file; ConfigError with all mistakes, each `file:line:column: what`."""
    reader = _Reader(path)
    try:
        tests = reader.file(path)
    except RecursionError as error:
        raise ConfigError([f"{path}: has a part that holds itself"]) from error
    if reader.mistakes:
        raise ConfigError(reader.mistakes)
    return tests


class _Reader(NodeReader):
    def file(self, path: Path) -> UnitTestFile:
        keys = self.mapping(self.root(), _FILE_KEYS, "a test file")
        interval_ms = self.duration_ms(keys.get("evaluation_interval"), "evaluation_interval")
        interval_ms = interval_ms or DEFAULT_INTERVAL_MS
        nodes = self.sequence(keys.get("tests"), "tests")
        return UnitTestFile(
            path=path,
            rule_files=tuple(
                self.text(one, "rule_files") for one in self.sequence(keys.get("rule_files"), "rule_files")
            ),
            interval_ms=interval_ms,
            group_order=self._order(keys.get("group_eval_order")),
            is_fuzzy=self.flag(keys.get("fuzzy_compare"), "fuzzy_compare"),
            tests=tuple(self._test(node, index, interval_ms) for index, node in enumerate(nodes)),
        )

    def _order(self, node: yaml.Node | None) -> tuple[str, ...]:
        names: list[str] = []
        for one in self.sequence(node, "group_eval_order"):
            name = self.text(one, "group_eval_order")
            if name in names:
                self.mistake(one, f"group {name!r} is named twice in group_eval_order")
            names.append(name)
        return tuple(names)

    def _test(self, node: yaml.Node, index: int, interval_ms: int) -> UnitTest:
        keys = self.mapping(node, _TEST_KEYS, "a test")
        series, alerts, exprs = (
            self.sequence(keys.get(key), key)
            for key in ("input_series", "alert_rule_test", "promql_expr_test")
        )
        return UnitTest(
            name=self.text(keys.get("name"), "name") or f"unnamed#{index}",
            interval_ms=self.duration_ms(keys.get("interval"), "interval") or interval_ms,
            start_ms=self._start_ms(keys.get("start_timestamp")),
            series=tuple(self._series(one) for one in series),
            alerts=tuple(self._alert_check(one) for one in alerts),
            exprs=tuple(self._expr_check(one) for one in exprs),
            external_labels=self.texts(keys.get("external_labels"), "external_labels"),
            external_url=self.text(keys.get("external_url"), "external_url"),
            place=self.place(node),
        )

    def _start_ms(self, node: yaml.Node | None) -> int:
        """Of Unix seconds or an RFC 3339 time."""
        if node is None or is_null(node):
            return 0
        text = self.text(node, "start_timestamp")
        try:
            return round(_unix_seconds(text) * 1000)
        except (ValueError, OverflowError):
            self.mistake(
                node,
                f"start_timestamp: {text!r} is neither Unix seconds nor a time like 2026-01-31T08:00:00Z",
            )
            return 0

    def _series(self, node: yaml.Node) -> InputSeries:
        keys = self.mapping(node, _SERIES_KEYS, "an input series")
        return InputSeries(
            series=self.text(keys.get("series"), "series"),
            values=self.text(keys.get("values"), "values"),
            series_place=self.text_place(keys.get("series", node)),
            values_place=self.text_place(keys.get("values", node)),
        )

    def _alert_check(self, node: yaml.Node) -> AlertCheck:
        keys = self.mapping(node, _ALERT_CHECK_KEYS, "an alert_rule_test")
        alert = self.text(keys.get("alertname"), "alertname")
        if not alert:
            self.mistake(node, "this alert_rule_test has no alertname")
        alerts = self.sequence(keys.get("exp_alerts"), "exp_alerts")
        return AlertCheck(
            alert=alert,
            after_ms=self.duration_ms(keys.get("eval_time"), "eval_time"),
            expected=tuple(self._alert(one) for one in alerts),
            place=self.place(node),
        )

    def _alert(self, node: yaml.Node) -> ExpectedAlert:
        keys = self.mapping(node, _ALERT_KEYS, "an expected alert")
        return ExpectedAlert(
            labels=self.texts(keys.get("exp_labels"), "exp_labels"),
            annotations=self.texts(keys.get("exp_annotations"), "exp_annotations"),
        )

    def _expr_check(self, node: yaml.Node) -> ExprCheck:
        keys = self.mapping(node, _EXPR_CHECK_KEYS, "a promql_expr_test")
        samples = self.sequence(keys.get("exp_samples"), "exp_samples")
        return ExprCheck(
            expr=self.text(keys.get("expr"), "expr"),
            after_ms=self.duration_ms(keys.get("eval_time"), "eval_time"),
            expected=tuple(self._sample(one) for one in samples),
            place=self.place(node),
            expr_place=self.text_place(keys.get("expr", node)),
        )

    def _sample(self, node: yaml.Node) -> ExpectedSample:
        keys = self.mapping(node, _SAMPLE_KEYS, "an expected sample")
        if self.text(keys.get("histogram"), "histogram"):
            self.mistake(
                keys["histogram"], "gpuwatch has no native histograms: test the classic _bucket series"
            )
        return ExpectedSample(
            labels=self.text(keys.get("labels"), "labels"),
            value=self.number(keys.get("value"), "value"),
            place=self.text_place(keys.get("labels", node)),
        )


def _unix_seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        at = datetime.fromisoformat(text)
        if at.tzinfo is None:
            raise
        return at.timestamp()
