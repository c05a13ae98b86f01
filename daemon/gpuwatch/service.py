"""Runs the jobs of `cycle` for ever: scheduler, signals, systemd's readiness and watchdog, logging."""

from __future__ import annotations

import contextlib
import datetime as dt
import logging
import os
import signal
import socket
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.schedulers.background import BackgroundScheduler

from gpuwatch import assembly, clock, lean, notify, sources
from gpuwatch.errors import GpuwatchError

if TYPE_CHECKING:
    from pathlib import Path

    from gpuwatch.config import Settings
    from gpuwatch.sources.recording import Recording
    from gpuwatch.upkeep import Job

log = logging.getLogger(__name__)

_MAX_WORKERS: Final = 16


@dataclass(frozen=True, slots=True)
class Input:
    """What the operator gave: a settings file, or the defaults, and a recording to play as the host."""

    config_path: Path | None = None
    recording_path: Path | None = None
    speed: float = 1.0


class Service:
    """The daemon: everything that `gpuwatch run` is beyond the cycle."""

    def __init__(self, given: Input) -> None:
        self.given = given
        self.stopping = threading.Event()
        self.reload_asked = threading.Event()
        self.wake = threading.Event()
        self.recording: Recording | None = None
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
        self.cycle = assembly.cycle(settings, groups, self.store, self.clock.now_ms(), self.recording)
        self._take_signals()
        self.store.start()
        self._start_scheduler()
        lean.settle()
        self._wait()
        self._stop()

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
        self.wake.set()

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
        full_second = clock.utc_now().replace(microsecond=0) + dt.timedelta(seconds=1)
        for job in self.cycle.jobs():
            self.scheduler.add_job(
                self._run_job,
                "interval",
                args=[job],
                id=job.name,
                seconds=job.every_ms / 1000 / self.given.speed,
                executor="default" if job.worker else "line",
                next_run_time=full_second + dt.timedelta(milliseconds=job.offset_ms / self.given.speed),
            )

    def _run_job(self, job: Job) -> None:
        now_ms = self.clock.now_ms()
        self.cycle.guarded(job, now_ms)
        if job.name == "prune":
            lean.trim_heap()
        if job.name == "tick":
            self._tell_systemd()
            if self.recording and self.recording.ended:
                self.wake.set()

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
        while not self.stopping.is_set():
            self.wake.wait()
            self.wake.clear()
            if self.recording and self.recording.ended:
                return
            if self.reload_asked.is_set():
                self.reload_asked.clear()
                self._reload()

    def _reload(self) -> None:
        """Take up new settings and rules if all of them are right; else keep the old and say why."""
        sd_notify("RELOADING=1", f"MONOTONIC_USEC={clock.monotonic_us()}")
        try:
            settings, groups = assembly.load(self.given.config_path)
            settings = assembly.for_recording(settings) if self.recording else settings
            fresh = assembly.cycle(
                settings, groups, self.store, self.cycle.parts.started_at_ms, self.recording
            )
        except GpuwatchError as error:
            log.error("reload refused, the old settings stay: %s", error)  # noqa: TRY400 (its text says all)
        else:
            self.scheduler.remove_all_jobs()
            fresh.take_over(self.cycle)
            self.cycle = fresh
            self.store.go_by(settings.store, assembly.window_ms(groups))
            self._schedule()
            log.info("reloaded rules=%d", sum(len(group.rules) for group in groups))
        sd_notify("READY=1")

    def _stop(self) -> None:
        sd_notify("STOPPING=1")
        self.scheduler.shutdown(wait=True)
        self._flush()
        self.store.close()
        log.info("stopped")

    def _flush(self) -> None:
        """Send what is due now; what is not stays in the outbox for the next start."""
        for job in self.cycle.jobs():
            if job.name.startswith("tell:"):
                self.cycle.guarded(job, self.clock.now_ms())


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
