"""Finds rows of metrics.db by time without an index: within a run of the daemon time only goes forward."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy import Connection

_LATE_MS: Final = 60_000  # a slow source's scrape stands behind those of a later instant


def row_ids(connection: Connection, after_ms: int, upto_ms: int) -> Iterator[tuple[int, int]]:
    """The ids (first, end) between which the rows of a time are, for each run of the daemon."""
    runs = connection.exec_driver_sql("SELECT first_id FROM run ORDER BY first_id").scalars().all()
    newest = connection.exec_driver_sql("SELECT coalesce(max(id), 0) FROM hot").scalar_one()
    for first, end in itertools.pairwise((*runs, newest + 1)):
        yield (
            _seek(connection, first, end, after_ms - _LATE_MS),
            _seek(connection, first, end, upto_ms + _LATE_MS),
        )


def _seek(connection: Connection, first: int, end: int, at_ms: int) -> int:
    """The first id of a run whose row is later than `at_ms`, or the run's end."""
    while first < end:
        middle = (first + end) // 2
        row = connection.exec_driver_sql(
            "SELECT id, at_ms FROM hot WHERE id >= ? AND id < ? ORDER BY id LIMIT 1", (middle, end)
        ).one_or_none()
        if row is None or row[1] > at_ms:
            end = middle
        else:
            first = row[0] + 1
    return first
