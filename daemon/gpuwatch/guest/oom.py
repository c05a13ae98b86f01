"""Writes down an out-of-memory error of torch's allocator as it happens; raises none of its own.

Torch calls the observer in the thread whose allocation failed, before it raises; the process may be gone a
moment later. What stays is one small file, `<pid>.oom`, with the last error and how many there were since
somebody took the file before.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Final

from . import allocator, identity, wire

_ATTACH: Final = "_cuda_attach_out_of_memory_observer"


class Observer:
    """Attached once in a process, and in what it forks off; torch has no way to take it back."""

    def __init__(self) -> None:
        """Not attached yet."""
        self._is_attached = False
        self._count = 0
        self._uuids: dict[int, str] = {}

    def attach(self) -> None:
        """Once CUDA has been started; a torch without observers is left alone."""
        torch_cuda = None if self._is_attached else allocator.cuda()
        if torch_cuda is None:
            return
        self._is_attached = True  # also if it fails: it would fail again
        # Looked up now, so that nothing is asked of a driver in trouble.
        self._uuids = {index: allocator.uuid_of(index) for index in range(torch_cuda.device_count())}
        attach = getattr(sys.modules.get("torch._C"), _ATTACH, None)
        if attach is not None:
            attach(self.observe)

    def observe(self, device: int, asked_bytes: int, limit_bytes: int, free_bytes: int) -> None:
        """Torch's observer. An error out of here would replace the one that torch is about to raise."""
        try:
            path = Path(wire.folder()) / f"{os.getpid()}{wire.OOM_SUFFIX}"
            self._count = self._count + 1 if path.exists() else 1
            _leave(
                path,
                {
                    "protocol": wire.PROTOCOL,
                    **identity.identity(),
                    "count": self._count,
                    "at_ms": time.time_ns() // 1_000_000,
                    "device": device,
                    "uuid": self._uuids.get(device, ""),
                    "asked_bytes": asked_bytes,
                    "limit_bytes": limit_bytes,
                    "free_bytes": free_bytes,
                },
            )
        except Exception:  # noqa: BLE001, S110 (the process has worse to tell)
            pass


def _leave(path: Path, event: dict[str, Any]) -> None:
    """Whole or not at all; 0640, of the folder's group."""
    draft = path.with_name(f".{path.name}")
    draft.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(draft, flags, 0o640), "w") as file:
        os.fchmod(file.fileno(), 0o640)
        json.dump(event, file)
    draft.rename(path)
