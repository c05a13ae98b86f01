"""The view of other processes: reads what the daemon saved and leaves wishes; never writes anything else."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from gpuwatch.store import database, migrations
from gpuwatch.store.latest import latest
from gpuwatch.store.metrics import NEWEST_MS
from gpuwatch.store.metrics_schema import METRICS_DB, METRICS_STEPS
from gpuwatch.store.migrations import STATE_STEPS
from gpuwatch.store.rows import Rows
from gpuwatch.store.state import STATE_DB, postgresql_module
from gpuwatch.store.writing import Changes, write_changes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from gpuwatch.records import Labels
    from gpuwatch.store.database import Database
    from gpuwatch.store.history import History
    from gpuwatch.store.writing import Audit


class ReadStore(Rows):
    """The rows as they stand, read-only. Every method is a snapshot of its own."""

    def __init__(self, state: Database, metrics: Database | None) -> None:
        """`metrics` is None where there is no such file yet."""
        super().__init__(state)
        self._metrics = metrics

    def close(self) -> None:
        """Close both files; twice is once."""
        super().close()
        if self._metrics is not None:
            self._metrics.close()

    def latest(self, now_ms: int, lookback_ms: int) -> dict[Labels, float]:
        """The newest value in (now_ms - lookback_ms, now_ms] of every series that has not ended."""
        if self._metrics is None:
            return {}
        with self._metrics.reading("read the latest samples") as connection:
            return latest(connection, now_ms, lookback_ms)

    def last_tick_ms(self) -> int | None:
        """When the newest scrape was; None before the first."""
        if self._metrics is None:
            return None
        with self._metrics.reading("find the newest scrape") as connection:
            at_ms: int | None = connection.exec_driver_sql(NEWEST_MS).scalar_one_or_none()
        return at_ms


def open_read_only(folder: Path, *, url: str | None = None, host: str = "") -> ReadStore:
    """The state in a folder, or at a PostgreSQL URL; works with and without a running daemon.

    StoreError: there is none, it is not ours, or of another version.
    """
    opened = postgresql_module().read(url, host) if url else database.read(folder / STATE_DB)
    try:
        migrations.check(opened, STATE_STEPS)
        metrics = _open_metrics(folder) if (folder / METRICS_DB).exists() else None
    except BaseException:
        opened.close()
        raise
    return ReadStore(opened, metrics)


def _open_metrics(folder: Path) -> Database:
    opened = database.read(folder / METRICS_DB)
    try:
        migrations.check(opened, METRICS_STEPS)
    except BaseException:
        opened.close()
        raise
    return opened


@contextmanager
def open_history(folder: Path) -> Iterator[History]:
    """The samples of any age in a folder, with and without a running daemon; loads numpy. StoreError."""
    from gpuwatch.store.history import History  # noqa: PLC0415 (the daemon imports this module too)

    opened = _open_metrics(folder)
    try:
        yield History(opened)
    finally:
        opened.close()


def leave_wish(
    folder: Path,
    settings: Mapping[str, str | None],
    *,
    audit: Audit | None = None,
    url: str | None = None,
    host: str = "",
) -> None:
    """Change settings, and say who did, in one short transaction beside the daemon's; None deletes.

    StoreError: nothing was changed.
    """
    opened = postgresql_module().wish(url, host) if url else database.wish(folder / STATE_DB)
    try:
        migrations.check(opened, STATE_STEPS)
        with opened.writing("leave a wish") as connection:
            write_changes(connection, Changes(settings=settings, audit=[] if audit is None else [audit]))
    finally:
        opened.close()
