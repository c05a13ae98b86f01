"""Reads the series of rule tests: `name{label="value"}` and `1 2 _ stale 0+10x3`; keeps no sample."""

from __future__ import annotations

import re
from itertools import accumulate, repeat
from typing import TYPE_CHECKING, Final

from gpuwatch import promql
from gpuwatch.errors import QueryError
from gpuwatch.promql.ast import VectorSelector
from gpuwatch.records import STALE, Labels

if TYPE_CHECKING:
    from collections.abc import Iterator

MAX_VALUES: Final = 5_000_000

_NUMBER: Final = r"(?:(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)?|(?i:inf|nan)(?![\w:]))"
_ITEM: Final = re.compile(
    rf"(?:(?P<gap>_)|(?P<stale>stale)(?![\w:])|(?P<first>[-+]?{_NUMBER})(?P<step>[-+]{_NUMBER}(?=x))?)"
    r"(?:x(?P<times>\d+))?"
)
_NO_LABELS: Final = re.compile(r"\s*(\{\s*\})?\s*")


def series_of(text: str) -> Labels:
    """The labels of a series; QueryError with the position if the text is none."""
    if _NO_LABELS.fullmatch(text):
        return Labels()
    expr = promql.parse(text)
    if not isinstance(expr, VectorSelector) or any(m.op != "=" for m in expr.matchers):
        raise QueryError('a series is written name{label="value", …}')
    return Labels((m.name, m.value) for m in expr.matchers)


def values_of(text: str) -> list[float | None]:
    """A value a step, None for a gap, `records.STALE` where the series ends; QueryError with the position."""
    if "{{" in text:
        what = "gpuwatch has no native histograms: write the classic _bucket series"
        raise QueryError(what, text.index("{{"))
    values: list[float | None] = []
    for item in re.finditer(r"\S+", text):
        values += _item(item.group(), item.start(), MAX_VALUES - len(values))
    return values


def _item(text: str, position: int, room: int) -> Iterator[float | None]:
    match = _ITEM.fullmatch(text)
    if match is None:
        what = f"{text!r} is no item of a series; write 1, -2.5, _, stale, 1x3, 0+10x3, 9-1x3 or _x3"
        raise QueryError(what, position)
    times = int(match["times"] or 0)
    if times >= room:
        raise QueryError(f"a series has {MAX_VALUES} values at most", position)
    if match["gap"]:
        return repeat(None, times if match["times"] else 1)
    if match["stale"]:
        return repeat(STALE, times + 1)
    first, step = float(match["first"]), float(match["step"] or 0)
    # By adding step after step, as Prometheus does: ten times 0.1 is not 1.
    return accumulate(repeat(step, times), initial=first)
