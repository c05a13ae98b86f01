"""The other end of the guests' sockets: asks any number of them at once, and believes none of them.

Rule 1: a guest is the process that listens, as the kernel says it, or it is no guest.
Rule 2: whatever one does, the others' answers are there within the time asked for.
"""

from __future__ import annotations

import os
import selectors
import socket
import struct
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from . import wire

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

_CREDENTIALS: Final = struct.Struct("3i")  # pid, uid, gid
_CHUNK_BYTES: Final = 64 * 1024
_MOST_ERROR: Final = 500


class GuestError(Exception):
    """A guest did not answer, or not as a guest does.

    `is_gone`: nobody listens there any more. `is_refusal`: it answered that it cannot, and why.
    """

    def __init__(self, what: str, *, is_gone: bool = False, is_refusal: bool = False) -> None:
        """`what` names the guest and the cause."""
        self.is_gone = is_gone
        self.is_refusal = is_refusal
        super().__init__(what)


@dataclass(slots=True)
class _Talk:
    pid: int
    heard: bytes = b""


def listed(folder: Path, suffix: str = wire.SOCKET_SUFFIX) -> dict[int, Path]:
    """What lies in the folder, by pid; nothing if there is no folder, GuestError if it cannot be read."""
    try:
        names = os.listdir(folder)  # noqa: PTH208 (a Path for each name is what takes time)
    except FileNotFoundError:
        return {}
    except OSError as error:
        cure = "to cure it, be a member of the folder's group"
        raise GuestError(f"list the guests in {folder}: {error.strerror}; {cure}") from error
    pids = [name.removesuffix(suffix) for name in names if name.endswith(suffix)]
    return {int(pid): folder / f"{pid}{suffix}" for pid in pids if pid.isascii() and pid.isdecimal()}


def ask(path: Path, what: str, *, within_s: float = 2.0) -> dict[str, Any]:
    """One guest's answer to `figures`, `snapshot`, `stacks`, `release` or `abort`; GuestError."""
    answer = ask_all({pid_of(path): path}, what, within_s=within_s)[pid_of(path)]
    if isinstance(answer, GuestError):
        raise answer
    return answer


def ask_all(
    paths: dict[int, Path],
    what: str,
    *,
    more: Mapping[str, Any] | None = None,
    within_s: float = 2.0,
    most_bytes: int = wire.MOST_ANSWER_BYTES,
) -> dict[int, dict[str, Any] | GuestError]:
    """What each guest answers, all of them asked at once; `more` is what is said beside the question."""
    deadline_s = time.monotonic() + within_s
    request = wire.encode({**(more or {}), "ask": what}, wire.MOST_REQUEST_BYTES)
    answers: dict[int, dict[str, Any] | GuestError] = {}
    with selectors.DefaultSelector() as talks:
        for pid, path in paths.items():
            try:
                talks.register(_connected(pid, path, request), selectors.EVENT_READ, _Talk(pid))
            except GuestError as error:
                answers[pid] = error
        while talks.get_map() and (left_s := deadline_s - time.monotonic()) > 0:
            for key, _ in talks.select(left_s):
                if (answer := _heard(key.fileobj, key.data, most_bytes)) is not None:
                    answers[key.data.pid] = answer
                    _hang_up(talks, key)
        for key in list(talks.get_map().values()):
            answers[key.data.pid] = _failed(key.data.pid, f"no answer within {within_s:g} s")
            _hang_up(talks, key)
    return answers


def shares(total: int | None, pids: Sequence[int]) -> dict[int, int]:
    """A limit on requests divided among doors, as even as can be: their sum is the whole; none for None."""
    if total is None or not pids:
        return {}
    each, over = divmod(total, len(pids))
    return {pid: each + (index < over) for index, pid in enumerate(pids)}


def pid_of(path: Path) -> int:
    """The process that a socket or a file belongs to by its name."""
    return int(path.stem)


def printable(text: object, most: int = _MOST_ERROR) -> str:
    """What a guest says, fit for a terminal and a log."""
    return "".join(c if c.isprintable() else "?" for c in str(text)[:most])


def _connected(pid: int, path: Path, request: bytes) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        connection.connect(str(path))
        option = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        if (peer := _CREDENTIALS.unpack(option)[0]) != pid:
            raise _failed(pid, f"process {peer} listens in its place")
        connection.send(request)
    except OSError as error:
        connection.close()
        is_gone = isinstance(error, ConnectionRefusedError)
        raise GuestError(f"guest {pid}: {error.strerror}", is_gone=is_gone) from None
    except GuestError:
        connection.close()
        raise
    return connection


def _heard(connection: Any, talk: _Talk, most_bytes: int) -> dict[str, Any] | GuestError | None:  # noqa: ANN401
    """The answer once it is whole; `connection` is a socket, which selectors do not say."""
    try:
        chunk = connection.recv(_CHUNK_BYTES)
    except BlockingIOError:
        return None
    except OSError as error:
        return _failed(talk.pid, str(error.strerror))
    talk.heard += chunk
    if len(talk.heard) > most_bytes:
        return _failed(talk.pid, f"an answer of more than {most_bytes} bytes")
    if not chunk:
        return _failed(talk.pid, "it hung up")
    return _checked(talk) if chunk.endswith(b"\n") else None


def _checked(talk: _Talk) -> dict[str, Any] | GuestError:
    try:
        answer = wire.decode(talk.heard)
    except wire.WireError as error:
        return _failed(talk.pid, f"not an answer: {error}")
    if answer.get("protocol") != wire.PROTOCOL:
        return _failed(talk.pid, "it speaks another protocol; to cure it, run gpuwatch guest install again")
    if answer.get("pid") != talk.pid:
        return _failed(talk.pid, "it calls itself another process")
    if "error" in answer:
        return GuestError(f"guest {talk.pid}: {printable(answer['error'])}", is_refusal=True)
    return answer


def _hang_up(talks: selectors.BaseSelector, key: selectors.SelectorKey) -> None:
    talks.unregister(key.fileobj)
    key.fileobj.close()  # type: ignore[union-attr]  # a socket


def _failed(pid: int, cause: str) -> GuestError:
    return GuestError(f"guest {pid}: {cause}")
