"""The life of one rule's alerts, in Prometheus' states; pure: what is found and the time come in.

Rule 1: an element that is new is pending; after `for` it fires, with `for: 0s` at once.
Rule 2: a pending alert whose element is gone is gone at once.
Rule 3: a firing alert whose element is gone is resolved, after `keep_firing_for` if that is set.
Rule 4: value and annotations are renewed while the element is there, and only then.
Rule 5: what two rules of one name find with the same labels is one alert: it speaks for the one that found
it first, and is active as long as either finds it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gpuwatch.records import Alert, AlertState, Transition

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gpuwatch.records import Labels, Rule


@dataclass(frozen=True, slots=True)
class Found:
    """One element of a rule's result, as an alert: final labels, value, expanded annotations."""

    labels: Labels
    value: float
    annotations: Mapping[str, str]


def advance(
    rule: Rule, found: Sequence[Found], active: Sequence[Alert], now_ms: int, mark: str = ""
) -> tuple[list[Alert], list[Transition]]:
    """The rule's pending and firing alerts after this evaluation, by labels, and what changed.

    `active` are those that the rule of this mark holds, and others that have the labels of what it found.
    """
    known = {alert.labels: alert for alert in active}
    present = {element.labels for element in found}
    after: list[Alert] = []
    transitions: list[Transition] = []
    for element in found:
        before = known.get(element.labels)
        alert = _present(rule, element, before, now_ms, mark)
        after.append(alert)
        was = before.state if before else None
        if alert.state is not was:
            transitions.append(Transition(alert=alert, was=was, now=alert.state, at_ms=now_ms))
    for alert in active:
        if alert.labels not in present:
            kept, ended = _absent(rule, alert, now_ms, mark)
            after += kept
            transitions += ended
    return sorted(after, key=lambda alert: alert.labels), transitions


def given_up(alert: Alert, mark: str) -> Alert | None:
    """The alert as the other rules hold it; None if there are none."""
    others = tuple(holder for holder in alert.held_by if holder != mark)
    return dataclasses.replace(alert, held_by=others) if others else None


def _present(rule: Rule, element: Found, before: Alert | None, now_ms: int, mark: str) -> Alert:
    alert = _born(rule, element, now_ms, mark) if before is None else _renewed(before, element, mark)
    if alert.state is AlertState.PENDING and now_ms - alert.active_at_ms >= rule.for_ms:
        return dataclasses.replace(alert, state=AlertState.FIRING, fired_at_ms=now_ms)
    return alert


def _born(rule: Rule, element: Found, now_ms: int, mark: str) -> Alert:
    return Alert(
        rule=rule.alert,
        labels=element.labels,
        annotations=element.annotations,
        state=AlertState.PENDING,
        value=element.value,
        active_at_ms=now_ms,
        held_by=(mark,),
    )


def _renewed(alert: Alert, element: Found, mark: str) -> Alert:
    kept = dataclasses.replace(alert, keep_firing_since_ms=None)
    if mark not in kept.held_by:
        return dataclasses.replace(kept, held_by=(*kept.held_by, mark))
    if mark != kept.held_by[0]:
        return kept
    return dataclasses.replace(kept, value=element.value, annotations=element.annotations)


def _absent(rule: Rule, alert: Alert, now_ms: int, mark: str) -> tuple[list[Alert], list[Transition]]:
    """The alert as it stays, or the transition that ends it."""
    if kept := given_up(alert, mark):
        return [kept], []
    if alert.state is AlertState.PENDING:
        return [], [Transition(alert=alert, was=AlertState.PENDING, now=None, at_ms=now_ms)]
    since_ms = now_ms if alert.keep_firing_since_ms is None else alert.keep_firing_since_ms
    if now_ms - since_ms < rule.keep_firing_for_ms:
        return [dataclasses.replace(alert, keep_firing_since_ms=since_ms)], []
    over = dataclasses.replace(
        alert, state=AlertState.RESOLVED, resolved_at_ms=now_ms, keep_firing_since_ms=None
    )
    return [], [Transition(alert=over, was=AlertState.FIRING, now=AlertState.RESOLVED, at_ms=now_ms)]
