"""What runs inside the processes of vLLM or of any PyTorch program; never starts CUDA, never brings one down.

It stands on the standard library and on what the process itself has loaded of torch, and imports nothing else
of gpuwatch, so that `gpuwatch guest install` can put it into a folder of its own as `gpuwatch_guest`.
"""

from __future__ import annotations

import os

SWITCH = "GPUWATCH_GUEST"  # "0" keeps the guest out


def register() -> None:
    """Begin to answer on this process's socket; vLLM calls it in each process. Raises nothing."""
    if os.environ.get(SWITCH) == "0":
        return
    try:
        from . import plugin  # noqa: PLC0415 (what is switched off loads nothing)

        plugin.begin()
    except Exception:  # noqa: BLE001, S110 (vLLM would die of it, and its log is not ours)
        pass
