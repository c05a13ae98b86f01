"""Walks the daemon's own judge through time over stored samples; writes nothing and tells nobody.

Most expressions depend on stored samples alone: they are evaluated for hours at once, and the judge is handed
what they came to at each instant. Those that read what rules write are evaluated when it is their turn.
"""

from __future__ import annotations

import dataclasses
from array import array
from bisect import bisect_right
from collections import defaultdict
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from typing import TYPE_CHECKING, Final, NamedTuple

from gpuwatch import promql, rules
from gpuwatch.cli.answers import series_of
from gpuwatch.errors import QueryError
from gpuwatch.promql import Matcher, Series, metric_of
from gpuwatch.promql.ast import Edge, Subquery, VectorSelector, walk

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gpuwatch.promql import Expr, Querier
    from gpuwatch.records import Alert, Labels
    from gpuwatch.rules import CompiledGroup, CompiledRule, Verdict

    Points = tuple[array[int], array[float]]

_AHEAD_MS: Final = 2 * 3_600_000
_FORGET_EVERY: Final = 1000  # judgements
_OF_ALERTS: Final = frozenset({"ALERTS", "ALERTS_FOR_STATE"})


def verdicts(querier: Querier, groups: Sequence[CompiledGroup], instants: Sequence[int]) -> Iterator[Verdict]:
    """What the rules say at each instant, beginning without any alert."""
    past = Past(querier, groups)
    judge = rules.Judge([past.foreseen(group, instants) for group in in_order(groups)])
    window_ms = max((group.window_ms for group in groups), default=0)
    alerts: Sequence[Alert] = ()
    for count, now_ms in enumerate(instants):
        verdict = judge.judge(past, alerts, now_ms)
        alerts = verdict.alerts
        yield verdict
        if count % _FORGET_EVERY == 0:
            past.forget(now_ms - window_ms)


def in_order(groups: Sequence[CompiledGroup]) -> list[CompiledGroup]:
    """The groups with those first that record what others read; as they were where they read in a circle."""
    recorded = defaultdict(list)
    for number, group in enumerate(groups):
        for rule in group.rules:
            if rule.is_recording:
                recorded[rule.name].append(number)
    needs = {
        number: sorted({source for name in _read(group) for source in recorded[name]} - {number})
        for number, group in enumerate(groups)
    }
    try:
        return [groups[number] for number in TopologicalSorter(needs).static_order()]
    except CycleError:
        return list(groups)


def _read(group: CompiledGroup) -> set[str]:
    """The names of the metrics that a group's expressions select by name."""
    nodes = (node for rule in group.rules for node, _ in walk(rule.expr))
    return {metric_of(node.matchers) for node in nodes if isinstance(node, VectorSelector)} - {""}


class Past:
    """Samples as rules see them in the past: those stored, and those that the rules write meanwhile.

    What is stored under the names that these rules write is not seen. Both together are a `promql.Querier`.
    """

    def __init__(self, querier: Querier, groups: Sequence[CompiledGroup]) -> None:
        self._querier = querier
        all_rules = [rule for group in groups for rule in group.rules]
        self._recorded = {rule.name for rule in all_rules if rule.is_recording}
        self._alerts = {rule.name for rule in all_rules if not rule.is_recording}
        self._shared = _Shared(querier)
        self._foreseen: dict[str, _Foreseen] = {}
        self._held: dict[tuple[tuple[Matcher, ...], int], _Stretch] = {}
        self._written: dict[str, dict[Labels, Points]] = defaultdict(dict)

    def foreseen(self, group: CompiledGroup, instants: Sequence[int]) -> CompiledGroup:
        """The group with a metric of this querier instead of each expression that can be evaluated ahead."""
        slots = sorted({_slot_ms(group, at_ms) - group.query_offset_ms for at_ms in instants})
        steps = {later - one for one, later in pairwise(slots)}
        if len(steps) > 1:
            return group
        regular = range(slots[0], slots[-1] + 1, *steps)
        return dataclasses.replace(group, rules=tuple(self._stand_in(rule, regular) for rule in group.rules))

    def _stand_in(self, rule: CompiledRule, slots: range) -> CompiledRule:
        if not all(map(self._is_stored, (node for node, _ in walk(rule.expr)))):
            return rule
        metric = f"\0{rule.key}"  # no metric's name
        self._foreseen[metric] = _Foreseen(rule.expr, self._shared, slots)
        matcher = Matcher("__name__", "=", metric)
        return dataclasses.replace(rule, expr=VectorSelector(position=0, matchers=(matcher,)))

    def _is_stored(self, node: Expr) -> bool:
        """Whether it reads nothing that rules write, nor asks when the query begins or ends."""
        if isinstance(node, VectorSelector | Subquery) and isinstance(node.at, Edge):
            return False
        if not isinstance(node, VectorSelector):
            return True
        name = metric_of(node.matchers)
        return bool(name) and name not in _OF_ALERTS and name not in self._recorded

    def select(self, matchers: Sequence[Matcher], after_ms: int, upto_ms: int) -> list[Series]:
        """As of any querier; hours ahead are read at once, since the next question is of a moment later."""
        foreseen = self._foreseen.get(metric_of(matchers))
        if foreseen:
            return foreseen.at(upto_ms)
        key = tuple(matchers), upto_ms - after_ms
        held = self._held.get(key)
        if held is None or not held.after_ms <= after_ms < upto_ms <= held.upto_ms:
            held = self._held[key] = self._read(matchers, after_ms, upto_ms + _AHEAD_MS)
        return [*held.part(after_ms, upto_ms), *self._own(matchers, after_ms, upto_ms)]

    def append(self, _target: str, at_ms: int, labels: Sequence[Labels], values: Sequence[float]) -> None:
        """Take what rules write at an instant."""
        for series, value in zip(labels, values, strict=True):
            stamps, numbers = self._written[series.metric].setdefault(series, (array("q"), array("d")))
            stamps.append(at_ms)
            numbers.append(value)

    def forget(self, before_ms: int) -> None:
        """Drop what was written before an instant."""
        for metric in self._written.values():
            for labels, (stamps, numbers) in list(metric.items()):
                first = bisect_right(stamps, before_ms)
                metric[labels] = stamps[first:], numbers[first:]
                if first == len(stamps):
                    del metric[labels]

    def _read(self, matchers: Sequence[Matcher], after_ms: int, upto_ms: int) -> _Stretch:
        shared: dict[int, list[Series]] = defaultdict(list)
        for series in self._querier.select(matchers, after_ms, upto_ms):
            if not self._is_own(series.labels):
                shared[id(series.at_ms)].append(series)
        return _Stretch(after_ms, upto_ms, tuple(shared.values()))

    def _is_own(self, labels: Labels) -> bool:
        if labels.metric in _OF_ALERTS:
            return labels.get("alertname") in self._alerts
        return labels.metric in self._recorded

    def _own(self, matchers: Sequence[Matcher], after_ms: int, upto_ms: int) -> Iterator[Series]:
        name = metric_of(matchers)
        for metric in (self._written.get(name, {}),) if name else self._written.values():
            for labels, (stamps, numbers) in metric.items():
                first, end = bisect_right(stamps, after_ms), bisect_right(stamps, upto_ms)
                if first < end and all(m.matches(labels.get(m.name)) for m in matchers):
                    yield Series(labels, stamps[first:end], numbers[first:end])


def _slot_ms(group: CompiledGroup, now_ms: int) -> int:
    """When the judge evaluates a group whose slot came before `now_ms`: as long after a second as that is."""
    phase_ms = now_ms % 1000
    return group.slot_ms(now_ms - phase_ms) + phase_ms


class _Foreseen:
    """What an expression comes to: at each of `slots` for hours at once, and at any other instant."""

    def __init__(self, expr: Expr, querier: Querier, slots: range) -> None:
        self._expr = expr
        self._querier = querier
        self._slots = slots
        self._known: dict[int, list[Series]] = {}
        self._upto_ms = slots[0] - 1
        self._one_by_one = False

    def at(self, at_ms: int) -> list[Series]:
        """The elements at an instant, each a series with one sample; QueryError."""
        is_slot = at_ms in self._slots
        if is_slot and at_ms > self._upto_ms:
            self._look_ahead(at_ms)
        if self._one_by_one or not is_slot:
            return series_of(promql.evaluate(self._expr, self._querier, at_ms), at_ms)
        return self._known.get(at_ms, [])

    def _look_ahead(self, at_ms: int) -> None:
        """Where any instant has no value, the error is to be told of that instant alone."""
        self._upto_ms = min(at_ms + _AHEAD_MS, self._slots[-1])
        self._known = defaultdict(list)
        try:
            found = promql.evaluate_range(self._expr, self._querier, at_ms, self._upto_ms, self._slots.step)
        except QueryError:
            self._one_by_one = True
            return
        self._one_by_one = False
        for series in series_of(found, at_ms):
            for then_ms, value in zip(series.at_ms, series.values, strict=True):
                self._known[then_ms].append(Series(series.labels, [then_ms], [value]))


class _Shared:
    """A querier that remembers what it was asked, as long as the next may ask the same."""

    def __init__(self, querier: Querier) -> None:
        self._querier = querier
        self._found: dict[tuple[tuple[Matcher, ...], int, int], Sequence[Series]] = {}

    def select(self, matchers: Sequence[Matcher], after_ms: int, upto_ms: int) -> Sequence[Series]:
        key = tuple(matchers), after_ms, upto_ms
        if key not in self._found:
            self._found = {known: series for known, series in self._found.items() if known[2] > after_ms}
            self._found[key] = self._querier.select(matchers, after_ms, upto_ms)
        return self._found[key]


class _Stretch(NamedTuple):
    """What was read of (after_ms, upto_ms]: series in groups that share their list of instants."""

    after_ms: int
    upto_ms: int
    groups: tuple[list[Series], ...]

    def part(self, after_ms: int, upto_ms: int) -> Iterator[Series]:
        """The series with their samples in (after_ms, upto_ms], if they have any."""
        for group in self.groups:
            stamps = group[0].at_ms
            first, end = bisect_right(stamps, after_ms), bisect_right(stamps, upto_ms)
            if first < end:
                at_ms = stamps[first:end]
                for series in group:
                    yield Series(series.labels, at_ms, series.values[first:end])
