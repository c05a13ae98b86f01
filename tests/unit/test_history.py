"""Samples of any age: what went in comes out to the bit, out of memory, rows, frames and over their seams."""

from __future__ import annotations

import csv
import io
import math
import os
import sqlite3
import struct
import tempfile
from collections import defaultdict
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from gpuwatch.config import StoreSettings
from gpuwatch.config.size import Size
from gpuwatch.errors import StoreError
from gpuwatch.frames import sealing
from gpuwatch.frames.rowtext import ABSENT_BITS, HOUR_MS
from gpuwatch.promql import Matcher
from gpuwatch.records import STALE, Labels
from gpuwatch.store import METRICS_DB, Changes, Disk, Store, database, open_history, open_read_only, sealer
from gpuwatch.store.export import CsvSheet, ParquetSheet, export
from gpuwatch.store.history import History

SECOND, MINUTE = 1000, 60_000
DAY, YEAR = 24 * HOUR_MS, 365 * 24 * HOUR_MS
NOW_MS = 1_795_252_500_000 // HOUR_MS * HOUR_MS
NOTHING = Changes()
ALL = Matcher("__name__", "=~", ".*")
POWER = Labels.of("gpu_power_draw_watts", gpu="0")
HEAT = Labels.of("gpu_temperature_celsius", gpu="0")
UP = Labels.of("up")
ABSENT_WORD = struct.unpack("<Q", ABSENT_BITS)[0]
ROOMY = StoreSettings(min_free=Size(0))

SHM = Path("/dev/shm")


def word(value):
    return struct.unpack("<Q", struct.pack("<d", value))[0]


def value_of(bits):
    return struct.unpack("<d", struct.pack("<Q", bits))[0]


def seal_here(path, before_ms, now_ms):
    """What `sealer.run` does, without a process of its own."""
    return list(sealing.seal(path, before_ms, now_ms))


@pytest.fixture
def sealing_here(monkeypatch):
    monkeypatch.setattr(sealer, "run", seal_here)


def opened(folder, now_ms=NOW_MS, window_ms=HOUR_MS):
    return Store(window_ms, Disk(folder, ROOMY, "gpu-a", now_ms))


@pytest.fixture
def store(tmp_path, sealing_here):
    with closing(opened(tmp_path)) as found:
        yield found


def fill(store, first_ms, last_ms, step_ms=MINUTE, target="nvml"):
    """A scrape every step: power counts the minutes, the temperature stands still."""
    for at_ms in range(first_ms, last_ms + 1, step_ms):
        store.append(target, at_ms, [POWER, HEAT], [float(at_ms // MINUTE), 60.0])
    store.save(NOTHING, last_ms)


def tracks(folder, after_ms=-1, upto_ms=1 << 53, matchers=(ALL,)):
    with open_history(folder) as history:
        found = history.tracks(matchers, after_ms, upto_ms)
        assert history.damaged == []
    assert len({track.labels for track in found}) == len(found)
    return {
        t.labels: dict(zip(t.at_ms.tolist(), t.values.view(np.uint64).tolist(), strict=True)) for t in found
    }


def plain(folder, query):
    with closing(sqlite3.connect(folder / METRICS_DB)) as connection:
        return connection.execute(query).fetchall()


def change(folder, statement, *values):
    with closing(sqlite3.connect(folder / METRICS_DB)) as connection, connection:
        connection.execute(statement, values)


# What goes in comes out

OF_TARGET = {
    "nvml": [POWER, HEAT, UP, Labels.of("gpu_ecc_errors", gpu="0")],
    "vllm:qwen": [Labels.of("vllm_requests", server=name) for name in "ab"] + [UP],
    "alerts": [Labels.of("ALERTS", alertname="显存")],
}
bits = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 0.1, 5e-324, math.inf, -math.inf, math.nan, STALE]).map(word),
    st.integers(-1000, 1000).map(lambda whole: word(float(whole))),
    st.integers(0, 2**64 - 1),
).filter(lambda found: found != ABSENT_WORD)  # that pattern says that there is no sample
names = st.sampled_from(sorted(OF_TARGET))
steps = st.one_of(
    st.tuples(
        st.just("scrape"),
        names,
        st.sampled_from([0, 1, 500, SECOND, MINUTE, 7 * MINUTE, 25 * MINUTE]),
        st.sampled_from([0, 0, 0, 1, 30 * SECOND]),  # how late a slow source is
        st.lists(bits | st.none(), min_size=4, max_size=4),
        st.booleans(),
    ),
    st.tuples(st.just("save")),
    st.tuples(st.just("seal"), st.sampled_from([0, HOUR_MS, 3 * HOUR_MS])),
    st.tuples(
        st.just("restart"), st.sampled_from([0, 0, SECOND, -10 * MINUTE, -HOUR_MS, 5 * HOUR_MS, YEAR, -YEAR])
    ),
)


class Played:
    """A store, and beside it what it should know: by target and instant the series' bits."""

    def __init__(self, folder):
        self.folder, self.now_ms = folder, NOW_MS
        self.saved = {target: {} for target in OF_TARGET}
        self.newest = {}
        self.began_ms = NOW_MS - HOUR_MS
        self.held = {target: {} for target in OF_TARGET}
        self.store = opened(folder)

    def scrape(self, target, step_ms, late_ms, cells, turned):
        self.now_ms += step_ms
        at_ms = self.now_ms - late_ms
        if late_ms and at_ms < self.newest.get(target, -1):
            late_ms, at_ms = 0, self.now_ms
        series = OF_TARGET[target]
        given = [(s, cell) for s, cell in zip(series, cells[: len(series)], strict=True) if cell is not None]
        given = given[::-1] if turned else given
        self.store.append(target, at_ms, [labels for labels, _ in given], [value_of(c) for _, c in given])
        if at_ms >= self.newest.get(target, -1):
            self.newest[target] = at_ms
            self.saved[target][at_ms] = self.held[target][at_ms] = dict(given)

    def save(self):
        self.store.save(NOTHING, self.now_ms)
        assert not any(self.store.faults().values())

    def seal(self, later_ms):
        self.save()
        self.now_ms += later_ms
        self.store.seal(self.now_ms)

    def restart(self, shift_ms):
        self.store.close()
        self.now_ms += shift_ms
        self.store = opened(self.folder, self.now_ms)
        self.store.reload(self.now_ms)
        # Older instants of memory are told apart in tests of their own.
        self.began_ms = self.now_ms
        self.held = {target: {} for target in OF_TARGET}
        self.newest = {
            target: max((at for at in scrapes if at <= self.now_ms), default=-1)
            for target, scrapes in self.saved.items()
        }


def by_series(scrapes_by_target, after_ms, upto_ms):
    """Series -> instant -> the bits that targets gave it then."""
    found = defaultdict(lambda: defaultdict(set))
    for scrapes in scrapes_by_target.values():
        for at_ms, scrape in scrapes.items():
            for labels, cell in scrape.items() if after_ms < at_ms <= upto_ms else ():
                found[labels][at_ms].add(cell)
    return found


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for labels, samples in found.items():
        assert list(samples) == sorted(wanted[labels]), labels
        assert all(cell in wanted[labels][at_ms] for at_ms, cell in samples.items()), labels
    return True


@given(played=st.lists(steps, max_size=40), data=st.data())
@settings(
    max_examples=int(os.environ.get("GPUWATCH_EXAMPLES", "100")),
    phases=[Phase.reuse, Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_what_goes_in_comes_out_to_the_bit_whatever_happens_in_between(sealing_here, played, data):
    with tempfile.TemporaryDirectory(dir=SHM if SHM.is_dir() else None) as folder:
        world = Played(Path(folder))
        with closing(world.store):
            for name, *given_to in played:
                getattr(world, name)(*given_to)
            world.save()
            instants = sorted({at_ms for scrapes in world.saved.values() for at_ms in scrapes}) or [0]
            edges = st.sampled_from([instants[0] - 1, *instants, instants[-1] + 1])
            for after_ms, upto_ms in (
                (instants[0] - 1, instants[-1]),
                (data.draw(edges), data.draw(edges)),
            ):
                wanted = by_series(world.saved, after_ms, upto_ms)
                assert same(tracks(world.folder, after_ms, upto_ms), wanted)
            after_ms = max(world.began_ms, world.now_ms - HOUR_MS)
            found = {
                s.labels: {at: word(value) for at, value in zip(s.at_ms, s.values, strict=True)}
                for s in world.store.select([ALL], after_ms, world.now_ms)
            }
            assert same(found, by_series(world.held, after_ms, world.now_ms))
            world.store.close()


def test_of_two_scrapes_of_one_instant_the_later_counts_whole(store, tmp_path):
    for _ in range(2):
        store.append("nvml", NOW_MS, [POWER, HEAT], [1.0, 60.0])
        store.append("nvml", NOW_MS, [POWER], [2.0])
    store.save(NOTHING, NOW_MS)
    wanted = {POWER: {NOW_MS: word(2.0)}}
    assert tracks(tmp_path) == wanted
    assert store.seal(NOW_MS + 3 * HOUR_MS) == 1
    assert tracks(tmp_path) == wanted


def again(folder, now_ms, *scrapes, seal_ms=None):
    """A run of the daemon: scrapes as (instant, labels, value)."""
    with closing(opened(folder, now_ms)) as store:
        for at_ms, labels, value in scrapes:
            store.append("nvml", at_ms, [labels], [value])
        store.save(NOTHING, now_ms)
        if seal_ms is not None:
            store.seal(seal_ms)


def test_what_a_clock_that_stepped_back_measures_again_replaces_what_is_in_frames(sealing_here, tmp_path):
    """In frames, and in rows that are later than these; one frame within another."""
    at = [NOW_MS + minute * MINUTE for minute in range(5)]
    again(tmp_path, at[4], *((one, POWER, 1.0) for one in at), seal_ms=NOW_MS + 3 * HOUR_MS)
    again(tmp_path, at[3], (at[1], HEAT, 2.0), (at[2], POWER, 2.0), seal_ms=NOW_MS + 3 * HOUR_MS)
    again(tmp_path, at[3], (at[2], HEAT, 3.0), (at[3] + 1, POWER, 3.0))
    assert plain(tmp_path, "SELECT count(*) FROM frame") == [(2,)]
    assert tracks(tmp_path) == {
        POWER: {at[0]: word(1.0), at[3]: word(1.0), at[3] + 1: word(3.0), at[4]: word(1.0)},
        HEAT: {at[1]: word(2.0), at[2]: word(3.0)},
    }


def test_two_targets_may_give_one_series(store, tmp_path):
    store.append("a", NOW_MS, [UP], [1.0])
    store.append("b", NOW_MS, [UP], [2.0])
    store.append("a", NOW_MS + 1, [UP], [3.0])
    store.append("b", NOW_MS + 2, [UP], [4.0])
    store.save(NOTHING, NOW_MS)
    for frames in (0, 2):
        assert store.seal(NOW_MS + (HOUR_MS * 3 if frames else 0)) == frames
        (found,) = tracks(tmp_path).values()
        assert list(found) == [NOW_MS, NOW_MS + 1, NOW_MS + 2]
        assert found[NOW_MS] in {word(1.0), word(2.0)}
        assert [found[NOW_MS + 1], found[NOW_MS + 2]] == [word(3.0), word(4.0)]


def test_series_that_change_with_every_scrape_are_all_kept(store, tmp_path):
    series = [Labels.of("vllm_request", id=str(n)) for n in range(1200)]
    for n, labels in enumerate(series):
        store.append("vllm", NOW_MS + n * SECOND, [labels, UP], [float(n), 1.0])
    store.save(NOTHING, NOW_MS)
    wanted = {labels: {NOW_MS + n * SECOND: word(float(n))} for n, labels in enumerate(series)}
    wanted[UP] = {NOW_MS + n * SECOND: word(1.0) for n in range(1200)}
    assert tracks(tmp_path) == wanted
    store.seal(NOW_MS + 3 * HOUR_MS)
    assert tracks(tmp_path) == wanted
    assert tracks(tmp_path, matchers=[Matcher("id", "=", "7")]) == {series[7]: wanted[series[7]]}


def test_a_slow_source_is_found_though_its_rows_stand_late(store, tmp_path):
    for second in range(0, 600, 10):
        store.append("nvml", NOW_MS + second * SECOND, [POWER], [float(second)])
        store.append("vllm", NOW_MS + (second - 55) * SECOND, [UP], [float(second)])
    store.save(NOTHING, NOW_MS)
    for after in range(-60, 600, 7):
        found = tracks(tmp_path, NOW_MS + after * SECOND, NOW_MS + (after + 20) * SECOND)
        wanted = {
            labels: {
                NOW_MS + (second - late) * SECOND: word(float(second))
                for second in range(0, 600, 10)
                if after < second - late <= after + 20
            }
            for labels, late in ((POWER, 0), (UP, 55))
        }
        assert found == {labels: samples for labels, samples in wanted.items() if samples}


def test_a_window_is_open_on_the_left_and_closed_on_the_right_in_rows_and_frames(store, tmp_path):
    fill(store, NOW_MS, NOW_MS + 5 * HOUR_MS)
    store.seal(NOW_MS + 5 * HOUR_MS)
    seam_ms = NOW_MS + 4 * HOUR_MS
    assert plain(tmp_path, "SELECT max(to_ms) FROM frame") == [(seam_ms - MINUTE,)]
    for edge_ms in (NOW_MS, seam_ms, seam_ms - MINUTE):
        found = tracks(tmp_path, edge_ms, edge_ms + 2 * MINUTE)
        assert list(found[POWER]) == [edge_ms + MINUTE, edge_ms + 2 * MINUTE]
        assert list(tracks(tmp_path, edge_ms - 1, edge_ms)[HEAT]) == [edge_ms]


def test_matchers_choose_series_as_in_promql(store, tmp_path):
    fill(store, NOW_MS, NOW_MS)
    store.append("own", NOW_MS, [UP], [1.0])
    store.save(NOTHING, NOW_MS)
    heat = Matcher("__name__", "=", "gpu_temperature_celsius")
    assert set(tracks(tmp_path, matchers=[heat])) == {HEAT}
    assert set(tracks(tmp_path, matchers=[Matcher("gpu", "=", "0")])) == {POWER, HEAT}
    assert set(tracks(tmp_path, matchers=[Matcher("gpu", "=", "")])) == {UP}
    assert tracks(tmp_path, matchers=[heat, Matcher("gpu", "!=", "0")]) == {}
    assert tracks(tmp_path, matchers=[Matcher("__name__", "=", "nothing")]) == {}


def test_a_querier_gets_plain_numbers(store, tmp_path):
    fill(store, NOW_MS, NOW_MS + MINUTE)
    with open_history(tmp_path) as history:
        (series,) = history.select([Matcher("__name__", "=", HEAT.metric)], 0, NOW_MS + DAY)
    assert (series.labels, series.at_ms, series.values) == (HEAT, [NOW_MS, NOW_MS + MINUTE], [60.0, 60.0])
    assert {type(one) for one in (*series.at_ms, *series.values)} == {int, float}


def test_more_samples_than_the_caller_allows_are_an_error_with_a_cure(store, tmp_path):
    fill(store, NOW_MS, NOW_MS + 3 * HOUR_MS)
    store.seal(NOW_MS + 3 * HOUR_MS)
    opens = database.read(tmp_path / METRICS_DB)
    with closing(opens):
        assert len(History(opens, max_samples=362).tracks([ALL], 0, NOW_MS + DAY)) == 2
        with pytest.raises(StoreError, match=r"more than 361 samples.*fewer series"):
            History(opens, max_samples=361).tracks([ALL], 0, NOW_MS + DAY)


def test_a_folder_without_samples_has_no_history(store, tmp_path):
    with open_history(tmp_path) as history:
        assert history.span_ms() is None
        assert history.tracks([ALL], 0, NOW_MS) == []
        assert history.hours([ALL], 0, NOW_MS) == []
        assert history.latest(NOW_MS, HOUR_MS) == {}
        assert history.points([ALL], 0, NOW_MS, 10) == []


def test_a_span_goes_from_the_oldest_frame_to_the_newest_row(store, tmp_path):
    fill(store, NOW_MS, NOW_MS + 4 * HOUR_MS)
    store.seal(NOW_MS + 4 * HOUR_MS)
    with open_history(tmp_path) as history:
        assert history.span_ms() == (NOW_MS, NOW_MS + 4 * HOUR_MS)


# Damage


def damage_frame(folder, labels):
    """Change one byte in the column of a series of the only frame that has it."""
    ((number, data, position),) = [
        (number, data, position)
        for number, data, position, text in plain(
            folder,
            "SELECT frame.id, data, position, labels FROM frame"
            " JOIN layout_series ON layout_series.layout = frame.layout JOIN series ON series.id = series",
        )
        if text == labels
    ]
    from gpuwatch.frames.frame import Frame

    whole = Frame(data)
    body = bytes(whole._stream(position, whole._record(position)))
    at = data.index(body) + len(body) // 2
    change(
        folder,
        "UPDATE frame SET data = ? WHERE id = ?",
        data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :],
        number,
    )
    return number


def noisy(store, first_ms, count=200):
    """Two series of which no column is like the other."""
    noise = np.random.default_rng(7).normal(300, 20, (count, 2))
    for n, (power, heat) in enumerate(noise.tolist()):
        store.append("nvml", first_ms + n * SECOND, [POWER, HEAT], [power, heat])
    store.save(NOTHING, first_ms)
    return noise


def test_a_damaged_column_is_left_out_and_told(store, tmp_path):
    noise = noisy(store, NOW_MS)
    store.seal(NOW_MS + 3 * HOUR_MS)
    number = damage_frame(tmp_path, '{"__name__":"gpu_power_draw_watts","gpu":"0"}')
    with open_history(tmp_path) as history:
        (found,) = history.tracks([ALL], 0, NOW_MS + DAY)
        assert found.labels == HEAT
        assert np.array_equal(found.values, noise[:, 1])
        (told,) = history.damaged
    assert told.startswith(f"frame {number}: column ")


def test_a_frame_cut_short_is_left_out_and_told(store, tmp_path):
    fill(store, NOW_MS, NOW_MS + 2 * HOUR_MS)
    store.seal(NOW_MS + 4 * HOUR_MS)
    change(tmp_path, "UPDATE frame SET data = substr(data, 1, length(data) - 9) WHERE id = 2")
    with open_history(tmp_path) as history:
        first = {track.labels: track.at_ms.tolist() for track in history.tracks([ALL], 0, NOW_MS + DAY)}
        assert len(history.damaged) == 1
    assert NOW_MS + HOUR_MS not in first[POWER]
    assert {NOW_MS, NOW_MS + 2 * HOUR_MS} <= set(first[POWER])


@pytest.mark.parametrize("text", ["[1,", '["a",1]', "[1]", "", "{}", b"\xff\xfe"])
def test_a_row_that_cannot_be_read_is_left_out_everywhere(store, tmp_path, text):
    fill(store, NOW_MS, NOW_MS + 2 * MINUTE)
    change(tmp_path, "UPDATE hot SET vals = ? WHERE id = 2", text)
    with open_history(tmp_path) as history:
        (power,) = history.tracks([Matcher("__name__", "=", POWER.metric)], 0, NOW_MS + DAY)
        (heat,) = history.tracks([Matcher("__name__", "=", HEAT.metric)], 0, NOW_MS + DAY)
        assert [line for line in history.damaged if "row 2 of hot" in line]
        assert history.latest(NOW_MS + MINUTE, MINUTE + 1)[HEAT] == 60.0
    assert heat.at_ms.tolist() == [NOW_MS, NOW_MS + 2 * MINUTE]
    assert set(power.at_ms.tolist()) >= {NOW_MS, NOW_MS + 2 * MINUTE}
    assert [len(scrape.values) for _, scrape in store.scrapes_after(0, 9, NOW_MS)] == [2, 0, 2]
    store.close()
    with closing(opened(tmp_path, NOW_MS + 3 * MINUTE)) as later:
        later.reload(NOW_MS + 3 * MINUTE)
        (series,) = later.select([Matcher("__name__", "=", HEAT.metric)], 0, NOW_MS + DAY)
        assert series.at_ms == [NOW_MS, NOW_MS + 2 * MINUTE]
        assert later.seal(NOW_MS + 3 * HOUR_MS) == 1
    assert list(tracks(tmp_path)[HEAT]) == [NOW_MS, NOW_MS + 2 * MINUTE]


# Clocks


def test_a_clock_a_year_ahead_holds_nothing_up(store, tmp_path):
    """What was stamped then stays readable; what comes after it is sealed and found as ever."""
    fill(store, NOW_MS, NOW_MS + HOUR_MS)
    store.close()
    with closing(opened(tmp_path, NOW_MS + YEAR)) as ahead:
        fill(ahead, NOW_MS + YEAR, NOW_MS + YEAR + 5 * MINUTE)
    with closing(opened(tmp_path, NOW_MS + HOUR_MS)) as back:
        back.reload(NOW_MS + HOUR_MS)
        fill(back, NOW_MS + HOUR_MS + MINUTE, NOW_MS + 6 * HOUR_MS)
        assert len(back.select([ALL], NOW_MS + 5 * HOUR_MS, NOW_MS + 6 * HOUR_MS)) == 2
        back.seal(NOW_MS + 6 * HOUR_MS)
        back.prune(NOW_MS + 6 * HOUR_MS)
    unsealed = (
        "SELECT min(at_ms), max(at_ms) FROM hot JOIN target ON target.id = target WHERE hot.id > sealed_id"
    )
    assert plain(tmp_path, unsealed) == [(NOW_MS + 5 * HOUR_MS, NOW_MS + 6 * HOUR_MS)]
    now = range(NOW_MS, NOW_MS + 6 * HOUR_MS + 1, MINUTE)
    ahead = range(NOW_MS + YEAR, NOW_MS + YEAR + 5 * MINUTE + 1, MINUTE)
    assert list(tracks(tmp_path)[HEAT]) == [*now, *ahead]
    assert list(tracks(tmp_path, upto_ms=NOW_MS + DAY)[HEAT]) == list(now)


def test_a_clock_that_stepped_back_an_hour_holds_nothing_up(store, tmp_path):
    fill(store, NOW_MS, NOW_MS + 2 * HOUR_MS)
    store.close()
    with closing(opened(tmp_path, NOW_MS + HOUR_MS)) as back:
        back.reload(NOW_MS + HOUR_MS)
        fill(back, NOW_MS + HOUR_MS + 1, NOW_MS + 5 * HOUR_MS + 1)
        back.seal(NOW_MS + 5 * HOUR_MS)
    unsealed = "SELECT min(at_ms) FROM hot JOIN target ON target.id = target WHERE hot.id > sealed_id"
    assert plain(tmp_path, unsealed) == [(NOW_MS + 4 * HOUR_MS + 1,)]
    first = set(range(NOW_MS, NOW_MS + 2 * HOUR_MS + 1, MINUTE))
    second = set(range(NOW_MS + HOUR_MS + 1, NOW_MS + 5 * HOUR_MS + 2, MINUTE))
    assert list(tracks(tmp_path)[HEAT]) == sorted(first | second)


# The newest


def test_latest_is_the_newest_of_each_series_that_has_not_ended(store, tmp_path):
    gone, rare, late = (Labels.of("some", name=name) for name in ("gone", "rare", "late"))
    store.append("vllm", NOW_MS - 200 * SECOND, [gone, rare, late], [1.0, 5.0, 1.0])
    store.append("vllm", NOW_MS - 100 * SECOND, [gone, late], [STALE, 2.0])
    store.append("far", NOW_MS + 10 * SECOND, [UP], [1.0])
    store.append("vllm", NOW_MS - 50 * SECOND, [gone, late], [STALE, math.inf])
    store.append("slow", NOW_MS - 90 * SECOND, [HEAT], [60.0])
    store.save(NOTHING, NOW_MS)
    with open_history(tmp_path) as history, open_read_only(tmp_path) as reader:
        for found in (history.latest(NOW_MS, 300 * SECOND), reader.latest(NOW_MS, 300 * SECOND)):
            assert found == {rare: 5.0, late: math.inf, HEAT: 60.0}
        assert history.latest(NOW_MS, 100 * SECOND) == {late: math.inf, HEAT: 60.0}
        assert history.latest(NOW_MS, 60 * SECOND) == {late: math.inf}
        assert history.latest(NOW_MS + 10 * SECOND, 60 * SECOND) == {UP: 1.0}


# Pictures and hours


def test_points_come_to_minimum_average_and_maximum_of_a_step(store, tmp_path):
    for second in range(1, 101):
        store.append("nvml", NOW_MS + second * SECOND, [POWER], [float(second)])
    store.save(NOTHING, NOW_MS)
    with open_history(tmp_path) as history:
        (found,) = history.points([ALL], NOW_MS, NOW_MS + 100 * SECOND, 4)
        (one,) = history.points([ALL], NOW_MS, NOW_MS + 100 * SECOND, 1)
    assert found.at_ms.tolist() == [NOW_MS + part * 25 * SECOND for part in (1, 2, 3, 4)]
    assert found.minimum.tolist() == [1, 26, 51, 76]
    assert found.average.tolist() == [13, 38, 63, 88]
    assert found.maximum.tolist() == [25, 50, 75, 100]
    assert (one.minimum.tolist(), one.average.tolist(), one.maximum.tolist()) == ([1], [50.5], [100])


def test_points_leave_out_what_is_no_number_and_steps_without_samples(store, tmp_path):
    for second, value in ((1, 5.0), (2, STALE), (31, math.nan), (61, math.inf), (62, -math.inf), (63, 1e308)):
        store.append("nvml", NOW_MS + second * SECOND, [POWER], [value])
    store.append("own", NOW_MS + SECOND, [UP], [STALE])
    store.save(NOTHING, NOW_MS)
    with open_history(tmp_path) as history:
        power, up = sorted(history.points([ALL], NOW_MS, NOW_MS + 100 * SECOND, 10), key=lambda p: p.labels)
    assert power.at_ms.tolist() == [NOW_MS + 10 * SECOND, NOW_MS + 70 * SECOND]
    assert power.minimum.tolist() == [5.0, -math.inf]
    assert power.maximum.tolist() == [5.0, math.inf]
    assert math.isnan(power.average.tolist()[1])
    assert up.at_ms.tolist() == []


def test_hours_are_the_figures_of_what_was_sealed(store, tmp_path):
    fill(store, NOW_MS, NOW_MS + 3 * HOUR_MS - MINUTE)
    store.append("own", NOW_MS + 4 * HOUR_MS, [UP], [1.0])
    store.save(NOTHING, NOW_MS)
    store.seal(NOW_MS + 4 * HOUR_MS)
    first = NOW_MS // MINUTE
    with open_history(tmp_path) as history:
        found = history.hours([Matcher("__name__", "=", POWER.metric)], NOW_MS - 1, NOW_MS + HOUR_MS)
        assert [hour[1:] for hour in found] == [
            (NOW_MS, 60, first, first + 29.5, first + 59, first + 59),
            (NOW_MS + HOUR_MS, 60, first + 60, first + 89.5, first + 119, first + 119),
        ]
        assert [h.hour_ms for h in history.hours([ALL], NOW_MS, NOW_MS + DAY)] == [
            NOW_MS + HOUR_MS,
            NOW_MS + HOUR_MS,
            NOW_MS + 2 * HOUR_MS,
            NOW_MS + 2 * HOUR_MS,
        ]
        assert history.hours([Matcher("__name__", "=", UP.metric)], 0, NOW_MS + DAY) == []


# Files


def test_a_csv_has_a_line_a_sample(store, tmp_path):
    store.append("nvml", NOW_MS, [POWER, HEAT], [0.1, -0.0])
    store.append("nvml", NOW_MS + 1001, [POWER, HEAT], [STALE, math.inf])
    store.append("alerts", NOW_MS, [Labels.of("ALERTS", alertname='a "b", 显存')], [1.0])
    store.save(NOTHING, NOW_MS)
    out = io.StringIO(newline="")
    with open_history(tmp_path) as history:
        assert export(history, [ALL], (NOW_MS - HOUR_MS, NOW_MS + DAY), CsvSheet(out)) == 5
    out.seek(0)
    lines = list(csv.reader(out))
    assert lines[0] == ["time", "at_ms", "metric", "labels", "value"]
    assert sorted(lines[1:]) == sorted(
        [
            [at, str(at_ms), metric, labels, value]
            for at, at_ms, metric, labels, value in (
                (utc(NOW_MS), NOW_MS, POWER.metric, '{"gpu":"0"}', "0.1"),
                (utc(NOW_MS + 1001), NOW_MS + 1001, POWER.metric, '{"gpu":"0"}', "stale"),
                (utc(NOW_MS), NOW_MS, HEAT.metric, '{"gpu":"0"}', "-0.0"),
                (utc(NOW_MS + 1001), NOW_MS + 1001, HEAT.metric, '{"gpu":"0"}', "inf"),
                (utc(NOW_MS), NOW_MS, "ALERTS", '{"alertname":"a \\"b\\", 显存"}', "1.0"),
            )
        ]
    )


def utc(at_ms):
    return f"{np.datetime64(at_ms, 'ms')}Z"


def test_an_export_of_many_hours_has_each_sample_once(store, tmp_path):
    fill(store, NOW_MS - 30 * MINUTE, NOW_MS + 5 * HOUR_MS, step_ms=7 * MINUTE)
    store.seal(NOW_MS + 5 * HOUR_MS)
    for after_ms in (NOW_MS - DAY, NOW_MS, NOW_MS + 3 * HOUR_MS - 1, NOW_MS + 3 * HOUR_MS, NOW_MS + 12345):
        out = io.StringIO(newline="")
        with open_history(tmp_path) as history:
            written = export(history, [ALL], (after_ms, NOW_MS + 5 * HOUR_MS), CsvSheet(out))
            wanted = history.tracks([ALL], after_ms, NOW_MS + 5 * HOUR_MS)
        out.seek(0)
        found = defaultdict(list)
        for _, at_ms, metric, _, _ in list(csv.reader(out))[1:]:
            found[metric].append(int(at_ms))
        assert found == {track.labels.metric: track.at_ms.tolist() for track in wanted}
        assert written == sum(len(track.at_ms) for track in wanted)


def test_a_parquet_file_has_the_samples_bit_for_bit(store, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    store.append("nvml", NOW_MS, [POWER, HEAT], [0.1, value_of(0x7FF8000000000123)])
    store.append("nvml", NOW_MS + HOUR_MS, [POWER, HEAT], [STALE, -0.0])
    store.save(NOTHING, NOW_MS)
    with open_history(tmp_path) as history:
        sheet = ParquetSheet(tmp_path / "out.parquet")
        assert export(history, [ALL], (NOW_MS - HOUR_MS, NOW_MS + DAY), sheet) == 4
    file = pq.ParquetFile(tmp_path / "out.parquet")
    assert file.num_row_groups == 2
    table = file.read().to_pydict()
    found = set(zip(table["time"], table["metric"], map(word, table["value"]), strict=True))
    assert {(int(at.timestamp() * 1000), metric, cell) for at, metric, cell in found} == {
        (NOW_MS, POWER.metric, word(0.1)),
        (NOW_MS, HEAT.metric, 0x7FF8000000000123),
        (NOW_MS + HOUR_MS, POWER.metric, word(STALE)),
        (NOW_MS + HOUR_MS, HEAT.metric, word(-0.0)),
    }
    assert set(table["labels"]) == {'{"gpu":"0"}'}


# Other programs


def test_a_person_reads_the_views_with_any_sqlite(store, tmp_path):
    gone = Labels.of("vllm_requests", server="qwen")
    store.append("vllm:qwen", NOW_MS - 6 * MINUTE, [gone], [7.0])
    fill(store, NOW_MS, NOW_MS + MINUTE)
    store.append("own", NOW_MS + MINUTE, [UP, gone], [STALE, math.inf])
    store.save(NOTHING, NOW_MS)
    store.close()
    at = "2026-11-21 09:01:00 UTC"
    minutes = float(NOW_MS // MINUTE + 1)
    assert plain(tmp_path, "SELECT metric, labels, value, at, target FROM v_last") == [
        (POWER.metric, '{"__name__":"gpu_power_draw_watts","gpu":"0"}', minutes, at, "nvml"),
        (HEAT.metric, '{"__name__":"gpu_temperature_celsius","gpu":"0"}', 60.0, at, "nvml"),
        ("vllm_requests", '{"__name__":"vllm_requests","server":"qwen"}', "inf", at, "own"),
    ]
    assert plain(tmp_path, "SELECT at_ms, target, value FROM v_hot WHERE metric = 'up'") == [
        (NOW_MS + MINUTE, "own", "stale")
    ]
    with closing(opened(tmp_path)) as later:
        later.seal(NOW_MS + 3 * HOUR_MS)
    assert plain(tmp_path, "SELECT count(*) FROM v_hot") == [(0,)]
    assert plain(
        tmp_path, "SELECT hour, n, minimum, average, maximum, last FROM v_hourly WHERE metric LIKE '%celsius'"
    ) == [("2026-11-21 09:00:00 UTC", 2, 60.0, 60.0, 60.0, 60.0)]
    assert plain(
        tmp_path, "SELECT target, first, last, scrapes, series FROM v_frames WHERE target = 'nvml'"
    ) == [("nvml", "2026-11-21 09:00:00 UTC", at, 2, 2)]


def test_history_is_read_beside_a_writing_daemon_as_of_one_moment(store, tmp_path):
    fill(store, NOW_MS, NOW_MS + 3 * HOUR_MS)
    with open_history(tmp_path) as history:
        before = history.tracks([ALL], 0, NOW_MS + DAY)
        store.seal(NOW_MS + 3 * HOUR_MS)
        after = history.tracks([ALL], 0, NOW_MS + DAY)
    assert [track.at_ms.tolist() for track in after] == [track.at_ms.tolist() for track in before]
