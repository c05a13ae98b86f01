"""Samples as rows: written a tick at a time, read back at start, pruned from the old end.

Runs inside the transactions of `Store`; never opens one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from gpuwatch.records import STALE, Labels, Sample
from gpuwatch.store.codec import labels_json, labels_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sqlalchemy import Connection

_MAX_IDS: Final = 20_000  # far more series than live at once; what churned away is forgotten with all others
_ROWS_AT_ONCE: Final = 2_000


class SeriesIds:
    """Which id a series has. New ids count only once their transaction is committed."""

    def __init__(self) -> None:
        self._ids: dict[Labels, int] = {}

    def missing(self, connection: Connection, samples: Sequence[Sample]) -> dict[Labels, int]:
        """The ids of those series that are not known yet, made where there are none."""
        unknown = {sample.labels for sample in samples if sample.labels not in self._ids}
        return {labels: _id_of(connection, labels) for labels in unknown}

    def rows(self, samples: Sequence[Sample], new: dict[Labels, int]) -> list[tuple[int, int, float]]:
        """The rows of `sample`."""
        ids = {**self._ids, **new} if new else self._ids
        return [(sample.at_ms, ids[sample.labels], sample.value) for sample in samples]

    def learn(self, new: dict[Labels, int]) -> None:
        """Remember committed ids."""
        if len(self._ids) + len(new) > _MAX_IDS:
            self._ids.clear()
        self._ids.update(new)


def _id_of(connection: Connection, labels: Labels) -> int:
    text = labels_json(labels)
    connection.exec_driver_sql(
        "INSERT INTO series (labels, metric) VALUES (?, ?) ON CONFLICT DO NOTHING",
        (text, labels.metric.encode("utf-8", "replace").decode()),
    )
    found = connection.exec_driver_sql("SELECT id FROM series WHERE labels = ?", (text,))
    return int(found.scalar_one())


def write(connection: Connection, rows: list[tuple[int, int, float]]) -> None:
    """Write them. SQLite stores every NaN as NULL, and the only one there is, is the staleness marker."""
    if rows:
        connection.exec_driver_sql("INSERT OR REPLACE INTO sample VALUES (?, ?, ?)", rows)


def read(connection: Connection, after_ms: int, upto_ms: int) -> Iterator[list[Sample]]:
    """What was saved in (after_ms, upto_ms], in time order, some thousands at a time."""
    labels_by_id: dict[int, Labels] = {}
    found = connection.exec_driver_sql(
        "SELECT at_ms, series_id, value FROM sample WHERE at_ms > ? AND at_ms <= ? ORDER BY at_ms, series_id",
        (after_ms, upto_ms),
    )
    for rows in found.partitions(_ROWS_AT_ONCE):
        for series_id in {row[1] for row in rows} - labels_by_id.keys():
            labels_by_id[series_id] = _labels_by(connection, series_id)
        yield [
            Sample(labels_by_id[series_id], at_ms, STALE if value is None else value)
            for at_ms, series_id, value in rows
        ]


def _labels_by(connection: Connection, series_id: int) -> Labels:
    found = connection.exec_driver_sql("SELECT labels FROM series WHERE id = ?", (series_id,))
    return labels_of(found.scalar_one())


def prune(connection: Connection, before_ms: int, at_most: int) -> int:
    """Delete the oldest samples before `before_ms`, about `at_most` (whole instants); says how many."""
    # SQLite has no DELETE with LIMIT as Debian builds it; the key finds the bound at once.
    last = connection.exec_driver_sql(
        "SELECT at_ms FROM sample WHERE at_ms < ? ORDER BY at_ms, series_id LIMIT 1 OFFSET ?",
        (before_ms, at_most - 1),
    ).scalar_one_or_none()
    upto_ms = before_ms - 1 if last is None else last
    return connection.exec_driver_sql("DELETE FROM sample WHERE at_ms <= ?", (upto_ms,)).rowcount
