"""Figures of torch's CUDA allocator in this process, and release of what it caches; never imports torch.

Rule 1: only a process that has started CUDA by itself is asked anything: to start it costs half a GiB.
Rule 2: only a device that this process uses is asked: to ask another for its memory opens it, at that price.
Rule 3: vLLM's sleep mode is looked at where it lies, never loaded; one of another shape tells nothing.
Rule 4: with sleep mode torch is asked for nothing that takes its allocator's lock. It would be asked with
        Python's lock held; and sleep mode's allocator asks for Python's with the other one held, so that each
        would wait for the other for ever.
"""

from __future__ import annotations

import gc
import sys
import time
from contextlib import suppress
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
# Torch's own pool. CUDA graphs and the program's `MemPool`s have others, private ones.
_SHARED_POOL: Final = (0, 0)
# What torch takes and gives back at once within an expandable segment, by the kind of the segment.
_PAGE_BYTES: Final = {"small": 2 << 20, "large": 20 << 20}
_MAPPED, _ASLEEP, _UNKNOWN = "mapped", "asleep", "unknown"
_SUMMARY: Final = (
    "segments",
    "private_pool_segments",
    "blocks",
    "reserved_bytes",  # of all pools
    # Of the shared pool:
    "inactive_bytes",
    "releasable_bytes",  # what an empty_cache() would give back
    "largest_free_block_bytes",
    # Of the private ones:
    "private_reserved_bytes",
    "private_inactive_bytes",  # between replays a CUDA graph's memory looks free, and is not
)


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
    """What the pools look like, a device each: a rare use. RuntimeError by rule 4.

    It copies every block under the allocator's lock and with Python's; `took_ms` says how long that was.
    """
    _must_be_safe()
    began_s = time.perf_counter()
    torch_cuda = cuda()
    segments = [] if torch_cuda is None else _segments(torch_cuda)
    devices: dict[int, dict[str, int]] = {}
    for segment in segments:
        summary = devices.setdefault(int(segment["device"]), dict.fromkeys(_SUMMARY, 0))
        _add(summary, segment)
        is_shared = tuple(segment.get("segment_pool_id", _SHARED_POOL)) == _SHARED_POOL
        (_add_shared if is_shared else _add_private)(summary, segment)
    return {
        "cuda": torch_cuda is not None,
        "took_ms": round((time.perf_counter() - began_s) * 1000, 3),
        "devices": [
            {"device": index, "uuid": uuid_of(index), **summary} for index, summary in devices.items()
        ],
    }


def sleep_pools() -> list[dict[str, Any]]:
    """`device`, `tag`, `state` and `bytes` of what vLLM's sleep mode can unmap; nothing without it.

    `state` is `mapped` or `asleep`, or `unknown` of a vLLM that does not note it (0.24).
    """
    found: dict[tuple[int, str, str], int] = {}
    for data in _sleep_mode().values():
        key = int(data.handle[0]), str(data.tag), _state(data)
        found[key] = found.get(key, 0) + int(data.handle[1])
    return [
        {"device": device, "tag": tag, "state": state, "bytes": size}
        for (device, tag, state), size in sorted(found.items())
    ]


def release() -> dict[str, Any]:
    """Give the driver what the allocator caches; bytes given back for each device. RuntimeError by rule 4.

    What is given back another process may take, and then the next allocation here fails: who asks must know
    that nobody on that GPU grows.
    """
    _must_be_safe()
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
    return [index for index in every if _stats(torch_cuda, index).get(_EVER_RESERVED, 0) > 0]


def _device(torch_cuda: Any, index: int) -> dict[str, Any]:  # noqa: ANN401  # torch's module
    stats = _stats(torch_cuda, index)
    free_bytes, total_bytes = torch_cuda.mem_get_info(index)
    return {
        "device": index,
        "uuid": uuid_of(index),
        # What a pluggable allocator gives back without torch's knowledge can leave a figure below 0.
        "stats": {name: stats[name] for name in STATS if stats.get(name, -1) >= 0},
        "sleep_pools": _sleep_pools_of(index),
        "free_bytes": free_bytes,
        "total_bytes": total_bytes,
    }


def _stats(torch_cuda: Any, index: int) -> dict[str, int]:  # noqa: ANN401  # torch's module
    """Empty by rule 4."""
    return {} if _has_sleep_mode() else torch_cuda.memory_stats(index)


def _reserved(torch_cuda: Any, index: int) -> int:  # noqa: ANN401  # torch's module
    return int(torch_cuda.memory_reserved(index))


def _sleep_allocator() -> Any | None:  # noqa: ANN401  # vLLM's
    module = sys.modules.get("vllm.device_allocator.cumem")
    return getattr(getattr(module, "CuMemAllocator", None), "instance", None)


def _has_sleep_mode() -> bool:
    """Its allocator is made some time before its first use: who looks right before a call is in time."""
    return _sleep_allocator() is not None


def _must_be_safe() -> None:
    if _has_sleep_mode():
        raise RuntimeError("this vLLM has sleep mode, whose allocator must not be looked into from outside")


def _sleep_mode() -> dict[int, Any]:
    """What vLLM can unmap, by address, as its table is at this instant; empty without sleep mode."""
    return dict(getattr(_sleep_allocator(), "pointer_to_data", None) or {})


def _state(data: Any) -> str:  # noqa: ANN401  # vLLM's
    is_asleep = getattr(data, "is_asleep", None)
    if is_asleep is None:  # not noted: but what lies in the host's memory is not on the device
        return _UNKNOWN if data.cpu_backup_tensor is None else _ASLEEP
    return _ASLEEP if is_asleep else _MAPPED


def _sleep_pools_of(index: int) -> list[dict[str, Any]]:
    with suppress(Exception):  # rule 3
        return [
            {name: pool[name] for name in ("tag", "state", "bytes")}
            for pool in sleep_pools()
            if pool["device"] == index
        ]
    return []


def _segments(torch_cuda: Any) -> list[dict[str, Any]]:  # noqa: ANN401  # torch's module
    """Without the history of allocations, which torch keeps only where somebody asked it to."""
    try:
        return list(torch_cuda.memory_snapshot(include_traces=False))
    except TypeError:  # a torch before that parameter
        return list(torch_cuda.memory_snapshot())


def _add(summary: dict[str, int], segment: dict[str, Any]) -> None:
    summary["segments"] += 1
    summary["blocks"] += len(segment["blocks"])
    summary["reserved_bytes"] += int(segment["total_size"])


def _free(segment: dict[str, Any]) -> list[int]:
    return [int(block["size"]) for block in segment["blocks"] if block["state"] == _INACTIVE]


def _add_shared(summary: dict[str, int], segment: dict[str, Any]) -> None:
    free = _free(segment)
    summary["inactive_bytes"] += sum(free)
    summary["releasable_bytes"] += _releasable(segment)
    summary["largest_free_block_bytes"] = max(summary["largest_free_block_bytes"], *free, 0)


def _add_private(summary: dict[str, int], segment: dict[str, Any]) -> None:
    summary["private_pool_segments"] += 1
    summary["private_reserved_bytes"] += int(segment["total_size"])
    summary["private_inactive_bytes"] += sum(_free(segment))


def _releasable(segment: dict[str, Any]) -> int:
    """A whole segment, or of an expandable one, of which only what is mapped is told, its free pages."""
    blocks = segment["blocks"]
    if not segment.get("is_expandable"):
        is_free = all(block["state"] == _INACTIVE for block in blocks)
        return int(segment["total_size"]) if is_free else 0
    page = _PAGE_BYTES.get(str(segment.get("segment_type")), _PAGE_BYTES["large"])
    offset = pages = 0
    for block in blocks:
        end = offset + int(block["size"])
        if block["state"] == _INACTIVE:
            pages += max(0, end // page - -(-offset // page))
        offset = end
    return pages * page
