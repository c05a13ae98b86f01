"""Runs the jobs of `cycle` for ever: scheduler, signals, systemd's readiness and watchdog, logging."""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import os
import select
import signal
import socket
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.jobstores.base import JobLookupError
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.interval import IntervalTrigger

from gpuwatch import assembly, clock, lean, notify, sources
from gpuwatch.cycle import TICK_GRAIN_MS
from gpuwatch.errors import GpuwatchError
from gpuwatch.sources.exits import Waking

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from gpuwatch import rules
    from gpuwatch.config import Settings
    from gpuwatch.cycle import Cycle
    from gpuwatch.sources.recording import Recording
    from gpuwatch.upkeep import Job

log = logging.getLogger(__name__)

_MAX_WORKERS: Final = 16
_INSTANT: Final = dt.timedelta(microseconds=1)
_HURRY_MS: Final = 200  # after a step was asked for the first time
_REST_MS: Final = 250  # between two readings out of turn, however much happens


@dataclass(frozen=True, slots=True)
class Input:
    """What the operator gave: a settings file, or the defaults, and a recording to play as the host."""

    config_path: Path | None = None
    recording_path: Path | None = None
    speed: float = 1.0


class Bell:
    """What a thread waits at: rung by a signal or another thread, or by descriptors that can be read."""

    def __init__(self) -> None:
        self._heard, self._rung = os.pipe()
        os.set_blocking(self._heard, False)
        os.set_blocking(self._rung, False)

    def ring(self) -> None:
        """End the wait, or the next one if nobody waits."""
        with contextlib.suppress(BlockingIOError):  # it has been rung often enough
            os.write(self._rung, b"\0")

    def wait(self, descriptors: Iterable[int] = (), for_ms: int | None = None) -> list[int]:
        """Wait until it rings or `for_ms` have passed; gives the descriptors that can be read."""
        poll = select.poll()
        for descriptor in (self._heard, *descriptors):
            poll.register(descriptor, select.POLLIN)
        ready = [descriptor for descriptor, what in poll.poll(for_ms) if what & select.POLLIN]
        if self._heard in ready:
            ready.remove(self._heard)
            os.read(self._heard, 4096)
        return ready

    def close(self) -> None:
        """Give its descriptors back."""
        os.close(self._heard)
        os.close(self._rung)


class Beat(IntervalTrigger):  # type: ignore[misc]  # of a library without types
    """Keeps in step with its start, also after a run out of turn."""

    def get_next_fire_time(
        self, previous_fire_time: dt.datetime | None, now: dt.datetime
    ) -> dt.datetime | None:
        """The first beat after both."""
        after = now if previous_fire_time is None else max(now, previous_fire_time + _INSTANT)
        following: dt.datetime | None = super().get_next_fire_time(None, after)
        return following


class Service:
    """The daemon: everything that `gpuwatch run` is beyond the cycle."""

    def __init__(self, given: Input) -> None:
        self.given = given
        self.stopping = threading.Event()
        self.reload_asked = threading.Event()
        self.bell = Bell()
        self.recording: Recording | None = None
        self._woken: set[str] = set()  # the jobs that run out of turn, after which a tick is due
        self._ready = False
        self._status = ""

    def run(self) -> None:
        """Run until SIGTERM or the end of the recording. GpuwatchError if it cannot begin."""
        settings, groups = assembly.load(self.given.config_path)
        if self.given.recording_path:
            self.recording = sources.open_recording(self.given.recording_path)
            settings = assembly.for_recording(settings)
        self.store = assembly.open_store(settings, groups, clock.SystemClock().now_ms())
        self.clock = self._clock()
        self.store.reload(self.clock.now_ms())
        self.cycle = self._cycle(settings, groups, self.clock.now_ms())
        self._take_signals()
        self.store.start()
        self._start_scheduler()
        lean.settle()
        self._wait()
        self._stop()

    def _cycle(
        self,
        settings: Settings,
        groups: Sequence[rules.CompiledGroup],
        started_at_ms: int,
        trees: sources.Trees | None = None,
    ) -> Cycle:
        if self.recording:
            return assembly.played(settings, groups, self.store, started_at_ms, self.recording)
        return assembly.cycle(settings, groups, self.store, started_at_ms, trees)

    def _clock(self) -> clock.Clock:
        """The wall, or a recording's own time, which goes on where the database left off."""
        if self.recording is None:
            return clock.SteadyClock(clock.SystemClock())
        start_ms = max(self.recording.start_ms, self.store.last_tick_ms() or 0)
        return clock.ScaledClock(start_ms, self.given.speed)

    def _take_signals(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: object) -> None:
        (self.reload_asked if number == signal.SIGHUP else self.stopping).set()
        self.bell.ring()

    def _start_scheduler(self) -> None:
        logging.getLogger("apscheduler").setLevel(logging.ERROR)  # a job still running is no news
        workers = min(_MAX_WORKERS, len(self.cycle.jobs()))
        self.scheduler = BackgroundScheduler(
            executors={"default": ThreadPoolExecutor(workers), "line": ThreadPoolExecutor(1)},
            job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": None},
            timezone="UTC",
        )
        self._schedule()
        self.scheduler.start()

    def _schedule(self) -> None:
        ahead_ms = 1000 - self.clock.now_ms() % 1000  # a recording's full second comes sooner than the wall's
        full_second = clock.utc_now() + dt.timedelta(milliseconds=ahead_ms / self.given.speed)
        for job in self.cycle.jobs():
            first = full_second + dt.timedelta(milliseconds=job.offset_ms / self.given.speed)
            self.scheduler.add_job(
                self._run_job,
                Beat(seconds=job.every_ms / 1000 / self.given.speed, start_date=first),
                args=[job],
                id=job.name,
                executor="default" if job.worker else "line",
            )

    def _run_job(self, job: Job) -> None:
        now_ms = self.clock.now_ms()
        self.cycle.guarded(job, now_ms)
        if job.name in self._woken:
            self._woken.discard(job.name)
            self._tick_soon()
        if job.name == "prune":
            lean.trim_heap()
        if job.name == "tick":
            self._tell_systemd()
            if self.cycle.last_report.hurries:
                self._tick_soon(_HURRY_MS)
            if self.recording and self.recording.ended:
                self.bell.ring()

    def _tell_systemd(self) -> None:
        """Pet the watchdog from here alone: a tick that came to its end, well or not, shows life."""
        lines = ["WATCHDOG=1"]
        if self.cycle.last_report.summary != self._status:
            self._status = self.cycle.last_report.summary
            lines.append(f"STATUS={self._status}")
        if not self._ready:
            self._ready = True
            lines.append("READY=1")
        sd_notify(*lines)

    def _wait(self) -> None:
        rests = False
        while not self.stopping.is_set():
            woken = self.bell.wait(for_ms=_REST_MS) if rests else self.bell.wait(self._wakes())
            rests = bool(woken)
            for descriptor in woken:
                self._read_at_once(self._wakes().get(descriptor, ""))
            if self.recording and self.recording.ended:
                return
            if self.reload_asked.is_set():
                self.reload_asked.clear()
                self._reload()

    def _wakes(self) -> dict[int, str]:
        """The descriptors by which sources say that they must not wait for their turn, each with its job."""
        eyes = self.cycle.parts.sources
        return {eye.wakes: f"collect:{eye.name}" for eye in eyes if isinstance(eye, Waking)}

    def _read_at_once(self, job: str) -> None:
        """Run a job now; its next turn stays where it was. If it runs already, it is woken again."""
        self._woken.add(job)
        with contextlib.suppress(JobLookupError):
            self.scheduler.modify_job(job, next_run_time=clock.utc_now())

    def _tick_soon(self, after_ms: float = TICK_GRAIN_MS / 2) -> None:
        """By default half a tick's grain on: rounded, its instant must not lie before what was read."""
        (tick,) = (job for job in self.cycle.jobs() if job.name == "tick")
        soon = clock.utc_now() + dt.timedelta(milliseconds=after_ms)
        self.scheduler.add_job(
            self._run_job,
            "date",
            run_date=soon,
            args=[tick],
            id="tick soon",
            executor="line",
            replace_existing=True,
        )

    def _reload(self) -> None:
        """Take up new settings and rules if all of them are right; else keep the old and say why."""
        sd_notify("RELOADING=1", f"MONOTONIC_USEC={clock.monotonic_us()}")
        try:
            settings, groups = assembly.load(self.given.config_path)
            settings = assembly.for_recording(settings) if self.recording else settings
            fresh = self._cycle(settings, groups, self.cycle.parts.started_at_ms, self.cycle.parts.trees)
        except GpuwatchError as error:
            log.error("reload refused, the old settings stay: %s", error)  # noqa: TRY400 (its text says all)
        else:
            self.scheduler.remove_all_jobs()
            fresh.take_over(self.cycle)
            old, self.cycle = self.cycle, fresh
            _close(old.parts.sources)
            self.store.go_by(settings.store, assembly.window_ms(groups))
            self._schedule()
            log.info("reloaded rules=%d", sum(len(group.rules) for group in groups))
        sd_notify("READY=1")

    def _stop(self) -> None:
        sd_notify("STOPPING=1")
        self.scheduler.shutdown(wait=True)
        self._flush()
        _close(self.cycle.parts.sources)
        self.store.close()
        log.info("stopped")

    def _flush(self) -> None:
        """Send what is due now; what is not stays in the outbox for the next start."""
        for job in self.cycle.jobs():
            if job.name.startswith("tell:"):
                self.cycle.guarded(job, self.clock.now_ms())


def _close(eyes: Iterable[sources.Source]) -> None:
    for eye in eyes:
        if isinstance(eye, Waking):
            eye.close()


def record(settings: Settings, file: Path, for_ms: int | None) -> int:
    """Write what the sources read, a line a second, until Ctrl-C or SIGTERM; gives the number of lines."""
    stopping = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopping.set())
    wall = clock.SystemClock()
    began_ms, ticks = wall.now_ms(), 0
    with contextlib.closing(sources.recorder(settings, file)) as recorder:
        while not stopping.is_set() and (for_ms is None or ticks * 1000 < for_ms):
            recorder.tick(wall.now_ms())
            ticks += 1
            stopping.wait(max(0, began_ms + ticks * 1000 - wall.now_ms()) / 1000)
    return ticks


def sd_notify(*lines: str) -> None:
    """Tell systemd (NOTIFY_SOCKET, man sd_notify); nothing where systemd did not start us."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    address = "\0" + address[1:] if address.startswith("@") else address
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.connect(address)
        sock.send("\n".join(lines).encode())


def set_up_logging(level: str) -> None:
    """One line a record on standard error, which journald takes; secrets are cut out at the root."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(message)s"))
    handler.addFilter(notify.RedactSecrets())
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # it would log what we tell in our own words
