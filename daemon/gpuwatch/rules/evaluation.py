"""Evaluates a group's rules at one instant: samples in, alerts and series out; keeps nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from gpuwatch import promql
from gpuwatch.errors import QueryError
from gpuwatch.records import AlertState, Labels, Transition
from gpuwatch.rules.lifecycle import Found, advance, given_up
from gpuwatch.rules.overlay import Overlay
from gpuwatch.rules.templates import Context

if TYPE_CHECKING:
    from gpuwatch.records import Alert, Sample
    from gpuwatch.rules.compiler import CompiledGroup, CompiledRule

Written = Mapping[str, frozenset[Labels]]
Vector = list[tuple[Labels, float]]

SAME_ALERT: Final = "vector contains metrics with the same labelset after applying alert labels"
SAME_SERIES: Final = "vector contains metrics with the same labelset after applying rule labels"


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What every evaluation goes by.

    `limits` is asked anew for each rule, so that its time begins then; its templates share that time.
    """

    limits: Callable[[], promql.Limits] = promql.Limits
    external_labels: Mapping[str, str] = field(default_factory=dict)
    external_url: str = ""


@dataclass(frozen=True, slots=True)
class RuleFailure:
    """A rule that could not be evaluated this time. `bug` is set if nobody foresaw why."""

    rule: str
    key: str
    what: str
    bug: Exception | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What one evaluation of a group says.

    `alerts`: all of the group's pending and firing alerts after it, changed or not. `samples`: what its
    rules record, `ALERTS` and `ALERTS_FOR_STATE`, with staleness markers for series that ended. `written`:
    the series that each rule has now, by its key, for the next evaluation; a rule that failed is not named.
    `remarks`: Prometheus' warnings and infos, by the rule's key.
    """

    alerts: tuple[Alert, ...] = ()
    transitions: tuple[Transition, ...] = ()
    samples: tuple[Sample, ...] = ()
    failures: tuple[RuleFailure, ...] = ()
    written: Written = field(default_factory=dict)
    remarks: Mapping[str, str] = field(default_factory=dict)


_TERMS: Final = Terms()
_NONE: Final[Written] = {}


def evaluate(
    group: CompiledGroup,
    querier: promql.Querier,
    active: Iterable[Alert],
    now_ms: int,
    *,
    written: Written = _NONE,
    terms: Terms = _TERMS,
) -> Evaluation:
    """Evaluate the rules in order at `now_ms`; each sees what those before it have written.

    `active` are the pending and firing alerts of before, those of other groups too; `written` is what the
    evaluations before have said. A rule that fails leaves its alerts and its series as they were.
    """
    evaluator = _Evaluator(group, querier, active, now_ms, written, terms)
    for rule in group.rules:
        evaluator.evaluate(rule)
    return evaluator.evaluation()


class _Evaluator:
    """One evaluation of one group."""

    def __init__(
        self,
        group: CompiledGroup,
        querier: promql.Querier,
        active: Iterable[Alert],
        now_ms: int,
        written: Written,
        terms: Terms,
    ) -> None:
        self._group = group
        self._now_ms = now_ms
        self._query_ms = now_ms - group.query_offset_ms
        self._terms = terms
        self._before = written
        self._overlay = Overlay(querier, self._query_ms)
        self._context = Context(
            query=self._queried,
            now_ms=now_ms,
            external_labels=terms.external_labels,
            external_url=terms.external_url,
        )
        self._limits = promql.Limits()  # of the rule whose turn it is
        self._known: dict[str, dict[Labels, Alert]] = {}
        for alert in active:
            if alert.state is not AlertState.RESOLVED:
                self._known.setdefault(alert.rule, {})[alert.labels] = alert
        self._alerts: dict[tuple[str, Labels], Alert] = {}
        self._transitions: list[Transition] = []
        self._failures: list[RuleFailure] = []
        self._written: dict[str, frozenset[Labels]] = {}
        self._remarks: dict[str, str] = {}

    def evaluation(self) -> Evaluation:
        return Evaluation(
            alerts=tuple(self._alerts.values()),
            transitions=tuple(self._transitions),
            samples=self._overlay.samples(),
            failures=tuple(self._failures),
            written=self._written,
            remarks=self._remarks,
        )

    def evaluate(self, rule: CompiledRule) -> None:
        had = self._had(rule)
        self._limits = self._terms.limits()
        try:
            elements = self._elements(rule)
            series = self._recorded(rule, elements) if rule.is_recording else self._judged(rule, elements)
        except QueryError as error:
            self._fail(rule, error.what)
        except Exception as error:  # noqa: BLE001 (a bug that one rule meets must not blind the others)
            self._fail(rule, repr(error), error)
        else:
            self._overlay.write(series)
            self._overlay.end(sorted(had - series.keys()))
            self._written[rule.key] = frozenset(series)
        for alert in self._held(rule):
            self._alerts[alert.identity] = alert

    def _fail(self, rule: CompiledRule, what: str, bug: Exception | None = None) -> None:
        self._failures.append(RuleFailure(rule.name, rule.key, f"{rule.rule.place}: {what}", bug))

    def _had(self, rule: CompiledRule) -> frozenset[Labels]:
        """The series that a rule had before; after a restart those that its alerts make."""
        if rule.key in self._before or rule.is_recording:
            return self._before.get(rule.key, frozenset())
        return frozenset(labels for alert in self._held(rule) for labels in _series(alert))

    def _elements(self, rule: CompiledRule) -> Vector:
        answer = promql.evaluate(rule.expr, self._overlay, self._query_ms, self._limits)
        remarks = [remark.located(rule.rule.expr) for remark in (*answer.warnings, *answer.infos)]
        if remarks:
            self._remarks[rule.key] = f"{rule.rule.place}: {'; '.join(remarks)}"
        return _vector(answer)

    # ---- recording rules

    def _recorded(self, rule: CompiledRule, elements: Vector) -> dict[Labels, float]:
        given = {**rule.fixed_labels, "__name__": rule.name}
        series = {labels.merged(given): value for labels, value in elements}
        if len(series) < len(elements):
            raise QueryError(SAME_SERIES)
        if 0 < self._group.limit < len(series):
            raise QueryError(f"exceeded limit of {self._group.limit} with {len(series)} series")
        return series

    # ---- alerting rules

    def _judged(self, rule: CompiledRule, elements: Vector) -> dict[Labels, float]:
        found = [self._found(rule, labels, value) for labels, value in elements]
        present = {element.labels for element in found}
        if len(present) < len(found):
            raise QueryError(SAME_ALERT)
        known = self._known.setdefault(rule.name, {})
        before = [alert for alert in known.values() if rule.owns(alert) or alert.labels in present]
        after, transitions = advance(rule.rule, found, before, self._now_ms, rule.mark)
        count = sum(rule.mark in alert.held_by for alert in after)
        if 0 < self._group.limit < count:
            self._end_all(rule)
            raise QueryError(f"exceeded limit of {self._group.limit} with {count} alerts")
        self._drop(before)
        known.update((alert.labels, alert) for alert in after)
        self._alerts.update((alert.identity, alert) for alert in after)
        self._transitions += transitions
        return {labels: value for alert in after for labels, value in _series(alert).items()}

    def _held(self, rule: CompiledRule) -> list[Alert]:
        if rule.is_recording:
            return []
        return [alert for alert in self._known.get(rule.name, {}).values() if rule.owns(alert)]

    def _end_all(self, rule: CompiledRule) -> None:
        """A rule that gives too many alerts has none; what another rule finds too is that one's alone."""
        held = self._held(rule)
        self._drop(held)
        for alert in held:
            if kept := given_up(alert, rule.mark):
                self._known[alert.rule][alert.labels] = self._alerts[alert.identity] = kept
            else:
                end = Transition(alert=alert, was=alert.state, now=None, at_ms=self._now_ms)
                self._transitions.append(end)

    def _drop(self, alerts: Iterable[Alert]) -> None:
        for alert in alerts:
            self._known[alert.rule].pop(alert.labels, None)
            self._alerts.pop(alert.identity, None)

    def _found(self, rule: CompiledRule, labels: Labels, value: float) -> Found:
        """QueryError if the rule's time is up, so that thousands of templates do not hold up the tick."""
        added, annotations = (
            {name: text.expand(labels, value, self._context) for name, text in texts.items()}
            for texts in (rule.labels, rule.annotations)
        )
        if self._limits.is_over():
            raise QueryError("its templates take too long; name fewer series, or shorten them")
        return Found(
            labels=labels.without("__name__").merged({**added, "alertname": rule.name}),
            value=value,
            annotations=annotations,
        )

    def _queried(self, text: str) -> Vector:
        """What a template asks; unlike the rule's own query it is not moved by the group's offset."""
        expr = promql.parse(text)
        return _vector(promql.evaluate(expr, self._overlay, self._now_ms, self._limits))


def _vector(answer: promql.Answer) -> Vector:
    """An answer's elements; a scalar is one without labels."""
    value = answer.value
    if isinstance(value, float):
        return [(Labels(), value)]
    if isinstance(value, str) or (value and isinstance(value[0], promql.Series)):
        raise QueryError("rule result is not a vector or scalar")
    return value  # type: ignore[return-value]  # told from a list of series by its first element


def _series(alert: Alert) -> dict[Labels, float]:
    """The series that tell of an alert, and their values."""
    return {
        alert.labels.merged({"__name__": "ALERTS", "alertstate": alert.state.value}): 1.0,
        alert.labels.merged({"__name__": "ALERTS_FOR_STATE"}): float(alert.active_at_ms // 1000),
    }
