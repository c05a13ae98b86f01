"""Evaluates a group's rules at one instant: samples in, alerts out; keeps nothing and reads no clock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpuwatch import promql
from gpuwatch.errors import QueryError
from gpuwatch.records import STALE, AlertState, Labels, Sample
from gpuwatch.rules.lifecycle import Found, advance

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gpuwatch.records import Alert, Transition
    from gpuwatch.rules.compiler import CompiledGroup, CompiledRule


@dataclass(frozen=True, slots=True)
class RuleFailure:
    """A rule that could not be evaluated this time; its alerts stay as they were."""

    rule: str
    what: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What one evaluation of a group says.

    `alerts`: all of the group's pending and firing alerts after it, changed or not. `samples`: the
    series `ALERTS` and `ALERTS_FOR_STATE`, with staleness markers for those that ended.
    """

    alerts: tuple[Alert, ...] = ()
    transitions: tuple[Transition, ...] = ()
    samples: tuple[Sample, ...] = ()
    failures: tuple[RuleFailure, ...] = ()


def evaluate(
    group: CompiledGroup, querier: promql.Querier, active: Sequence[Alert], now_ms: int
) -> Evaluation:
    """Evaluate the rules in order at `now_ms`.

    `active` are the pending and firing alerts of before; those of other groups are passed over.
    """
    alerts: list[Alert] = []
    transitions: list[Transition] = []
    samples: list[Sample] = []
    failures: list[RuleFailure] = []
    for rule in group.rules:
        before = [alert for alert in active if _is_active(alert) and rule.owns(alert)]
        try:
            found = _found(rule, promql.evaluate(rule.expr, querier, now_ms).value)
        except QueryError as error:
            failures.append(RuleFailure(rule.name, f"{rule.rule.place}: {error.what}"))
            alerts += before
            continue
        after, changed = advance(rule.rule, found, before, now_ms)
        alerts += after
        transitions += changed
        samples += _samples(before, after, now_ms)
    return Evaluation(
        alerts=tuple(alerts),
        transitions=tuple(transitions),
        samples=tuple(samples),
        failures=tuple(failures),
    )


def orphans(groups: Iterable[CompiledGroup], active: Iterable[Alert]) -> list[Alert]:
    """The alerts whose rule is no longer in any group."""
    rules = [rule for group in groups for rule in group.rules]
    return [alert for alert in active if not any(rule.owns(alert) for rule in rules)]


def _is_active(alert: Alert) -> bool:
    return alert.state is not AlertState.RESOLVED


def _found(rule: CompiledRule, result: promql.AnswerValue) -> list[Found]:
    """The result's elements as alerts; QueryError if two of them would be one alert."""
    elements = result if isinstance(result, list) else [(Labels(), result)]
    found = [_alerted(rule, labels, value) for labels, value in elements]
    if len({element.labels for element in found}) < len(found):
        what = "vector contains metrics with the same labelset after applying alert labels"
        raise QueryError(what)
    return found


def _alerted(rule: CompiledRule, labels: Labels, value: float) -> Found:
    added = {name: text.expand(labels, value) for name, text in rule.labels.items()}
    return Found(
        labels=labels.without("__name__").merged({**added, "alertname": rule.name}),
        value=value,
        annotations={name: text.expand(labels, value) for name, text in rule.annotations.items()},
    )


def _samples(before: Iterable[Alert], after: Iterable[Alert], now_ms: int) -> list[Sample]:
    """The series that the alerts of now make, and an end for those that the alerts of before made."""
    now = {labels: value for alert in after for labels, value in _series(alert)}
    then = {labels for alert in before for labels, _ in _series(alert)}
    ended = sorted(then - now.keys())
    return [
        *(Sample(labels, now_ms, value) for labels, value in now.items()),
        *(Sample(labels, now_ms, STALE) for labels in ended),
    ]


def _series(alert: Alert) -> tuple[tuple[Labels, float], tuple[Labels, float]]:
    state = {"__name__": "ALERTS", "alertstate": alert.state.value}
    return (
        (alert.labels.merged(state), 1.0),
        (alert.labels.merged({"__name__": "ALERTS_FOR_STATE"}), alert.active_at_ms / 1000),
    )
