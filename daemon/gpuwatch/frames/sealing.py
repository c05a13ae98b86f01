"""Seals an hour: reads hot rows of metrics.db and writes frames to standard output; changes nothing itself.

It is a process of its own, `python -m gpuwatch.frames.sealing FILE BEFORE_MS NOW_MS`, that lives for a second
an hour: so the daemon needs no numpy, which is 16 MiB, and its ticks never wait for the interpreter's lock.
It gives one MessagePack `Sealed` for each target, a length of four bytes before it; the daemon takes them
in. Whatever becomes of it, the rows are there and are sealed the next time.

Rule 1: one hour at a time, so that it stays small however much has waited.
Rule 2: a frame is in time order, an instant once; of two scrapes of one instant the later counts.
Rule 3: a frame never goes over a full hour, so that its hourly figures are those of that hour.
"""

from __future__ import annotations

import itertools
import os
import sqlite3
import struct
import sys
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

import msgspec
import numpy as np

from gpuwatch.frames import frame, rowtext
from gpuwatch.frames.rowtext import ABSENT_BITS, HOUR_MS
from gpuwatch.frames.sealed import DAMAGED, Sealed, SealedFrame

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import numpy.typing as npt

    Hourly = tuple[int, int, int, float | None, float | None, float | None, float | None]

_MAX_ROWS: Final = 50_000  # an hour of an eight-GPU host has about 30 000
_FUTURE_MS: Final = (
    60_000  # a row that lies farther ahead was stamped by a wrong clock, and is sealed with the rest
)
_LATE_MS: Final = 60_000  # a slow source's scrape is written after others of a later instant
_ABSENT: Final = np.frombuffer(ABSENT_BITS, np.uint64)[0]
_ROWS: Final = (
    "SELECT hot.id, hot.target, hot.layout, hot.at_ms, hot.vals"
    " FROM hot JOIN target ON target.id = hot.target"
    " WHERE hot.id > (SELECT min(sealed_id) FROM target) AND hot.id > target.sealed_id"
    " ORDER BY hot.id LIMIT ?"
)


@dataclass(slots=True)
class Block:
    """Scrapes of one layout, row after row; `order` are their ids."""

    width: int
    order: list[int] = field(default_factory=list)
    at_ms: list[int] = field(default_factory=list)
    rows: list[bytes] = field(default_factory=list)

    def add(self, number: int, at_ms: int, row: Sequence[float]) -> None:
        """A row; struct.error unless it has the width."""
        self.rows.append(struct.pack(f"{self.width}d", *row))
        self.order.append(number)
        self.at_ms.append(at_ms)

    def bits(self) -> npt.NDArray[np.uint64]:
        """A row a scrape, a column a series of the layout."""
        return np.frombuffer(b"".join(self.rows), np.uint64).reshape(len(self.rows), self.width)


@dataclass(slots=True)
class Pile:
    """What is to be sealed of one target: blocks by layout."""

    upto_id: int = 0
    blocks: dict[int, Block] = field(default_factory=dict)


def seal(path: Path, before_ms: int, now_ms: int) -> Iterator[Sealed]:
    """The frames of the oldest hour that is over at `before_ms`, a target at a time; sqlite3.Error."""
    layouts: dict[int, list[int]] = {}
    with closing(sqlite3.connect(f"file:{quote(str(path.absolute()))}?mode=ro", uri=True)) as connection:
        connection.execute("BEGIN")
        piles = _gather(connection, layouts, before_ms, now_ms)
    for target in sorted(piles):
        yield _sealed(target, piles.pop(target), layouts)


def _gather(
    connection: sqlite3.Connection, layouts: dict[int, list[int]], before_ms: int, now_ms: int
) -> dict[int, Pile]:
    piles: dict[int, Pile] = {}
    finished: set[int] = set()
    stop_ms = 0
    for number, target, layout, at_ms, text in connection.execute(_ROWS, (_MAX_ROWS,)):
        stop_ms = stop_ms or min(before_ms, at_ms // HOUR_MS * HOUR_MS + HOUR_MS)
        if stop_ms <= at_ms <= now_ms + _FUTURE_MS:
            if at_ms >= stop_ms + _LATE_MS:
                break
            finished.add(target)
        elif target not in finished:
            pile = piles.setdefault(target, Pile())
            pile.upto_id = number
            if layout not in layouts:
                layouts[layout] = _series_of(connection, layout)
            block = pile.blocks.setdefault(layout, Block(len(layouts[layout])))
            try:
                block.add(number, at_ms, rowtext.decode(text))
            except (ValueError, TypeError, struct.error, msgspec.MsgspecError) as error:
                # Told and left out, so that one bad row does not hold up all others.
                sys.stderr.write(f"row {number} of hot cannot be read and is left out: {error}\n")
    return piles


def _series_of(connection: sqlite3.Connection, layout: int) -> list[int]:
    found = connection.execute(
        "SELECT series FROM layout_series WHERE layout = ? ORDER BY position", (layout,)
    )
    return [row[0] for row in found]


def _sealed(target: int, pile: Pile, layouts: Mapping[int, Sequence[int]]) -> Sealed:
    blocks = {layout: block for layout, block in pile.blocks.items() if block.rows}
    if not blocks:
        return Sealed(target, pile.upto_id, [], [])
    series = list(dict.fromkeys(one for layout in blocks for one in layouts[layout]))
    at_ms, values = _joined(blocks, layouts, series)
    frames: list[SealedFrame] = []
    hourly: list[Hourly] = []
    for hour_ms, rows in _hours(at_ms):
        present = values[rows].view(np.uint64) != _ABSENT
        seen = present.any(axis=0)
        columns = [one for one, is_seen in zip(series, seen.tolist(), strict=True) if is_seen]
        if not columns:
            continue
        cut, mask = values[rows][:, seen], present[:, seen]
        data = frame.encode(at_ms[rows], cut, None if mask.all() else mask)
        frames.append(SealedFrame(int(at_ms[rows][0]), int(at_ms[rows][-1]), len(cut), columns, data))
        hourly += _hourly(hour_ms, columns, cut, mask)
    return Sealed(target, pile.upto_id, frames, hourly)


def _joined(
    blocks: Mapping[int, Block], layouts: Mapping[int, Sequence[int]], series: Sequence[int]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """All scrapes in time order, an instant once, with a column for each of the series."""
    columns = {one: column for column, one in enumerate(series)}
    at_ms = np.concatenate([np.array(block.at_ms, np.int64) for block in blocks.values()])
    order = np.concatenate([np.array(block.order, np.int64) for block in blocks.values()])
    bits = np.full((len(at_ms), len(series)), _ABSENT, np.uint64)
    first = 0
    for layout, block in blocks.items():
        rows = slice(first, first + len(block.at_ms))
        bits[rows, [columns[one] for one in layouts[layout]]] = block.bits()
        first = rows.stop
    sorting = np.lexsort((order, at_ms))
    last_of_its_instant = np.append(np.diff(at_ms[sorting]) != 0, True)
    kept = sorting[last_of_its_instant]
    return at_ms[kept], bits[kept].view(np.float64)


def _hours(at_ms: npt.NDArray[np.int64]) -> Iterable[tuple[int, slice]]:
    """Each full hour with its rows."""
    hours = at_ms // HOUR_MS
    edges = [0, *(np.flatnonzero(np.diff(hours)) + 1).tolist(), len(at_ms)]
    for first, end in itertools.pairwise(edges):
        yield int(hours[first]) * HOUR_MS, slice(first, end)


def _hourly(
    hour_ms: int, series: Sequence[int], values: npt.NDArray[np.float64], present: npt.NDArray[np.bool_]
) -> list[Hourly]:
    """Count, minimum, average, maximum and last of each series; what is no number does not count."""
    counted = present & ~np.isnan(values)
    kept = np.flatnonzero(counted.any(axis=0)).tolist()
    if not kept:
        return []
    if not counted.all():
        values, counted = np.where(counted, values, np.nan)[:, kept], counted[:, kept]
    n = counted.sum(axis=0)
    with np.errstate(invalid="ignore", over="ignore"):
        average = np.nansum(values, axis=0) / n
    newest = len(values) - 1 - counted[::-1].argmax(axis=0)
    figures = zip(
        [series[column] for column in kept],
        n.tolist(),
        np.fmin.reduce(values, axis=0).tolist(),
        average.tolist(),
        np.fmax.reduce(values, axis=0).tolist(),
        values[newest, np.arange(len(kept))].tolist(),
        strict=True,
    )
    return [(hour_ms, *row) for row in figures]


def main() -> None:
    """Write what was sealed to standard output."""
    with suppress(PermissionError):  # a filter of system calls may know no lowering
        os.nice(5)  # it has an hour's time
    encoder = msgspec.msgpack.Encoder()
    try:
        for sealed in seal(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])):
            message = encoder.encode(sealed)
            sys.stdout.buffer.write(len(message).to_bytes(4, "big") + message)
    except sqlite3.DatabaseError as error:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF not in {
            sqlite3.SQLITE_CORRUPT,
            sqlite3.SQLITE_NOTADB,
        }:
            raise
        sys.exit(DAMAGED)


if __name__ == "__main__":
    main()
