"""Sets a damaged database file aside, for a person to look at; never reads it.

Rule: the file itself is moved last. What is cut short is begun again, and no new file meets an old WAL.
"""

from __future__ import annotations

import datetime as dt
import os
from typing import TYPE_CHECKING

from gpuwatch.store.faults import told

if TYPE_CHECKING:
    from pathlib import Path

_BESIDE = ("-wal", "-shm")


def set_aside(path: Path, now_ms: int) -> Path | None:
    """Rename a file and its WAL to `NAME.damaged-20261121T091500Z`; of one name only the newest is kept.

    Gives the new path; None if there is no such file. StoreError if it cannot be renamed.
    """
    with told(path, "set a damaged file aside"):
        if not path.exists():
            remove(path)
            return None
        at = dt.datetime.fromtimestamp(now_ms / 1000, dt.UTC)
        aside = path.with_name(f"{path.name}.damaged-{at:%Y%m%dT%H%M%SZ}")
        for older in path.parent.glob(f"{path.name}.damaged-*"):
            older.unlink()
        wal = path.with_name(path.name + "-wal")
        if wal.exists():
            wal.rename(aside.with_name(aside.name + "-wal"))
        path.with_name(path.name + "-shm").unlink(missing_ok=True)
        path.rename(aside)
        sync_folder(path.parent)
    return aside


def remove(path: Path) -> None:
    """Delete a database file and what SQLite keeps beside it; whatever is not there is no error."""
    for name in (*(path.name + end for end in _BESIDE), path.name):
        path.with_name(name).unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Have the names in a folder outlive a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
