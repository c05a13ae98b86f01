"""Stands in for `vllm serve`: same routes, same ways to die; it loads no model and answers any prompt alike.

An "engine" child process stands for `VLLM::EngineCore`: when it dies, /health answers 503 and the
parent leaves with status 0 about a second later, as vLLM does. While it is stopped, or the server is
paused, requests wait and the gauges stay as they are. Standard library only, so that it runs anywhere:
`python3 standin_vllm.py --port 8000 --startup 2`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

METRICS = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{engine="0",model_name="standin"}} 0.0
# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{{engine="0",model_name="standin"}} 0.0
# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{{engine="0",model_name="standin"}} 0.0
# HELP vllm:generation_tokens_total Number of generation tokens processed.
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{{engine="0",model_name="standin"}} {tokens}.0
# HELP vllm:iteration_tokens_total Histogram of number of tokens per engine_step.
# TYPE vllm:iteration_tokens_total histogram
vllm:iteration_tokens_total_bucket{{engine="0",le="+Inf",model_name="standin"}} {steps}.0
vllm:iteration_tokens_total_count{{engine="0",model_name="standin"}} {steps}.0
vllm:iteration_tokens_total_sum{{engine="0",model_name="standin"}} {steps}.0
"""
MODELS = '{"object":"list","data":[{"id":"standin","object":"model"}]}'
COMPLETION = '{"object":"text_completion","choices":[{"index":0,"text":"!","finish_reason":"length"}]}'
ENGINE = "import time\nwhile True: time.sleep(3600)"


class Server(ThreadingHTTPServer):
    """Knows whether its engine lives."""

    daemon_threads = True
    engine: subprocess.Popen[bytes]
    paused = False
    steps = load = 0

    def engine_lives(self):
        return self.engine.poll() is None

    def engine_runs(self):
        """Neither dead nor stopped by a signal."""
        return self.engine_lives() and stat_of(self.engine.pid) != "T"

    def compute(self):
        """One token, as soon as the engine can; False if it died."""
        self.load += 1
        while self.paused or not self.engine_runs():
            if not self.engine_lives():
                return False
            time.sleep(0.02)
        self.load -= 1
        self.steps += 1
        return True


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        healthy = self.server.engine_lives()
        if self.path == "/health":
            self.answer(200 if healthy else 503, "")
        elif self.path == "/metrics":
            self.answer(200, METRICS.format(tokens=int(time.monotonic()), steps=self.server.steps))
        elif self.path == "/load":
            self.answer(200, json.dumps({"server_load": self.server.load}))
        elif self.path == "/is_paused":
            while not self.server.engine_runs():
                time.sleep(0.02)
            self.answer(200, json.dumps({"is_paused": self.server.paused}))
        elif self.path == "/v1/models":
            self.answer(200, MODELS)
        else:
            self.answer(404, '{"detail":"Not Found"}')

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        route = self.path.partition("?")[0]
        if route in {"/pause", "/resume"}:
            self.server.paused = route == "/pause"
            self.answer(200, '{"status":"ok"}')
        elif route == "/v1/completions":
            self.answer(200, COMPLETION) if self.server.compute() else self.answer(500, "{}")
        else:
            self.answer(404, '{"detail":"Not Found"}')

    def answer(self, status, text):
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, template, *args):
        print(f"INFO: {self.address_string()} {template % args}", flush=True)


def follow(server, death_delay_s):
    """End the server, as vLLM's watchdog loop does, some time after its engine died."""
    server.engine.wait()
    print("ERROR: EngineCore died", flush=True)
    time.sleep(death_delay_s)
    server.shutdown()


def stat_of(pid):
    """The state letter of a process; empty if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][:1]
    except OSError:
        return ""


def start_engine():
    return subprocess.Popen([sys.executable, "-c", ENGINE])


def options():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--port-file", help="write the port there once it listens")
    parser.add_argument("--startup", type=float, default=0.0, help="seconds until it listens")
    parser.add_argument("--death-delay", type=float, default=1.0, help="seconds from engine death to exit")
    parser.add_argument(
        "--ignore-term", action="store_true", help="hang on SIGTERM, as vLLM may with streams"
    )
    return parser.parse_args()


def main():
    args = options()
    engine = start_engine()
    print(f"INFO: EngineCore pid={engine.pid}", flush=True)

    def leave(*_):
        engine.kill()
        os._exit(0)

    signal.signal(signal.SIGTERM, signal.SIG_IGN if args.ignore_term else leave)
    time.sleep(args.startup)
    # vLLM listens only when the model is loaded: before that, connections are refused.
    with Server((args.host, args.port), Handler) as server:
        server.engine = engine
        if args.port_file:
            Path(args.port_file).write_text(str(server.server_address[1]))
        threading.Thread(target=follow, args=(server, args.death_delay), daemon=True).start()
        print(f"INFO: listening on port {server.server_address[1]}", flush=True)
        server.serve_forever(poll_interval=0.1)


if __name__ == "__main__":
    main()
