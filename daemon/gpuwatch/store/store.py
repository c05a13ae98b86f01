"""The daemon's memory: recent samples at hand, and all that happened as rows; never decides anything."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final

from gpuwatch.store import database, migrations, samples, writing
from gpuwatch.store.recent import Recent
from gpuwatch.store.rows import Rows

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from sqlalchemy import Connection

    from gpuwatch.promql import Matcher, Series
    from gpuwatch.records import Labels, Sample

_MAX_QUEUED: Final = (
    60_000  # samples kept while the disk refuses them: two minutes at 500 a second, about 6 MB
)
_PRUNE_CHUNK: Final = 10_000
_PRUNE_CHUNKS: Final = 50
_HISTORY_MS: Final = 30 * 24 * 3600 * 1000  # what happened is small, and asked for long after its samples


class Store(Rows):
    """The one writer. Sources may append from several threads; everything else is one thread's."""

    def __init__(self, path: Path | None, *, window_ms: int = 600_000, busy_ms: int = 2_000) -> None:
        """Open and migrate; the folder must exist. `None`: in memory.

        Args:
            path: of the database; `<path>.lock` beside it says that it is in use.
            window_ms: how much of every series stays in memory.
            busy_ms: how long SQLite waits for another writer.

        Raises:
            StoreError: of kind `newer`, `corrupt`, `locked` (another gpuwatch), or `other`.

        """
        opened = database.own(path, busy_ms)
        try:
            migrations.migrate(opened)
        except BaseException:
            opened.close()
            raise
        super().__init__(opened)
        self.dropped_samples = 0
        self._ids = samples.SeriesIds()
        self._recent = Recent(window_ms)
        self._window_ms = window_ms
        self._lock = threading.Lock()
        self._queued: list[Sample] = []

    def append(self, samples: Sequence[Sample]) -> None:
        """Show them to `select` at once and queue them for the next save."""
        taken = self._recent.append(samples)
        with self._lock:
            self._queued += taken
            self._drop_oldest()

    def select(self, matchers: Sequence[Matcher], after_ms: int, upto_ms: int) -> list[Series]:
        """The samples in (after_ms, upto_ms] of all series that match, from memory; a `promql.Querier`."""
        return self._recent.select(matchers, after_ms, upto_ms)

    def last(self, metric: str, at_ms: int, lookback_ms: int = 300_000) -> dict[Labels, float]:
        """The newest value of each series of `metric` that has not ended, from memory."""
        return self._recent.last(metric, at_ms, lookback_ms)

    def silent_since(self, at_ms: int) -> list[Labels]:
        """The series that have not ended, and have no sample at `at_ms` or later, from memory."""
        return self._recent.silent_since(at_ms)

    def reload(self, now_ms: int) -> None:
        """Fill the memory with what was saved in (now_ms - window_ms, now_ms]; before any append."""
        with self._database.reading("read recent samples") as connection:
            for some in samples.read(connection, now_ms - self._window_ms, now_ms):
                self._recent.append(some)

    def save(self, changes: writing.Changes, tick_ms: int | None) -> None:
        """Save changes and queued samples in one transaction; `tick_ms` is None for what is no tick.

        Raises:
            StoreError: nothing was saved; the samples stay queued, the changes are the caller's to repeat.

        """
        taken = self._take_queued()
        try:
            with self._database.writing("save a tick") as connection:
                new_ids = self._write_samples(connection, taken)
                writing.write_changes(connection, changes, tick_ms)
        except BaseException:
            self._put_back(taken)
            raise
        self._ids.learn(new_ids)

    def prune(self, now_ms: int, keep_ms: int) -> int:
        """Delete samples older than `keep_ms`, and history older than that and 30 days; says how many rows.

        At most 500 000 samples a call, in short transactions: asked again, it goes on.
        """
        with self._database.writing("prune history") as connection:
            deleted = writing.prune_history(connection, now_ms - max(keep_ms, _HISTORY_MS))
        for _ in range(_PRUNE_CHUNKS):
            with self._database.writing("prune samples") as connection:
                chunk = samples.prune(connection, now_ms - keep_ms, _PRUNE_CHUNK)
            deleted += chunk
            if chunk < _PRUNE_CHUNK:
                break
        return deleted

    def _write_samples(self, connection: Connection, taken: Sequence[Sample]) -> dict[Labels, int]:
        new_ids = self._ids.missing(connection, taken)
        samples.write(connection, self._ids.rows(taken, new_ids))
        return new_ids

    def _take_queued(self) -> list[Sample]:
        with self._lock:
            taken, self._queued = self._queued, []
        return taken

    def _put_back(self, taken: list[Sample]) -> None:
        with self._lock:
            self._queued = taken + self._queued
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        excess = len(self._queued) - _MAX_QUEUED
        if excess > 0:
            del self._queued[:excess]
            self.dropped_samples += excess
