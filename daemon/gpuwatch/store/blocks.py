"""The blocks that the memory of samples is made of: rows as they come, packed columns; decides nothing."""

from __future__ import annotations

import zlib
from array import array
from itertools import accumulate
from struct import Struct
from typing import TYPE_CHECKING, Final, TypeAlias

from gpuwatch.promql import metric_of
from gpuwatch.store.layouts import is_plain

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from gpuwatch.promql import Matcher
    from gpuwatch.store.layouts import Layout

_BLOCK_MS: Final = 300_000
_BLOCK_ROWS: Final = 150  # more would be packed better, but wait longer for it
_STEPS: Final = 50  # scrapes over which a block is packed
_WINDOW_BITS: Final = -11  # 2 KiB, and neither header nor checksum
VALUE_BYTES: Final = 8


class Table:
    """A layout, with what helps to pack its rows and to find its columns."""

    __slots__ = ("by_metric", "layout", "pack", "width")

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.width = len(layout.labels)
        self.pack = Struct(f"{self.width}d").pack
        self.by_metric: dict[str, list[int]] = {}
        for column, labels in enumerate(layout.labels):
            self.by_metric.setdefault(labels.metric, []).append(column)

    def find(self, matchers: Sequence[Matcher]) -> tuple[int, ...]:
        """The columns of the series that all matchers accept."""
        metric = metric_of(matchers)
        candidates = self.by_metric.get(metric, ()) if metric else range(self.width)
        labels = self.layout.labels
        return tuple(c for c in candidates if all(m.matches(labels[c].get(m.name)) for m in matchers))


class Rows:
    """Scrapes as they came, row by row; only the last block of a target still grows."""

    __slots__ = ("at_ms", "flat", "gappy", "table")

    def __init__(self, table: Table) -> None:
        self.table = table
        self.at_ms = array("q")
        self.flat = array("d")
        self.gappy: set[int] = set()  # columns that may have gaps

    def has_room(self, at_ms: int) -> bool:
        """Whether a scrape of this instant may still be added."""
        return len(self.at_ms) < _BLOCK_ROWS and at_ms - self.at_ms[0] < _BLOCK_MS

    def push(self, at_ms: int, row: Sequence[float]) -> None:
        """Add a scrape; struct.error unless it has a value for each column."""
        self.flat.frombytes(self.table.pack(*row))
        self.at_ms.append(at_ms)
        if not is_plain(row):
            self.gappy.update(column for column, value in enumerate(row) if value != value)

    def pop(self) -> None:
        """Take the newest scrape away."""
        self.at_ms.pop()
        del self.flat[len(self.at_ms) * self.table.width :]

    def columns(self, wanted: Iterable[int], first: int, end: int) -> list[array[float]]:
        """Rows [first, end) of these columns, copied at once, for the block may go on to grow."""
        width, flat = self.table.width, self.flat
        start, stop = first * width, end * width
        return [flat[start + column : stop : width] for column in wanted]

    def bytes_held(self) -> int:
        """How much the samples and their instants take."""
        return (len(self.at_ms) + len(self.flat)) * VALUE_BYTES


class Packed:
    """A block that changes no more: its columns one after the other in one string of bytes.

    A constant column is one value. Any other is split into eight planes, first the first bytes of all
    values and so on, and deflated; what that would not shorten stays as it is. The length tells which.
    """

    __slots__ = ("at_ms", "blob", "ends", "gappy", "table")

    def __init__(self, rows: Rows, pieces: Sequence[bytes]) -> None:
        self.table = rows.table
        self.at_ms = rows.at_ms
        self.gappy = rows.gappy
        self.blob = b"".join(pieces)
        self.ends = array("I", accumulate(map(len, pieces), initial=0))

    def columns(self, wanted: Iterable[int], first: int, end: int) -> Iterator[array[float]]:
        """Rows [first, end) of these columns, unpacked when it is their turn."""
        count = len(self.at_ms)
        for column in wanted:
            piece = self.blob[self.ends[column] : self.ends[column + 1]]
            yield _unpacked(piece, count)[first:end]

    def bytes_held(self) -> int:
        """How much the samples and their instants take."""
        return len(self.blob) + len(self.ends) * self.ends.itemsize + len(self.at_ms) * VALUE_BYTES


class Packing:
    """Packs a block a few columns at a time, so that no scrape waits long for it."""

    __slots__ = ("pieces", "rows")

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self.pieces: list[bytes] = []

    def step(self) -> Packed | None:
        """Go on; gives the packed block once it is done."""
        first, width = len(self.pieces), self.rows.table.width
        columns = range(first, min(width, first + width // _STEPS + 1))
        self.pieces += map(_packed, self.rows.columns(columns, 0, len(self.rows.at_ms)))
        return Packed(self.rows, self.pieces) if len(self.pieces) == width else None


Block: TypeAlias = Rows | Packed


def _packed(column: array[float]) -> bytes:
    raw = column.tobytes()
    if raw == raw[:VALUE_BYTES] * len(column):
        return raw[:VALUE_BYTES]
    # A window as small as the column: to set up zlib's usual one takes four times as long as to use it.
    deflater = zlib.compressobj(1, zlib.DEFLATED, _WINDOW_BITS, 1, zlib.Z_RLE)
    planes = b"".join([raw[plane::VALUE_BYTES] for plane in range(VALUE_BYTES)])
    deflated = deflater.compress(planes) + deflater.flush()
    return deflated if len(deflated) < len(raw) else raw


def _unpacked(piece: bytes, count: int) -> array[float]:
    """A column of `count` values out of what `_packed` made of it."""
    if len(piece) == VALUE_BYTES:
        return array("d", piece) * count
    if len(piece) == VALUE_BYTES * count:
        return array("d", piece)
    planes = zlib.decompress(piece, _WINDOW_BITS, VALUE_BYTES * count)
    raw = bytearray(len(planes))
    for plane in range(VALUE_BYTES):
        raw[plane::VALUE_BYTES] = planes[plane * count : (plane + 1) * count]
    return array("d", bytes(raw))
