"""Writes metrics.db for the daemon: scrapes as rows, sealed hours as frames, and what retention deletes.

Every method is one short transaction; none waits for anything but the disk.

Rule 1: ids of `hot` only rise; a row is sealed if its id is not above its target's `sealed_id`.
Rule 2: frames, their hourly figures and the new `sealed_id` are one transaction, so a row is hot or in a
frame, never both or neither.
Rule 3: sealed rows are deleted later, some hundred at a time, so that no tick waits long for the file.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from gpuwatch.errors import StoreError
from gpuwatch.frames import rowtext
from gpuwatch.records import Scrape
from gpuwatch.store.codec import clean, labels_json, labels_of
from gpuwatch.store.layouts import Layout, is_absent
from gpuwatch.store.metrics_schema import METRICS_STEPS
from gpuwatch.store.migrations import migrate

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sqlalchemy import Connection

    from gpuwatch.frames.sealed import Sealed
    from gpuwatch.records import Labels
    from gpuwatch.store.database import Database

PAGE_BYTES: Final = 4096
NEWEST_MS: Final = "SELECT at_ms FROM hot ORDER BY id DESC LIMIT 1"
_SLICE_ROWS: Final = 256
_ROWS_AT_ONCE: Final = 100
_FRAMES_AT_ONCE: Final = 100
_HOURLY_BYTES: Final = 45  # of a row, by experience
_FOREVER_MS: Final = 1 << 53
_DELETE_HOURS: Final = (
    "DELETE FROM hourly WHERE hour_ms IN"
    " (SELECT DISTINCT hour_ms FROM hourly WHERE hour_ms < ? ORDER BY hour_ms LIMIT 4)"
)
_MAX_KNOWN: Final = 512  # layouts whose ids are at hand; a host has about ten


@dataclass(frozen=True, slots=True)
class Row:
    """A scrape on its way to the disk: its values as `rowtext` has them."""

    layout: Layout
    at_ms: int
    text: str


class Metrics:
    """The one writer of metrics.db."""

    def __init__(self, opened: Database) -> None:
        """Bring the file up to date; StoreError as `migrate` has it."""
        self._database = opened
        migrate(opened, METRICS_STEPS)
        self._ids: dict[Layout, tuple[int, int]] = {}  # target and layout
        self._layouts: dict[int, Layout] = {}
        self._has_run = False
        with opened.reading("find the newest row") as connection:
            self._next_id = 1 + int(
                connection.exec_driver_sql(
                    "SELECT max(coalesce((SELECT max(id) FROM hot), 0),"
                    " coalesce((SELECT max(sealed_id) FROM target), 0))"
                ).scalar_one()
            )

    def close(self) -> None:
        """Close the file; twice is once."""
        self._database.close()

    # -- rows ------------------------------------------------------------------------------------

    def write(self, rows: Sequence[Row]) -> None:
        """All of them in one transaction; StoreError: none was written."""
        if not rows:
            return
        made: dict[Layout, tuple[int, int]] = {}
        with self._database.writing("save scrapes") as connection:
            if not self._has_run:
                connection.exec_driver_sql("INSERT OR IGNORE INTO run VALUES (?)", (self._next_id,))
            for layout in {row.layout for row in rows} - self._ids.keys():
                made[layout] = _ids_of(connection, layout)
            ids = self._ids | made if made else self._ids
            connection.exec_driver_sql(
                "INSERT INTO hot (id, at_ms, target, layout, vals) VALUES (?, ?, ?, ?, ?)",
                [
                    (number, row.at_ms, *ids[row.layout], row.text)
                    for number, row in enumerate(rows, self._next_id)
                ],
            )
        self._has_run = True
        self._next_id += len(rows)
        if len(ids) > _MAX_KNOWN:
            self._ids.clear()
        self._ids.update(made)

    def recent(self, after_ms: int, upto_ms: int) -> Iterator[tuple[Layout, int, list[float]]]:
        """Each hot scrape of (after_ms, upto_ms] as layout, instant, row.

        In time order, which after a clock stepped back is not the order they were written in; of one
        instant the later written comes later.
        """
        with self._database.reading("read recent scrapes") as connection:
            ids = connection.exec_driver_sql(
                "SELECT hot.id FROM hot JOIN target ON target.id = hot.target"
                " WHERE hot.at_ms > ? AND hot.at_ms <= ? AND hot.id > target.sealed_id"
                " ORDER BY hot.at_ms, hot.id",
                (after_ms, upto_ms),
            )
            for layout_id, at_ms, text in _rows_of(connection, ids.scalars().all()):
                layout = self._layout(connection, layout_id)
                row = readable(text, len(layout.labels))
                if row is not None:
                    yield layout, at_ms, row

    def newest_ms(self) -> int | None:
        """When the newest scrape was; None if there is none."""
        with self._database.reading("find the newest scrape") as connection:
            found = connection.exec_driver_sql(NEWEST_MS)
            at_ms: int | None = found.scalar_one_or_none()
        return at_ms

    # -- sealing ---------------------------------------------------------------------------------

    def oldest_unsealed_ms(self) -> int | None:
        """When the oldest row was that is in no frame yet; None if there is none."""
        with self._database.reading("find the oldest scrape") as connection:
            found = connection.exec_driver_sql(
                "SELECT hot.at_ms FROM hot JOIN target ON target.id = hot.target"
                " WHERE hot.id > target.sealed_id ORDER BY hot.id LIMIT 1"
            )
            at_ms: int | None = found.scalar_one_or_none()
        return at_ms

    def take_in(self, sealed: Sealed) -> None:
        """Let frames stand for the rows of one target; sealed already: nothing is done."""
        with self._database.writing("save a sealed hour") as connection:
            moved = connection.exec_driver_sql(
                "UPDATE target SET sealed_id = ? WHERE id = ? AND sealed_id < ?",
                (sealed.upto_id, sealed.target, sealed.upto_id),
            )
            if not moved.rowcount:
                return
            for frame in sealed.frames:
                layout = _layout_of_series(connection, sealed.target, frame.series)
                connection.exec_driver_sql(
                    "INSERT INTO frame (target, from_ms, to_ms, layout, n, data) VALUES (?, ?, ?, ?, ?, ?)",
                    (sealed.target, frame.from_ms, frame.to_ms, layout, frame.n, frame.data),
                )
            if sealed.hourly:
                connection.exec_driver_sql(_SAVE_HOURLY, sealed.hourly)

    def delete_sealed(self, keep_from_id: int) -> int:
        """Delete some hundred of the oldest rows that are sealed and below `keep_from_id`; says how many."""
        with self._database.writing("delete sealed rows") as connection:
            oldest = connection.exec_driver_sql("SELECT min(id) FROM hot").scalar_one_or_none()
            if oldest is None:
                return 0
            return connection.exec_driver_sql(
                "DELETE FROM hot WHERE id < ? AND id < ?"
                " AND id <= (SELECT sealed_id FROM target WHERE target.id = hot.target)",
                (oldest + _SLICE_ROWS, keep_from_id),
            ).rowcount

    # -- retention -------------------------------------------------------------------------------

    def delete_older(self, frames_before_ms: int, hourly_before_ms: int) -> int:
        """Delete some of what ended before; asked again it goes on. Says how many rows."""
        with self._database.writing("delete what is too old") as connection:
            deleted = connection.exec_driver_sql(
                "DELETE FROM frame WHERE id IN"
                " (SELECT id FROM frame WHERE from_ms < ? AND to_ms < ? ORDER BY from_ms LIMIT ?)",
                (frames_before_ms, frames_before_ms, _FRAMES_AT_ONCE),
            ).rowcount
            return deleted + connection.exec_driver_sql(_DELETE_HOURS, (hourly_before_ms,)).rowcount

    def delete_oldest(self, at_least_bytes: int) -> int:
        """Delete about this much: the oldest frames, then hourly figures, then rows; gives bytes."""
        with self._database.writing("make room") as connection:
            chosen, freed = [], 0
            oldest = connection.exec_driver_sql("SELECT id, length(data) FROM frame ORDER BY from_ms")
            for number, size in oldest:
                chosen.append((number,))
                freed += size
                if freed >= at_least_bytes or len(chosen) >= _FRAMES_AT_ONCE:
                    break
            oldest.close()
            if chosen:
                connection.exec_driver_sql("DELETE FROM frame WHERE id = ?", chosen)
                return freed
            return self._delete_oldest_hours(connection) or self._delete_oldest_rows(connection)

    def _delete_oldest_hours(self, connection: Connection) -> int:
        return _HOURLY_BYTES * connection.exec_driver_sql(_DELETE_HOURS, (_FOREVER_MS,)).rowcount

    def _delete_oldest_rows(self, connection: Connection) -> int:
        count, size = connection.exec_driver_sql(
            "SELECT count(*), coalesce(sum(length(vals)), 0) FROM (SELECT vals FROM hot ORDER BY id LIMIT ?)",
            (_SLICE_ROWS,),
        ).one()
        if count:
            connection.exec_driver_sql(
                "DELETE FROM hot WHERE id IN (SELECT id FROM hot ORDER BY id LIMIT ?)", (_SLICE_ROWS,)
            )
        return int(size)

    def forget_unused(self) -> int:
        """Delete layouts that nothing uses any more, and series that were only in those; says how many."""
        with self._database.writing("forget what is gone") as connection:
            connection.exec_driver_sql(
                "DELETE FROM run WHERE first_id < (SELECT max(first_id) FROM run"
                " WHERE first_id <= (SELECT min(id) FROM hot))"
            )
            gone = connection.exec_driver_sql(
                "DELETE FROM layout WHERE id NOT IN (SELECT layout FROM hot)"
                " AND id NOT IN (SELECT layout FROM frame)"
            ).rowcount
            if gone:
                connection.exec_driver_sql(
                    "DELETE FROM layout_series WHERE layout NOT IN (SELECT id FROM layout)"
                )
                gone += connection.exec_driver_sql(
                    "DELETE FROM series WHERE id NOT IN (SELECT series FROM layout_series)"
                    " AND id NOT IN (SELECT series FROM hourly)"
                ).rowcount
        self._ids.clear()
        self._layouts.clear()
        return gone

    def used_bytes(self) -> int:
        """What the pages in use take; the file may be larger, and its WAL is beside it."""
        with self._database.reading("see how large the file is") as connection:
            pages, free = (
                int(connection.exec_driver_sql(f"PRAGMA {name}").scalar_one())
                for name in ("page_count", "freelist_count")
            )
        return (pages - free) * PAGE_BYTES

    def file_bytes(self) -> int:
        """What all pages take."""
        with self._database.reading("see how large the file is") as connection:
            return int(connection.exec_driver_sql("PRAGMA page_count").scalar_one()) * PAGE_BYTES

    def limit(self, file_bytes: int) -> None:
        """Let the file grow to this and no further: SQLite then says that it is full."""
        with self._database.reading("limit the size of the file") as connection:
            connection.exec_driver_sql(f"PRAGMA max_page_count = {max(1, file_bytes // PAGE_BYTES)}")

    # -- sending on ------------------------------------------------------------------------------

    def after(self, sent_id: int, limit: int) -> list[tuple[int, Scrape]]:
        """The next rows after an id, as scrapes without their gaps; at most `limit`."""
        with self._database.reading("read scrapes to send on") as connection:
            rows = connection.exec_driver_sql(
                "SELECT id, layout, at_ms, vals FROM hot WHERE id > ? ORDER BY id LIMIT ?", (sent_id, limit)
            ).all()
            return [(row[0], _scrape(self._layout(connection, row[1]), row[2], row[3])) for row in rows]

    def forwarders(self) -> dict[str, tuple[int, str]]:
        """By name: the id of the last row that was sent, and the state of delivery."""
        with self._database.reading("read what was sent on") as connection:
            rows = connection.exec_driver_sql("SELECT name, sent_id, record FROM forwarder").all()
        return {row[0]: (row[1], row[2]) for row in rows}

    def save_forwarder(self, name: str, sent_id: int, record: str) -> None:
        """Remember how far a receiver has come."""
        with self._database.writing("save what was sent on") as connection:
            connection.exec_driver_sql(
                "INSERT INTO forwarder VALUES (?, ?, ?) ON CONFLICT (name)"
                " DO UPDATE SET sent_id = excluded.sent_id, record = excluded.record",
                (name, sent_id, record),
            )

    def newest_id(self) -> int:
        """The id of the newest row."""
        return self._next_id - 1

    # -- layouts ---------------------------------------------------------------------------------

    def _layout(self, connection: Connection, number: int) -> Layout:
        layout = self._layouts.get(number)
        if layout is None:
            if len(self._layouts) > _MAX_KNOWN:
                self._layouts.clear()
            layout = self._layouts[number] = read_layout(connection, number)
        return layout


_SAVE_HOURLY: Final = """
INSERT INTO hourly (hour_ms, series, n, minimum, average, maximum, last) VALUES (?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (hour_ms, series) DO UPDATE SET
  average = (average * n + excluded.average * excluded.n) / (n + excluded.n), n = n + excluded.n,
  minimum = min(minimum, excluded.minimum), maximum = max(maximum, excluded.maximum), last = excluded.last
"""


def read_layout(connection: Connection, number: int) -> Layout:
    """The layout with this id."""
    target = connection.exec_driver_sql(
        "SELECT name FROM target JOIN layout ON layout.target = target.id WHERE layout.id = ?", (number,)
    ).scalar_one_or_none()
    if target is None:
        raise StoreError(
            f"rows are of layout {number}, which is not there; the file is damaged and set aside",
            kind="corrupt",
        )
    rows: Sequence[Any] = connection.exec_driver_sql(
        "SELECT labels FROM layout_series JOIN series ON series.id = layout_series.series"
        " WHERE layout = ? ORDER BY position",
        (number,),
    ).all()
    labels = tuple(labels_of(row[0]) for row in rows)
    return Layout(target, labels, {series: column for column, series in enumerate(labels)})


def _ids_of(connection: Connection, layout: Layout) -> tuple[int, int]:
    """The ids of its target and of the layout itself, made where there are none."""
    connection.exec_driver_sql(
        "INSERT INTO target (name) VALUES (?) ON CONFLICT DO NOTHING", (layout.target,)
    )
    found = connection.exec_driver_sql("SELECT id FROM target WHERE name = ?", (layout.target,))
    target = int(found.scalar_one())
    series = [_series_id(connection, labels) for labels in layout.labels]
    return target, _layout_of_series(connection, target, series)


def _series_id(connection: Connection, labels: Labels) -> int:
    text = labels_json(labels)
    connection.exec_driver_sql(
        "INSERT INTO series (labels, metric) VALUES (?, ?) ON CONFLICT DO NOTHING",
        (text, clean(labels.metric)),
    )
    found = connection.exec_driver_sql("SELECT id FROM series WHERE labels = ?", (text,))
    return int(found.scalar_one())


def _layout_of_series(connection: Connection, target: int, series: Sequence[int]) -> int:
    digest = hashlib.sha256(b",".join(b"%d" % number for number in series)).digest()[:16]
    key = (target, digest)
    number = connection.exec_driver_sql(
        "SELECT id FROM layout WHERE target = ? AND digest = ?", key
    ).scalar_one_or_none()
    if number is None:
        number = connection.exec_driver_sql(
            "INSERT INTO layout (target, digest, width) VALUES (?, ?, ?) RETURNING id", (*key, len(series))
        ).scalar_one()
        if series:  # a scrape may be empty
            connection.exec_driver_sql(
                "INSERT INTO layout_series VALUES (?, ?, ?)",
                [(number, position, one) for position, one in enumerate(series)],
            )
    return int(number)


def _rows_of(connection: Connection, ids: Sequence[int]) -> Iterator[tuple[int, int, str]]:
    """Layout, instant and text of these rows, in this order; few at a time, for they are long."""
    for first in range(0, len(ids), _ROWS_AT_ONCE):
        some = ids[first : first + _ROWS_AT_ONCE]
        found = connection.exec_driver_sql(
            f"SELECT id, layout, at_ms, vals FROM hot WHERE id IN ({','.join('?' * len(some))})", tuple(some)
        )
        rows = {row[0]: (row[1], row[2], row[3]) for row in found}
        yield from map(rows.__getitem__, some)


def readable(text: str, width: int) -> list[float] | None:
    """The values of a row of `hot`; None if it cannot be read. Sealing and `gpuwatch db check` tell of it."""
    try:
        row = rowtext.decode(text)
    except (ValueError, TypeError):
        return None
    return row if len(row) == width else None


def _scrape(layout: Layout, at_ms: int, text: str) -> Scrape:
    row = readable(text, len(layout.labels)) or []
    given = [
        (labels, value) for labels, value in zip(layout.labels, row, strict=False) if not is_absent(value)
    ]
    return Scrape(layout.target, at_ms, [one for one, _ in given], [value for _, value in given])
