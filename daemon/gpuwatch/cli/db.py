"""`gpuwatch db`: how large the databases are, whether they are whole, copies, and samples as files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from gpuwatch import clock
from gpuwatch.cli.options import duration_ms, path_option, settings_of, state_option
from gpuwatch.errors import ConfigError, QueryError, StoreError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpuwatch.promql import Matcher
    from gpuwatch.store.export import Sheet

_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")


@click.group()
def db() -> None:
    """Look after the databases: sizes, checks, copies, samples as files."""


@db.command()
@path_option
@state_option
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def info(config_path: Path | None, state_dir: Path | None, as_json: bool) -> None:  # noqa: FBT001
    """Show how large each file is, what it holds, and how far back it goes."""
    from gpuwatch.store import files  # noqa: PLC0415 (each command loads only what it needs)

    found = [files.info(path) for path in _files(config_path, state_dir)]
    click.echo(json.dumps(found) if as_json else "\n\n".join(_as_text(figures) for figures in found))


@db.command()
@path_option
@state_option
def check(config_path: Path | None, state_dir: Path | None) -> None:
    """Read every page and every frame; exit status 1 if any is damaged. The daemon may run."""
    from gpuwatch.store import files  # noqa: PLC0415

    damaged = 0
    for path in _files(config_path, state_dir):
        lines = list(files.damage(path))
        damaged += len(lines)
        for line in lines:
            click.echo(f"{path}: {line}")
        click.echo(f"{path}: {'DAMAGED' if lines else 'whole'}")
    if damaged:
        click.echo(
            "What is damaged is left out when it is read; a new file is begun if SQLite refuses this one."
        )
        sys.exit(1)


@db.command()
@path_option
@state_option
def compact(config_path: Path | None, state_dir: Path | None) -> None:
    """Write both files anew without their free pages; gpuwatch must not run."""
    from gpuwatch.store import files  # noqa: PLC0415

    for path in _files(config_path, state_dir):
        before, after = files.compact(path)
        click.echo(f"{path}: {_size(before)} before, {_size(after)} now")


@db.command()
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@path_option
@state_option
def backup(folder: Path, config_path: Path | None, state_dir: Path | None) -> None:
    """Copy both files to FOLDER as they are now; the daemon may run.

    To go back: stop gpuwatch, put the copies in place of the files, remove their -wal and -shm, start.
    """
    from gpuwatch.store import files  # noqa: PLC0415

    for path in _files(config_path, state_dir):
        copy = files.backup(path, folder)
        click.echo(f"{copy}: {_size(copy.stat().st_size)}")


@db.command()
@click.argument("file", type=click.Path(path_type=Path, allow_dash=True))
@path_option
@state_option
@click.option(
    "--match", default='{__name__=~".+"}', help="Which series, as PromQL selects them; default: all."
)
@click.option("--since", default="1d", help="How far back from the newest sample (6h, 7d); default 1d.")
@click.option("--format", "kind", type=click.Choice(["csv", "parquet"]), help="Default: by FILE's ending.")
def export(
    file: Path, config_path: Path | None, state_dir: Path | None, match: str, since: str, kind: str | None
) -> None:
    """Write samples to FILE as CSV (- for standard output) or Parquet; the daemon may run."""
    from gpuwatch import store  # noqa: PLC0415
    from gpuwatch.store import export as sheets  # noqa: PLC0415

    matchers, span_ms = _matchers(match), duration_ms(since, "--since")
    with store.open_history(settings_of(config_path, state_dir).state_dir) as history:
        span = history.span_ms()
        if span is None:
            raise StoreError("there is no sample yet; to cure it, let gpuwatch run")
        try:
            sheet = _sheet(file, kind or ("parquet" if file.suffix == ".parquet" else "csv"))
            count = sheets.export(history, matchers, (span[1] - span_ms, span[1]), sheet)
        except OSError as error:
            message = f"cannot write {file}: {error.strerror}; to cure it, name another file or make room"
            raise StoreError(message) from error
        for text in history.damaged:
            click.echo(f"left out: {text}", err=True)
    click.echo(f"{count} samples", err=True)


def _sheet(file: Path, kind: str) -> Sheet:
    from gpuwatch.store import export as sheets  # noqa: PLC0415

    if kind == "parquet":
        return sheets.ParquetSheet(file)
    if str(file) == "-":
        return sheets.CsvSheet(sys.stdout)
    return sheets.CsvSheet(file.open("w", encoding="utf-8", newline=""), closes=True)


def _matchers(text: str) -> Sequence[Matcher]:
    from gpuwatch import promql  # noqa: PLC0415
    from gpuwatch.promql.ast import VectorSelector  # noqa: PLC0415

    try:
        expr = promql.parse(text)
    except QueryError as error:
        raise ConfigError([f"--match {text!r}: {error} (at character {error.position + 1})"]) from error
    if not isinstance(expr, VectorSelector):
        raise ConfigError([f'--match {text!r} is no selector; write name{{label="value"}}'])
    return expr.matchers


def _files(config_path: Path | None, state_dir: Path | None) -> list[Path]:
    from gpuwatch import store  # noqa: PLC0415

    settings = settings_of(config_path, state_dir)
    paths = [settings.state_dir / store.METRICS_DB]
    if not (settings.store.state_url or settings.store.state_url_file):
        paths.append(settings.state_dir / store.STATE_DB)
    return paths


def _as_text(figures: dict[str, Any]) -> str:
    sizes = f"{_size(figures['bytes'])}, {_size(figures['free_bytes'])} of it free"
    log = f"write-ahead log {_size(figures['wal_bytes'])}, schema {figures['schema']}"
    lines = [f"{figures['path']}  {sizes}, {log}"]
    if "frames" not in figures:
        return "\n".join([*lines, *(f"  {table:<13} {count:>9}" for table, count in figures["rows"].items())])
    frames = figures["frames"]
    lines.append(f"  {figures['series']} series of {figures['targets']} targets")
    for name in ("rows", "frames", "hourly"):
        part = figures[name]
        lines.append(
            f"  {name:<7} {part['count']:>9}  {_size(part['bytes']):>10}"
            f"  {_span(part['first_ms'], part['last_ms'])}"
        )
    if frames["cells"]:
        lines.append(f"  {frames['cells']} samples in frames, {frames['bytes_per_cell']:.2f} bytes each")
    return "\n".join(lines)


def _span(first_ms: int | None, last_ms: int | None) -> str:
    if first_ms is None or last_ms is None:
        return "none"
    return f"{clock.utc_text(first_ms)} to {clock.utc_text(last_ms)}"


def _size(count: float) -> str:
    unit = 0
    while count >= 1024 and unit < len(_UNITS) - 1:
        count, unit = count / 1024, unit + 1
    return f"{count:.0f} {_UNITS[unit]}" if unit == 0 else f"{count:.1f} {_UNITS[unit]}"
