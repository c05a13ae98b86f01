"""Runs the unit tests of rules as promtool does, on our own engine: made-up series in, failures out."""

from __future__ import annotations

import glob
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from gpuwatch import config, promql, rules
from gpuwatch.cli.memory import Memory, Until
from gpuwatch.cli.ruletests.notation import series_of, values_of
from gpuwatch.config import Duration
from gpuwatch.errors import QueryError, RuleError
from gpuwatch.records import AlertState
from gpuwatch.rules.compiler import place_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from gpuwatch.config.testfiles import AlertCheck, ExprCheck, UnitTest, UnitTestFile
    from gpuwatch.promql import Querier
    from gpuwatch.records import Alert, Labels, Place
    from gpuwatch.rules import CompiledGroup

T = TypeVar("T")
Element = tuple[dict[str, str], float]


@dataclass(frozen=True, slots=True)
class Failure:
    """What is not as a test expects: lines of text for what it expects and for what came."""

    place: Place
    what: str
    expected: tuple[str, ...] = ()
    got: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a test went; `memory` holds what it gave and what the rules made of it."""

    test: UnitTest
    failures: tuple[Failure, ...]
    memory: Memory


def rule_paths(file: UnitTestFile) -> tuple[list[Path], list[str]]:
    """The rule files that a test file names, and those of its patterns that name none."""
    patterns = [str(file.path.parent / pattern) for pattern in file.rule_files]
    # Not Path.glob, which takes no absolute pattern.
    found = {one: sorted(glob.glob(one, include_hidden=True)) for one in patterns}  # noqa: PTH207
    return [Path(path) for some in found.values() for path in some], [one for one in found if not found[one]]


def compiled(file: UnitTestFile, paths: Iterable[Path]) -> tuple[CompiledGroup, ...]:
    """The groups in the order of evaluation; ConfigError or RuleError with places."""
    groups = rules.compile_groups(config.load_rules(paths))
    order = {name: index for index, name in enumerate(file.group_order)}
    return tuple(sorted(groups, key=lambda group: order.get(group.name, len(order))))


def unknown_alerts(file: UnitTestFile, groups: Iterable[CompiledGroup]) -> list[AlertCheck]:
    """The checks of alerts that no rule gives: one that expects none can never fail."""
    known = {rule.name for group in groups for rule in group.rules if not rule.is_recording}
    return [check for test in file.tests for check in test.alerts if check.alert not in known]


def run(file: UnitTestFile, groups: Sequence[CompiledGroup], test: UnitTest) -> Outcome:
    """Evaluate all groups every interval up to the last check, and compare."""
    trial = _Trial(file, groups, test)
    try:
        trial.give()
        failures = tuple(trial.failures())
    except RuleError as error:
        failures = (Failure(error.place, error.what),)
    return Outcome(test, failures, trial.memory)


class _Trial:
    """One test under way: samples, and the alerts of the last evaluation."""

    def __init__(self, file: UnitTestFile, groups: Sequence[CompiledGroup], test: UnitTest) -> None:
        self.memory = Memory()
        self._file = file
        self._groups = groups
        self._test = test
        self._alerts: dict[str, Sequence[Alert]] = {}  # by group, each to itself as in Prometheus
        self._written: dict[str, frozenset[Labels]] = {}
        self._limits = promql.Limits(subquery_step_ms=file.interval_ms)
        self._terms = rules.Terms(
            limits=lambda: self._limits,
            external_labels=test.external_labels,
            external_url=test.external_url,
        )

    def give(self) -> None:
        """Add the samples of the test's series; RuleError with the place of a mistake."""
        for given in self._test.series:
            labels = _read(series_of, given.series, given.series_place)
            for index, value in enumerate(_read(values_of, given.values, given.values_place)):
                if value is not None:
                    self.memory.add(labels, self._test.start_ms + index * self._test.interval_ms, value)

    def failures(self) -> Iterator[Failure]:
        """What fails, in the order of time, and then the expressions; a rule that fails ends the test."""
        test, interval_ms = self._test, self._file.interval_ms
        checks = (check.after_ms for part in (test.alerts, test.exprs) for check in part)
        last_ms = max(checks, default=0)
        after_ms = 0
        for after_ms in range(0, last_ms + 1, interval_ms):
            broken = self._evaluate(test.start_ms + after_ms)
            yield from (Failure(test.place, f"{what}, at {Duration(after_ms)}") for what in broken)
            if broken:
                return
            for check in test.alerts:
                if after_ms <= check.after_ms < after_ms + interval_ms:
                    yield from self._wrong_alerts(check)
        for one in test.exprs:
            yield from self._wrong_elements(one, Until(self.memory, test.start_ms + after_ms))

    def _evaluate(self, now_ms: int) -> list[str]:
        """Evaluate every group once; which rules could not be."""
        broken: list[str] = []
        querier = Until(self.memory, now_ms)
        for group in self._groups:
            before = self._alerts.get(group.key, ())
            made = rules.evaluate(group, querier, before, now_ms, written=self._written, terms=self._terms)
            self._alerts[group.key] = made.alerts
            self._written.update(made.written)
            broken += [f"rule {failure.rule}: {failure.what}" for failure in made.failures]
            for sample in made.samples:
                self.memory.add(sample.labels, sample.at_ms, sample.value)
        return broken

    def _wrong_alerts(self, check: AlertCheck) -> Iterator[Failure]:
        got = sorted(
            (sorted(alert.labels), sorted(pair for pair in alert.annotations.items() if pair[1]))
            for alerts in self._alerts.values()
            for alert in alerts
            if alert.rule == check.alert and alert.state is AlertState.FIRING
            for _ in alert.held_by  # rules of one name that find the same: Prometheus has an alert of each
        )
        expected = sorted(
            (sorted({**alert.labels, "alertname": check.alert}.items()), sorted(alert.annotations.items()))
            for alert in check.expected
        )
        if got != expected:
            what = f"alert {check.alert} at {Duration(check.after_ms)}"
            yield Failure(check.place, what, _alert_lines(expected), _alert_lines(got))

    def _wrong_elements(self, check: ExprCheck, querier: Querier) -> Iterator[Failure]:
        what = f"{check.expr} at {Duration(check.after_ms)}"
        try:
            got = sorted(self._value(check, querier), key=_in_order)
            expected = sorted(
                (
                    (dict(_read(series_of, sample.labels, sample.place)), sample.value)
                    for sample in check.expected
                ),
                key=_in_order,
            )
        except QueryError as error:
            place = place_of(check.expr_place, check.expr, error.position)
            yield Failure(place, f"{what}: {error.what}")
            return
        except RuleError as error:
            yield Failure(error.place, f"{what}: {error.what}")
            return
        same = _nearly_same if self._file.is_fuzzy else _same
        if len(got) != len(expected) or not all(map(same, got, expected)):
            yield Failure(check.place, what, _element_lines(expected), _element_lines(got))

    def _value(self, check: ExprCheck, querier: Querier) -> list[Element]:
        """QueryError unless the expression gives an instant vector or a scalar."""
        expr = promql.parse(check.expr)
        if expr.type not in {promql.ValueType.VECTOR, promql.ValueType.SCALAR}:
            raise QueryError(f"a test compares an instant vector or a scalar, not a {expr.type}")
        value = promql.evaluate(expr, querier, self._test.start_ms + check.after_ms, self._limits).value
        if isinstance(value, list):
            return [(dict(labels), number) for labels, number in value]  # type: ignore[misc]
        return [({}, float(value))]


def _read(read: Callable[[str], T], text: str, place: Place) -> T:
    try:
        return read(text)
    except QueryError as error:
        raise RuleError(place_of(place, text, error.position), error.what) from error


def _in_order(element: Element) -> list[tuple[str, str]]:
    return sorted(element[0].items())


def _same(one: Element, other: Element) -> bool:
    return one == other


def _nearly_same(one: Element, other: Element) -> bool:
    """Whether the numbers are neighbours at most: no floating point number lies between."""
    near = {other[1], math.nextafter(other[1], -math.inf), math.nextafter(other[1], math.inf)}
    return one[0] == other[0] and one[1] in near


Pairs = list[tuple[str, str]]


def _alert_lines(alerts: Iterable[tuple[Pairs, Pairs]]) -> tuple[str, ...]:
    lines: list[str] = []
    for labels, texts in alerts:
        lines += [_braced(labels), *(f"  {name}: {_quoted(text)}" for name, text in texts)]
    return tuple(lines)


def _element_lines(elements: Iterable[Element]) -> tuple[str, ...]:
    return tuple(f"{_braced(sorted(labels.items()))} {_number(value)}" for labels, value in elements)


def _braced(labels: Pairs) -> str:
    """As in PromQL, but with the empty values that `Labels` would leave out."""
    name = "".join(value for key, value in labels if key == "__name__")
    inner = ", ".join(f"{k}={_quoted(v)}" for k, v in labels if k != "__name__")
    return f"{name}{{{inner}}}" if inner or not name else name


def _number(value: float) -> str:
    return repr(value).removesuffix(".0")


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
