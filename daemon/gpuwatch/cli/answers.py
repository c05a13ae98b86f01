"""Writes what a query came to, for people and for programs; evaluates nothing and prints nothing."""

from __future__ import annotations

import datetime as dt
import math
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any

from gpuwatch.cli import plot, units
from gpuwatch.promql import Series, ValueType
from gpuwatch.records import Labels

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gpuwatch.promql import Answer, Expr

_RESULT_TYPES = {
    ValueType.STRING: "string",
    ValueType.SCALAR: "scalar",
    ValueType.VECTOR: "vector",
    ValueType.MATRIX: "matrix",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class When:
    """An instant where `step_ms` is None, and then both ends are it; else each step from start to end."""

    start_ms: int
    end_ms: int
    step_ms: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """An answer with its `kind` in Prometheus' words; numbers are series, with one sample at an instant."""

    kind: str
    when: When
    series: Sequence[Series] = ()
    text: str = ""
    unit: str = ""


def result_of(answer: Answer, expr: Expr, when: When) -> Result:
    """The answer of an expression at an instant or over a range."""
    kind = _RESULT_TYPES[expr.type] if when.step_ms is None else "matrix"
    if isinstance(answer.value, str):
        return Result(kind=kind, when=when, text=answer.value)
    series = series_of(answer, when.end_ms)
    unit = units.unit_of(expr) or units.unit_of_metrics(one.labels.metric for one in series)
    return Result(kind=kind, when=when, series=series, unit=unit)


def series_of(answer: Answer, at_ms: int) -> list[Series]:
    """An answer in numbers as series; what has a value at an instant has one sample then."""
    if isinstance(answer.value, float):
        return [Series(Labels(), [at_ms], [answer.value])]
    return [
        one if isinstance(one, Series) else Series(one[0], [at_ms], [one[1]])
        for one in answer.value
        if not isinstance(one, str)
    ]


# ---- for people


def table(result: Result) -> Iterator[str]:
    """Lines of text: an instant's elements as rows, a range's series one after another."""
    match result.kind:
        case "string":
            yield result.text
        case "scalar":
            yield value_text(result.series[0].values[0])
        case "vector":
            yield from _elements(result)
        case _:
            yield from _samples(result)


def _elements(result: Result) -> Iterator[str]:
    """What all elements have in common on the first line, then a column for each label that differs."""
    shared = plot.common([one.labels for one in result.series])
    names = sorted({name for one in result.series for name, _ in one.labels} - {name for name, _ in shared})
    rows: list[Sequence[str]] = [
        (*("METRIC" if name == "__name__" else name.upper() for name in names), "VALUE", "")
    ]
    rows += [
        (*(one.labels.get(name) for name in names), *_value_cells(one.values[0], result.unit))
        for one in result.series
    ]
    yield f"{local(result.when.end_ms)}  {plot.visible(str(shared or ''))}".rstrip()
    yield from aligned(rows)


def _samples(result: Result) -> Iterator[str]:
    for one in result.series:
        yield plot.visible(str(one.labels))
        width = max(len(value_text(value)) for value in one.values)
        for at_ms, value in zip(one.at_ms, one.values, strict=True):
            number, human = _value_cells(value, result.unit)
            yield f"  {local(at_ms)}  {number:<{width}}  {human}".rstrip()


def _value_cells(value: float, unit: str) -> tuple[str, str]:
    """The exact value, and the value as people say it where it has a unit."""
    return value_text(value), units.human(value, unit) if unit else ""


def aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A line a row, in columns as wide as their widest cell."""
    shown = [[plot.visible(cell) for cell in row] for row in rows]
    widths = [max(map(plot.columns_of, column)) for column in zip(*shown, strict=True)]
    for row in shown:
        yield "  ".join(map(_padded, row, widths)).rstrip()


def _padded(cell: str, width: int) -> str:
    return cell + " " * (width - plot.columns_of(cell))


def chart(result: Result, canvas: plot.Canvas) -> list[str]:
    """Lines of a chart; steps that are missing are gaps in it."""
    frame = plot.Frame(result.when.start_ms, result.when.end_ms, result.when.step_ms or 0, result.unit)
    return plot.draw(result.series, frame, canvas).splitlines()


def local(at_ms: int) -> str:
    """An instant by the clock of this place."""
    return f"{dt.datetime.fromtimestamp(at_ms / 1000, tz=dt.UTC).astimezone():%Y-%m-%d %H:%M:%S %Z}"


def local_span(when: When) -> str:
    """The instant, or the time from the first to the last, by the clock of this place."""
    end = local(when.end_ms)
    return end if when.step_ms is None else f"{local(when.start_ms)} to {end}"


# ---- for programs


def data(result: Result) -> dict[str, Any]:
    """`data` of Prometheus' HTTP API."""
    at_s = _seconds(result.when.end_ms)
    match result.kind:
        case "string":
            found: Any = [at_s, result.text]
        case "scalar":
            found = [at_s, value_text(result.series[0].values[0])]
        case "vector":
            found = [{"metric": dict(s.labels), "value": _pairs(s)[0]} for s in result.series]
        case _:
            found = [{"metric": dict(s.labels), "values": _pairs(s)} for s in result.series]
    return {"resultType": result.kind, "result": found}


def _pairs(series: Series) -> list[tuple[float, str]]:
    return [
        (_seconds(at_ms), value_text(value)) for at_ms, value in zip(series.at_ms, series.values, strict=True)
    ]


def _seconds(at_ms: int) -> float:
    return at_ms / 1000 if at_ms % 1000 else at_ms // 1000


def rows(result: Result) -> Iterator[Sequence[str]]:
    """Of a CSV file: a head, then a row for each sample with a cell for each label."""
    names = sorted({name for one in result.series for name, _ in one.labels})
    yield ["time", *names, "value"]
    if result.text:
        yield [_rfc3339(result.when.end_ms), result.text]
    for one in result.series:
        labels = [one.labels.get(name) for name in names]
        for at_ms, value in zip(one.at_ms, one.values, strict=True):
            yield [_rfc3339(at_ms), *labels, value_text(value)]


def _rfc3339(at_ms: int) -> str:
    at = dt.datetime.fromtimestamp(at_ms / 1000, tz=dt.UTC)
    return at.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def value_text(value: float) -> str:
    """As Prometheus' HTTP API writes a value: as few digits as tell it, and seldom an exponent."""
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
    text = repr(value)
    if "e" in text and 1e-6 <= abs(value) < 1e21:
        text = f"{Decimal(text):f}"
    return text.removesuffix(".0")
