"""`gpuwatch rules`: checks rule files, and tests them on made-up series; changes nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from gpuwatch.cli.backtest import backtest
from gpuwatch.cli.options import path_option, settings_of, state_option
from gpuwatch.errors import ConfigError, GpuwatchError

if TYPE_CHECKING:
    import re
    from collections.abc import Sequence

    from gpuwatch.cli.ruletests import Outcome

_LINT_STATUS = 3  # promtool's, for rules that are right but look mistaken


@click.group()
def rules() -> None:
    """Check rule files, test them on made-up series, or on this host's own history."""


rules.add_command(backtest)


@rules.command()
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
@path_option
@state_option
@click.option(
    "--lint",
    "strictness",
    type=click.Choice(["none", "warn", "error"]),
    default="warn",
    help="What to make of rules that look mistaken by what this host stores; error: exit status 3.",
)
def check(files: tuple[Path, ...], config_path: Path | None, state_dir: Path | None, strictness: str) -> None:
    """Check rule FILES or folders, by default the rules in force; exit status 1 if one is wrong."""
    from gpuwatch import config  # noqa: PLC0415 (each command loads only what it needs)
    from gpuwatch.cli import rulecheck  # noqa: PLC0415

    settings = settings_of(config_path, state_dir)
    paths = config.rule_paths(config.with_rules(settings, files))
    if not paths:
        where = ", ".join(map(str, files or settings.rules))
        raise ConfigError([f"rules check: there is no rule file in {where}"])
    checked = [rulecheck.checked(path) for path in paths]
    remarks: dict[Path, list[str]] = {}
    if strictness != "none":
        series, why_not = rulecheck.stored_series(settings.state_dir)
        if why_not:
            click.echo(f"checked without what this host stores: {why_not}", err=True)
        remarks = rulecheck.remarks(checked, series)
    for one in checked:
        lines = one.mistakes or remarks.get(one.path, [])
        verdict = f"FAILED, {_count(len(lines), 'mistake')}"
        if not one.mistakes:
            looks_odd = f", {_count(len(lines), 'remark')}" if lines else ""
            verdict = f"SUCCESS, {_count(one.count, 'rule')}{looks_odd}"
        click.echo("\n  ".join([f"{one.path}: {verdict}", *lines]))
    if any(one.mistakes for one in checked):
        sys.exit(1)
    if strictness == "error" and any(remarks.values()):
        sys.exit(_LINT_STATUS)


@rules.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--run", "patterns", multiple=True, help="Only tests whose name has this (a regex); may be repeated."
)
@click.option("--diff", is_flag=True, help="Show what differs line by line.")
@click.option(
    "--junit", type=click.Path(path_type=Path, dir_okay=False), help="Write the results there as JUnit XML."
)
@click.option("--debug", is_flag=True, help="Show all series at the end of each test.")
def test(
    files: tuple[Path, ...],
    patterns: tuple[str, ...],
    diff: bool,  # noqa: FBT001
    junit: Path | None,
    debug: bool,  # noqa: FBT001
) -> None:
    """Run unit tests of rules, in the format of `promtool test rules`; exit status 1 if one fails."""
    from gpuwatch.cli.ruletests import report  # noqa: PLC0415

    chosen = _regex(patterns)
    results: dict[Path, Sequence[Outcome] | str] = {}
    for path in files:
        try:
            results[path] = outcomes = _outcomes(path, chosen)
        except GpuwatchError as error:
            results[path] = str(error)
            click.echo(f"{path}: FAILED\n  " + str(error).replace("\n", "\n  "))
            continue
        for line in report.lines(path, outcomes, diff=diff):
            click.echo(line)
        for outcome in outcomes if debug else ():
            click.echo("\n".join([f"series of {outcome.test.name}:", *report.dump(outcome.memory)]), err=True)
    if junit:
        _write(junit, report.junit(results))
    if any(isinstance(found, str) or any(one.failures for one in found) for found in results.values()):
        sys.exit(1)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _outcomes(path: Path, chosen: re.Pattern[str] | None) -> list[Outcome]:
    from gpuwatch.cli import ruletests  # noqa: PLC0415
    from gpuwatch.config import testfiles  # noqa: PLC0415

    file = testfiles.load_unit_tests(path)
    paths, missing = ruletests.rule_paths(file)
    groups = ruletests.compiled(file, paths)
    warnings = [f"{path}: WARNING: no rule file matches {pattern}" for pattern in missing]
    warnings += [
        f"{check.place}: WARNING: no rule is called {check.alert}"
        for check in ruletests.unknown_alerts(file, groups)
    ]
    for warning in warnings:
        click.echo(warning, err=True)
    return [
        ruletests.run(file, groups, one) for one in file.tests if chosen is None or chosen.search(one.name)
    ]


def _regex(patterns: tuple[str, ...]) -> re.Pattern[str] | None:
    import re  # noqa: PLC0415

    try:
        return re.compile("|".join(patterns)) if patterns else None
    except re.error as error:
        raise ConfigError([f"--run {'|'.join(patterns)!r} is no regex: {error}"]) from error


def _write(path: Path, data: bytes) -> None:
    try:
        path.write_bytes(data)
    except OSError as error:
        raise ConfigError([f"--junit {path}: cannot be written: {error.strerror}"]) from error
