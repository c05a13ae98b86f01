"""Turns what a database or a filesystem says into a StoreError with name, cause and cure; decides nothing.

The kind tells what may help: `full`, `locked`, `corrupt`, `newer`, `read_only`, `gone` (it cannot be
reached now; a later try may), `other`.
"""

from __future__ import annotations

import errno
import sqlite3
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from sqlalchemy.exc import DBAPIError

from gpuwatch.errors import StoreError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

IN_MEMORY: Final = "the database in memory"

_CURES: Final = {
    "full": "free space on its filesystem; gpuwatch goes on by itself",
    "locked": "end the other program that writes to it",
    "corrupt": "look at the disk's health (dmesg); gpuwatch sets the file aside and begins a new one",
    "read_only": "let the user that gpuwatch runs as write to it and to its folder",
    "gone": "see that its folder exists, that this user may use it, and what the kernel's log (dmesg) says",
    "other": "report this as a bug of gpuwatch",
}
_SERVER_CURES: Final = {
    "full": "free space on the database server; gpuwatch goes on by itself",
    "locked": "end what holds the rows or keeps the database server busy (pg_stat_activity)",
    "read_only": "grant this user the right to create and use its schema there",
    "gone": "see that the database server runs and that state_url is right; gpuwatch goes on by itself",
    "other": "see the database server's log; if it has no reason, report this as a bug of gpuwatch",
}
# Primary result codes of sqlite.org/rescode.html.
_SQLITE: Final = {
    sqlite3.SQLITE_FULL: "full",
    sqlite3.SQLITE_BUSY: "locked",
    sqlite3.SQLITE_LOCKED: "locked",
    sqlite3.SQLITE_CORRUPT: "corrupt",
    sqlite3.SQLITE_NOTADB: "corrupt",
    sqlite3.SQLITE_READONLY: "read_only",
    sqlite3.SQLITE_PERM: "read_only",
    sqlite3.SQLITE_CANTOPEN: "gone",
    sqlite3.SQLITE_IOERR: "gone",
    sqlite3.SQLITE_NOMEM: "gone",
}
# Of PostgreSQL's appendix "Error Codes": a class is two characters. The longest that fits counts.
_SQLSTATES: Final = {
    "53100": "full",
    "25006": "read_only",
    "42501": "read_only",
    "55P03": "locked",
    "57014": "locked",  # statement_timeout
    "40": "locked",
    "08": "gone",
    "28": "gone",
    "3D": "gone",
    "53": "gone",
    "57P": "gone",
    "58": "gone",
}
_ERRNOS: Final = {
    errno.ENOSPC: "full",
    errno.EDQUOT: "full",
    errno.EACCES: "read_only",
    errno.EPERM: "read_only",
    errno.EROFS: "read_only",
}


@contextmanager
def told(where: Path | str | None, what: str) -> Iterator[None]:
    """Raise StoreError where the database or the filesystem fails; `what` says what was being done."""
    try:
        yield
    except DBAPIError as error:
        fault = _fault(where, what, error.orig or error)
        # PostgreSQL's own words may quote the row, which has no business in a traceback.
        raise fault from (error if isinstance(error.orig, sqlite3.Error) else None)
    except (sqlite3.Error, OSError, UnicodeDecodeError) as error:
        raise _fault(where, what, error) from error


def _fault(where: Path | str | None, what: str, error: BaseException) -> StoreError:
    if isinstance(error, sqlite3.Error):
        # The low byte of an extended code is the primary one.
        kind, cures = _SQLITE.get(getattr(error, "sqlite_errorcode", 0) & 0xFF, "other"), _CURES
    elif isinstance(error, OSError):
        kind, cures = kind_of(error), _CURES
    elif isinstance(error, UnicodeDecodeError):  # Python's own word for text that is none
        kind, cures = "corrupt", _CURES
    else:
        kind, cures = _kind_of_sqlstate(getattr(error, "sqlstate", None)), _SERVER_CURES
    said = _said(error)
    return StoreError(f"cannot {what} in {where or IN_MEMORY}: {said}; to cure it, {cures[kind]}", kind=kind)


def kind_of(error: OSError) -> str:
    """The kind of what a filesystem says."""
    return _ERRNOS.get(error.errno or 0, "gone")


def _kind_of_sqlstate(state: str | None) -> str:
    if not state:  # the server did not answer, so there is no state
        return "gone"
    return next((_SQLSTATES[state[:n]] for n in (5, 3, 2) if state[:n] in _SQLSTATES), "other")


def _said(error: BaseException) -> str:
    # The rest of what PostgreSQL says may quote the row that was to be written.
    primary = getattr(getattr(error, "diag", None), "message_primary", None)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(primary or error).strip().replace("\n", " ")
