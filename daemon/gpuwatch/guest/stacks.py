"""Where each thread of this process is at this moment; reads no source file, stops no thread."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from types import FrameType

_MOST_THREADS: Final = 128
_MOST_FRAMES: Final = 64
_MOST_CHARACTERS: Final = 120


def stacks() -> dict[str, Any]:
    """`threads`: `name`, `native_id`, and `frames` innermost first, as `file:line function`."""
    named = {thread.ident: thread for thread in threading.enumerate()}
    found = []
    for ident, frame in list(sys._current_frames().items())[:_MOST_THREADS]:  # noqa: SLF001 (documented)
        thread = named.get(ident)
        found.append(
            {
                "name": thread.name[:_MOST_CHARACTERS] if thread else "not Python's",
                "native_id": thread.native_id if thread else None,
                "frames": _frames(frame),
            }
        )
    return {"threads": found}


def _frames(frame: FrameType | None) -> list[str]:
    lines: list[str] = []
    while frame is not None and len(lines) < _MOST_FRAMES:
        code = frame.f_code
        lines.append(
            f"{code.co_filename[-_MOST_CHARACTERS:]}:{frame.f_lineno} {code.co_name[:_MOST_CHARACTERS]}"
        )
        frame = frame.f_back
    return lines
