"""The view of other processes: reads what the daemon saved and leaves wishes; never writes anything else."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gpuwatch.store import database, migrations
from gpuwatch.store.codec import labels_of
from gpuwatch.store.rows import Rows
from gpuwatch.store.writing import write_settings

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from gpuwatch.records import Labels

# With max() SQLite takes the other columns from the row that holds it. NULL is the staleness marker.
_LATEST = (
    "SELECT labels, value FROM (SELECT series_id, max(at_ms), value FROM sample"
    " WHERE at_ms > ? AND at_ms <= ? GROUP BY series_id)"
    " JOIN series ON series.id = series_id WHERE value IS NOT NULL"
)


class ReadStore(Rows):
    """The rows as they stand, read-only. Every method is a snapshot of its own."""

    def latest(self, now_ms: int, lookback_ms: int) -> dict[Labels, float]:
        """The newest value in (now_ms - lookback_ms, now_ms] of every series that has not ended."""
        with self._database.reading("read the latest samples") as connection:
            rows = connection.exec_driver_sql(_LATEST, (now_ms - lookback_ms, now_ms)).all()
        return {labels_of(row[0]): row[1] for row in rows}


def open_read_only(path: Path) -> ReadStore:
    """Works with and without a running daemon. StoreError: no such file, not ours, or of another version."""
    opened = database.read(path)
    try:
        migrations.check(opened)
    except BaseException:
        opened.close()
        raise
    return ReadStore(opened)


def leave_wish(path: Path, settings: Mapping[str, str | None]) -> None:
    """Change settings in one short transaction beside the daemon's; None deletes. May raise StoreError."""
    opened = database.wish(path)
    try:
        migrations.check(opened)
        with opened.writing("leave a wish") as connection:
            write_settings(connection, settings)
    finally:
        opened.close()
