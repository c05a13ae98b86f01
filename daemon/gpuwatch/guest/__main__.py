"""`python -m gpuwatch_guest SCRIPT ARGS…` or `-m MODULE ARGS…`: runs a program with the guest in it."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from . import register

_USAGE = "usage: python -m gpuwatch_guest SCRIPT [ARGS…]  or  python -m gpuwatch_guest -m MODULE [ARGS…]"


def main(words: list[str]) -> None:
    """Become the program, as `python` itself would run it."""
    as_module = words[:1] == ["-m"]
    words = words[as_module:]
    if not words:
        sys.exit(_USAGE)
    register()
    sys.argv = words
    if as_module:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        return
    sys.path[0] = str(Path(words[0]).resolve().parent)
    runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
