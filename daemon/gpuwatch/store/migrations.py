"""Brings a database of any earlier version to today's, step by step; never changes a released step.

Rule 1: a step and the row that records it are one transaction, so what is interrupted has not begun.
Rule 2: a step holds its own SQL; it means the same for ever, whatever `schema` says today.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from sqlalchemy import insert, text

from gpuwatch.errors import StoreError
from gpuwatch.store.dialects import dialect_of
from gpuwatch.store.schema import MIGRATION

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from gpuwatch.store.database import Database
    from gpuwatch.store.dialects import Dialect


def _tables(says: Dialect) -> str:
    return f"""
CREATE TABLE alert (
  rule TEXT NOT NULL, labels TEXT NOT NULL, state TEXT NOT NULL, active_at_ms BIGINT NOT NULL,
  record TEXT NOT NULL,
  PRIMARY KEY (rule, labels)
);

-- Who follows the history by id must never see an id again. `digest` is of rule, labels, was and now:
-- a change that is written twice is one row. `record` is the alert, without its long texts.
CREATE TABLE transition (
  id {says.serial}, at_ms BIGINT NOT NULL, digest BIGINT NOT NULL,
  rule TEXT NOT NULL, was TEXT, now TEXT, record TEXT NOT NULL
);
CREATE UNIQUE INDEX transition_once ON transition (at_ms, digest);

CREATE TABLE server (name TEXT PRIMARY KEY, phase TEXT NOT NULL, record TEXT NOT NULL);

CREATE TABLE remediation (
  id TEXT PRIMARY KEY, server TEXT NOT NULL, phase TEXT NOT NULL, created_at_ms BIGINT NOT NULL,
  record TEXT NOT NULL
);
CREATE INDEX remediation_created ON remediation (created_at_ms);

CREATE TABLE notification (
  seq {says.serial}, id TEXT NOT NULL UNIQUE, receiver TEXT NOT NULL,
  created_at_ms BIGINT NOT NULL, next_attempt_at_ms BIGINT NOT NULL, attempts BIGINT NOT NULL,
  sent_at_ms BIGINT, gave_up_at_ms BIGINT, error TEXT NOT NULL, body TEXT NOT NULL
);
CREATE INDEX notification_unsent ON notification (receiver, seq)
  WHERE sent_at_ms IS NULL AND gave_up_at_ms IS NULL;
CREATE INDEX notification_sent ON notification (receiver, sent_at_ms);
CREATE INDEX notification_created ON notification (created_at_ms);

CREATE TABLE receiver (name TEXT PRIMARY KEY, record TEXT NOT NULL);

CREATE TABLE refusal (
  id {says.serial}, server TEXT NOT NULL, alert TEXT NOT NULL, code TEXT NOT NULL, record TEXT NOT NULL
);

CREATE TABLE setting (name TEXT PRIMARY KEY, value TEXT NOT NULL);

-- Who asked for what; a request that is written twice is one row.
CREATE TABLE audit (
  id {says.serial}, at_ms BIGINT NOT NULL, who TEXT NOT NULL, what TEXT NOT NULL, record TEXT NOT NULL,
  UNIQUE (at_ms, who, what, record)
)
"""


def _views(says: Dialect) -> str:
    return f"""
CREATE VIEW v_alerts AS
SELECT rule, state, {says.json("record", "value")} AS value, labels,
  {says.utc("active_at_ms")} AS active_at,
  {says.utc(f"CAST({says.json('record', 'fired_at_ms')} AS BIGINT)")} AS fired_at,
  {says.json("record", "annotations", "summary")} AS summary
FROM alert ORDER BY active_at_ms;

CREATE VIEW v_history AS
SELECT id, {says.utc("at_ms")} AS at, rule, was, now, {says.json("record", "value")} AS value,
  {says.json("record", "labels")} AS labels, {says.json("record", "annotations", "summary")} AS summary
FROM transition ORDER BY id;

CREATE VIEW v_remediations AS
SELECT id, server, phase, {says.json("record", "plan", "alert")} AS alert,
  {says.json("record", "plan", "mode")} AS mode, {says.json("record", "plan", "dry_run")} AS dry_run,
  {says.json("record", "outcome")} AS outcome, {says.utc("created_at_ms")} AS created_at,
  {says.utc(f"CAST({says.json('record', 'since_ms')} AS BIGINT)")} AS since
FROM remediation ORDER BY created_at_ms DESC;

CREATE VIEW v_notifications AS
SELECT seq, receiver, {says.json("body", "alert")} AS alert, {says.json("body", "state")} AS state,
  {says.json("body", "annotations", "summary")} AS summary,
  CASE WHEN sent_at_ms IS NOT NULL THEN 'sent' WHEN gave_up_at_ms IS NOT NULL THEN 'given up'
    ELSE 'waiting' END AS delivery,
  attempts, error, {says.utc("created_at_ms")} AS created_at, {says.utc("sent_at_ms")} AS sent_at
FROM notification ORDER BY seq;

CREATE VIEW v_audit AS
SELECT id, {says.utc("at_ms")} AS at, who, what, record AS facts FROM audit ORDER BY id
"""


def first_state_schema(connection: Connection) -> None:
    """Version 1: a row a record, and views for people."""
    says = dialect_of(connection)
    # Not executescript, which would commit first.
    for statement in (_tables(says) + ";" + _views(says)).split(";\n"):
        connection.exec_driver_sql(statement)


def starts_of_servers(connection: Connection) -> None:
    """Version 2: how each start of a server went."""
    says = dialect_of(connection)
    record_ms = {
        name: says.utc(f"CAST({says.json('record', name)} AS BIGINT)")
        for name in ("healthy_at_ms", "ended_at_ms")
    }
    connection.exec_driver_sql(
        "CREATE TABLE start (server TEXT NOT NULL, began_at_ms BIGINT NOT NULL, outcome TEXT NOT NULL,"
        " configuration TEXT NOT NULL, record TEXT NOT NULL, PRIMARY KEY (server, began_at_ms))"
    )
    connection.exec_driver_sql(f"""
CREATE VIEW v_starts AS
SELECT server, {says.utc("began_at_ms")} AS began_at, outcome, {record_ms["healthy_at_ms"]} AS healthy_at,
  {record_ms["ended_at_ms"]} AS ended_at, {says.json("record", "failure")} AS failure,
  {says.json("record", "facts")} AS facts, {says.json("record", "version")} AS version, configuration,
  {says.json("record", "kv_cache_tokens")} AS kv_cache_tokens, {says.json("record", "figures")} AS figures
FROM start ORDER BY began_at_ms DESC""")


def revisions_of_settings(connection: Connection) -> None:
    """Version 3: the arguments that servers were given, and who gave them."""
    says = dialect_of(connection)
    connection.exec_driver_sql(
        "CREATE TABLE revision (server TEXT NOT NULL, number BIGINT NOT NULL, created_at_ms BIGINT NOT NULL,"
        " record TEXT NOT NULL, PRIMARY KEY (server, number))"
    )
    connection.exec_driver_sql(f"""
CREATE VIEW v_revisions AS
SELECT server, number, {says.utc("created_at_ms")} AS created_at, {says.json("record", "by")} AS made_by,
  {says.json("record", "why")} AS why, {says.json("record", "parent")} AS parent,
  {says.json("record", "arguments")} AS arguments
FROM revision ORDER BY server, number""")


Step = Callable[["Connection"], None]
STATE_STEPS: Final[tuple[Step, ...]] = (first_state_schema, starts_of_servers, revisions_of_settings)


def version_of(connection: Connection) -> int:
    """The version that a database has; 0 if it holds nothing of ours yet."""
    tables = dialect_of(connection).tables
    made = connection.execute(text(f"SELECT count(*) FROM {tables} WHERE name = 'migration'"))
    if not made.scalar_one():
        return 0
    newest = connection.exec_driver_sql("SELECT coalesce(max(version), 0) FROM migration").scalar_one()
    return int(newest)


def migrate(database: Database, steps: Sequence[Step]) -> None:
    """Take every step that is missing. StoreError of kind `newer`: a later gpuwatch made the database."""
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
            "CREATE TABLE IF NOT EXISTS migration (version BIGINT PRIMARY KEY, name TEXT NOT NULL)"
        )
        step(connection)
        connection.execute(insert(MIGRATION), {"version": version + 1, "name": step.__name__})
        return True


def check(database: Database, steps: Sequence[Step]) -> None:
    """StoreError unless the database has today's version, for those who may not migrate it."""
    with database.reading("read the schema's version") as connection:
        version = version_of(connection)
    _refuse_newer(database, version, len(steps))
    if version < len(steps):
        raise StoreError(
            f"{database.name} has schema version {version}, older than this gpuwatch's"
            f" {len(steps)}; to cure it, start the daemon, which brings it up to date"
        )


def _refuse_newer(database: Database, version: int, known: int) -> None:
    if version > known:
        raise StoreError(
            f"{database.name} has schema version {version}, newer than this gpuwatch's {known};"
            " to cure it, install the gpuwatch that made it or a later one, or move the file away",
            kind="newer",
        )
