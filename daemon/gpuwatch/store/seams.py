"""Finds where a target has two scrapes of one instant, as a clock that steps back makes; reads no value.

Rule: of two scrapes of one target and instant the later written counts, and the earlier not at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import numpy.typing as npt
    from sqlalchemy import Connection

_ROWS: Final = (
    "SELECT hot.id, hot.target, hot.at_ms FROM hot JOIN target ON target.id = hot.target"
    " WHERE hot.id >= ? AND hot.id < ? AND hot.at_ms > ? AND hot.at_ms <= ?"
    " AND hot.id > target.sealed_id ORDER BY hot.id"
)


class Stored(NamedTuple):
    """A frame without its data."""

    number: int
    target: int
    layout: int
    from_ms: int
    to_ms: int


class Rows(NamedTuple):
    """Of the rows that are in no frame: the instants of each target, and the ids that do not count."""

    instants: Mapping[int, npt.NDArray[np.int64]]
    replaced: frozenset[int]


def frames(connection: Connection, after_ms: int, upto_ms: int) -> list[Stored]:
    """The frames that share some of (after_ms, upto_ms], in the order they were written."""
    found = connection.exec_driver_sql(
        "SELECT id, target, layout, from_ms, to_ms FROM frame WHERE from_ms <= ? AND to_ms > ? ORDER BY id",
        (upto_ms, after_ms),
    )
    return [Stored(*row) for row in found]


def rows(connection: Connection, ids: Iterable[tuple[int, int]], after_ms: int, upto_ms: int) -> Rows:
    """The unsealed rows of (after_ms, upto_ms] with ids in any of these ranges, which are in order."""
    last: dict[tuple[int, int], int] = {}
    replaced: set[int] = set()
    for first, end in ids:
        for number, target, at_ms in connection.exec_driver_sql(_ROWS, (first, end, after_ms, upto_ms)):
            before = last.setdefault((target, at_ms), number)
            if before != number:
                replaced.add(before)
                last[target, at_ms] = number
    instants: dict[int, list[int]] = {}
    for target, at_ms in last:
        instants.setdefault(target, []).append(at_ms)
    return Rows({target: np.array(some, np.int64) for target, some in instants.items()}, frozenset(replaced))


def overlaps(written: Sequence[Stored], unsealed: Rows) -> dict[int, list[Stored]]:
    """By frame number: the later frames of its target that share its time, or none but maybe rows do.

    A frame that nothing later can share an instant with is not in it.
    """
    begins = {target: int(some.min()) for target, some in unsealed.instants.items()}
    later: dict[int, list[Stored]] = {}
    found: dict[int, list[Stored]] = {}
    for one in reversed(written):
        others = later.setdefault(one.target, [])
        if begins.get(one.target, one.to_ms + 1) <= one.to_ms:
            found[one.number] = [o for o in others if o.from_ms <= one.to_ms and one.from_ms <= o.to_ms]
        others.append(one)
        begins[one.target] = min(one.from_ms, begins.get(one.target, one.from_ms))
    return found
