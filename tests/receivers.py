"""Stand-ins that answer as Slack's webhook and DingTalk's robot do: real HTTP on loopback, standard library.

    python -m tests.receivers --slack-port 0 --dingtalk-port 0 --secret SEC… --log FILE

prints their URLs and writes each accepted message as one JSON line until it is ended.
"""

from __future__ import annotations

import argparse
import base64
import collections
import contextlib
import email.utils
import hashlib
import hmac
import json
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

HOUR_S = 3600
KNOWN_BLOCKS = {"header", "section", "context", "divider", "actions", "image"}


class Loopback:
    """HTTP on loopback, answered by `handler` in a thread from the beginning of `with` to its end."""

    path = "/"

    def __init__(self, handler, port=0):
        self._ending = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}{self.path}"

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *exc_info):
        self._ending.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Handler(BaseHTTPRequestHandler):
    """One connection to it; logs nothing."""

    def answer(self, status, text, headers):
        self.send_response_only(status)
        length = {} if status == 204 else {"Content-Length": str(len(text.encode()))}
        for name, value in {**length, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def handle(self):
        with contextlib.suppress(ConnectionError):  # not to wait for us is the client's right
            super().handle()

    def log_message(self, *args):
        pass


class StandIn(Loopback):
    """A subclass judges what is posted. `clock` gives epoch seconds."""

    name = "receiver"

    def __init__(self, port=0, clock=time.time, on_message=None):
        super().__init__(self._handler(), port)
        self.clock = clock
        self.received = []  # accepted payloads, in order of arrival
        self.requests = 0
        self.down = False  # answers 503
        self.hangs_up = False  # takes the message and closes the connection without an answer
        self.slow = 0.0  # seconds before it answers
        self.redirects_to = ""
        self._on_message = on_message
        self._lock = threading.Lock()

    def print_received(self, file=sys.stdout):
        for payload in self.received:
            print(json.dumps(payload, ensure_ascii=False), file=file)

    def judge(self, target, body):
        """(status, body, headers) for a POST to `target`; `accept` what is fine."""
        raise NotImplementedError

    def accept(self, payload):
        self.received.append(payload)
        if self._on_message:
            self._on_message(self.name, payload)

    def _answer(self, target, body):
        with self._lock:
            self.requests += 1
            if self.down:
                return 503, "unavailable", {}
            if self.redirects_to:
                return 302, "", {"Location": self.redirects_to}
            return self.judge(urlsplit(target), body)

    def _handler(stand_in):  # noqa: N805 -- `self` is the handler inside
        class Post(Handler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                status, text, headers = stand_in._answer(self.path, body)
                stand_in._ending.wait(stand_in.slow)
                if stand_in.hangs_up:
                    return
                date = email.utils.formatdate(stand_in.clock(), usegmt=True)
                self.answer(status, text, {"Date": date, **headers})

        return Post


class SlackStandIn(StandIn):
    """An incoming webhook with Slack's checks and answers."""

    name = "slack"
    path = "/services/T0STANDIN/B0STANDIN/x0standinsecret"

    def __init__(self, port=0, **kwargs):
        super().__init__(port, **kwargs)
        self.gone = False  # the webhook was removed
        self.refuses_blocks = False
        self._limited_until = 0.0
        self._limited_s = 0

    def rate_limited(self, seconds):
        """From now on, for `seconds`."""
        self._limited_s, self._limited_until = seconds, self.clock() + seconds

    def judge(self, target, body):
        if self.gone or target.path != self.path:
            return 404, "no_service", {}
        if self.clock() < self._limited_until:
            text = json.dumps({"retry_after": self._limited_s, "ok": False, "error": "rate_limited"})
            return 429, text, {"Retry-After": str(self._limited_s)}
        mistake, payload = self._mistake(body)
        if mistake:
            return 400, mistake, {}
        self.accept(payload)
        return 200, "ok", {}

    def _mistake(self, body):
        try:
            payload = json.loads(body)
        except ValueError:
            return "invalid_payload", None
        if not isinstance(payload, dict):
            return "invalid_payload", None
        blocks = payload.get("blocks", [])
        if not payload.get("text") and not blocks:
            return "no_text", None
        if blocks and (self.refuses_blocks or len(blocks) > 50 or not all(map(_block_is_valid, blocks))):
            return "invalid_blocks", None
        if sum(map(_text_length, blocks)) > 13_200:
            return "msg_blocks_too_long", None
        return "", payload


def _block_is_valid(block):
    kind = block.get("type")
    if kind == "header":
        return _text_fits(block.get("text"), 150, {"plain_text"})
    if kind == "section":
        fields = block.get("fields", [])
        good = "text" not in block or _text_fits(block["text"], 3000)
        return good and ("text" in block or bool(fields)) and len(fields) <= 10 and _all_fit(fields, 2000)
    if kind == "context":
        elements = block.get("elements", [])
        return 1 <= len(elements) <= 10 and _all_fit(elements, 3000)
    return kind in KNOWN_BLOCKS


def _all_fit(texts, limit):
    return all(_text_fits(text, limit) for text in texts)


def _text_fits(text, limit, kinds=frozenset({"plain_text", "mrkdwn"})):
    return isinstance(text, dict) and text.get("type") in kinds and 1 <= len(text.get("text", "")) <= limit


def _text_length(block):
    texts = [block.get("text"), *block.get("fields", []), *block.get("elements", [])]
    return sum(len(text["text"]) for text in texts if text)


class DingTalkStandIn(StandIn):
    """A custom robot that demands a signature and the keyword `gpuwatch`; always answers HTTP 200."""

    name = "dingtalk"
    path = "/robot/send"
    token = "0standintoken"
    keyword = "gpuwatch"

    def __init__(self, secret, port=0, **kwargs):
        super().__init__(port, **kwargs)
        self.secret = secret
        self.url += f"?access_token={self.token}"
        self.busy = False  # answers -1
        self.over_quota = False
        self.body_max_bytes = 20_000
        self._tried_s = collections.deque()
        self._silent_until = 0.0

    def judge(self, target, body):
        errcode, errmsg, payload = self._verdict(parse_qs(target.query), body)
        if errcode == 0:
            self.accept(payload)
        text = json.dumps({"errcode": errcode, "errmsg": errmsg}, ensure_ascii=False)
        return 200, text, {"Content-Type": "application/json"}

    def _verdict(self, query, body):
        if query.get("access_token") != [self.token]:
            return 300001, "token is not exist", None
        if self.busy:
            return -1, "system busy", None
        if self.over_quota:
            return 90030, "webhook over limit", None
        if self._is_too_fast():
            return 130101, "send too fast, exceed 20 times per minute", None
        if self.secret and (what := self._signature_fault(query)):
            return 310000, what, None
        if len(body) > self.body_max_bytes:
            return 460101, "message too long, exceed 20000 bytes", None
        return self._payload_verdict(body)

    def _payload_verdict(self, body):
        try:
            payload = json.loads(body.decode("utf-8"))
            title, text = (payload[payload["msgtype"]][key] for key in ("title", "text"))
        except (ValueError, KeyError, TypeError):
            return 40035, "invalid parameter", None
        if self.keyword not in title and self.keyword not in text:
            return 310000, "keywords not in content", None
        return 0, "ok", payload

    def _signature_fault(self, query):
        timestamp = query.get("timestamp", [""])[0]
        if not timestamp.isdigit() or abs(int(timestamp) / 1000 - self.clock()) > HOUR_S:
            return "invalid timestamp"
        key, said = self.secret.encode(), f"{timestamp}\n{self.secret}".encode()
        wanted = base64.b64encode(hmac.new(key, said, hashlib.sha256).digest()).decode()
        return "" if query.get("sign") == [wanted] else "sign not match"

    def _is_too_fast(self):
        now = self.clock()
        while self._tried_s and self._tried_s[0] <= now - 60:
            self._tried_s.popleft()
        self._tried_s.append(now)
        if now >= self._silent_until and len(self._tried_s) > 20:
            self._silent_until = now + 600
        return now < self._silent_until


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--slack-port", type=int, default=0)
    parser.add_argument("--dingtalk-port", type=int, default=0)
    parser.add_argument("--secret", default="", help="the robot's signing secret; empty: it does not check")
    parser.add_argument("--log", type=Path, help="append to this file; default: standard output")
    options = parser.parse_args()
    log = options.log.open("a", encoding="utf-8") if options.log else sys.stdout

    def write(receiver, payload):
        line = {"receiver": receiver, "at_ms": time.time_ns() // 1_000_000, "payload": payload}
        print(json.dumps(line, ensure_ascii=False), file=log, flush=True)

    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    with (
        SlackStandIn(options.slack_port, on_message=write) as slack,
        DingTalkStandIn(options.secret, options.dingtalk_port, on_message=write) as dingtalk,
    ):
        print(f"slack {slack.url}\ndingtalk {dingtalk.url}", flush=True)
        ended.wait()


if __name__ == "__main__":
    main()
