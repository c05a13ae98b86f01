"""Brings to the disk what the daemon holds in memory, and goes on holding it while there is no disk.

Rule 1: nobody waits for it but who asks `is_saved`, and that only so long.
Rule 2: changes of state are written in their order, and none is given up; if they become too many, all
that is in memory is written instead. Scrapes beyond 16 MiB are given up, the oldest first, and counted.
Rule 3: a disk that has not answered for ten seconds counts as one that fails.
Rule 4: the settings on disk, where people leave their wishes, are read back with every write, and where
nothing can be written too. What is on its way to the disk counts more.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import TYPE_CHECKING, Final

from gpuwatch.errors import StoreError
from gpuwatch.store.metrics_schema import METRICS_DB
from gpuwatch.store.state import STATE_DB
from gpuwatch.store.writing import Changes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gpuwatch.store.database import Database
    from gpuwatch.store.disk import Disk
    from gpuwatch.store.metrics import Row

log = logging.getLogger(__name__)

_MAX_HELD_BYTES: Final = 16 * 2**20  # of scrapes as text: twenty minutes of an eight-GPU host
_ROWS_AT_ONCE: Final = 2_000
_MAX_CHANGES: Final = 2_000
_SLOW_MS: Final = 10_000
_CLOSE_S: Final = 10


class Writer:
    """The queue to the disk. Several threads may put; one, or the caller of `flush`, writes."""

    def __init__(
        self, disk: Disk, mirror: Database, take_settings: Callable[[Mapping[str, str]], None]
    ) -> None:
        """`take_settings` gets all settings as they are on disk, or will be."""
        self.disk = disk
        self.lock = threading.Lock()
        self.faults: dict[str, str] = {}
        self.dropped_scrapes = 0
        self._mirror = mirror
        self._take_settings = take_settings
        self._flushing = threading.Lock()
        self._changes: list[Changes] = []
        self._rows: deque[Row] = deque()
        self._held_bytes = 0
        self._now_ms = 0
        self._wake = threading.Event()
        self._saved = threading.Event()
        self._saved.set()
        self._asked_ms = 0
        self._thread: threading.Thread | None = None
        self._closing = False

    def start(self) -> None:
        """Write in a thread of its own from now on."""
        self._thread = threading.Thread(target=self._work, name="store", daemon=True)
        self._thread.start()

    def put_row(self, row: Row) -> None:
        """Take a scrape; it is written with the next changes or tick."""
        with self.lock:
            self._rows.append(row)
            self._held_bytes += len(row.text)
            while self._held_bytes > _MAX_HELD_BYTES:
                self._held_bytes -= len(self._rows.popleft().text)
                self.dropped_scrapes += 1

    def put(self, changes: Changes | None) -> None:
        """Take changes, if there are any; hold `lock` from when they were made to here."""
        if changes is not None:
            self._changes.append(changes)
            if len(self._changes) > _MAX_CHANGES:
                settings = {name: value for one in self._changes for name, value in one.settings.items()}
                self._changes = [Changes(settings=settings)]
                self.disk.must_refill = True
            self._saved.clear()

    def write(self, now_ms: int) -> None:
        """Have all that is held written, here or in the thread that `start` began."""
        self._now_ms = now_ms
        if self._thread is None:
            self.flush()
            return
        if not self._flushing.locked():
            self._asked_ms = now_ms
        elif now_ms - self._asked_ms > _SLOW_MS:
            slow = (
                f"the disk of {self.disk.folder} has not answered for {(now_ms - self._asked_ms) // 1000} s"
            )
            self.faults[STATE_DB] = (
                f"{slow}; gpuwatch goes on in memory; to cure it, look at the disk (dmesg)"
            )
        self._wake.set()

    def is_saved(self, within_ms: int) -> bool:
        """Whether all changes are on disk within this time, or there is no disk to wait for."""
        return bool(self.faults.get(STATE_DB)) or self._saved.wait(within_ms / 1000)

    def flush(self) -> None:
        """Write all that is held; what cannot be written stays and is said in `faults`."""
        with self._flushing:
            self._try(STATE_DB, self._write_changes)
            self._try(METRICS_DB, self._write_rows)
            for note in self.disk.notes:
                log.warning("%s", note)
            self.disk.notes.clear()

    def close(self) -> bool:
        """Write what is held, as far as that can be, and close the files; False where the disk is silent."""
        self._closing = True
        if self._thread is not None:
            self._wake.set()
            self._thread.join(_CLOSE_S)
            if self._thread.is_alive():
                log.warning("the disk of %s does not answer; what is not saved is lost", self.disk.folder)
                return False
        self.flush()
        self.disk.close()
        return True

    def _work(self) -> None:
        while not self._closing:
            self._wake.wait()
            self._wake.clear()
            self.flush()

    def _try(self, name: str, write: Callable[[], None]) -> None:
        try:
            write()
        except StoreError as error:
            # That it is not open yet says less than why it is not.
            if error.kind != "gone" or name not in self.faults:
                self.faults[name] = str(error)
        except Exception as error:  # a bug must not end the thread, and with it all saving
            fault = f"internal error: {error!r}; to cure it, report this as a bug of gpuwatch"
            if self.faults.get(name) != fault:
                log.exception("%s: internal error", name)
            self.faults[name] = fault
        else:
            self.faults.pop(name, None)

    def _write_changes(self) -> None:
        with self.lock:
            taken, self._changes = self._changes, []
        try:
            settings = self.disk.save_state(taken, self._mirror, self._now_ms)
        except BaseException:
            wishes = self.disk.wishes()
            with self.lock:
                self._changes = taken + self._changes
                self._hear(wishes)
            raise
        with self.lock:
            self._hear(settings)
            if not self._changes:
                self._saved.set()

    def _hear(self, settings: Mapping[str, str] | None) -> None:
        if settings is None:
            return
        heard: dict[str, str | None] = dict(settings)
        for changes in self._changes:
            heard |= changes.settings
        self._take_settings({name: value for name, value in heard.items() if value is not None})

    def _write_rows(self) -> None:
        while True:
            with self.lock:
                taken = [self._rows[i] for i in range(min(len(self._rows), _ROWS_AT_ONCE))]
            if not taken:
                return
            self.disk.save_rows(taken, self._now_ms)
            with self.lock:
                for row in taken:
                    # The oldest may have been given up meanwhile.
                    if self._rows and self._rows[0] is row:
                        self._rows.popleft()
                        self._held_bytes -= len(row.text)
