"""Reads what can be read of a damaged state.db, or of gpuwatch.db of 0.1, row by row; never writes to it.

Rule: a row is taken only if its record can be read, and is made anew from the record.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import msgspec

from gpuwatch.errors import StoreError
from gpuwatch.records import (
    Alert,
    Notification,
    Refusal,
    Remediation,
    Revision,
    ServerStart,
    ServerState,
    Transition,
)
from gpuwatch.store.codec import from_json
from gpuwatch.store.faults import told
from gpuwatch.store.rows import UNREADABLE, audit_of, notification_of, transition_of
from gpuwatch.store.schema import (
    ALERT,
    AUDIT,
    NOTIFICATION,
    RECEIVER,
    REFUSAL,
    REMEDIATION,
    REVISION,
    SERVER,
    SETTING,
    START,
    STATE_TABLES,
    TRANSITION,
)
from gpuwatch.store.writing import (
    Columns,
    alert_row,
    audit_row,
    notification_row,
    refusal_row,
    remediation_row,
    revision_row,
    server_row,
    start_row,
    transition_row,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from sqlalchemy import TableClause

    Take = Callable[[TableClause, list[Columns]], None]

_ROWS_AT_ONCE: Final = 500
_LONGEST_BYTES: Final = 10_000_000  # a damaged length must not have us ask for a gigabyte
_WIDEST_GAP: Final = 2**40
_LATER: Final = frozenset({AUDIT.name, START.name, REVISION.name})  # an earlier version of the file had none
_NOT_DAMAGE: Final = frozenset({"full", "locked", "read_only", "gone"})


@dataclass(frozen=True, slots=True)
class Losses:
    """What a file did not give: the tables that could not be read to the end, or hold unreadable rows."""

    tables: tuple[str, ...] = ()

    @property
    def words(self) -> bool:
        """Whether some of the people's settings may be lost."""
        return SETTING.name in self.tables


def rescue(path: Path, take: Take) -> Losses:
    """Give `take` the rows of each table, some hundred at a time.

    StoreError: the file cannot be opened now, which is no damage; nothing is known to be lost.
    """
    uri = f"file:{quote(os.fspath(path.absolute()))}?mode=rw"
    with told(path, "save what can be read"), closing(sqlite3.connect(uri, uri=True)) as connection:
        connection.row_factory = sqlite3.Row
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST_BYTES)
        lost = [table.name for table in STATE_TABLES if not _rescue_table(path, connection, table, take)]
    return Losses(tuple(lost))


def _rescue_table(path: Path, connection: sqlite3.Connection, table: TableClause, take: Take) -> bool:
    """Whether all of it could be read."""
    whole, batch = True, []
    for row in _rows(path, connection, table.name):
        made = None if row is None else remade(table, row)
        if made is None:
            whole = False
            continue
        batch.append(made)
        if len(batch) >= _ROWS_AT_ONCE:
            take(table, batch)
            batch = []
    take(table, batch)
    return whole


def _rows(path: Path, connection: sqlite3.Connection, table: str) -> Iterator[dict[str, Any] | None]:
    """The rows in the order of their numbers; None for what cannot be read, which may be many rows."""
    after, gap = -1, 1
    while gap <= _WIDEST_GAP:
        found = f"SELECT rowid AS number_, * FROM {table} NOT INDEXED WHERE rowid > ? ORDER BY rowid"
        try:
            with told(path, f"read the table {table}"):
                for row in connection.execute(found, (after,)):
                    after, gap = row["number_"], 1
                    yield dict(row)
                return
        except StoreError as error:
            if error.kind in _NOT_DAMAGE:
                raise
            if table in _LATER and "no such table" in str(error):
                return
            yield None
        # Beyond what is damaged there may be more.
        after, gap = after + gap, gap * 2


def remade(table: TableClause, row: Mapping[str, Any]) -> Columns | None:
    """The row as it would be written today, with its number; None if it cannot be read."""
    try:
        return _REMAKE[table.name](row)
    except (*UNREADABLE, LookupError, TypeError):
        return None


def _transition(row: Mapping[str, Any]) -> Columns:
    number = msgspec.convert(row["id"], int)
    if "digest" in row:
        return {"id": number, **transition_row(transition_of(row))}
    return {"id": number, **transition_row(from_json(row["record"], Transition))}


def _notification(row: Mapping[str, Any]) -> Columns:
    number = msgspec.convert(row["seq"], int)
    if "body" in row:
        return {"seq": number, **notification_row(notification_of(row))}
    return {"seq": number, **notification_row(from_json(row["record"], Notification))}


def _pair(row: Mapping[str, Any], *names: str) -> Columns:
    return {name: msgspec.convert(row[name], str) for name in names}


_REMAKE: Final[Mapping[str, Callable[[Mapping[str, Any]], Columns]]] = {
    ALERT.name: lambda row: alert_row(from_json(row["record"], Alert)),
    TRANSITION.name: _transition,
    SERVER.name: lambda row: server_row(from_json(row["record"], ServerState)),
    REMEDIATION.name: lambda row: remediation_row(from_json(row["record"], Remediation)),
    NOTIFICATION.name: _notification,
    RECEIVER.name: lambda row: _pair(row, "name", "record"),
    REFUSAL.name: lambda row: {
        "id": msgspec.convert(row["id"], int),
        **refusal_row(from_json(row["record"], Refusal)),
    },
    SETTING.name: lambda row: _pair(row, "name", "value"),
    AUDIT.name: lambda row: {"id": msgspec.convert(row["id"], int), **audit_row(audit_of(row))},
    START.name: lambda row: start_row(from_json(row["record"], ServerStart)),
    REVISION.name: lambda row: revision_row(from_json(row["record"], Revision)),
}
