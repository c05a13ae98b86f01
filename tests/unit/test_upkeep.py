"""Sending on, sealing and pruning as the daemon's jobs do it: a real store, a receiver that behaves."""

from __future__ import annotations

import logging
import sqlite3
import threading
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from gpuwatch import remote_write
from gpuwatch.config import StoreSettings
from gpuwatch.config.settings import RemoteWriteSettings
from gpuwatch.config.size import Size
from gpuwatch.errors import StoreError
from gpuwatch.frames import sealing
from gpuwatch.frames.rowtext import HOUR_MS
from gpuwatch.promql import Matcher
from gpuwatch.records import Labels, Notification
from gpuwatch.remote_write import RemoteWriteError
from gpuwatch.store import METRICS_DB, Changes, Disk, Store, sealer
from gpuwatch.troubles import Troubles
from gpuwatch.upkeep import Upkeep

SECOND, MINUTE, DAY = 1000, 60_000, 24 * HOUR_MS
NOW_MS = 1_795_252_500_000 // HOUR_MS * HOUR_MS
NOTHING = Changes()
ALL = Matcher("__name__", "=~", ".*")
POWER = Labels.of("gpu_power_draw_watts", gpu="0")
HEAT = Labels.of("gpu_temperature_celsius", gpu="0")
TARGET = RemoteWriteSettings(name="mimir", url="http://127.0.0.1:9/api/v1/write")


class Receiver:
    """A writer that takes what it is sent, refuses what it was told to, or fails; keeps the samples."""

    def __init__(self):
        self.samples = {}
        self.requests = []
        self.fault = None
        self.refused_at_ms = set()

    def send(self, scrapes):
        self.requests.append([scrape.at_ms for scrape in scrapes])
        if self.fault is not None:
            raise self.fault
        if self.refused_at_ms & {scrape.at_ms for scrape in scrapes}:
            raise RemoteWriteError("out of bounds", permanent=True)
        for scrape in scrapes:
            for labels, value in zip(scrape.labels, scrape.values, strict=True):
                self.samples.setdefault(labels, []).append((scrape.at_ms, value))
        return sum(len(scrape.values) for scrape in scrapes)

    def instants(self, labels=POWER):
        return [at_ms for at_ms, _ in self.samples.get(labels, [])]


def opened(folder, now_ms=NOW_MS, **more):
    settings = StoreSettings(min_free=Size(0), remote_write=[TARGET], **more)
    return Store(HOUR_MS, Disk(folder, settings, "gpu-a", now_ms))


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(sealer, "run", lambda path, *given: list(sealing.seal(path, *given)))
    with closing(opened(tmp_path)) as found:
        yield found


@pytest.fixture
def receiver():
    return Receiver()


def upkeep(store, receiver, spool_ms=6 * HOUR_MS, receivers=(), troubles=None):
    return Upkeep(
        store=store,
        receivers=receivers,
        writers={"mimir": receiver},
        spool_ms=spool_ms,
        starts={},
        append=lambda *_: None,
        troubles=troubles or Troubles(),
        jitter=lambda: 0.0,
    )


def scrape(store, at_ms, value=1.0):
    store.append("nvml", at_ms, [POWER, HEAT], [value, 60.0])
    store.save(NOTHING, at_ms)


def own(store, name, now_ms):
    """What gpuwatch says of its sending on, newest."""
    found = store.select([Matcher("__name__", "=", f"gpuwatch_remote_write_{name}")], 0, now_ms)
    return [(series.labels.get("receiver"), series.values[-1]) for series in found]


def plain(folder, query):
    with closing(sqlite3.connect(folder / METRICS_DB)) as connection:
        return connection.execute(query).fetchall()


# Sending on


def test_a_new_receiver_gets_what_is_saved_from_then_on(store, receiver):
    jobs = upkeep(store, receiver)
    scrape(store, NOW_MS)
    jobs.send("mimir", NOW_MS)
    assert receiver.requests == []
    for second in range(1, 10):
        scrape(store, NOW_MS + second * SECOND, float(second))
        if second % 3 == 0:
            jobs.send("mimir", NOW_MS + second * SECOND)
    assert receiver.samples[POWER] == [(NOW_MS + s * SECOND, float(s)) for s in range(1, 10)]
    assert receiver.instants(HEAT) == receiver.instants()


def test_it_goes_on_after_a_restart_where_it_stood(store, receiver, tmp_path):
    upkeep(store, receiver).send("mimir", NOW_MS)
    scrape(store, NOW_MS)
    upkeep(store, receiver).send("mimir", NOW_MS)
    scrape(store, NOW_MS + 1)
    store.close()
    with closing(opened(tmp_path)) as again:
        scrape(again, NOW_MS + 2)
        upkeep(again, receiver).send("mimir", NOW_MS + 2)
    assert receiver.instants() == [NOW_MS, NOW_MS + 1, NOW_MS + 2]


def test_each_receiver_has_its_own_place(store):
    slow, quick = Receiver(), Receiver()
    jobs = Upkeep(
        store=store,
        receivers=(),
        writers={"slow": slow, "quick": quick},
        spool_ms=HOUR_MS,
        starts={},
        append=lambda *_: None,
        troubles=Troubles(),
        jitter=lambda: 0.0,
    )
    assert [job.name for job in jobs.jobs()] == ["send:slow", "send:quick", "seal", "prune"]
    slow.fault = RemoteWriteError("HTTP 503")
    for second in range(5):
        for job in jobs.jobs()[:2]:
            job.run(NOW_MS + second * SECOND)
        scrape(store, NOW_MS + second * SECOND)
    assert len(quick.instants()) == 4
    assert slow.instants() == []
    slow.fault = None
    jobs.send("slow", NOW_MS + MINUTE)
    assert len(slow.instants()) == 5


def test_while_a_receiver_is_away_samples_wait_and_are_sent_in_their_order(store, receiver, caplog):
    troubles = Troubles()
    jobs = upkeep(store, receiver, troubles=troubles)
    jobs.send("mimir", NOW_MS)
    receiver.fault = RemoteWriteError("cannot send: HTTP 503")
    for second in range(120):
        scrape(store, NOW_MS + second * SECOND)
        jobs.send("mimir", NOW_MS + second * SECOND)
    assert 5 < len(receiver.requests) < 15, "it waits longer and longer"
    assert troubles.present["remote_write mimir"] == "cannot send: HTTP 503"
    assert own(store, "failing", NOW_MS + 120 * SECOND) == [("mimir", 1.0)]
    receiver.fault = None
    jobs.send("mimir", NOW_MS + 200 * SECOND)
    assert receiver.instants() == [NOW_MS + second * SECOND for second in range(120)]
    assert troubles.present == {}
    assert own(store, "failing", NOW_MS + 200 * SECOND) == [("mimir", 0.0)]
    said = [record.levelno for record in caplog.records if "mimir" in record.getMessage()]
    assert said == [logging.WARNING]


def test_rows_that_are_refused_are_left_out_and_counted_alone(store, receiver):
    jobs = upkeep(store, receiver)
    jobs.send("mimir", NOW_MS)
    for second in range(10):
        scrape(store, NOW_MS + second * SECOND)
    receiver.refused_at_ms = {NOW_MS + 3 * SECOND, NOW_MS + 7 * SECOND}
    jobs.send("mimir", NOW_MS + 10 * SECOND)
    assert receiver.instants() == [NOW_MS + s * SECOND for s in range(10) if s not in {3, 7}]
    assert own(store, "dropped_samples_total", NOW_MS + MINUTE) == [("mimir", 4.0)]


def test_what_waits_longer_than_the_spool_is_given_up_and_counted(store, receiver):
    troubles = Troubles()
    jobs = upkeep(store, receiver, spool_ms=HOUR_MS, troubles=troubles)
    jobs.send("mimir", NOW_MS)
    receiver.fault = RemoteWriteError("HTTP 503")
    for minute in range(120):
        scrape(store, NOW_MS + minute * MINUTE)
    jobs.send("mimir", NOW_MS + 30 * MINUTE)
    receiver.fault = None
    jobs.send("mimir", NOW_MS + 119 * MINUTE)
    assert receiver.instants() == [NOW_MS + minute * MINUTE for minute in range(59, 120)]
    assert own(store, "dropped_samples_total", NOW_MS + DAY)[0][1] >= 2 * 59


def test_rows_that_are_sealed_wait_for_the_receiver_all_the_same(store, receiver, tmp_path):
    jobs = upkeep(store, receiver)
    jobs.send("mimir", NOW_MS)
    receiver.fault = RemoteWriteError("HTTP 503")
    for minute in range(5 * 60):
        scrape(store, NOW_MS + minute * MINUTE)
    store.seal(NOW_MS + 5 * HOUR_MS)
    of_nvml = "JOIN target ON target.id = target WHERE name = 'nvml'"
    assert plain(tmp_path, f"SELECT count(*) FROM frame {of_nvml}") == [(4,)]
    assert plain(tmp_path, f"SELECT count(*) FROM hot {of_nvml}") == [(300,)]
    receiver.fault = None
    jobs.send("mimir", NOW_MS + 5 * HOUR_MS)
    assert receiver.instants() == [NOW_MS + minute * MINUTE for minute in range(5 * 60)]
    store.save(NOTHING, NOW_MS + 5 * HOUR_MS)
    store.seal(NOW_MS + 5 * HOUR_MS)
    assert plain(tmp_path, "SELECT min(at_ms) FROM hot") == [(NOW_MS + 4 * HOUR_MS,)]


def test_a_receiver_that_is_no_longer_wanted_holds_no_rows_back(store, receiver, tmp_path):
    upkeep(store, receiver).send("mimir", NOW_MS)
    for minute in range(3 * 60):
        scrape(store, NOW_MS + minute * MINUTE)
    store.go_by(StoreSettings(min_free=Size(0)), HOUR_MS)
    store.seal(NOW_MS + 5 * HOUR_MS)
    assert plain(tmp_path, "SELECT count(*) FROM hot") == [(0,)]


def test_a_store_without_a_disk_sends_nothing_on(receiver):
    with closing(Store(HOUR_MS)) as store:
        scrape(store, NOW_MS)
        upkeep(store, receiver).send("mimir", NOW_MS)
        assert store.seal(NOW_MS) == 0
    assert receiver.requests == []


def test_a_receiver_on_the_network_gets_it_by_http(store):
    pytest.importorskip("cramjam")
    pytest.importorskip("google.protobuf")
    bodies = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(204)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *given):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        settings = RemoteWriteSettings(name="mimir", url=f"http://127.0.0.1:{server.server_address[1]}/write")
        import requests

        with requests.Session() as session:
            jobs = upkeep(store, remote_write.RemoteWriter(settings, session))
            jobs.send("mimir", NOW_MS)
            scrape(store, NOW_MS)
            jobs.send("mimir", NOW_MS + SECOND)
        server.shutdown()
        thread.join()
    import cramjam

    (body,) = bodies
    plain_body = bytes(cramjam.snappy.decompress_raw(body))
    assert b"gpu_power_draw_watts" in plain_body


# Pruning


def message(name, **more):
    return Notification(
        id=name, receiver="slack", body="{}", created_at_ms=NOW_MS, next_attempt_at_ms=0, **more
    )


def test_news_of_a_day_ago_is_given_up(store, receiver):
    store.save(Changes(notifications=[message("a"), message("b", sent_at_ms=NOW_MS)]), NOW_MS)
    jobs = upkeep(store, receiver, receivers=("slack",))
    jobs.prune(NOW_MS + HOUR_MS)
    assert [n.id for n in store.unsent("slack")] == ["a"]
    jobs.prune(NOW_MS + 2 * DAY)
    assert store.unsent("slack") == []
    assert [n.id for n in store.notifications() if n.gave_up_at_ms is not None] == ["a"]


def test_samples_beyond_their_retention_are_deleted_and_hours_are_kept_longer(
    tmp_path, receiver, monkeypatch
):
    monkeypatch.setattr(sealer, "run", lambda path, *given: list(sealing.seal(path, *given)))
    from gpuwatch.config import Duration

    kept = {"retention": Duration(DAY), "hourly_retention": Duration(3 * DAY)}
    with closing(opened(tmp_path, **kept)) as store:
        for hour in range(5 * 24):
            scrape(store, NOW_MS + hour * HOUR_MS)
        now_ms = NOW_MS + 5 * DAY
        store.seal(now_ms)
        upkeep(store, receiver).prune(now_ms)
        assert plain(tmp_path, "SELECT min(from_ms) FROM frame") == [(now_ms - DAY,)]
        assert plain(tmp_path, "SELECT min(hour_ms) FROM hourly") == [(now_ms - 3 * DAY,)]


def test_layouts_and_series_that_are_gone_are_forgotten(store, receiver, tmp_path):
    for n in range(50):
        store.append("vllm", NOW_MS + n, [Labels.of("request", id=str(n))], [1.0])
        store.save(NOTHING, NOW_MS + n)
    jobs = upkeep(store, receiver)
    store.seal(NOW_MS + 3 * HOUR_MS)
    jobs.prune(NOW_MS + 3 * HOUR_MS)
    assert plain(tmp_path, "SELECT count(*) FROM layout") == [(1,)], "that of the frame"
    scrape(store, NOW_MS + 4 * HOUR_MS)
    jobs.prune(NOW_MS + 40 * DAY)
    assert plain(tmp_path, "SELECT count(*) FROM layout") == [(1,)], "that of the rows"


# Sealing


def test_the_job_seals_what_no_rule_looks_back_on(store, receiver, tmp_path):
    for minute in range(5 * 60):
        scrape(store, NOW_MS + minute * MINUTE)
    seal = next(job for job in upkeep(store, receiver).jobs() if job.name == "seal")
    assert seal.run(NOW_MS + 5 * HOUR_MS - MINUTE) == 3
    assert plain(tmp_path, "SELECT max(to_ms) FROM frame") == [(NOW_MS + 3 * HOUR_MS - MINUTE,)]
    assert plain(tmp_path, "SELECT min(at_ms) FROM hot") == [(NOW_MS + 3 * HOUR_MS,)]
    (power,) = store.select([Matcher("__name__", "=", POWER.metric)], 0, NOW_MS + DAY)
    assert power.at_ms[-60:] == [NOW_MS + 4 * HOUR_MS + minute * MINUTE for minute in range(60)]


def test_while_metrics_cannot_be_opened_the_jobs_say_so(tmp_path, receiver):
    opened(tmp_path).close()
    (tmp_path / METRICS_DB).unlink()
    (tmp_path / METRICS_DB).mkdir()
    with closing(opened(tmp_path)) as store:
        jobs = upkeep(store, receiver)
        for job in jobs.jobs():
            with pytest.raises(StoreError, match=r"metrics\.db"):
                job.run(NOW_MS)
