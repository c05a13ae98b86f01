"""Hours become frames: in process, by the process of its own, and whatever cuts it short."""

from __future__ import annotations

import math
import sqlite3
from contextlib import closing

import numpy as np
import pytest

from gpuwatch.config import StoreSettings
from gpuwatch.config.size import Size
from gpuwatch.errors import StoreError
from gpuwatch.frames import sealing
from gpuwatch.frames.frame import Frame
from gpuwatch.frames.rowtext import HOUR_MS
from gpuwatch.promql import Matcher
from gpuwatch.records import STALE, Labels
from gpuwatch.store import METRICS_DB, Changes, Disk, Store, open_history, sealer
from gpuwatch.store.metrics import Metrics

SECOND, MINUTE = 1000, 60_000
NOW_MS = 1_795_252_500_000 // HOUR_MS * HOUR_MS
NOTHING = Changes()
ALL = Matcher("__name__", "=~", ".*")
POWER = Labels.of("gpu_power_draw_watts", gpu="0")
HEAT = Labels.of("gpu_temperature_celsius", gpu="0")
UP = Labels.of("up")


def opened(folder, now_ms=NOW_MS):
    return Store(HOUR_MS, Disk(folder, StoreSettings(min_free=Size(0)), "gpu-a", now_ms))


@pytest.fixture
def store(tmp_path):
    with closing(opened(tmp_path)) as found:
        yield found


def fill(store, first_ms, last_ms, step_ms=MINUTE):
    for at_ms in range(first_ms, last_ms + 1, step_ms):
        store.append("nvml", at_ms, [POWER, HEAT], [float(at_ms // SECOND % 977), 60.0])
        store.append("own", at_ms, [UP], [1.0])
    store.save(NOTHING, last_ms)


def sealed(folder, before_ms, now_ms=None):
    now_ms = before_ms if now_ms is None else now_ms
    return list(sealing.seal(folder / METRICS_DB, before_ms, now_ms))


def columns(frame):
    """What a sealed frame holds: instants, and by series id the values that are present."""
    whole = Frame(frame.data)
    values, present = whole.columns()
    assert (whole.n, whole.width) == (frame.n, len(frame.series))
    return whole.at_ms().tolist(), {
        one: values[:, column][... if present is None else present[:, column]].tolist()
        for column, one in enumerate(frame.series)
    }


def plain(folder, query):
    with closing(sqlite3.connect(folder / METRICS_DB)) as connection:
        return connection.execute(query).fetchall()


def change(folder, statement, *values):
    with closing(sqlite3.connect(folder / METRICS_DB)) as connection, connection:
        connection.execute(statement, values)


def samples(folder):
    with open_history(folder) as history:
        found = history.tracks([ALL], 0, 1 << 53)
        assert history.damaged == []
    return {t.labels: list(zip(t.at_ms.tolist(), t.values.tolist(), strict=True)) for t in found}


def ids(folder):
    return {text: number for number, text in plain(folder, "SELECT id, metric FROM series")}


# One hour


def test_an_hour_of_a_target_is_one_frame(store, tmp_path):
    fill(store, NOW_MS, NOW_MS + HOUR_MS - SECOND, step_ms=SECOND)
    own, nvml = sorted(sealed(tmp_path, NOW_MS + HOUR_MS), key=lambda one: len(one.frames[0].series))
    (frame,) = nvml.frames
    assert (frame.from_ms, frame.to_ms, frame.n) == (NOW_MS, NOW_MS + HOUR_MS - SECOND, 3600)
    at_ms, values = columns(frame)
    assert at_ms == list(range(NOW_MS, NOW_MS + HOUR_MS, SECOND))
    assert values == {
        ids(tmp_path)[POWER.metric]: [float(at // SECOND % 977) for at in at_ms],
        ids(tmp_path)[HEAT.metric]: [60.0] * 3600,
    }
    assert columns(own.frames[0])[1] == {ids(tmp_path)["up"]: [1.0] * 3600}
    assert (nvml.upto_id, own.upto_id) == (7199, 7200)


def test_only_the_oldest_hour_is_sealed_at_once(store, tmp_path):
    fill(store, NOW_MS - 10 * MINUTE, NOW_MS + 3 * HOUR_MS)
    for one in sealed(tmp_path, NOW_MS + 3 * HOUR_MS):
        assert [(frame.from_ms, frame.to_ms) for frame in one.frames] == [
            (NOW_MS - 10 * MINUTE, NOW_MS - MINUTE)
        ]


def test_an_hour_that_is_not_over_is_left_alone(store, tmp_path):
    fill(store, NOW_MS, NOW_MS + 30 * MINUTE)
    assert sealed(tmp_path, NOW_MS) == []
    assert sealed(tmp_path, NOW_MS, NOW_MS + 40 * MINUTE) == []


def test_an_empty_file_gives_nothing(store, tmp_path):
    assert sealed(tmp_path, NOW_MS) == []
    assert store.seal(NOW_MS) == 0


def test_a_slow_source_is_sealed_with_its_own_hour(store, tmp_path):
    """Its last scrapes of the hour stand behind what others gave in the next one."""
    for at_ms in range(NOW_MS, NOW_MS + HOUR_MS + 5 * MINUTE, MINUTE):
        store.append("own", at_ms, [UP], [1.0])
        store.append("nvml", at_ms - 50 * SECOND, [POWER], [1.0])
    store.save(NOTHING, NOW_MS)
    for _ in range(2):
        for one in sealed(tmp_path, NOW_MS + HOUR_MS, NOW_MS + HOUR_MS + 5 * MINUTE):
            with store._writer.disk._lock:
                store._writer.disk.metrics.take_in(one)
    assert plain(tmp_path, "SELECT name, sum(n) FROM frame JOIN target ON target.id = target GROUP BY 1") == [
        ("nvml", 61),
        ("own", 60),
    ]
    assert [len(found) for found in samples(tmp_path).values()] == [65, 65]


def test_layouts_of_one_hour_become_one_frame_with_gaps(store, tmp_path):
    store.append("nvml", NOW_MS, [POWER], [1.0])
    store.append("nvml", NOW_MS + 1, [HEAT, POWER], [60.0, 2.0])
    store.append("nvml", NOW_MS + 2, [HEAT], [61.0])
    store.append("nvml", NOW_MS + 3, [], [])
    store.save(NOTHING, NOW_MS)
    ((one,),) = [found.frames for found in sealed(tmp_path, NOW_MS + HOUR_MS)]
    at_ms, values = columns(one)
    assert at_ms == [NOW_MS + n for n in range(4)]
    assert values == {ids(tmp_path)[POWER.metric]: [1.0, 2.0], ids(tmp_path)[HEAT.metric]: [60.0, 61.0]}


def test_a_target_that_gave_no_series_leaves_no_frame_and_is_done_with(store, tmp_path):
    for at_ms in range(NOW_MS, NOW_MS + 10):
        store.append("alerts", at_ms, [], [])
    store.save(NOTHING, NOW_MS)
    assert store.seal(NOW_MS + 3 * HOUR_MS) == 0
    assert plain(tmp_path, "SELECT count(*) FROM hot") == [(0,)]


def test_frames_end_where_hours_do_however_the_rows_came(store, tmp_path):
    for at_ms in (NOW_MS - 1, NOW_MS, NOW_MS + HOUR_MS - 1):
        store.append("own", at_ms, [UP], [1.0])
    store.save(NOTHING, NOW_MS)
    store.close()
    with closing(opened(tmp_path, NOW_MS - 2 * HOUR_MS)) as back:
        back.append("own", NOW_MS - 2 * HOUR_MS, [UP], [2.0])
        back.save(NOTHING, NOW_MS)
        back.seal(NOW_MS + 4 * HOUR_MS)
    assert plain(tmp_path, "SELECT from_ms, to_ms FROM frame ORDER BY from_ms") == [
        (NOW_MS - 2 * HOUR_MS, NOW_MS - 2 * HOUR_MS),
        (NOW_MS - 1, NOW_MS - 1),
        (NOW_MS, NOW_MS + HOUR_MS - 1),
    ]


# Hourly figures


def test_hourly_figures_leave_out_what_is_no_number(store, tmp_path):
    for second, value in enumerate([5.0, STALE, 7.0, math.nan, 3.0]):
        store.append("nvml", NOW_MS + second * SECOND, [POWER], [value])
    for second, value in enumerate([math.inf, 1.0, -math.inf]):
        store.append("own", NOW_MS + second * SECOND, [UP], [value])
    store.append("gone", NOW_MS, [HEAT], [STALE])
    store.save(NOTHING, NOW_MS)
    assert store.seal(NOW_MS + 3 * HOUR_MS) == 3
    query = "SELECT hour_ms, n, minimum, average, maximum, last FROM hourly JOIN series ON id = series"
    assert plain(tmp_path, f"{query} WHERE metric LIKE '%watts'") == [(NOW_MS, 3, 3.0, 5.0, 7.0, 3.0)]
    assert plain(tmp_path, f"{query} WHERE metric = 'up'") == [
        (NOW_MS, 3, -math.inf, None, math.inf, -math.inf)
    ]
    assert plain(tmp_path, "SELECT count(*) FROM hourly") == [(2,)]


def test_two_parts_of_an_hour_come_to_the_figures_of_the_whole(store, tmp_path):
    """Two targets that give one series, and an hour that is sealed twice."""
    for at_ms, target, value in ((0, "a", 1.0), (1, "a", 2.0), (0, "b", 6.0)):
        store.append(target, NOW_MS + at_ms, [UP], [value])
    store.save(NOTHING, NOW_MS)
    store.seal(NOW_MS + 3 * HOUR_MS)
    store.append("a", NOW_MS + 2, [UP], [3.0])
    store.save(NOTHING, NOW_MS)
    store.seal(NOW_MS + 3 * HOUR_MS)
    assert plain(tmp_path, "SELECT n, minimum, average, maximum, last FROM hourly") == [
        (4, 1.0, 3.0, 6.0, 3.0)
    ]


# What is cut short


class CutError(Exception):
    """The power went."""


def test_a_seal_cut_short_at_any_point_loses_and_doubles_nothing(store, tmp_path, monkeypatch):
    """Before and after each frame is taken in and each handful of rows deleted; a new daemon goes on."""
    monkeypatch.setattr(sealer, "run", lambda path, *given: list(sealing.seal(path, *given)))
    fill(store, NOW_MS, NOW_MS + 4 * HOUR_MS)
    before, later_ms = samples(tmp_path), NOW_MS + 4 * HOUR_MS
    hourly = "SELECT hour_ms, series, n, minimum, average, maximum, last FROM hourly ORDER BY 1, 2"
    left, cuts = [0], 0

    def cutting(method, after):
        def run(*given, **named):
            found = method(*given, **named) if after else None
            if left[0] == 0:
                raise CutError
            left[0] -= 1
            return found if after else method(*given, **named)

        return run

    for name in ("take_in", "delete_sealed"):
        monkeypatch.setattr(Metrics, name, cutting(cutting(getattr(Metrics, name), after=True), after=False))
    present, ended = store, False
    while not ended:
        left[0] = cuts % 5
        try:
            present.seal(later_ms)
            ended = True
        except CutError:
            cuts += 1
        assert samples(tmp_path) == before
        present.close()
        present = opened(tmp_path, later_ms)
        assert cuts < 100
    present.close()
    assert cuts > 6
    assert plain(tmp_path, "SELECT sum(n) FROM frame") == [(2 * 180,)]
    assert plain(tmp_path, "SELECT count(*) FROM hot") == [(2 * 61,)]
    figures = plain(tmp_path, hourly)
    assert len(figures) == 9
    assert {row[2] for row in figures} == {60}


def test_frames_that_come_twice_are_taken_in_once(store, tmp_path):
    fill(store, NOW_MS, NOW_MS + HOUR_MS - MINUTE)
    made = sealed(tmp_path, NOW_MS + HOUR_MS)
    before = samples(tmp_path)
    for one in [*made, *made]:
        store._writer.disk.metrics.take_in(one)
    assert samples(tmp_path) == before
    assert plain(tmp_path, "SELECT count(*), sum(n) FROM frame") == [(2, 120)]
    assert {n for (n,) in plain(tmp_path, "SELECT n FROM hourly")} == {60}


def test_a_row_that_cannot_be_read_is_told_and_does_not_hold_up_the_others(store, tmp_path, capsys):
    fill(store, NOW_MS, NOW_MS + 5 * MINUTE)
    change(tmp_path, "UPDATE hot SET vals = '[1.0' WHERE id = 3")
    change(tmp_path, "UPDATE hot SET vals = x'00ff' WHERE id = 4")
    change(tmp_path, "UPDATE hot SET vals = '[1.0]' WHERE id = 5")
    made = sealed(tmp_path, NOW_MS + HOUR_MS)
    assert sorted(frame.n for one in made for frame in one.frames) == [4, 5]
    told = capsys.readouterr().err
    assert [f"row {number} of hot cannot be read" in told for number in (3, 4, 5, 6)] == [True] * 3 + [False]


def test_many_hours_that_have_waited_are_sealed_one_after_the_other(store, tmp_path, monkeypatch):
    runs = []

    def run(path, before_ms, now_ms):
        made = list(sealing.seal(path, before_ms, now_ms))
        runs.append({frame.from_ms // HOUR_MS for one in made for frame in one.frames})
        return made

    monkeypatch.setattr(sealer, "run", run)
    fill(store, NOW_MS, NOW_MS + 20 * HOUR_MS, step_ms=5 * MINUTE)
    before = samples(tmp_path)
    assert store.seal(NOW_MS + 20 * HOUR_MS) == 19 * 2
    assert runs == [{NOW_MS // HOUR_MS + n} for n in range(19)]
    assert samples(tmp_path) == before
    assert plain(tmp_path, "SELECT min(at_ms) FROM hot") == [(NOW_MS + 19 * HOUR_MS,)]
    assert store.seal(NOW_MS + 20 * HOUR_MS) == 0


def test_more_rows_than_fit_at_once_are_sealed_in_parts(store, tmp_path, monkeypatch):
    monkeypatch.setattr(sealer, "run", lambda path, *given: list(sealing.seal(path, *given)))
    monkeypatch.setattr(sealing, "_MAX_ROWS", 50)
    fill(store, NOW_MS, NOW_MS + 3 * HOUR_MS)
    before = samples(tmp_path)
    assert store.seal(NOW_MS + 3 * HOUR_MS) > 4
    assert samples(tmp_path) == before
    assert {n for (n,) in plain(tmp_path, "SELECT n FROM hourly")} == {60}
    assert plain(tmp_path, "SELECT min(at_ms) FROM hot") == [(NOW_MS + 2 * HOUR_MS,)]


# The process of its own


def test_the_process_gives_what_is_made_in_process(store, tmp_path):
    fill(store, NOW_MS, NOW_MS + 2 * HOUR_MS)
    found = sealer.run(tmp_path / METRICS_DB, NOW_MS + HOUR_MS, NOW_MS + 2 * HOUR_MS)
    assert found == sealed(tmp_path, NOW_MS + HOUR_MS, NOW_MS + 2 * HOUR_MS)
    assert len(found) == 2


def test_a_process_that_fails_leaves_the_rows_and_says_why(store, tmp_path, monkeypatch):
    fill(store, NOW_MS, NOW_MS + 2 * HOUR_MS)
    before = samples(tmp_path)
    monkeypatch.setattr(sealer.sys, "executable", "/bin/false")
    with pytest.raises(StoreError, match=r"cannot seal an hour of .*stay as rows") as failed:
        store.seal(NOW_MS + 3 * HOUR_MS)
    assert failed.value.kind == "other"
    assert samples(tmp_path) == before


def overwrite_rows(folder):
    """Ruin the page of a row in the middle, and leave the oldest and the newest whole."""
    path = folder / METRICS_DB
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.execute("PRAGMA journal_mode=DELETE")
    data = bytearray(path.read_bytes())
    at = data.index(b"[7.125,")
    page = at // 4096
    data[page * 4096 : page * 4096 + 4096] = b"\xff" * 4096
    path.write_bytes(data)


def test_damage_that_only_sealing_meets_has_the_file_set_aside(store, tmp_path):
    noise = np.random.default_rng(1).normal(0, 1, (300, 40))
    noise[150, 0] = 7.125
    series = [Labels.of("noise", n=str(n)) for n in range(40)]
    for n, row in enumerate(noise.tolist()):
        store.append("noise", NOW_MS + n * SECOND, series, row)
    store.save(NOTHING, NOW_MS)
    store.close()
    overwrite_rows(tmp_path)
    later_ms = NOW_MS + 5 * HOUR_MS
    with closing(opened(tmp_path, later_ms)) as again:
        with pytest.raises(StoreError, match=r"cannot seal an hour") as failed:
            again.seal(later_ms)
        assert failed.value.kind == "corrupt"
        assert [path for path in tmp_path.iterdir() if ".damaged-" in path.name]
        again.append("own", later_ms, [UP], [1.0])
        again.save(NOTHING, later_ms)
        assert again.faults()[METRICS_DB] == ""
        assert again.seal(later_ms + 3 * HOUR_MS) == 1
    assert samples(tmp_path) == {UP: [(later_ms, 1.0)]}
