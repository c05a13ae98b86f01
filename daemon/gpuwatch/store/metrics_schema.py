"""The tables and views of metrics.db, and the steps by which a file comes to have them; runs no query.

A scrape is a row of `hot`; hours that are over are frames. What is damaged or too much here costs
history only, never state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from sqlalchemy import Connection

METRICS_DB: Final = "metrics.db"

# Instants as text, for the views.
_UTC: Final = "strftime('%Y-%m-%d %H:%M:%S UTC', {} / 1000, 'unixepoch')".format

_TABLES: Final = """
-- sealed_id: the rows of `hot` up to this id are in frames, and wait to be deleted.
CREATE TABLE target (
  id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, sealed_id INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE series (id INTEGER PRIMARY KEY, labels TEXT NOT NULL UNIQUE, metric TEXT NOT NULL);
CREATE INDEX series_metric ON series (metric);

-- The series of a target in the order of its columns; made once, never changed.
CREATE TABLE layout (
  id INTEGER PRIMARY KEY, target INTEGER NOT NULL, width INTEGER NOT NULL, digest BLOB NOT NULL,
  UNIQUE (target, digest)
);
CREATE TABLE layout_series (
  layout INTEGER NOT NULL, position INTEGER NOT NULL, series INTEGER NOT NULL,
  PRIMARY KEY (layout, position)
) WITHOUT ROWID;
CREATE INDEX layout_of_series ON layout_series (series, layout);

-- A row a scrape, as a JSON array in the layout's order; null: no sample. Ids only ever rise.
CREATE TABLE hot (
  id INTEGER PRIMARY KEY, at_ms INTEGER NOT NULL, target INTEGER NOT NULL, layout INTEGER NOT NULL,
  vals TEXT NOT NULL
);

-- The first row of each run of the daemon: within one, time only goes forward, so rows are found by it.
CREATE TABLE run (first_id INTEGER PRIMARY KEY);

-- An hour of a target: columns compressed one by one (frames/frame.py). Not unique: a clock may step back.
CREATE TABLE frame (
  id INTEGER PRIMARY KEY, target INTEGER NOT NULL, from_ms INTEGER NOT NULL, to_ms INTEGER NOT NULL,
  layout INTEGER NOT NULL, n INTEGER NOT NULL, data BLOB NOT NULL
);
CREATE INDEX frame_of_target ON frame (target, from_ms);
CREATE INDEX frame_by_time ON frame (from_ms);
CREATE INDEX frame_of_layout ON frame (layout);

-- By hour first: an hour is appended at one end, and retention takes from the other.
CREATE TABLE hourly (
  hour_ms INTEGER NOT NULL, series INTEGER NOT NULL, n INTEGER NOT NULL,
  minimum REAL, average REAL, maximum REAL, last REAL,
  PRIMARY KEY (hour_ms, series)
) WITHOUT ROWID;

-- What goes out by remote write: the last row sent, and how delivery stands.
CREATE TABLE forwarder (name TEXT PRIMARY KEY, sent_id INTEGER NOT NULL, record TEXT NOT NULL)
"""

_VIEWS: Final = f"""
CREATE VIEW v_hot AS
SELECT hot.at_ms, {_UTC("hot.at_ms")} AS at, target.name AS target, series.metric, series.labels,
  json_extract(hot.vals, '$[' || layout_series.position || ']') AS value
FROM hot JOIN target ON target.id = hot.target AND hot.id > target.sealed_id
JOIN layout_series ON layout_series.layout = hot.layout
JOIN series ON series.id = layout_series.series
WHERE value IS NOT NULL;

-- The newest scrape of each target, if it came within five minutes of the newest of all.
CREATE VIEW v_last AS
SELECT series.metric, series.labels,
  json_extract(hot.vals, '$[' || layout_series.position || ']') AS value,
  {_UTC("hot.at_ms")} AS at, target.name AS target
FROM (
  SELECT (SELECT max(id) FROM hot WHERE hot.target = target.id
    AND id > (SELECT max(id) FROM hot) - 300 * (SELECT count(*) FROM target)) AS id FROM target
) AS newest
JOIN hot ON hot.id = newest.id JOIN target ON target.id = hot.target
JOIN layout_series ON layout_series.layout = hot.layout
JOIN series ON series.id = layout_series.series
WHERE value IS NOT NULL AND value IS NOT 'stale' AND hot.at_ms > (SELECT max(at_ms) FROM hot) - 300000
ORDER BY series.metric, series.labels;

CREATE VIEW v_hourly AS
SELECT {_UTC("hour_ms")} AS hour, series.metric, series.labels, n, minimum, average, maximum, last
FROM hourly JOIN series ON series.id = hourly.series;

CREATE VIEW v_frames AS
SELECT target.name AS target, {_UTC("from_ms")} AS first, {_UTC("to_ms")} AS last,
  n AS scrapes, layout.width AS series, length(data) AS bytes
FROM frame JOIN target ON target.id = frame.target JOIN layout ON layout.id = frame.layout
ORDER BY from_ms, target.name
"""


def first_metrics_schema(connection: Connection) -> None:
    """Version 1: hot rows, frames, hourly rollups, and views for people."""
    # Not executescript, which would commit first.
    for statement in (_TABLES + ";" + _VIEWS).split(";\n"):
        connection.exec_driver_sql(statement)


METRICS_STEPS: Final = (first_metrics_schema,)
