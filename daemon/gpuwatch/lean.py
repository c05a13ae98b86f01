"""Keeps the daemon small, before anything large is imported; it guards memory, so it must not take it."""

from __future__ import annotations

import ctypes
import sys
import warnings
from typing import Any, Final, cast

_M_ARENA_MAX: Final = -8  # malloc.h


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
