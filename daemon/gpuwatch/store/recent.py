"""The last minutes of every series, in memory; never touches the disk and never reads the clock."""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_right
from typing import TYPE_CHECKING, Final

from gpuwatch.promql import Series
from gpuwatch.records import is_stale

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from gpuwatch.promql import Matcher
    from gpuwatch.records import Labels, Sample

_SWEEPS_PER_WINDOW: Final = 10
_TRIM_AT_LEAST: Final = 60  # shifting an array for every sample would cost more than the bytes it frees


class _Track:
    """The samples of one series: 16 bytes each."""

    __slots__ = ("at_ms", "labels", "values")

    def __init__(self, labels: Labels) -> None:
        self.labels = labels
        self.at_ms = array("q")
        self.values = array("d")

    def append(self, sample: Sample) -> bool:
        """Whether it was taken: a second value of one instant replaces the first, an older is ignored."""
        if not self.at_ms or sample.at_ms > self.at_ms[-1]:
            self.at_ms.append(sample.at_ms)
            self.values.append(sample.value)
            return True
        if sample.at_ms == self.at_ms[-1]:
            self.values[-1] = sample.value
            return True
        return False

    def forget(self, upto_ms: int) -> None:
        """Drop what is not newer, once it is worth the move or all of it."""
        gone = bisect_right(self.at_ms, upto_ms)
        if gone >= _TRIM_AT_LEAST or gone == len(self.at_ms):
            del self.at_ms[:gone]
            del self.values[:gone]

    def between(self, after_ms: int, upto_ms: int) -> Series | None:
        """A copy of (after_ms, upto_ms]; None if it is empty."""
        first = bisect_right(self.at_ms, after_ms)
        end = bisect_right(self.at_ms, upto_ms, lo=first)
        if first == end:
            return None
        return Series(self.labels, self.at_ms[first:end], self.values[first:end])

    def last(self, after_ms: int, upto_ms: int) -> float | None:
        """The newest value in (after_ms, upto_ms]; None if there is none or the series has ended."""
        end = bisect_right(self.at_ms, upto_ms)
        if not end or self.at_ms[end - 1] <= after_ms or is_stale(self.values[end - 1]):
            return None
        return self.values[end - 1]


class Recent:
    """The samples of the last `window_ms`, found by metric name. Several threads may append and read."""

    def __init__(self, window_ms: int) -> None:
        self._window_ms = window_ms
        self._lock = threading.Lock()
        self._tracks: dict[Labels, _Track] = {}
        self._by_metric: dict[str, dict[Labels, _Track]] = {}
        self._swept_ms = 0

    def __len__(self) -> int:
        """How many series are held."""
        return len(self._tracks)

    def append(self, samples: Iterable[Sample]) -> list[Sample]:
        """The samples taken; one that is older than the last of its series is not."""
        with self._lock:
            taken = [sample for sample in samples if self._track(sample.labels).append(sample)]
            if taken:
                self._sweep_if_due(taken[-1].at_ms)
        return taken

    def select(self, matchers: Sequence[Matcher], after_ms: int, upto_ms: int) -> list[Series]:
        """Every series that all matchers match, with its samples in (after_ms, upto_ms], if it has any."""
        with self._lock:
            found = (
                track.between(after_ms, upto_ms)
                for track in self._candidates(matchers)
                if all(m.matches(track.labels.get(m.name)) for m in matchers)
            )
            return [series for series in found if series is not None]

    def silent_since(self, at_ms: int) -> list[Labels]:
        """The series that have not ended, and have no sample at `at_ms` or later."""
        with self._lock:
            return [
                labels
                for labels, track in self._tracks.items()
                if track.at_ms and track.at_ms[-1] < at_ms and not is_stale(track.values[-1])
            ]

    def last(self, metric: str, at_ms: int, lookback_ms: int) -> dict[Labels, float]:
        """The newest value in (at_ms - lookback_ms, at_ms] of each series of `metric` that has not ended."""
        with self._lock:
            lasts = {
                labels: track.last(at_ms - lookback_ms, at_ms)
                for labels, track in self._by_metric.get(metric, {}).items()
            }
        return {labels: value for labels, value in lasts.items() if value is not None}

    def _track(self, labels: Labels) -> _Track:
        track = self._tracks.get(labels)
        if track is None:
            track = self._tracks[labels] = _Track(labels)
            self._by_metric.setdefault(labels.metric, {})[labels] = track
        return track

    def _candidates(self, matchers: Iterable[Matcher]) -> Collection[_Track]:
        for matcher in matchers:
            if matcher.name == "__name__" and matcher.op == "=":
                return self._by_metric.get(matcher.value, {}).values()
        return self._tracks.values()

    def _sweep_if_due(self, now_ms: int) -> None:
        # Either way: a clock set back must not stop the forgetting until it has caught up.
        if abs(now_ms - self._swept_ms) >= self._window_ms // _SWEEPS_PER_WINDOW:
            self._swept_ms = now_ms
            self._forget(now_ms - self._window_ms)

    def _forget(self, upto_ms: int) -> None:
        for track in self._tracks.values():
            track.forget(upto_ms)
        for labels in [labels for labels, track in self._tracks.items() if not track.at_ms]:
            del self._tracks[labels]
            metric = self._by_metric[labels.metric]
            del metric[labels]
            if not metric:
                del self._by_metric[labels.metric]
