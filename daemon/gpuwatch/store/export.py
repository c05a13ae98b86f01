"""Samples as CSV or Parquet, an hour at a time so that memory is bounded; chooses nothing."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING, Final, Protocol, TextIO

import numpy as np

from gpuwatch.errors import StoreError
from gpuwatch.frames import rowtext
from gpuwatch.frames.rowtext import HOUR_MS
from gpuwatch.store.codec import labels_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from gpuwatch.promql import Matcher
    from gpuwatch.store.history import History, Track

_COLUMNS: Final = ("time", "at_ms", "metric", "labels", "value")


class Sheet(Protocol):
    """Where samples are written to."""

    def write(self, tracks: Iterable[Track]) -> int:
        """Write series after series; says how many samples."""
        ...

    def close(self) -> None:
        """Finish the file."""
        ...


def export(history: History, matchers: Sequence[Matcher], span_ms: tuple[int, int], sheet: Sheet) -> int:
    """Write the samples in (after_ms, upto_ms] of all series that match; says how many."""
    written = 0
    try:
        for after_ms, upto_ms in _hours(*span_ms):
            written += sheet.write(history.tracks(matchers, after_ms, upto_ms))
    finally:
        sheet.close()
    return written


def _hours(after_ms: int, upto_ms: int) -> Iterator[tuple[int, int]]:
    """The span cut at full hours, where frames end."""
    while after_ms < upto_ms:
        end_ms = min(upto_ms, (after_ms + 1) // HOUR_MS * HOUR_MS + HOUR_MS - 1)
        yield after_ms, end_ms
        after_ms = end_ms


class CsvSheet:
    """Lines of time (UTC), at_ms, metric, labels as JSON, value; a staleness marker is `stale`."""

    def __init__(self, out: TextIO, *, closes: bool = False) -> None:
        """`closes`: the stream is closed at the end; else it is only flushed."""
        self._out, self._closes = out, closes
        self._writer = csv.writer(out)
        self._writer.writerow(_COLUMNS)

    def write(self, tracks: Iterable[Track]) -> int:
        """Write series after series; says how many samples."""
        written = 0
        for track in tracks:
            metric, labels = track.labels.metric, labels_json(track.labels.without("__name__"))
            times = np.datetime_as_string(track.at_ms.astype("datetime64[ms]"), unit="ms", timezone="UTC")
            instants, values = track.at_ms.tolist(), [rowtext.cell(value) for value in track.values.tolist()]
            self._writer.writerows(
                (time, at_ms, metric, labels, value)
                for time, at_ms, value in zip(times.tolist(), instants, values, strict=True)
            )
            written += len(instants)
        return written

    def close(self) -> None:
        """Finish the file."""
        self._out.flush()
        if self._closes:
            self._out.close()


class ParquetSheet:
    """Columns time (ms, UTC), metric, labels as JSON, value; a row group an hour; needs pyarrow."""

    def __init__(self, path: Path) -> None:
        """StoreError if pyarrow is not there."""
        try:
            import pyarrow as pa  # noqa: PLC0415
            import pyarrow.parquet as pq  # noqa: PLC0415
        except ImportError as error:
            message = f"cannot write {path}: {error}; to cure it, pip install 'gpuwatch[parquet]'"
            raise StoreError(message) from error
        names = pa.dictionary(pa.int32(), pa.string())
        time = pa.timestamp("ms", tz="UTC")
        self._schema = pa.schema(
            [("time", time), ("metric", names), ("labels", names), ("value", pa.float64())]
        )
        self._pa = pa
        self._file = pq.ParquetWriter(str(path), self._schema, compression="zstd")

    def write(self, tracks: Iterable[Track]) -> int:
        """Write series after series; says how many samples."""
        found = list(tracks)
        if not found:
            return 0
        which = np.repeat(np.arange(len(found), dtype=np.int32), [len(track.at_ms) for track in found])
        texts = (
            [track.labels.metric for track in found],
            [labels_json(track.labels.without("__name__")) for track in found],
        )
        columns = [
            self._pa.array(np.concatenate([track.at_ms for track in found]), self._schema.field("time").type),
            *(self._pa.DictionaryArray.from_arrays(which, text) for text in texts),
            self._pa.array(np.concatenate([track.values for track in found]), from_pandas=False),
        ]
        self._file.write_table(self._pa.Table.from_arrays(columns, schema=self._schema))
        return len(which)

    def close(self) -> None:
        """Finish the file."""
        self._file.close()
