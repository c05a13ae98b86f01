"""The memory window: what it gives back, what it forgets, and how much it may weigh."""

from __future__ import annotations

import math
import struct
import threading
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuwatch.promql import Matcher
from gpuwatch.records import STALE, Labels, is_stale
from gpuwatch.store.layouts import ABSENT, Layout
from gpuwatch.store.recent import Recent

SECOND, MINUTE = 1000, 60_000
HOUR = 60 * MINUTE
EVER = (-1, 10**15)
POWER = Labels.of("gpu_power_draw_watts", gpu="0")
HEAT = Labels.of("gpu_temperature_celsius", gpu="0")
NAMED_POWER = Matcher("__name__", "=", "gpu_power_draw_watts")
ALL = Matcher("__name__", "=~", ".+")
GPU = Layout.of("nvml", [POWER, HEAT])
POWER_ALONE = Layout.of("nvml", [POWER])


def bits(value):
    return struct.pack("<d", value)


def memory(*points, labels=POWER, window_ms=HOUR):
    recent = Recent(window_ms)
    layout = Layout.of("nvml", [labels])
    for at_ms, value in points:
        recent.append(layout, at_ms, [value])
    return recent


def selected(recent, *matchers, after_ms=-1, upto_ms=10**15):
    found = recent.select(matchers or (ALL,), after_ms, upto_ms)
    assert len({s.labels for s in found}) == len(found)
    return {s.labels: list(zip(s.at_ms, s.values, strict=True)) for s in found}


# -- select ------------------------------------------------------------------------------------------


def test_a_window_is_open_on_the_left_and_closed_on_the_right():
    recent = memory((1000, 1.0), (2000, 2.0), (3000, 3.0), (4000, 4.0))
    assert selected(recent, after_ms=1000, upto_ms=3000) == {POWER: [(2000, 2.0), (3000, 3.0)]}


@pytest.mark.parametrize("after", [0, 1, 298, 299, 300, 301, 450, 1999])
@pytest.mark.parametrize("length", [1, 2, 299, 300, 301, 1000])
def test_a_window_may_begin_and_end_anywhere_in_an_hour(after, length):
    recent = memory(*((n * SECOND, float(n)) for n in range(2000)))
    wanted = [(n * SECOND, float(n)) for n in range(after + 1, min(after + length, 1999) + 1)]
    found = selected(recent, after_ms=after * SECOND, upto_ms=(after + length) * SECOND)
    assert found == ({POWER: wanted} if wanted else {})


def test_a_series_without_samples_in_the_window_is_left_out():
    recent = memory((1000, 1.0), (3000, 1.0))
    assert selected(recent, after_ms=3000) == {}
    assert selected(recent, upto_ms=999) == {}
    assert selected(recent, after_ms=1000, upto_ms=2999) == {}


def test_every_value_of_a_row_belongs_to_the_series_of_its_column():
    recent = Recent(HOUR)
    recent.append(GPU, 1000, [300.0, 60.0])
    recent.append(GPU, 2000, [310.0, 61.0])
    assert selected(recent) == {POWER: [(1000, 300.0), (2000, 310.0)], HEAT: [(1000, 60.0), (2000, 61.0)]}


def test_instants_are_ints_and_values_floats():
    (series,) = memory((1000, 1), (2000, 2)).select([NAMED_POWER], *EVER)
    assert [type(at) for at in series.at_ms] == [int, int]
    assert [type(value) for value in series.values] == [float, float]


def test_every_matcher_must_match_and_an_absent_label_is_empty():
    recent = Recent(HOUR)
    series = [Labels.of("up", source=name) for name in ("nvml", "vllm")] + [Labels.of("up")]
    recent.append(Layout.of("own", series), 1000, [1.0] * 3)
    up = Matcher("__name__", "=", "up")
    assert set(selected(recent, up)) == set(series)
    assert set(selected(recent, up, Matcher("source", "=~", "nv.*"))) == {series[0]}
    assert set(selected(recent, up, Matcher("source", "=", ""))) == {series[2]}
    assert set(selected(recent, Matcher("source", "!=", ""))) == set(series[:2])
    assert selected(recent, Matcher("__name__", "=", "down")) == {}
    assert selected(recent, up, Matcher("__name__", "=", "down")) == {}


def test_a_question_asked_before_finds_a_series_that_came_after_it():
    recent = Recent(HOUR)
    recent.append(POWER_ALONE, 1000, [1.0])
    assert set(selected(recent)) == {POWER}
    recent.append(GPU, 2000, [2.0, 60.0])
    assert selected(recent) == {POWER: [(1000, 1.0), (2000, 2.0)], HEAT: [(2000, 60.0)]}
    recent.append(Layout.of("own", [Labels.of("up")]), 2000, [1.0])
    assert set(selected(recent)) == {POWER, HEAT, Labels.of("up")}


def test_many_different_questions_are_all_answered():
    recent = memory((1000, 1.0))
    for n in range(3000):
        assert selected(recent, Matcher("gpu", "!=", f"no {n}")) == {POWER: [(1000, 1.0)]}


def test_what_was_selected_does_not_change_afterwards():
    recent = memory((1000, 1.0))
    (series,) = recent.select([NAMED_POWER], 0, 10_000)
    recent.append(POWER_ALONE, 2000, [1.0])
    assert list(series.at_ms) == [1000]


# -- append ------------------------------------------------------------------------------------------


def test_a_second_scrape_of_one_instant_replaces_the_first_whole():
    recent = Recent(HOUR)
    recent.append(GPU, 1000, [1.0, 60.0])
    assert recent.append(GPU, 1000, [2.0, ABSENT])
    assert selected(recent) == {POWER: [(1000, 2.0)]}


def test_a_second_scrape_of_one_instant_may_have_another_layout():
    recent = Recent(HOUR)
    recent.append(GPU, 1000, [1.0, 60.0])
    recent.append(GPU, 2000, [1.0, 60.0])
    recent.append(POWER_ALONE, 2000, [2.0])
    recent.append(GPU, 2000, [3.0, 70.0])
    assert selected(recent) == {POWER: [(1000, 1.0), (2000, 3.0)], HEAT: [(1000, 60.0), (2000, 70.0)]}


def test_a_scrape_older_than_the_newest_of_its_target_is_not_taken():
    recent = memory((2000, 2.0))
    assert recent.append(POWER_ALONE, 1000, [1.0]) is False
    assert selected(recent) == {POWER: [(2000, 2.0)]}


def test_a_target_is_not_held_up_by_a_newer_scrape_of_another():
    recent = memory((2000, 2.0))
    assert recent.append(Layout.of("own", [HEAT]), 1000, [60.0]) is True
    assert selected(recent) == {POWER: [(2000, 2.0)], HEAT: [(1000, 60.0)]}


def test_a_row_that_does_not_fit_its_layout_is_an_error():
    with pytest.raises(struct.error):
        Recent(HOUR).append(GPU, 1000, [1.0])


def test_a_target_without_series_may_be_scraped():
    recent = Recent(HOUR)
    for at_ms in range(0, 20 * MINUTE, SECOND):
        assert recent.append(Layout.of("alerts", []), at_ms, [])
    assert selected(recent) == {}
    assert len(recent) == 0


# -- gaps and markers --------------------------------------------------------------------------------


def test_the_staleness_marker_and_any_nan_keep_their_bits():
    odd = [
        STALE,
        math.nan,
        -math.nan,
        math.inf,
        -math.inf,
        -0.0,
        struct.unpack("<d", b"\1" * 6 + b"\xf8\x7f")[0],
    ]
    recent = memory(*((SECOND * n, value) for n, value in enumerate(odd * 130)))
    (points,) = selected(recent).values()
    assert [bits(value) for _, value in points] == [bits(value) for value in odd * 130]


def test_a_gap_is_no_sample():
    recent = Recent(HOUR)
    for n in range(3000):  # long enough for what is packed, and what is not
        recent.append(GPU, n * SECOND, [float(n), ABSENT if n % 3 else float(n)])
    found = selected(recent)
    assert [at for at, _ in found[POWER]] == [n * SECOND for n in range(3000)]
    assert found[HEAT] == [(n * SECOND, float(n)) for n in range(0, 3000, 3)]


def test_a_series_of_gaps_alone_is_left_out_and_one_that_ended_is_not():
    recent = Recent(HOUR)
    for n in range(1000):
        recent.append(GPU, n * SECOND, [ABSENT, STALE if n == 500 else ABSENT])
    assert {labels: [at for at, _ in points] for labels, points in selected(recent).items()} == {
        HEAT: [500_000]
    }


def test_a_gap_in_what_is_packed_already_is_no_sample():
    recent = Recent(HOUR)
    for n in range(1000):
        recent.append(POWER_ALONE, n * SECOND, [ABSENT if n < 10 else float(n)])
    assert selected(recent)[POWER] == [(n * SECOND, float(n)) for n in range(10, 1000)]


# -- a series that stands in several places ------------------------------------------------------------


def test_a_series_goes_on_over_a_change_of_layout():
    recent = Recent(HOUR)
    layouts = [POWER_ALONE, GPU, Layout.of("nvml", [HEAT, POWER]), POWER_ALONE]
    for n in range(40):
        layout = layouts[n // 10]
        recent.append(layout, n, [n + 0.5 if labels == POWER else -n for labels in layout.labels])
    found = selected(recent)
    assert found[POWER] == [(n, n + 0.5) for n in range(40)]
    assert found[HEAT] == [(n, -n) for n in range(10, 30)]


def test_a_series_of_two_targets_comes_once_and_the_target_heard_of_last_counts():
    recent = Recent(HOUR)
    one, other = Layout.of("one", [POWER, HEAT]), Layout.of("other", [HEAT])
    for at_ms in (1000, 3000, 4000):
        recent.append(one, at_ms, [1.0, 1.0])
    for at_ms in (2000, 3000):
        recent.append(other, at_ms, [2.0])
    recent.append(other, 4000, [ABSENT])
    found = selected(recent)
    assert found[HEAT] == [(1000, 1.0), (2000, 2.0), (3000, 2.0), (4000, 1.0)]
    assert found[POWER] == [(1000, 1.0), (3000, 1.0), (4000, 1.0)]


def test_a_series_that_moved_to_another_target_is_one_series():
    recent = Recent(HOUR)
    recent.append(Layout.of("one", [POWER]), 1000, [1.0])
    recent.append(Layout.of("other", [POWER]), 2000, [2.0])
    assert selected(recent) == {POWER: [(1000, 1.0), (2000, 2.0)]}


# -- forgetting ----------------------------------------------------------------------------------------


def test_the_whole_window_is_held_and_little_more():
    recent = Recent(HOUR)
    for at_ms in range(0, 3 * HOUR + 17 * SECOND, SECOND):
        recent.append(POWER_ALONE, at_ms, [float(at_ms)])
        if at_ms % (7 * MINUTE) == 0:
            (points,) = selected(recent, after_ms=at_ms - HOUR).values()
            assert points == [
                (at, float(at)) for at in range(max(0, at_ms - HOUR + SECOND), at_ms + 1, SECOND)
            ]
    (points,) = selected(recent).values()
    assert len(points) <= 3600 + 600


def test_a_rarely_scraped_target_is_held_for_the_window_too():
    recent = Recent(HOUR)
    for at_ms in range(0, 3 * HOUR, 10 * MINUTE):
        recent.append(POWER_ALONE, at_ms, [1.0])
    (points,) = selected(recent).values()
    assert [at for at, _ in points] == list(range(3 * HOUR - 70 * MINUTE, 3 * HOUR, 10 * MINUTE))[1:]


def test_a_target_that_fell_silent_long_ago_is_forgotten_and_can_come_back():
    recent = Recent(10 * MINUTE)
    recent.append(POWER_ALONE, 0, [1.0])
    for at_ms in range(0, 16 * MINUTE, SECOND):
        recent.append(Layout.of("own", [HEAT]), at_ms, [1.0])
    assert len(recent) == 1
    assert selected(recent, NAMED_POWER) == {}
    recent.append(POWER_ALONE, 16 * MINUTE, [2.0])
    assert len(recent) == 2
    assert selected(recent, NAMED_POWER) == {POWER: [(16 * MINUTE, 2.0)]}


def test_a_window_can_be_widened_as_it_goes_on():
    recent = Recent(10 * MINUTE)
    for at_ms in range(0, HOUR, SECOND):
        recent.append(POWER_ALONE, at_ms, [1.0])
        if at_ms == 8 * MINUTE:
            recent.window_ms = HOUR
    assert len(selected(recent)[POWER]) == 3600


def test_an_empty_memory_holds_nothing():
    recent = Recent(HOUR)
    assert (len(recent), recent.bytes_held(), selected(recent), recent.silent_since(0)) == (0, 0, {}, [])


# -- what fell silent ------------------------------------------------------------------------------------


def test_silent_is_what_has_not_ended_and_has_no_sample_since():
    recent = Recent(HOUR)
    names = ["goes_on", "ended", "gone", "never", "ended_before_the_gap"]
    labels = [Labels.of(name) for name in names]
    layout = Layout.of("nvml", labels)
    recent.append(layout, 1000, [1.0, 1.0, 1.0, ABSENT, STALE])
    recent.append(layout, 2000, [1.0, STALE, ABSENT, ABSENT, ABSENT])
    recent.append(layout, 3000, [1.0, ABSENT, ABSENT, ABSENT, ABSENT])
    assert recent.silent_since(3000) == [labels[2]]
    assert recent.silent_since(1000) == []
    assert set(recent.silent_since(3001)) == {labels[0], labels[2]}


def test_silent_is_judged_by_the_newest_sample_of_all_targets_and_layouts():
    recent = Recent(HOUR)
    recent.append(Layout.of("new", [POWER]), 5000, [1.0])
    recent.append(Layout.of("old", [POWER, HEAT]), 1000, [1.0, 60.0])
    recent.append(Layout.of("old", [POWER]), 2000, [STALE])
    assert recent.silent_since(5000) == [HEAT]
    assert set(recent.silent_since(6000)) == {HEAT, POWER}


def test_what_fell_silent_long_ago_is_found_in_packed_blocks_too():
    recent = Recent(HOUR)
    for n in range(3000):
        recent.append(GPU, n * SECOND, [float(n), float(n) if n < 100 else ABSENT])
    assert recent.silent_since(2999 * SECOND) == [HEAT]


# -- against a plain dictionary --------------------------------------------------------------------------

CELLS = st.sampled_from([0.0, 1.0, 1.5, 2.0**60, -3.25, ABSENT, STALE, math.nan])
SCRAPES = st.lists(
    st.tuples(
        st.sampled_from(["nvml", "own"]),
        st.integers(0, 5),  # which layout
        st.sampled_from([0, 1, 1000, 1000, 1000, 100_000]),  # how long after the scrape before
        st.lists(CELLS, min_size=3, max_size=3),
    ),
    max_size=120,
)
SERIES = [Labels.of("a", n=str(n)) for n in range(2)] + [Labels.of("b")]
COLUMNS = [SERIES, SERIES[:1], SERIES[1:], SERIES[::-1], SERIES[2:], SERIES[:2]]
LAYOUTS = {
    (target, n): Layout.of(target, labels) for target in ("nvml", "own") for n, labels in enumerate(COLUMNS)
}


@settings(deadline=None, max_examples=150)
@given(SCRAPES, st.integers(0, 2_000_000), st.integers(1, 2_000_000))
def test_it_holds_what_a_plain_dictionary_would(scrapes, after_ms, range_ms):
    recent, plain, at_ms = Recent(10 * HOUR), {"nvml": {}, "own": {}}, 0
    order = list(dict.fromkeys(target for target, *_ in scrapes))
    for target, number, step_ms, cells in scrapes:
        at_ms += step_ms
        layout = LAYOUTS[target, number]
        row = cells[: len(layout.labels)]
        assert recent.append(layout, at_ms, row)
        plain[target][at_ms] = dict(zip(layout.labels, map(bits, row), strict=True))
    wanted: dict[Labels, dict[int, bytes]] = {}
    for target in order:
        for at, scrape in plain[target].items():
            for labels, cell in scrape.items():
                if after_ms < at <= after_ms + range_ms and cell != bits(ABSENT):
                    wanted.setdefault(labels, {})[at] = cell
    found = selected(recent, after_ms=after_ms, upto_ms=after_ms + range_ms)
    assert {labels: [(at, bits(v)) for at, v in points] for labels, points in found.items()} == {
        labels: sorted(points.items()) for labels, points in wanted.items()
    }


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(), min_size=1, max_size=40), st.integers(300, 1300))
def test_a_column_of_any_bits_comes_back_from_the_packing(cycle, count):
    values = [cycle[n % len(cycle)] for n in range(count)]
    values = [0.0 if bits(value) == bits(ABSENT) else value for value in values]
    recent = memory(*((n * SECOND, value) for n, value in enumerate(values)))
    (points,) = selected(recent).values()
    assert [(at, bits(value)) for at, value in points] == [
        (n * SECOND, bits(value)) for n, value in enumerate(values)
    ]


# -- weight and threads ----------------------------------------------------------------------------------


def test_an_hour_of_200_series_weighs_less_than_4_bytes_a_sample():
    gauges = [Labels.of("gpu_reading", gpu=str(n)) for n in range(200)]
    layout, recent = Layout.of("nvml", gauges), Recent(HOUR)
    tracemalloc.start()
    try:
        for second in range(3600):
            recent.append(layout, second * SECOND, [float(second * n // 60) for n in range(200)])
        weight_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert weight_bytes < 4 * 200 * 3600
    assert recent.bytes_held() <= weight_bytes


def test_what_never_changes_weighs_next_to_nothing_once_packed():
    layout, recent = Layout.of("nvml", [Labels.of("limit", gpu=str(n)) for n in range(200)]), Recent(HOUR)
    for second in range(3600):
        recent.append(layout, second * SECOND, [700.0] * 200)
    assert recent.bytes_held() < 700 * 200 * 8


def test_several_sources_append_while_one_thread_reads():
    recent = Recent(4 * HOUR)
    layouts = [
        Layout.of(f"source {n}", [Labels.of("up", source=str(n)), Labels.of("down")]) for n in range(4)
    ]

    def append(layout):
        for n in range(3000):
            recent.append(layout, n * SECOND, [float(n), 1.0])

    sources = [threading.Thread(target=append, args=(layout,)) for layout in layouts]
    for source in sources:
        source.start()
    while any(source.is_alive() for source in sources):
        for labels, points in selected(recent, upto_ms=2999 * SECOND).items():
            assert [at for at, _ in points] == [n * SECOND for n in range(len(points))]
            assert labels.metric == "down" or points == [(n * SECOND, float(n)) for n in range(len(points))]
    found = selected(recent)
    assert [len(points) for points in found.values()] == [3000] * 5
    assert not any(is_stale(value) for points in found.values() for _, value in points)
