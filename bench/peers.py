"""What plain SQLite rows, Prometheus and VictoriaMetrics cost on the same samples; never our own store.

Bytes are what is left at rest: no write-ahead log, no cache. CPU is the process' own; that of the two
servers leaves out whoever feeds them. With a request a second, as a store must have that loses no more than
a second, it is two to six times what it is with one a minute, and runs differ by up to a factor of two.
Times of queries are wall times.
"""

import contextlib
import json
import re
import shutil
import socket
import sqlite3
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import requests
from series import HOUR_MS, Day

SECOND_MS = 1000
MINUTE_MS = 60_000
BY_SECOND_HOURS = 0.5  # then by minute, or it would take several minutes
BLOCKS_HOURS = 5.2  # worst case: the second one is cut when an hour has passed after its two
PATIENCE_S = 60
ASKED = 9
# A sample in a remote write request: a message of 16 bytes, whose time takes six of them from 1971 to 2109.
POINT = np.dtype([("opens", "u1", 3), ("value", "<f8"), ("at_opens", "u1"), ("at", "u1", 6)])


@dataclass(frozen=True, slots=True)
class Cost:
    """What keeping `samples` costs; `how` they were kept.

    `cpu_us_per_sample` is written second by second, `bulk_cpu_us_per_sample` minute by minute and with
    what is done in the background. Medians of two queries in ms: `last_ms` for the last value of every
    series, `series_ms` for every sample of one series. None: not measured.
    """

    bytes_per_sample: float
    cpu_us_per_sample: float
    samples: int
    how: str
    bulk_cpu_us_per_sample: float | None = None
    last_ms: float | None = None
    series_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Peer:
    """A server that takes remote write; `{folder}` and `{address}` stand in its options.

    `bytes_per_sample(server, samples)` waits until it has put the samples in their lasting form.
    """

    program: str
    options: tuple[str, ...]
    kept: str
    bytes_per_sample: Callable[["Server", int], float]


@dataclass(frozen=True, slots=True)
class Server:
    """A running peer."""

    process: psutil.Popen
    session: requests.Session
    url: str
    folder: Path

    @property
    def cpu_s(self) -> float:
        """User and system time so far."""
        return sum(self.process.cpu_times()[:2])

    def ask(self, path: str, **parameters: object) -> requests.Response:
        """GET; HTTPError for a refusal."""
        answer = self.session.get(self.url + path, params=parameters, timeout=PATIENCE_S)
        answer.raise_for_status()
        return answer


def plain_rows(day: Day, hours: float = 1, *, aligned: bool = False) -> Cost:
    """A row for each sample, a transaction for each tick, over the first hours."""
    day = day.first(hours)
    ids = {series: n for n, series in enumerate(s for target in day.targets for s in target.labels)}
    samples, cpu_s = 0, 0.0
    with tempfile.TemporaryDirectory(prefix="gpuwatch-bench-") as folder:
        path = Path(folder) / "rows.db"
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
            db.execute("PRAGMA journal_mode=WAL")
            db.execute("PRAGMA synchronous=FULL")
            db.execute(
                "CREATE TABLE sample (at_ms INTEGER, series_id INTEGER, value REAL,"
                " PRIMARY KEY (at_ms, series_id)) WITHOUT ROWID"
            )
            for tick in day.ticks(aligned=aligned):
                rows = [
                    (scrape.at_ms, ids[series], value)
                    for scrape in tick
                    for series, value in zip(scrape.labels, scrape.values, strict=True)
                ]
                began_s = time.process_time()
                db.execute("BEGIN IMMEDIATE")
                db.executemany("INSERT INTO sample VALUES (?, ?, ?)", rows)
                db.execute("COMMIT")
                cpu_s += time.process_time() - began_s
                samples += len(rows)
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        size_bytes = path.stat().st_size
    how = f"SQLite {sqlite3.sqlite_version}, {day.what}, {_stamps(aligned)}"
    return Cost(size_bytes / samples, 1e6 * cpu_s / samples, samples, how)


def prometheus(day: Day, hours: float = 6, *, aligned: bool = False) -> Cost | None:
    """Its blocks of two hours; None where it is not installed. ValueError: too few hours to write two."""
    day = day.first(hours)
    if day.end_ms - day.start_ms < BLOCKS_HOURS * HOUR_MS:
        raise ValueError(f"cannot measure blocks over {day.what}: give it {BLOCKS_HOURS} h or more")
    return _cost(PROMETHEUS, day, aligned=aligned)


def victoria_metrics(day: Day, hours: float = 6, *, aligned: bool = False) -> Cost | None:
    """Its data, merged into one part, without the index; None where it is not installed."""
    return _cost(VICTORIA_METRICS, day.first(hours), aligned=aligned)


def _cost(peer, day, *, aligned):
    program = shutil.which(peer.program)
    if program is None:
        print(f"skipped: {peer.program} is not installed")
        return None
    with _running(program, peer.options) as server:
        by_second = day.first(BY_SECOND_HOURS).samples
        by_minute = day.samples - by_second
        from_ms = day.start_ms + round(BY_SECOND_HOURS * HOUR_MS)
        began_s = server.cpu_s
        _feed(server, day, range(day.start_ms, from_ms, SECOND_MS), aligned=aligned)
        fed_s = server.cpu_s
        _feed(server, day, range(from_ms, day.end_ms + 1, MINUTE_MS), aligned=aligned)
        size = peer.bytes_per_sample(server, day.samples)
        ended_s = server.cpu_s
        last_ms, series_ms = _query_ms(server, day)
    return Cost(
        bytes_per_sample=size,
        cpu_us_per_sample=1e6 * (fed_s - began_s) / by_second,
        samples=day.samples,
        how=f"{peer.program}, {peer.kept}, {day.what}, {_stamps(aligned)}",
        bulk_cpu_us_per_sample=1e6 * (ended_s - fed_s) / by_minute if by_minute else None,
        last_ms=last_ms,
        series_ms=series_ms,
    )


@contextlib.contextmanager
def _running(program, options):
    with tempfile.TemporaryDirectory(prefix="gpuwatch-bench-") as name, requests.Session() as session:
        session.trust_env = False  # no proxy on the way to this host
        folder = Path(name) / "data"
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        command = [program, *(option.format(folder=folder, address=address) for option in options)]
        process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            server = Server(process, session, f"http://{address}", folder)
            _wait(f"start {program}", lambda: _is_ready(server))
            yield server
        finally:
            process.terminate()
            process.wait(PATIENCE_S)


def _is_ready(server):
    if server.process.poll() is not None:
        raise RuntimeError(f"cannot start {server.process.args[0]}: it ended with {server.process.poll()}")
    try:
        return server.session.get(f"{server.url}/-/ready", timeout=1).ok
    except requests.RequestException:
        return False


def _wait(what, condition, every_s=0.1):
    """The first answer that is true."""
    until_s = time.monotonic() + PATIENCE_S
    while time.monotonic() < until_s:
        if answer := condition():
            return answer
        time.sleep(every_s)
    raise RuntimeError(f"cannot {what}: not done after {PATIENCE_S} s; is the host very busy?")


# -- what lies on the disk -------------------------------------------------------------------------


def _of_blocks(server, _samples):
    """A block is written some time after its last sample, and the newest hours are in none."""
    found = _wait("see two blocks", lambda: _two(server.folder.glob("?" * 26 + "/meta.json")))
    samples = sum(json.loads(meta.read_text())["stats"]["numSamples"] for meta in found)
    return sum(_on_disk_bytes(meta.parent) for meta in found) / samples


def _two(found):
    found = list(found)
    return found if len(found) >= 2 else None


def _of_parts(server, samples):
    """Rows that are still in memory would make it look smaller than it is: wait until one part has all."""
    _wait("merge all parts", lambda: _is_merged(server, samples), every_s=2)
    return _on_disk_bytes(server.folder / "data") / samples


def _is_merged(server, samples):
    """If not, and nothing is under way, have it done; that comes back at once."""
    parts = [path.name for size in ("small", "big") for path in server.folder.glob(f"data/{size}/*/*_*_*")]
    if [int(part.split("_")[0]) for part in parts] == [samples]:  # a part's name opens with its rows
        return True
    if not re.search(r"^vm_active_.*merges.* [1-9]", server.ask("/metrics").text, re.MULTILINE):
        server.ask("/internal/force_flush")
        server.ask("/internal/force_merge")
    return False


def _on_disk_bytes(folder):
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())


# -- questions -------------------------------------------------------------------------------------


def _query_ms(server, day):
    at_s = day.end_ms / 1000
    span_s = (day.end_ms - day.start_ms) // 1000
    asked = '{__name__=~".+"}', f"{_liveliest(day)}[{span_s}s]"
    return tuple(statistics.median(_ask_ms(server, query, at_s) for _ in range(ASKED)) for query in asked)


def _liveliest(day):
    """A series that changes more often than any other of the biggest target."""
    target = max(day.targets, key=lambda t: t.values.size)
    return target.labels[int(np.count_nonzero(np.diff(target.values[:600], axis=0), axis=0).argmax())]


def _ask_ms(server, query, at_s):
    """From the question to its answer in hand, JSON decoded."""
    began_s = time.perf_counter()
    answer = server.ask("/api/v1/query", query=query, time=at_s).json()
    took_ms = 1000 * (time.perf_counter() - began_s)
    if not answer["data"]["result"]:
        raise RuntimeError(f"cannot measure {query} at {server.url}: it found nothing")
    return took_ms


# -- remote write ----------------------------------------------------------------------------------


def _feed(server, day, begins_ms, *, aligned):
    """A request for all targets at each step of the range, up to the next."""
    heads = [[_head(series) for series in target.labels] for target in day.targets]
    stamps = [target.stamps(aligned=aligned) for target in day.targets]
    for from_ms in begins_ms:
        parts = []
        for target, of_target, at_ms in zip(day.targets, heads, stamps, strict=True):
            first, end = np.searchsorted(at_ms, [from_ms, from_ms + begins_ms.step])
            parts += _series(of_target, target.values[first:end], at_ms[first:end])
        if parts:
            _send(server, _snappy(b"".join(parts)))


def _send(server, body):
    headers = {
        "Content-Type": "application/x-protobuf",
        "Content-Encoding": "snappy",
        "X-Prometheus-Remote-Write-Version": "0.1.0",
    }
    answer = server.session.post(f"{server.url}/api/v1/write", body, headers=headers, timeout=PATIENCE_S)
    answer.raise_for_status()


def _series(heads, values, at_ms):
    """WriteRequest.timeseries: what a series is called, then its samples; absent ones are left out."""
    points = np.empty(values.shape, POINT)
    points["opens"] = 0x12, POINT.itemsize - 2, 0x09
    points["value"] = values
    points["at_opens"] = 0x10
    shifts = np.arange(0, 42, 7)
    points["at"] = ((at_ms[:, None] >> shifts & 0x7F) | np.where(shifts < 35, 0x80, 0))[:, None, :]
    for head, column, present in zip(heads, np.ascontiguousarray(points.T), ~np.isnan(values.T), strict=True):
        samples = column[present].tobytes()
        if samples:
            yield b"\x0a" + _varint(len(head) + len(samples)) + head + samples


def _head(labels):
    return b"".join(_field(1, _field(1, name.encode()) + _field(2, value.encode())) for name, value in labels)


def _field(number, content):
    return bytes([number << 3 | 2]) + _varint(len(content)) + content


def _varint(number):
    written = bytearray()
    while number > 0x7F:
        written.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*written, number])


def _snappy(content):
    """Snappy's block form with the content as one literal: a reader's work is then one copy."""
    return _varint(len(content)) + b"\xfc" + (len(content) - 1).to_bytes(4, "little") + content


def _stamps(aligned):
    return "aligned stamps" if aligned else "jittered stamps"


PROMETHEUS = Peer(
    "prometheus",
    (
        "--config.file=/dev/null",
        "--web.enable-remote-write-receiver",
        "--storage.tsdb.path={folder}",
        "--web.listen-address={address}",
    ),
    "its blocks",
    _of_blocks,
)
VICTORIA_METRICS = Peer(
    "victoria-metrics",
    ("-retentionPeriod=100y", "-storageDataPath={folder}", "-httpListenAddr={address}"),
    "its data/ without the index",
    _of_parts,
)
