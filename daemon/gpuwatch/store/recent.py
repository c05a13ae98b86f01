"""The last hour of every series, in memory; never touches the disk and never reads the clock.

Rule 1: what is new is kept as rows, 8 bytes a sample, and read at once. Rule 2: rows older than any
common window are packed column by column, to about one byte a sample. Rule 3: whole blocks are
forgotten, so somewhat more than the window is held. Rule 4: the lock is held for the cutting out of
raw bytes, not for packing and unpacking.
"""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_right
from itertools import chain, compress, pairwise, repeat
from typing import TYPE_CHECKING, Final

from gpuwatch.promql import Series
from gpuwatch.records import is_stale
from gpuwatch.store.blocks import VALUE_BYTES, Block, Packed, Packing, Rows, Table
from gpuwatch.store.layouts import ABSENT, is_absent

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from gpuwatch.promql import Matcher
    from gpuwatch.records import Labels
    from gpuwatch.store.layouts import Layout

_HOT_MS: Final = 300_000  # the look-back of an instant selector, and the usual range in rules
_MOST_QUESTIONS: Final = 1024
_ABSENT_WORD: Final = array("q", array("d", [ABSENT]).tobytes())[0]


class _Target:
    """The blocks of one target in time order."""

    __slots__ = ("blocks", "newest_ms", "packing", "table")

    def __init__(self, table: Table, at_ms: int) -> None:
        self.table = table
        self.newest_ms = at_ms
        self.blocks: list[Block] = []
        self.packing: Packing | None = None

    def push(self, at_ms: int, row: Sequence[float]) -> bool:
        """Take a scrape of `table` that is not older than the newest; whether it began a block."""
        block = self.blocks[-1] if self.blocks else None
        if isinstance(block, Rows) and block.at_ms[-1] == at_ms:
            block.pop()
            if not block.at_ms:
                self.blocks.pop()
                block = self.blocks[-1] if self.blocks else None
        self.newest_ms = at_ms
        if isinstance(block, Rows) and block.table is self.table and block.has_room(at_ms):
            block.push(at_ms, row)
            return False
        block = Rows(self.table)
        block.push(at_ms, row)
        self.blocks.append(block)
        return True

    def begin_packing(self) -> None:
        """Of the oldest rows, if they have become old enough."""
        upto_ms = self.newest_ms - _HOT_MS
        cold = (block for block in self.blocks if isinstance(block, Rows) and block.at_ms[-1] <= upto_ms)
        rows = next(cold, None)
        self.packing = None if rows is None else Packing(rows)

    def end_packing(self, packed: Packed) -> None:
        """The packed block stands for its rows, and the next may be packed."""
        rows = self.packing and self.packing.rows
        self.blocks = [packed if block is rows else block for block in self.blocks]
        self.begin_packing()

    def forget(self, upto_ms: int) -> None:
        self.blocks = [block for block in self.blocks if block.at_ms[-1] > upto_ms]


class _Stretch:
    """Blocks of one target and layout that follow each other, as far as they lie in a window."""

    __slots__ = ("at_ms", "gappy", "parts", "table", "wanted")

    def __init__(self, table: Table, wanted: tuple[int, ...]) -> None:
        self.table = table
        self.wanted = wanted
        self.at_ms = array("q")
        self.gappy: set[int] = set()
        self.parts: list[Iterable[array[float]]] = []

    def extend(self, block: Block, first: int, end: int) -> None:
        self.at_ms += block.at_ms[first:end]
        self.gappy |= block.gappy
        self.parts.append(block.columns(self.wanted, first, end))

    def series(self) -> Iterable[Series]:
        """One for each wanted column in their order, empty if it has gaps alone."""
        at_ms = self.at_ms.tolist()
        labels = map(self.table.layout.labels.__getitem__, self.wanted)
        found = map(Series, labels, repeat(at_ms), map(_floats, *self.parts))
        if self.gappy.isdisjoint(self.wanted):
            return found
        return (
            _without_gaps(series) if column in self.gappy else series
            for column, series in zip(self.wanted, found, strict=True)
        )


class _Question:
    """Some matchers, and what they mean in each layout: rules ask the same again every few seconds."""

    __slots__ = ("columns", "matchers", "twins")

    def __init__(self, matchers: tuple[Matcher, ...]) -> None:
        self.matchers = matchers
        self.columns: dict[Table, tuple[int, ...]] = {}
        self.twins: dict[tuple[Table, ...], list[list[int]]] = {}

    def wanted(self, table: Table) -> tuple[int, ...]:
        """The columns that match."""
        found = self.columns.get(table)
        if found is None:
            found = self.columns[table] = table.find(self.matchers)
        return found

    def repeated(self, tables: tuple[Table, ...]) -> list[list[int]]:
        """The places of each series that comes more than once when these are read one after the other."""
        found = self.twins.get(tables)
        if found is None:
            places: dict[Labels, list[int]] = {}
            columns = ((table, column) for table in tables for column in self.wanted(table))
            for place, (table, column) in enumerate(columns):
                places.setdefault(table.layout.labels[column], []).append(place)
            found = self.twins[tables] = [some for some in places.values() if len(some) > 1]
        return found


class Recent:
    """The scrapes of the last `window_ms`. Several threads may append and read."""

    def __init__(self, window_ms: int) -> None:
        self.window_ms = window_ms  # may be widened as it goes on
        self._lock = threading.Lock()
        self._targets: dict[str, _Target] = {}
        self._questions: dict[tuple[Matcher, ...], _Question] = {}

    def __len__(self) -> int:
        """How many series stand in the layouts that are held."""
        with self._lock:
            tables = {block.table for block in self._blocks()}
        return len({labels for table in tables for labels in table.layout.labels})

    def append(self, layout: Layout, at_ms: int, row: Sequence[float]) -> bool:
        """Take one scrape of `layout.target`: `row[i]` belongs to `layout.labels[i]`, `ABSENT` is no sample.

        A second scrape of one instant replaces the first whole. One that is older than the newest of its
        target is not taken: False.
        """
        with self._lock:
            target = self._targets.get(layout.target)
            if target is not None and at_ms < target.newest_ms:
                return False
            if target is None:
                target = self._targets[layout.target] = _Target(Table(layout), at_ms)
            elif target.table.layout is not layout:
                target.table = Table(layout)
                self._questions.clear()  # they would keep layouts that are held no more
            if target.push(at_ms, row):
                self._forget(at_ms - self.window_ms)
                if target.packing is None:
                    target.begin_packing()
        # One thread at a time appends to a target, and so packs it.
        packed = target.packing and target.packing.step()
        if packed:
            with self._lock:
                target.end_packing(packed)
        return True

    def select(self, matchers: Sequence[Matcher], after_ms: int, upto_ms: int) -> list[Series]:
        """Every series that all matchers accept, with its samples in (after_ms, upto_ms], if it has any.

        A series that several targets give comes once; where their samples are of one instant, the one
        counts whose target was first heard of last. Series of one target may share their list of instants.
        """
        with self._lock:
            question = self._question(tuple(matchers))
            stretches = [
                stretch
                for target in self._targets.values()
                for stretch in _stretches(target.blocks, question, after_ms, upto_ms)
            ]
            repeated = question.repeated(tuple(stretch.table for stretch in stretches))
        found = list(chain.from_iterable(stretch.series() for stretch in stretches))
        for places in repeated:
            merged = _merged([found[place] for place in places])
            for place in places:
                found[place] = Series(merged.labels, (), ())
            found[places[0]] = merged
        return [series for series in found if series.at_ms]

    def silent_since(self, at_ms: int) -> list[Labels]:
        """The series that have not ended, and have no sample at `at_ms` or later."""
        lasts: dict[Labels, tuple[int, float]] = {}
        with self._lock:
            for target in self._targets.values():
                for labels, last in _lasts(target.blocks).items():
                    if labels not in lasts or lasts[labels][0] <= last[0]:
                        lasts[labels] = last
        return [labels for labels, (at, value) in lasts.items() if at < at_ms and not is_stale(value)]

    def bytes_held(self) -> int:
        """How much the samples and their instants take, without what Python needs to keep them."""
        with self._lock:
            return sum(block.bytes_held() for block in self._blocks())

    def _blocks(self) -> Iterator[Block]:
        return chain.from_iterable(target.blocks for target in self._targets.values())

    def _question(self, matchers: tuple[Matcher, ...]) -> _Question:
        if len(self._questions) >= _MOST_QUESTIONS and matchers not in self._questions:
            self._questions.clear()
        return self._questions.setdefault(matchers, _Question(matchers))

    def _forget(self, upto_ms: int) -> None:
        for target in self._targets.values():
            target.forget(upto_ms)
        for name in [name for name, target in self._targets.items() if not target.blocks]:
            del self._targets[name]
            self._questions.clear()


def _stretches(blocks: list[Block], question: _Question, after_ms: int, upto_ms: int) -> Iterator[_Stretch]:
    """What the window holds of a target's blocks, as far as it was asked for."""
    stretch: _Stretch | None = None
    oldest = bisect_right(blocks, after_ms, key=lambda block: block.at_ms[-1])
    for block in blocks[oldest:]:
        wanted = question.wanted(block.table)
        first = bisect_right(block.at_ms, after_ms) if wanted else 0
        end = bisect_right(block.at_ms, upto_ms) if wanted else 0
        if first >= end:
            continue
        if stretch is not None and stretch.table is not block.table:
            yield stretch
            stretch = None
        stretch = stretch or _Stretch(block.table, wanted)
        stretch.extend(block, first, end)
    if stretch is not None:
        yield stretch


def _lasts(blocks: Sequence[Block]) -> dict[Labels, tuple[int, float]]:
    """The newest sample of each series of a target, from the newest block back."""
    lasts: dict[Labels, tuple[int, float]] = {}
    for block in reversed(blocks):
        labels = block.table.layout.labels
        missing = [column for column, series in enumerate(labels) if series not in lasts]
        for column, values in zip(missing, block.columns(missing, 0, len(block.at_ms)), strict=True):
            backwards = zip(reversed(block.at_ms), reversed(values), strict=True)
            last = next((sample for sample in backwards if not is_absent(sample[1])), None)
            if last is not None:
                lasts[labels[column]] = last
    return lasts


def _floats(*parts: array[float]) -> list[float]:
    """Pieces of a column as one list; a constant is found out in the time of a few values."""
    raw = b"".join(parts)
    first, count = raw[:VALUE_BYTES], len(raw) // VALUE_BYTES
    if raw == first * count:
        return array("d", first).tolist() * count
    return array("d", raw).tolist()


def _without_gaps(series: Series) -> Series:
    words = array("q", array("d", series.values).tobytes())
    kept = [word != _ABSENT_WORD for word in words]
    return Series(series.labels, list(compress(series.at_ms, kept)), list(compress(series.values, kept)))


def _merged(parts: Sequence[Series]) -> Series:
    """One series out of several pieces of it; of two samples of one instant the later piece's."""
    parts = [part for part in parts if part.at_ms] or parts[:1]
    if len(parts) == 1:
        return parts[0]
    labels = parts[0].labels
    if all(before.at_ms[-1] < after.at_ms[0] for before, after in pairwise(parts)):
        at_ms = list(chain.from_iterable(part.at_ms for part in parts))
        return Series(labels, at_ms, list(chain.from_iterable(part.values for part in parts)))
    points = {at: value for part in parts for at, value in zip(part.at_ms, part.values, strict=True)}
    at_ms = sorted(points)
    return Series(labels, at_ms, [points[at] for at in at_ms])
