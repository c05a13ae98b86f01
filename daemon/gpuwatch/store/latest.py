"""The newest value of every series, out of the rows of metrics.db; reads no frame, since those are old."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from gpuwatch.frames.rowtext import is_absent
from gpuwatch.records import is_stale
from gpuwatch.store.metrics import read_layout, readable
from gpuwatch.store.seek import row_ids

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from gpuwatch.records import Labels

_ROWS: Final = "SELECT id, layout, at_ms FROM hot WHERE id >= ? AND id < ? AND at_ms > ? AND at_ms <= ?"


def latest(connection: Connection, now_ms: int, lookback_ms: int) -> dict[Labels, float]:
    """The newest value in (now_ms - lookback_ms, now_ms] of every series that has not ended."""
    newest: dict[Labels, tuple[int, float]] = {}
    for layout, rows in _rows_by_layout(connection, now_ms, lookback_ms).items():
        labels = read_layout(connection, layout).labels
        missing = set(range(len(labels)))
        for number, at_ms in rows:
            row = readable(_text(connection, number), len(labels))
            if row is None:
                continue
            for column in [column for column in missing if not is_absent(row[column])]:
                missing.discard(column)
                if newest.get(labels[column], (-1, 0.0))[0] < at_ms:
                    newest[labels[column]] = at_ms, row[column]
            if not missing:
                break
    return {labels: value for labels, (_, value) in newest.items() if not is_stale(value)}


def _rows_by_layout(
    connection: Connection, now_ms: int, lookback_ms: int
) -> dict[int, list[tuple[int, int]]]:
    """By layout (id, at_ms) of the rows in the window, the newest first."""
    after_ms = now_ms - lookback_ms
    found: dict[int, list[tuple[int, int]]] = {}
    for bounds in row_ids(connection, after_ms, now_ms):
        # Upwards, which the kernel reads ahead where the file is not in memory.
        rows = connection.exec_driver_sql(_ROWS, (*bounds, after_ms, now_ms))
        for number, layout, at_ms in rows:
            found.setdefault(layout, []).append((number, at_ms))
    return {layout: rows[::-1] for layout, rows in found.items()}


def _text(connection: Connection, number: int) -> str:
    text: str = connection.exec_driver_sql("SELECT vals FROM hot WHERE id = ?", (number,)).scalar_one()
    return text
