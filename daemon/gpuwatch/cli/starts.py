"""`gpuwatch server starts`: how each start of a server went, from rows; asks neither server nor log."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
from typing import TYPE_CHECKING, Final

import click

from gpuwatch.cli.options import open_view, path_option, settings_of, state_option
from gpuwatch.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from gpuwatch.records import ServerStart

_GIB: Final = 1 << 30
_HEAD: Final = ("SERVER", "BEGAN", "HEALTHY AFTER", "OUTCOME", "VERSION", "WEIGHTS", "KV CACHE", "TOKENS")
_WHEN_ENDED: Final = "FAILURE"


@click.command(name="starts")
@click.argument("name", required=False)
@path_option
@state_option
@click.option("--limit", default=20, help="How many, the newest first.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def starts(
    name: str | None,
    config_path: Path | None,
    state_dir: Path | None,
    limit: int,
    as_json: bool,  # noqa: FBT001
) -> None:
    """Show how servers started, or the server NAME: how long it took, its memory, and why it failed."""
    settings = settings_of(config_path, state_dir)
    with open_view(settings) as rows:
        found = rows.starts(name, limit)
    if not found and name is not None and name not in {server.name for server in settings.servers}:
        known = ", ".join(server.name for server in settings.servers) or "none"
        raise ConfigError([f"server starts {name}: no such server in the settings; there are: {known}"])
    if as_json:
        click.echo(json.dumps([dataclasses.asdict(start) for start in found], ensure_ascii=False))
    else:
        click.echo(rendered(found, settings.lang) if found else "no start has been seen yet")


def rendered(found: Sequence[ServerStart], lang: str) -> str:
    """A line a start; sizes are GiB, `2 x` where two workers say the same."""
    rows = [(*_HEAD, _WHEN_ENDED), *((*_row(start, lang), _failure(start)) for start in found)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEAD))]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
        for row in rows
    )


def _row(start: ServerStart, lang: str) -> tuple[str, ...]:
    from gpuwatch import notify  # noqa: PLC0415 (each command loads only what it needs)

    took_ms = None if start.healthy_at_ms is None else start.healthy_at_ms - start.began_at_ms
    began = dt.datetime.fromtimestamp(start.began_at_ms / 1000, tz=dt.UTC).astimezone()
    return (
        start.server,
        began.strftime("%Y-%m-%d %H:%M:%S"),
        "-" if took_ms is None else notify.duration(took_ms, lang),
        start.outcome + (", ended" if start.outcome == "healthy" and start.ended_at_ms is not None else ""),
        start.version or "-",
        _of_workers(start, "weights_bytes"),
        _of_workers(start, "kv_cache_bytes"),
        "-" if start.kv_cache_tokens is None else f"{start.kv_cache_tokens:,}",
    )


def _of_workers(start: ServerStart, name: str) -> str:
    told = [f"{its[name] / _GIB:.2f}" for _, its in sorted(start.figures.items()) if name in its]
    different = list(dict.fromkeys(told))
    return ", ".join(f"{told.count(one)} x {one}" if told.count(one) > 1 else one for one in different) or "-"


def _failure(start: ServerStart) -> str:
    """The class, its figures, and the line that said it where no class knows the cause."""
    if not start.failure:
        return ""
    told = ", ".join(_fact(name, value) for name, value in _in_order(start.facts).items())
    line = start.lines[0] if start.failure == "unknown" and start.lines else ""
    return "; ".join(part for part in (start.failure, told, line) if part)


def _in_order(facts: Mapping[str, str]) -> Mapping[str, str]:
    """How it ended comes last."""
    last = ("status", "signal")
    return {**{k: v for k, v in facts.items() if k not in last}, **{k: facts[k] for k in last if k in facts}}


def _fact(name: str, value: str) -> str:
    words = name.removesuffix("_bytes").removesuffix("_s").replace("_", " ")
    if name.endswith("_bytes"):
        return f"{words} {int(value) / _GIB:.2f} GiB"
    return f"{words} {value} s" if name.endswith("_s") else f"{words} {value}"
