"""Sends samples on to Prometheus, VictoriaMetrics or Mimir by remote write 1.0; keeps no samples of its own.

The rows of the database are the spool. A forwarder reads those after its cursor and sends them:

    if is_due(state, now_ms) and (batch := take(state, rows)):
        try:
            writer.send([scrape for _, scrape in batch])
            state = after_success(state, batch)
        except RemoteWriteError as error:
            state = after_failure(state, error, batch, now_ms=now_ms, jitter=random())
"""

from __future__ import annotations

from gpuwatch.remote_write.delivery import (
    MAX_SAMPLES,
    RemoteWriteError,
    WriterState,
    after_failure,
    after_success,
    after_waiting,
    is_due,
    state_json,
    take,
    writer_state,
)
from gpuwatch.remote_write.writer import RemoteWriter, of_settings

__all__ = [
    "MAX_SAMPLES",
    "RemoteWriteError",
    "RemoteWriter",
    "WriterState",
    "after_failure",
    "after_success",
    "after_waiting",
    "is_due",
    "of_settings",
    "state_json",
    "take",
    "writer_state",
]
