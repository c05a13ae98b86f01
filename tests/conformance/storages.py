"""Where the samples of a script lie while it is asked: plain lists, the store's memory or its files."""

import tempfile
from bisect import bisect_right
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path

from gpuwatch.config import StoreSettings
from gpuwatch.config.size import Size
from gpuwatch.frames import sealing
from gpuwatch.frames.rowtext import HOUR_MS
from gpuwatch.promql import Series
from gpuwatch.store import METRICS_DB, Changes, Disk, Store, open_history
from gpuwatch.store.metrics import Metrics

EVER_MS = 1 << 53
SCRAPES_AT_ONCE = 1_000


class Lists:
    """A querier over {labels: {instant in ms: value}}."""

    def __init__(self, samples):
        self._by_metric = {}
        for labels, points in samples.items():
            at_ms = sorted(points)
            series = Series(labels, at_ms, [points[at] for at in at_ms])
            self._by_metric.setdefault(labels.metric, []).append(series)

    def select(self, matchers, after_ms, upto_ms):
        found = []
        for series in self._candidates(matchers):
            first, end = bisect_right(series.at_ms, after_ms), bisect_right(series.at_ms, upto_ms)
            if first < end and all(m.matches(series.labels.get(m.name)) for m in matchers):
                found.append(Series(series.labels, series.at_ms[first:end], series.values[first:end]))
        return found

    def _candidates(self, matchers):
        metric = next((m.value for m in matchers if m.name == "__name__" and m.op == "="), None)
        if metric is None:
            return chain.from_iterable(self._by_metric.values())
        return self._by_metric.get(metric, ())


@contextmanager
def memory(samples):
    """Plain lists."""
    yield Lists(samples)


@contextmanager
def recent(samples):
    """What the daemon asks: the store's memory, its older blocks packed."""
    store = Store(EVER_MS)
    try:
        for at_ms, labels, values in scrapes(samples):
            store.append("script", at_ms, labels, values)
        yield store
    finally:
        store.close()


@contextmanager
def sqlite(samples):
    """What the commands ask: metrics.db, its full hours sealed into frames, the last one rows."""
    with tempfile.TemporaryDirectory(prefix="gpuwatch-scripts-") as name:
        folder = Path(name)
        write(folder, list(scrapes(samples)))
        with open_history(folder) as history:
            yield history
        assert history.damaged == []


def write(folder, taken):
    disk = Disk(folder, StoreSettings(min_free=Size(0)), "script", 0)
    store = Store(1, disk)
    try:
        for count, (at_ms, labels, values) in enumerate(taken, 1):
            store.append("script", at_ms, labels, values)
            if count % SCRAPES_AT_ONCE == 0 or count == len(taken):
                store.save(Changes(), at_ms)
        if taken:
            seal(store, disk, taken[-1][0])
        assert not any(store.faults().values()), store.faults()
        assert store.dropped_scrapes == 0
    finally:
        store.close()


def seal(store, disk, now_ms):
    """As `Store.seal`, less the process of its own that takes a third of a second an hour."""
    before_ms = now_ms // HOUR_MS * HOUR_MS
    while frames := list(sealing.seal(disk.folder / METRICS_DB, before_ms, now_ms)):
        for sealed in frames:
            disk.with_metrics(partial(Metrics.take_in, sealed=sealed), now_ms)
    store.seal(now_ms)  # nothing is left to seal: it deletes the rows that are in frames


def scrapes(samples):
    """All series of each instant, as (at_ms, labels, values) in order of time."""
    instants = {}
    for labels, points in samples.items():
        for at_ms, value in points.items():
            instants.setdefault(at_ms, ([], []))
            instants[at_ms][0].append(labels)
            instants[at_ms][1].append(value)
    for at_ms in sorted(instants):
        yield at_ms, *instants[at_ms]


STORAGES = {"memory": memory, "recent": recent, "sqlite": sqlite}
