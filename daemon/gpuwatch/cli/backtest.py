"""`gpuwatch rules backtest`: when rules would have fired on this host's own history; it tells nobody.

What the rules record, and the alerts that they make, are seen by those after them, as in the daemon; what
the daemon itself stored under these names is not.
"""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from gpuwatch import clock
from gpuwatch.cli.options import duration_ms, path_option, settings_of, state_option
from gpuwatch.errors import ConfigError, StoreError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from gpuwatch.rules import CompiledGroup, Verdict
    from gpuwatch.store.history import History

_MOST_STEPS: Final = 40_320  # where no step is named: seven days, every 15 s
_STEPS_MS: Final = (1000, 2000, 5000, 10_000, 15_000, 30_000, 60_000)  # beyond, the judge sees an outage


@click.command()
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
@path_option
@state_option
@click.option("--since", default="7d", help="So long until --until (7d), or from this TIME on; default 7d.")
@click.option("--until", help="Until this TIME; default: the newest scrape.")
@click.option("--step", help="From one judgement to the next, 1m at most; default: by the length.")
@click.option("--json", "as_json", is_flag=True, help="For programs, with every episode.")
def backtest(
    files: tuple[Path, ...],
    config_path: Path | None,
    state_dir: Path | None,
    **given: Any,  # noqa: ANN401 (since, until, step, as_json)
) -> None:
    """Show when the rules of FILES (default: those in force) would have fired on this host's history.

    A TIME is as for `gpuwatch query`. Judged every 15 s, a rule may fire up to 15 s late.
    """
    from gpuwatch import assembly, config, store  # noqa: PLC0415 (each command loads only what it needs)
    from gpuwatch.cli import story, walk  # noqa: PLC0415

    settings = config.with_rules(settings_of(config_path, state_dir), files)
    groups = assembly.compile_rules(settings)
    if not any(group.rules for group in groups):
        raise ConfigError([f"rules backtest: there is no rule in {', '.join(map(str, settings.rules))}"])
    found = story.Story.of(groups)
    with store.open_history(settings.state_dir) as history:
        instants = _instants(history, groups, given["since"], given["until"], given["step"])
        with _progress(walk.verdicts(history, groups, instants), len(instants)) as verdicts:
            for verdict in verdicts:
                found.add(verdict)
        troubles = [*found.troubles(), *(f"left out: {text}" for text in dict.fromkeys(history.damaged))]
    if given["as_json"]:
        click.echo(json.dumps(story.data(found, instants), ensure_ascii=False))
    else:
        click.echo("\n".join(story.text(found, instants)))
    for line in troubles:
        click.echo(line, err=True)


@contextmanager
def _progress(verdicts: Iterator[Verdict], length: int) -> Iterator[Iterable[Verdict]]:
    """The same, with a bar where somebody watches."""
    if not sys.stderr.isatty():
        yield verdicts
        return
    with click.progressbar(verdicts, length=length, file=sys.stderr, label="judging") as bar:
        yield bar


def _instants(
    history: History, groups: Sequence[CompiledGroup], since: str, until: str | None, step: str | None
) -> range:
    from gpuwatch.cli.query import instant_ms  # noqa: PLC0415

    span = history.span_ms()
    newest_ms = history.newest_ms()
    if span is None or newest_ms is None:
        raise StoreError("there is no sample yet; to cure it, let gpuwatch run")
    end_ms = newest_ms if until is None else instant_ms(until, "--until", newest_ms)
    start_ms = _since_ms(since, newest_ms, end_ms)
    if end_ms < span[0]:
        raise ConfigError([f"--until {until}: the history begins later, at {clock.utc_text(span[0])}"])
    if start_ms < span[0]:
        click.echo(f"the history goes back to {clock.utc_text(span[0])} only; judged from there", err=True)
        start_ms = span[0]
    step_ms = _step_ms(step, groups, end_ms - start_ms)
    instants = range(-(-start_ms // step_ms) * step_ms, end_ms + 1, step_ms)
    if not instants:
        raise ConfigError([f"--since {since}: nothing lies between it and the end"])
    return instants


def _since_ms(text: str, newest_ms: int, end_ms: int) -> int:
    from gpuwatch import config  # noqa: PLC0415
    from gpuwatch.cli.query import instant_ms  # noqa: PLC0415

    try:
        return end_ms - config.Duration.parse(text)
    except ValueError:
        return instant_ms(text, "--since", newest_ms)


def _step_ms(text: str | None, groups: Sequence[CompiledGroup], span_ms: int) -> int:
    if text is None:
        wanted_ms = max(span_ms // _MOST_STEPS, min((group.interval_ms for group in groups), default=0))
        return next((step for step in _STEPS_MS if step >= wanted_ms), _STEPS_MS[-1])
    step_ms = duration_ms(text, "--step")
    if not _STEPS_MS[0] <= step_ms <= _STEPS_MS[-1]:
        raise ConfigError([f"--step {text}: rules are judged every 1s to 1m"])
    return step_ms
