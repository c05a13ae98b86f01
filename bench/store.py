"""`make bench ONLY=store`: what metrics.db costs, how fast it answers, and others on the same samples.

The day is generated (GPUWATCH_BENCH_HOURS, default 24; peers get the first six) and the H200 recording is the
second. CPU is process time; the feeding loop is not counted, what the store does with a scrape is.
"""

import json
import os
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import peers
import series

from gpuwatch.config import StoreSettings
from gpuwatch.frames import frame
from gpuwatch.promql import Matcher
from gpuwatch.promql.ranges import RANGES
from gpuwatch.promql.values import Window
from gpuwatch.store import METRICS_DB, Changes, Disk, Store, open_history
from gpuwatch.store.metrics import Metrics

HOURS = float(os.environ.get("GPUWATCH_BENCH_HOURS", "24"))
PEER_HOURS = 6
BIG_BYTES = int(float(os.environ.get("GPUWATCH_BENCH_BIG_GIB", "10")) * 2**30)
HOUR_MS = 3_600_000
WINDOW_MS = 300_000
NOTHING = Changes()
ALL = [Matcher("__name__", "=~", ".+")]
ONE = [Matcher("__name__", "=", "gpu_power_mw"), Matcher("gpu", "=", "3")]


def cpu_s():
    """Of this process and of those it waited for."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


def median_ms(what, times=15):
    took = []
    for _ in range(times):
        began = time.perf_counter()
        what()
        took.append((time.perf_counter() - began) * 1000)
    return statistics.median(took)


class Filled:
    """A store that took a day, tick by tick, each saved with FULL sync, each full hour sealed."""

    def __init__(self, day, folder):
        self.day, self.folder = day, Path(folder)
        self.disk = Disk(self.folder, StoreSettings(), "bench", day.start_ms)
        self.store = Store(HOUR_MS, self.disk)
        self.cpu, self.samples, self.tick_ms = 0.0, 0, []
        self.feed(day.ticks())

    def feed(self, ticks):
        sealed_hour = None
        for tick in ticks:
            now_ms = tick[-1].at_ms
            began, cpu = time.perf_counter(), time.process_time()
            for scrape in tick:
                self.store.append(scrape.target, scrape.at_ms, scrape.labels, scrape.values)
            self.store.save(NOTHING, now_ms)
            self.cpu += time.process_time() - cpu
            self.tick_ms.append((time.perf_counter() - began) * 1000)
            self.samples += sum(len(scrape.values) for scrape in tick)
            if now_ms // HOUR_MS != sealed_hour:
                sealed_hour = now_ms // HOUR_MS
                cpu = cpu_s()
                self.store.seal(now_ms)
                self.cpu += cpu_s() - cpu
        self.now_ms = now_ms
        assert not any(self.store.faults().values()), self.store.faults()

    def sealed(self):
        """Samples in frames, and the bytes of all pages that hold neither a hot row nor nothing."""
        with closing(sqlite3.connect(self.folder / METRICS_DB)) as connection:
            cells = sum(
                n * width
                for n, width in connection.execute(
                    "SELECT n, width FROM frame JOIN layout ON layout.id = frame.layout"
                )
            )
            (hot,) = connection.execute(
                "SELECT coalesce(sum(pgsize), 0) FROM dbstat WHERE name = 'hot'"
            ).fetchone()
            pages, free = (
                connection.execute(f"PRAGMA {p}").fetchone()[0] for p in ("page_count", "freelist_count")
            )
        return cells, (pages - free) * 4096 - hot


def present_share(day):
    return day.samples / sum(target.values.size for target in day.targets)


def costs(filled):
    day = filled.day
    cells, stored = filled.sealed()
    samples = cells * present_share(day)
    beside = f"{day.what}: {filled.samples} samples, {stored / 2**20:.1f} MiB beside the hot rows"
    yield "store.bytes_per_sample", stored / samples, "B", 0.45, beside
    bare = without_references(day)
    yield (
        "store.bytes_per_sample_no_duplicates",
        stored / samples * bare,
        "B",
        0.60,
        "duplicate columns not used",
    )
    yield (
        "store.cpu_us_per_sample",
        filled.cpu / filled.samples * 1e6,
        "us",
        0.6,
        "FULL sync, sealing included",
    )
    ticks = sorted(filled.tick_ms)
    p50, p99 = ticks[len(ticks) // 2], ticks[int(len(ticks) * 0.99)]
    yield "store.tick_p99", p99, "ms", 3, f"{day.series} series; p50 {p50:.2f} ms"


def without_references(day):
    """How much larger frames are that do not use that some columns are the same."""
    sizes = {True: 0, False: 0}
    for target in day.targets:
        step = HOUR_MS // target.interval_ms
        for first in range(0, min(len(target.values), 6 * step), step):
            rows = slice(first, first + step)
            values = np.ascontiguousarray(target.values[rows])
            present = ~np.isnan(values)
            for references in sizes:
                mask = None if present.all() else present
                made = frame.encode(target.jittered_ms[rows], values, mask, references=references)
                sizes[references] += len(made)
    return sizes[False] / sizes[True]


def beside_peers(day):
    """The same six hours in each; ours as one file more."""
    six = day.first(PEER_HOURS)
    rows = peers.plain_rows(day)
    for aligned in (False, True):
        word = "aligned" if aligned else "jittered"
        ours, _ = frames_only(six, aligned=aligned)
        for name, peer, bar in (
            ("victoria_metrics", peers.victoria_metrics, None if aligned else 0.35),
            ("prometheus", peers.prometheus, None if aligned else 0.15),
        ):
            cost = peer(six, PEER_HOURS, aligned=aligned)
            if cost is not None:
                beside = f"{word} stamps: {ours:.3f} B here, {cost.bytes_per_sample:.3f} B there ({cost.how})"
                yield f"store.bytes_vs_{name}_{word}", ours / cost.bytes_per_sample, "x", bar, beside
                bulk = (
                    f"its server alone, a request a second; {cost.bulk_cpu_us_per_sample:.2f} by the minute"
                )
                yield f"peer.{name}_{word}_cpu", cost.cpu_us_per_sample, "us/sample", None, bulk
    yield "peer.plain_rows_bytes", rows.bytes_per_sample, "B", None, rows.how
    yield "peer.plain_rows_cpu", rows.cpu_us_per_sample, "us/sample", None, rows.how


def frames_only(day, *, aligned):
    """Bytes a sample of a file that holds no row any more, and of its frames alone."""
    with tempfile.TemporaryDirectory(prefix="gpuwatch-bench-") as folder:
        disk = Disk(Path(folder), StoreSettings(), "bench", day.start_ms)
        store = Store(HOUR_MS, disk)
        for tick in day.ticks(aligned=aligned):
            for scrape in tick:
                store.append(scrape.target, scrape.at_ms, scrape.labels, scrape.values)
            store.save(NOTHING, tick[-1].at_ms)
        store.seal(tick[-1].at_ms + 3 * HOUR_MS)
        used = disk.with_metrics(Metrics.used_bytes, tick[-1].at_ms)
        store.close()
        with closing(sqlite3.connect(Path(folder) / METRICS_DB)) as connection:
            (frames,) = connection.execute("SELECT sum(length(data)) FROM frame").fetchone()
        return used / day.samples, frames / day.samples


def while_sealing(filled):
    """Ticks go on at 20 a second, as in the daemon, while the next hour is sealed beside them."""
    last, took = filled.now_ms, []
    rows = [next(target.scrapes()) for target in filled.day.targets]

    def tick(now_ms):
        for scrape in rows:
            filled.store.append(scrape.target, now_ms, scrape.labels, scrape.values)
        filled.store.save(NOTHING, now_ms)

    for second in range(1, 3700):
        tick(last + second * 1000)
    now_ms = last + 2 * HOUR_MS + 120_000
    filled.store.start()
    sealing = threading.Thread(target=filled.store.seal, args=(now_ms,))
    sealing.start()
    while sealing.is_alive():
        now_ms += 1000
        began = time.perf_counter()
        tick(now_ms)
        took.append((time.perf_counter() - began) * 1000)
        time.sleep(0.05)
    sealing.join()
    took.sort()
    beside = (
        f"{len(took)} ticks during the sealing; p50 {took[len(took) // 2]:.1f}, longest {took[-1]:.1f} ms"
    )
    yield "store.tick_while_sealing_p99", took[int(len(took) * 0.99)], "ms", 12, beside


def queries(filled):
    newest = filled.now_ms
    with open_history(filled.folder) as history:
        span = history.span_ms()
        yield "store.last_values", median_ms(lambda: history.latest(newest, WINDOW_MS)), "ms", 5, "all series"
        hour = span[0] // HOUR_MS * HOUR_MS + HOUR_MS
        took = median_ms(lambda: history.tracks(ONE, hour - 1, hour + HOUR_MS - 1))
        yield "store.one_series_1h", took, "ms", 2, "a sealed hour"
        took = median_ms(lambda: history.tracks(ONE, newest - HOUR_MS, newest))
        yield "store.one_series_1h_rows", took, "ms", None, "the last hour, which is rows"
        sealed_ms = newest // HOUR_MS * HOUR_MS - HOUR_MS
        took = median_ms(lambda: history.tracks(ONE, sealed_ms - 24 * HOUR_MS, sealed_ms))
        yield "store.one_series_24h", took, "ms", 15, f"{(sealed_ms - span[0]) / HOUR_MS:.0f} h of frames"


def week(filled):
    """Seven days of one target: the day's frames, seven times, each a day later."""
    with tempfile.TemporaryDirectory(prefix="gpuwatch-bench-") as folder:
        path = Path(folder) / METRICS_DB
        with closing(sqlite3.connect(filled.folder / METRICS_DB)) as source:
            source.execute("VACUUM INTO ?", (str(path),))
        day_ms = 24 * HOUR_MS
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("DELETE FROM hot")
            frames = connection.execute(
                "SELECT target, layout, n, data FROM frame JOIN target ON target.id = target"
                " WHERE name = 'gpu'"
            ).fetchall()
            connection.execute("BEGIN")
            connection.execute("DELETE FROM frame")
            hours = range(7 * 24)
            for hour in hours:
                target, layout, _, data = frames[hour % len(frames)]
                opened = frame.Frame(data)
                at_ms = opened.at_ms()
                at_ms = (
                    at_ms
                    - at_ms[0] // HOUR_MS * HOUR_MS
                    + filled.day.start_ms // day_ms * day_ms
                    + hour * HOUR_MS
                )
                values, present = opened.columns()
                made = frame.encode(at_ms, values, present)
                connection.execute(
                    "INSERT INTO frame (target, from_ms, to_ms, layout, n, data) VALUES (?, ?, ?, ?, ?, ?)",
                    (target, int(at_ms[0]), int(at_ms[-1]), layout, len(at_ms), made),
                )
            connection.execute("COMMIT")
        with open_history(Path(folder)) as history:
            first, last = history.span_ms()
            took = median_ms(lambda: history.points(ONE, first - 1, last, 1000), 9)
            count = len(history.tracks(ONE, first - 1, last)[0].at_ms)
        yield (
            "store.one_series_7d_1000_points",
            took,
            "ms",
            60,
            f"from {count} samples in {len(hours)} frames",
        )


def big_file(filled):
    """Open a file of 10 GB that is not in the page cache, and read the last values."""
    if shutil.disk_usage(tempfile.gettempdir()).free < 2.5 * BIG_BYTES:
        print("skipped: no room for a large file")
        return
    with tempfile.TemporaryDirectory(prefix="gpuwatch-bench-") as folder:
        path = Path(folder) / METRICS_DB
        with closing(sqlite3.connect(filled.folder / METRICS_DB)) as source:
            source.execute("VACUUM INTO ?", (str(path),))
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("PRAGMA journal_mode=OFF")
            connection.execute("PRAGMA synchronous=OFF")
            size, blob = path.stat().st_size, 4 * 2**20
            connection.execute("BEGIN")
            for number in range((BIG_BYTES - size) // blob):
                connection.execute(
                    "INSERT INTO frame (target, from_ms, to_ms, layout, n, data)"
                    " VALUES (1, ?, ?, 1, 1, zeroblob(?))",
                    (number, number, blob),
                )
            connection.execute("COMMIT")
        took = []
        for _ in range(5):
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            began = time.perf_counter()
            with open_history(Path(folder)) as history:
                assert len(history.latest(filled.now_ms, WINDOW_MS)) > 1000
            took.append((time.perf_counter() - began) * 1000)
        gib = path.stat().st_size / 2**30
    yield (
        "store.open_big_and_last_values",
        statistics.median(took),
        "ms",
        20,
        f"{gib:.1f} GiB, none of it cached",
    )


def from_memory(filled):
    rate = RANGES["rate"]
    upto, after = filled.now_ms, filled.now_ms - WINDOW_MS

    def rates():
        found = filled.store.select(ALL, after, upto)
        return [
            rate(
                Window(
                    labels=s.labels, at_ms=s.at_ms, values=s.values, start_ms=after, end_ms=upto, now_ms=upto
                )
            )
            for s in found
        ]

    count = sum(len(s.values) for s in filled.store.select(ALL, after, upto))
    yield (
        "store.rate_5m_all_series",
        median_ms(rates),
        "ms",
        5,
        f"{filled.day.series} series, {count} samples, from memory",
    )


def memory(day):
    """What the store adds to a process that has all the rest of the daemon: an hour of 450 series."""
    with tempfile.TemporaryDirectory(prefix="gpuwatch-bench-") as folder:
        script = [sys.executable, str(Path(__file__).with_name("store_memory.py")), folder]
        environment = {
            **os.environ,
            "PYTHONOPTIMIZE": "2",
            "PYTHONNODEBUGRANGES": "1",
            "PYTHONDONTWRITEBYTECODE": "",
        }
        environment["PYTHONPYCACHEPREFIX"] = str(Path(folder) / "cache")
        rows = Path(folder) / "rows.jsonl"
        with rows.open("w") as out:
            for scrape in day.first(1.2).scrapes():
                kept = [(tuple(s), v) for s, v in zip(scrape.labels, scrape.values, strict=True) if of_450(s)]
                out.write(
                    json.dumps([scrape.target, scrape.at_ms, [k for k, _ in kept], [v for _, v in kept]])
                    + "\n"
                )
        subprocess.run([*script, "warm"], check=True, stdout=subprocess.DEVNULL, env=environment)
        done = subprocess.run(script, check=True, stdout=subprocess.PIPE, env=environment)
        found = json.loads(done.stdout)
    beside = f"{found['series']} series, an hour; {found['held'] / 2**20:.1f} MiB of it samples"
    yield "store.memory", found["added"] / 2**20, "MiB", 20, beside


def of_450(labels):
    """One GPU, its allocator, the host and the server: what most hosts have."""
    return labels.get("gpu") in {"", "0"}


def bench(_seconds):
    day = series.generated(HOURS)
    if day is None:
        return
    with tempfile.TemporaryDirectory(prefix="gpuwatch-bench-") as folder:
        filled = Filled(day, folder)
        yield from costs(filled)
        yield from from_memory(filled)
        yield from queries(filled)
        yield from week(filled)
        yield from big_file(filled)
        yield from while_sealing(filled)
        filled.store.close()
    yield from memory(day)
    if HOURS >= PEER_HOURS:
        yield from beside_peers(day)
    recorded = series.recorded()
    whole, frames = frames_only(recorded, aligned=False)
    beside = f"{recorded.what} on an H200; {whole:.1f} with labels, hourly figures and a new file's pages"
    yield "store.recorded_frame_bytes_per_sample", frames, "B", None, beside
