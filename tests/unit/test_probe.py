"""What a server is asked beyond its metrics: a stand-in process that behaves, and servers that do not."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import requests

from gpuwatch import sources
from gpuwatch.records import Labels
from gpuwatch.sources.probe import METRICS, ProbeSource

STANDIN = Path(__file__).parents[1] / "standin_vllm.py"
NOW_MS = 1_800_000_000_000
MODELS = json.dumps({"data": [{"id": "m"}]})
BOTH = {"is_paused", "canary"}


@pytest.fixture
def session():
    with sources.local_session() as session:
        yield session


def figures(samples):
    assert {s.at_ms for s in samples} <= {NOW_MS}
    assert {s.labels.get("server") for s in samples} <= {"qwen"}
    return {s.labels.metric: s.value for s in samples}


def asked(probe, *wants, now_ms=NOW_MS):
    probe.ask(wants)
    return {s.labels.metric: s.value for s in probe.read(now_ms)}


# -- a server that behaves ---------------------------------------------------------------------------------


class StandIn:
    def __init__(self, folder):
        port_file = folder / "port"
        command = [sys.executable, str(STANDIN), "--port", "0", "--port-file", str(port_file)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        first = self.process.stdout.readline()
        self.engine = int(first.rpartition("=")[2])
        while not (port_file.exists() and port_file.read_text()):
            time.sleep(0.01)
        self.url = f"http://127.0.0.1:{port_file.read_text()}"

    def post(self, path):
        return requests.post(self.url + path, timeout=50)


@pytest.fixture
def standin(tmp_path):
    server = StandIn(tmp_path)
    yield server
    os.kill(server.engine, signal.SIGCONT)
    server.process.terminate()
    server.process.wait(10)
    server.process.stdout.close()


def test_nothing_is_asked_that_was_not_wanted(standin, session):
    probe = ProbeSource("qwen", standin.url, session)
    assert probe.read(NOW_MS) == []
    assert figures(ask_both(probe)).keys() == {"server_paused", "server_canary_ok", "server_canary_seconds"}
    assert probe.read(NOW_MS) == [], "once"


def ask_both(probe):
    probe.ask(BOTH)
    return probe.read(NOW_MS)


def test_a_server_that_works_gives_a_token(standin, session):
    seen = asked(ProbeSource("qwen", standin.url, session), "canary")
    assert (seen["server_paused"], seen["server_canary_ok"]) == (0, 1)
    assert 0 <= seen["server_canary_seconds"] < 5
    assert seen.keys() == {metric.name for metric in METRICS}


def test_a_question_about_a_pause_costs_no_token(standin, session):
    assert asked(ProbeSource("qwen", standin.url, session), "is_paused") == {"server_paused": 0}
    page = requests.get(standin.url + "/metrics", timeout=5).text
    assert 'iteration_tokens_total_count{engine="0",model_name="standin"} 0.0' in page


def test_a_paused_server_says_so_and_gets_no_canary_to_hold(standin, session):
    probe = ProbeSource("qwen", standin.url, session)
    standin.post("/pause?mode=keep")
    assert asked(probe, *BOTH) == {"server_paused": 1}
    standin.post("/resume")
    assert asked(probe, *BOTH)["server_canary_ok"] == 1


def test_an_engine_that_hangs_answers_neither_and_the_read_ends_in_time(standin, session):
    probe = ProbeSource("qwen", standin.url, session, canary_timeout_s=0.5)
    os.kill(standin.engine, signal.SIGSTOP)
    began = time.monotonic()
    seen = asked(probe, *BOTH)
    assert (seen["server_paused"], seen["server_canary_ok"]) == (0, 0)
    assert 0.5 <= seen["server_canary_seconds"] < 8
    assert time.monotonic() - began < 15
    os.kill(standin.engine, signal.SIGCONT)
    assert asked(ProbeSource("qwen", standin.url, session), *BOTH)["server_canary_ok"] == 1


def test_the_load_is_what_the_api_holds_while_its_engine_hangs(standin, session):
    source = sources.MetricsSource("qwen", standin.url, session)
    until_in_flight(source, 0)
    os.kill(standin.engine, signal.SIGSTOP)
    clients = [threading.Thread(target=standin.post, args=("/v1/completions",)) for _ in range(3)]
    for client in clients:
        client.start()
    until_in_flight(source, 3)
    os.kill(standin.engine, signal.SIGCONT)
    for client in clients:
        client.join()
    until_in_flight(source, 0)


def until_in_flight(source, count):
    """A look that a busy host does not answer within a second tells nothing."""
    end = time.monotonic() + 20
    labels = Labels.of("server_requests_in_flight", server="qwen", source="load")
    while {s.labels: s.value for s in source.read(NOW_MS)}.get(labels) != count:
        assert time.monotonic() < end


# -- servers of all sorts ------------------------------------------------------------------------------------


class Odd(ThreadingHTTPServer):
    """`answers` maps a path to (status, body), or to what to do with the handler; others are not found."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), OddHandler)
        self.answers = {"/v1/models": (200, MODELS), "/is_paused": (200, '{"is_paused": false}')}
        self.requests = []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def paths(self):
        return [path for path, _, _ in self.requests]

    def handle_error(self, request, client_address):
        """A client that goes away is what some of these tests are about."""


class OddHandler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.reply(None)

    def do_POST(self):
        self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def reply(self, body):
        self.server.requests.append((self.path, body, self.headers.get("Authorization")))
        answer = self.server.answers.get(self.path, (404, "{}"))
        if callable(answer):
            answer(self)
            return
        status, text = answer
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def odd():
    with Odd() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def reset(handler):
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
    handler.connection.close()


def drip(handler):
    handler.send_response(200)
    handler.end_headers()
    with contextlib.suppress(OSError):
        for _ in range(80):
            handler.wfile.write(b" ")
            time.sleep(0.1)


def test_a_canary_is_one_token_of_the_first_model(odd, session):
    odd.answers["/v1/completions"] = (200, "{}")
    assert asked(ProbeSource("qwen", odd.url + "/", session), "canary")["server_canary_ok"] == 1
    assert odd.paths() == ["/is_paused", "/v1/models", "/v1/completions"]
    body = odd.requests[-1][1]
    assert body == {"model": "m", "prompt": [1], "max_tokens": 1, "temperature": 0}


@pytest.mark.parametrize("status", [400, 404, 501])
@pytest.mark.parametrize("path", ["/pooling", "/v1/embeddings"])
def test_a_model_that_gives_no_tokens_is_asked_for_what_it_gives_from_then_on(odd, session, path, status):
    odd.answers |= dict.fromkeys(["/v1/completions", "/pooling", "/v1/embeddings"], (status, "{}"))
    odd.answers[path] = (200, "{}")
    probe = ProbeSource("qwen", odd.url, session)
    assert asked(probe, "canary")["server_canary_ok"] == 1
    odd.requests.clear()
    assert asked(probe, "canary")["server_canary_ok"] == 1
    assert odd.paths() == ["/is_paused", "/v1/models", path]
    assert odd.requests[-1][1] == {"model": "m", "input": [1]}


@pytest.mark.parametrize("status", [401, 403, 429, 500, 503])
def test_a_server_that_refuses_says_nothing_and_is_left_alone_for_a_minute(odd, session, status, caplog):
    odd.answers["/v1/completions"] = (status, "{}")
    probe = ProbeSource("qwen", odd.url, session)
    assert asked(probe, "canary") == {"server_paused": 0}
    assert asked(probe, "canary", now_ms=NOW_MS + 59_000) == {"server_paused": 0}
    assert odd.paths().count("/v1/completions") == 1
    assert asked(probe, "canary", now_ms=NOW_MS + 60_000) == {"server_paused": 0}
    assert odd.paths().count("/v1/completions") == 2
    assert [record.message for record in caplog.records if "canary" in record.message] == [
        f"canary of server 'qwen': HTTP {status}"
        + ("; set api_key_file of the server" if status in {401, 403} else "")
    ]


def test_a_server_without_a_way_to_ask_says_nothing(odd, session, caplog):
    assert asked(ProbeSource("qwen", odd.url, session), "canary") == {"server_paused": 0}
    assert odd.paths()[-3:] == ["/v1/completions", "/pooling", "/v1/embeddings"]
    assert "neither tokens nor embeddings" in caplog.text


NO_MODELS = {
    "not found": (404, "{}"),
    "no JSON": (200, "<html>"),
    "no list": (200, '{"data": 3}'),
    "none": (200, '{"data": []}'),
    "too deep": (200, "[" * 100_000),
    "reset": reset,
}


@pytest.mark.parametrize("answer", NO_MODELS.values(), ids=NO_MODELS.keys())
def test_without_a_model_no_canary_is_sent(odd, session, answer):
    odd.answers["/v1/models"] = answer
    assert asked(ProbeSource("qwen", odd.url, session), "canary") == {"server_paused": 0}
    assert odd.paths() == ["/is_paused", "/v1/models"]


def test_a_canary_that_is_cut_off_says_nothing(odd, session):
    odd.answers["/v1/completions"] = reset
    assert asked(ProbeSource("qwen", odd.url, session), "canary") == {"server_paused": 0}


PAUSES = {
    "yes": ((200, '{"is_paused": true}'), 1),
    "no": ((200, '{"is_paused": false}'), 0),
    "not in development mode": ((404, "{}"), 0),
    "an error": ((500, '{"error": "dead"}'), 0),
    "no JSON": ((200, "true"), 0),
    "another word": ((200, '{"is_paused": "maybe"}'), 0),
    "reset": (reset, 0),
    "without end": (drip, 0),
}


@pytest.mark.parametrize(("answer", "value"), PAUSES.values(), ids=PAUSES.keys())
def test_who_is_paused_says_so(odd, session, answer, value):
    odd.answers["/is_paused"] = answer
    began = time.monotonic()
    assert asked(ProbeSource("qwen", odd.url, session), "is_paused") == {"server_paused": value}
    assert time.monotonic() - began < 4


def test_a_server_that_is_gone_says_nothing(session):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    assert asked(ProbeSource("qwen", url, session), *BOTH) == {"server_paused": 0}


def test_the_key_is_read_each_time_sent_where_it_is_needed_and_never_told(odd, session, tmp_path, caplog):
    key = tmp_path / "key"
    key.write_text("sk-one\n")
    odd.answers["/v1/completions"] = (401, "{}")
    probe = ProbeSource("qwen", odd.url, session, key_file=key)
    asked(probe, "canary")
    sent = {path: authorization for path, _, authorization in odd.requests}
    assert sent == {"/is_paused": None, "/v1/models": "Bearer sk-one", "/v1/completions": "Bearer sk-one"}
    key.write_text("sk-two")
    odd.answers["/v1/completions"] = (200, "{}")
    assert asked(probe, "canary", now_ms=NOW_MS + 60_000)["server_canary_ok"] == 1
    assert odd.requests[-1][2] == "Bearer sk-two"
    assert "sk-" not in caplog.text


def test_without_its_key_file_no_canary_is_sent(odd, session, tmp_path, caplog):
    probe = ProbeSource("qwen", odd.url, session, key_file=tmp_path / "none")
    assert asked(probe, "canary") == {"server_paused": 0}
    assert odd.paths() == ["/is_paused"]
    assert "FileNotFoundError" in caplog.text


def test_what_is_wanted_again_while_a_read_goes_on_is_answered_by_it(odd, session):
    probe = ProbeSource("qwen", odd.url, session)

    def answer(handler):
        probe.ask(BOTH)
        handler.send_response(200)
        handler.end_headers()

    odd.answers["/v1/completions"] = answer
    assert asked(probe, "canary")["server_canary_ok"] == 1
    assert probe.read(NOW_MS) == []
    assert odd.paths().count("/v1/completions") == 1
