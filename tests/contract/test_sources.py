"""What every source keeps to, and how the two that speak HTTP take whatever a server does."""

import math
import socket
import threading
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from tests.fake_nvml import GIB, FakeNvml

from gpuwatch import config, sources
from gpuwatch.catalogue import CATALOGUE
from gpuwatch.errors import SourceError
from gpuwatch.records import MetricKind
from gpuwatch.sources import (
    EventSource,
    HealthSource,
    HostSource,
    MetricsSource,
    NvmlSource,
    NvmlStaticSource,
    Trees,
)
from gpuwatch.sources.record import Recorder

H200 = Path(__file__).parents[1] / "recordings" / "h200-vllm024-incidents.jsonl.xz"
PAGE = '# HELP vllm:x y\nvllm:num_requests_running{engine="0"} 3.0\nvllm:x_created 5\nvllm:nan NaN\n'
NOW_MS = 1_800_000_000_000
LATEST_MS = NOW_MS + 10_000


class Vllm(ThreadingHTTPServer):
    """A server on loopback; `answer` maps a path to what it does with a request handler."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer = {"/health": reply(200), "/metrics": reply(200, PAGE.encode())}
        self.requests = []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        """A client that goes away is what some of these tests are about."""


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append((self.path, dict(self.headers)))
        self.server.answer[self.path](self)

    def log_message(self, *args):
        pass


def reply(status, body=b"", **headers):
    def answer(handler):
        handler.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def reset(handler):
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    handler.connection.close()


def garbage(handler):
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")


@pytest.fixture
def vllm():
    with Vllm() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def session():
    with sources.local_session() as session:
        yield session


def busy_nvml():
    nvml = FakeNvml(gpus=2)
    nvml.devices[0].processes = [
        (1, "VLLM::EngineCore", GIB),
        (1, "VLLM::EngineCore", GIB),
        (2, "python3", GIB),
    ]
    nvml.devices[1].lost = True
    return nvml


def live_sources(vllm, session, tmp_path):
    nvml = busy_nvml()
    return [
        NvmlSource(nvml, names=nvml),
        NvmlStaticSource(nvml),
        EventSource(nvml),
        HostSource(tmp_path),
        MetricsSource("a", vllm.url, session),
        HealthSource("a", vllm.url, session),
    ]


def check(samples, now_ms):
    labels = [s.labels for s in samples]
    assert len(set(labels)) == len(labels), "a series twice in one read"
    for sample in samples:
        assert sample.at_ms == now_ms
        assert isinstance(sample.value, float)
        assert not math.isnan(sample.value)
        check_catalogue(sample)


def check_catalogue(sample):
    """Ours are in the catalogue with these labels; what passes through from a server says whose it is."""
    name = sample.labels.metric
    if name not in CATALOGUE:
        assert sample.labels.get("server")
        assert name.startswith(("vllm:", "python_", "process_", "http_")), name
        return
    assert {k for k, _ in sample.labels} <= {"__name__", *CATALOGUE[name].labels}
    if name.endswith("_ratio"):
        assert 0 <= sample.value <= 1


def test_a_live_source_keeps_the_contract(vllm, session, tmp_path):
    for source in live_sources(vllm, session, tmp_path):
        for now_ms in (NOW_MS, LATEST_MS):
            samples = source.read(now_ms)
            assert samples, source.name
            check(samples, now_ms)


def test_a_played_source_keeps_the_contract():
    recording = sources.open_recording(H200)
    played = recording.sources("a")
    read = dict.fromkeys((s.name for s in played), 0)
    for now_ms in range(recording.start_ms, recording.start_ms + 434_000, 7000):
        for source in played:
            try:
                samples = source.read(now_ms)
            except SourceError:
                continue
            check(samples, now_ms)
            read[source.name] += 1
    assert min(read.values()) > 25


def test_a_source_gives_the_same_series_at_every_read(vllm, session, tmp_path):
    for source in live_sources(vllm, session, tmp_path):
        source.read(NOW_MS)
        first, second = ({s.labels for s in source.read(at_ms)} for at_ms in (NOW_MS + 1000, NOW_MS + 2000))
        # Two reads within a tick of the kernel's clock cannot tell how busy the cores were between them.
        assert {n.metric for n in first ^ second} <= {"host_cpu_ratio"}, source.name


def test_what_is_called_total_is_a_counter_and_nothing_else_is():
    for name, metric in CATALOGUE.items():
        assert (metric.kind is MetricKind.COUNTER) == name.endswith("_total"), name


def test_the_sources_of_a_host_are_named_after_what_they_read():
    settings = config.Settings(servers=[config.ServerSettings(name="a"), config.ServerSettings(name="b")])
    eyes = sources.of_host(settings, Trees())
    names = [eye.name for eye in eyes if eye.name != "kernel"]  # which is there where its log may be read
    of_servers = ["metrics:a", "health:a", "metrics:b", "health:b"]
    assert names == ["nvml", "nvml_static", "events", "host", "processes", "allocator", *of_servers]


def test_a_host_without_a_driver_says_so_and_goes_on(tmp_path):
    nvml = sources.load_nvml()
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        for source in (NvmlSource(nvml), NvmlStaticSource(nvml), EventSource(nvml)):
            with pytest.raises(SourceError, match=r"read NVML: .*driver"):
                source.read(NOW_MS)
    else:
        check(NvmlSource(nvml).read(NOW_MS), NOW_MS)
        check(NvmlStaticSource(nvml).read(NOW_MS), NOW_MS)
        check(EventSource(nvml).read(NOW_MS), NOW_MS)


def test_a_state_folder_that_is_missing_takes_only_its_own_figure(tmp_path):
    metrics = {s.labels.metric for s in HostSource(tmp_path / "absent").read(NOW_MS)}
    assert "host_disk_free_bytes" not in metrics
    assert "host_memory_available_bytes" in metrics


# -- /metrics ----------------------------------------------------------------------------------------


def test_metrics_are_verbatim_with_the_servers_name(vllm, session):
    (sample,) = MetricsSource("a", vllm.url + "/", session).read(NOW_MS)
    assert str(sample.labels) == 'vllm:num_requests_running{engine="0",server="a"}'
    assert sample.value == 3


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (reply(404), "HTTP 404; is this vLLM's address"),
        (reply(503), "HTTP 503"),
        (reply(307, Location="/health"), "HTTP 307"),
        (reply(200, b"<html>"), "line 1 is not Prometheus' text format"),
        (reply(200, b"x \xff"), "not UTF-8"),
        (reply(200, b"#" * (16 * 1024 * 1024 + 1)), "larger than 16 MiB"),
        (reset, "the connection broke"),
        (reply(200, b"x 1", **{"Content-Length": "99"}), "ChunkedEncodingError|ConnectionError|broke"),
    ],
)
def test_a_page_that_cannot_be_used_is_a_source_error(vllm, session, answer, why):
    vllm.answer["/metrics"] = answer
    with pytest.raises(SourceError, match=why):
        MetricsSource("a", vllm.url, session).read(NOW_MS)


def test_a_server_that_is_not_there_is_a_source_error_for_metrics(session):
    with pytest.raises(SourceError, match="connection refused; the server is not running"):
        MetricsSource("a", refused_url(), session).read(NOW_MS)


# -- /health -----------------------------------------------------------------------------------------


def refused_url():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}"


def health(url, session, timeout_s=5.0):
    source = HealthSource("a", url, session, timeout_s=timeout_s)
    return {s.labels.metric.removeprefix("server_health_"): s.value for s in source.read(NOW_MS)}


@pytest.mark.parametrize(
    ("answer", "ok"),
    [(reply(200), 1), (reply(503), 0), (reply(404), 0), (reply(307, Location="/x"), 0), (reset, 0)],
)
def test_only_200_is_healthy(vllm, session, answer, ok):
    vllm.answer["/health"] = answer
    figures = health(vllm.url, session)
    assert (figures["ok"], figures["timeout"]) == (ok, 0)
    assert 0 <= figures["seconds"] < 5


def test_a_refused_connection_is_not_healthy(session):
    figures = health(refused_url(), session)
    assert (figures["ok"], figures["timeout"]) == (0, 0)


def test_a_late_answer_is_no_verdict(vllm, session):
    release = threading.Event()
    vllm.answer["/health"] = lambda _: release.wait(5)
    figures = health(vllm.url, session, timeout_s=0.1)
    release.set()
    assert "ok" not in figures
    assert figures["timeout"] == 1
    assert figures["seconds"] >= 0.1


def test_what_says_nothing_about_the_server_is_a_source_error(vllm, session):
    vllm.answer["/health"] = garbage
    with pytest.raises(SourceError, match="check its url"):
        health(vllm.url, session)
    with pytest.raises(SourceError, match="check its url"):
        health("http://name.invalid:1", session)


@pytest.mark.parametrize("address", [None, "name.invalid:1", "[::1", "127.0.0.1:bad"])
@pytest.mark.parametrize("kind", [MetricsSource, HealthSource])
def test_credentials_of_a_url_are_in_no_error(vllm, session, kind, address):
    vllm.answer |= {
        "/metrics": reply(404),
        "/health": garbage,
    }
    url = f"http://ann:s3cret@{address or vllm.url.removeprefix('http://')}"
    with pytest.raises(SourceError) as caught:
        kind("a", url, session).read(NOW_MS)
    assert "s3cret" not in "".join(traceback.format_exception(caught.value))


def test_no_proxy_is_used(vllm, session, monkeypatch):
    monkeypatch.setenv("http_proxy", refused_url())
    monkeypatch.setenv("HTTP_PROXY", refused_url())
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    assert health(vllm.url, session)["ok"] == 1


def test_every_request_has_a_connection_of_its_own(vllm, session):
    health(vllm.url, session)
    assert [headers["Connection"] for _, headers in vllm.requests] == ["close"]


# -- recording a real server --------------------------------------------------------------------------


def test_a_recorded_server_plays_as_it_was(vllm, tmp_path):
    path, nvml = tmp_path / "r.jsonl.gz", FakeNvml()
    with Recorder(path, nvml, {"a": vllm.url}, state_dir=tmp_path, names=nvml) as recorder:
        for second in range(4):
            if second == 2:
                vllm.answer = {"/health": reply(503), "/metrics": reply(404)}
            recorder.tick(second * 1000)
    assert [path for path, _ in vllm.requests].count("/metrics") == 2
    eyes = {s.name: s for s in sources.open_recording(path).sources("a")}
    for second in (0, 1):
        assert len(eyes["metrics:a"].read(second * 1000)) == 1
        assert verdict(eyes["health:a"], second * 1000) == 1
    for second in (2, 3):
        with pytest.raises(SourceError, match="HTTP 404"):
            eyes["metrics:a"].read(second * 1000)
        assert verdict(eyes["health:a"], second * 1000) == 0


def test_recorded_xids_play_as_they_came_whatever_else_was_read_between(tmp_path):
    path, nvml = tmp_path / "r.jsonl", FakeNvml(gpus=2)
    happens = {2: [(0, 31)], 3: [(1, 137), (1, 79)], 6: [(0, 31), (0, 31)]}
    live = EventSource(nvml)
    with Recorder(path, nvml, {}, state_dir=tmp_path, names=nvml) as recorder:
        was = []
        for second in range(10):
            for index, xid in happens.get(second, ()):
                nvml.xid(index, xid)
            nvml.devices[1].lost = second >= 3
            recorder.tick(second * 1000)
            was.append(xid_counts(live, second * 1000))
    recording = sources.open_recording(path)
    played = {s.name: s for s in recording.sources()}
    is_now = []
    for second in range(10):
        recording.seek(second * 1000)
        is_now.append(xid_counts(played["events"], second * 1000))
    assert is_now == was
    assert {key: value for key, value in was[-1].items() if value} == {
        ("0", "31"): 3,
        ("1", "137"): 1,
        ("1", "79"): 1,
    }


def test_events_of_a_tick_that_nobody_read_are_not_missed(tmp_path):
    path, nvml = tmp_path / "r.jsonl", FakeNvml()
    with Recorder(path, nvml, {}, state_dir=tmp_path, names=nvml) as recorder:
        for second in range(5):
            if second in {1, 2}:
                nvml.xid(0, 48)
            recorder.tick(second * 1000)
    played = next(s for s in sources.open_recording(path).sources() if s.name == "events")
    assert [xid_counts(played, at_ms)["0", "48"] for at_ms in (0, 4000)] == [0, 2]


def test_a_recorder_that_heard_of_no_events_plays_no_counters(tmp_path):
    path, nvml = tmp_path / "r.jsonl", FakeNvml()
    nvml.unsupported = {"nvmlEventSetCreate"}
    with Recorder(path, nvml, {}, state_dir=tmp_path, names=nvml) as recorder:
        recorder.tick(0)
    played = next(s for s in sources.open_recording(path).sources() if s.name == "events")
    assert played.read(0) == []


def xid_counts(source, now_ms):
    return {
        (s.labels.get("gpu"), s.labels.get("xid") or s.labels.get("kind")): s.value
        for s in source.read(now_ms)
    }


def verdict(source, now_ms):
    return next(s.value for s in source.read(now_ms) if s.labels.metric == "server_health_ok")
