"""What the disk does not take yet: it waits in its order and bounded, and nobody waits with it."""

from __future__ import annotations

import dataclasses
import logging
import random
import shutil
import sqlite3
import threading
from contextlib import closing, contextmanager

import msgspec
import pytest

from gpuwatch.config import StoreSettings
from gpuwatch.config.size import Size
from gpuwatch.errors import StoreError
from gpuwatch.frames.rowtext import HOUR_MS
from gpuwatch.promql import Matcher
from gpuwatch.records import (
    Alert,
    AlertState,
    Labels,
    Notification,
    Refusal,
    ServerPhase,
    ServerState,
)
from gpuwatch.store import (
    METRICS_DB,
    STATE_DB,
    Changes,
    Disk,
    Store,
    leave_wish,
    open_history,
    open_read_only,
)
from gpuwatch.store import writer as writer_module
from gpuwatch.store.sieve import Sieve

SECOND, MINUTE = 1000, 60_000
MIB = 2**20
NOW_MS = 1_795_252_500_000
NOTHING = Changes()
ALL = Matcher("__name__", "=~", ".*")
POWER = Labels.of("gpu_power_draw_watts", gpu="0")
WIDE = [Labels.of("gpu", n=str(n)) for n in range(500)]
ROOMY = StoreSettings(min_free=Size(0))


def alert(**labels):
    return Alert(
        rule="GpuMemoryHigh",
        labels=Labels.of(**labels),
        annotations={},
        state=AlertState.FIRING,
        value=0.97,
        active_at_ms=1000,
        fired_at_ms=2000,
    )


def server(seen_at_ms=0, phase=ServerPhase.DOWN):
    return ServerState(name="qwen", phase=phase, since_ms=5, seen_at_ms=seen_at_ms)


def message(name, **more):
    return Notification(
        id=name, receiver="slack", body="{}", created_at_ms=1000, next_attempt_at_ms=0, **more
    )


REFUSED = Refusal(server="qwen", alert="ServerDown", alert_labels=Labels(), code="cooling_down")


def opened(folder, settings=ROOMY, now_ms=NOW_MS):
    return Store(HOUR_MS, Disk(folder, settings, "gpu-a", now_ms))


@pytest.fixture
def store(tmp_path):
    with closing(opened(tmp_path)) as found:
        yield found


def tick(store, at_ms, value=1.0, **changes):
    store.append("nvml", at_ms, [POWER], [value])
    store.save(Changes(**changes), at_ms)


def instants(folder):
    with open_history(folder) as history:
        return [at_ms for track in history.tracks([ALL], 0, 1 << 53) for at_ms in track.at_ms.tolist()]


def settings(folder):
    with open_read_only(folder) as rows:
        return rows.settings()


def plain(folder, query, name=STATE_DB):
    with closing(sqlite3.connect(folder / name)) as connection:
        return connection.execute(query).fetchall()


# A disk that is slow


class StuckDisk(Disk):
    """A disk that does not answer until it is let go; counts what it is asked to do."""

    def __init__(self, *given):
        super().__init__(*given)
        self.let_go = threading.Event()
        self.asked = threading.Event()
        self.answered = 0

    def save_state(self, changes, mirror, now_ms):
        self.asked.set()
        assert self.let_go.wait(30)
        found = super().save_state(changes, mirror, now_ms)
        self.answered += 1
        return found


@pytest.fixture
def stuck(tmp_path):
    disk = StuckDisk(tmp_path, ROOMY, "gpu-a", NOW_MS)
    store = Store(HOUR_MS, disk)
    store.start()
    yield store, disk
    disk.let_go.set()
    store.close()


def test_nobody_waits_for_a_disk_that_does_not_answer(stuck, tmp_path):
    store, disk = stuck
    for second in range(60):
        tick(store, NOW_MS + second, settings={"tick": str(second)}, alerts=[alert(n=str(second))])
    assert store.settings() == {"tick": "59"}
    assert len(store.active_alerts()) == 60
    (series,) = store.select([ALL], 0, NOW_MS + HOUR_MS)
    assert len(series.at_ms) == 60
    assert disk.asked.wait(30)
    disk.let_go.set()
    assert store.is_saved(30_000)
    assert settings(tmp_path) == {"tick": "59"}


def test_what_is_on_its_way_is_not_said_to_be_saved(stuck):
    store, disk = stuck
    assert store.is_saved(0)
    tick(store, NOW_MS, settings={"mode": "auto"})
    assert not store.is_saved(0)
    disk.let_go.set()
    assert store.is_saved(30_000)


def test_a_disk_silent_for_ten_seconds_counts_as_one_that_fails(stuck):
    """Then nobody waits to be sure that something is saved; once it answers, it is well again."""
    store, disk = stuck
    tick(store, NOW_MS, settings={"mode": "auto"})
    assert disk.asked.wait(30)
    tick(store, NOW_MS + 9 * SECOND, settings={"mode": "observe"})
    assert store.faults()[STATE_DB] == ""
    tick(store, NOW_MS + 11 * SECOND)
    assert "has not answered for 11 s" in store.faults()[STATE_DB]
    assert store.is_saved(0)
    disk.let_go.set()
    store.close()
    assert store.faults()[STATE_DB] == ""


def test_closing_writes_what_is_held(stuck, tmp_path):
    store, disk = stuck
    for second in range(5):
        tick(store, NOW_MS + second * SECOND, settings={"tick": str(second)})
    disk.let_go.set()
    store.close()
    assert settings(tmp_path) == {"tick": "4"}
    assert instants(tmp_path) == [NOW_MS + second * SECOND for second in range(5)]


def test_closing_does_not_wait_for_ever(stuck, monkeypatch, caplog):
    store, disk = stuck
    monkeypatch.setattr(writer_module, "_CLOSE_S", 0.01)
    tick(store, NOW_MS, settings={"mode": "auto"})
    assert disk.asked.wait(30)
    store.close()
    assert "does not answer; what is not saved is lost" in caplog.text
    disk.let_go.set()  # it may answer before the process ends
    store._writer._thread.join(30)
    assert "internal error" not in caplog.text


def test_wishes_that_come_while_the_disk_is_slow_do_not_undo_what_the_daemon_sets(stuck, tmp_path):
    store, disk = stuck
    tick(store, NOW_MS, settings={"mode": "auto"})
    assert disk.asked.wait(30)
    leave_wish(tmp_path, {"paused": "true"})
    tick(store, NOW_MS + SECOND, settings={"mode": "observe"})
    disk.let_go.set()
    assert store.is_saved(30_000)
    tick(store, NOW_MS + 2 * SECOND, settings={"tick": "1"})
    assert store.is_saved(30_000)
    assert store.settings() == settings(tmp_path) == {"mode": "observe", "paused": "true", "tick": "1"}


def test_sources_append_and_the_tick_saves_while_a_thread_writes(tmp_path):
    with closing(opened(tmp_path)) as store:
        store.start()

        def collect(target):
            for n in range(200):
                store.append(target, NOW_MS + n, [Labels.of("up", source=target)], [float(n)])

        sources = [threading.Thread(target=collect, args=(f"source {n}",)) for n in range(4)]
        for source in sources:
            source.start()
        for second in range(50):
            store.save(Changes(settings={"tick": str(second)}), NOW_MS + second)
        for source in sources:
            source.join()
    with open_history(tmp_path) as history:
        found = history.tracks([ALL], 0, NOW_MS + HOUR_MS)
    assert len(found) == 4
    assert all(track.values.tolist() == [float(n) for n in range(200)] for track in found)
    assert settings(tmp_path) == {"tick": "49"}


# A disk that fails


@contextmanager
def held_by_another(folder, name):
    with closing(sqlite3.connect(folder / name, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


def impatient(store):
    """Have its connections wait 10 ms for another writer, not two seconds."""
    disk = store._writer.disk
    for opened_file in (disk.state, disk.metrics):
        with opened_file._database.reading("be impatient") as connection:
            connection.exec_driver_sql("PRAGMA busy_timeout = 10")


@pytest.mark.parametrize("name", [STATE_DB, METRICS_DB])
def test_a_file_that_another_program_holds_is_told_and_outlived(store, tmp_path, name):
    tick(store, NOW_MS, settings={"tick": "0"})
    impatient(store)
    with held_by_another(tmp_path, name):
        for second in (1, 2):
            tick(store, NOW_MS + second * SECOND, settings={"tick": str(second)})
            other = {STATE_DB: METRICS_DB, METRICS_DB: STATE_DB}[name]
            assert "end the other program" in store.faults()[name]
            assert store.faults()[other] == ""
            assert store.settings() == {"tick": str(second)}
        assert store.is_saved(0), "nobody waits for it" if name == STATE_DB else "state is saved"
    tick(store, NOW_MS + 3 * SECOND)
    assert store.faults() == {STATE_DB: "", METRICS_DB: ""}
    assert settings(tmp_path) == {"tick": "2"}
    assert instants(tmp_path) == [NOW_MS + second * SECOND for second in range(4)]


def test_changes_are_written_in_their_order_once_the_disk_takes_them(store, tmp_path):
    impatient(store)
    with held_by_another(tmp_path, STATE_DB):
        tick(
            store, NOW_MS, alerts=[alert(gpu="0"), alert(gpu="1")], notifications=[message("b"), message("a")]
        )
        tick(store, NOW_MS + 1, ended=[alert(gpu="0")], settings={"paused": "true"})
        tick(store, NOW_MS + 2, notifications=[message("b", attempts=1)], settings={"paused": None})
    tick(store, NOW_MS + 3)
    with open_read_only(tmp_path) as rows:
        assert rows.active_alerts() == [alert(gpu="1")]
        assert [(n.id, n.attempts) for n in rows.unsent("slack")] == [("b", 1), ("a", 0)]
        assert rows.settings() == {}


def test_scrapes_that_no_disk_takes_are_bounded_and_the_oldest_go_first(store, tmp_path, monkeypatch):
    monkeypatch.setattr(writer_module, "_MAX_HELD_BYTES", 100 * len("[300.0]"))
    impatient(store)
    with held_by_another(tmp_path, METRICS_DB):
        for second in range(150):
            tick(store, NOW_MS + second * SECOND, 300.0)
        assert store.dropped_scrapes == 50
    tick(store, NOW_MS + 150 * SECOND, 300.0)
    assert store.dropped_scrapes == 51
    assert instants(tmp_path) == [NOW_MS + second * SECOND for second in range(51, 151)]


def test_an_outage_of_hours_keeps_the_state_and_no_more_than_that(store, tmp_path, monkeypatch):
    """Beyond a number of changes the rows that they left behind are written instead."""
    monkeypatch.setattr(writer_module, "_MAX_CHANGES", 10)
    tick(store, NOW_MS, alerts=[alert(gpu="0")], settings={"mode": "auto"})
    impatient(store)
    with held_by_another(tmp_path, STATE_DB):
        for second in range(1, 35):
            tick(
                store,
                NOW_MS + second * SECOND,
                settings={"tick": str(second)},
                ended=[alert(gpu="0")] if second == 2 else [],
                alerts=[alert(gpu="1")] if second == 3 else [],
                notifications=[message(str(second))],
            )
        assert len(store._writer._changes) <= 10
    tick(store, NOW_MS + 40 * SECOND)
    assert store.faults()[STATE_DB] == ""
    with open_read_only(tmp_path) as rows:
        assert rows.settings() == {"mode": "auto", "tick": "34"}
        assert rows.active_alerts() == [alert(gpu="1")]
        assert [n.id for n in rows.unsent("slack", limit=100)] == [str(n) for n in range(1, 35)]


def test_a_bug_in_writing_is_told_and_does_not_end_the_writing(tmp_path, caplog):
    class Broken(Disk):
        broken = True

        def save_rows(self, rows, now_ms):
            if self.broken:
                raise ZeroDivisionError
            super().save_rows(rows, now_ms)

    disk = Broken(tmp_path, ROOMY, "gpu-a", NOW_MS)
    with closing(Store(HOUR_MS, disk)) as store:
        store.start()
        for second in range(3):
            tick(store, NOW_MS + second * SECOND, settings={"tick": str(second)})
            assert store.is_saved(30_000)
        with store._writer._flushing:
            assert "internal error: ZeroDivisionError" in store.faults()[METRICS_DB]
        disk.broken = False
    said = [record.levelno for record in caplog.records if METRICS_DB in record.getMessage()]
    assert said == [logging.ERROR]
    assert instants(tmp_path) == [NOW_MS + second * SECOND for second in range(3)]


# A full disk


def limited(folder, max_bytes):
    return opened(folder, StoreSettings(max_size=Size(max_bytes), min_free=Size(0)))


def test_a_file_at_its_limit_is_a_ring_of_the_newest_samples(tmp_path, monkeypatch):
    """Hours are sealed as they end; the oldest frames make room, and no newest sample is ever refused."""
    monkeypatch.setattr("gpuwatch.store.sealer.run", seal_here)
    dice = random.Random(5)
    start_ms = NOW_MS // HOUR_MS * HOUR_MS
    with closing(limited(tmp_path, 3 * MIB)) as store:
        for minute in range(12 * 60):
            at_ms = start_ms + minute * MINUTE
            store.append("nvml", at_ms, WIDE, [dice.random() for _ in WIDE])
            store.save(NOTHING, at_ms)
            if minute % 60 == 5:
                store.seal(at_ms)
            assert store.faults() == {STATE_DB: "", METRICS_DB: ""}, minute
            assert store._writer.disk.metrics.file_bytes() <= 3 * MIB
    assert (tmp_path / METRICS_DB).stat().st_size <= 3 * MIB
    found = sorted(set(instants(tmp_path)))
    newest = start_ms + (12 * 60 - 1) * MINUTE
    assert found == list(range(found[0], newest + 1, MINUTE))
    assert found[0] > start_ms
    assert newest - found[0] >= 2 * HOUR_MS


def seal_here(path, before_ms, now_ms):
    from gpuwatch.frames import sealing

    return list(sealing.seal(path, before_ms, now_ms))


def test_pruning_keeps_room_below_the_limit_by_the_oldest_frames(tmp_path, monkeypatch):
    monkeypatch.setattr("gpuwatch.store.sealer.run", seal_here)
    with closing(limited(tmp_path, 64 * MIB)) as store:
        tick(store, NOW_MS)
        size = MIB
        with store._writer.disk.metrics._database.writing("fill") as connection:
            connection.exec_driver_sql(
                "INSERT INTO frame (target, from_ms, to_ms, layout, n, data) VALUES (1, ?, ?, 1, 1, ?)",
                [(NOW_MS - n * HOUR_MS, NOW_MS - n * HOUR_MS, bytes(size)) for n in range(60)],
            )
        assert store._writer.disk.metrics.used_bytes() > 60 * MIB
        store.prune(NOW_MS)
        assert 30 * MIB < store._writer.disk.metrics.used_bytes() <= 48 * MIB
        left = plain(tmp_path, "SELECT from_ms FROM frame ORDER BY from_ms DESC", METRICS_DB)
        assert left == [(NOW_MS - n * HOUR_MS,) for n in range(len(left))]
    assert instants_of_rows(tmp_path) == [NOW_MS]


def instants_of_rows(folder):
    return [at_ms for (at_ms,) in plain(folder, "SELECT at_ms FROM hot ORDER BY id", METRICS_DB)]


def test_hourly_figures_give_way_before_the_newest_rows_do(tmp_path):
    """A file that they have filled alone is no reason to forget what rules look back on."""
    with closing(limited(tmp_path, 20 * MIB)) as store:
        for second in range(600):
            store.append("nvml", NOW_MS + second * SECOND, WIDE[:50], [1.5] * 50)
        store.save(NOTHING, NOW_MS)
        with store._writer.disk.metrics._database.writing("fill") as connection:
            connection.exec_driver_sql(
                "INSERT INTO hourly VALUES (?, ?, 60, 0.5, 0.5, 0.5, 0.5)",
                [(hour * HOUR_MS, series) for hour in range(400) for series in range(500)],
            )
        assert store._writer.disk.metrics.used_bytes() > 8 * MIB
        store.prune(NOW_MS)
        assert store._writer.disk.metrics.used_bytes() <= 4 * MIB
    assert len(instants_of_rows(tmp_path)) == 600


def test_a_filesystem_with_too_little_left_is_not_filled_further(tmp_path, monkeypatch):
    """The file stays as large as it is, and is a ring of the newest samples."""
    with closing(opened(tmp_path)) as store:
        for second in range(300):
            store.append("nvml", NOW_MS + second * SECOND, WIDE, [second / 7] * len(WIDE))
        store.save(NOTHING, NOW_MS)
    greedy = msgspec.structs.replace(ROOMY, min_free=Size(1 << 60))
    start_ms = NOW_MS + HOUR_MS
    with closing(opened(tmp_path, greedy, start_ms)) as store:
        size = store._writer.disk.metrics.file_bytes()
        for second in range(700):
            at_ms = start_ms + second * SECOND
            store.append("nvml", at_ms, WIDE, [second / 7] * len(WIDE))
            store.save(NOTHING, at_ms)
            assert store.faults()[METRICS_DB] == "", second
            assert store._writer.disk.metrics.file_bytes() <= size
        assert not (tmp_path / "ballast").exists()
    found = instants_of_rows(tmp_path)
    assert found[-1] == start_ms + 699 * SECOND
    assert found[0] > NOW_MS
    assert found == sorted(found)


def test_the_ballast_is_given_up_for_state_on_a_full_disk(store, tmp_path):
    tick(store, NOW_MS + MINUTE)
    assert (tmp_path / "ballast").exists()
    with store._writer.disk.state._database.reading("set a limit") as connection:
        connection.exec_driver_sql("PRAGMA max_page_count = 1")
    tick(
        store, NOW_MS + MINUTE + SECOND, notifications=[message(str(n), error="x" * 500) for n in range(900)]
    )
    assert "full" in store.faults()[STATE_DB]
    assert not (tmp_path / "ballast").exists()
    assert len(store.unsent("slack", limit=1000)) == 900
    with store._writer.disk.state._database.reading("set no limit") as connection:
        connection.exec_driver_sql("PRAGMA max_page_count = 1000000")
    tick(store, NOW_MS + MINUTE + 2 * SECOND)
    assert store.faults()[STATE_DB] == ""
    assert plain(tmp_path, "SELECT count(*) FROM notification") == [(900,)]


# A disk that is gone, read-only or damaged


def test_a_folder_that_is_deleted_under_the_daemon_is_told_and_made_anew(store, tmp_path):
    tick(store, NOW_MS, settings={"mode": "auto"}, alerts=[alert(gpu="0")])
    for path in tmp_path.glob("*.db*"):
        path.unlink()
    tick(store, NOW_MS + 1, settings={"tick": "1"})
    for second in range(1, 40):
        tick(store, NOW_MS + second * SECOND)
    assert store.faults() == {STATE_DB: "", METRICS_DB: ""}
    with open_read_only(tmp_path) as rows:
        assert rows.settings() == {"mode": "auto", "tick": "1"}
        assert rows.active_alerts() == [alert(gpu="0")]
    assert NOW_MS + 39 * SECOND in instants(tmp_path)


def overwrite(path, first_page=0, pages=None):
    """Fill pages of a closed file, or of one that is written back, with no sense."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    size = path.stat().st_size
    end = size if pages is None else min(size, (first_page + pages) * 4096)
    with path.open("r+b") as file:
        file.seek(first_page * 4096)
        file.write(b"\xff" * (end - first_page * 4096))


def aside(folder, name):
    return [path.name for path in folder.iterdir() if path.name.startswith(f"{name}.damaged-")]


@pytest.mark.parametrize("first_page", [0, 1, 5, 30])
def test_a_damaged_file_of_metrics_is_set_aside_at_the_start(tmp_path, caplog, first_page):
    """Wherever it is damaged: at once, or when what is damaged is met."""
    with closing(opened(tmp_path)) as store:
        for second in range(100):
            tick(store, NOW_MS + second * SECOND, settings={"mode": "auto"})
            store.append("wide", NOW_MS + second * SECOND, WIDE, [second / 7] * len(WIDE))
        store.save(NOTHING, NOW_MS)
    overwrite(tmp_path / METRICS_DB, first_page)
    with closing(opened(tmp_path)) as again:
        again.reload(NOW_MS + 100 * SECOND)
        for second in range(101, 140):
            tick(again, NOW_MS + second * SECOND)
        assert again.faults() == {STATE_DB: "", METRICS_DB: ""}
        assert again.settings() == {"mode": "auto"}
    assert len(aside(tmp_path, METRICS_DB)) == 1
    assert "is damaged" in caplog.text
    assert "a new one is begun" in caplog.text
    assert instants(tmp_path)[-1] == NOW_MS + 139 * SECOND
    assert plain(tmp_path, "PRAGMA integrity_check", METRICS_DB) == [("ok",)]


@pytest.mark.parametrize("seed", range(8))
def test_whatever_is_written_over_metrics_the_daemon_goes_on(tmp_path, seed):
    with closing(opened(tmp_path)) as store:
        for second in range(60):
            store.append("wide", NOW_MS + second * SECOND, WIDE[:200], [second / 7] * 200)
        store.save(Changes(settings={"mode": "auto"}), NOW_MS)
    path = tmp_path / METRICS_DB
    dice, data = random.Random(seed), bytearray(path.read_bytes())
    for _ in range(dice.randint(1, 20)):
        at = dice.randrange(len(data))
        junk = dice.choice([dice.randbytes(dice.randint(1, 5000)), bytes(dice.randint(1, 9000))])
        data[at : at + len(junk)] = junk
    path.write_bytes(data[: dice.choice([len(data), len(data), len(data) // 2, 4096])])
    with closing(opened(tmp_path)) as again:
        again.reload(NOW_MS + 100 * SECOND)
        for second in range(101, 140):
            tick(again, NOW_MS + second * SECOND, settings={"tick": str(second)})
        assert again.faults() == {STATE_DB: "", METRICS_DB: ""}
        assert again._writer.disk.metrics.newest_ms() == NOW_MS + 139 * SECOND


def test_a_file_of_metrics_that_is_damaged_as_it_runs_is_set_aside(store, tmp_path, caplog):
    for second in range(100):
        store.append("wide", NOW_MS + second * SECOND, WIDE, [second / 7] * len(WIDE))
    tick(store, NOW_MS + 100 * SECOND, settings={"mode": "auto"})
    overwrite(tmp_path / METRICS_DB, first_page=1)
    with store._writer.disk.metrics._database.reading("forget what is cached") as connection:
        connection.exec_driver_sql("PRAGMA shrink_memory")
    for second in range(101, 130):
        tick(store, NOW_MS + second * SECOND)
        store.append("other", NOW_MS + second * SECOND, [Labels.of("up", n=str(second))], [1.0])
    store.save(NOTHING, NOW_MS + 130 * SECOND)
    assert store.faults() == {STATE_DB: "", METRICS_DB: ""}
    assert len(aside(tmp_path, METRICS_DB)) == 1
    assert "a new one is begun" in caplog.text
    (series,) = store.select([Matcher("__name__", "=", POWER.metric)], 0, NOW_MS + HOUR_MS)
    assert len(series.at_ms) == 30, "memory has it all"
    store.close()
    assert plain(tmp_path, "PRAGMA integrity_check", METRICS_DB) == [("ok",)]
    assert NOW_MS + 129 * SECOND in instants(tmp_path)


def test_a_metrics_file_that_cannot_be_opened_is_tried_again_and_state_is_saved(tmp_path):
    with closing(opened(tmp_path)) as store:
        tick(store, NOW_MS, settings={"mode": "auto"})
    (tmp_path / METRICS_DB).rename(tmp_path / "away")
    (tmp_path / METRICS_DB).mkdir()
    with closing(opened(tmp_path)) as again:
        again.reload(NOW_MS)
        tick(again, NOW_MS + SECOND, settings={"tick": "1"})
        assert "metrics.db" in again.faults()[METRICS_DB]
        assert again.faults()[STATE_DB] == ""
        assert dict(plain(tmp_path, "SELECT name, value FROM setting")) == {"mode": "auto", "tick": "1"}
        (tmp_path / METRICS_DB).rmdir()
        (tmp_path / "away").rename(tmp_path / METRICS_DB)
        tick(again, NOW_MS + 2 * SECOND)
        assert again.faults()[METRICS_DB] != "", "not before fifteen seconds"
        tick(again, NOW_MS + 17 * SECOND)
        assert again.faults()[METRICS_DB] == ""
    assert instants(tmp_path) == [NOW_MS + second * SECOND for second in (0, 1, 2, 17)]


def test_while_wishes_cannot_be_read_remediation_is_paused(tmp_path):
    with closing(opened(tmp_path)) as store:
        tick(store, NOW_MS, settings={"mode": "auto"})
    (tmp_path / STATE_DB).rename(tmp_path / "away")
    (tmp_path / STATE_DB).mkdir()
    (tmp_path / STATE_DB / "file").write_text("")
    with closing(opened(tmp_path)) as again:
        assert int(again.settings()["paused_until_ms"]) > NOW_MS + 365 * 24 * HOUR_MS
        tick(again, NOW_MS)
        assert again.faults()[STATE_DB]
        assert again.is_saved(0)
        shutil.rmtree(tmp_path / STATE_DB)
        (tmp_path / "away").rename(tmp_path / STATE_DB)
        tick(again, NOW_MS + 20 * SECOND)
        assert again.faults()[STATE_DB] == ""
        assert again.settings() == {"mode": "auto"}


@pytest.mark.parametrize("name", [STATE_DB, METRICS_DB])
def test_a_file_of_a_newer_gpuwatch_is_refused_and_left_alone(tmp_path, name):
    opened(tmp_path).close()
    with closing(sqlite3.connect(tmp_path / name)) as connection, connection:
        connection.execute("INSERT INTO migration VALUES (99, 'later')")
    before = (tmp_path / name).read_bytes()
    with pytest.raises(StoreError, match=r"version 99, newer.*install") as refused:
        opened(tmp_path)
    assert refused.value.kind == "newer"
    assert (tmp_path / name).read_bytes() == before
    assert aside(tmp_path, name) == []
    with pytest.raises(StoreError, match="newer"), open_read_only(tmp_path):
        pass


# The sieve


def test_a_quiet_tick_is_no_news():
    sieve = Sieve()
    busy = Changes(alerts=[alert(gpu="0")], servers=[server()], remediations=[], refusals=[REFUSED])
    assert sieve.news(busy) == busy
    assert sieve.news(busy) is None
    assert sieve.news(NOTHING) is None


def test_what_changed_is_news_and_the_rest_is_not():
    sieve = Sieve()
    sieve.news(Changes(alerts=[alert(gpu="0"), alert(gpu="1")], servers=[server()]))
    changed = dataclasses.replace(alert(gpu="1"), value=0.5)
    found = sieve.news(
        Changes(
            alerts=[alert(gpu="0"), changed], servers=[server(phase=ServerPhase.SERVING)], settings={"a": "b"}
        )
    )
    assert found == Changes(
        alerts=[changed], servers=[server(phase=ServerPhase.SERVING)], remediations=[], settings={"a": "b"}
    )


def test_an_alert_that_ended_and_begins_again_as_it_was_is_news():
    sieve = Sieve()
    sieve.news(Changes(alerts=[alert()]))
    assert sieve.news(Changes(ended=[alert()])).ended == [alert()]
    assert sieve.news(Changes(alerts=[alert()])).alerts == [alert()]


def test_refusals_that_are_replaced_by_none_are_news_once():
    sieve = Sieve()
    assert sieve.news(Changes(refusals=[REFUSED])).refusals == [REFUSED]
    assert sieve.news(Changes(refusals=[REFUSED])) is None
    assert sieve.news(Changes(refusals=[])).refusals == []
    assert sieve.news(Changes(refusals=[])) is None
    assert sieve.news(Changes(refusals=[REFUSED])).refusals == [REFUSED]


def test_that_a_server_was_seen_is_news_every_fifteen_seconds():
    sieve = Sieve()
    news = [sieve.news(Changes(servers=[server(seen_at_ms=second * SECOND)])) for second in range(60)]
    assert [second for second, found in enumerate(news) if found] == [0, 15, 30, 45]


def test_a_quiet_tick_writes_no_state(store, tmp_path):
    busy = {"alerts": [alert()], "servers": [server()], "refusals": [REFUSED]}
    tick(store, NOW_MS, **busy)
    with closing(sqlite3.connect(tmp_path / STATE_DB)) as connection:
        before = connection.execute("PRAGMA data_version").fetchone()
        for second in range(10):
            tick(store, NOW_MS + second * SECOND, **busy)
        assert connection.execute("PRAGMA data_version").fetchone() == before
        tick(store, NOW_MS + 11 * SECOND, alerts=[alert(gpu="7")])
        assert connection.execute("PRAGMA data_version").fetchone() != before
