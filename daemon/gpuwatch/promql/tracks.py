"""What a query's selectors and subqueries read, each once over all of its instants; computes nothing."""

from __future__ import annotations

import math
from array import array
from itertools import compress
from typing import TYPE_CHECKING, NamedTuple

from gpuwatch.promql.answer import Limits, Remarks, refuse
from gpuwatch.promql.ast import LOOKBACK_MS, Edge, MatrixSelector, Subquery, VectorSelector
from gpuwatch.records import is_stale

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from gpuwatch.promql.selection import Querier
    from gpuwatch.promql.values import Vector
    from gpuwatch.records import Labels


class Track(NamedTuple):
    """One series over a query's instants; at least one sample, in time order."""

    labels: Labels
    at_ms: Sequence[int]
    values: Sequence[float]
    drop_name: bool = False


class Query:
    """What an expression and its subqueries have in common: where samples are, and what it takes and took."""

    def __init__(self, querier: Querier, limits: Limits, start_ms: int, end_ms: int) -> None:
        """`start_ms` and `end_ms` are the query's own first and last instant, which `@` may name."""
        self.querier = querier
        self.limits = limits
        self.remarks = Remarks()
        self.held = 0
        self._edges = {Edge.START: start_ms, Edge.END: end_ms}
        self.is_range = start_ms != end_ms

    def instant(self, timed: VectorSelector | Subquery, now_ms: int) -> int:
        """The instant that a selector or subquery is asked for at `now_ms`."""
        at = timed.at
        if at is None:
            return now_ms - timed.offset_ms
        return (self._edges[at] if isinstance(at, Edge) else at) - timed.offset_ms

    def hold(self, samples: int) -> None:
        """Count samples that stay in memory; QueryError if they are too many, or it takes too long."""
        self.held += samples
        if self.held > self.limits.samples:
            raise refuse(f"more than {self.limits.samples} samples")
        self.check_time()

    def check_time(self) -> None:
        """QueryError if the query takes too long."""
        if self.limits.is_over():
            raise refuse("too long")


class Tracks:
    """The tracks of each selector and subquery for the instants from `first_ms` to `last_ms`."""

    def __init__(
        self,
        query: Query,
        first_ms: int,
        last_ms: int,
        inner: Callable[[Subquery, range], Iterator[tuple[int, Vector]]],
    ) -> None:
        """`inner` evaluates a subquery's expression at each instant of a range."""
        self._query = query
        self._first_ms = first_ms
        self._last_ms = last_ms
        self._inner = inner
        self._known: dict[int, list[Track]] = {}

    def of(self, node: VectorSelector | MatrixSelector | Subquery) -> list[Track]:
        """Read at the first call; samples of a range vector hold no staleness marker."""
        tracks = self._known.get(id(node))
        if tracks is None:
            tracks = self._known[id(node)] = self._read(node)
        return tracks

    def _read(self, node: VectorSelector | MatrixSelector | Subquery) -> list[Track]:
        match node:
            case VectorSelector():
                return self._selected(node, LOOKBACK_MS)
            case MatrixSelector(selector=selector, range_ms=range_ms):
                found = (_unmarked(track) for track in self._selected(selector, range_ms))
                return [track for track in found if track.values]
            case Subquery():
                return self._computed(node)

    def _span(self, timed: VectorSelector | Subquery) -> tuple[int, int]:
        return self._query.instant(timed, self._first_ms), self._query.instant(timed, self._last_ms)

    def _selected(self, selector: VectorSelector, back_ms: int) -> list[Track]:
        first_ms, last_ms = self._span(selector)
        found = self._query.querier.select(selector.matchers, first_ms - back_ms, last_ms)
        tracks = [Track(series.labels, series.at_ms, series.values) for series in found if series.values]
        self._query.hold(sum(len(track.values) for track in tracks))
        return tracks

    def _computed(self, node: Subquery) -> list[Track]:
        first_ms, last_ms = self._span(node)
        step_ms = node.step_ms or self._query.limits.subquery_step_ms
        begin_ms = ((first_ms - node.range_ms) // step_ms + 1) * step_ms  # the window is open to the left
        instants = range(begin_ms, last_ms + 1, step_ms)
        if not instants:
            return []
        self._query.hold((instants[-1] - begin_ms) // step_ms + 1)
        series: dict[Labels, tuple[array[int], array[float]]] = {}
        unnamed: set[Labels] = set()
        for at_ms, vector in self._inner(node, instants):
            self._query.hold(len(vector))
            for labels, value, drop_name in vector:
                stamps, values = series.setdefault(labels, (array("q"), array("d")))
                stamps.append(at_ms)
                values.append(value)
                if drop_name:
                    unnamed.add(labels)
        return [Track(labels, *points, labels in unnamed) for labels, points in series.items()]


def _unmarked(track: Track) -> Track:
    """The track without staleness markers; a finite sum tells in one pass in C that there are none."""
    if math.isfinite(sum(track.values)):
        return track
    kept = [not is_stale(value) for value in track.values]
    return track._replace(at_ms=list(compress(track.at_ms, kept)), values=list(compress(track.values, kept)))
