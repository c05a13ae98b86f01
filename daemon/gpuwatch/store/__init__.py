"""SQLite: what was measured, what happened and what people wish, as rows; the only SQL."""

from gpuwatch.store.reading import ReadStore, leave_wish, open_read_only
from gpuwatch.store.store import Store
from gpuwatch.store.writing import Changes

__all__ = ["Changes", "ReadStore", "Store", "leave_wish", "open_read_only"]
