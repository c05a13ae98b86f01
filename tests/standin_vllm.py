"""Stands in for `vllm serve`: same routes, same ways to die; it loads no model and answers no prompt.

An "engine" child process stands for `VLLM::EngineCore`: when it dies, /health answers 503 and the
parent leaves with status 0 about a second later, as vLLM does. Standard library only, so that it
runs anywhere: `python3 standin_vllm.py --port 8000 --startup 2`.
"""

from __future__ import annotations

import argparse
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
"""
ENGINE = "import time\nwhile True: time.sleep(3600)"


class Server(ThreadingHTTPServer):
    """Knows whether its engine lives."""

    daemon_threads = True
    engine: subprocess.Popen[bytes]

    def engine_lives(self):
        return self.engine.poll() is None


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        healthy = self.server.engine_lives()
        if self.path == "/health":
            self.answer(200 if healthy else 503, "")
        elif self.path == "/metrics":
            self.answer(200, METRICS.format(tokens=int(time.monotonic())))
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
