"""A scrape as the JSON array of a row of metrics.db, and back, bit for bit; knows no table.

JSON has neither NaN nor infinities: null is a gap, "stale" Prometheus' staleness marker, "nan", "inf" and
"-inf" speak for themselves, and any other NaN is "nan:" and its bits in hexadecimal.
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, Final

import msgspec

from gpuwatch.records import STALE, is_stale

if TYPE_CHECKING:
    from collections.abc import Sequence

HOUR_MS: Final = 3_600_000

# A gap is no sample at all, unlike `records.STALE`, which is one. In memory it is a NaN of its own,
# which no source gives, so that a row is plain floats.
ABSENT_BITS: Final = b"\x0c\x00\x00\x00\x00\x00\xf8\x7f"
ABSENT: Final[float] = struct.unpack("<d", ABSENT_BITS)[0]

_ENCODER: Final = msgspec.json.Encoder()
_DECODER: Final = msgspec.json.Decoder(list[float | str | None])
_NAMED: Final[dict[str, float]] = {
    "stale": STALE,
    "inf": math.inf,
    "-inf": -math.inf,
    "nan": struct.unpack("<d", b"\0\0\0\0\0\0\xf8\x7f")[0],
}


def is_absent(value: float) -> bool:
    """Tell a gap from every other value, other NaNs included."""
    return value != value and struct.pack("<d", value) == ABSENT_BITS


def is_plain(values: Sequence[float]) -> bool:
    """Whether there is certainly neither gap nor NaN nor infinity among them; False says nothing."""
    return math.isfinite(sum(values))


def encode(row: Sequence[float]) -> str:
    """The text of a row; `ABSENT` is null."""
    cells = row if is_plain(row) else [cell(value) for value in row]
    return _ENCODER.encode(cells).decode()


def decode(text: str) -> list[float]:
    """The row of a text; msgspec.DecodeError or ValueError if it is none."""
    cells = _DECODER.decode(text)
    if "n" in text or '"' in text:  # null, or a string
        return [_value(cell) for cell in cells]
    return cells  # type: ignore[return-value]  # neither of them is in it


def cell(value: float) -> float | str | None:
    """What JSON and people see of a value."""
    if math.isfinite(value):
        return value
    if is_absent(value):
        return None
    if is_stale(value):
        return "stale"
    if value == value:  # an infinity
        return "inf" if value > 0 else "-inf"
    bits: str = struct.pack(">d", value).hex()
    return "nan" if bits == "7ff8000000000000" else f"nan:{bits}"


def _value(cell: float | str | None) -> float:
    if cell is None:
        return ABSENT
    if isinstance(cell, float):
        return cell
    if cell in _NAMED:
        return _NAMED[cell]
    kind, _, bits = cell.partition(":")
    if kind != "nan" or len(bits) != 16:
        raise ValueError(f"{cell!r} is no value of a sample")
    return float(struct.unpack(">d", bytes.fromhex(bits))[0])
