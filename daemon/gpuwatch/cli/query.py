"""`gpuwatch query`: what an expression comes to on this host's own history, as text, JSON, CSV or a chart.

It reads metrics.db, beside a running daemon or without one, and writes nothing.
"""

from __future__ import annotations

import codecs
import csv
import datetime as dt
import io
import json
import os
import shutil
import sys
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final

import click

from gpuwatch import clock
from gpuwatch.cli.options import duration_ms, path_option, settings_of, state_option
from gpuwatch.errors import ConfigError, QueryError, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from gpuwatch.cli.answers import Result, When
    from gpuwatch.cli.plot import Canvas
    from gpuwatch.promql import Answer, Expr, Limits
    from gpuwatch.store.history import History

MOST_POINTS: Final = 11_000  # a series, as Prometheus has it
_POINTS: Final = 240  # a series, unless --step says otherwise: two for each column of a wide terminal
_PLOT_RANGE: Final = "1h"
_OLD_MS: Final = 60_000
_LAST_MS: Final = 253_402_300_799_000  # the end of year 9999, where calendars end
_STEPS_S: Final = (1, 2, 5, 10, 15, 20, 30, 60, 120, 300, 600, 900, 1200, 1800, 3600, 7200, 10_800, 21_600)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """The options as given."""

    config_path: Path | None
    state_dir: Path | None
    at: str | None
    span: str | None
    start: str | None
    end: str | None
    step: str | None
    timeout: str
    form: str
    plain: bool


@click.command()
@click.argument("expr")
@path_option
@state_option
@click.option("--at", help="One instant; default: the newest scrape. A TIME as above.")
@click.option("--range", "span", help="So long until --to (30m, 24h).")
@click.option("--from", "start", help="From this TIME on, instead of --range.")
@click.option("--to", "end", help="Until this TIME; default: the newest scrape.")
@click.option("--step", help="From point to point (15s); default: about 240 points.")
@click.option("--timeout", default="30s", help="How long it may take; default 30s.")
@click.option("--json", "form", flag_value="json", help="As `data` of Prometheus' HTTP API.")
@click.option("--csv", "form", flag_value="csv", help="A line a sample, a column a label.")
@click.option(
    "--plot", "form", flag_value="plot", help=f"A chart; of the last {_PLOT_RANGE} if no range is named."
)
@click.option("--text", "form", flag_value="text", default=True, help="A table, the default.")
@click.option("--ascii", "plain", is_flag=True, help="Draw with ASCII characters alone.")
def query(expr: str, **given: Any) -> None:  # noqa: ANN401 (click's options, which _Asked names)
    """Evaluate the PromQL expression EXPR over what gpuwatch has stored.

    A TIME is 2026-11-21T09:00:00Z (without a zone: local), Unix seconds, now, or -5m: so long before the
    newest scrape.
    """
    from gpuwatch import promql, store  # noqa: PLC0415 (each command loads only what it needs)
    from gpuwatch.cli import answers  # noqa: PLC0415

    asked = _Asked(**given)
    is_over = _deadline(duration_ms(asked.timeout, "--timeout"))
    try:
        parsed = promql.parse(expr)
        with store.open_history(settings_of(asked.config_path, asked.state_dir).state_dir) as history:
            when = _when(asked, _newest_ms(history, asked))
            answer = _answer(parsed, history, when, promql.Limits(is_over=is_over))
            left_out = [f"left out: {text}" for text in history.damaged]
    except QueryError as error:
        raise QueryError(pointed(expr, error), error.position) from error
    for remark in (*left_out, *(one.located(expr) for one in (*answer.warnings, *answer.infos))):
        click.echo(remark, err=True)
    _show(answers.result_of(answer, parsed, when), asked.form, plain=asked.plain)


def pointed(text: str, error: QueryError) -> str:
    """The error with the line of the expression it is about, and a caret under the place."""
    from gpuwatch.cli.plot import columns_of  # noqa: PLC0415

    before, after = text[: error.position], text[error.position :]
    start = before.rpartition("\n")[2].expandtabs(4)
    line = start + after.partition("\n")[0].replace("\t", "    ")
    return f"{error.what}\n  {line}\n  {' ' * columns_of(start)}^"


# ---- when


def _newest_ms(history: History, asked: _Asked) -> int:
    """When the newest scrape was, with a word on standard error if that is long ago and nobody chose it."""
    newest_ms = history.newest_ms()
    if newest_ms is None:
        raise StoreError("there is no sample yet; to cure it, let gpuwatch run")
    now_ms = clock.SystemClock().now_ms()
    if asked.at is None and asked.end is None and now_ms - newest_ms > _OLD_MS:
        click.echo(
            f"the newest scrape is of {clock.utc_text(newest_ms)}; gpuwatch has not written since", err=True
        )
    return newest_ms


def _when(asked: _Asked, newest_ms: int) -> When:
    from gpuwatch.cli.answers import When  # noqa: PLC0415

    if asked.span is None and asked.start is None and asked.form != "plot":
        if asked.end is not None or asked.step is not None:
            raise click.UsageError("--to and --step are for a range: name --range or --from too")
        at_ms = newest_ms if asked.at is None else instant_ms(asked.at, "--at", newest_ms)
        return When(start_ms=at_ms, end_ms=at_ms, step_ms=None)
    if asked.at is not None:
        raise click.UsageError("--at is for one instant; a range ends with --to")
    end_ms = newest_ms if asked.end is None else instant_ms(asked.end, "--to", newest_ms)
    if asked.start is None:
        start_ms = end_ms - duration_ms(_PLOT_RANGE if asked.span is None else asked.span, "--range")
    elif asked.span is None:
        start_ms = instant_ms(asked.start, "--from", newest_ms)
    else:
        raise click.UsageError("--range and --from both say where it begins: name one")
    if start_ms > end_ms:
        raise ConfigError([f"--from {asked.start}: it is later than the end, {clock.utc_text(end_ms)}"])
    return When(start_ms=start_ms, end_ms=end_ms, step_ms=_step_ms(asked.step, end_ms - start_ms))


def _step_ms(text: str | None, span_ms: int) -> int:
    if text is None:
        return next((s * 1000 for s in _STEPS_S if s * 1000 * _POINTS >= span_ms), -(-span_ms // _POINTS))
    step_ms = duration_ms(text, "--step")
    if step_ms <= 0 or span_ms // step_ms >= MOST_POINTS:
        raise ConfigError([f"--step {text}: a series may have {MOST_POINTS} points; name a longer step"])
    return step_ms


def instant_ms(text: str, option: str, newest_ms: int) -> int:
    """The instant that a text names, `-5m` counting back from the newest scrape; ConfigError."""
    if text.startswith("-"):
        at_ms = newest_ms - duration_ms(text[1:], option)
    elif text == "now":
        at_ms = clock.SystemClock().now_ms()
    else:
        at_ms = _calendar_ms(text, option)
    if not 0 <= at_ms <= _LAST_MS:
        raise ConfigError([f"{option} {text}: it is before 1970 or after 9999"])
    return at_ms


def _calendar_ms(text: str, option: str) -> int:
    try:
        return round(Decimal(text) * 1000)
    except (ArithmeticError, ValueError):
        pass
    try:
        return round(dt.datetime.fromisoformat(text).astimezone(dt.UTC).timestamp() * 1000)
    except (ValueError, OverflowError) as error:
        wanted = "write 2026-11-21T09:00:00Z, Unix seconds, now, or -5m"
        raise ConfigError([f"{option} {text!r} is no time; {wanted}"]) from error


# ---- what


def _deadline(timeout_ms: int) -> Callable[[], bool]:
    end_s = clock.monotonic_s() + timeout_ms / 1000
    return lambda: clock.monotonic_s() > end_s


def _answer(expr: Expr, history: History, when: When, limits: Limits) -> Answer:
    from gpuwatch import promql  # noqa: PLC0415

    if when.step_ms is None:
        return promql.evaluate(expr, history, when.end_ms, limits)
    return promql.evaluate_range(expr, history, when.start_ms, when.end_ms, when.step_ms, limits)


def _show(result: Result, form: str, *, plain: bool) -> None:
    from gpuwatch.cli import answers  # noqa: PLC0415

    if not (result.series or result.text) and form in {"text", "plot"}:
        click.echo(f"no series has a value then ({answers.local_span(result.when)})", err=True)
    elif form == "json":
        click.echo(json.dumps(answers.data(result), ensure_ascii=_encoding() != "utf-8"))
    elif form == "csv":
        table = io.StringIO()
        csv.writer(table, lineterminator="\n").writerows(answers.rows(result))
        click.echo(table.getvalue().encode(), nl=False)  # programs get every character as it is
    else:
        lines = answers.chart(result, _canvas(plain=plain)) if form == "plot" else answers.table(result)
        for line in lines:
            click.echo(_printable(line))


def _canvas(*, plain: bool) -> Canvas:
    """The terminal's width, and what may be drawn in it."""
    from gpuwatch.cli.plot import Canvas  # noqa: PLC0415

    size = shutil.get_terminal_size()
    return Canvas(
        width=size.columns,
        height=max(8, min(20, size.lines - 14)),
        ascii=plain or _encoding() != "utf-8",
        colour=sys.stdout.isatty() and not os.environ.get("NO_COLOR"),
    )


def _encoding() -> str:
    return codecs.lookup(sys.stdout.encoding or "ascii").name


def _printable(text: str) -> str:
    """The text as far as standard output has its characters."""
    return text.encode(_encoding(), "replace").decode(_encoding())
