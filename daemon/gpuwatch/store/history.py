"""Reads samples of any age out of metrics.db, frames and rows alike, as arrays, for the commands.

It loads numpy. Memory is bounded: one frame at a time, and no more samples than the caller allows, which
is seen before any is read.
Samples come in time order. Of two scrapes of one target and instant the later written counts, whole; where
two targets give one series at one instant, one of both does.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from gpuwatch.errors import StoreError
from gpuwatch.frames import frame, rowtext
from gpuwatch.frames.rowtext import ABSENT_BITS
from gpuwatch.promql import Matcher, Series, metric_of
from gpuwatch.store import seams
from gpuwatch.store.codec import labels_of
from gpuwatch.store.latest import latest
from gpuwatch.store.metrics import NEWEST_MS
from gpuwatch.store.seek import row_ids

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import numpy.typing as npt
    from sqlalchemy import Connection

    from gpuwatch.records import Labels
    from gpuwatch.store.database import Database
    from gpuwatch.store.seams import Stored

    Piece = tuple[int, npt.NDArray[np.int64], npt.NDArray[np.float64]]  # id of the series, instants, values

MAX_SAMPLES: Final = 20_000_000
_ABSENT: Final = np.frombuffer(ABSENT_BITS, np.uint64)[0]
_NEVER: Final = np.empty(0, np.int64)
_IDS_AT_ONCE: Final = 500
_FEW: Final = 16
_ROWS: Final = (
    "SELECT hot.id, hot.layout, hot.at_ms, hot.vals FROM hot JOIN target ON target.id = hot.target"
    " WHERE hot.id >= ? AND hot.id < ? AND hot.at_ms > ? AND hot.at_ms <= ? AND hot.layout IN ({})"
    " AND hot.id > target.sealed_id ORDER BY hot.id"
)
_FRAME_ROWS: Final = "SELECT layout, sum(n) FROM frame WHERE from_ms > ? AND to_ms <= ? GROUP BY layout"
_ROW_COUNTS: Final = (
    "SELECT hot.layout, count(*) FROM hot JOIN target ON target.id = hot.target"
    " WHERE hot.id >= ? AND hot.id < ? AND hot.at_ms > ? AND hot.at_ms <= ?"
    " AND hot.id > target.sealed_id GROUP BY hot.layout"
)
# From hour to hour by the key: the hours that there are, without reading each hour's thousand series.
_HOURS_BETWEEN: Final = (
    "WITH RECURSIVE hours (at) AS (SELECT min(hour_ms) FROM hourly WHERE hour_ms > ?"
    " UNION ALL SELECT (SELECT min(hour_ms) FROM hourly WHERE hour_ms > at) FROM hours WHERE at < ?)"
)


class Track(NamedTuple):
    """One series: instants in ms (int64) and values (float64), both of the same length, in time order."""

    labels: Labels
    at_ms: npt.NDArray[np.int64]
    values: npt.NDArray[np.float64]


class Points(NamedTuple):
    """One series in equal steps: for each step that has samples its end in ms, and what they came to."""

    labels: Labels
    at_ms: npt.NDArray[np.int64]
    minimum: npt.NDArray[np.float64]
    average: npt.NDArray[np.float64]
    maximum: npt.NDArray[np.float64]


class Hour(NamedTuple):
    """What was kept of one hour of one series; `n` samples, staleness markers and NaN not counted."""

    labels: Labels
    hour_ms: int
    n: int
    minimum: float | None
    average: float | None
    maximum: float | None
    last: float | None


@dataclass(frozen=True, slots=True)
class _Wanted:
    """The chosen series by id, where they stand, by layout (positions, ids), and the time (after, upto]."""

    labels: Mapping[int, Labels]
    columns: Mapping[int, Sequence[tuple[int, int]]]
    after_ms: int
    upto_ms: int

    def cells(self, rows: Iterable[tuple[int, int]]) -> int:
        """How many cells so many rows of each of these layouts hold of the chosen series."""
        return sum(len(self.columns.get(layout, ())) * count for layout, count in rows)


class History:
    """Samples by matchers and time. Every method is a snapshot of its own."""

    def __init__(self, opened: Database, max_samples: int = MAX_SAMPLES) -> None:
        self._database = opened
        self._max_samples = max_samples
        self.damaged: list[str] = []

    def span_ms(self) -> tuple[int, int] | None:
        """The instants of the oldest and the newest sample; None if there is none."""
        with self._database.reading("see how far samples go back") as connection:
            first, last = connection.exec_driver_sql(
                "SELECT min(first), max(last) FROM ("
                " SELECT min(from_ms) AS first, max(to_ms) AS last FROM frame UNION ALL"
                " SELECT min(at_ms), max(at_ms) FROM hot)"
            ).one()
        return None if first is None else (first, last)

    def newest_ms(self) -> int | None:
        """The instant of the scrape that was written last; None if there is none."""
        with self._database.reading("find the newest scrape") as connection:
            found: int | None = connection.exec_driver_sql(NEWEST_MS).scalar_one_or_none()
            if found is None:
                found = connection.exec_driver_sql("SELECT max(to_ms) FROM frame").scalar_one()
        return found

    def series(self, matchers: Sequence[Matcher] = ()) -> list[Labels]:
        """The labels of every series that all matchers accept, also of those whose samples are deleted."""
        with self._database.reading("list the series") as connection:
            return list(_series(connection, matchers).values())

    def tracks(self, matchers: Sequence[Matcher], after_ms: int, upto_ms: int) -> list[Track]:
        """Every series that all matchers accept, with its samples in (after_ms, upto_ms], if it has any.

        StoreError if they are more than the limit, gaps counted too where whole frames tell that nothing
        need be read. A damaged column is left out and told in `damaged`.
        """
        pieces: dict[int, list[tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]]] = {}
        count = 0
        with self._database.reading("read samples") as connection:
            wanted = _wanted(connection, matchers, after_ms, upto_ms)
            for one, at_ms, values in self._pieces(connection, wanted):
                count += len(at_ms)
                self._allow(count)
                if len(at_ms):
                    pieces.setdefault(one, []).append((at_ms, values))
        return [Track(wanted.labels[one], *_in_order(found)) for one, found in pieces.items()]

    def points(self, matchers: Sequence[Matcher], after_ms: int, upto_ms: int, count: int) -> list[Points]:
        """(after_ms, upto_ms] in `count` steps at most, for a picture; what is no number is left out."""
        step_ms = max(1, -(-(upto_ms - after_ms) // count))
        return [_in_steps(track, after_ms, step_ms) for track in self.tracks(matchers, after_ms, upto_ms)]

    def select(self, matchers: Sequence[Matcher], after_ms: int, upto_ms: int) -> list[Series]:
        """As `tracks`, as plain lists: a `promql.Querier`. Series of the same instants share their list."""
        shared: dict[bytes, list[int]] = {}
        found = []
        for track in self.tracks(matchers, after_ms, upto_ms):
            key = track.at_ms.tobytes()
            at_ms = shared[key] if key in shared else shared.setdefault(key, track.at_ms.tolist())
            found.append(Series(track.labels, at_ms, track.values.tolist()))
        return found

    def hours(self, matchers: Sequence[Matcher], after_ms: int, upto_ms: int) -> list[Hour]:
        """The hourly figures of full hours that began in (after_ms, upto_ms], in time order."""
        with self._database.reading("read hourly figures") as connection:
            labels = _series(connection, matchers)
            found: list[Hour] = []
            for some in _chunks(list(labels)):
                rows = connection.exec_driver_sql(
                    f"{_HOURS_BETWEEN} SELECT series, hour_ms, n, minimum, average, maximum, last"
                    f" FROM hours JOIN hourly ON hour_ms = at AND at <= ? AND series IN ({_marks(some)})",
                    (after_ms, upto_ms, upto_ms, *some),
                )
                found += [Hour(labels[row[0]], *row[1:]) for row in rows]
        return sorted(found, key=lambda hour: hour.hour_ms)

    def latest(self, now_ms: int, lookback_ms: int) -> dict[Labels, float]:
        """The newest value in (now_ms - lookback_ms, now_ms] of every series that has not ended."""
        with self._database.reading("read the latest samples") as connection:
            return latest(connection, now_ms, lookback_ms)

    def _pieces(self, connection: Connection, wanted: _Wanted) -> Iterator[Piece]:
        # A frame is a hundred pages; mapped, a week of them takes a third less time. Not for what reads
        # single pages here and there, since the kernel would read far ahead for each.
        connection.exec_driver_sql("PRAGMA mmap_size = 1073741824")
        ids = list(row_ids(connection, wanted.after_ms, wanted.upto_ms))
        self._foresee(connection, wanted, ids)
        unsealed = seams.rows(connection, ids, wanted.after_ms, wanted.upto_ms)
        written = seams.frames(connection, wanted.after_ms, wanted.upto_ms)
        overlaps = seams.overlaps(written, unsealed)
        for one in written:
            if one.layout not in wanted.columns:
                continue
            pieces = self._of_frame(connection, one, wanted)
            if one.number not in overlaps:
                yield from pieces
                continue
            later = [unsealed.instants.get(one.target, _NEVER)]
            later += [self._instants(connection, other) for other in overlaps[one.number]]
            yield from _without(pieces, np.concatenate(later))
        yield from self._of_rows(connection, wanted, ids, unsealed.replaced)

    def _foresee(self, connection: Connection, wanted: _Wanted, ids: Sequence[tuple[int, int]]) -> None:
        """Refuse too many samples by the counts of the frames that lie within the time, and of the rows."""
        whole = connection.exec_driver_sql(_FRAME_ROWS, (wanted.after_ms, wanted.upto_ms))
        cells = wanted.cells((layout, rows) for layout, rows in whole)
        self._allow(cells)
        widest = max(map(len, wanted.columns.values()), default=0)
        if cells + widest * sum(end - first for first, end in ids) <= self._max_samples:
            return  # so that the rows need not be counted
        for bounds in ids:
            rows = connection.exec_driver_sql(_ROW_COUNTS, (*bounds, wanted.after_ms, wanted.upto_ms))
            cells += wanted.cells((layout, count) for layout, count in rows)
        self._allow(cells)

    def _allow(self, count: int) -> None:
        if count > self._max_samples:
            raise StoreError(
                f"more than {self._max_samples} samples are asked for; to cure it,"
                " name fewer series or a shorter time, or read the hourly figures"
            )

    def _instants(self, connection: Connection, one: Stored) -> npt.NDArray[np.int64]:
        try:
            with _frame(connection, one.number, 0) as opened:
                return opened.at_ms()
        except frame.FrameError as error:
            self.damaged.append(f"frame {one.number}: {error}")
            return _NEVER

    def _of_frame(self, connection: Connection, one: Stored, wanted: _Wanted) -> Iterator[Piece]:
        columns = wanted.columns[one.layout]
        try:
            with _frame(connection, one.number, len(columns)) as opened:
                at_ms = opened.at_ms()
                first, end = np.searchsorted(at_ms, (wanted.after_ms, wanted.upto_ms), "right").tolist()
                for position, series in columns:
                    try:
                        values, present = opened.column(position)
                    except frame.FrameError as error:
                        self.damaged.append(f"frame {one.number}: {error}")
                        continue
                    kept = slice(None) if present is None else present[first:end]
                    yield series, at_ms[first:end][kept], values[first:end][kept]
        except frame.FrameError as error:
            self.damaged.append(f"frame {one.number}: {error}")

    def _of_rows(
        self,
        connection: Connection,
        wanted: _Wanted,
        ids: Sequence[tuple[int, int]],
        replaced: frozenset[int],
    ) -> Iterator[Piece]:
        """From the rows that are in no frame yet, less those that are replaced."""
        by_layout: dict[int, tuple[list[int], list[list[float]]]] = {}
        for number, layout, at_ms, text in _rows(connection, wanted, ids):
            if number in replaced:
                continue
            try:
                row = rowtext.decode(text)
                cells = [row[position] for position, _ in wanted.columns[layout]]
            except (ValueError, TypeError, LookupError) as error:
                self.damaged.append(f"row {number} of hot: {error}")
                continue
            instants, values = by_layout.setdefault(layout, ([], []))
            instants.append(at_ms)
            values.append(cells)
        for layout, (instants, values) in by_layout.items():
            stamps, matrix = np.array(instants, np.int64), np.array(values, np.float64)
            present = matrix.view(np.uint64) != _ABSENT
            for column, (_, one) in enumerate(wanted.columns[layout]):
                kept = present[:, column]
                yield one, stamps[kept], matrix[kept, column]


def _wanted(connection: Connection, matchers: Sequence[Matcher], after_ms: int, upto_ms: int) -> _Wanted:
    labels = _series(connection, matchers)
    columns: dict[int, list[tuple[int, int]]] = {}
    for some in _chunks(list(labels)):
        rows = connection.exec_driver_sql(
            f"SELECT layout, position, series FROM layout_series WHERE series IN ({_marks(some)})",
            tuple(some),
        )
        for layout, position, one in rows:
            columns.setdefault(layout, []).append((position, one))
    return _Wanted(labels, columns, after_ms, upto_ms)


def _without(pieces: Iterable[Piece], instants: npt.NDArray[np.int64]) -> Iterator[Piece]:
    for one, at_ms, values in pieces:
        kept = np.isin(at_ms, instants, invert=True)
        yield one, at_ms[kept], values[kept]


@contextmanager
def _frame(connection: Connection, number: int, columns: int) -> Iterator[frame.Frame]:
    """A frame, of which for a few columns only their bytes are read: half the time over a week."""
    if columns > _FEW:
        data = connection.exec_driver_sql("SELECT data FROM frame WHERE id = ?", (number,)).scalar_one()
        yield frame.Frame(data)
        return
    raw: Any = connection.connection.driver_connection
    with raw.blobopen("frame", "data", number, readonly=True) as blob:

        def fetch(offset: int, length: int) -> bytes:
            blob.seek(offset)
            return bytes(blob.read(length))

        yield frame.Frame.reading(fetch, len(blob))


def _in_steps(track: Track, after_ms: int, step_ms: int) -> Points:
    counted = ~np.isnan(track.values)
    at_ms, values = track.at_ms[counted], track.values[counted]
    steps = (at_ms - after_ms - 1) // step_ms
    first = np.flatnonzero(np.diff(steps, prepend=-1))
    lengths = np.diff(first, append=len(steps))
    if not len(first):
        return Points(track.labels, at_ms, values, values, values)
    with np.errstate(invalid="ignore", over="ignore"):  # infinities of both signs have no average
        average = np.add.reduceat(values, first) / lengths
    return Points(
        track.labels,
        after_ms + (steps[first] + 1) * step_ms,
        np.minimum.reduceat(values, first),
        average,
        np.maximum.reduceat(values, first),
    )


def _rows(
    connection: Connection, wanted: _Wanted, ids: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, int, int, str]]:
    """Id, layout, instant and text of the rows that have any wanted series."""
    for first, end in ids:
        for some in _chunks(list(wanted.columns)):
            bounds = (first, end, wanted.after_ms, wanted.upto_ms)
            for row in connection.exec_driver_sql(_ROWS.format(_marks(some)), (*bounds, *some)):
                yield row[0], row[1], row[2], row[3]


def _series(connection: Connection, matchers: Sequence[Matcher]) -> dict[int, Labels]:
    """The ids and labels of the series that all matchers accept."""
    metric = metric_of(matchers)
    rows = connection.exec_driver_sql(
        "SELECT id, labels FROM series" + (" WHERE metric = ?" if metric else ""), (metric,) if metric else ()
    )
    all_of_them = ((row[0], labels_of(row[1])) for row in rows)
    return {
        one: labels
        for one, labels in all_of_them
        if all(matcher.matches(labels.get(matcher.name)) for matcher in matchers)
    }


def _in_order(
    pieces: Sequence[tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    at_ms = np.concatenate([piece[0] for piece in pieces])
    values = np.concatenate([piece[1] for piece in pieces])
    steps = np.diff(at_ms)
    if (steps <= 0).any():  # a clock stepped back, or a scrape was written twice
        order = np.argsort(at_ms, kind="stable")
        at_ms, values = at_ms[order], values[order]
        kept = np.append(np.diff(at_ms) != 0, True)
        at_ms, values = at_ms[kept], values[kept]
    return at_ms, values


def _chunks(ids: Sequence[int]) -> Iterator[Sequence[int]]:
    for first in range(0, len(ids), _IDS_AT_ONCE):
        yield ids[first : first + _IDS_AT_ONCE]


def _marks(ids: Sequence[int]) -> str:
    return ",".join("?" * len(ids))
