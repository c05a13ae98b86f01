"""Figures of torch's CUDA allocator in this process, and release of what it caches; never imports torch.

Rule 1: only a process that has started CUDA by itself is asked anything: to start it costs half a GiB.
Rule 2: only a device that this process uses is asked: to ask another for its memory opens it, at that price.
"""

from __future__ import annotations

import gc
import sys
from typing import Any, Final

# Of `torch.cuda.memory_stats`: what the daemon makes metrics of, and what `gpuwatch guest list` shows.
STATS: Final = (
    "allocated_bytes.all.current",
    "reserved_bytes.all.current",
    "active_bytes.all.current",
    "inactive_split_bytes.all.current",
    "num_alloc_retries",
    "num_ooms",
)
_EVER_RESERVED: Final = "reserved_bytes.all.allocated"
_INACTIVE: Final = "inactive"


def cuda() -> Any | None:  # noqa: ANN401  # torch is the process's own, of whatever version
    """`torch.cuda` if this process has started CUDA, else None."""
    module = sys.modules.get("torch.cuda")
    asked = getattr(module, "is_initialized", None)  # absent while torch is being imported
    return module if asked is not None and asked() else None


def figures() -> dict[str, Any]:
    """`cuda` and, for each device in use, `stats`, `free_bytes`, `total_bytes`, `uuid` and `device`."""
    torch_cuda = cuda()
    used = [] if torch_cuda is None else _devices_in_use(torch_cuda)
    return {"cuda": torch_cuda is not None, "devices": [_device(torch_cuda, index) for index in used]}


def snapshot() -> dict[str, Any]:
    """What the pools look like, a device each; copies every block under the allocator's lock: a rare use."""
    devices: dict[int, dict[str, int]] = {}
    torch_cuda = cuda()
    for segment in torch_cuda.memory_snapshot() if torch_cuda is not None else ():
        _add_segment(devices.setdefault(int(segment["device"]), _empty_summary()), segment)
    return {
        "cuda": torch_cuda is not None,
        "devices": [
            {"device": index, "uuid": uuid_of(index), **summary} for index, summary in devices.items()
        ],
    }


def release() -> dict[str, Any]:
    """Give the driver what the allocator caches; bytes given back for each device.

    What is given back another process may take, and then the next allocation here fails: who asks must know
    that nobody on that GPU grows.
    """
    torch_cuda = cuda()
    if torch_cuda is None:
        return {"cuda": False, "devices": []}
    before = {index: _reserved(torch_cuda, index) for index in _devices_in_use(torch_cuda)}
    gc.collect()
    torch_cuda.empty_cache()
    return {
        "cuda": True,
        "devices": [
            {"device": index, "uuid": uuid_of(index), "released_bytes": was - _reserved(torch_cuda, index)}
            for index, was in before.items()
        ],
    }


def uuid_of(index: int) -> str:
    """NVML's `GPU-…`; empty if this torch does not tell."""
    torch_cuda = cuda()
    uuid = str(getattr(torch_cuda.get_device_properties(index), "uuid", "")) if torch_cuda else ""
    return uuid if not uuid or uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"


def _devices_in_use(torch_cuda: Any) -> list[int]:  # noqa: ANN401  # torch's module
    has_context = getattr(sys.modules.get("torch._C"), "_cuda_hasPrimaryContext", None)
    every = range(torch_cuda.device_count())
    if has_context is not None:
        return [index for index in every if has_context(index)]
    return [index for index in every if torch_cuda.memory_stats(index).get(_EVER_RESERVED, 0) > 0]


def _device(torch_cuda: Any, index: int) -> dict[str, Any]:  # noqa: ANN401  # torch's module
    stats = torch_cuda.memory_stats(index)
    free_bytes, total_bytes = torch_cuda.mem_get_info(index)
    return {
        "device": index,
        "uuid": uuid_of(index),
        "stats": {name: stats[name] for name in STATS if name in stats},
        "free_bytes": free_bytes,
        "total_bytes": total_bytes,
    }


def _reserved(torch_cuda: Any, index: int) -> int:  # noqa: ANN401  # torch's module
    return int(torch_cuda.memory_reserved(index))


def _empty_summary() -> dict[str, int]:
    return {
        "segments": 0,
        "private_pool_segments": 0,
        "blocks": 0,
        "reserved_bytes": 0,
        "inactive_bytes": 0,
        "releasable_bytes": 0,
        "largest_free_block_bytes": 0,
    }


def _add_segment(summary: dict[str, int], segment: dict[str, Any]) -> None:
    blocks = segment["blocks"]
    free = [int(block["size"]) for block in blocks if block["state"] == _INACTIVE]
    is_private = tuple(segment.get("segment_pool_id", (0, 0))) != (
        0,
        0,
    )  # of a CUDA graph, or of the program's own
    summary["segments"] += 1
    summary["private_pool_segments"] += is_private
    summary["blocks"] += len(blocks)
    summary["reserved_bytes"] += int(segment["total_size"])
    summary["inactive_bytes"] += sum(free)
    summary["releasable_bytes"] += int(segment["total_size"]) if len(free) == len(blocks) else 0
    summary["largest_free_block_bytes"] = max(summary["largest_free_block_bytes"], *free, 0)
