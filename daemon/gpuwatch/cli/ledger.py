"""`gpuwatch memory`: shows where the memory of each GPU is, out of rows, so also while the daemon is down."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Any, Final

from gpuwatch import notify
from gpuwatch.errors import ConfigError
from gpuwatch.ledger import DRIVER, GpuLedger, ledgers
from gpuwatch.records import ServerPhase

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gpuwatch.config import Settings
    from gpuwatch.store import ReadStore

Seen = dict[str, Any]

_GIB: Final = 1 << 30
_FRESH_MS: Final = 10_000  # a series that gave no sample for longer tells nothing of now
_LOOKBACK_MS: Final = 300_000
_RUNNING_WITHIN_MS: Final = 15_000
_UNEXPLAINED: Final = "unexplained"
_FIGURES: Final = {
    "weights_bytes": "weights",
    "kv_cache_bytes": "KV cache",
    "cuda_graphs_bytes": "CUDA graphs",
    "activation_peak_bytes": "activations at their peak",
}


def gather(rows: ReadStore, settings: Settings, now_ms: int, gpu: str | None = None) -> Seen:
    """Everything that `memory` shows, as plain values; StoreError, ConfigError if there is no such GPU.

    `gpu` is the index or UUID of the only one that is wanted.
    """
    at_ms = rows.last_tick_ms() or 0
    fresh_ms = max(_FRESH_MS, 2 * settings.sources.nvml_interval, 2 * settings.sources.metrics_interval)
    found = ledgers(rows.latest(at_ms, fresh_ms))
    wanted = [one for one in found if gpu in {None, one.gpu, one.uuid}]
    if gpu is not None and not wanted:
        known = ", ".join(one.gpu for one in found) or "none"
        raise ConfigError([f"memory --gpu {gpu}: no such GPU has been read; there are: {known}"])
    names = {
        labels.get("uuid"): labels.get("name")
        for labels in rows.latest(at_ms, _LOOKBACK_MS)
        if labels.metric == "gpu_info"
    }
    return {
        "host": settings.host,
        "running": 0 <= now_ms - at_ms <= _RUNNING_WITHIN_MS,
        "at_ms": at_ms,
        "age_ms": now_ms - at_ms,
        "gpus": [_gpu(one, names.get(one.uuid, "")) for one in wanted],
        "last_good_starts": _starts_of_those_not_serving(rows),
    }


def render(seen: Seen, lang: str) -> str:
    """A ledger for each GPU, its sum last; then what servers held that do not serve now."""
    blocks = [_headline(seen, lang), *(_ledger(gpu) for gpu in seen["gpus"])]
    if not seen["gpus"]:
        blocks.append("no GPU has been read")
    return "\n\n".join([*blocks, *(_start(start) for start in seen["last_good_starts"])])


def _gpu(one: GpuLedger, name: str) -> Seen:
    parts = [
        {"owner": p.owner, "what": p.what, "bytes": p.bytes, "ratio": _ratio(p.bytes, one), "note": p.note}
        for p in one.parts
    ]
    return {
        "gpu": one.gpu,
        "uuid": one.uuid,
        "name": name,
        "total_bytes": one.total_bytes,
        "used_bytes": one.used_bytes,
        "free_bytes": one.free_bytes,
        "parts": parts,
        "unexplained_bytes": one.unexplained_bytes,
        "unexplained_ratio": _ratio(one.unexplained_bytes, one),
    }


def _ratio(size: int, one: GpuLedger) -> float:
    return size / one.total_bytes if one.total_bytes else 0.0


def _starts_of_those_not_serving(rows: ReadStore) -> list[Seen]:
    found = []
    for name, state in rows.servers().items():
        start = None if state.phase == ServerPhase.SERVING else rows.last_good_start(name)
        if start is not None:
            found.append(
                {
                    "server": name,
                    "phase": str(state.phase),
                    "began_at_ms": start.began_at_ms,
                    "figures": {worker: dict(its) for worker, its in start.figures.items()},
                    "kv_cache_tokens": start.kv_cache_tokens,
                }
            )
    return found


def _headline(seen: Seen, lang: str) -> str:
    at = _clock(seen["at_ms"], "%H:%M:%S")
    if seen["running"]:
        return f"GPU memory of {seen['host']} at {at}"
    ago = notify.duration(seen["age_ms"], lang)
    return (
        f"GPU memory of {seen['host']} · gpuwatch is NOT RUNNING; this is how things stood at {at}, {ago} ago"
    )


def _ledger(gpu: Seen) -> str:
    rows: list[tuple[str, ...]] = []
    owner = ""
    for part in gpu["parts"]:
        shown = "" if part["owner"] == owner else part["owner"]
        rows.append((shown, part["what"], _gib(part["bytes"]), _percent(part["ratio"]), part["note"]))
        owner = part["owner"]
    rest, ratio = gpu["unexplained_bytes"], gpu["unexplained_ratio"]
    rows.append(("", _UNEXPLAINED, f"{rest / _GIB:+.2f}", _percent(ratio), _of_unexplained(gpu)))
    total = ("", "total", _gib(gpu["total_bytes"]), _percent(1.0), "")
    title = " ".join(word for word in ("GPU", gpu["gpu"], gpu["name"]) if word)
    return f"{title}\n{_table(('OWNER', 'WHAT', 'GiB', '%', ''), rows, total)}"


def _of_unexplained(gpu: Seen) -> str:
    """An old driver does not tell its own share apart."""
    return "" if any(part["what"] == DRIVER for part in gpu["parts"]) else "the driver's own is in it"


def _start(start: Seen) -> str:
    at = _clock(start["began_at_ms"], "%Y-%m-%d %H:%M")
    lines = [f"{start['server']} is {start['phase']}; when it last started well, at {at}, it held"]
    for worker, figures in sorted(start["figures"].items()):
        held = [f"{text} {_gib(figures[name])} GiB" for name, text in _FIGURES.items() if name in figures]
        if held:  # the engine of several workers has tokens alone
            lines.append(f"  {worker}: {', '.join(held)}")
    if start["kv_cache_tokens"] is not None:
        lines.append(f"  KV cache for {start['kv_cache_tokens']:,} tokens")
    return "\n".join(lines)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]], total: tuple[str, ...]) -> str:
    """Words to the left, figures to the right, and a rule over the sum."""
    every = [head, *rows, total]
    widths = [max(len(row[i]) for row in every) for i in range(len(head))]
    lines = [_line(row, widths) for row in every]
    rule = "-" * (sum(widths[:4]) + 3 * 2)
    return "\n".join(["  " + line for line in (*lines[:-1], rule, lines[-1])])


def _line(row: tuple[str, ...], widths: Iterable[int]) -> str:
    cells = zip(row, widths, (str.ljust, str.ljust, str.rjust, str.rjust, str.ljust), strict=True)
    return "  ".join(justify(cell, width) for cell, width, justify in cells).rstrip()


def _gib(size: float) -> str:
    return f"{size / _GIB:.2f}"


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.1f}"


def _clock(at_ms: int, form: str) -> str:
    return dt.datetime.fromtimestamp(at_ms / 1000, tz=dt.UTC).astimezone().strftime(form)
