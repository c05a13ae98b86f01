"""Processes with a guest in them, told by a pipe what to do next; and what the tests ask of them."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from gpuwatch.guest import client

ROOT = Path(__file__).parent.parent
LOOP = """
import os, sys
for line in sys.stdin:
    exec(line)
    print("done", flush=True)
"""
TORCH = "from tests import fake_torch; torch = fake_torch.install({})\n"
REGISTER = "import gpuwatch.guest; gpuwatch.guest.register()\n"


def environment(folder, **more):
    path = os.pathsep.join([str(ROOT / "daemon"), str(ROOT)])
    kept = {k: v for k, v in os.environ.items() if not k.startswith("GPUWATCH_")}
    return {**kept, "PYTHONPATH": path, "GPUWATCH_GUEST_DIR": str(folder), **more}


class Program:
    """`python -c`: begins with `script`, then does a line at a time; gone at the end of `with`."""

    def __init__(self, folder, script=REGISTER, words=(), **env):
        self.folder = folder
        command = [sys.executable, *(words or ("-c", script + LOOP))]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self.process = subprocess.Popen(command, text=True, env=environment(folder, **env), **pipes)
        self.pid = self.process.pid

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    @property
    def socket(self):
        return self.folder / f"{self.pid}.sock"

    def begin(self, line):
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def do(self, line):
        """What it printed while it did so."""
        self.begin(line)
        printed = []
        while (answer := self.process.stdout.readline().strip()) != "done":
            assert self.process.poll() is None or answer, f"it ended: {printed}"
            printed.append(answer)
        return "\n".join(printed)

    def stop(self):
        """SIGSTOP, and it has stopped."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)

    def end(self):
        """Let it end by itself; what it printed."""
        printed, _ = self.process.communicate(timeout=30)
        return printed

    def ask(self, what="figures", **more):
        wait_for(self.socket.exists)
        return ask(self.socket, what, **more)

    def limit(self, for_s=600, **limits):
        return self.ask("limit", for_s=for_s, **limits)


class Pretender:
    """Listens at the socket of a process, by default this one, and does as it likes with who comes."""

    def __init__(self, folder, says, pid=None):
        self.path = folder / f"{pid or os.getpid()}.sock"
        self._listener, self._says = socket.socket(socket.AF_UNIX), says
        self._listener.bind(str(self.path))
        self._listener.listen()
        self.asked = 0
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()

    def _serve(self):
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.asked += 1
            with connection:
                connection.settimeout(10)
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    self._says(connection)


def ask(path, what, **more):
    (answer,) = client.ask_all({client.pid_of(path): path}, what, more=more, within_s=10).values()
    if isinstance(answer, client.GuestError):
        raise answer
    return answer


def wait_for(question, within_s=20):
    end = time.monotonic() + within_s
    while not (answer := question()):
        assert time.monotonic() < end, f"not within {within_s} s"
        time.sleep(0.02)
    return answer


def sockets(folder):
    with contextlib.suppress(FileNotFoundError):
        return set(client.listed(folder))
    return set()
