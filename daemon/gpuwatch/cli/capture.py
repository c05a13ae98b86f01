"""`gpuwatch capture`: everything that is known of a server, in one file without secrets; changes nothing.

The daemon runs it as a process of its own before it touches a server: what gathers this must load far more
than the daemon may hold, and must not hold up its ticks.
"""

from __future__ import annotations

import json
import math
import re
import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

import gpuwatch
from gpuwatch import clock
from gpuwatch.cli.options import open_view, path_option, settings_of, state_option, told
from gpuwatch.errors import ConfigError
from gpuwatch.guest import wire

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from gpuwatch.config import ServerSettings, Settings
    from gpuwatch.servers.bundle import Json, Part, Written
    from gpuwatch.servers.starts.log import StartLog
    from gpuwatch.store import ReadStore

BUNDLES: Final = "bundles"
_SPAN_MS: Final = 900_000
_ROWS: Final = 20
_TRANSITIONS: Final = 200
_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,120}")
_LEAST_SECRET: Final = 6  # a shorter one would stand in every second word


@click.command()
@click.argument("server")
@path_option
@state_option
@click.option("--id", "name", help="Name of the file; default: the server and the time.")
@click.option("--pid", "pids", type=int, multiple=True, help="Its processes, if the daemon knows better.")
@click.option(
    "--guests",
    type=click.Path(path_type=Path, file_okay=False),
    envvar=wire.FOLDER_VARIABLE,
    default=wire.DEFAULT_FOLDER,
    show_default=True,
    help="Where the guests' sockets lie.",
)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def capture(  # noqa: PLR0913 (click's options)
    server: str,
    *,
    config_path: Path | None,
    state_dir: Path | None,
    name: str | None,
    pids: tuple[int, ...],
    guests: Path,
    as_json: bool,
) -> None:
    """Write all that is known of SERVER into one file, for whoever asks later what happened.

    The last 15 minutes of samples, its rows and log, the stacks and allocators of its processes, settings and
    the decision about it; without secrets. It lies in the folder `bundles` of the state folder.
    """
    settings = settings_of(config_path, state_dir)
    written = captured(settings, server, name=name, pids=pids, guests=guests)
    if as_json:
        size, errors = written.size_bytes, list(written.errors)
        click.echo(json.dumps({"bundle": str(written.path), "bytes": size, "errors": errors}))
        return
    click.echo(f"{written.path}: {written.size_bytes / 2**20:.1f} MiB")
    for error in written.errors:
        click.echo(told(settings, "capture.missing", detail=error))


def captured(
    settings: Settings, server: str, *, name: str | None, pids: Sequence[int], guests: Path
) -> Written:
    """Write the bundle `STATE/bundles/NAME.tar.gz` within 20 s; ConfigError, ServerError."""
    from gpuwatch.servers import bundle  # noqa: PLC0415 (each command loads only what it needs)

    now_ms = clock.SystemClock().now_ms()
    chosen = _named(settings, server)
    name = name or f"{server}-{re.sub('[^0-9]', '', clock.utc_text(now_ms))}"
    if not _ID.fullmatch(name):
        raise ConfigError([f"--id {name!r}: use letters, digits, . _ -"])
    path = settings.state_dir / BUNDLES / f"{name}.tar.gz"
    gathered = _Capture(settings, chosen, now_ms, name, tuple(pids) or _members(settings, server), guests)
    return bundle.write(path, gathered.parts(), redactor(_secrets(settings)), now_ms)


def redactor(secrets: Iterable[str]) -> Callable[[str], str]:
    """Takes out these very secrets wherever they stand, and whatever looks like one."""
    from gpuwatch.notify.redaction import redact  # noqa: PLC0415 (as above)
    from gpuwatch.servers.starts.arguments import redacted  # noqa: PLC0415 (as above)

    known = sorted({s for s in secrets if len(s) >= _LEAST_SECRET}, key=len, reverse=True)

    def clean(text: str) -> str:
        for secret in known:
            text = text.replace(secret, "***")
        return redact(redacted(text))

    return clean


class _Capture:
    """The parts of a bundle; each opens what it reads, since each runs in a thread of its own."""

    def __init__(
        self,
        settings: Settings,
        server: ServerSettings,
        now_ms: int,
        name: str,
        pids: tuple[int, ...],
        guests: Path,
    ) -> None:
        self._settings = settings
        self._server = server
        self._now_ms = now_ms
        self._id = name
        self._pids = pids
        self._guests = guests

    def parts(self) -> dict[str, Part]:
        """By the name of the file; what is gone soonest, and what tells most, comes first."""
        from gpuwatch.servers import bundle  # noqa: PLC0415 (as above)

        return {
            "about.json": self._about,
            "stacks.json": partial(bundle.guests, self._guests, self._pids, "stacks"),
            "processes.txt": partial(bundle.processes, self._pids),
            "decision.json": partial(self._rows, self._decision),
            "server.json": partial(self._rows, lambda rows: rows.servers().get(self._server.name)),
            "starts.json": partial(self._rows, lambda rows: rows.starts(self._server.name, _ROWS)),
            "arguments.json": partial(self._rows, self._arguments),
            "revisions.json": partial(self._rows, lambda rows: rows.revisions(self._server.name)),
            "remediations.json": partial(self._rows, self._remediations),
            "refusals.json": partial(self._rows, self._refusals),
            "alerts.json": partial(self._rows, lambda rows: rows.active_alerts()),
            "transitions.json": partial(self._rows, self._transitions),
            "settings.json": self._shown,
            "server.log": self._log,
            "allocators.json": partial(bundle.guests, self._guests, self._pids, "snapshot"),
            "telemetry.jsonl": self._telemetry,
            "nvidia-smi.txt": bundle.nvidia_smi,
        }

    def _about(self) -> Iterator[str | Json]:
        from gpuwatch.servers import bundle  # noqa: PLC0415 (as above)

        yield bundle.pretty(
            {
                "id": self._id,
                "server": self._server.name,
                "host": self._settings.host,
                "at": clock.utc_text(self._now_ms),
                "at_ms": self._now_ms,
                "gpuwatch": gpuwatch.__version__,
                "pids": self._pids,
            }
        )

    # -- rows ------------------------------------------------------------------------------------------

    def _rows(self, read: Callable[[ReadStore], object]) -> Iterator[str | Json]:
        from gpuwatch.servers import bundle  # noqa: PLC0415 (as above)

        with open_view(self._settings) as rows:
            yield bundle.pretty(_plain(read(rows)))

    def _decision(self, rows: ReadStore) -> object:
        """The remediation that this bundle is of; else the newest of the server."""
        found = rows.remediations(self._server.name, limit=_ROWS)
        return next((one for one in found if one.plan.id == self._id), found[0] if found else None)

    def _arguments(self, rows: ReadStore) -> object:
        """What vLLM was started with last, by its log."""
        return [
            {"version": one.version, "revision": one.revision, "arguments": dict(one.arguments)}
            for one in rows.starts(self._server.name, 1)
        ]

    def _remediations(self, rows: ReadStore) -> object:
        return rows.remediations(self._server.name, limit=_ROWS)

    def _refusals(self, rows: ReadStore) -> object:
        return [one for one in rows.refusals() if one.server == self._server.name]

    def _transitions(self, rows: ReadStore) -> object:
        return [one for _, one in rows.transitions(_TRANSITIONS)]

    # -- the rest --------------------------------------------------------------------------------------

    def _shown(self) -> Iterator[str | Json]:
        from gpuwatch import config  # noqa: PLC0415 (as above)
        from gpuwatch.servers import bundle  # noqa: PLC0415 (as above)

        yield bundle.pretty(_without_values(config.shown(self._settings)))

    def _log(self) -> Iterator[str | Json]:
        from gpuwatch.servers import bundle  # noqa: PLC0415 (as above)

        with open_view(self._settings) as rows:
            starts = rows.starts(self._server.name, 2)
        return bundle.log_tail(partial(_log_of, self._server, self._settings.state_dir), starts)

    def _telemetry(self) -> Iterator[str | Json]:
        """A line for each series: its labels, and [instant in ms, value] for each sample of 15 minutes."""
        from gpuwatch import store  # noqa: PLC0415 (as above)
        from gpuwatch.promql import Matcher  # noqa: PLC0415 (as above)
        from gpuwatch.servers.bundle import Json  # noqa: PLC0415 (as above)

        with store.open_history(self._settings.state_dir) as history:
            own = Matcher("server", "=~", f"({re.escape(self._server.name)})?")
            used = history.series([Matcher("server", "=", self._server.name), Matcher("uuid", "!=", "")])
            uuids = {labels.get("uuid") for labels in used}
            its_gpus = [Matcher("uuid", "=~", f"({'|'.join(map(re.escape, uuids))})?")] if uuids else []
            after_ms = self._now_ms - _SPAN_MS
            for track in history.tracks([own, *its_gpus], after_ms, self._now_ms):
                yield '{"labels": '
                yield Json(dict(track.labels))
                yield ', "samples": ['
                pairs = zip(track.at_ms.tolist(), track.values.tolist(), strict=True)
                yield ",".join(f"[{at_ms},{_number(value)}]" for at_ms, value in pairs)
                yield "]}\n"


def _named(settings: Settings, server: str) -> ServerSettings:
    found = [each for each in settings.servers if each.name == server]
    if not found:
        known = ", ".join(each.name for each in settings.servers) or "none"
        raise ConfigError([f"capture {server}: no such server in the settings; there are: {known}"])
    return found[0]


def _members(settings: Settings, server: str) -> tuple[int, ...]:
    """The tree of the process that the supervisor told of last; nothing where that is not known."""
    from gpuwatch.errors import StoreError  # noqa: PLC0415 (as above)
    from gpuwatch.servers import bundle  # noqa: PLC0415 (as above)

    try:
        with open_view(settings) as rows:
            state = rows.servers().get(server)
    except StoreError:
        return ()
    return tuple(bundle.tree_of(state.supervisor.pid if state else None))


def _log_of(server: ServerSettings, state_dir: Path) -> StartLog:
    from gpuwatch import servers  # noqa: PLC0415 (as above)

    return servers.log_of(server, state_dir)


def _secrets(settings: Settings) -> Iterator[str]:
    """What the files hold that the settings name as secret; one that cannot be read cannot have leaked."""
    for path in _secret_files(settings):
        try:
            yield Path(path).read_text("utf-8", "replace").strip()
        except OSError:
            continue


def _secret_files(settings: Settings) -> Iterator[str]:
    from gpuwatch import config  # noqa: PLC0415 (as above)

    waiting: list[Any] = [config.shown(settings)]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            yield from (v for k, v in one.items() if k.endswith("_file") and k != "log_file" and v)
            waiting += one.values()
        elif isinstance(one, list):
            waiting += one


def _without_values(shown: Any) -> Any:  # noqa: ANN401 (plain values)
    """Settings with environment variables by name alone, and commands as a shell would show them."""
    if isinstance(shown, list):
        return [_without_values(one) for one in shown]
    if not isinstance(shown, dict):
        return shown
    return {
        name: dict.fromkeys(value, "***")
        if name == "env" and isinstance(value, dict)
        else shlex.join(value)
        if name == "command" and isinstance(value, list)
        else _without_values(value)
        for name, value in shown.items()
    }


def _plain(found: object) -> Any:  # noqa: ANN401 (JSON)
    """Records as the store writes them, for people."""
    from gpuwatch.store.codec import to_json  # noqa: PLC0415 (as above)

    if isinstance(found, (list, tuple)):
        return [_plain(one) for one in found]
    if found is None or isinstance(found, dict):
        return found
    return json.loads(to_json(found))  # type: ignore[arg-type]  # a record


def _number(value: float) -> str:
    """JSON has neither NaN nor infinities."""
    return f"{value:.17g}" if math.isfinite(value) else "null"
