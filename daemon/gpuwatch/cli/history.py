"""`gpuwatch history` and `gpuwatch why`: what was done and what it cost, and how it was decided."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from gpuwatch import clock
from gpuwatch.cli.options import open_view, path_option, settings_of, state_option, told
from gpuwatch.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


@click.command(name="history")
@click.argument("server", required=False)
@path_option
@state_option
@click.option("-n", "limit", default=20, type=click.IntRange(min=1), help="How many, the newest first.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def history(
    server: str | None,
    config_path: Path | None,
    state_dir: Path | None,
    limit: int,
    as_json: bool,  # noqa: FBT001
) -> None:
    """Show what was done, to all servers or to SERVER: why, how it ended, and what it cost."""
    from gpuwatch.cli import past  # noqa: PLC0415 (each command loads only what it needs)

    settings = settings_of(config_path, state_dir)
    with open_view(settings) as rows:
        found = past.gather(rows, server, limit, clock.SystemClock().now_ms())
    if not found and server is not None and server not in {each.name for each in settings.servers}:
        known = ", ".join(each.name for each in settings.servers) or "none"
        raise ConfigError([f"history {server}: no such server in the settings; there are: {known}"])
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False))
    else:
        click.echo(past.render(found, settings.lang) or told(settings, "history.nothing"))


@click.command(name="why")
@click.argument("what", required=False, metavar="[ID|ALERT]")
@path_option
@state_option
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def why(what: str | None, config_path: Path | None, state_dir: Path | None, as_json: bool) -> None:  # noqa: FBT001
    """Show how the remediation ID was decided and what came of it, or why nothing is done about ALERT.

    Without a name: everything that is not being done at present, and why.
    """
    from gpuwatch.cli import decision  # noqa: PLC0415 (each command loads only what it needs)

    settings = settings_of(config_path, state_dir)
    with open_view(settings) as rows:
        found = decision.gather(rows, settings.state_dir, what, clock.SystemClock().now_ms())
    if as_json:
        click.echo(json.dumps(found, ensure_ascii=False))
    else:
        click.echo(decision.render(found, settings.lang) or told(settings, "history.no_refusal"))
