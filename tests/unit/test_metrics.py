"""metrics.db as the daemon writes it: rows and their text, layouts, limits, retention."""

from __future__ import annotations

import collections
import json
import math
import sqlite3
import struct
from contextlib import closing

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuwatch.config import StoreSettings
from gpuwatch.config.size import Size
from gpuwatch.errors import StoreError
from gpuwatch.frames import rowtext
from gpuwatch.frames.rowtext import ABSENT, ABSENT_BITS, HOUR_MS
from gpuwatch.frames.sealed import Sealed, SealedFrame
from gpuwatch.records import STALE, Labels, Scrape
from gpuwatch.store import database
from gpuwatch.store.layouts import Layout, Shape, is_absent
from gpuwatch.store.metrics import PAGE_BYTES, Metrics, Row
from gpuwatch.store.metrics_schema import METRICS_DB

SECOND, MINUTE, DAY = 1000, 60_000, 24 * HOUR_MS
MIB = 2**20
NOW_MS = 1_795_252_500_000 // HOUR_MS * HOUR_MS
POWER = Labels.of("gpu_power_draw_watts", gpu="0")
HEAT = Labels.of("gpu_temperature_celsius", gpu="0")
UP = Labels.of("up")
GPU = Layout.of("nvml", [POWER, HEAT])
OWN = Layout.of("own", [UP])
ROOMY = StoreSettings(min_free=Size(0))


def word(value):
    return struct.unpack("<Q", struct.pack("<d", value))[0]


def value_of(bits):
    return struct.unpack("<d", struct.pack("<Q", bits))[0]


def row(at_ms, *values, layout=GPU):
    return Row(layout, at_ms, rowtext.encode(values))


def opened(folder):
    return Metrics(database.own(folder / METRICS_DB, 100))


@pytest.fixture
def metrics(tmp_path):
    with closing(opened(tmp_path)) as found:
        yield found


def plain(folder, query):
    with closing(sqlite3.connect(folder / METRICS_DB)) as connection:
        return connection.execute(query).fetchall()


def one(folder, query):
    ((found,),) = plain(folder, query)
    return found


def change(folder, statement, *values):
    with closing(sqlite3.connect(folder / METRICS_DB)) as connection, connection:
        connection.execute(statement, values)


# The text of a row


@given(st.lists(st.integers(0, 2**64 - 1), max_size=8))
def test_a_row_of_any_bits_comes_back_from_its_text(patterns):
    text = rowtext.encode([value_of(bits) for bits in patterns])
    assert [word(value) for value in rowtext.decode(text)] == patterns
    json.loads(text, parse_constant=pytest.fail)  # NaN and Infinity are not JSON


@given(st.lists(st.floats(allow_nan=False), max_size=8))
def test_a_row_of_numbers_comes_back_to_the_bit(values):
    assert [word(value) for value in rowtext.decode(rowtext.encode(values))] == list(map(word, values))


def test_a_person_sees_what_is_no_number():
    odd = [ABSENT, STALE, math.nan, math.inf, -math.inf, -0.0, value_of(0x7FF8000000000123)]
    assert rowtext.encode(odd) == '[null,"stale","nan","inf","-inf",-0.0,"nan:7ff8000000000123"]'


def test_numbers_that_sum_up_to_infinity_are_numbers():
    assert rowtext.encode([1e308, 1e308]) == "[1e308,1e308]"


def test_whole_numbers_may_be_ints():
    assert rowtext.decode(rowtext.encode([1, 2**53, -3])) == [1.0, 2.0**53, -3.0]


@pytest.mark.parametrize(
    "text", ["", "[", "{}", '["often"]', '["nan:12"]', '["nan:zzzzzzzzzzzzzzzz"]', "[[1]]"]
)
def test_text_that_is_no_row_is_an_error(text):
    with pytest.raises(ValueError, match=r".") as failed:
        rowtext.decode(text)
    assert isinstance(failed.value, (msgspec.DecodeError, ValueError))


def test_a_gap_is_told_from_every_other_nan():
    assert is_absent(ABSENT)
    assert not any(map(is_absent, (STALE, math.nan, -ABSENT, 0.0, value_of(0x7FF800000000000D))))
    assert struct.pack("<d", ABSENT) == ABSENT_BITS


# Layouts


def fitted(shape, at_ms, **values):
    """The row that comes of the series named so, by the series of its column; gaps left out."""
    got = shape.fit(at_ms, [Labels.of(name) for name in values], list(values.values()))
    assert len(got) == len(shape.layout.labels)
    pairs = zip(shape.layout.labels, got, strict=True)
    return {labels.metric: value for labels, value in pairs if not is_absent(value)}


def test_the_same_series_keep_their_layout():
    shape = Shape("nvml")
    assert fitted(shape, 0, a=1.0, b=2.0) == {"a": 1.0, "b": 2.0}
    first = shape.layout
    assert fitted(shape, 1, a=3.0, b=4.0) == {"a": 3.0, "b": 4.0}
    assert fitted(shape, HOUR_MS, b=6.0, a=5.0) == {"a": 5.0, "b": 6.0}
    assert shape.layout is first


def test_a_series_that_is_lacking_leaves_a_gap_and_a_new_one_widens_the_layout():
    shape = Shape("nvml")
    fitted(shape, 0, a=1.0, b=2.0)
    first = shape.layout
    assert fitted(shape, 1, b=3.0) == {"b": 3.0}
    assert shape.layout is first
    assert fitted(shape, 2, c=4.0, b=5.0) == {"b": 5.0, "c": 4.0}
    assert [labels.metric for labels in shape.layout.labels] == ["a", "b", "c"]


def test_what_is_gone_is_forgotten_with_the_next_hour():
    shape = Shape("nvml")
    fitted(shape, HOUR_MS - 2, a=1.0, b=2.0)
    fitted(shape, HOUR_MS - 1, b=2.0)
    assert fitted(shape, HOUR_MS, b=2.0) == {"b": 2.0}
    assert [labels.metric for labels in shape.layout.labels] == ["b"]


def test_a_series_given_twice_in_one_scrape_has_one_column():
    shape = Shape("own")
    for at_ms in (0, 1, HOUR_MS):
        assert shape.fit(at_ms, [UP, HEAT, UP], [1.0, 2.0, 3.0]) == [3.0, 2.0]
    assert shape.layout.labels == (UP, HEAT)


def test_a_scrape_may_be_empty_before_between_and_after():
    shape = Shape("alerts")
    assert shape.fit(0, [], []) == []
    assert fitted(shape, 1, a=1.0) == {"a": 1.0}
    assert fitted(shape, 2) == {}
    assert shape.fit(HOUR_MS, [], []) == []


series = st.lists(st.sampled_from("abcdef"), unique=True, max_size=6)


@given(st.lists(st.tuples(st.sampled_from([1, MINUTE, 40 * MINUTE, HOUR_MS]), series), max_size=20))
def test_whatever_a_target_gives_stands_in_the_column_of_its_series(scrapes):
    shape, at_ms = Shape("vllm"), 0
    for step_ms, names in scrapes:
        at_ms += step_ms
        given_now = {name: float(number) for number, name in enumerate(names)}
        assert fitted(shape, at_ms, **given_now) == given_now


# Rows on disk


def test_rows_come_back_in_time_order(metrics):
    metrics.write([row(NOW_MS, 1.0, 60.0), row(NOW_MS - 5, 1.0, layout=OWN)])
    metrics.write([row(NOW_MS + 1, 2.0, ABSENT)])
    found = list(metrics.recent(NOW_MS - 10, NOW_MS + 1))
    assert [(layout.target, layout.labels, at_ms) for layout, at_ms, _ in found] == [
        ("own", OWN.labels, NOW_MS - 5),
        ("nvml", GPU.labels, NOW_MS),
        ("nvml", GPU.labels, NOW_MS + 1),
    ]
    assert [word(value) for value in found[2][2]] == [word(2.0), word(ABSENT)]
    assert [at_ms for _, at_ms, _ in metrics.recent(NOW_MS - 5, NOW_MS)] == [NOW_MS]
    assert metrics.newest_ms() == NOW_MS + 1


def test_a_transaction_that_fails_leaves_no_row_and_no_belief(metrics, tmp_path):
    with pytest.raises(StoreError):
        metrics.write([row(NOW_MS, 1.0, 60.0), Row(OWN, None, "[1.0]")])
    assert one(tmp_path, "SELECT count(*) FROM series") == 0
    metrics.write([row(NOW_MS, 1.0, 60.0), row(NOW_MS, 1.0, layout=OWN)])
    assert plain(tmp_path, "SELECT id FROM hot") == [(1,), (2,)]
    assert [layout.target for layout, _, _ in metrics.recent(0, NOW_MS)] == ["nvml", "own"]
    assert one(tmp_path, "SELECT first_id FROM run") == 1


def test_series_and_layouts_keep_their_ids_across_processes(metrics, tmp_path):
    metrics.write([row(NOW_MS, 1.0, 60.0)])
    before = {table: plain(tmp_path, f"SELECT * FROM {table}") for table in ("series", "layout", "target")}
    metrics.close()
    with closing(opened(tmp_path)) as again:
        again.write([row(NOW_MS + 1, 1.0, 60.0, layout=Layout.of("nvml", [POWER, HEAT]))])
        assert again.newest_id() == 2
    assert {table: plain(tmp_path, f"SELECT * FROM {table}") for table in before} == before
    assert plain(tmp_path, "SELECT first_id FROM run") == [(1,), (2,)]


def test_an_empty_scrape_is_a_row_like_any_other(metrics):
    metrics.write([row(NOW_MS, layout=Layout.of("alerts", [])), row(NOW_MS, 1.0, layout=OWN)])
    assert [row for _, _, row in metrics.recent(0, NOW_MS)] == [[], [1.0]]


def test_more_layouts_than_are_kept_at_hand_are_all_right(metrics, tmp_path):
    for n in range(1100):
        metrics.write(
            [row(NOW_MS + n, float(n), layout=Layout.of("vllm", [Labels.of("request", id=str(n))]))]
        )
    assert one(tmp_path, "SELECT count(*) FROM layout") == 1100
    found = [(layout.labels[0].get("id"), row[0]) for layout, _, row in metrics.recent(0, NOW_MS + DAY)]
    assert found == [(str(n), float(n)) for n in range(1100)]


def test_labels_that_no_database_takes_do_not_keep_the_others_from_being_saved(metrics):
    odd = Layout.of("nvml", [Labels.of("process", name="vllm\udce4"), POWER])
    metrics.write([row(NOW_MS, 1.0, 2.0, layout=odd)])
    ((layout, _, found),) = metrics.recent(0, NOW_MS)
    assert layout.labels == (Labels.of("process", name="vllm?"), POWER)
    assert found == [1.0, 2.0]


# Sealing


def sealed(target, upto_id, *frames, hourly=()):
    return Sealed(target, upto_id, [SealedFrame(*frame) for frame in frames], list(hourly))


def test_ids_are_not_given_again_after_all_rows_were_sealed(metrics, tmp_path):
    metrics.write([row(NOW_MS + n, 1.0, 60.0) for n in range(3)])
    metrics.take_in(sealed(1, 3, (NOW_MS, NOW_MS + 2, 3, [1, 2], b"frame")))
    assert metrics.delete_sealed(1 << 53) == 3
    assert metrics.oldest_unsealed_ms() is None
    metrics.close()
    with closing(opened(tmp_path)) as again:
        again.write([row(NOW_MS + 9, 1.0, 60.0)])
        assert plain(tmp_path, "SELECT id FROM hot") == [(4,)]
        assert again.oldest_unsealed_ms() == NOW_MS + 9


def test_what_a_receiver_waits_for_is_not_deleted(metrics, tmp_path):
    metrics.write([row(NOW_MS + n, 1.0, 60.0) for n in range(10)])
    metrics.take_in(sealed(1, 8))
    assert metrics.delete_sealed(5) == 4
    assert metrics.delete_sealed(5) == 0
    assert [number for number, _ in metrics.after(0, 100)] == [5, 6, 7, 8, 9, 10]
    assert metrics.delete_sealed(1 << 53) == 4
    assert plain(tmp_path, "SELECT id FROM hot") == [(9,), (10,)]


def test_sealed_rows_are_deleted_some_hundred_at_a_time(metrics):
    metrics.write([row(NOW_MS + n, 1.0, 60.0) for n in range(1000)])
    metrics.take_in(sealed(1, 1000))
    slices = [metrics.delete_sealed(1 << 53) for _ in range(5)]
    assert sum(slices) == 1000
    assert max(slices) <= 300
    assert slices[-1] == 0


# Retention


def frames_of(metrics, *spans, size=100):
    """Frames of the target `nvml`, which is made if there is none, as (from_ms, to_ms)."""
    if metrics.newest_id() == 0:
        metrics.write([row(NOW_MS, 1.0, 60.0)])
    upto = one_of(metrics, "SELECT sealed_id FROM target WHERE id = 1")
    made = [(from_ms, to_ms, 1, [1, 2], bytes(size)) for from_ms, to_ms in spans]
    with metrics._database.writing("make room for another") as connection:
        connection.exec_driver_sql("UPDATE target SET sealed_id = ?", (upto - 1,))
    metrics.take_in(sealed(1, upto, *made))


def one_of(metrics, query):
    with metrics._database.reading("look") as connection:
        return connection.exec_driver_sql(query).scalar_one()


def test_retention_takes_what_ended_before_and_leaves_what_reaches_beyond(metrics, tmp_path):
    frames_of(metrics, *((NOW_MS + n * HOUR_MS, NOW_MS + n * HOUR_MS + HOUR_MS - 1) for n in range(5)))
    assert metrics.delete_older(NOW_MS + 2 * HOUR_MS + MINUTE, 0) == 2
    assert metrics.delete_older(NOW_MS + 2 * HOUR_MS + MINUTE, 0) == 0
    assert one(tmp_path, "SELECT min(from_ms) FROM frame") == NOW_MS + 2 * HOUR_MS


def test_a_frame_that_reaches_beyond_does_not_hold_up_the_others(metrics, tmp_path):
    frames_of(metrics, (NOW_MS, NOW_MS + 10 * DAY), (NOW_MS + 1, NOW_MS + 2), (NOW_MS + DAY, NOW_MS + DAY))
    assert metrics.delete_older(NOW_MS + 2 * DAY, 0) == 2
    assert plain(tmp_path, "SELECT to_ms FROM frame") == [(NOW_MS + 10 * DAY,)]


def test_hourly_figures_have_a_retention_of_their_own(metrics, tmp_path):
    with metrics._database.writing("fill") as connection:
        connection.exec_driver_sql(
            "INSERT INTO hourly VALUES (?, ?, 1, 0, 0, 0, 0)",
            [(NOW_MS + hour * HOUR_MS, series) for hour in range(10) for series in range(50)],
        )
    deleted = []
    while chunk := metrics.delete_older(1 << 53, NOW_MS + 6 * HOUR_MS):
        deleted.append(chunk)
    assert sum(deleted) == 6 * 50
    assert max(deleted) <= 200
    assert one(tmp_path, "SELECT min(hour_ms) FROM hourly") == NOW_MS + 6 * HOUR_MS


def test_the_oldest_frames_are_the_first_to_go(metrics, tmp_path):
    frames_of(metrics, *((NOW_MS - n * HOUR_MS, NOW_MS - n * HOUR_MS) for n in range(10)), size=1000)
    assert metrics.delete_oldest(3000) == 3000
    assert one(tmp_path, "SELECT min(from_ms) FROM frame") == NOW_MS - 6 * HOUR_MS
    assert metrics.delete_oldest(1) == 1000


def test_without_frames_hourly_figures_go_and_the_newest_rows_last(metrics, tmp_path):
    metrics.write([row(NOW_MS + n, 1.0, 60.0) for n in range(600)])
    with metrics._database.writing("fill") as connection:
        connection.exec_driver_sql(
            "INSERT INTO hourly VALUES (?, 1, 1, 0, 0, 0, 0)", [(h,) for h in range(6)]
        )
    assert metrics.delete_oldest(1) > 0
    assert metrics.delete_oldest(1) > 0
    assert plain(tmp_path, "SELECT (SELECT count(*) FROM hourly), (SELECT count(*) FROM hot)") == [(0, 600)]
    assert metrics.delete_oldest(1) > 0
    assert one(tmp_path, "SELECT min(id) FROM hot") == 257
    while metrics.delete_oldest(1):
        pass
    assert one(tmp_path, "SELECT count(*) FROM hot") == 0


def test_layouts_and_series_that_nothing_uses_are_forgotten(metrics, tmp_path):
    names = [Labels.of("request", id=str(n)) for n in range(20)]
    for n, labels in enumerate(names):
        metrics.write([row(NOW_MS + n, 1.0, 2.0, layout=Layout.of("vllm", [labels, UP]))])
    metrics.take_in(sealed(1, 19, (NOW_MS, NOW_MS, 1, [1, 2], b"frame"), hourly=[(NOW_MS, 3, 1, 1, 1, 1, 1)]))
    metrics.delete_sealed(1 << 53)
    assert metrics.forget_unused() > 0
    assert metrics.forget_unused() == 0
    assert one(tmp_path, "SELECT count(*) FROM layout") == 2
    kept = {json.loads(labels).get("id") for (labels,) in plain(tmp_path, "SELECT labels FROM series")}
    assert {None, "0", "19"} <= kept
    assert len(kept) <= 4
    again = Layout.of("vllm", [names[5], UP])
    metrics.write([row(NOW_MS + 99, 7.0, 8.0, layout=again)])
    assert [layout.labels for layout, at, _ in metrics.recent(NOW_MS + 98, NOW_MS + 99)] == [(names[5], UP)]


def test_runs_of_which_no_row_is_left_are_forgotten(metrics, tmp_path):
    for run in range(5):
        metrics.write([row(NOW_MS + run, 1.0, 60.0)])
        metrics.close()
        metrics = opened(tmp_path)
    metrics.take_in(sealed(1, 3))
    metrics.delete_sealed(1 << 53)
    metrics.forget_unused()
    metrics.close()
    assert plain(tmp_path, "SELECT first_id FROM run") == [(4,), (5,)]


# Limits


def test_a_file_grows_to_its_limit_and_no_further(metrics, tmp_path):
    metrics.limit(2 * MIB)
    wide = Layout.of("nvml", [Labels.of("gpu", n=str(n)) for n in range(500)])
    rows = (row(NOW_MS + n, *([n / 7] * 500), layout=wide) for n in range(10_000))
    with pytest.raises(StoreError) as failed:
        collections.deque((metrics.write([one]) for one in rows), maxlen=0)
    assert failed.value.kind == "full"
    assert metrics.file_bytes() <= 2 * MIB
    assert metrics.used_bytes() <= metrics.file_bytes()
    written = one(tmp_path, "SELECT count(*) FROM hot")
    assert metrics.delete_oldest(1) > 0
    metrics.write([row(NOW_MS + DAY, *([0.0] * 500), layout=wide)])
    assert metrics.newest_ms() == NOW_MS + DAY
    assert one(tmp_path, "SELECT count(*) FROM hot") < written
    metrics.limit(1 << 40)
    metrics.write([row(NOW_MS + DAY, *([n / 7] * 500), layout=wide) for n in range(300)])
    assert metrics.file_bytes() > 2 * MIB


def test_a_limit_below_the_present_size_stops_growth_and_loses_nothing(metrics, tmp_path):
    wide = Layout.of("nvml", [Labels.of("gpu", n=str(n)) for n in range(500)])
    rows = [row(NOW_MS + n, *([n / 7] * 500), layout=wide) for n in range(300)]
    metrics.write(rows)
    size = metrics.file_bytes()
    metrics.limit(0)
    with pytest.raises(StoreError) as failed:
        metrics.write(rows)
    assert failed.value.kind == "full"
    assert (metrics.file_bytes(), one(tmp_path, "SELECT count(*) FROM hot")) == (size, 300)
    assert size % PAGE_BYTES == 0


# Sending on


def test_rows_to_send_on_are_scrapes_without_gaps(metrics):
    metrics.write([row(NOW_MS, 1.0, ABSENT), row(NOW_MS + 1, STALE, 60.0), row(NOW_MS, 1.0, layout=OWN)])
    (first, one), (second, two) = metrics.after(0, 2)
    assert (first, one) == (1, Scrape("nvml", NOW_MS, [POWER], [1.0]))
    assert (second, two.labels, list(map(word, two.values))) == (2, [POWER, HEAT], [word(STALE), word(60.0)])
    assert [number for number, _ in metrics.after(2, 10)] == [3]
    assert metrics.after(3, 10) == []


def test_how_far_a_receiver_has_come_is_remembered(metrics, tmp_path):
    assert metrics.forwarders() == {}
    metrics.save_forwarder("mimir", 7, "{}")
    metrics.save_forwarder("mimir", 9, '{"failures":1}')
    metrics.close()
    with closing(opened(tmp_path)) as again:
        assert again.forwarders() == {"mimir": (9, '{"failures":1}')}
