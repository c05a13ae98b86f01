"""An hour of scrapes sent to a real Prometheus and a real VictoriaMetrics, and read back sample by sample."""

import contextlib
import json
import math
import random
import shutil
import socket
import struct
import subprocess
import time
from urllib.request import Request, urlopen

import pytest

from gpuwatch.config import RemoteWriteSettings
from gpuwatch.config.duration import Duration
from gpuwatch.records import STALE, Labels, Scrape, is_stale
from gpuwatch.remote_write import (
    RemoteWriteError,
    RemoteWriter,
    WriterState,
    after_failure,
    after_success,
    is_due,
    of_settings,
    take,
)

STEP_MS = 5_000
HOUR_MS = 3_600_000
GAP = range(300, 330)  # steps at which one target gave nothing
STALE_AT, RESET_AT = 400, 500
START_S, END_S = 30, 15
HOST = "gpu-a01"


class Receiver:
    """A program of its own, ended by its process; `samples` reads back all that it holds."""

    def __init__(self, folder):
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.base = f"http://127.0.0.1:{self.port}"
        self.url = f"{self.base}/api/v1/write"
        self._process = None

    def start(self):
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(self.command(), stdout=log, stderr=log, cwd=self.folder)
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError):
                self.get(self.ready)
                return
            time.sleep(0.1)
        raise AssertionError((self.folder / "log").read_text()[-2000:])

    def stop(self, *, kill=False):
        if self._process is None:
            return
        (self._process.kill if kill else self._process.terminate)()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def get(self, path, **query):
        form = "&".join(f"{name}={value}" for name, value in query.items()).encode()
        with urlopen(Request(self.base + path, data=form or None), timeout=10) as answer:
            return answer.read()


class Prometheus(Receiver):
    program = "prometheus"
    ready = "/-/ready"
    config = ""

    def command(self):
        (self.folder / "prometheus.yml").write_text(self.config)
        return [
            shutil.which(self.program),
            f"--web.listen-address=127.0.0.1:{self.port}",
            "--web.enable-remote-write-receiver",
            f"--storage.tsdb.path={self.folder / 'data'}",
            f"--config.file={self.folder / 'prometheus.yml'}",
        ]

    def samples(self, end_ms):
        """Series -> [(stamp, value)]; a range in brackets gives what is stored, but for staleness markers."""
        found = json.loads(self.get("/api/v1/query", query='{host!=""}[2h]', time=end_ms / 1000 + 1))
        return {
            Labels(each["metric"].items()): [
                (round(at_s * 1000), float(value)) for at_s, value in each["values"]
            ]
            for each in found["data"]["result"]
        }


class VictoriaMetrics(Receiver):
    program = "victoria-metrics"
    ready = "/health"

    def command(self):
        return [
            shutil.which(self.program),
            f"-httpListenAddr=127.0.0.1:{self.port}",
            f"-storageDataPath={self.folder / 'data'}",
            "-search.latencyOffset=0s",
            "-memory.allowedBytes=256MB",
        ]

    def samples(self, end_ms):
        """The same; the export gives a staleness marker as null."""
        self.get("/internal/force_flush")
        match = "%7Bhost!=%22%22%7D"
        lines = self.get("/api/v1/export", **{"match[]": match}).decode().splitlines()
        found = {}
        for line in lines:
            each = json.loads(line)
            pairs = zip(each["timestamps"], each["values"], strict=True)
            samples = [(stamp, STALE if value is None else float(value)) for stamp, value in pairs]
            found.setdefault(Labels(each["metric"].items()), []).extend(samples)
        return {labels: sorted(samples) for labels, samples in found.items()}


@pytest.fixture(params=[Prometheus, VictoriaMetrics], ids=lambda kind: kind.program)
def receiver(request, tmp_path):
    yield from started(request.param, tmp_path)


@pytest.fixture
def prometheus(tmp_path):
    yield from started(Prometheus, tmp_path)


@pytest.fixture
def victoria_metrics(tmp_path):
    yield from started(VictoriaMetrics, tmp_path)


def started(kind, folder):
    if shutil.which(kind.program) is None:
        pytest.skip(f"{kind.program} is not installed")
    program = kind(folder)
    try:
        program.start()
        yield program
    finally:
        program.stop()


def an_hour(start_ms):
    """Scrapes of three targets: a gap, a series that goes stale and comes back, a counter that is reset."""
    dice = random.Random(7)
    gpus = [Labels.of("gpu_memory_used_bytes", gpu=str(i), name="NVIDIA H200") for i in range(8)]
    host = [
        Labels.of("host_load1"),
        Labels.of("host_memory_available_bytes"),
        Labels.of("显存_ok", unit="a\nb"),
    ]
    server = [Labels.of("vllm:request_success_total", model_name='q"wen\\3'), Labels.of("up", server="qwen3")]
    total = 0
    for step in range(HOUR_MS // STEP_MS):
        at_ms = start_ms + step * STEP_MS
        yield Scrape("nvml", at_ms, gpus, [float(dice.randrange(0, 141 * 2**30, 512)) for _ in gpus])
        # VictoriaMetrics stores decimals, and keeps a fraction of eleven digits as it is.
        load = round(dice.uniform(10, 99), 9)
        yield Scrape("host", at_ms + 1, host, [load, float(dice.randrange(2**40)), -round(dice.random(), 11)])
        if step in GAP:
            continue
        total = 0 if step == RESET_AT else total + dice.randrange(100)
        up = STALE if step == STALE_AT else float(step % 2)
        yield Scrape("vllm", at_ms + 2, server, [float(total), up])


def as_series(scrapes):
    """Series with its host label -> [(stamp, value)], as a receiver should have it."""
    series = {}
    for each in scrapes:
        for labels, value in zip(each.labels, each.values, strict=True):
            series.setdefault(labels.merged({"host": HOST}), []).append((each.at_ms, value))
    return series


def without_stale(series):
    return {
        labels: [(at_ms, value) for at_ms, value in samples if not is_stale(value)]
        for labels, samples in series.items()
    }


def in_bits(series):
    return {
        labels: [(at_ms, struct.pack("<d", value)) for at_ms, value in samples]
        for labels, samples in series.items()
    }


def writer_to(receiver):
    target = RemoteWriteSettings(name="r", url=receiver.url, timeout=Duration(5000))
    return contextlib.closing(of_settings([target], HOST)["r"])


def forward(writer, rows, state, now_ms, disturb=lambda requests: None):
    """Send all rows as a forwarder does, its waits passing at once; gives the state and the faults met."""
    faults = []
    requests = 0
    while state.cursor < rows[-1][0]:
        assert requests < 20_000
        now_ms += 1000
        if not is_due(state, now_ms):
            continue
        batch = take(state, rows[state.cursor : state.cursor + 500], max_samples=400)
        disturb(requests)
        requests += 1
        try:
            writer.send([each for _, each in batch])
            state = after_success(state, batch)
        except RemoteWriteError as error:
            faults.append(error)
            state = after_failure(state, error, batch, now_ms=now_ms, jitter=0.5)
    return state, faults


def start_of_the_hour():
    return (int(time.time() * 1000) - HOUR_MS - 60_000) // 60_000 * 60_000


def numbered(scrapes):
    return list(enumerate(scrapes, 1))


def kept(receiver, scrapes):
    """What this receiver gives back of these scrapes: Prometheus shows no staleness markers."""
    series = as_series(scrapes)
    return in_bits(without_stale(series) if isinstance(receiver, Prometheus) else series)


def value_at(receiver, query, at_ms):
    found = json.loads(receiver.get("/api/v1/query", query=query, time=at_ms / 1000))
    return [float(each["value"][1]) for each in found["data"]["result"]]


@pytest.mark.acceptance
@pytest.mark.timeout(120)
def test_every_sample_of_an_hour_is_read_back_with_its_stamp(receiver):
    start_ms = start_of_the_hour()
    scrapes = list(an_hour(start_ms))
    with writer_to(receiver) as writer:
        state, faults = forward(writer, numbered(scrapes), WriterState(), start_ms)
    assert faults == []
    assert state == WriterState(cursor=len(scrapes))
    assert in_bits(receiver.samples(start_ms + HOUR_MS)) == kept(receiver, scrapes)


@pytest.mark.acceptance
@pytest.mark.timeout(120)
def test_a_staleness_marker_ends_a_series_at_once_and_a_reset_is_no_decrease(receiver):
    start_ms = start_of_the_hour()
    scrapes = list(an_hour(start_ms))
    with writer_to(receiver) as writer:
        forward(writer, numbered(scrapes), WriterState(), start_ms)
    receiver.samples(start_ms + HOUR_MS)  # so that all is to be seen
    stale_ms = start_ms + STALE_AT * STEP_MS + 2
    assert value_at(receiver, 'up{server="qwen3"}', stale_ms - 1) == [float((STALE_AT - 1) % 2)]
    assert value_at(receiver, 'up{server="qwen3"}', stale_ms + 1) == []
    assert value_at(receiver, 'up{server="qwen3"}', stale_ms + STEP_MS) == [float((STALE_AT + 1) % 2)]
    reset_s = (start_ms + RESET_AT * STEP_MS) / 1000
    (increase,) = value_at(receiver, "increase(vllm:request_success_total[5m])", reset_s * 1000 + 150_000)
    (resets,) = value_at(receiver, "resets(vllm:request_success_total[5m])", reset_s * 1000 + 150_000)
    assert resets == 1
    assert 0 < increase < 61 * 100


def goes_and_comes_back(receiver, *, kill):
    """Send the hour, the receiver away for four requests in the middle; what it has then and should have."""
    start_ms = start_of_the_hour()
    scrapes = list(an_hour(start_ms))

    def disturb(requests):
        if requests == 10:
            receiver.stop(kill=kill)
        if requests == 14:
            receiver.start()

    with writer_to(receiver) as writer:
        state, faults = forward(writer, numbered(scrapes), WriterState(), start_ms, disturb)
    assert len(faults) == 4
    assert all("sent again" in str(each) for each in faults)
    assert state == WriterState(cursor=len(scrapes))
    return in_bits(receiver.samples(start_ms + HOUR_MS)), kept(receiver, scrapes)


@pytest.mark.acceptance
@pytest.mark.timeout(180)
def test_a_receiver_that_is_stopped_and_started_again_has_everything_once(receiver):
    has, should_have = goes_and_comes_back(receiver, kill=False)
    assert has == should_have


@pytest.mark.acceptance
@pytest.mark.timeout(180)
def test_a_prometheus_that_is_killed_and_started_again_has_everything_once(prometheus):
    # A VictoriaMetrics has no log: killed, it loses the last seconds of what it acknowledged.
    has, should_have = goes_and_comes_back(prometheus, kill=True)
    assert has == should_have


def sent_again_after_a_crash_of_ours(receiver):
    """Send the hour, some rows of it twice in other batches; the faults met, what is there and should be."""
    start_ms = start_of_the_hour()
    scrapes = list(an_hour(start_ms))
    rows = numbered(scrapes)
    with writer_to(receiver) as writer:
        forward(writer, rows[:900], WriterState(), start_ms)
        state, faults = forward(writer, rows, WriterState(cursor=850), start_ms)
    assert state.cursor == len(rows)
    return faults, in_bits(receiver.samples(start_ms + HOUR_MS)), kept(receiver, scrapes)


@pytest.mark.acceptance
@pytest.mark.timeout(120)
def test_rows_that_prometheus_has_already_are_refused_alone_and_nothing_new_with_them(prometheus):
    faults, has, should_have = sent_again_after_a_crash_of_ours(prometheus)
    assert {each.permanent for each in faults} == {True}
    assert has == should_have


class UniqueVictoriaMetrics(VictoriaMetrics):
    """Shows equal samples once; without the option it shows them as often as they came."""

    def command(self):
        return [*super().command(), "-dedup.minScrapeInterval=1ms"]


@pytest.mark.acceptance
@pytest.mark.timeout(120)
def test_rows_that_victoria_metrics_has_already_are_taken_and_shown_once(tmp_path):
    with contextlib.contextmanager(started)(UniqueVictoriaMetrics, tmp_path) as receiver:
        faults, has, should_have = sent_again_after_a_crash_of_ours(receiver)
    assert faults == []
    assert has == should_have


@pytest.mark.acceptance
@pytest.mark.timeout(120)
def test_prometheus_takes_every_value_bit_for_bit(prometheus):
    start_ms = start_of_the_hour()
    values = [0.1 + 0.2, math.pi * 1e300, 5e-324, -0.0, math.inf, -math.inf, 2.0**53 + 2, 1.0]
    scrapes = [Scrape("t", start_ms + i * 1000, [Labels.of("x")], [value]) for i, value in enumerate(values)]
    with writer_to(prometheus) as writer:
        assert writer.send(scrapes) == len(values)
    assert in_bits(prometheus.samples(start_ms + HOUR_MS)) == in_bits(as_series(scrapes))


@pytest.mark.acceptance
@pytest.mark.timeout(120)
def test_victoria_metrics_keeps_counts_exactly_and_fractions_to_twelve_digits(victoria_metrics):
    start_ms, dice = start_of_the_hour(), random.Random(3)
    counts, fractions = Labels.of("bytes", host=HOST), Labels.of("ratio", host=HOST)
    scrapes = [
        Scrape("t", start_ms + i * 1000, [counts, fractions], [float(dice.randrange(2**53)), dice.random()])
        for i in range(500)
    ]
    with writer_to(victoria_metrics) as writer:
        writer.send(scrapes)
    found, sent = victoria_metrics.samples(start_ms + HOUR_MS), as_series(scrapes)
    assert found[counts] == sent[counts]
    assert [at_ms for at_ms, _ in found[fractions]] == [at_ms for at_ms, _ in sent[fractions]]
    values = [value for _, value in sent[fractions]]
    assert [value for _, value in found[fractions]] == pytest.approx(values, rel=1e-12, abs=0)


@pytest.mark.acceptance
@pytest.mark.timeout(120)
def test_prometheus_drops_what_is_too_old_for_it_and_takes_the_rest(prometheus):
    start_ms = start_of_the_hour()
    with writer_to(prometheus) as writer:
        newest = [Scrape("new", start_ms + HOUR_MS, [Labels.of("new")], [1.0])]
        forward(writer, numbered(newest), WriterState(), start_ms)
        mixed = [
            Scrape("t", start_ms - 2 * HOUR_MS, [Labels.of("old")], [1.0]),
            Scrape("t", start_ms + HOUR_MS, [Labels.of("fine")], [1.0]),
        ]
        state, faults = forward(writer, numbered(mixed), WriterState(), start_ms)
    assert [each.permanent for each in faults] == [True, True]
    assert "out of bounds" in str(faults[0])
    assert "out_of_order_time_window" in str(faults[0])
    assert state == WriterState(cursor=2, dropped_samples=1)
    assert {labels.metric for labels in prometheus.samples(start_ms + HOUR_MS)} == {"new", "fine"}


class LatePrometheus(Prometheus):
    config = "storage: {tsdb: {out_of_order_time_window: 6h}}\n"


@pytest.mark.acceptance
@pytest.mark.timeout(120)
def test_prometheus_with_a_window_for_late_samples_takes_them(tmp_path):
    start_ms = start_of_the_hour()
    with contextlib.contextmanager(started)(LatePrometheus, tmp_path) as late, writer_to(late) as writer:
        writer.send([Scrape("t", start_ms + 2 * HOUR_MS, [Labels.of("new")], [1.0])])
        scrapes = list(an_hour(start_ms))
        state, faults = forward(writer, numbered(scrapes), WriterState(), start_ms)
        assert faults == []
        assert state.cursor == len(scrapes)
        found = late.samples(start_ms + HOUR_MS)
    assert in_bits(found) == in_bits(without_stale(as_series(scrapes)))


@pytest.mark.acceptance
@pytest.mark.timeout(120)
def test_prometheus_that_is_no_receiver_says_what_it_lacks(tmp_path):
    class Deaf(Prometheus):
        def command(self):
            return [part for part in super().command() if part != "--web.enable-remote-write-receiver"]

    with contextlib.contextmanager(started)(Deaf, tmp_path) as deaf:
        target = RemoteWriteSettings(name="r", url=deaf.url)
        with contextlib.closing(RemoteWriter(target)) as writer, pytest.raises(RemoteWriteError) as caught:
            writer.send([Scrape("t", start_of_the_hour(), [Labels.of("x")], [1.0])])
    assert caught.value.broken
    assert "--web.enable-remote-write-receiver" in str(caught.value)
