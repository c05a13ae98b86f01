"""What is known of the revisions of a server's settings, from rows and series, and how it is shown."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import click

from gpuwatch import clock
from gpuwatch.cli.options import open_view, told
from gpuwatch.errors import ConfigError, ServerError, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from gpuwatch.config import ServerSettings, Settings
    from gpuwatch.promql import Querier
    from gpuwatch.records import Refusal, Revision, ServerStart
    from gpuwatch.servers.measured import Measured
    from gpuwatch.store import ReadStore

_RUNNING_WITHIN_MS: Final = 15_000
_ALL_STARTS: Final = 10_000
_GIB: Final = 1 << 30
_HEAD: Final = (
    *("rev", "made", "by", "is", "kv_tokens", "start", "gpu_memory", "tokens_per_s", "first_token"),
    *("served", "failed", "why"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Books:
    """What is known of a server's settings until `at_ms`; `waits` is a change that nobody took up yet.

    `held` is why the daemon does not take it up, None as long as it has not said.
    """

    settings: Settings
    server: ServerSettings
    revisions: Mapping[int, Revision]
    starts: Sequence[ServerStart]  # newest first
    at_ms: int
    running: bool
    paused: bool
    wanted: int | None
    waits: Mapping[str, Any]
    held: Refusal | None
    next_start: int | None

    @property
    def in_use(self) -> int | None:
        """What the process that lives was started with."""
        last = self.starts[0] if self.starts else None
        return last.revision if last and last.ended_at_ms is None else None

    @property
    def present(self) -> int | None:
        """What is in use, or what the next start reads, or what counts without either."""
        known = (self.in_use, self.next_start, self.wanted, max(self.revisions, default=None))
        return next((number for number in known if number in self.revisions), None)

    def told(self, code: str, /, **facts: object) -> str:
        """The phrase of the catalogue in the settings' language."""
        return told(self.settings, code, **facts)

    def measured(self, querier: Querier | None) -> Mapping[int, Measured]:
        """What each revision came to; without a `querier` only what the starts tell."""
        from gpuwatch.servers.measured import measured  # noqa: PLC0415 (each command loads only what it needs)

        good_after_ms = self.settings.remediation.good_after
        return measured(self.server.name, self.starts, querier, self.at_ms, good_after_ms=good_after_ms)

    def revision(self, number: int | None) -> Revision:
        """ConfigError if there is none of that number."""
        if number is not None and number in self.revisions:
            return self.revisions[number]
        name = self.server.name
        if not self.revisions:
            cure = f"make the first with `gpuwatch config set {name} --file base.yaml --why TEXT`"
            raise ConfigError([f"config {name}: there is no revision yet; {cure}"])
        there = ", ".join(map(str, self.revisions))
        raise ConfigError([f"config {name}: there is no revision {number}; there are: {there}"])


# ---- what is known


def books_of(settings: Settings, name: str) -> Books:
    """ConfigError if the settings have no such server; StoreError."""
    server = next((each for each in settings.servers if each.name == name), None)
    if server is None:
        known = ", ".join(each.name for each in settings.servers) or "none"
        raise ConfigError([f"config {name}: no such server in the settings; there are: {known}"])
    with open_view(settings) as view:
        return _read(view, settings, server)


def _read(view: ReadStore, settings: Settings, server: ServerSettings) -> Books:
    now_ms, rows = clock.SystemClock().now_ms(), view.settings()
    written_ms = view.last_tick_ms()
    running = written_ms is not None and 0 <= now_ms - written_ms <= _RUNNING_WITHIN_MS
    wanted = rows.get(f"wanted:{server.name}")
    return Books(
        settings=settings,
        server=server,
        revisions={revision.number: revision for revision in view.revisions(server.name)},
        starts=view.starts(server.name, _ALL_STARTS),
        at_ms=now_ms if running or written_ms is None else written_ms,
        running=running,
        paused=int(rows.get("paused_until_ms", "0")) > now_ms,
        wanted=int(wanted) if wanted else None,
        waits=json.loads(rows.get(f"change:{server.name}", "{}")),
        held=next((r for r in view.refusals() if not r.alert and r.server == server.name), None),
        next_start=_next_start(server),
    )


def _next_start(server: ServerSettings) -> int | None:
    """What the link chooses, where this user may see it."""
    from gpuwatch.servers.revisions import Revisions  # noqa: PLC0415

    if server.revisions is None:
        return None
    try:
        return Revisions(server.name, server.revisions).current()
    except ServerError:
        return None


# ---- what is shown


def log_of(books: Books) -> list[dict[str, Any]]:
    """A row for each revision, the newest first: its record, what it `is`, and what it `measured`."""
    from gpuwatch.servers import measured  # noqa: PLC0415

    found = _measured(books)
    good = measured.last_good(found)
    rows = []
    for number, revision in sorted(books.revisions.items(), reverse=True):
        marks = {"in use": books.in_use, "wanted": books.wanted, "last good": good}
        marks |= {} if books.next_start == books.in_use else {"next start": books.next_start}
        row = dataclasses.asdict(revision) | {"is": [word for word, at in marks.items() if at == number]}
        one = found.get(number)
        rows.append(row | {"measured": None if one is None else dataclasses.asdict(one)})
    return rows


def _measured(books: Books) -> Mapping[int, Measured]:
    """With figures out of the series, as far as these can be read."""
    from gpuwatch import store  # noqa: PLC0415

    try:
        with store.open_history(books.settings.state_dir) as history:
            return books.measured(history)
    except StoreError as error:
        click.echo(books.told("config.unmeasured", detail=error), err=True)
        return books.measured(None)


def table(rows: Sequence[Mapping[str, Any]], lang: str) -> str:
    """The rows of `log_of` for people."""
    from gpuwatch import notify  # noqa: PLC0415
    from gpuwatch.cli.answers import aligned  # noqa: PLC0415

    heads = [notify.words(f"head.{name}", lang) for name in _HEAD]
    return "\n".join(aligned([heads, *(_cells(row, lang) for row in rows)]))


def _cells(row: Mapping[str, Any], lang: str) -> tuple[str, ...]:
    from gpuwatch import notify  # noqa: PLC0415

    one: Mapping[str, Any] = row["measured"] or {}
    figure: Callable[..., str] = lambda key, form, unit=1: (  # noqa: E731
        "-" if one.get(key) is None else form.format(one[key] / unit)
    )
    lasted: Callable[[str], str] = lambda key: notify.duration(one[key], lang) if one.get(key) else "-"  # noqa: E731
    counts = {name: str(one[name]) for name in ("failures", "starts")} if one else {}
    failed = notify.words("config.failed_of", lang, **counts) if one else "-"
    return (
        str(row["number"]),
        local(row["created_at_ms"]),
        row["by"],
        ", ".join(notify.words(f"is.{mark}", lang) for mark in row["is"]) or "-",
        figure("kv_cache_tokens", "{:,.0f}"),
        lasted("healthy_after_ms"),
        figure("peak_memory_bytes", "{:.1f} GiB", _GIB),
        figure("best_minute_tokens_per_s", "{:,.0f}"),
        figure("first_token_p95_s", "{:.2f} s"),
        lasted("uptime_ms"),
        f"{failed} {one.get('failure', '')}".strip(),
        " ".join(row["why"].split()),
    )


def local(at_ms: int) -> str:
    """A minute by the clock of this place."""
    return dt.datetime.fromtimestamp(at_ms / 1000, tz=dt.UTC).astimezone().strftime("%Y-%m-%d %H:%M")
