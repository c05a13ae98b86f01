"""Opens one connection to gpuwatch.db and frames its transactions; never knows what is in the tables.

Rule 1: one process, by one connection, writes samples and checkpoints; `own` holds a lock for it.
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
from gpuwatch.store.faults import told

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from sqlalchemy import Connection

_OWNER_PRAGMAS: Final = (
    "page_size=4096",
    "journal_mode=WAL",
    "synchronous=FULL",  # the last second before a host dies is what people look for
    "secure_delete=OFF",  # Debian's default is ON: it rewrites every page that retention frees
    "cache_size=-512",  # KiB; a tick touches few pages, and this is a guest on the host
    "journal_size_limit=16777216",  # a long reader lets the WAL grow; it shrinks again at the next reset
)
_WISHER_PRAGMAS: Final = ("synchronous=FULL", "wal_autocheckpoint=0")


class Connect:
    """Opens a DB-API connection that leaves BEGIN to us, so that DDL is part of a transaction too."""

    def __init__(self, path: Path | None, query: str, busy_ms: int) -> None:
        """`query` is that of SQLite's file URI: `mode=ro`, `mode=rw`, `mode=rwc`, `immutable=1`."""
        self._uri = ":memory:" if path is None else f"file:{quote(os.fspath(path.absolute()))}?{query}"
        self._busy_ms = busy_ms

    def __call__(self) -> sqlite3.Connection:
        """A connection that any thread may use."""
        return sqlite3.connect(
            self._uri, uri=True, timeout=self._busy_ms / 1000, isolation_level=None, check_same_thread=False
        )


class Ownership:
    """Held by the one process that writes; the kernel lets go of it however that process ends."""

    def __init__(self, path: Path) -> None:
        """StoreError of kind `locked` if another process holds it."""
        # A file of its own: closing a second descriptor of the database would drop SQLite's locks.
        lock_path = path.with_name(path.name + ".lock")
        try:
            self._fd = os.open(lock_path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise StoreError(
                f"cannot open {lock_path}: {error.strerror}; to cure it, "
                "see that its folder exists and that this user may write there"
            ) from error
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._fd)
            raise StoreError(
                f"another gpuwatch writes to {path}; to cure it, stop that one or use another folder",
                kind="locked",
            ) from error

    def close(self) -> None:
        """Let go; twice is once."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


class Database:
    """One connection that several threads may use, one at a time."""

    def __init__(
        self,
        path: Path | None,
        connect: Connect,
        pragmas: Sequence[str] = (),
        ownership: Ownership | None = None,
    ) -> None:
        """StoreError if the file cannot be opened or is none of SQLite's."""
        self.path = path
        self._ownership = ownership
        self._lock = threading.Lock()
        # A parameter may hold a message's text, which has no business in a traceback.
        self._engine = create_engine("sqlite://", creator=connect, poolclass=StaticPool, hide_parameters=True)
        try:
            with told(path, "open the database"):
                self._connection = self._engine.connect()
                self._prepare(pragmas)
        except StoreError:
            self._let_go()
            raise

    def _prepare(self, pragmas: Sequence[str]) -> None:
        with self._connection.begin():
            for pragma in pragmas:
                self._connection.exec_driver_sql(f"PRAGMA {pragma}")
            self._connection.exec_driver_sql("SELECT count(*) FROM sqlite_master")

    @contextmanager
    def writing(self, what: str) -> Iterator[Connection]:
        """One transaction, committed whole or not at all; StoreError says that `what` failed."""
        with self._transaction("BEGIN IMMEDIATE", what) as connection:
            yield connection

    @contextmanager
    def reading(self, what: str) -> Iterator[Connection]:
        """One snapshot; StoreError says that `what` failed."""
        with self._transaction("BEGIN", what) as connection:
            yield connection

    @contextmanager
    def _transaction(self, begin: str, what: str) -> Iterator[Connection]:
        with self._lock, told(self.path, what), self._connection.begin():
            self._connection.exec_driver_sql(begin)
            yield self._connection

    def close(self) -> None:
        """Close the connection; the last one to close leaves no WAL behind."""
        with self._lock:
            self._connection.close()
            self._let_go()

    def _let_go(self) -> None:
        self._engine.dispose()
        if self._ownership is not None:
            self._ownership.close()


def own(path: Path | None, busy_ms: int) -> Database:
    """The writing connection; makes the file if there is none. `None`: a database in memory."""
    ownership = None if path is None else Ownership(path)
    return Database(path, Connect(path, "mode=rwc", busy_ms), _OWNER_PRAGMAS, ownership)


def read(path: Path, busy_ms: int = 2_000) -> Database:
    """A reading connection, with or without a running daemon."""
    _must_exist(path)
    try:
        return Database(path, Connect(path, "mode=ro", busy_ms))
    except StoreError as error:
        # After a clean stop a reader needs to make the -shm file, which it cannot in a folder
        # that it may not write. Without a WAL nothing is missed by not having it.
        if error.kind != "other" or _has_wal(path):
            raise
        return Database(path, Connect(path, "mode=ro&immutable=1", busy_ms))


def wish(path: Path, busy_ms: int = 5_000) -> Database:
    """A connection for one short write beside the daemon's."""
    _must_exist(path)
    return Database(path, Connect(path, "mode=rw", busy_ms), _WISHER_PRAGMAS)


def _must_exist(path: Path) -> None:
    try:
        path.stat()
    except FileNotFoundError:
        message = f"there is no database {path}; to cure it, start gpuwatch or name its state_dir"
        raise StoreError(message) from None
    except OSError as error:
        message = f"open the database {path}: {error.strerror}; to cure it, run as root or as gpuwatch's user"
        raise StoreError(message) from None


def _has_wal(path: Path) -> bool:
    wal = path.with_name(path.name + "-wal")
    return wal.exists() and wal.stat().st_size > 0
