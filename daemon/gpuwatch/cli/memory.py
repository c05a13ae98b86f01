"""Samples of made-up series in memory, for tests of rules and queries; the daemon has its own store."""

from __future__ import annotations

from bisect import bisect_right
from typing import TYPE_CHECKING

from gpuwatch.promql import Series, metric_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpuwatch.promql import Matcher, Querier
    from gpuwatch.records import Labels


class Memory:
    """A querier over what was added; a series is found by its metric's name first."""

    def __init__(self) -> None:
        self._metrics: dict[str, dict[Labels, Series]] = {}
        self._samples: dict[Labels, tuple[list[int], list[float]]] = {}

    def add(self, labels: Labels, at_ms: int, value: float) -> None:
        """Add a sample; of two of one series and instant the first counts, as in Prometheus."""
        if labels not in self._samples:
            self._samples[labels] = [], []
            self._metrics.setdefault(labels.metric, {})[labels] = Series(labels, *self._samples[labels])
        instants, values = self._samples[labels]
        index = bisect_right(instants, at_ms)
        if index == 0 or instants[index - 1] != at_ms:
            instants.insert(index, at_ms)
            values.insert(index, value)

    def select(self, matchers: Sequence[Matcher], after_ms: int, upto_ms: int) -> list[Series]:
        """The series that all matchers accept and that have a sample in (after_ms, upto_ms]."""
        found = []
        for series in self._named(matchers):
            first, end = (bisect_right(series.at_ms, at) for at in (after_ms, upto_ms))
            if first < end and all(m.matches(series.labels.get(m.name)) for m in matchers):
                found.append(Series(series.labels, series.at_ms[first:end], series.values[first:end]))
        return found

    def _named(self, matchers: Sequence[Matcher]) -> list[Series]:
        name = metric_of(matchers)
        some = [self._metrics.get(name, {})] if name else self._metrics.values()
        return [series for metric in some for series in metric.values()]


class Until:
    """A querier less what comes after an instant, so that a rule cannot see what is still to come."""

    def __init__(self, querier: Querier, upto_ms: int) -> None:
        self._querier = querier
        self._upto_ms = upto_ms

    def select(self, matchers: Sequence[Matcher], after_ms: int, upto_ms: int) -> Sequence[Series]:
        """As the querier's, up to the instant."""
        return self._querier.select(matchers, after_ms, min(upto_ms, self._upto_ms))
