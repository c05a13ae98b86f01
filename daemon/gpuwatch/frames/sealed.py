"""What the sealing process hands to the daemon; MessagePack on a pipe."""

from __future__ import annotations

from typing import Final

import msgspec

DAMAGED: Final = 11  # exit status where SQLite says that the file is damaged


class SealedFrame(msgspec.Struct, frozen=True):
    """One hour of one target; `series` are the ids of its columns."""

    from_ms: int
    to_ms: int
    n: int
    series: list[int]
    data: bytes


class Sealed(msgspec.Struct, frozen=True):
    """What the rows of one target up to `upto_id` became.

    `hourly` are rows of that table: hour_ms, series, n, minimum, average, maximum, last.
    """

    target: int
    upto_id: int
    frames: list[SealedFrame]
    hourly: list[tuple[int, int, int, float | None, float | None, float | None, float | None]]
