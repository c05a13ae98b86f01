"""Who this process is: pid, name, role, rank, and the name of its series; only reads."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any, Final

# How vLLM titles its processes, less the prefix; APIServer only where there are several.
_ROLES: Final = {"APIServer": "api_server", "EngineCore": "engine_core", "Worker": "worker"}
_UNNAMED: Final = "process"
_MOST_NAME: Final = 48


def identity() -> dict[str, Any]:
    """`role` is api_server, engine_core, worker or process; `worker` names the series and is never a pid."""
    title, rank = _vllm_title(), _rank()
    role = _ROLES.get(title.partition("_")[0], _UNNAMED) if title else _role_by_command()
    name = title or (role if rank is None else f"rank{rank}")
    return {
        "pid": os.getpid(),
        "process": _plain(title or Path(sys.argv[0] if sys.argv else "").name) or _UNNAMED,
        "role": role,
        "rank": rank,
        "worker": _plain(name),
    }


def _vllm_title() -> str:
    """`Worker_TP1` of a process titled `VLLM::Worker_TP1`; empty for any other."""
    prefix = os.environ.get("VLLM_PROCESS_NAME_PREFIX", "VLLM") + "::"
    with open("/proc/self/cmdline", "rb") as file:  # noqa: PTH123 (pathlib reads all of a long command line)
        title = file.read(256).partition(b"\0")[0].decode(errors="replace").strip()
    return title[len(prefix) :] if title.startswith(prefix) else ""


def _role_by_command() -> str:
    """The API server keeps the name of its command."""
    command = sys.argv[0] if sys.argv else ""
    return "api_server" if Path(command).name == "vllm" or "vllm/entrypoints" in command else _UNNAMED


def _rank() -> int | None:
    """As torch.distributed has it, or as torchrun gives it; None for a process that has none."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        return int(distributed.get_rank())
    given = os.environ.get("RANK", "")
    return int(given) if given.isdecimal() else None


def _plain(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.:-]", "_", text)[:_MOST_NAME]
