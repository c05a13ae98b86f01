"""Brings a database of any earlier version to today's, step by step; never changes a released step.

Rule 1: a step and the row that records it are one transaction, so what is interrupted has not begun.
Rule 2: a step holds its own SQL; it means the same for ever, whatever `schema` says today.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from gpuwatch.errors import StoreError
from gpuwatch.store.faults import IN_MEMORY

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from gpuwatch.store.database import Database

# Instants as text, for the views.
_UTC: Final = "strftime('%Y-%m-%d %H:%M:%S UTC', {} / 1000, 'unixepoch')".format

_TABLES: Final = """
CREATE TABLE series (id INTEGER PRIMARY KEY, labels TEXT NOT NULL UNIQUE, metric TEXT NOT NULL);

-- By time first: a tick is appended at one end and retention takes from the other.
CREATE TABLE sample (
  at_ms INTEGER NOT NULL, series_id INTEGER NOT NULL, value REAL,  -- NULL: the series ends here
  PRIMARY KEY (at_ms, series_id)
) WITHOUT ROWID;

CREATE TABLE tick (id INTEGER PRIMARY KEY CHECK (id = 1), at_ms INTEGER NOT NULL);

CREATE TABLE alert (
  rule TEXT NOT NULL, labels TEXT NOT NULL, state TEXT NOT NULL, active_at_ms INTEGER NOT NULL,
  record TEXT NOT NULL,
  PRIMARY KEY (rule, labels)
);

-- AUTOINCREMENT: who follows the history by id must never see an id again.
CREATE TABLE transition (
  id INTEGER PRIMARY KEY AUTOINCREMENT, at_ms INTEGER NOT NULL, rule TEXT NOT NULL, was TEXT, now TEXT,
  record TEXT NOT NULL
);
CREATE INDEX transition_at ON transition (at_ms);

CREATE TABLE server (name TEXT PRIMARY KEY, phase TEXT NOT NULL, record TEXT NOT NULL);

CREATE TABLE remediation (
  id TEXT PRIMARY KEY, server TEXT NOT NULL, phase TEXT NOT NULL, created_at_ms INTEGER NOT NULL,
  record TEXT NOT NULL
);
CREATE INDEX remediation_created ON remediation (created_at_ms);

CREATE TABLE notification (
  seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, receiver TEXT NOT NULL,
  created_at_ms INTEGER NOT NULL, sent_at_ms INTEGER, gave_up_at_ms INTEGER,
  record TEXT NOT NULL
);
CREATE INDEX notification_unsent ON notification (receiver, seq)
  WHERE sent_at_ms IS NULL AND gave_up_at_ms IS NULL;
CREATE INDEX notification_sent ON notification (receiver, sent_at_ms);
CREATE INDEX notification_created ON notification (created_at_ms);

CREATE TABLE receiver (name TEXT PRIMARY KEY, record TEXT NOT NULL);

CREATE TABLE refusal (
  id INTEGER PRIMARY KEY, server TEXT NOT NULL, alert TEXT NOT NULL, code TEXT NOT NULL,
  record TEXT NOT NULL
);

CREATE TABLE setting (name TEXT PRIMARY KEY, value TEXT NOT NULL)
"""

_VIEWS: Final = f"""
-- With max() SQLite takes the other columns from the row that holds it.
CREATE VIEW v_last AS
SELECT metric, labels, value, {_UTC("at_ms")} AS at
FROM (
  SELECT series_id, max(at_ms) AS at_ms, value FROM sample
  WHERE at_ms > (SELECT max(at_ms) FROM sample) - 300000 GROUP BY series_id
) JOIN series ON series.id = series_id
WHERE value IS NOT NULL ORDER BY metric, labels;

CREATE VIEW v_alerts AS
SELECT rule, state, json_extract(record, '$.value') AS value, labels,
  {_UTC("active_at_ms")} AS active_at, {_UTC("json_extract(record, '$.fired_at_ms')")} AS fired_at,
  json_extract(record, '$.annotations.summary') AS summary
FROM alert ORDER BY active_at_ms;

CREATE VIEW v_remediations AS
SELECT id, server, phase, json_extract(record, '$.plan.alert') AS alert,
  json_extract(record, '$.plan.mode') AS mode, json_extract(record, '$.plan.dry_run') AS dry_run,
  json_extract(record, '$.outcome') AS outcome,
  {_UTC("created_at_ms")} AS created_at, {_UTC("json_extract(record, '$.since_ms')")} AS since
FROM remediation ORDER BY created_at_ms DESC
"""


def first_schema(connection: Connection) -> None:
    """Version 1: samples a row each, records as JSON beside their key columns, views for people."""
    # Not executescript, which would commit first.
    for statement in (_TABLES + ";" + _VIEWS).split(";\n"):
        connection.exec_driver_sql(statement)


Step = Callable[["Connection"], None]
STEPS: Final[tuple[Step, ...]] = (first_schema,)


def version_of(connection: Connection) -> int:
    """The version that a database has; 0 if it holds nothing of ours yet."""
    made = connection.exec_driver_sql("SELECT count(*) FROM sqlite_master WHERE name = 'migration'")
    if not made.scalar_one():
        return 0
    newest = connection.exec_driver_sql("SELECT coalesce(max(version), 0) FROM migration").scalar_one()
    return int(newest)


def migrate(database: Database, steps: Sequence[Step] = STEPS) -> None:
    """Take every step that is missing. StoreError of kind `newer`: a later gpuwatch made the file."""
    while _migrate_once(database, steps):
        pass


def _migrate_once(database: Database, steps: Sequence[Step]) -> bool:
    with database.writing("bring the schema up to date") as connection:
        version = version_of(connection)
        _refuse_newer(database, version, len(steps))
        if version == len(steps):
            return False
        step = steps[version]
        connection.exec_driver_sql(
            "CREATE TABLE IF NOT EXISTS migration (version INTEGER PRIMARY KEY, name TEXT NOT NULL)"
        )
        step(connection)
        connection.exec_driver_sql("INSERT INTO migration VALUES (?, ?)", (version + 1, step.__name__))
        return True


def check(database: Database) -> None:
    """StoreError unless the file has today's version, for those who may not migrate it."""
    with database.reading("read the schema's version") as connection:
        version = version_of(connection)
    _refuse_newer(database, version, len(STEPS))
    if version < len(STEPS):
        raise StoreError(
            f"{database.path or IN_MEMORY} has schema version {version}, older than this gpuwatch's"
            f" {len(STEPS)}; to cure it, start the daemon, which brings it up to date"
        )


def _refuse_newer(database: Database, version: int, known: int) -> None:
    if version > known:
        raise StoreError(
            f"{database.path or IN_MEMORY} has schema version {version}, newer than this gpuwatch's {known};"
            " to cure it, install the gpuwatch that made it or a later one, or move the file away",
            kind="newer",
        )
