"""Which series stand in which column of a target's scrapes, so that a scrape is a row; stores nothing.

A target is whatever is read at once: `nvml`, `vllm:qwen`, the alerts of a rule group. Rule 1: a scrape
that lacks some series of the layout leaves gaps in it; one that brings new series widens it. Rule 2:
each full hour the layout is made anew if it has gaps, so that what is gone is forgotten. Rule 3: a target
that widens again and again within an hour gets layouts of what it gives alone, or they would grow as the
square of its series.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from gpuwatch.frames.rowtext import ABSENT, HOUR_MS, is_absent, is_plain

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gpuwatch.records import Labels

_MOST_WIDENED: Final = 30

__all__ = ["ABSENT", "Layout", "Shape", "is_absent", "is_plain"]


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """The series of a target in the order of its columns; compared by identity."""

    target: str
    labels: tuple[Labels, ...]
    columns: Mapping[Labels, int]

    @classmethod
    def of(cls, target: str, labels: Sequence[Labels]) -> Layout:
        """Each series once, in the order given."""
        unique = tuple(dict.fromkeys(labels))
        return cls(target, unique, {series: column for column, series in enumerate(unique)})


class Shape:
    """The layout of one target as it goes on from scrape to scrape."""

    def __init__(self, target: str) -> None:
        self.layout = Layout.of(target, ())
        self._given: list[Labels] = []
        self._columns: list[int] | None = None  # None: the scrape's order is the layout's
        self._hour = -1
        self._widened = 0

    def fit(self, at_ms: int, labels: Sequence[Labels], values: Sequence[float]) -> list[float]:
        """The values in the order of `self.layout`, which is changed where it has to be."""
        if labels != self._given or at_ms // HOUR_MS != self._hour:
            self._refit(at_ms, labels)
        if self._columns is None:
            return list(values)
        row = [ABSENT] * len(self.layout.labels)
        for column, value in zip(self._columns, values, strict=True):
            row[column] = value
        return row

    def _refit(self, at_ms: int, labels: Sequence[Labels]) -> None:
        is_new_hour = at_ms // HOUR_MS != self._hour
        self._hour, self._given = at_ms // HOUR_MS, list(labels)
        new = [series for series in labels if series not in self.layout.columns]
        self._widened = 0 if is_new_hour else self._widened + bool(new)
        has_gaps = len(self.layout.labels) != len(set(labels))
        if (new or has_gaps) and (is_new_hour or self._widened > _MOST_WIDENED):
            self.layout = Layout.of(self.layout.target, labels)
        elif new:
            self.layout = Layout.of(self.layout.target, (*self.layout.labels, *new))
        columns = [self.layout.columns[series] for series in labels]
        self._columns = None if columns == list(range(len(self.layout.labels))) else columns
