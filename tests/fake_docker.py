"""A Docker engine on a Unix socket that behaves: its containers are real processes.

What it does is what moby's sources and Docker's documentation say of 28.x: a `stop` waits, a `kill` with the
stop signal or KILL sets the restart policy aside, 256 events of all containers are kept.
"""

import collections
import contextlib
import datetime as dt
import json
import os
import re
import secrets
import signal
import socket
import socketserver
import subprocess
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

NEVER = "0001-01-01T00:00:00Z"
MOST_EVENTS = 256


def rfc3339(ns):
    whole = dt.datetime.fromtimestamp(ns // 10**9, dt.UTC)
    return f"{whole:%Y-%m-%dT%H:%M:%S}.{ns % 10**9:09}".rstrip("0").rstrip(".") + "Z"


def nanoseconds(text):
    whole, _, fraction = text.partition(".")
    return int(whole) * 10**9 + int(f"{fraction:0<9}"[:9])


def wait_until_empty(lines):
    while lines:
        time.sleep(0.01)


class RefusalError(Exception):
    def __init__(self, status, message):
        super().__init__(message)
        self.status = status


class FakeContainer:
    """One container; `command` runs as the leader of a session, which ends with it as its namespace would."""

    def __init__(self, engine, name, command, **options):
        self.engine = engine
        self.id = secrets.token_hex(32)
        self.name = name
        self.command = command
        self.env = options.pop("env", {})
        self.cwd = options.pop("cwd", None)
        self.labels = options.pop("labels", {})
        self.policy = options.pop("policy", "no")
        self.stop_signal = options.pop("stop_signal", "")
        self.has_terminal = options.pop("has_terminal", False)
        self.restart_after_s = options.pop("restart_after_s", 0.1)
        assert not options
        self.status = "created"
        self.started_at = self.finished_at = NEVER
        self.exit_code = self.restarts = self.starts = self.stops = 0
        self.oom_killed = False
        self.error = self.start_error = ""
        self.stop_hangs_for_s = 0.0
        self.said = []  # (ns, stream, line)
        self.process = None
        self._policy_is_off = False
        self._is_over = threading.Event()
        self._is_over.set()

    def start(self):
        if self.status in {"running", "paused"}:
            raise RefusalError(304, "it runs already")
        self.starts += 1
        if self.start_error:
            self.error, self.exit_code = self.start_error, 128
            self.status = "exited"
            raise RefusalError(500, self.start_error)
        self._policy_is_off, self.error, self.oom_killed = False, "", False
        self._is_over.clear()
        self.process = subprocess.Popen(
            self.command,
            env=self.env,
            cwd=self.cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.started_at, self.status = rfc3339(time.time_ns()), "running"
        self.engine.note(self, "start")
        readers = [
            threading.Thread(target=self._read, args=(number, stream), daemon=True)
            for number, stream in ((1, self.process.stdout), (2, self.process.stderr))
        ]
        for thread in (
            *readers,
            threading.Thread(target=self._wait, args=(self.process, readers), daemon=True),
        ):
            thread.start()

    def kill(self, name):
        if self.status not in {"running", "paused", "restarting"}:
            raise RefusalError(409, f"container {self.id} is not running")
        number = int(name) if name.isdigit() else signal.Signals[f"SIG{name.removeprefix('SIG')}"].value
        if number == signal.SIGKILL or not self.stop_signal or signal.Signals[self.stop_signal] == number:
            self._policy_is_off = True
        if self.status == "restarting":
            self._ended("exited")
            return
        self.engine.note(self, "kill", signal=str(number))
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, number)
        if number == signal.SIGKILL:
            self._is_over.wait(10)

    def stop(self, within_s):
        self.stops += 1
        if self.status in {"created", "exited"}:
            raise RefusalError(304, "it is stopped already")
        time.sleep(self.stop_hangs_for_s)
        self.kill(self.stop_signal or "SIGTERM")
        if not self._is_over.wait(within_s):
            with contextlib.suppress(RefusalError):
                self.kill("SIGKILL")
        self.engine.note(self, "stop")

    def age(self, by_s):
        """As if all that happened to it had, so much earlier."""
        by_ns = by_s * 10**9
        start_ns = int(dt.datetime.fromisoformat(self.started_at).timestamp() * 10**9)
        self.started_at = rfc3339(start_ns - by_ns)
        old = [(ns - by_ns * (of == self.id), of, *rest) for ns, of, *rest in self.engine.events]
        self.engine.events.clear()
        self.engine.events.extend(old)

    def _read(self, number, stream):
        with stream:
            for line in stream:
                self.said.append((time.time_ns(), number, line))

    def _wait(self, process, readers):
        status = process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its pid namespace goes with its first process
        for reader in readers:
            reader.join()
        self.exit_code = status if status >= 0 else 128 - status
        self.finished_at = rfc3339(time.time_ns())
        comes_again = not self._policy_is_off and (
            self.policy in {"always", "unless-stopped"} or (self.policy == "on-failure" and self.exit_code)
        )
        self.engine.note(self, "die", exitCode=str(self.exit_code))  # who sees its end finds this too
        self._ended("restarting" if comes_again else "exited")
        if comes_again:
            self.restarts += 1
            time.sleep(self.restart_after_s)
            if self.status == "restarting":
                self.start()

    def _ended(self, status):
        self.status = status
        self._is_over.set()

    def inspected(self):
        has_process = self.status in {"running", "paused"}
        state = {
            "Status": self.status,
            "Running": self.status in {"running", "paused", "restarting"},
            "Paused": self.status == "paused",
            "Restarting": self.status == "restarting",
            "OOMKilled": self.oom_killed,
            "Dead": self.status == "dead",
            "Pid": self.process.pid if has_process else 0,
            "ExitCode": self.exit_code,
            "Error": self.error,
            "StartedAt": self.started_at,
            "FinishedAt": self.finished_at,
        }
        config = {"Labels": self.labels, "Tty": self.has_terminal}
        if self.stop_signal:
            config["StopSignal"] = self.stop_signal
        policy = {"Name": self.policy, "MaximumRetryCount": 0}
        host = {"RestartPolicy": policy, "LogConfig": {"Type": "json-file", "Config": {}}}
        return {
            "Id": self.id,
            "Name": f"/{self.name}",
            "State": state,
            "RestartCount": self.restarts,
            "HostConfig": host,
            "Config": config,
        }

    def listed(self):
        return {"Id": self.id, "Names": [f"/{self.name}"], "Labels": self.labels, "State": self.status}

    def logs(self, query):
        since, until = nanoseconds(query.get("since", "0")), nanoseconds(query.get("until", "0"))
        said = [entry for entry in self.said if entry[0] >= since and (not until or entry[0] <= until)]
        pieces = []
        tail = query.get("tail", "all")
        for ns, number, line in said if tail == "all" else said[-int(tail) :]:
            # The log keeps nine digits, where other times leave zeros at the end out.
            stamp = f"{rfc3339(ns - ns % 10**9)[:-1]}.{ns % 10**9:09}Z "
            text = stamp.encode() + line if query.get("timestamps") == "1" else line
            head = b"" if self.has_terminal else bytes([number, 0, 0, 0]) + len(text).to_bytes(4)
            pieces.append(head + text)
        return b"".join(pieces)


class FakeDocker:
    """The engine. `up` and `down` are its own start and stop; its containers live on, its events do not."""

    def __init__(self, path):
        self.path = path
        self.containers = []
        self.events = collections.deque(maxlen=MOST_EVENTS)
        self.api = ("1.24", "1.50")
        self.calls = []
        self.hangs = False
        self._server = None

    def container(self, name, command, **options):
        made = FakeContainer(self, name, command, **options)
        self.containers.append(made)
        return made

    def note(self, container, action, **attributes):
        self.events.append((time.time_ns(), container.id, action, attributes | {"name": container.name}))

    def up(self):
        class Server(socketserver.UnixStreamServer, ThreadingHTTPServer):
            daemon_threads = True
            engine = self
            request_queue_size = 16

            def __init__(self, *arguments):
                self.lines = set()
                super().__init__(*arguments)

            def server_bind(self):
                socketserver.UnixStreamServer.server_bind(self)

            def process_request(self, request, address):
                self.lines.add(request)
                super().process_request(request, address)

            def shutdown_request(self, request):
                self.lines.discard(request)
                super().shutdown_request(request)

        self._server = Server(str(self.path), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def down(self):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        for line in list(self._server.lines):
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)
        wait_until_empty(self._server.lines)
        self.events.clear()
        self.path.unlink()

    def find(self, name):
        for container in self.containers:
            if name == container.name or container.id.startswith(name):
                return container
        raise RefusalError(404, f"No such container: {name}")

    def answer(self, verb, path, query):
        """Status and body; RefusalError."""
        match verb, path.strip("/").split("/"):
            case "GET", ["version"]:
                return 200, {"Version": "28.2.2", "MinAPIVersion": self.api[0], "ApiVersion": self.api[1]}
            case "GET", ["_ping"]:
                return 200, b"OK"
            case "GET", ["events"]:
                return 200, b"".join(json.dumps(event).encode() + b"\n" for event in self.told(query))
            case "GET", ["containers", "json"]:
                labels = json.loads(query.get("filters", "{}")).get("label", [])
                pairs = [label.partition("=")[::2] for label in labels]
                found = [c for c in self.containers if all(c.labels.get(k) == v for k, v in pairs)]
                return 200, [c.listed() for c in found if query.get("all") == "1" or c.status == "running"]
            case "GET", ["containers", name, "json"]:
                return 200, self.find(name).inspected()
            case "GET", ["containers", name, "logs"]:
                return 200, self.find(name).logs(query)
            case "POST", ["containers", name, "start"]:
                return 204, self.find(name).start()
            case "POST", ["containers", name, "stop"]:
                return 204, self.find(name).stop(float(query.get("t", "10")))
            case "POST", ["containers", name, "kill"]:
                return 204, self.find(name).kill(query.get("signal", "SIGKILL"))
            case _:
                raise RefusalError(404, "page not found")

    def told(self, query):
        """The events that a query without end would wait after; with an end in the past it does not."""
        until = nanoseconds(query["until"])
        time.sleep(max(0.0, (until - time.time_ns()) / 1e9))
        filters, since = json.loads(query.get("filters", "{}")), nanoseconds(query.get("since", "0"))
        for ns, container, action, attributes in list(self.events):
            wanted = all(
                value in filters.get(key, [value])
                for key, value in (("container", container), ("event", action), ("type", "container"))
            )
            if wanted and since <= ns <= until:
                actor = {"ID": container, "Attributes": attributes}
                told = {"Type": "container", "Action": action, "Actor": actor}
                yield told | {"time": ns // 10**9, "timeNano": ns}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.reply("GET")

    def do_POST(self):
        self.reply("POST")

    def reply(self, verb):
        engine = self.server.engine
        while engine.hangs:
            time.sleep(0.05)
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        engine.calls.append(f"{verb} {url.path}")
        try:
            status, body = engine.answer(verb, self.unversioned(url.path), query)
        except RefusalError as refusal:
            status, body = refusal.status, {"message": str(refusal)}
        raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        with contextlib.suppress(BrokenPipeError):
            self.send_response(status)
            self.send_header("Content-Length", "0" if status in {204, 304} else str(len(raw)))
            self.end_headers()
            self.wfile.write(b"" if status in {204, 304} else raw)

    def unversioned(self, path):
        found = re.match(r"/v(\d+)\.(\d+)(/.*)", path)
        if not found:
            return path
        least, most = (tuple(map(int, bound.split("."))) for bound in self.server.engine.api)
        asked = int(found[1]), int(found[2])
        if asked > most:
            limit = self.server.engine.api[1]
            raise RefusalError(400, f"client version is too new. Maximum supported API version is {limit}")
        if asked < least:
            raise RefusalError(400, f"client version is too old. Minimum is {self.server.engine.api[0]}")
        return found[3]

    def log_message(self, *_):
        """Say nothing."""

    def address_string(self):
        return "socket"
