"""The newest value of every series, out of the rows of metrics.db; reads no frame, since those are old."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from gpuwatch.frames.rowtext import is_absent
from gpuwatch.records import is_stale
from gpuwatch.store.metrics import read_layout, readable

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from gpuwatch.records import Labels

_LATE_MS: Final = 60_000  # a slow source's scrape stands behind those of a later instant


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
    found: dict[int, list[tuple[int, int]]] = {}
    rows = connection.exec_driver_sql("SELECT id, layout, at_ms FROM hot ORDER BY id DESC")
    for number, layout, at_ms in rows:
        if at_ms <= now_ms - lookback_ms - _LATE_MS:
            break
        if now_ms - lookback_ms < at_ms <= now_ms:
            found.setdefault(layout, []).append((number, at_ms))
    rows.close()
    return found


def _text(connection: Connection, number: int) -> str:
    text: str = connection.exec_driver_sql("SELECT vals FROM hot WHERE id = ?", (number,)).scalar_one()
    return text
