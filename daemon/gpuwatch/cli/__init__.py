"""The `gpuwatch` command: runs the daemon, shows rows, leaves wishes; it never reaches into the daemon."""

from __future__ import annotations

import getpass
import json
from pathlib import Path
from typing import Any

import click

import gpuwatch
from gpuwatch import clock, daemon
from gpuwatch.cli.capture import capture
from gpuwatch.cli.config import config_
from gpuwatch.cli.db import db
from gpuwatch.cli.guest import guest
from gpuwatch.cli.history import history, why
from gpuwatch.cli.options import (
    config_path_of,
    duration_ms,
    open_view,
    path_option,
    settings_of,
    state_option,
    wish,
)
from gpuwatch.cli.query import query
from gpuwatch.cli.rules import rules
from gpuwatch.cli.starts import starts
from gpuwatch.errors import ConfigError, GpuwatchError


class _Group(click.Group):
    """Shows foreseen errors as their text, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 (click's own signature)
        """Exit with 1 on an error of ours."""
        try:
            return super().invoke(ctx)
        except GpuwatchError as error:
            click.echo(f"gpuwatch: {error}", err=True)
            ctx.exit(1)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(gpuwatch.__version__, prog_name="gpuwatch")
def main() -> None:
    """Watch the GPUs of this host and its vLLM server, and heal what can be healed."""


@main.command()
@path_option
@click.option(
    "--recording", type=click.Path(path_type=Path, exists=True), help="Play this as if it were the host."
)
@click.option("--speed", type=click.FloatRange(min=0.1, max=1000), default=1.0, help="How fast to play it.")
@click.option("--log-level", default="info", type=click.Choice(["debug", "info", "warning", "error"]))
def run(config_path: Path | None, recording: Path | None, speed: float, log_level: str) -> None:
    """Run the daemon in the foreground, as systemd does."""
    daemon.become(config_path_of(config_path), recording, speed, log_level)


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@path_option
@click.option("--for", "duration", help="Stop after this long (60s, 10m); default: at Ctrl-C.")
def record(file: Path, config_path: Path | None, duration: str | None) -> None:
    """Write what the sources read to FILE (.xz, .gz or plain JSON lines), a line a second."""
    from gpuwatch import service  # noqa: PLC0415

    ticks = service.record(
        settings_of(config_path), file, None if duration is None else duration_ms(duration)
    )
    click.echo(f"{ticks} seconds in {file}, {file.stat().st_size} bytes")


@main.command()
@path_option
@state_option
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def status(config_path: Path | None, state_dir: Path | None, as_json: bool) -> None:  # noqa: FBT001
    """Show GPUs, servers, alerts, and what is being done about them or why nothing is."""
    from gpuwatch.cli import view  # noqa: PLC0415

    settings = settings_of(config_path, state_dir)
    with open_view(settings) as rows:
        seen = view.gather(rows, settings, clock.SystemClock().now_ms())
    click.echo(json.dumps(seen, ensure_ascii=False) if as_json else view.render(seen, settings.lang))


@main.command(name="memory")
@path_option
@state_option
@click.option("--gpu", help="Only this GPU, by its index or UUID.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def memory_(config_path: Path | None, state_dir: Path | None, gpu: str | None, as_json: bool) -> None:  # noqa: FBT001
    """Show where the memory of each GPU is: weights, KV cache, other processes, and what nobody explains."""
    from gpuwatch.cli import ledger  # noqa: PLC0415

    settings = settings_of(config_path, state_dir)
    with open_view(settings) as rows:
        seen = ledger.gather(rows, settings, clock.SystemClock().now_ms(), gpu)
    click.echo(json.dumps(seen, ensure_ascii=False) if as_json else ledger.render(seen, settings.lang))


@main.command()
@path_option
@state_option
@click.option("--limit", default=20, help="How many past changes.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def alerts(config_path: Path | None, state_dir: Path | None, limit: int, as_json: bool) -> None:  # noqa: FBT001
    """Show active alerts and the last changes."""
    from gpuwatch.cli import view  # noqa: PLC0415

    with open_view(settings_of(config_path, state_dir)) as rows:
        seen = view.gather_alerts(rows, limit)
    click.echo(json.dumps(seen, ensure_ascii=False) if as_json else view.render_alerts(seen))


@main.command()
@path_option
@click.option(
    "--rules", "rule_files", multiple=True, type=click.Path(path_type=Path), help="Check these instead."
)
def check(config_path: Path | None, rule_files: tuple[Path, ...]) -> None:
    """Check settings and rules, and print the settings in force with their defaults."""
    import yaml  # noqa: PLC0415

    from gpuwatch import assembly, config, notify  # noqa: PLC0415

    settings = config.with_rules(settings_of(config_path), rule_files)
    paths = config.rule_paths(settings)
    groups = assembly.compile_rules(settings)
    notify.of_settings(settings.receivers, clock.SystemClock())
    click.echo(yaml.safe_dump(config.shown(settings), sort_keys=False, allow_unicode=True).rstrip())
    count = sum(len(group.rules) for group in groups)
    click.echo(
        f"# {config_path_of(config_path) or 'defaults'}: right. {count} rules in {len(paths)} files: right."
    )


@main.command()
@click.argument("file", type=click.Path(path_type=Path, exists=True))
@path_option
@click.option(
    "--rules", "rule_files", multiple=True, type=click.Path(path_type=Path), help="Rule files or folders."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def replay(file: Path, config_path: Path | None, rule_files: tuple[Path, ...], as_json: bool) -> None:  # noqa: FBT001
    """Walk a recording as fast as it can be read, and print what would have happened."""
    from gpuwatch import service  # noqa: PLC0415
    from gpuwatch.cli import player  # noqa: PLC0415

    service.set_up_logging("error")
    for event in player.replay(file, config_path_of(config_path), rule_files):
        click.echo(json.dumps(event, ensure_ascii=False) if as_json else player.as_text(event))


@main.command()
@path_option
@state_option
@click.option("--for", "duration", help="How long (30m, 2h); default: until `gpuwatch resume`.")
def pause(config_path: Path | None, state_dir: Path | None, duration: str | None) -> None:
    """Begin no remediation and take back what is under way; go on watching and telling."""
    from gpuwatch import remediation  # noqa: PLC0415

    now_ms = clock.SystemClock().now_ms()
    until_ms = remediation.FOREVER_MS if duration is None else now_ms + duration_ms(duration)
    wished = remediation.wishes.pause(until_ms)
    wish(settings_of(config_path, state_dir), wished, "pause", until_ms=str(until_ms))
    click.echo(
        f"remediation is paused {'until `gpuwatch resume`' if duration is None else f'for {duration}'}"
    )


@main.command()
@click.option("--skip-backlog", is_flag=True, help="Leave alone the alerts that have begun by now.")
@path_option
@state_option
def resume(config_path: Path | None, state_dir: Path | None, *, skip_backlog: bool) -> None:
    """End a pause, close the breaker, and let gpuwatch act again on servers where remediations failed."""
    from gpuwatch import remediation  # noqa: PLC0415

    wished = remediation.wishes.resume(clock.SystemClock().now_ms(), skip_backlog=skip_backlog)
    wish(settings_of(config_path, state_dir), wished, "resume")
    click.echo("remediation may go on")


def _word_command(word: str, verb: str, text: str) -> None:
    @main.command(name=verb, help=text)
    @click.argument("remediation_id")
    @path_option
    @state_option
    def command(remediation_id: str, config_path: Path | None, state_dir: Path | None) -> None:
        from gpuwatch import remediation  # noqa: PLC0415

        settings = settings_of(config_path, state_dir)
        with open_view(settings) as view:
            live = {r.plan.id for r in view.live_remediations()}
        if remediation_id not in live:
            known = ", ".join(sorted(live)) or "none"
            raise ConfigError(
                [f"{verb} {remediation_id}: no such remediation is under way; there are: {known}"]
            )
        wished = remediation.wishes.word(remediation_id, word, getpass.getuser())
        wish(settings, wished, verb, remediation=remediation_id)
        click.echo(f"{remediation_id}: {word}; the daemon takes it up within a second")


main.add_command(capture)
main.add_command(config_)
main.add_command(db)
main.add_command(guest)
main.add_command(history)
main.add_command(why)
main.add_command(query)
main.add_command(rules)
_word_command("approved", "approve", "Let a remediation that waits for approval go on.")
_word_command("denied", "deny", "Refuse a remediation that waits for approval.")
_word_command("abort", "abort", "End a remediation; what it did is taken back.")


@main.group()
def server() -> None:
    """Start a server that gpuwatch runs as a plain process, and see how servers started."""


server.add_command(starts)


@server.command(name="start")
@click.argument("name")
@path_option
def server_start(name: str, config_path: Path | None) -> None:
    """Start the server NAME, which must have a `process` supervisor."""
    from gpuwatch import servers  # noqa: PLC0415

    settings = settings_of(config_path)
    named = [each for each in settings.servers if each.name == name]
    if not named:
        known = ", ".join(each.name for each in settings.servers) or "none"
        raise ConfigError([f"server start {name}: no such server in the settings; there are: {known}"])
    click.echo(servers.process_of(named[0], settings.state_dir).start(clock.SystemClock().now_ms()))
