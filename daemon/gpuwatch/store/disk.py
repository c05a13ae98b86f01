"""Both files on disk, and what is done when the disk is full, gone or damaged; decides about nothing else.

Whoever asks learns whether it was saved, by StoreError, and keeps it until then.

Rule 1: on a full disk room is made of what is ours alone: first the ballast, then the oldest frames.
Metrics.db is then a ring of the size it has; state.db has the ballast's room.
Rule 2: a damaged file is set aside and a new one begun. State is in memory and is written anew; samples
are lost with their file.
Rule 3: what cannot be opened is tried again every 15 s. A file that cannot be reached is let go of, so that
its filesystem can be unmounted, mended and mounted again; what is there then is opened.
"""

from __future__ import annotations

import os
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, TypeVar

from gpuwatch.errors import StoreError
from gpuwatch.store import database, quarantine
from gpuwatch.store.ballast import Ballast
from gpuwatch.store.faults import told
from gpuwatch.store.metrics import Metrics
from gpuwatch.store.metrics_schema import METRICS_DB
from gpuwatch.store.state import STATE_DB, is_damage, open_state

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from gpuwatch.config import StoreSettings
    from gpuwatch.store.database import Database
    from gpuwatch.store.metrics import Row
    from gpuwatch.store.state import State
    from gpuwatch.store.writing import Changes

T = TypeVar("T")
_File = tuple[int, int] | None  # which it is, whatever its name

_RETRY_MS: Final = 15_000
_MAINTAIN_MS: Final = 10_000
_ROOM_BYTES: Final = 8 * 2**20
_FATAL: Final = frozenset({"locked", "newer"})
_UNREACHABLE: Final = frozenset({"gone", "read_only"})
_BUSY_MS: Final = 2_000


class Disk:
    """The one owner of a state folder. Several threads may use it, one at a time."""

    def __init__(self, folder: Path, settings: StoreSettings, host: str, now_ms: int) -> None:
        """Take the folder and open both files.

        Raises:
            StoreError: of kind `locked` (another gpuwatch has it), `newer`, or any other where nothing
                was ever saved. A file that is there and cannot be written is no reason to stay down.

        """
        self.folder = folder
        self.settings = settings
        self.host = host
        self.notes: list[str] = []
        self.words_lost = False
        self.must_refill = False
        self.must_load = True
        self.state: State | None = None
        self.metrics: Metrics | None = None
        self._lock = threading.RLock()
        self._tried_ms: dict[str, int] = {}
        self._maintained_ms = 0
        self._ballast = Ballast(folder)
        self._state_is_here = False
        self._metrics_file: _File = None
        self._metrics_path = os.fspath(folder / METRICS_DB)
        self._lock_file: _File = None
        self._ownership: database.Ownership | None = None
        self._own()
        try:
            self._open_first(now_ms)
        except BaseException:
            self.close()
            raise

    def _open_first(self, now_ms: int) -> None:
        known = self.settings.state_url or self.settings.state_url_file or any(self.folder.glob("*.db"))
        for opens in (self._open_state, self._open_metrics):
            try:
                opens(now_ms)
            except StoreError as error:
                if error.kind in _FATAL or not known:
                    raise
                self.notes.append(str(error))

    def close(self) -> None:
        """Close what is open and let go of the folder."""
        with self._lock:
            for opened in (self.state, self.metrics):
                if opened is not None:
                    opened.close()
            self.state = self.metrics = None
            self._disown()

    # -- opening ---------------------------------------------------------------------------------

    def _own(self) -> None:
        """Be the only gpuwatch in the folder, which may not be the one that it was."""
        path = os.fspath(self.folder / database.LOCK)
        if self._ownership is not None and _file_at(path) == self._lock_file:
            return
        self._disown()
        self._ownership = database.Ownership(self.folder)
        self._lock_file = _file_at(path)

    @contextmanager
    def _owning(self) -> Iterator[None]:
        """Own the folder, and for as long as a file in it is open."""
        self._own()
        try:
            yield
        finally:
            self._let_go()

    def _let_go(self) -> None:
        """Have nothing open in the folder, if neither file is."""
        if self.metrics is None and (self.state is None or not self._state_is_here):
            self._disown()

    def _disown(self) -> None:
        ownership, self._ownership = self._ownership, None
        if ownership is not None:
            ownership.close()

    def _open_state(self, now_ms: int) -> State:
        url = state_url(self.settings)
        self._state_is_here = url is None
        with self._owning():
            opened = open_state(self.folder, url=url, host=self.host, now_ms=now_ms, busy_ms=_BUSY_MS)
            self.state = opened.state
        self.notes += opened.notes
        self.words_lost = self.words_lost or opened.words_lost
        return opened.state

    def _open_metrics(self, now_ms: int) -> Metrics:
        path = self.folder / METRICS_DB
        with self._owning():
            try:
                self.metrics = _opened(path)
            except StoreError as error:
                if not is_damage(error, path):
                    raise
                self._set_aside(path, error, now_ms)
                self.metrics = _opened(path)
        self._metrics_file = _file_at(self._metrics_path)
        self._limit(self.metrics)
        return self.metrics

    def _set_aside(self, path: Path, error: StoreError, now_ms: int) -> None:
        aside = quarantine.set_aside(path, now_ms)
        kept = f"it is kept as {aside}" if aside else "it is gone"
        self.notes.append(f"{path} is damaged ({error}); {kept}, and a new one is begun")

    def _again(self, name: str, now_ms: int) -> None:
        """Raise unless it is time to try a file again."""
        tried_ms = self._tried_ms.get(name)
        if tried_ms is not None and 0 <= now_ms - tried_ms < _RETRY_MS:
            raise StoreError(
                f"{name} is not open; it is tried again every {_RETRY_MS // 1000} s", kind="gone"
            )
        self._tried_ms[name] = now_ms

    # -- state -----------------------------------------------------------------------------------

    def save_state(self, changes: Sequence[Changes], mirror: Database, now_ms: int) -> dict[str, str] | None:
        """Write changes and give the settings, if people may have changed them; StoreError."""
        with self._lock:
            state = self.state
            if state is None:
                self._again(STATE_DB, now_ms)
                state = self._open_state(now_ms)
                self.must_refill = True
            try:
                return self._write(state, changes, mirror)
            except StoreError as error:
                if error.kind == "full" and self._ballast.drop():
                    return self._write(state, changes, mirror)
                if error.kind == "corrupt":
                    self._begin_state_anew(state, error, now_ms)
                if error.kind in _UNREACHABLE and self._state_is_here:
                    state.close()
                    self.state = None
                    self._let_go()
                raise

    def _write(self, state: State, changes: Sequence[Changes], mirror: Database) -> dict[str, str] | None:
        if self.must_load:  # it could not be read at the start: what was before is known from now on
            state.load(mirror)
            self.must_load, self.must_refill = False, True
        if self.must_refill:
            state.refill(mirror, keep_words=not self.words_lost)
            self.must_refill = False
        if changes:
            state.write(changes)
        return state.changed_settings()

    def wishes(self) -> dict[str, str] | None:
        """The settings, if people may have changed them and they can be read; where nothing can be saved."""
        with self._lock:
            if self.state is None or self.must_load:
                return None
            try:
                settings = self.state.changed_settings()
            except StoreError:  # what was to be written has said so already
                return None
            # A new file gets those that there were.
            return None if self.must_refill and (self.words_lost or not settings) else settings

    def _begin_state_anew(self, state: State, error: StoreError, now_ms: int) -> None:
        self.notes.append(f"state.db is damaged: {error}")
        state.close()
        self.state = None
        self.must_refill = True
        self._open_state(now_ms)

    # -- metrics ---------------------------------------------------------------------------------

    def save_rows(self, rows: Sequence[Row], now_ms: int) -> None:
        """Write scrapes in one transaction; StoreError: none was written."""
        self.with_metrics(lambda metrics: metrics.write(rows), now_ms)

    def with_metrics(self, use: Callable[[Metrics], T], now_ms: int) -> T:
        """Do one thing with metrics.db, once more if room had to be made for it; StoreError."""
        with self._lock:
            metrics = self.metrics
            if metrics is None:
                self._again(METRICS_DB, now_ms)
                metrics = self._open_metrics(now_ms)
            with self._noticing_damage(metrics, now_ms):
                self._must_be_there()
                self._maintain(metrics, now_ms)
                try:
                    return use(metrics)
                except StoreError as error:
                    if error.kind != "full":
                        raise
                self._ballast.drop()
                metrics.delete_oldest(_ROOM_BYTES)
                return use(metrics)

    @contextmanager
    def _noticing_damage(self, metrics: Metrics, now_ms: int) -> Iterator[None]:
        try:
            yield
        except StoreError as error:
            if error.kind == "corrupt":
                metrics.close()
                self.metrics = None
                self._set_aside(self.folder / METRICS_DB, error, now_ms)
                self._open_metrics(now_ms)
            if error.kind in _UNREACHABLE:
                metrics.close()
                self.metrics = None
                self._let_go()
            raise

    def _must_be_there(self) -> None:
        """SQLite goes on writing to a file that was moved or deleted, and nobody would see it again."""
        if _file_at(self._metrics_path) != self._metrics_file:
            raise StoreError(
                f"cannot use {self._metrics_path} any more: it was moved, deleted or replaced;"
                " to cure it, leave the files of a running gpuwatch alone. What is there now is opened",
                kind="gone",
            )

    def _maintain(self, metrics: Metrics, now_ms: int) -> None:
        """Every ten seconds: how far the file may grow, and whether the ballast can be had again."""
        if 0 <= now_ms - self._maintained_ms < _MAINTAIN_MS:
            return
        self._maintained_ms = now_ms
        self._ballast.hold(self.settings.min_free)
        self._limit(metrics)

    def _limit(self, metrics: Metrics) -> None:
        there = metrics.file_bytes()
        may_take = max(0, self.free_bytes() - self.settings.min_free)
        metrics.limit(min(self.settings.max_size, there + may_take))

    def free_bytes(self) -> int:
        """What the filesystem of the folder has left for us; StoreError."""
        with told(self.folder, "see what is free"):
            seen = os.statvfs(self.folder)
        return seen.f_bavail * seen.f_frsize


def _file_at(path: str) -> _File:
    try:
        seen = os.stat(path)  # noqa: PTH116 (each second: half the time of a Path)
    except OSError:
        return None
    return seen.st_dev, seen.st_ino


def _opened(path: Path) -> Metrics:
    opened = database.own(path, _BUSY_MS)
    try:
        return Metrics(opened)
    except BaseException:
        opened.close()  # or it would one day take the WAL of the file that comes in this one's place
        raise


def state_url(settings: StoreSettings) -> str | None:
    """Where state is kept instead of state.db; StoreError if the file that says so cannot be read."""
    if settings.state_url_file is None:
        return settings.state_url or None
    try:
        return settings.state_url_file.read_text().strip()
    except OSError as error:
        message = f"cannot read {settings.state_url_file}: {error.strerror}; to cure it, let gpuwatch read it"
        raise StoreError(message) from error
