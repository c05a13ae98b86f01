"""How the two ends talk: a JSON line in, one out, over a Unix socket; never too large, never too late."""

from __future__ import annotations

import json
import os
import time
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping

PROTOCOL: Final = 1
FOLDER_VARIABLE: Final = "GPUWATCH_GUEST_DIR"
DEFAULT_FOLDER: Final = "/run/gpuwatch/guests"
SOCKET_SUFFIX: Final = ".sock"
OOM_SUFFIX: Final = ".oom"
MOST_REQUEST_BYTES: Final = 4096
MOST_ANSWER_BYTES: Final = 1024 * 1024
_CHUNK_BYTES: Final = 64 * 1024


class WireError(Exception):
    """The other end sent too much, too late, or what is not one JSON object."""


def folder() -> str:
    """Where sockets lie: the variable, which both ends may be given, or the default."""
    return os.environ.get(FOLDER_VARIABLE) or DEFAULT_FOLDER


def encode(message: Mapping[str, Any], most_bytes: int) -> bytes:
    """A line; WireError if it is longer than the other end takes."""
    line = json.dumps(message, separators=(",", ":")).encode() + b"\n"
    if len(line) > most_bytes:
        raise WireError(f"{len(line)} bytes, of {most_bytes} at most")
    return line


def decode(line: bytes) -> dict[str, Any]:
    """The object of a line; WireError if it holds anything else."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise WireError(f"no JSON: {type(error).__name__}") from None
    if not isinstance(message, dict):
        raise WireError("JSON, but no object")
    return message


def receive(connection: socket.socket, most_bytes: int, within_s: float) -> bytes:
    """The line that the other end sends, without its end; WireError, or OSError of the connection."""
    deadline_s, line = time.monotonic() + within_s, b""
    while not line.endswith(b"\n"):
        connection.settimeout(max(0.001, deadline_s - time.monotonic()))
        chunk = connection.recv(_CHUNK_BYTES)
        line += chunk
        if not chunk or len(line) > most_bytes or time.monotonic() > deadline_s:
            raise WireError("too long, too late or cut off")
    return line[:-1]
