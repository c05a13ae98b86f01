"""What `gpuwatch db` does with the files as a whole: sizes, checks, copies; reads no sample's meaning."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import TYPE_CHECKING, Any, Final

from gpuwatch.errors import StoreError
from gpuwatch.store import database
from gpuwatch.store.faults import told
from gpuwatch.store.metrics import PAGE_BYTES
from gpuwatch.store.metrics_schema import METRICS_DB

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from sqlalchemy import Connection

Figures = dict[str, Any]

_HOURLY_BYTES: Final = 45  # of a row, by experience; to count them would be to read them all
_COUNTED: Final = ("alert", "transition", "remediation", "notification", "audit", "setting")


def info(path: Path) -> Figures:
    """How large a file is and what is in it; StoreError."""
    with closing(database.read(path)) as opened, opened.reading("see what is in it") as connection:
        pages, free = (
            int(connection.exec_driver_sql(f"PRAGMA {name}").scalar_one())
            for name in ("page_count", "freelist_count")
        )
        return {
            "path": str(path),
            "bytes": pages * PAGE_BYTES,
            "free_bytes": free * PAGE_BYTES,
            "wal_bytes": _size(path.with_name(path.name + "-wal")),
            "schema": int(connection.exec_driver_sql("SELECT max(version) FROM migration").scalar_one()),
            **(_metrics_info(connection) if path.name == METRICS_DB else _state_info(connection)),
        }


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _metrics_info(connection: Connection) -> Figures:
    def one(query: str) -> Sequence[Any]:
        return tuple(connection.exec_driver_sql(query).one())

    rows, rows_bytes, first_row_ms, last_row_ms = one(
        "SELECT count(*), coalesce(sum(length(vals)), 0), min(at_ms), max(at_ms) FROM hot"
        " JOIN target ON target.id = hot.target WHERE hot.id > sealed_id"
    )
    frames, frame_bytes, samples, first_ms, last_ms = one(
        "SELECT count(*), coalesce(sum(length(data)), 0), coalesce(sum(n * width), 0),"
        " min(from_ms), max(to_ms) FROM frame JOIN layout ON layout.id = frame.layout"
    )
    hours, first_hour_ms, last_hour_ms = one("SELECT count(*), min(hour_ms), max(hour_ms) FROM hourly")
    series, targets = one("SELECT (SELECT count(*) FROM series), (SELECT count(*) FROM target)")
    return {
        "targets": targets,
        "series": series,
        "rows": {"count": rows, "bytes": rows_bytes, "first_ms": first_row_ms, "last_ms": last_row_ms},
        "frames": {
            "count": frames,
            "bytes": frame_bytes,
            "cells": samples,
            "bytes_per_cell": frame_bytes / samples if samples else None,
            "first_ms": first_ms,
            "last_ms": last_ms,
        },
        "hourly": {
            "count": hours,
            "bytes": hours * _HOURLY_BYTES,
            "first_ms": first_hour_ms,
            "last_ms": last_hour_ms,
        },
    }


def _state_info(connection: Connection) -> Figures:
    counts = {
        table: int(connection.exec_driver_sql(f"SELECT count(*) FROM {table}").scalar_one())
        for table in _COUNTED
    }
    return {"rows": counts}


def damage(path: Path) -> Iterator[str]:
    """What SQLite's integrity check finds, and of metrics.db every frame and row that cannot be read."""
    try:
        with closing(database.read(path)) as opened, opened.reading("check it") as connection:
            for (line,) in connection.exec_driver_sql("PRAGMA integrity_check"):
                if line != "ok":
                    yield str(line)
            if path.name == METRICS_DB:
                yield from _unreadable(connection)
    except StoreError as error:
        if error.kind not in {"corrupt", "other"}:  # it is out of reach, and may be whole
            raise
        yield str(error)


def _unreadable(connection: Connection) -> Iterator[str]:
    from gpuwatch.frames import frame, rowtext  # noqa: PLC0415 (numpy)

    frames = connection.exec_driver_sql("SELECT id FROM frame ORDER BY id").scalars().all()
    for number in frames:
        data = connection.exec_driver_sql("SELECT data FROM frame WHERE id = ?", (number,)).scalar_one()
        try:
            opened = frame.Frame(data)
            opened.at_ms()
            opened.columns()
        except frame.FrameError as error:
            yield f"frame {number}: {error}"
    for number, text in connection.exec_driver_sql("SELECT id, vals FROM hot"):
        try:
            rowtext.decode(text)
        except ValueError as error:
            yield f"row {number} of hot: {error}"


def compact(path: Path) -> tuple[int, int]:
    """Write the file anew without its free pages; gives bytes before and after.

    StoreError if a daemon runs, since only one process may write.
    """
    with closing(database.Ownership(path.parent)), told(path, "compact it"):
        before = path.stat().st_size
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("VACUUM")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return before, path.stat().st_size


def backup(path: Path, folder: Path) -> Path:
    """A compact copy as of now in a folder, also while the daemon writes; gives its path. StoreError."""
    copy = folder / path.name
    partial = folder / (path.name + ".partial")
    if copy.exists():
        raise StoreError(f"{copy} is there already; to cure it, name another folder or move it away")
    uri = f"{path.absolute().as_uri()}?mode=ro"
    with told(path, f"copy it to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
        with closing(sqlite3.connect(uri, uri=True)) as connection:
            connection.execute("VACUUM INTO ?", (str(partial),))
        return partial.rename(copy)
