"""64-bit patterns as small integers, and those as few bytes; never knows what a column means.

The two halves of a frame's arithmetic. `integers_of` turns the bit patterns of floats into
integers that a rule (the *form*) turns back, exactly; cells that the rule would get wrong are
*odd*: they are kept apart and take their predecessor's integer. `pack` writes integers as the
planes of their differences. What the bytes look like stands in `frame`.

Bits are kept as uint64 wherever a NaN may be, because arithmetic may quieten a NaN's payload.
Integers wrap around at 64 bits both ways, so no difference overflows.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy.typing as npt

    Ints: TypeAlias = npt.NDArray[np.int64]
    Bits: TypeAlias = npt.NDArray[np.uint64]
    Floats: TypeAlias = npt.NDArray[np.float64]
    Flags: TypeAlias = npt.NDArray[np.bool_]
    Buffer: TypeAlias = bytes | memoryview

WHOLE: Final = 0  # the form of integers; 1 to MOST_DECIMALS: that many decimal places
MOST_DECIMALS: Final = 9
RAW: Final = 255  # the form of a float's own bits
HIGHEST_ORDER: Final = 2
_ODD_SHARE: Final = 16  # at most one cell in so many is odd; beyond that another form serves better
_PROBED: Final = 64  # cells that are looked at before a whole column is tried


class FrameError(ValueError):
    """A frame's bytes are damaged, cut short or of an unknown version; the text says what is wrong."""


@dataclass(frozen=True, slots=True)
class Packed:
    """Integers as bytes: `order` times summed up, plus `slope` times the row; bit k of `planes`: plane k."""

    order: int
    slope: int
    planes: int
    body: Buffer


def carry(good: Flags) -> Ints:
    """For every row, the row of the last good cell up to there, else of the first; needs a good one."""
    rows = np.maximum.accumulate(np.where(good, np.arange(good.size), 0))
    first = int(good.argmax())
    rows[:first] = first
    return rows


def bridge(bits: Bits, present: Flags, gaps: Sequence[int]) -> None:
    """Let absent cells of (c, n) patterns take what costs least: their predecessor's.

    `present` is (n, c). Columns of the same number in `gaps` have the same ones; 0: none.
    """
    for number in {*gaps} - {0}:
        columns = [column for column, other in enumerate(gaps) if other == number]
        good = present[:, columns[0]]
        bits[columns] = bits[columns][:, carry(good)] if good.any() else 0


def integers_of(bits: Bits) -> tuple[Ints, list[int], dict[int, Ints]]:
    """The integers (c, n) for the patterns (c, n), the form of each column, and the rows odd in it."""
    with np.errstate(invalid="ignore"):
        ints = bits.view(np.float64).astype(np.int64)
    fit = ints.astype(np.float64).view(np.uint64) == bits
    forms = [WHOLE] * len(bits)
    odd: dict[int, Ints] = {}
    for column in np.flatnonzero(~fit.all(axis=1)).tolist():
        form, found, good = _best_form(bits[column], ints[column], fit[column])
        forms[column] = form
        if good.all():
            ints[column] = found
        else:
            odd[column] = np.flatnonzero(~good)
            ints[column] = found[carry(good)]
    return ints, forms, odd


def normalise(ints: Ints) -> tuple[list[int], list[int]]:
    """Let every row of (c, n) integers start at 0 and lose common zero bits; the starts and the shifts."""
    starts = ints[:, 0].copy()
    ints -= starts[:, None]
    used = np.bitwise_or.reduce(ints, axis=1).tolist()
    shifts = [max(0, (bits & -bits).bit_length() - 1) for bits in used]
    ints >>= np.array(shifts, np.int64)[:, None]
    return starts.tolist(), shifts


def floats_of(ints: Ints, form: int) -> Floats:
    """The floats that the integers stand for in that form."""
    if form == RAW:
        return ints.view(np.float64)
    floats = ints.astype(np.float64)
    return floats if form == WHOLE else np.divide(floats, 10.0**form, out=floats)


def pack(ints: Ints, slopes: Sequence[int] = ()) -> Packed:
    """The smallest of the ways to write these (n,) integers, of which the first is 0.

    Tried are orders 0 to 2, and the distance from a line of each of the `slopes`.
    """
    none = np.zeros(1, np.int64)
    first = np.concatenate((none, np.diff(ints)))
    step = first[1:2] if ints.size > 1 else none
    second = np.concatenate((none, none, np.diff(first[1:])))[: ints.size]
    ways = [(0, 0, ints), (1, 0, first), (2, int(step[0]), second)]
    ways += [(0, slope, ints - slope * np.arange(ints.size)) for slope in slopes]
    return min((_packed(*way) for way in ways), key=lambda packed: len(packed.body))


def unpack(packed: Packed, rows: int) -> Ints:
    """The integers again; FrameError when the bytes are not what `pack` writes for so many rows."""
    if not packed.planes:
        return np.arange(rows) * packed.slope
    kept = [k for k in range(8) if packed.planes >> k & 1]
    body, start = memoryview(packed.body), 4 * len(kept) - 4
    sizes = np.frombuffer(body[:start], "<u4").tolist() if len(body) >= start else []
    sizes.append(len(body) - start - sum(sizes))
    if sizes[-1] < 0:
        raise FrameError("its planes are longer than its bytes")
    width = 1 << kept[-1].bit_length()  # small integers are put together in as few bytes as hold them
    zigzag = np.zeros(rows, f"<u{width}")
    cells = zigzag.view(np.uint8).reshape(rows, width)
    for k, size in zip(kept, sizes, strict=True):
        plane = body[start : start + size]
        cells[:, k] = np.frombuffer(plane if size == rows else inflate(plane, rows), np.uint8)
        start += size
    signed = f"<i{width}"
    ints: Ints = ((zigzag >> 1).view(signed) ^ -(zigzag & 1).view(signed)).astype(np.int64)
    for _ in range(packed.order):
        np.cumsum(ints, out=ints)
    if packed.slope:
        ints += np.arange(rows) * packed.slope
    return ints


def deflate(data: bytes, strategy: int = zlib.Z_DEFAULT_STRATEGY) -> bytes:
    """A raw deflate stream, without header or checksum."""
    packer = zlib.compressobj(6, zlib.DEFLATED, -15, 9, strategy)
    return packer.compress(data) + packer.flush()


def inflate(data: Buffer, length: int) -> bytes:
    """The bytes that were deflated; FrameError unless they are exactly `length`."""
    unpacker = zlib.decompressobj(-15)
    try:
        plain = unpacker.decompress(data, length + 1)
    except zlib.error as error:
        raise FrameError(f"deflate: {error}") from error
    if len(plain) != length or not unpacker.eof or unpacker.unused_data:
        raise FrameError(f"a stream does not inflate to {length} bytes")
    return plain


def _best_form(bits: Bits, ints: Ints, fit: Flags) -> tuple[int, Ints, Flags]:
    most_odd = bits.size // _ODD_SHARE
    if np.count_nonzero(~fit) <= most_odd:
        return WHOLE, ints, fit
    probe = bits[:: max(1, bits.size // _PROBED)]
    for form in range(1, MOST_DECIMALS + 1):
        if np.count_nonzero(~_decimal(probe, form)[1]) > probe.size // 4:
            continue
        found, good = _decimal(bits, form)
        if np.count_nonzero(~good) <= most_odd:
            return form, found, good
    finite = np.isfinite(bits.view(np.float64))
    few = np.count_nonzero(~finite) <= most_odd
    return RAW, bits.view(np.int64), finite if few else np.ones_like(finite)


def _decimal(bits: Bits, form: int) -> tuple[Ints, Flags]:
    with np.errstate(invalid="ignore", over="ignore"):
        ints = np.rint(bits.view(np.float64) * 10.0**form).astype(np.int64)
    return ints, floats_of(ints, form).view(np.uint64) == bits


def _packed(order: int, slope: int, rest: Ints) -> Packed:
    zigzag = ((rest << 1) ^ (rest >> 63)).astype("<u8", copy=False)
    cells = zigzag.view(np.uint8).reshape(rest.size, 8)
    used = int(np.bitwise_or.reduce(zigzag))
    planes, streams = 0, []
    for k in range(8):
        if used >> (8 * k) & 255:
            plane = cells[:, k].tobytes()
            packed = deflate(plane, zlib.Z_RLE)
            streams.append(packed if len(packed) < len(plane) else plane)
            planes |= 1 << k
    sizes = np.array([len(stream) for stream in streams[:-1]], "<u4").tobytes()
    return Packed(order, slope, planes, b"".join((sizes, *streams)))
