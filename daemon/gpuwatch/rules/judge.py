"""Evaluates each group when its time has come, and carries on what one evaluation leaves to the next.

It asks no clock, keeps no alert and tells nobody: alerts come in and go out, and what is written goes into
the samples that it is handed.

Rule 1: a group is evaluated when a watch begins, then once a slot; one that was missed is not made up for.
Rule 2: a series that a rule wrote and writes no longer is ended, also if the rule itself is gone.
Rule 3: time in which nobody watched, be it a restart or a host that slept, counts for no `for`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from gpuwatch import promql
from gpuwatch.records import STALE, Alert, AlertState, Labels, Transition
from gpuwatch.rules.compiler import alerting
from gpuwatch.rules.evaluation import Evaluation, Terms, evaluate
from gpuwatch.rules.restore import Outage, restored

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from gpuwatch.rules.compiler import CompiledGroup, CompiledRule

Present = dict[tuple[str, Labels], Alert]

JUMP_MS: Final = 60_000
_TICK_MS: Final = 1000
_OF_ALERTS: Final = frozenset({"ALERTS", "ALERTS_FOR_STATE"})
_TARGET: Final = "rules"


class Samples(promql.Querier, Protocol):
    """Where samples are read and written."""

    def append(self, target: str, at_ms: int, labels: Sequence[Labels], values: Sequence[float]) -> object:
        """Take what a target gives at an instant."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """All pending and firing alerts, what changed, and the evaluations made, by the group's key."""

    alerts: tuple[Alert, ...]
    transitions: tuple[Transition, ...]
    evaluations: Mapping[str, Evaluation]

    @property
    def firing(self) -> list[Alert]:
        """The alerts that fire."""
        return [alert for alert in self.alerts if alert.state is AlertState.FIRING]

    @property
    def ended(self) -> list[Alert]:
        """The alerts that are over, some of which may have begun again."""
        return [t.alert for t in self.transitions if t.now in {None, AlertState.RESOLVED}]


class Judge:
    """Judges by the rules of these groups. One thread's."""

    def __init__(
        self,
        groups: Sequence[CompiledGroup],
        *,
        watched_until_ms: int | None = None,
        outage: Outage | None = None,
        terms: Terms | None = None,
    ) -> None:
        """`watched_until_ms` is when the last judgement before this one was made, if that is known."""
        self.missed = 0
        self._groups = tuple(groups)
        self.keys = frozenset(rule.key for group in groups for rule in group.rules)
        self._alerting = alerting(groups)
        self._recorded = {rule.name for group in groups for rule in group.rules if rule.is_recording}
        self._outage = outage or Outage()
        self._terms = terms or Terms()
        self._watched_until_ms = watched_until_ms
        self._watched_since_ms: int | None = None
        self._slots: dict[tuple[str, int], int] = {}
        self._written: dict[str, frozenset[Labels]] = {}
        self._left: set[Labels] = set()
        self._before: Judge | None = None

    def take_over(self, old: Judge) -> None:
        """Go on where another judge stands once this one is asked: until then the other may be at work."""
        self._before = old

    def _catch_up(self) -> None:
        if self._before is not None:
            self._inherit(self._before)
            self._before = None

    def _inherit(self, old: Judge) -> None:
        """Rules and groups that are still there keep their state, others end."""
        old._catch_up()  # it may never have been asked itself
        self.missed = old.missed
        self._watched_until_ms = old._watched_until_ms
        self._watched_since_ms = old._watched_since_ms
        slots = {_slot_key(group) for group in self._groups}
        self._slots = {key: slot_ms for key, slot_ms in old._slots.items() if key in slots}
        self._written = {key: series for key, series in old._written.items() if key in self.keys}
        gone = (series for key, series in old._written.items() if key not in self.keys)
        self._left |= old._left.union(*gone)

    def writes(self, labels: Labels) -> bool:
        """Whether a series is of the kind that these rules write."""
        return labels.metric in _OF_ALERTS or labels.metric in self._recorded

    def end_unless_written(self, series: Iterable[Labels]) -> None:
        """End these once every rule had its turn, if none has written them by then."""
        self._left.update(series)

    def judge(self, samples: Samples, active: Iterable[Alert], now_ms: int) -> Verdict:
        """Evaluate what is due. `active` are all pending and firing alerts so far."""
        self._catch_up()
        present = {alert.identity: alert for alert in active}
        transitions = [*self._resume(present, now_ms), *self._disown(present, now_ms)]
        evaluations: dict[str, Evaluation] = {}
        for group in self._groups:
            at_ms = self._due_at(group, now_ms)
            if at_ms is not None:
                made = evaluations[group.key] = self._evaluate(group, samples, present, at_ms)
                transitions += made.transitions
        self._end_what_is_left(samples, now_ms)
        return Verdict(
            alerts=tuple(present.values()),
            transitions=tuple(_noticed(t, now_ms) for t in transitions),
            evaluations=evaluations,
        )

    def _evaluate(self, group: CompiledGroup, samples: Samples, present: Present, at_ms: int) -> Evaluation:
        made = evaluate(group, samples, present.values(), at_ms, written=self._written, terms=self._terms)
        self._written.update(made.written)
        for t in made.transitions:
            if t.now in {None, AlertState.RESOLVED}:
                present.pop(t.alert.identity, None)
        present.update((alert.identity, alert) for alert in made.alerts)
        if made.samples:
            written_ms = at_ms - group.query_offset_ms
            labels, values = [s.labels for s in made.samples], [s.value for s in made.samples]
            samples.append(f"{_TARGET}:{group.key}", written_ms, labels, values)
        return made

    def _due_at(self, group: CompiledGroup, now_ms: int) -> int | None:
        """The slot's time, if it has come; later than the slot by what each tick is after the full second.

        Else what was read at the full second would be judged a second late. When a watch begins nothing
        waits for its slot, or a daemon that is killed again and again would never judge by some rules.
        """
        phase_ms = now_ms % _TICK_MS
        slot_ms = group.slot_ms(now_ms - phase_ms)
        last_ms = self._slots.get(_slot_key(group))
        self._slots[_slot_key(group)] = slot_ms
        if last_ms is None or now_ms == self._watched_since_ms:
            return now_ms
        self.missed += max(0, slot_ms - last_ms - 1) // max(group.interval_ms, _TICK_MS)
        return slot_ms + phase_ms if slot_ms > last_ms else None

    # -- after an interruption -------------------------------------------------------------------

    def _resume(self, present: Present, now_ms: int) -> list[Transition]:
        """Notice that nobody watched for a while, and let pending alerts wait for longer."""
        until_ms, self._watched_until_ms = self._watched_until_ms, now_ms
        unwatched_ms = None if until_ms is None else max(0, now_ms - until_ms - _TICK_MS)
        goes_on = self._watched_since_ms is not None
        if goes_on and unwatched_ms is not None and unwatched_ms < JUMP_MS:
            return []
        self._watched_since_ms = now_ms
        ended = []
        for alert in list(present.values()):
            rule = next(iter(self._owners(alert)), None)
            kept = alert if rule is None else restored(alert, rule.rule, unwatched_ms, now_ms, self._outage)
            if kept is not None:
                present[alert.identity] = kept
            else:
                ended.append(_ended(present.pop(alert.identity), now_ms))
        return ended

    def _disown(self, present: Present, now_ms: int) -> list[Transition]:
        """End the alerts whose rule is gone."""
        ended = []
        for alert in list(present.values()):
            marks = {rule.mark for rule in self._owners(alert)}
            held_by = tuple(mark for mark in alert.held_by if mark in marks)
            if not held_by:
                ended.append(_ended(present.pop(alert.identity), now_ms))
            elif held_by != alert.held_by:
                present[alert.identity] = dataclasses.replace(alert, held_by=held_by)
        return ended

    def _owners(self, alert: Alert) -> list[CompiledRule]:
        return [rule for rule in self._alerting.get(alert.rule, ()) if rule.owns(alert)]

    def _end_what_is_left(self, samples: Samples, now_ms: int) -> None:
        if not self._left or self.keys - self._written.keys():
            return
        ended = sorted(self._left.difference(*self._written.values()))
        self._left = set()
        if ended:
            samples.append(_TARGET, now_ms, ended, [STALE] * len(ended))


def _slot_key(group: CompiledGroup) -> tuple[str, int]:
    """With another interval a group has other slots, and begins anew."""
    return group.key, group.interval_ms


def _ended(alert: Alert, now_ms: int) -> Transition:
    return Transition(alert=alert, was=alert.state, now=None, at_ms=now_ms)


def _noticed(t: Transition, now_ms: int) -> Transition:
    """The change with the time when it was noticed, which may be after the slot: history is in order.

    An alert that fired and lost its rule is resolved, so that people hear the end of it.
    """
    if t.now is None and t.was is AlertState.FIRING:
        alert = dataclasses.replace(t.alert, state=AlertState.RESOLVED, resolved_at_ms=t.at_ms)
        return Transition(alert=alert, was=t.was, now=AlertState.RESOLVED, at_ms=now_ms)
    return dataclasses.replace(t, at_ms=now_ms)
