"""Draws series as a chart of characters for a terminal of any width; never asks the terminal anything."""

from __future__ import annotations

import datetime as dt
import itertools
import math
import sys
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

import click

from gpuwatch.cli import units
from gpuwatch.records import Labels

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from gpuwatch.promql import Series

    Point: TypeAlias = tuple[int, int]  # column, row from the bottom

MOST_SERIES: Final = 8
_LEAST_WIDTH: Final = 40
_MARKS: Final = "●▲■◆○△□◇"
_ASCII_MARKS: Final = "*+xo#@%&"
_COLOURS: Final = ("cyan", "yellow", "green", "magenta", "blue", "red", "bright_white", "bright_black")
_BRAILLE: Final = 0x2800
_DOTS: Final = ((0x40, 0x04, 0x02, 0x01), (0x80, 0x20, 0x10, 0x08))  # by column, by row from the bottom
_PLAIN: Final = str.maketrans(
    {"°": "", "µ": "u", "…": "~", "·": "-", "┤": "+", "│": "|", "└": "+", "─": "-", "┬": "+"}
)
_TIME_STEPS_S: Final = (
    *(1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10_800, 21_600, 43_200),
    *(86_400 * days for days in (1, 2, 3, 7, 14, 30, 90, 365)),
)
_DAY_MS: Final = 86_400_000
_GREATEST: Final = sys.float_info.max
_SAME: Final = 1e-6  # steps: what is that near a tick is on it
_LEAST_STEP: Final = 1e-300  # below it there is nothing to be read off a chart


class Frame(NamedTuple):
    """What the chart shows: the time from the left edge to the right, and the unit of the values.

    Two samples further apart than `gap_ms` are not joined. `zone` is where the clock is; None: here.
    """

    start_ms: int
    end_ms: int
    gap_ms: int
    unit: str = ""
    zone: dt.tzinfo | None = None


@dataclass(frozen=True, slots=True)
class Canvas:
    """What it is drawn on: characters a line, lines of the chart itself, and what may be in them."""

    width: int = 80
    height: int = 16
    ascii: bool = False
    colour: bool = False

    @property
    def columns(self) -> int:
        """No terminal is too narrow: below this, lines wrap."""
        return max(self.width, _LEAST_WIDTH)


def draw(series: Sequence[Series], frame: Frame, canvas: Canvas) -> str:
    """The chart with its axes and a legend, without a newline at its end."""
    drawn = series[:MOST_SERIES]
    axis = _axis(drawn, frame.unit, canvas.height)
    left = max(len(label) for label in axis.labels.values())
    width = canvas.columns - left - 2
    brush = _Brush.of(canvas, len(drawn))
    grid = brush.grid(width, canvas.height)
    rows = brush.rows([_lines(one, frame, axis, grid) for one in drawn], width, canvas.height)
    lines = [
        f"{axis.labels.get(row, ''):>{left}} {'┤' if row in axis.labels else '│'}{text}".rstrip()
        for row, text in zip(range(canvas.height - 1, -1, -1), rows, strict=True)
    ]
    lines += [" " * (left + 1) + line for line in _clock_lines(frame, width)]
    lines += _legend(drawn, frame, canvas, brush)
    lines += _left_out(series)
    return "\n".join(_plain(line) for line in lines) if canvas.ascii else "\n".join(lines)


# ---- values


@dataclass(frozen=True, slots=True)
class _Axis:
    """From `low` at the bottom to `high` at the top; labels by row from the bottom."""

    low: float
    high: float
    labels: dict[int, str]

    def part(self, value: float) -> float:
        """Where a value stands, 0 to 1; halves, because the difference of two floats may be no float."""
        return (value / 2 - self.low / 2) / (self.high / 2 - self.low / 2)


def _axis(series: Iterable[Series], unit: str, height: int) -> _Axis:
    """From a round value below the least to a round one above the greatest, with round ones between."""
    values = [value for one in series for value in one.values if math.isfinite(value)] or [0.0]
    low, high = _bounds(min(values), max(values))
    scale = units.scale(unit, max(abs(low), abs(high)))
    ticks = [
        (min(max(tick * scale.divisor, -_GREATEST), _GREATEST), text + scale.suffix)
        for tick, text in _ticks(low / scale.divisor, high / scale.divisor, max(2, height // 4))
    ]
    axis = _Axis(ticks[0][0], ticks[-1][0], {})
    axis.labels.update((round(axis.part(tick) * (height - 1)), text) for tick, text in ticks)
    return axis


def _bounds(low: float, high: float) -> tuple[float, float]:
    """With zero where that costs little, and with room around what stands still."""
    if 0 < low <= high / 3:
        low = 0.0
    if high / 2 - low / 2 <= abs(high) * 1e-9:
        room = abs(high) * 0.05 or 1.0
        low, high = max(low - room, -_GREATEST), min(high + room, _GREATEST)
    return low, high


def _ticks(low: float, high: float, count: int) -> list[tuple[float, str]]:
    """Round values with their texts, about `count` of them, that hold low and high between them."""
    rough = (high / 2 - low / 2) / count * 2
    if not _LEAST_STEP < rough < _GREATEST / 100 or max(abs(low), abs(high)) / rough > 1e9:
        return [(value, f"{value:.3g}") for value in (low, high)]
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * n for n in (1, 2, 3, 5, 10) if power * n >= rough * 0.999)
    decimals = max(0, -math.floor(math.log10(step)))
    # Small steps need all their decimals where the values are large: 1.79517G, 1.79518G.
    is_plain = step < 1e7 and (step > 1e-4 or max(abs(low), abs(high)) >= 1)
    first, last = math.floor(low / step + _SAME), math.ceil(high / step - _SAME)
    return [
        (k * step, f"{k * step:.{decimals}f}" if is_plain else f"{k * step:.3g}")
        for k in range(first, last + 1)
    ]


# ---- lines


def _lines(one: Series, frame: Frame, axis: _Axis, grid: Point) -> set[Point]:
    """The points of the grid that a series touches: its samples, joined where there is no gap."""
    across, up = grid[0] - 1, grid[1] - 1
    span_ms = max(1, frame.end_ms - frame.start_ms)
    found: set[Point] = set()
    before: tuple[int, Point] | None = None
    for at_ms, value in zip(one.at_ms, one.values, strict=True):
        if not math.isfinite(value):
            before = None
            continue
        point = round((at_ms - frame.start_ms) / span_ms * across), round(axis.part(value) * up)
        joined = before is not None and at_ms - before[0] <= frame.gap_ms
        found.update(_line(before[1], point) if before and joined else (point,))
        before = at_ms, point
    return found


def _line(start: Point, end: Point) -> Iterator[Point]:
    count = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
    for k in range(count + 1):
        yield (
            start[0] + round((end[0] - start[0]) * k / count),
            start[1] + round((end[1] - start[1]) * k / count),
        )


@dataclass(frozen=True, slots=True)
class _Brush:
    """Puts points into characters: eight dots in one, or a mark of its own for each series."""

    marks: str
    dots: bool
    colour: bool

    @classmethod
    def of(cls, canvas: Canvas, count: int) -> _Brush:
        """Dots where one can tell whose they are: by colour, or because there is one series."""
        return cls(
            _ASCII_MARKS if canvas.ascii else _MARKS,
            not canvas.ascii and (canvas.colour or count <= 1),
            canvas.colour,
        )

    def grid(self, width: int, height: int) -> Point:
        """How many points fit across and up."""
        return (width * 2, height * 4) if self.dots else (width, height)

    def mark(self, number: int) -> str:
        """What a series looks like, for the legend."""
        return self._painted("⣿" if self.dots else self.marks[number], number)

    def rows(self, drawn: Sequence[set[Point]], width: int, height: int) -> Iterator[str]:
        """The lines from the top; where series meet, they take turns from column to column."""
        owners: dict[Point, list[int]] = {}
        bits: dict[Point, int] = {}
        for number, points in enumerate(drawn):
            for across, up in points:
                cell = (across // 2, up // 4) if self.dots else (across, up)
                bits[cell] = bits.get(cell, _BRAILLE) | _DOTS[across % 2][up % 4]
                there = owners.setdefault(cell, [])
                if number not in there:
                    there.append(number)
        for row in range(height - 1, -1, -1):
            line = [self._cell(bits, owners, (column, row)) for column in range(width)]
            runs = itertools.groupby(line, key=lambda cell: cell[1])
            yield "".join(self._painted("".join(text for text, _ in run), n) for n, run in runs).rstrip()

    def _cell(self, bits: dict[Point, int], owners: dict[Point, list[int]], at: Point) -> tuple[str, int]:
        if at not in bits:
            return " ", 0
        owner = owners[at][at[0] % len(owners[at])]
        return chr(bits[at]) if self.dots else self.marks[owner], owner

    def _painted(self, text: str, number: int) -> str:
        return click.style(text, fg=_COLOURS[number]) if self.colour and text.strip() else text


# ---- time


def _clock_lines(frame: Frame, width: int) -> Iterator[str]:
    """The axis with a tick at round times of the clock, their texts, and what is between its ends."""
    span_ms = max(1, frame.end_ms - frame.start_ms)
    rule, texts = ["─"] * width, [" "] * width
    free = 0
    for at_ms, text in _clock_ticks(frame, width):
        column = round((at_ms - frame.start_ms) / span_ms * (width - 1))
        rule[column] = "┬"
        begin = min(max(column - len(text) // 2, 0), width - len(text))
        if begin >= free:
            texts[begin : begin + len(text)] = text
            free = begin + len(text) + 2
    yield "└" + "".join(rule)
    yield " " + "".join(texts).rstrip()
    start, end = (_local(at_ms, frame.zone) for at_ms in (frame.start_ms, frame.end_ms))
    same_day = start.date() == end.date()
    yield f" {start:%Y-%m-%d %H:%M:%S} to {end:{'%H:%M:%S' if same_day else '%Y-%m-%d %H:%M:%S'} %Z}"


def _clock_ticks(frame: Frame, width: int) -> Iterator[tuple[int, str]]:
    span_ms = max(1, frame.end_ms - frame.start_ms)
    most = max(1, width // 14)
    step_ms = 1000 * next((s for s in _TIME_STEPS_S if span_ms / (s * 1000) <= most), _TIME_STEPS_S[-1])
    form = "%H:%M:%S" if step_ms < 60_000 else "%H:%M" if step_ms < _DAY_MS else "%m-%d"
    if form == "%H:%M" and span_ms > _DAY_MS:
        form = "%m-%d %H:%M"
    offset = _local(frame.start_ms, frame.zone).utcoffset() or dt.timedelta()
    offset_ms = offset // dt.timedelta(milliseconds=1)
    first = -(-(frame.start_ms + offset_ms) // step_ms) * step_ms - offset_ms
    for at_ms in range(first, frame.end_ms + 1, step_ms):
        yield at_ms, f"{_local(at_ms, frame.zone):{form}}"


def _local(at_ms: int, zone: dt.tzinfo | None) -> dt.datetime:
    return dt.datetime.fromtimestamp(at_ms / 1000, tz=dt.UTC).astimezone(zone)


# ---- words


def _legend(drawn: Sequence[Series], frame: Frame, canvas: Canvas, brush: _Brush) -> Iterator[str]:
    """What all have in common, and a line for each with the labels that differ, and what it came to."""
    shared = common([one.labels for one in drawn]) if len(drawn) > 1 else Labels()
    if shared:
        yield cut(visible(str(shared)), canvas.columns)
    for number, one in enumerate(drawn):
        own = visible(str(one.labels.without(*(name for name, _ in shared))))
        figures = _figures(one, frame.unit)
        while len(figures) > 1 and columns_of(own) + columns_of(", ".join(figures)) > canvas.columns - 4:
            figures.pop()
        room = canvas.columns - 4 - columns_of(", ".join(figures))
        yield f"{brush.mark(number)} {cut(own, max(room, 8))}  {', '.join(figures)}".rstrip()


def _figures(one: Series, unit: str) -> list[str]:
    """What is worth saying of a series, the most important first."""
    finite = [value for value in one.values if math.isfinite(value)]
    figures = []
    if len(finite) < len(one.values):
        figures.append(f"{len(one.values) - len(finite)} NaN or infinite, not drawn")
    if finite:
        shown = (("last", finite[-1]), ("most", max(finite)), ("least", min(finite)))
        figures += [f"{word} {units.human(value, unit)}" for word, value in shown]
    return figures


def _left_out(series: Sequence[Series]) -> list[str]:
    more = len(series) - MOST_SERIES
    if more <= 0:
        return []
    return [f"and {more} more series that are not drawn; topk({MOST_SERIES}, …) chooses the largest"]


def common(all_labels: Sequence[Labels]) -> Labels:
    """The labels that all of them have with the same value."""
    shared = set(all_labels[0]).intersection(*all_labels[1:]) if all_labels else set()
    return Labels(shared)


def columns_of(text: str) -> int:
    """How many columns of a terminal a text takes; Chinese characters take two."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text
    )


def visible(text: str) -> str:
    """The text without characters that command a terminal: a label may hold what a process calls itself."""
    return "".join("\ufffd" if unicodedata.category(c) == "Cc" else c for c in text)


def cut(text: str, room: int) -> str:
    """The text, or its beginning and an ellipsis, in so many columns of a terminal."""
    if columns_of(text) <= room:
        return text
    ends = itertools.accumulate(columns_of(character) for character in text)
    return text[: sum(end < room for end in ends)] + "…"


def _plain(line: str) -> str:
    return line.translate(_PLAIN).encode("ascii", "replace").decode()
