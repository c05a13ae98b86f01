"""Shows a group's rules what those before them have just written; stores nothing.

Rule 1: of two values for one series the first counts, as in Prometheus. Rule 2: a value counts more than
an end, because one rule may go on with a series that another gives up.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuwatch.promql import Series, metric_of
from gpuwatch.records import STALE, Sample, is_stale

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from gpuwatch.promql import Matcher, Querier
    from gpuwatch.records import Labels


class Overlay:
    """A querier, and over it what is written at one instant."""

    def __init__(self, querier: Querier, at_ms: int) -> None:
        """Nothing is written yet; `at_ms` is the instant of all that will be."""
        self._querier = querier
        self._at_ms = at_ms
        self._metrics: dict[str, dict[Labels, float]] = {}

    def write(self, series: Mapping[Labels, float]) -> None:
        """Give these series a value."""
        for labels, value in series.items():
            metric = self._metrics.setdefault(labels.metric, {})
            if is_stale(metric.get(labels, STALE)):
                metric[labels] = value

    def end(self, series: Iterable[Labels]) -> None:
        """End those of these series that have no value."""
        for labels in series:
            self._metrics.setdefault(labels.metric, {}).setdefault(labels, STALE)

    def samples(self) -> tuple[Sample, ...]:
        """All that was written."""
        return tuple(
            Sample(labels, self._at_ms, value)
            for metric in self._metrics.values()
            for labels, value in metric.items()
        )

    def select(self, matchers: Sequence[Matcher], after_ms: int, upto_ms: int) -> Sequence[Series]:
        """As the querier's, with what was written if the window holds its instant; a `promql.Querier`."""
        found = self._querier.select(matchers, after_ms, upto_ms)
        if not after_ms < self._at_ms <= upto_ms:
            return found
        written = dict(self._matching(matchers))
        if not written:
            return found
        known = [self._with(series, written.pop(series.labels, None)) for series in found]
        return known + [Series(labels, [self._at_ms], [value]) for labels, value in written.items()]

    def _matching(self, matchers: Sequence[Matcher]) -> Iterator[tuple[Labels, float]]:
        name = metric_of(matchers)
        metrics = [self._metrics.get(name, {})] if name else self._metrics.values()
        for metric in metrics:
            for labels, value in metric.items():
                if all(m.matches(labels.get(m.name)) for m in matchers):
                    yield labels, value

    def _with(self, series: Series, value: float | None) -> Series:
        """The series with this value at the instant, in the place of one that it has there."""
        if value is None:
            return series
        if not series.at_ms or series.at_ms[-1] < self._at_ms:
            return Series(series.labels, [*series.at_ms, self._at_ms], [*series.values, value])
        points = dict(zip(series.at_ms, series.values, strict=True)) | {self._at_ms: value}
        at_ms = sorted(points)
        return Series(series.labels, at_ms, [points[at] for at in at_ms])
