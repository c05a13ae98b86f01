"""Charts in the terminal: what stands where, in which characters, within which width."""

from __future__ import annotations

import datetime as dt
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpuwatch import promql
from gpuwatch.cli import units
from gpuwatch.cli.plot import MOST_SERIES, Canvas, Frame, columns_of, common, cut, draw
from gpuwatch.promql import Series
from gpuwatch.records import STALE, Labels

SECOND, MINUTE, HOUR = 1000, 60_000, 3_600_000
TEN = 1_795_255_200_000  # 2026-11-21 10:00 UTC
GIB = 2.0**30
USED = Labels.of("gpu_memory_used_bytes", gpu="0")


def frame(minutes=60, step_ms=MINUTE, unit="", start_ms=TEN, zone=dt.UTC):
    return Frame(start_ms, start_ms + minutes * MINUTE, step_ms, unit, zone)


def every(step_ms, values, labels=USED):
    return Series(labels, [TEN + n * step_ms for n in range(len(values))], values)


def chart(text):
    """The lines of the chart itself, without its left axis."""
    return [line.split("┤")[-1].split("│")[-1] for line in text.split("\n") if "┤" in line or "│" in line]


def test_a_rising_line_goes_from_one_corner_to_the_other_with_axes_and_a_legend():
    rising = every(MINUTE, [n * GIB for n in range(61)])
    text = draw([rising], frame(unit="bytes"), Canvas(width=50, height=6))
    assert text.split("\n") == [
        "60 GiB ┤                                   ⢀⣀⡠⠤⠔⠒⠉",
        "       │                            ⢀⣀⡠⠤⠒⠒⠉⠁",
        "       │                     ⣀⣀⠤⠤⠒⠊⠉⠁",
        "30 GiB ┤              ⣀⣀⠤⠔⠒⠊⠉",
        "       │       ⣀⡠⠤⠔⠒⠉⠉",
        " 0 GiB ┤⣀⡠⠤⠒⠒⠉⠉",
        "       └┬───────────────────┬────────────────────┬",
        "        10:00             10:30              11:00",
        "        2026-11-21 10:00:00 to 11:00:00 UTC",
        '⣿ gpu_memory_used_bytes{gpu="0"}  last 60 GiB',
    ]


def test_a_gap_stays_a_gap():
    values = [5.0] * 61
    full = draw([every(MINUTE, values)], frame(), Canvas(width=60, height=4))
    holed = Series(USED, [TEN + n * MINUTE for n in range(61) if not 20 <= n < 40], [5.0] * 41)
    text = draw([holed], frame(), Canvas(width=60, height=4))
    (line,) = [line for line in chart(full) if line.strip()]
    (broken,) = [line for line in chart(text) if line.strip()]
    assert " " not in line
    left, right = broken.split()
    assert (len(broken), broken.index(right)) == (len(line), pytest.approx(len(line) * 40 / 60, abs=1))
    assert len(left) == pytest.approx(len(line) * 19 / 60, abs=1)


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, STALE])
def test_what_is_no_finite_number_is_a_gap_and_is_counted(odd):
    values = [1.0] * 30 + [odd] + [1.0] * 30
    text = draw([every(MINUTE, values)], frame(), Canvas(width=140, height=4))
    (line,) = [line for line in chart(text) if line.strip()]
    assert len(line.split()) == 2
    assert "1 NaN or infinite, not drawn" in text


def test_nothing_but_nan_gives_axes_without_a_line():
    text = draw([every(MINUTE, [math.nan] * 61)], frame(), Canvas(width=60, height=4))
    assert [line for line in chart(text) if line.strip()] == []
    assert "61 NaN or infinite, not drawn" in text


def test_without_colour_each_series_has_a_mark_of_its_own():
    series = [every(MINUTE, [float(n)] * 61, Labels.of("up", gpu=str(n))) for n in range(3)]
    text = draw(series, frame(), Canvas(width=40, height=9))
    assert [set(line.strip()) for line in chart(text) if line.strip()] == [{"■"}, {"▲"}, {"●"}]
    assert [line[:11] for line in text.split("\n")[-4:]] == [
        "up",
        '● {gpu="0"}',
        '▲ {gpu="1"}',
        '■ {gpu="2"}',
    ]


def test_series_that_meet_take_turns_so_that_none_is_hidden():
    series = [every(MINUTE, [1.0] * 61, Labels.of("up", gpu=str(n))) for n in range(2)]
    (line,) = [
        line for line in chart(draw(series, frame(), Canvas(width=40, height=4, ascii=False))) if line.strip()
    ]
    assert line.startswith("●▲●▲●▲")


def test_with_colour_dots_are_drawn_in_the_colours_of_the_legend():
    series = [every(MINUTE, [float(n)] * 61, Labels.of("up", gpu=str(n))) for n in range(2)]
    text = draw(series, frame(), Canvas(width=60, height=5, colour=True))
    assert '\x1b[36m⣿\x1b[0m {gpu="0"}' in text
    assert '\x1b[33m⣿\x1b[0m {gpu="1"}' in text
    assert "▲" not in text


def test_ascii_is_ascii_alone_whatever_the_labels():
    series = [every(MINUTE, [20.0, 30.0], Labels.of("x_celsius", name=name)) for name in ("显存", "a" * 90)]
    text = draw(series, frame(2, unit="celsius"), Canvas(width=60, height=5, ascii=True))
    assert text.isascii()
    assert "*" in text
    assert "+" in text
    assert "30 C +" in text


def test_more_series_than_can_be_told_apart_are_left_out_with_a_word():
    series = [every(MINUTE, [float(n)], Labels.of("up", gpu=str(n))) for n in range(MOST_SERIES + 3)]
    text = draw(series, frame(), Canvas())
    assert "and 3 more series that are not drawn" in text
    assert 'gpu="7"' in text
    assert 'gpu="8"' not in text


def test_times_are_those_of_the_clock_of_the_place():
    shanghai = dt.timezone(dt.timedelta(hours=8), "CST")
    text = draw([every(HOUR, [1.0] * 25)], frame(24 * 60, HOUR, zone=shanghai), Canvas(width=70, height=4))
    assert "00:00" in text
    assert "2026-11-21 18:00:00 to 2026-11-22 18:00:00 CST" in text


def test_ticks_are_dates_where_the_span_is_long():
    days = frame(14 * 24 * 60, HOUR)
    text = draw([every(HOUR, [1.0] * 300)], days, Canvas(width=80, height=4))
    assert re.findall(r"\d\d-\d\d", text.split("\n")[5]) == ["11-24", "11-27", "11-30", "12-03"]


lists = st.lists(
    st.floats(width=64) | st.sampled_from([0.0, 5e-324, 1.7e308, -1.7e308, 1e17]), min_size=1, max_size=40
)


@given(
    st.lists(lists, min_size=1, max_size=10),
    st.sampled_from(["", "bytes", "ratio", "celsius", "seconds", "watts", "hertz", "bytes/s", "/s"]),
    st.integers(1, 200),
    st.integers(4, 24),
    st.booleans(),
    st.sampled_from([1, 5, 59_000, HOUR, 400 * 24 * HOUR]),
)
def test_any_values_fit_on_any_canvas(all_values, unit, width, height, plain, span_ms):
    step_ms = max(1, span_ms // 40)
    series = [every(step_ms, values, Labels.of("m", n="长" * n)) for n, values in enumerate(all_values)]
    canvas = Canvas(width=width, height=height, ascii=plain)
    text = draw(series, Frame(TEN, TEN + span_ms, step_ms, unit, dt.UTC), canvas)
    lines = text.split("\n")
    assert len(lines) >= height + 4
    for line in lines[: height + 2]:
        assert columns_of(line) <= canvas.columns


def left_texts(values):
    text = draw([every(MINUTE, values)], frame(), Canvas(width=60, height=9))
    return [line.split("┤")[0].strip() for line in text.split("\n") if "┤" in line]


def test_ticks_begin_and_end_where_the_room_around_a_steady_value_does():
    assert left_texts([1.0]) == ["1.05", "1.00", "0.95"]


def test_ticks_of_large_values_that_hardly_change_have_the_decimals_that_differ():
    assert left_texts([1_795_177_000.0, 1_795_177_400.0]) == ["1.7951774G", "1.7951772G", "1.7951770G"]
    assert left_texts([0.0, 3e-6]) == ["4e-06", "2e-06", "0"]


def test_labels_that_all_have_are_common():
    one, other = Labels.of("up", gpu="0", host="a"), Labels.of("up", gpu="1", host="a")
    assert common([one, other]) == Labels.of("up", host="a")
    assert common([one, one]) == one
    assert common([]) == ()


def test_a_text_is_cut_by_the_columns_it_takes():
    assert cut("显存不足", 8) == "显存不足"
    assert cut("显存不足", 6) == "显存…"
    assert columns_of("a显é") == 4


# Units


@pytest.mark.parametrize(
    ("expression", "unit"),
    [
        ("gpu_memory_used_bytes", "bytes"),
        ("sum by (gpu) (gpu_memory_used_bytes)", "bytes"),
        ("max_over_time(gpu_temperature_celsius[5m])", "celsius"),
        ("rate(node_network_receive_bytes_total[5m])", "bytes/s"),
        ("rate(vllm:prompt_tokens_total[5m])", "/s"),
        ("rate(process_cpu_seconds_total[5m])", ""),
        ("gpu_memory_used_bytes / gpu_memory_total_bytes", "ratio"),
        ("gpu_memory_used_bytes / 1024", ""),
        ("gpu_memory_used_bytes - 1024", "bytes"),
        ("gpu_memory_total_bytes - gpu_memory_used_bytes > 5", "bytes"),
        ("gpu_memory_used_bytes > bool 5", ""),
        ("gpu_memory_used_bytes and gpu_temperature_celsius", "bytes"),
        ("gpu_memory_used_bytes or gpu_temperature_celsius", ""),
        ("count(gpu_memory_used_bytes)", ""),
        ("vllm:kv_cache_usage_perc", "ratio"),
        ("gpu_power_limit_watts_max", "watts"),
        (
            "histogram_quantile(0.9, sum by (le) (increase(vllm:e2e_request_latency_seconds_bucket[5m])))",
            "seconds",
        ),
        ("histogram_quantile(0.9, sum by (le) (rate(http_request_duration_seconds_bucket[5m])))", "seconds"),
        ("avg_over_time(gpu_power_draw_watts[1h:1m])", "watts"),
        ('{gpu="0"}', ""),
        ("time()", ""),
        ("42", ""),
    ],
)
def test_the_unit_follows_from_the_names_as_far_as_that_is_certain(expression, unit):
    assert units.unit_of(promql.parse(expression)) == unit


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0, "bytes", "0 B"),
        (68_719_476_736.0, "bytes", "64 GiB"),
        (-1536.0, "bytes", "-1.5 KiB"),
        (1e9, "bytes/s", "953.7 MiB/s"),
        (0.421, "ratio", "42.1 %"),
        (61.0, "celsius", "61 °C"),
        (0.0123, "seconds", "12.3 ms"),
        (0.0, "seconds", "0 s"),
        (90.0, "seconds", "1.5 min"),
        (1_980e6, "hertz", "1.98 GHz"),
        (312.4, "watts", "312.4 W"),
        (9999.0, "", "9999"),
        (12_345.0, "", "12.35k"),
        (2.5e6, "", "2.5M"),
        (0.5, "/s", "0.5/s"),
        (math.nan, "bytes", "NaN"),
        (-math.inf, "", "-Inf"),
    ],
)
def test_values_are_written_as_people_say_them(value, unit, text):
    assert units.human(value, unit) == text
