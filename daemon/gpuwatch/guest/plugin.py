"""The guest's thread in a process: answers on a Unix socket; does nothing on the process's own threads.

Rule 1: nothing that goes wrong here leaves this thread, and nothing is written to the process's output.
Rule 2: every wait is bounded, so that a client that hangs holds up no other for long.
Rule 3: a folder that is not there yet, or is there again, is used from then on.
"""

from __future__ import annotations

import atexit
import os
import signal
import socket
import threading
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from . import admission, allocator, identity, oom, scheduler, stacks, wire
from .limits import HELD

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_THREAD: Final = "gpuwatch-guest"
_ROUND_S: Final = 1.0  # how soon the start of CUDA, or a lost socket, is noticed
_SETTLE_S: Final = 0.2  # a child that is about to become another program leaves no socket
_EXCHANGE_S: Final = 0.5
_END_S: Final = 0.5
_BACKLOG: Final = 16
_MOST_ERROR: Final = 500
# Signals of the process are for its own threads; those that a thread brings on itself are its own.
_OWN_SIGNALS: Final = frozenset({"SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGABRT", "SIGTRAP", "SIGSYS"})
_WITHOUT_ENGINE: Final = ("api_server", "worker")


class Guest(threading.Thread):
    """One for each process; ends with it."""

    def __init__(self, observer: oom.Observer) -> None:
        """`observer` is the process's, or was its parent's."""
        super().__init__(name=_THREAD, daemon=True)
        self._observer = observer
        self._ending = threading.Event()
        self._listener: socket.socket | None = None
        self._path = Path(wire.folder()) / f"{os.getpid()}{wire.SOCKET_SUFFIX}"

    def run(self) -> None:
        """Until the process ends."""
        with suppress(Exception):
            _leave_signals_alone()
        pause_s = _SETTLE_S
        while not self._ending.wait(pause_s):
            try:
                pause_s = self._round()
            except Exception:  # noqa: BLE001 (rule 1; such as no more file descriptors)
                pause_s = _ROUND_S

    def end(self) -> None:
        """Before the interpreter is torn down: a thread that is inside torch then could abort the process."""
        self._ending.set()
        if self._listener is not None:
            with suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
        self.join(_END_S)
        self.abandon()
        with suppress(OSError):
            self._path.unlink()

    def abandon(self) -> None:
        """Close without a word what belongs to the parent, in a child."""
        listener, self._listener = self._listener, None
        if listener is not None:
            listener.close()

    def _round(self) -> float:
        """Seconds until the next one; a round that listened has waited already."""
        self._observer.attach()
        HELD.forget_lapsed()
        if self._listener is None or not self._path.is_socket():
            self.abandon()
            if not self._path.parent.is_dir():
                return _ROUND_S
            self._listener = _listen(self._path)
        try:
            connection, _ = self._listener.accept()
        except TimeoutError:
            return 0.0
        with connection, suppress(Exception):
            _converse(connection)
        return 0.0


def begin() -> None:
    """Start this process's guest, unless it has one, be it of another installation."""
    if any(thread.name == _THREAD for thread in threading.enumerate()):
        return
    _Process().start()


class _Process:
    """The guest of this process, through forks and to its end."""

    def __init__(self) -> None:
        self._observer = oom.Observer()
        self._guest: Guest | None = None
        os.register_at_fork(after_in_child=self._forked)
        atexit.register(self._end)

    def start(self) -> None:
        self._guest = Guest(self._observer)
        self._guest.start()

    def _forked(self) -> None:
        """Threads do not come along; the parent's socket does."""
        with suppress(Exception):
            if self._guest is not None:
                self._guest.abandon()
            self.start()

    def _end(self) -> None:
        with suppress(Exception):
            if self._guest is not None:
                self._guest.end()


def _leave_signals_alone() -> None:
    own = {signal.Signals[name] for name in _OWN_SIGNALS if name in signal.Signals.__members__}
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.valid_signals()) - own)


def _listen(path: Path) -> socket.socket:
    """A socket at `path`, which is not there before it listens: one that refuses has no process any more."""
    draft = path.with_name(f".{path.name}")
    draft.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(draft))
        draft.chmod(0o660)
        listener.listen(_BACKLOG)
        listener.settimeout(_ROUND_S)
        draft.rename(path)
    except BaseException:
        listener.close()
        with suppress(OSError):
            draft.unlink()
        raise
    return listener


def _converse(connection: socket.socket) -> None:
    request = wire.receive(connection, wire.MOST_REQUEST_BYTES, _EXCHANGE_S)
    connection.settimeout(_EXCHANGE_S)
    answer = _answer(request)
    try:
        line = wire.encode(answer, wire.MOST_ANSWER_BYTES)
    except wire.WireError as error:
        line = wire.encode(_failed(f"the answer is too large: {error}"), wire.MOST_ANSWER_BYTES)
    connection.sendall(line)


def _answer(line: bytes) -> dict[str, Any]:
    try:
        return {"protocol": wire.PROTOCOL, **identity.identity(), **_said(line)}
    except Exception as error:  # noqa: BLE001 (the other end is told)
        return _failed(f"{type(error).__name__}: {error}")


def _failed(why: str) -> dict[str, Any]:
    return {"protocol": wire.PROTOCOL, "pid": os.getpid(), "error": why[:_MOST_ERROR]}


def _said(line: bytes) -> dict[str, Any]:
    request = wire.decode(line)
    answer = _ANSWERS.get(str(request.get("ask")))
    return (
        answer(request) if answer else {"error": f"this guest can answer no more than {', '.join(_ANSWERS)}"}
    )


def _figures(_: Mapping[str, Any]) -> dict[str, Any]:
    return {**allocator.figures(), **scheduler.figures(), **admission.figures()}


def _limit(request: Mapping[str, Any]) -> dict[str, Any]:
    """`applied`: limit by name; `lacks`: why not, by name; both together are what was asked."""
    limits = HELD.take(request)
    may_have_engine = identity.identity()["role"] not in _WITHOUT_ENGINE
    caps, lacking_caps = scheduler.keep(limits, may_have_engine=may_have_engine)
    door, lacking_door = admission.keep(limits)
    return {"applied": {**caps, **door}, "lacks": {**lacking_caps, **lacking_door}}


_ANSWERS: Final[Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]]] = {
    "figures": _figures,
    "snapshot": lambda _: allocator.snapshot(),
    "stacks": lambda _: stacks.stacks(),
    "release": lambda _: allocator.release(),
    "limit": _limit,
    "abort": lambda _: admission.end_all(),
}
