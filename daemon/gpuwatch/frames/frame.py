"""The samples of many series over one stretch of time as one blob, exact to the bit; never opens a file.

Every column can be read alone: the head says where its bytes are and how to read them. Runs only
in readers and in the process that seals history, because numpy is too heavy for the daemon's own.

The format, version 1. Numbers are little-endian; `i` counts rows from 0; integers wrap at 64 bits.

    at  bytes
     0      3  "GWF"
     3      1  version
     4      4  length of the head: 24, and the deflated directory
     8      4  n, the rows
    12      4  c, the columns
    16      4  s, the streams: c columns, the time stamps, then side streams
    20      4  CRC-32 of bytes 0 to 19 and the deflated directory
    24         the directory, as a raw deflate stream
               the bytes of every stream, one after another, in the order of the directory

The directory is s records of 40 bytes, transposed: byte 0 of every record, then byte 1 of every...

     0  8  start   first integer; in an odd stream: how many cells
     8  8  slope   what is added for every row, after the sums
    16  4  size    bytes of the stream
    20  4  crc     CRC-32 of these bytes
    24  4  ref     the column whose `m` this one shares (kinds 3 and 4)
    28  4  gaps    number of the side stream that says which cells are present; 0: all are
    32  4  odd     number of the side stream with this column's odd cells; 0: there are none
    36  1  kind    0 1 2: stored, so many times summed up; 3 4: as `ref`, negated; 5: gaps; 6: odd
    37  1  planes  bit k: byte k of the integers is stored; otherwise it is 0 in all rows
    38  1  shift   zero bits that were cut off
    39  1  form    0: whole; 1 to 9: decimal places; 255: a float's own bits

A stored stream holds the length of every plane but the last, 4 bytes each; then the planes.
Plane k is byte k of all n integers: as it is if n bytes long, else a raw deflate stream. Then:

    z[i]      the eight bytes together, unsigned
    m[i]      z[i] >> 1, all bits flipped if z[i] is odd; summed up from row 0 as often as `kind` says;
              plus slope * i. A column of kind 3 takes `m` from column `ref`, which is a stored one
              and comes earlier; of kind 4 it takes -m.
    x[i]      start + (m[i] << shift)
    value[i]  form 0: x[i] as a float64; form 1 to 9: that, divided by 10 ** form; 255: the float64
              with the bits of x[i]. Time stamps are x[i] itself.

A gaps stream is the deflated bits of a bitmap, the highest bit of byte 0 being row 0; 1: present.
What a column holds where it has no sample means nothing. An odd stream is, deflated, the rows of
all odd cells (4 bytes each), then their 64 bits each, which replace those of value[i].
"""

from __future__ import annotations

import struct
import zlib
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

import numpy as np

from gpuwatch.frames import columns
from gpuwatch.frames.columns import HIGHEST_ORDER, FrameError, Packed, deflate, inflate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy.typing as npt

    from gpuwatch.frames.columns import Bits, Buffer, Flags, Floats, Ints

    Fetch: TypeAlias = Callable[[int, int], bytes]

__all__ = ["VERSION", "Frame", "FrameError", "encode"]

VERSION: Final = 1
MOST_CELLS: Final = 1 << 28  # 2 GiB of float64: a frame that claims more is damaged, or should be several

_MAGIC: Final = b"GWF"
_START: Final = struct.Struct("<3sB4I")  # as above, up to the checksum
_CRC_BYTES: Final = 4
_RECORD: Final = np.dtype(
    [
        *((name, "<i8") for name in ("start", "slope")),
        *((name, "<u4") for name in ("size", "crc", "ref", "gaps", "odd")),
        *((name, "u1") for name in ("kind", "planes", "shift", "form")),
    ]
)
_SAME, _NEGATED, _GAPS, _ODD = range(HIGHEST_ORDER + 1, HIGHEST_ORDER + 5)
_FIRST_FETCH_BYTES: Final = 4096
_BLOCK_CELLS: Final = 1 << 17  # 1 MiB of a matrix at a time, so that it stays in the processor's cache


class _Record(NamedTuple):
    """One stream's record, as in `_RECORD`."""

    start: int = 0
    slope: int = 0
    size: int = 0
    crc: int = 0
    ref: int = 0
    gaps: int = 0
    odd: int = 0
    kind: int = 0
    planes: int = 0
    shift: int = 0
    form: int = columns.WHOLE

    def holding(self, packed: Packed) -> _Record:
        """The same with how its integers were packed."""
        return self._replace(kind=packed.order, slope=packed.slope, planes=packed.planes)


def encode(at_ms: Ints, values: Floats, present: Flags | None = None, *, references: bool = True) -> bytes:
    """The frame of n rows and c columns.

    `at_ms` is (n,), in any order; `values` (n, c), of which those count that are `present` (n, c),
    or all. Without `references` a column that moves like another one is stored all the same.
    ValueError when the shapes do not fit, or there is no cell, or more than `MOST_CELLS`.
    """
    if values.ndim != 2 or at_ms.shape != values.shape[:1] or not 0 < values.size <= MOST_CELLS:
        raise ValueError(f"no frame can be made of {at_ms.shape} time stamps and {values.shape} values")
    if present is not None and present.shape != values.shape:
        raise ValueError(f"{values.shape} values, but {present.shape} flags that say which are present")
    rows, width = values.shape
    writer = _Writer(rows, width, references=references)
    gaps = [0] * width if present is None else writer.add_gaps(present)
    patterns = values.astype(np.float64, copy=False).view(np.uint64)
    at_once = max(1, _BLOCK_CELLS // rows)
    for first in range(0, width, at_once):
        block = slice(first, first + at_once)
        bits = np.array(patterns[:, block].T, order="C")
        if present is not None:
            columns.bridge(bits, present[:, block], gaps[block])
        writer.add_columns(first, bits, gaps[block])
    writer.add_time(at_ms.astype(np.int64, copy=False))
    return writer.blob()


class _Writer:
    """Gathers the streams of one frame."""

    def __init__(self, rows: int, width: int, *, references: bool) -> None:
        self._rows, self._width, self._references = rows, width, references
        self._records = [_Record()] * (width + 1)
        self._bodies: list[Buffer] = [b""] * (width + 1)
        self._sides: dict[tuple[int, bytes], int] = {}
        self._seen: dict[int, tuple[int, Ints]] = {}
        # A sum with random weights tells columns apart, and of a negated column it is the negative.
        self._weights = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, rows)

    def add_gaps(self, present: Flags) -> list[int]:
        """The number of each column's gaps stream, 0 where it has no gap."""
        numbers = [0] * self._width
        broken = np.flatnonzero(~present.all(axis=0))
        for column, bitmap in zip(broken.tolist(), np.packbits(present[:, broken].T, axis=1), strict=True):
            numbers[column] = self._side(bitmap.tobytes(), _Record(kind=_GAPS))
        return numbers

    def add_columns(self, first: int, bits: Bits, gaps: Sequence[int]) -> None:
        """Columns `first` and following, from their patterns (k, n)."""
        for column, start in enumerate(bits[:, 0].view(np.int64).tolist()):
            self._records[first + column] = _Record(start=start, gaps=gaps[column], form=columns.RAW)
        varying = np.flatnonzero((bits != bits[:, :1]).any(axis=1)).tolist()
        kept = bits if len(varying) == len(bits) else bits[varying]
        ints, forms, odd = columns.integers_of(kept)
        starts, shifts = columns.normalise(ints)
        keys = ints @ self._weights
        negated = np.negative(keys).tolist()
        for k, key in enumerate(keys.tolist()):
            column = varying[k]
            record = _Record(start=starts[k], gaps=gaps[column], shift=shifts[k], form=forms[k])
            if k in odd:
                record = record._replace(odd=self._odd(odd[k], kept[k]))
            self._add_column(first + column, record, ints[k], key, negated[k])

    def add_time(self, at_ms: Ints) -> None:
        """The time stamps."""
        ints = at_ms.reshape(1, -1).copy()
        starts, shifts = columns.normalise(ints)
        # Stamps that jitter around a beat stay small beside it.
        steps = np.sort(np.diff(ints[0]))
        packed = columns.pack(ints[0], steps[steps.size // 2 :][:1].tolist())
        self._records[self._width] = _Record(start=starts[0], shift=shifts[0]).holding(packed)
        self._bodies[self._width] = packed.body

    def blob(self) -> bytes:
        """The frame."""
        records = [
            record._replace(size=len(body), crc=zlib.crc32(body))
            for record, body in zip(self._records, self._bodies, strict=True)
        ]
        table = np.array(records, _RECORD).view(np.uint8).reshape(len(records), _RECORD.itemsize)
        directory = deflate(table.T.tobytes())
        length = _START.size + _CRC_BYTES + len(directory)
        start = _START.pack(_MAGIC, VERSION, length, self._rows, self._width, len(records))
        crc = zlib.crc32(directory, zlib.crc32(start)).to_bytes(_CRC_BYTES, "little")
        return b"".join((start, crc, directory, *self._bodies))

    def _add_column(self, index: int, record: _Record, ints: Ints, key: int, negated: int) -> None:
        twin, as_is = self._seen.get(key), True
        if twin is None or not np.array_equal(twin[1], ints):
            twin, as_is = self._seen.get(negated), False
            if twin is not None and not np.array_equal(-twin[1], ints):
                twin = None
        if twin is not None:
            self._records[index] = record._replace(kind=_SAME if as_is else _NEGATED, ref=twin[0])
            return
        packed = columns.pack(ints)
        self._records[index] = record.holding(packed)
        self._bodies[index] = packed.body
        if self._references:
            self._seen[key] = index, ints

    def _odd(self, rows: Ints, bits: Bits) -> int:
        cells = rows.astype("<u4").tobytes() + bits[rows].astype("<u8", copy=False).tobytes()
        return self._side(cells, _Record(kind=_ODD, start=rows.size))

    def _side(self, plain: bytes, record: _Record) -> int:
        """The number of the side stream that holds this, which columns share."""
        if (record.kind, plain) not in self._sides:
            self._sides[record.kind, plain] = len(self._records)
            self._records.append(record)
            self._bodies.append(deflate(plain))
        return self._sides[record.kind, plain]


@dataclass(frozen=True, slots=True)
class _Ranges:
    """Bytes elsewhere, as a sequence of which only slices are read."""

    fetch: Fetch
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(self.size)
        return self.fetch(start, stop - start)


class Frame:
    """An encoded frame, whose columns are decoded when asked for."""

    def __init__(self, data: bytes | memoryview | _Ranges) -> None:
        """Read and check the head; FrameError when it is damaged, cut short or of another version."""
        self._data = data
        head = _head(data)
        _, _, _, n, width, streams = _START.unpack_from(head)
        self.n: Final[int] = n
        self.width: Final[int] = width
        self._records = _directory(head, streams)
        self._starts = np.cumsum(self._records["size"], dtype=np.int64) - self._records["size"] + len(head)
        _check(self._records, self.n, self.width)
        size = len(head) + int(self._records["size"].sum(dtype=np.int64))
        if size != len(data):
            raise FrameError(f"it is {len(data)} bytes long where its head says {size}")

    @classmethod
    def reading(cls, fetch: Fetch, size: int) -> Frame:
        """A frame of `size` bytes, read in parts: `fetch(offset, length)` gives so many bytes."""
        return cls(_Ranges(fetch, size))

    def at_ms(self) -> Ints:
        """The time stamps (n,)."""
        with _naming("the time stamps"):
            record = self._record(self.width)
            at_ms = np.full(self.n, record.start, np.int64)
            at_ms += self._steps(self.width, record) << record.shift
            return at_ms

    def column(self, index: int) -> tuple[Floats, Flags | None]:
        """The values (n,) of one column and which are present, None for all.

        Where none is present, the value means nothing. FrameError names the column when its bytes,
        or others that it needs, are damaged; IndexError when there is no such column.
        """
        matrix, present = self.columns((index,))
        return matrix[:, 0], None if present is None else present[:, 0]

    def columns(self, wanted: Sequence[int] | None = None) -> tuple[Floats, Flags | None]:
        """The values (n, k) of the wanted columns, or all, and which are present, None for all of them.

        Raises what `column` raises.
        """
        indexes = range(self.width) if wanted is None else wanted
        if any(not 0 <= index < self.width for index in indexes):
            raise IndexError(f"a frame of {self.width} columns has not all of {list(indexes)}")
        records = [_Record(*cells) for cells in self._records[list(indexes)].tolist()]
        values = np.empty((len(records), self.n), np.float64)
        owners = [
            r.ref if r.kind > HIGHEST_ORDER else index for index, r in zip(indexes, records, strict=True)
        ]
        for source, rows in _places(owners).items():
            with _naming(f"column {indexes[rows[0]]}"):
                own = records[rows[0]]
                steps = self._steps(source, own if own.kind <= HIGHEST_ORDER else self._record(source))
                for row in rows:
                    self._fill(values[row], records[row], steps)
        gaps = _places([record.gaps for record in records])
        if not any(gaps):
            return values.T, None
        present = np.ones(values.shape, np.bool_)
        for number in gaps.keys() - {0}:
            with _naming(f"column {indexes[gaps[number][0]]}"):
                present[gaps[number]] = self._present(number)
        return values.T, present.T

    def _fill(self, out: Floats, record: _Record, steps: Ints) -> None:
        ints = steps << record.shift
        ints = record.start - ints if record.kind == _NEGATED else ints + record.start
        out[:] = columns.floats_of(ints, record.form)
        if record.odd:
            count = (odd := self._record(record.odd)).start
            cells = inflate(self._stream(record.odd, odd), 12 * count)
            rows = np.frombuffer(cells, "<u4", count)
            if rows.max(initial=0) >= self.n:
                raise FrameError("an odd cell is beyond the last row")
            out.view(np.uint64)[rows] = np.frombuffer(cells, "<u8", count, 4 * count)

    def _steps(self, index: int, record: _Record) -> Ints:
        if not record.planes and not record.slope:
            return np.zeros(1, np.int64)  # stands for a whole column of them
        body = self._stream(index, record) if record.size else b""
        return columns.unpack(Packed(record.kind, record.slope, record.planes, body), self.n)

    def _present(self, number: int) -> Flags:
        bitmap = inflate(self._stream(number, self._record(number)), -(-self.n // 8))
        return np.unpackbits(np.frombuffer(bitmap, np.uint8), count=self.n).view(np.bool_)

    def _record(self, number: int) -> _Record:
        return _Record(*self._records[number].item())

    def _stream(self, number: int, record: _Record) -> bytes | memoryview:
        start = int(self._starts[number])
        body = self._data[start : start + record.size]
        if len(body) != record.size or zlib.crc32(body) != record.crc:
            raise FrameError(f"stream {number} does not match its checksum")
        return body


@contextmanager
def _naming(what: str) -> Iterator[None]:
    try:
        yield
    except FrameError as error:
        raise FrameError(f"{what}: {error}") from error


def _places(numbers: Sequence[int]) -> dict[int, list[int]]:
    places: dict[int, list[int]] = {}
    for place, number in enumerate(numbers):
        places.setdefault(number, []).append(place)
    return places


def _head(data: bytes | memoryview | _Ranges) -> bytes | memoryview:
    head, fixed = data[:_FIRST_FETCH_BYTES], _START.size + _CRC_BYTES
    if len(head) < fixed or head[: len(_MAGIC)] != _MAGIC:
        raise FrameError("it does not begin as a frame does")
    if head[3] > VERSION:
        raise FrameError(f"it is of version {head[3]}, made by a newer gpuwatch")
    length = int.from_bytes(head[4:8], "little")
    head = head[:length] if length <= len(head) else data[:length]
    if not fixed <= length == len(head):
        raise FrameError(f"it is cut short, or its head is damaged: {length} bytes of head in {len(data)}")
    crc = zlib.crc32(head[fixed:], zlib.crc32(head[: _START.size]))
    if crc != int.from_bytes(head[_START.size : fixed], "little"):
        raise FrameError("its head does not match its checksum")
    return head


def _directory(head: bytes | memoryview, streams: int) -> npt.NDArray[np.void]:
    table = inflate(head[_START.size + _CRC_BYTES :], streams * _RECORD.itemsize)
    cells = np.frombuffer(table, np.uint8).reshape(_RECORD.itemsize, streams)
    return np.ascontiguousarray(cells.T).view(_RECORD)[:, 0]


def _check(records: npt.NDArray[np.void], rows: int, width: int) -> None:
    """Refuse what no encoder writes, so that no number in it leads astray."""
    kind, number = records["kind"], np.arange(len(records))
    shared = (kind > HIGHEST_ORDER) & (number < width)
    counts = records["start"][kind == _ODD]
    sound = (
        0 < rows * width <= MOST_CELLS
        and width < len(records)
        and kind[width] <= HIGHEST_ORDER
        and np.all(np.where(number > width, (kind == _GAPS) | (kind == _ODD), kind <= _NEGATED))
        and np.all(records["ref"][shared] < number[shared])
        and np.all(kind[records["ref"][shared]] <= HIGHEST_ORDER)
        and np.all(records["shift"] < 64)
        and np.all((records["form"] <= columns.MOST_DECIMALS) | (records["form"] == columns.RAW))
        and np.all((counts >= 0) & (counts <= rows))
        and max(records["gaps"].max(), records["odd"].max()) < len(records)
        and np.all((records["gaps"] == 0) | (kind[records["gaps"]] == _GAPS))
        and np.all((records["odd"] == 0) | (kind[records["odd"]] == _ODD))
    )
    if not sound:
        raise FrameError("its directory contradicts itself")
