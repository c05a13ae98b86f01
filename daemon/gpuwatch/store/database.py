"""Opens one connection to a database and frames its transactions; never knows what is in the tables.

Rule 1: one process, by one connection, writes a file and checkpoints it; it holds the folder's `Ownership`.
Rule 2: every other process only reads, but for wishes, which are short and never checkpoint.
Two connections that write and checkpoint at once can corrupt a file (sqlite.org/wal.html#walresetbug).
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

from sqlalchemy import create_engine
from sqlalchemy.pool import StaticPool

from gpuwatch.errors import StoreError
from gpuwatch.store.dialects import dialect_of
from gpuwatch.store.faults import IN_MEMORY, kind_of, told

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from sqlalchemy import Connection, Engine

LOCK: Final = "gpuwatch.lock"
_OWNER_PRAGMAS: Final = (
    "page_size=4096",
    "journal_mode=WAL",
    "synchronous=FULL",  # the last second before a host dies is what people look for
    "secure_delete=OFF",  # Debian's default is ON: it rewrites every page that retention frees
    "cache_size=-512",  # KiB; a tick touches few pages, and this is a guest on the host
    "journal_size_limit=16777216",  # a long reader lets the WAL grow; it shrinks again at the next reset
)
_WISHER_PRAGMAS: Final = ("synchronous=FULL", "wal_autocheckpoint=0")


class Ownership:
    """Held by the one process that writes; the kernel lets go of it however that process ends."""

    def __init__(self, folder: Path, name: str = LOCK) -> None:
        """StoreError of kind `locked` if another process holds it."""
        # A file of its own: closing a second descriptor of a database would drop SQLite's locks.
        path = folder / name
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StoreError(
                f"cannot open {path}: {error.strerror}; to cure it, "
                "see that its folder exists and that this user may write there",
                kind=kind_of(error),
            ) from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.close()
            raise StoreError(
                f"another gpuwatch writes to {folder}; to cure it, stop that one or use another folder",
                kind="locked",
            ) from error

    def close(self) -> None:
        """Let go; twice is once."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class Database:
    """One connection that several threads may use, one at a time."""

    def __init__(self, name: str, engine: Engine, prepare: Sequence[str] = ()) -> None:
        """Connect and run the statements of `prepare`. `name` is how errors call it; StoreError."""
        self.name = name
        self._engine = engine
        self._lock = threading.Lock()
        try:
            with told(name, "open the database"):
                self._connection = engine.connect()
                self._dialect = dialect_of(self._connection)
                with self._connection.begin():
                    for statement in prepare:
                        self._connection.exec_driver_sql(statement)
        except StoreError:
            engine.dispose()
            raise

    @contextmanager
    def writing(self, what: str) -> Iterator[Connection]:
        """One transaction, committed whole or not at all; StoreError says that `what` failed."""
        with self._transaction(self._dialect.begin_writing, what) as connection:
            yield connection

    @contextmanager
    def reading(self, what: str) -> Iterator[Connection]:
        """One snapshot; StoreError says that `what` failed."""
        with self._transaction(self._dialect.begin_reading, what) as connection:
            yield connection

    @contextmanager
    def _transaction(self, begin: str, what: str) -> Iterator[Connection]:
        with self._lock, told(self.name, what), self._connection.begin():
            if begin:
                self._connection.exec_driver_sql(begin)
            yield self._connection

    def close(self) -> None:
        """Close the connection; the last one to close a file leaves no WAL behind. Twice is once."""
        with self._lock:
            self._connection.close()
            self._engine.dispose()


def own(path: Path | None, busy_ms: int, *, pragmas: Sequence[str] = ()) -> Database:
    """The writing connection; makes the file if there is none. `None`: a database in memory."""
    return _open(path, "mode=rwc", busy_ms, (*_OWNER_PRAGMAS, *pragmas))


def read(path: Path, busy_ms: int = 2_000) -> Database:
    """A reading connection, with or without a running daemon."""
    _must_exist(path)
    try:
        return _open(path, "mode=ro", busy_ms)
    except StoreError as error:
        # After a clean stop a reader needs to make the -shm file, which it cannot in a folder
        # that it may not write. Without a WAL nothing is missed by not having it.
        if error.kind not in {"gone", "read_only"} or _has_wal(path):
            raise
        return _open(path, "mode=ro&immutable=1", busy_ms)


def wish(path: Path, busy_ms: int = 5_000) -> Database:
    """A connection for one short write beside the daemon's."""
    _must_exist(path)
    return _open(path, "mode=rw", busy_ms, _WISHER_PRAGMAS)


def _open(path: Path | None, query: str, busy_ms: int, pragmas: Sequence[str] = ()) -> Database:
    """`query` is that of SQLite's file URI: `mode=ro`, `mode=rw`, `mode=rwc`, `immutable=1`."""
    uri = ":memory:" if path is None else f"file:{quote(os.fspath(path.absolute()))}?{query}"

    def connect() -> sqlite3.Connection:
        # Without an isolation level BEGIN is ours, so that DDL is part of a transaction too.
        return sqlite3.connect(
            uri, uri=True, timeout=busy_ms / 1000, isolation_level=None, check_same_thread=False
        )

    # A parameter may hold a message's text, which has no business in a traceback.
    engine = create_engine("sqlite://", creator=connect, poolclass=StaticPool, hide_parameters=True)
    prepare = [*(f"PRAGMA {pragma}" for pragma in pragmas), "SELECT count(*) FROM sqlite_master"]
    return Database(IN_MEMORY if path is None else str(path), engine, prepare)


def _must_exist(path: Path) -> None:
    try:
        path.stat()
    except FileNotFoundError:
        message = f"there is no database {path}; to cure it, start gpuwatch or name its state_dir"
        raise StoreError(message, kind="gone") from None
    except OSError as error:
        message = (
            f"cannot open the database {path}: {error.strerror};"
            " to cure it, run as root or as gpuwatch's user"
        )
        raise StoreError(message, kind="read_only") from None


def _has_wal(path: Path) -> bool:
    wal = path.with_name(path.name + "-wal")
    return wal.exists() and wal.stat().st_size > 0
