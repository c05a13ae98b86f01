"""Turns what SQLite says into a StoreError with path, cause and cure; never decides what happens next."""

from __future__ import annotations

import sqlite3
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from sqlalchemy.exc import DBAPIError

from gpuwatch.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

IN_MEMORY: Final = "the database in memory"

# Primary result codes of sqlite.org/rescode.html: the kind of the StoreError, and what helps.
_FAULTS: Final[dict[int, tuple[str, str]]] = {
    sqlite3.SQLITE_FULL: ("full", "free space on its filesystem; gpuwatch goes on by itself"),
    sqlite3.SQLITE_BUSY: ("locked", "end the other program that writes to it"),
    sqlite3.SQLITE_LOCKED: ("locked", "end the other program that writes to it"),
    sqlite3.SQLITE_CORRUPT: ("corrupt", "stop gpuwatch and move the file away; a new one is begun"),
    sqlite3.SQLITE_NOTADB: ("corrupt", "stop gpuwatch and move the file away; a new one is begun"),
    sqlite3.SQLITE_READONLY: ("other", "let the user that gpuwatch runs as write to it and to its folder"),
    sqlite3.SQLITE_CANTOPEN: ("other", "see that its folder exists and that this user may use it"),
    sqlite3.SQLITE_IOERR: ("other", "look for disk errors in the kernel's log (dmesg)"),
}
_UNKNOWN: Final = ("other", "report this as a bug of gpuwatch")


@contextmanager
def told(path: Path | None, what: str) -> Iterator[None]:
    """Raise StoreError where SQLite fails; `what` says what was being done, as in "save a tick"."""
    try:
        yield
    except DBAPIError as error:
        raise _fault(path, what, error.orig) from error
    except sqlite3.Error as error:
        raise _fault(path, what, error) from error


def _fault(path: Path | None, what: str, error: BaseException | None) -> StoreError:
    code = getattr(error, "sqlite_errorcode", 0)
    kind, cure = _FAULTS.get(code & 0xFF, _UNKNOWN)  # the low byte of an extended code is the primary one
    return StoreError(f"cannot {what} in {path or IN_MEMORY}: {error}; to cure it, {cure}", kind=kind)
