"""What was measured, what happened and what people wish: at hand in memory, kept on disk; the only SQL."""

from gpuwatch.store.disk import Disk, state_url
from gpuwatch.store.metrics_schema import METRICS_DB
from gpuwatch.store.reading import ReadStore, leave_wish, open_history, open_read_only
from gpuwatch.store.state import STATE_DB
from gpuwatch.store.store import Store
from gpuwatch.store.writing import Audit, Changes

__all__ = [
    "METRICS_DB",
    "STATE_DB",
    "Audit",
    "Changes",
    "Disk",
    "ReadStore",
    "Store",
    "leave_wish",
    "open_history",
    "open_read_only",
    "state_url",
]
