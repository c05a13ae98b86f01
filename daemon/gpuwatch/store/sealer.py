"""Runs the process that seals an hour and reads what it made; writes nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Final

import msgspec

from gpuwatch.errors import StoreError
from gpuwatch.frames.sealed import DAMAGED, Sealed

if TYPE_CHECKING:
    from pathlib import Path

# numpy's algebra, which is not used, starts a thread a core: a quarter of the process's time.
_ENVIRONMENT: Final = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
_WITHIN_S: Final = 300
_DECODER: Final = msgspec.msgpack.Decoder(Sealed)


def run(path: Path, before_ms: int, now_ms: int) -> list[Sealed]:
    """The frames of the oldest hour that is over at `before_ms`; StoreError if the process fails."""
    command = [sys.executable, "-P", "-m", "gpuwatch.frames.sealing", str(path), str(before_ms), str(now_ms)]
    try:
        done = subprocess.run(  # noqa: S603
            command, env=_ENVIRONMENT, stdout=subprocess.PIPE, timeout=_WITHIN_S, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        message = f"cannot seal an hour of {path}: {error}; its samples stay as rows and it is tried again"
        is_damage = getattr(error, "returncode", None) == DAMAGED
        raise StoreError(message, kind="corrupt" if is_damage else "other") from error
    return list(_messages(done.stdout))


def _messages(data: bytes) -> list[Sealed]:
    found, at = [], 0
    while at < len(data):
        end = at + 4 + int.from_bytes(data[at : at + 4], "big")
        found.append(_DECODER.decode(memoryview(data)[at + 4 : end]))
        at = end
    return found
