"""The memory window: what it gives back, what it forgets, and how much it may weigh."""

from __future__ import annotations

import threading
import tracemalloc

from gpuwatch.promql import Matcher
from gpuwatch.records import STALE, Labels, Sample, is_stale
from gpuwatch.store.recent import Recent

MINUTE = 60_000
DAY = 24 * 60 * MINUTE
POWER = Labels.of("gpu_power_draw_watts", gpu="0")
NAMED_POWER = Matcher("__name__", "=", "gpu_power_draw_watts")


def window_with(*points, labels=POWER, window_ms=10 * MINUTE):
    recent = Recent(window_ms)
    recent.append([Sample(labels, at_ms, value) for at_ms, value in points])
    return recent


def selected(recent, *matchers, after_ms=0, upto_ms=10**15):
    found = recent.select(matchers or (NAMED_POWER,), after_ms, upto_ms)
    return {s.labels: list(zip(s.at_ms, s.values, strict=True)) for s in found}


def test_a_window_is_open_on_the_left_and_closed_on_the_right():
    recent = window_with((1000, 1.0), (2000, 2.0), (3000, 3.0), (4000, 4.0))
    assert selected(recent, after_ms=1000, upto_ms=3000) == {POWER: [(2000, 2.0), (3000, 3.0)]}


def test_a_series_without_samples_in_the_window_is_left_out():
    assert selected(window_with((1000, 1.0)), after_ms=1000) == {}


def test_every_matcher_must_match_and_an_absent_label_is_empty():
    recent = Recent(10 * MINUTE)
    series = [Labels.of("up", source=name) for name in ("nvml", "vllm")] + [Labels.of("up")]
    recent.append([Sample(labels, 1000, 1.0) for labels in series])
    up = Matcher("__name__", "=", "up")
    assert set(selected(recent, up)) == set(series)
    assert set(selected(recent, up, Matcher("source", "=~", "nv.*"))) == {series[0]}
    assert set(selected(recent, up, Matcher("source", "=", ""))) == {series[2]}
    assert set(selected(recent, Matcher("source", "!=", ""))) == set(series[:2])
    assert selected(recent, Matcher("__name__", "=", "down")) == {}


def test_a_second_value_of_one_instant_replaces_the_first():
    recent = window_with((1000, 1.0), (1000, 2.0))
    assert selected(recent) == {POWER: [(1000, 2.0)]}


def test_a_sample_older_than_the_last_of_its_series_is_ignored_and_not_taken():
    recent = window_with((2000, 2.0))
    assert recent.append([Sample(POWER, 1000, 1.0)]) == []
    assert selected(recent) == {POWER: [(2000, 2.0)]}


def test_the_staleness_marker_keeps_its_bits():
    (values,) = selected(window_with((1000, STALE))).values()
    assert is_stale(values[0][1])


def test_the_last_value_is_the_newest_at_the_time_asked_for():
    recent = window_with((1000, 1.0), (2000, 0.0), (3000, 3.0))
    assert recent.last(POWER.metric, 2500, 300_000) == {POWER: 0.0}
    assert recent.last(POWER.metric, 2500, 500) == {}
    assert recent.last(POWER.metric, 500, 300_000) == {}
    assert recent.last("gpu_nothing", 2500, 300_000) == {}


def test_an_ended_series_has_no_last_value():
    recent = window_with((1000, 1.0), (2000, STALE))
    assert recent.last(POWER.metric, 2000, 300_000) == {}
    assert recent.last(POWER.metric, 1999, 300_000) == {POWER: 1.0}


def test_what_is_older_than_the_window_is_dropped_in_time():
    recent = Recent(10 * MINUTE)
    for at_ms in range(0, 60 * MINUTE, 1000):
        recent.append([Sample(POWER, at_ms, 1.0)])
    (points,) = selected(recent, after_ms=-1).values()
    assert 600 <= len(points) <= 600 + 60 + 60


def test_a_series_that_ended_long_ago_is_forgotten():
    recent = window_with((0, 1.0), labels=Labels.of("old"))
    for at_ms in range(0, 12 * MINUTE, 1000):
        recent.append([Sample(POWER, at_ms, 1.0)])
    assert len(recent) == 1
    assert selected(recent, Matcher("__name__", "=", "old"), after_ms=-1) == {}


def test_a_forgotten_series_can_come_back():
    recent = window_with((0, 1.0))
    recent.append([Sample(Labels.of("clock"), 20 * MINUTE, 1.0)])
    recent.append([Sample(POWER, 21 * MINUTE, 2.0)])
    assert selected(recent, after_ms=-1) == {POWER: [(21 * MINUTE, 2.0)]}


def test_a_clock_that_jumped_ahead_and_back_does_not_stop_the_forgetting():
    recent = window_with((DAY, 1.0), labels=Labels.of("clock"))
    for at_ms in range(0, 60 * MINUTE, 1000):
        recent.append([Sample(POWER, at_ms, 1.0)])
    (points,) = selected(recent, after_ms=-1).values()
    assert len(points) <= 600 + 60 + 60


def test_what_was_selected_does_not_change_afterwards():
    recent = window_with((1000, 1.0))
    (series,) = recent.select([NAMED_POWER], 0, 10_000)
    recent.append([Sample(POWER, 2000, 2.0)])
    assert list(series.at_ms) == [1000]


def test_ten_minutes_of_500_series_weigh_less_than_8_mib():
    series = [Labels.of("gpu_reading", gpu=str(n)) for n in range(500)]
    recent = Recent(10 * MINUTE)
    tracemalloc.start()
    try:
        for second in range(720):
            recent.append([Sample(labels, second * 1000, float(second)) for labels in series])
        weight_bytes, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert weight_bytes < 8 * 2**20


def test_several_sources_append_while_one_thread_reads():
    recent = Recent(10_000)

    def append(source):
        for at_ms in range(0, 60_000, 20):
            recent.append([Sample(Labels.of("up", source=source), at_ms, 1.0)])

    sources = [threading.Thread(target=append, args=(str(n),)) for n in range(4)]
    for source in sources:
        source.start()
    while any(source.is_alive() for source in sources):
        for points in selected(recent, Matcher("__name__", "=", "up"), after_ms=-1).values():
            times = [at_ms for at_ms, _ in points]
            assert times == sorted(set(times))
    assert len(recent.last("up", 60_000, 60_000)) == 4
