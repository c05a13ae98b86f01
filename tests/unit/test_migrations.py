"""How a database comes to have today's tables, and what happens when that is cut short."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest

from gpuwatch.errors import StoreError
from gpuwatch.store.database import own, read
from gpuwatch.store.metrics_schema import METRICS_STEPS
from gpuwatch.store.migrations import STATE_STEPS, check, migrate
from gpuwatch.store.schema import STATE_TABLES

EVERY = pytest.mark.parametrize("steps", [STATE_STEPS, METRICS_STEPS], ids=["state", "metrics"])


def shape(path):
    with closing(sqlite3.connect(path)) as connection:
        return sorted(connection.execute("SELECT type, name, sql FROM sqlite_master").fetchall(), key=repr)


def versions(path):
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("SELECT version, name FROM migration").fetchall()


def later_step(connection):
    connection.exec_driver_sql("CREATE TABLE later (id INTEGER PRIMARY KEY)")
    connection.exec_driver_sql("INSERT INTO later VALUES (1)")


def broken_step(connection):
    later_step(connection)
    connection.exec_driver_sql("ALTER TABLE migration RENAME TO old_migration")
    connection.exec_driver_sql("INSERT INTO nowhere VALUES (1)")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "some.db"


def migrated(path, steps):
    with closing(own(path, busy_ms=100)) as database:
        migrate(database, steps)


def test_a_new_database_has_the_tables_that_the_code_names(path):
    migrated(path, STATE_STEPS)
    with closing(sqlite3.connect(path)) as connection:
        for table in STATE_TABLES:
            columns = {row[1] for row in connection.execute(f"PRAGMA table_info({table.name})")}
            assert columns == {column.name for column in table.c}, table.name


@EVERY
def test_every_step_is_recorded_with_its_name(path, steps):
    migrated(path, [*steps, later_step])
    assert versions(path) == [(n, step.__name__) for n, step in enumerate([*steps, later_step], 1)]


@EVERY
def test_opening_twice_changes_nothing(path, steps):
    migrated(path, steps)
    before = shape(path)
    migrated(path, steps)
    assert shape(path) == before
    assert len(versions(path)) == len(steps)


@EVERY
def test_a_step_that_fails_leaves_the_earlier_version_whole_and_usable(path, steps):
    migrated(path, steps)
    before = shape(path)
    with pytest.raises(StoreError, match=r"no such table: nowhere"):
        migrated(path, [*steps, broken_step])
    assert shape(path) == before
    migrated(path, steps)


def test_a_step_that_failed_is_taken_once_it_can_be(path):
    migrated(path, STATE_STEPS)
    with pytest.raises(StoreError):
        migrated(path, [*STATE_STEPS, broken_step])
    migrated(path, [*STATE_STEPS, later_step])
    assert versions(path)[-1] == (len(STATE_STEPS) + 1, "later_step")


def test_a_first_step_that_fails_leaves_an_empty_file(path):
    with pytest.raises(StoreError):
        migrated(path, [broken_step])
    assert shape(path) == []
    migrated(path, STATE_STEPS)


@EVERY
def test_a_database_of_a_newer_gpuwatch_is_refused_and_left_alone(path, steps):
    migrated(path, [*steps, later_step])
    before = shape(path)
    with pytest.raises(StoreError, match=r"newer than this gpuwatch's .* install") as refused:
        migrated(path, steps)
    assert refused.value.kind == "newer"
    with closing(read(path)) as database, pytest.raises(StoreError, match="newer"):
        check(database, steps)
    assert shape(path) == before


def test_a_reader_says_that_the_daemon_has_to_migrate_first(path):
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE unrelated (id)")
    with (
        closing(read(path)) as database,
        pytest.raises(StoreError, match="start the daemon, which brings it up to date"),
    ):
        check(database, STATE_STEPS)
