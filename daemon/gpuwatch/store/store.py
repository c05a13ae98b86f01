"""The daemon's memory: recent samples and present state at hand, and both on disk as soon as there is one.

Rule 1: what the daemon asks is answered from memory. Nothing that judges, decides, acts or tells ever
waits for a disk or fails with one; it can ask whether what it intends is saved.
Rule 2: state in memory is the same tables as on disk, in a SQLite of its own, so both are read alike.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Final

from gpuwatch.errors import StoreError
from gpuwatch.frames import rowtext
from gpuwatch.frames.rowtext import HOUR_MS
from gpuwatch.store import database, migrations, sealer, writing
from gpuwatch.store.layouts import Shape
from gpuwatch.store.metrics import Metrics, Row
from gpuwatch.store.metrics_schema import METRICS_DB
from gpuwatch.store.migrations import STATE_STEPS
from gpuwatch.store.recent import Recent
from gpuwatch.store.rows import Rows
from gpuwatch.store.sieve import Sieve
from gpuwatch.store.state import STATE_DB
from gpuwatch.store.writer import Writer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from gpuwatch.config import StoreSettings
    from gpuwatch.frames.sealed import Sealed
    from gpuwatch.promql import Matcher, Series
    from gpuwatch.records import Labels, Scrape
    from gpuwatch.store.disk import Disk

_HISTORY_MS: Final = 30 * 24 * HOUR_MS
_STATE_HISTORY_MS: Final = 365 * 24 * HOUR_MS
_ROOM_BYTES: Final = 8 * 2**20
_MANY: Final = 1_000  # slices of work in one call; asked again, it goes on
_NOTHING: Final = writing.Changes()
_FOREVER_MS: Final = 1 << 53


class Store(Rows):
    """The one writer. Sources may append from several threads; everything else is one thread's."""

    def __init__(self, window_ms: int = HOUR_MS, disk: Disk | None = None) -> None:
        """In memory; on `disk` too, if there is one. `window_ms`: how much of every series stays at hand."""
        mirror = database.own(None, 0)
        migrations.migrate(mirror, STATE_STEPS)
        super().__init__(mirror)
        self.last_tick: int | None = None
        self._held: dict[str, str] = {}
        self._window_ms = window_ms
        self._recent = Recent(window_ms)
        self._shapes: dict[str, Shape] = {}
        self._sieve = Sieve()
        self._writer = None if disk is None else Writer(disk, mirror, self._take_settings)
        if disk is not None:
            self._load(disk, mirror)

    def _load(self, disk: Disk, mirror: database.Database) -> None:
        if disk.state is None:
            self._held = {"paused_until_ms": str(_FOREVER_MS)}
        else:
            disk.state.load(mirror)
            disk.must_load = False
        if disk.metrics is not None:
            self.last_tick = disk.metrics.newest_ms()

    def start(self) -> None:
        """Write in a thread from now on; without it `save` writes before it returns."""
        if self._writer is not None:
            self._writer.start()

    def close(self) -> None:
        """Write what is held and close the files; twice is once.

        Where the disk is silent all stays open: the thread that waits for it has the rows in hand.
        """
        if self._writer is not None and not self._writer.close():
            return
        self._writer = None
        super().close()

    # -- samples ---------------------------------------------------------------------------------

    def append(self, target: str, at_ms: int, labels: Sequence[Labels], values: Sequence[float]) -> None:
        """Take a scrape of a target: `select` shows it at once, the next save writes it.

        One that is older than the target's newest is not taken; one of the same instant replaces it.
        Several threads may append, but no two of them to one target.
        """
        shape = self._shapes.get(target) or self._shapes.setdefault(target, Shape(target))
        row = shape.fit(at_ms, labels, values)
        if self._recent.append(shape.layout, at_ms, row) and self._writer is not None:
            self._writer.put_row(Row(shape.layout, at_ms, rowtext.encode(row)))

    def select(self, matchers: Sequence[Matcher], after_ms: int, upto_ms: int) -> list[Series]:
        """The samples in (after_ms, upto_ms] of all series that match, from memory; a `promql.Querier`."""
        return self._recent.select(matchers, after_ms, upto_ms)

    def silent_since(self, at_ms: int) -> list[Labels]:
        """The series that have not ended, and have no sample at `at_ms` or later, from memory."""
        return self._recent.silent_since(at_ms)

    def held_bytes(self) -> int:
        """What the samples in memory take."""
        return self._recent.bytes_held()

    def reload(self, now_ms: int) -> None:
        """Fill the memory with what was saved in (now_ms - window_ms, now_ms]; before any append."""
        if self._writer is None or self._writer.disk.metrics is None:
            return
        try:
            self._writer.disk.with_metrics(partial(self._take_recent, now_ms), now_ms)
        except StoreError as error:  # what was at hand is less than what still can be seen from now on
            self._writer.disk.notes.append(str(error))

    def _take_recent(self, now_ms: int, metrics: Metrics) -> None:
        for layout, at_ms, row in metrics.recent(now_ms - self._window_ms, now_ms):
            self._recent.append(layout, at_ms, row)

    # -- state -----------------------------------------------------------------------------------

    def save(self, changes: writing.Changes, tick_ms: int | None) -> None:
        """Change the rows in memory, whole or not at all, and have them and all scrapes written.

        `tick_ms` is None for what is no tick. A disk that fails raises nothing: `faults` says it.
        """
        if tick_ms is not None:
            self.last_tick = tick_ms
        is_news = changes != _NOTHING
        if self._writer is None:
            if is_news:
                self._change(changes)
            return
        if is_news:
            with self._writer.lock:
                self._change(changes)
                self._writer.put(self._sieve.news(changes))
        self._writer.write(tick_ms or self.last_tick or 0)

    def _change(self, changes: writing.Changes) -> None:
        with self._database.writing("save a tick") as connection:
            writing.write_changes(connection, changes)

    def is_saved(self, within_ms: int) -> bool:
        """Whether all changes are on disk within this time, or there is no disk that they could be on."""
        return self._writer is None or self._writer.is_saved(within_ms)

    @property
    def words_lost(self) -> bool:
        """Whether people's wishes went with a damaged file."""
        return self._writer is not None and self._writer.disk.words_lost

    def faults(self) -> Mapping[str, str]:
        """What is wrong with each file at present, by its name; empty text where all is well."""
        present = {} if self._writer is None else self._writer.faults
        return {name: present.get(name, "") for name in (STATE_DB, METRICS_DB)}

    @property
    def dropped_scrapes(self) -> int:
        """How many scrapes were given up because no disk took them."""
        return 0 if self._writer is None else self._writer.dropped_scrapes

    def settings(self) -> dict[str, str]:
        """As in `Rows`; while people's wishes cannot be read, remediation is paused."""
        return super().settings() | self._held

    def last_tick_ms(self) -> int | None:
        """When the newest tick was; None before the first."""
        return self.last_tick

    def _take_settings(self, settings: Mapping[str, str]) -> None:
        """Make the rows of `setting` what people left on disk."""
        known = super().settings()
        changed: dict[str, str | None] = dict.fromkeys(known.keys() - settings.keys())
        changed |= {name: value for name, value in settings.items() if known.get(name) != value}
        if changed:
            self._change(writing.Changes(settings=changed))
        self._held = {}

    # -- upkeep ----------------------------------------------------------------------------------

    def go_by(self, settings: StoreSettings, window_ms: int) -> None:
        """Go by other limits from now on; what was forgotten already does not come back."""
        self._window_ms = window_ms
        self._recent.window_ms = window_ms
        if self._writer is not None:
            self._writer.disk.settings = settings

    def seal(self, now_ms: int) -> int:
        """Seal the full hours that no rule looks back on, one after the other; says how many frames.

        Takes seconds, most of them in a process of its own. StoreError: what is not sealed stays as rows.
        """
        if self._writer is None:
            return 0
        disk, frames = self._writer.disk, 0
        before_ms = (now_ms - self._window_ms) // HOUR_MS * HOUR_MS
        for _ in range(_MANY):
            oldest_ms = disk.with_metrics(Metrics.oldest_unsealed_ms, now_ms)
            if oldest_ms is None or before_ms <= oldest_ms <= now_ms:
                break
            made = self._sealed(disk, before_ms, now_ms)
            for sealed in made:
                disk.with_metrics(partial(Metrics.take_in, sealed=sealed), now_ms)
                frames += len(sealed.frames)
            if not made:
                break
        keep_from_id = self._unsent_from_id(disk, now_ms)
        for _ in range(_MANY):
            if not disk.with_metrics(lambda metrics: metrics.delete_sealed(keep_from_id), now_ms):
                break
        return frames

    def _sealed(self, disk: Disk, before_ms: int, now_ms: int) -> list[Sealed]:
        try:
            return sealer.run(disk.folder / METRICS_DB, before_ms, now_ms)
        except StoreError as error:
            if error.kind == "corrupt":
                disk.with_metrics(partial(_raise, error), now_ms)
            raise

    def prune(self, now_ms: int) -> int:
        """Delete what is too old or too much, in short transactions; says how many rows."""
        with self._database.writing("prune history") as connection:
            deleted = writing.prune_history(connection, now_ms - _HISTORY_MS)
        if self._writer is None:
            return deleted
        disk = self._writer.disk
        kept = disk.settings
        if disk.state is not None:
            deleted += disk.state.prune(now_ms - _STATE_HISTORY_MS)
        for _ in range(_MANY):
            chunk = disk.with_metrics(
                lambda m: m.delete_older(now_ms - kept.retention, now_ms - kept.hourly_retention), now_ms
            )
            deleted += chunk
            if not chunk:
                break
        self._keep_within(disk, kept.max_size, now_ms)
        return deleted + disk.with_metrics(Metrics.forget_unused, now_ms)

    def _keep_within(self, disk: Disk, max_bytes: int, now_ms: int) -> None:
        """Leave room below the limit, so that a tick seldom meets it."""
        for _ in range(_MANY):
            if disk.with_metrics(Metrics.used_bytes, now_ms) <= max_bytes - 2 * _ROOM_BYTES:
                return
            if not disk.with_metrics(lambda metrics: metrics.delete_oldest(_ROOM_BYTES), now_ms):
                return

    # -- sending on ------------------------------------------------------------------------------

    def forwarder(self, name: str, now_ms: int) -> tuple[int, str | None]:
        """The last row that this receiver has, and the state of delivery; one that is new begins now."""
        if self._writer is None:
            return 0, None
        known = self._writer.disk.with_metrics(Metrics.forwarders, now_ms)
        if name not in known:
            known[name] = self._writer.disk.with_metrics(Metrics.newest_id, now_ms), ""
            self.save_forwarder(name, *known[name], now_ms)  # or it would begin now the next time too
        return known[name]

    def save_forwarder(self, name: str, sent_id: int, record: str, now_ms: int) -> None:
        """Remember how far a receiver has come; StoreError."""
        if self._writer is not None:
            self._writer.disk.with_metrics(lambda m: m.save_forwarder(name, sent_id, record), now_ms)

    def scrapes_after(self, sent_id: int, limit: int, now_ms: int) -> list[tuple[int, Scrape]]:
        """The next saved scrapes after an id, with their own ids; StoreError."""
        if self._writer is None:
            return []
        return self._writer.disk.with_metrics(lambda metrics: metrics.after(sent_id, limit), now_ms)

    def _unsent_from_id(self, disk: Disk, now_ms: int) -> int:
        """The first row that some receiver still waits for; no row above it is deleted."""
        known = disk.with_metrics(Metrics.forwarders, now_ms)
        waiting = [known[each.name][0] for each in disk.settings.remote_write if each.name in known]
        return min(waiting, default=_FOREVER_MS) + 1


def _raise(error: StoreError, _: Metrics) -> None:
    """Have damage noticed that another process found."""
    raise error
