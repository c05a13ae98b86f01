"""Keeps the daemon small, before anything large is imported; it guards memory, so it must not take it."""

from __future__ import annotations

import ctypes
import gc
import inspect
import sys
import warnings
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, cast

if TYPE_CHECKING:
    from collections.abc import Mapping

_M_ARENA_MAX: Final = -8  # malloc.h
# What SQLAlchemy and APScheduler take from these when they are imported, of event loops and processes
# that nobody starts here: 2 MiB.
_UNUSED: Final[Mapping[str, Mapping[str, object]]] = {
    "asyncio": {
        "iscoroutine": inspect.iscoroutine,
        "iscoroutinefunction": inspect.iscoroutinefunction,
        "TimeoutError": TimeoutError,
        "CancelledError": type("CancelledError", (BaseException,), {}),
    },
    "concurrent.futures.process": {"BrokenProcessPool": type("BrokenProcessPool", (RuntimeError,), {})},
}


def begin() -> None:
    """Call first of all in the daemon's process; measured with `make bench ONLY=daemon`."""
    # glibc gives each thread an arena of its own, and ours hold little and live long: 1 MiB.
    malloc_options = getattr(ctypes.CDLL(None), "mallopt", None)
    if malloc_options:
        malloc_options(_M_ARENA_MAX, 1)
    # requests loads a guesser of encodings and works without it, as its documentation says; all that we
    # read names its encoding or is UTF-8: 3 MiB.
    modules = cast("dict[str, Any]", sys.modules)
    modules.setdefault("charset_normalizer", None)
    modules.setdefault("chardet", None)
    warnings.filterwarnings("ignore", message="Unable to find acceptable character detection dependency")
    for name, parts in _UNUSED.items():
        stub = ModuleType(name)
        stub.__dict__.update(parts)
        modules.setdefault(name, stub)


def settle() -> None:
    """Call once all is loaded: what start-up left goes back to the system, and the rest is never searched."""
    gc.collect()
    gc.freeze()
    trim_heap()


def trim_heap() -> None:
    """Give what is free at the heap's end, and whole free pages, back to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(0)
