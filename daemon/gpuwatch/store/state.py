"""What must outlive the daemon: state.db, or the same rows in PostgreSQL; never asked while judging.

The daemon works on a mirror of these rows in memory. Each second its changes are written here, and the
settings, where people leave their wishes, are read back.

Rule 1: `state.db` is always a whole file with today's tables. A new one, whether it begins empty, from
gpuwatch.db of 0.1 or from what a damaged one still gives, is made beside it; a rename to `state.db.ready`
says that it is whole, and from there on whoever opens the folder goes on with it.
Rule 2: a file is damaged if SQLite says so, or if a row cannot be read that the daemon needs.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import delete, func, or_, select

from gpuwatch.errors import StoreError
from gpuwatch.records import LIVE_PHASES, ServerPhase
from gpuwatch.store import database
from gpuwatch.store.faults import told
from gpuwatch.store.migrations import STATE_STEPS, migrate, version_of
from gpuwatch.store.quarantine import remove, set_aside, sync_folder
from gpuwatch.store.rescue import Losses, remade, rescue
from gpuwatch.store.rows import Rows
from gpuwatch.store.schema import (
    ALERT,
    NOTIFICATION,
    RECEIVER,
    REFUSAL,
    REMEDIATION,
    REVISION,
    SERVER,
    SETTING,
    START,
    STATE_TABLES,
)
from gpuwatch.store.writing import Changes, Columns, prune_history, put, save, write_changes

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path
    from types import ModuleType

    from sqlalchemy import Connection, Row, Select, TableClause

    from gpuwatch.store.database import Database

STATE_DB: Final = "state.db"
_OLD_DB: Final = "gpuwatch.db"  # of 0.1, with samples and state in one
_REMEDIATIONS: Final = 1_000
_SENT_MS: Final = 3_600_000
_ROWS_AT_ONCE: Final = 500


def _touched(path: str) -> tuple[int, int]:
    """When a file was last written, in ns, and its size; zeros if it is not there."""
    try:
        seen = os.stat(path)  # noqa: PTH116 (each second: half the time of a Path)
    except OSError:
        return 0, 0
    return seen.st_mtime_ns, seen.st_size


@dataclass(frozen=True, slots=True)
class Opened:
    """The state, and what happened when it was opened, as sentences for the log.

    `words_lost`: the operator's settings, a pause among them, could not all be read.
    """

    state: State
    notes: tuple[str, ...]
    words_lost: bool


class State:
    """The durable rows. StoreError from any method: nothing was done, and it may be asked again."""

    def __init__(self, opened: Database, path: Path | None = None) -> None:
        """`path` is that of a file, to notice when it goes."""
        self._database = opened
        self._path = path
        self._inode = None if path is None else path.stat().st_ino
        self._touched: list[tuple[int, int]] = []
        self._has_changed = False
        self._watched = () if path is None else (os.fspath(path), os.fspath(path) + "-wal")

    def load(self, mirror: Database) -> None:
        """Copy what the daemon needs into a mirror that is migrated; numbers stay.

        Not the history, and of what is over only the newest 1000 remediations and the messages of the
        last hour in which one was sent. A row that cannot be read is left out. What the mirror has
        already comes after and counts more, but for a server that it has not seen answer.
        """
        with self._database.reading("load the state") as source:
            saved = [(table, _readable(table, source.execute(query))) for table, query in _needed(source)]
        with mirror.writing("load the state") as target:
            own = {table: _columns(target.execute(select(table))) for table in STATE_TABLES}
            own[SERVER] = [row for row in own[SERVER] if row["phase"] != ServerPhase.UNSEEN]
            is_used = any(own.values())
            for table in STATE_TABLES:
                target.execute(delete(table))
            for table, rows in saved:
                if table is not REFUSAL or not is_used:
                    put(target, table, rows)
            for table, rows in own.items():
                save(target, table, rows)

    def write(self, changes: Sequence[Changes]) -> None:
        """Write them in their order, all or none; written twice they are there once."""
        self._must_be_there()
        with self._database.writing("save state") as connection:
            for one in changes:
                write_changes(connection, one)

    def refill(self, mirror: Database, *, keep_words: bool = False) -> None:
        """Write everything that the mirror has; alerts and refusals that it lacks are over.

        `keep_words`: settings, if there are any, stay as people may have changed them meanwhile.
        """
        with mirror.reading("copy the state") as source, self._database.writing("save state") as target:
            for table in (ALERT, REFUSAL):
                target.execute(delete(table))
            kept = keep_words and target.execute(select(SETTING.c.name).limit(1)).first() is not None
            for table in STATE_TABLES:
                if table is SETTING and kept:
                    continue
                for rows in source.execute(select(table)).partitions(_ROWS_AT_ONCE):
                    save(target, table, _columns(rows))

    def settings(self) -> dict[str, str]:
        """Wishes of people, left by the command line, and what the daemon keeps for itself."""
        return Rows(self._database).settings()

    def changed_settings(self) -> dict[str, str] | None:
        """The settings if another process may have changed any since the last time, else None.

        Any commit touches the file or its write-ahead log; a server is asked anew.
        """
        if self._path is None:
            return self.settings()
        touched = [_touched(path) for path in self._watched]
        changed, before = touched != self._touched, self._has_changed
        self._touched, self._has_changed = touched, changed
        # Once more after a change: a file system's clock is coarse, and may not show the next one.
        return self.settings() if changed or before else None

    def prune(self, before_ms: int) -> int:
        """Delete what is over and was so before; says how many rows."""
        with self._database.writing("prune history") as connection:
            return prune_history(connection, before_ms)

    def close(self) -> None:
        """Close the connection; twice is once."""
        self._database.close()

    def _must_be_there(self) -> None:
        """SQLite goes on writing to a file that was deleted, and nobody would see it again."""
        if self._path is None:
            return
        with told(self._path, "find the file"):
            there = self._path.stat().st_ino if self._path.exists() else None
        if there != self._inode:
            raise StoreError(
                f"cannot save state in {self._path}: it was deleted or replaced; a new one is begun",
                kind="corrupt",
            )


def open_state(
    folder: Path,
    *,
    url: str | None = None,
    host: str = "",
    now_ms: int,
    busy_ms: int = 2_000,
) -> Opened:
    """The state in a folder that the caller owns (`database.Ownership`), or at a PostgreSQL URL.

    Args:
        folder: where state.db is, or becomes.
        url: of PostgreSQL, as SQLAlchemy has it; then the folder is not used.
        host: names the schema there.
        now_ms: names a damaged file that is set aside.
        busy_ms: how long SQLite waits for another writer.

    Raises:
        StoreError: of kind `newer`, `full`, `locked`, `read_only`, `gone`. Damage is no error.

    """
    if url:
        return _open_server(folder, url, host)
    path = folder / STATE_DB
    with told(path, "open the state"):
        return _open_file(path, now_ms, busy_ms)


# -- PostgreSQL ----------------------------------------------------------------------------------


def postgresql_module() -> ModuleType:
    """Imported only where a URL is set: its driver is an extra, and takes megabytes."""
    return importlib.import_module("gpuwatch.store.postgresql")


def _open_server(folder: Path, url: str, host: str) -> Opened:
    opened: Database = postgresql_module().own(url, host)
    try:
        migrate(opened, STATE_STEPS)
        unreadable = _unreadable(opened)
    except BaseException:
        opened.close()
        raise
    notes = [
        f"{count} rows of {table} in {opened.name} cannot be read" for table, count in unreadable.items()
    ]
    notes += [
        f"{folder / name} is not used, because state_url is set; what people wished there does not count"
        for name in (STATE_DB, _OLD_DB)
        if (folder / name).exists()
    ]
    return Opened(State(opened), tuple(notes), words_lost=SETTING.name in unreadable)


# -- SQLite --------------------------------------------------------------------------------------


def _open_file(path: Path, now_ms: int, busy_ms: int) -> Opened:
    _finish(path, now_ms)
    losses, notes = _begin_if_missing(path, now_ms, busy_ms)
    try:
        opened = _sound(path, busy_ms)
    except StoreError as error:
        if not is_damage(error, path):
            raise
        losses = _begin(path, path, busy_ms)
        aside = _finish(path, now_ms)
        notes.append(f"{error}. {aside} keeps the file. {_told(losses)}")
        opened = _sound(path, busy_ms)
    return Opened(State(opened, path), tuple(notes), losses.words)


def _begin_if_missing(path: Path, now_ms: int, busy_ms: int) -> tuple[Losses, list[str]]:
    old = path.with_name(_OLD_DB)
    if path.exists():
        unused = f"{old} of gpuwatch 0.1 is not used, because there is a {path}; it may be deleted"
        return Losses(), [unused] if old.exists() else []
    if not old.exists():
        _begin(path, None, busy_ms)
        _finish(path, now_ms)
        return Losses(), []
    held = database.Ownership(path.parent, old.name + ".lock")
    try:
        losses = _begin(path, old, busy_ms)
        _finish(path, now_ms)
        return losses, _dismiss(old, losses, now_ms)
    finally:
        held.close()


def _sound(path: Path, busy_ms: int) -> Database:
    """The file, checked and brought up to date; StoreError of kind `corrupt` if it is damaged."""
    opened = database.own(path, busy_ms)
    try:
        _check_file(opened, path)
        migrate(opened, STATE_STEPS)
        _check_rows(opened, path)
    except BaseException:
        opened.close()
        raise
    return opened


def _check_file(opened: Database, path: Path) -> None:
    with opened.reading("check the file") as connection:
        said = connection.exec_driver_sql("PRAGMA integrity_check(1)").scalar_one()
        version = version_of(connection)
    if said != "ok" or not version:
        raise _damaged(path, said if version else "it is none of gpuwatch's")


def _check_rows(opened: Database, path: Path) -> None:
    unreadable = _unreadable(opened)
    if unreadable:
        raise _damaged(path, f"rows cannot be read ({', '.join(unreadable)})")


def _damaged(path: Path, why: str) -> StoreError:
    return StoreError(f"{path} is damaged: {why}", kind="corrupt")


def is_damage(error: StoreError, path: Path) -> bool:
    """Whether what a file said when it was opened means that it is damaged, and not only out of reach."""
    if error.kind == "read_only":  # so SQLite also says of a file whose head is damaged
        return os.access(path, os.W_OK) and os.access(path.parent, os.W_OK)
    # SQLite has no better word than an error of SQL for a file that lost its tables.
    return error.kind in {"corrupt", "other"}


def _begin(path: Path, source: Path | None, busy_ms: int) -> Losses:
    """Make a new file beside `path`, with what `source` gives; once it is named ready it counts."""
    new = path.with_name(path.name + ".new")
    remove(new)
    losses = Losses()
    made = database.own(new, busy_ms)
    try:
        migrate(made, STATE_STEPS)
        if source is not None:
            with made.writing(f"save what {source} gives") as connection:
                losses = rescue(source, lambda table, rows: put(connection, table, rows))
    except BaseException:
        made.close()
        remove(new)
        raise
    made.close()
    new.rename(_ready(path))
    sync_folder(path.parent)
    return losses


def _finish(path: Path, now_ms: int) -> Path | None:
    """Let a new file take its place if one is ready, and set aside what is there."""
    ready = _ready(path)
    if not ready.exists():
        return None
    aside = set_aside(path, now_ms)
    ready.rename(path)
    sync_folder(path.parent)
    return aside


def _ready(path: Path) -> Path:
    return path.with_name(path.name + ".ready")


def _dismiss(old: Path, losses: Losses, now_ms: int) -> list[str]:
    """Have a file go that was carried over; a damaged one is kept."""
    carried = f"state was carried over from {old} of gpuwatch 0.1, its samples were not"
    if losses.tables:
        return [f"{carried}. It is damaged; {set_aside(old, now_ms)} keeps it. {_told(losses)}"]
    remove(old)
    old.with_name(old.name + ".lock").unlink(missing_ok=True)
    return [carried]


def _told(losses: Losses) -> str:
    if not losses.tables:
        return "All rows could be saved from it"
    held = "; people's settings may be lost" if losses.words else ""
    return f"Not all could be saved of: {', '.join(losses.tables)}{held}"


# -- what the daemon needs -------------------------------------------------------------------------


def _needed(connection: Connection) -> Iterator[tuple[TableClause, Select[*tuple[Any, ...]]]]:
    for table in (ALERT, SERVER, RECEIVER, SETTING, START, REVISION):
        yield table, select(table)
    yield REFUSAL, select(REFUSAL).order_by(REFUSAL.c.id)
    phases = sorted(phase.value for phase in LIVE_PHASES)
    newest = select(REMEDIATION).order_by(REMEDIATION.c.created_at_ms.desc())
    yield REMEDIATION, newest.where(REMEDIATION.c.phase.in_(phases))
    yield REMEDIATION, newest.where(REMEDIATION.c.phase.not_in(phases)).limit(_REMEDIATIONS)
    sent = NOTIFICATION.c.sent_at_ms
    last_ms = connection.execute(select(func.max(sent))).scalar_one() or 0
    unsent = sent.is_(None) & NOTIFICATION.c.gave_up_at_ms.is_(None)
    yield (
        NOTIFICATION,
        select(NOTIFICATION).where(or_(unsent, sent >= last_ms - _SENT_MS)).order_by(NOTIFICATION.c.seq),
    )


def _columns(rows: Iterable[Row[*tuple[Any, ...]]]) -> list[Columns]:
    return [dict(row._mapping) for row in rows]  # noqa: SLF001 - public


def _readable(table: TableClause, rows: Iterable[Row[*tuple[Any, ...]]]) -> list[Columns]:
    return [made for made in (remade(table, row) for row in _columns(rows)) if made is not None]


def _unreadable(opened: Database) -> dict[str, int]:
    """How many of the rows that the daemon needs cannot be read, by table."""
    counts: dict[str, int] = {}
    with opened.reading("check the rows") as connection:
        for table, query in _needed(connection):
            for rows in connection.execute(query).partitions(_ROWS_AT_ONCE):
                bad = len(rows) - len(_readable(table, rows))
                if bad:
                    counts[table.name] = counts.get(table.name, 0) + bad
    return counts
