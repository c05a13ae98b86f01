"""How a database comes to have today's tables, and what happens when that is cut short."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import pytest

from gpuwatch.errors import StoreError
from gpuwatch.store import Store, open_read_only
from gpuwatch.store.database import own
from gpuwatch.store.migrations import STEPS, first_schema, migrate
from gpuwatch.store.schema import TABLES


def shape(path):
    with closing(sqlite3.connect(path)) as connection:
        return sorted(connection.execute("SELECT type, name, sql FROM sqlite_master").fetchall())


def versions(path):
    with closing(sqlite3.connect(path)) as connection:
        return connection.execute("SELECT version, name FROM migration").fetchall()


def second_step(connection):
    connection.exec_driver_sql("CREATE TABLE later (id INTEGER PRIMARY KEY)")
    connection.exec_driver_sql("INSERT INTO later VALUES (1)")


def broken_step(connection):
    second_step(connection)
    connection.exec_driver_sql("ALTER TABLE sample RENAME TO old_sample")
    connection.exec_driver_sql("INSERT INTO nowhere VALUES (1)")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "gpuwatch.db"


def migrated(path, steps):
    with closing(own(path, busy_ms=100)) as database:
        migrate(database, steps)


def test_a_new_database_has_the_tables_that_the_code_names(path):
    Store(path).close()
    with closing(sqlite3.connect(path)) as connection:
        for table in TABLES:
            columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table.name})")]
            assert columns == [column.name for column in table.c], table.name


def test_every_step_is_recorded_with_its_name(path):
    migrated(path, [first_schema, second_step])
    assert versions(path) == [(1, "first_schema"), (2, "second_step")]


def test_opening_twice_changes_nothing(path):
    Store(path).close()
    before = shape(path)
    Store(path).close()
    assert shape(path) == before
    assert len(versions(path)) == len(STEPS)


def test_a_step_that_fails_leaves_the_earlier_version_whole_and_usable(path):
    Store(path).close()
    before = shape(path)
    with pytest.raises(StoreError, match=r"no such table: nowhere"):
        migrated(path, [*STEPS, broken_step])
    assert shape(path) == before
    Store(path).close()


def test_a_step_that_failed_is_taken_once_it_can_be(path):
    Store(path).close()
    with pytest.raises(StoreError):
        migrated(path, [*STEPS, broken_step])
    migrated(path, [*STEPS, second_step])
    assert versions(path)[-1] == (len(STEPS) + 1, "second_step")


def test_a_first_step_that_fails_leaves_an_empty_file(path):
    with pytest.raises(StoreError):
        migrated(path, [broken_step])
    assert shape(path) == []
    Store(path).close()


@pytest.mark.parametrize("opened", [Store, open_read_only])
def test_a_database_of_a_newer_gpuwatch_is_refused_and_left_alone(path, opened):
    migrated(path, [*STEPS, second_step])
    before = shape(path)
    with pytest.raises(StoreError, match=r"newer than this gpuwatch's .* install") as refused:
        opened(path)
    assert refused.value.kind == "newer"
    assert shape(path) == before


def test_a_reader_says_that_the_daemon_has_to_migrate_first(path):
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE unrelated (id)")
    with pytest.raises(StoreError, match="start the daemon, which brings it up to date"):
        open_read_only(path)
