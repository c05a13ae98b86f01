"""`gpuwatch config`: the settings that a server has had and what they came to; leaves wishes, acts never."""

from __future__ import annotations

import getpass
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from gpuwatch import clock
from gpuwatch.cli.options import path_option, settings_of, state_option, wish
from gpuwatch.cli.revisionlog import Books, books_of, local, log_of, table
from gpuwatch.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from gpuwatch.config import ServerSettings
    from gpuwatch.records import Argument, Revision

_LOOSE_TRUTH: Final = re.compile(r"(?i:true|false|yes|no|on|off)")


@click.group(name="config")
def config_() -> None:
    """See and change the settings that a vLLM server is started with, as numbered revisions."""


def _about_a_server(function: Callable[..., None]) -> Callable[..., None]:
    """The argument SERVER and where its rows are."""
    return click.argument("name", metavar="SERVER")(path_option(state_option(function)))


@config_.command()
@_about_a_server
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def log(name: str, config_path: Path | None, state_dir: Path | None, as_json: bool) -> None:  # noqa: FBT001
    """Show the revisions of SERVER's settings, the newest first, and what each of them came to."""
    books = books_of(settings_of(config_path, state_dir), name)
    rows = log_of(books)
    if as_json:
        click.echo(json.dumps(rows, ensure_ascii=False))
    else:
        shown = f"{table(rows, books.settings.lang)}\n{books.told('config.note')}"
        click.echo(shown if rows else books.told("config.none_yet"))
        _tell_what_waits(books)


@config_.command()
@_about_a_server
@click.argument("number", metavar="[N]", type=int, required=False)
def show(name: str, config_path: Path | None, state_dir: Path | None, number: int | None) -> None:
    """Print revision N as vLLM reads it; default: the one in use."""
    from gpuwatch.servers import vllm_yaml  # noqa: PLC0415 (each command loads only what it needs)

    books = books_of(settings_of(config_path, state_dir), name)
    found = books.revision(books.present if number is None else number)
    why = " ".join(found.why.split())
    click.echo("# " + books.told("config.shown", server=name, why=why, **_about(found)))
    click.echo(vllm_yaml.dumped(found.arguments), nl=False)


@config_.command()
@_about_a_server
@click.argument("before", metavar="A", type=int)
@click.argument("after", metavar="[B]", type=int, required=False)
def diff(name: str, config_path: Path | None, state_dir: Path | None, before: int, after: int | None) -> None:
    """Show what changes from revision A to B; default of B: the one in use."""
    books = books_of(settings_of(config_path, state_dir), name)
    then = books.revision(books.present if after is None else after)
    lines = difference(books.revision(before).arguments, then.arguments)
    click.echo("\n".join(lines) or books.told("config.same", before=before, after=then.number))


@config_.command(name="set")
@_about_a_server
@click.argument("pairs", metavar="[KEY=VALUE]...", nargs=-1)
@click.option("--unset", multiple=True, metavar="KEY", help="Leave it to vLLM's default.")
@click.option(
    "--file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Take all from this file of `vllm serve --config` first.",
)
@click.option("--why", required=True, help="A sentence for those who read the log.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def set_(  # noqa: PLR0913 (click's own: an argument an option)
    name: str,
    config_path: Path | None,
    state_dir: Path | None,
    *,
    pairs: tuple[str, ...],
    unset: tuple[str, ...],
    file: Path | None,
    why: str,
    yes: bool,
) -> None:
    """Wish for other settings of SERVER: a VALUE is true, false, a number, JSON, or else a text."""
    from gpuwatch.servers import vllm_yaml  # noqa: PLC0415

    books = books_of(settings_of(config_path, state_dir), name)
    _must_have_folder(books.server)
    before = {} if file and not (books.revisions or books.waits) else _asked_last(books)
    given = vllm_yaml.loaded(file) if file else before
    after = vllm_yaml.canonical(changed(given, pairs, unset))
    _tell_what_waits(books)
    if before == after:
        _tell_that_nothing_changes(books)
    else:
        _confirm(books, difference(before, after), yes=yes)
        _leave(books, {"arguments": after, "revision": None, "why": why}, "config set")


@config_.command()
@_about_a_server
@click.argument("number", metavar="[N]", type=int, required=False)
@click.option("--why", default="", help="A sentence for those who read the log.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def rollback(
    name: str,
    config_path: Path | None,
    state_dir: Path | None,
    *,
    number: int | None,
    why: str,
    yes: bool,
) -> None:
    """Wish for revision N again; default: the last that proved good before the one in use."""
    books = books_of(settings_of(config_path, state_dir), name)
    _must_have_folder(books.server)
    target = books.revision(_good_before(books) if number is None else number)
    click.echo(books.told("config.chosen", **_about(target)))
    _tell_what_waits(books)
    if target.number == books.present and not books.waits and books.wanted in {None, target.number}:
        click.echo(books.told("config.nothing_changes"))
    else:
        _confirm(books, difference(books.revision(books.present).arguments, target.arguments), yes=yes)
        why = why or books.told("config.back_to", revision=target.number)
        wished = {"arguments": None, "revision": target.number, "why": why}
        _leave(books, wished, "config rollback")


# ---- what is changed


def changed(given: Mapping[str, Argument], pairs: Sequence[str], unset: Sequence[str]) -> dict[str, Argument]:
    """The arguments with these set and those left out; ConfigError names each pair that cannot be read."""
    names = {key: key.replace("-", "_") for key in unset}
    mistakes = [f"--unset {key}: it is not set" for key, name in names.items() if name not in given]
    after = {name: value for name, value in given.items() if name not in names.values()}
    for pair in pairs:
        key, is_pair, text = pair.partition("=")
        if not is_pair or not key:
            mistakes.append(f"{pair}: write KEY=VALUE, or --unset KEY")
        elif _LOOSE_TRUTH.fullmatch(text) and text not in {"true", "false"}:
            mistakes.append(f"{pair}: write {key}=true or {key}=false, or for the word {key}='\"{text}\"'")
        else:
            name, value = _named(key.replace("-", "_"), _value(text))
            after[name] = value
    if mistakes:
        raise ConfigError(mistakes)
    return after


def difference(before: Mapping[str, Argument], after: Mapping[str, Argument]) -> list[str]:
    """A line for each argument that goes (`-`) or comes (`+`), by name."""
    from gpuwatch.servers import vllm_yaml  # noqa: PLC0415

    lines = []
    for name in sorted({*before, *after}):
        old, new = ({vllm_yaml.line(name, each[name])} if name in each else set() for each in (before, after))
        lines += [f"- {line}" for line in old - new] + [f"+ {line}" for line in new - old]
    return lines


def _named(name: str, value: Argument) -> tuple[str, Argument]:
    """`no_x=true` and `x=false` are one argument, and one of them must not stand beside the other."""
    is_negative = name.startswith("no_") and isinstance(value, bool)
    return (name.removeprefix("no_"), not value) if is_negative else (name, value)


def _value(text: str) -> Argument:
    """JSON, or else the text as it stands."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def _asked_last(books: Books) -> Mapping[str, Argument]:
    """What people wished for last, taken up or not; without any wish what is in use."""
    if books.waits.get("arguments") is not None:
        return dict(books.waits["arguments"])
    wanted = books.wanted if books.wanted in books.revisions else books.present
    return books.revision(books.waits.get("revision") or wanted).arguments


def _good_before(books: Books) -> int:
    from gpuwatch.servers.measured import last_good  # noqa: PLC0415

    good = last_good(books.measured(None), before=books.revision(books.present).number)
    if good is None or good not in books.revisions:
        what = f"config rollback {books.server.name}: no revision before {books.present} has proved good"
        raise ConfigError([f"{what}; name one of those that `gpuwatch config log` shows"])
    return good


def _confirm(books: Books, lines: Sequence[str], *, yes: bool) -> None:
    """Show what changes; ends the command where the person does not want it."""
    click.echo("\n".join(lines) or books.told("config.stays"))
    if not yes:
        click.confirm(books.told("config.ask"), abort=True)


def _leave(books: Books, wished: Mapping[str, Any], what: str) -> None:
    """Leave the wish, and say what becomes of it."""
    name, by = books.server.name, getpass.getuser()
    row = {**wished, "by": by, "at_ms": clock.SystemClock().now_ms()}
    wish(books.settings, {f"change:{name}": json.dumps(row)}, what, server=name, why=wished["why"])
    becomes = "not_running" if not books.running else "paused" if books.paused else "taken_up"
    click.echo(books.told(f"config.{becomes}", server=name))


def _must_have_folder(server: ServerSettings) -> None:
    if server.revisions is None:
        cure = "name a folder and have vLLM read it: docs/settings-of-servers.md"
        raise ConfigError([f"config {server.name}: the settings name no `revisions` of this server; {cure}"])


def _tell_that_nothing_changes(books: Books) -> None:
    is_used = books.waits or books.wanted in {None, books.present}
    told = {"server": books.server.name, "wanted": books.wanted, "present": books.present}
    click.echo(books.told("config.nothing_changes" if is_used else "config.nothing_wanted", **told))


def _tell_what_waits(books: Books) -> None:
    if books.waits:
        made, by = local(books.waits["at_ms"]), books.waits["by"]
        why = f": {books.told(books.held.code, **books.held.facts)}" if books.held else ""
        click.echo(books.told("config.waits", made=made, by=by) + why, err=True)


def _about(revision: Revision) -> dict[str, object]:
    """Which it is, and who made it when."""
    return {"revision": revision.number, "made": local(revision.created_at_ms), "by": revision.by}
