"""Options that several commands share, and what they stand for."""

from __future__ import annotations

import getpass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from gpuwatch import clock
from gpuwatch.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from gpuwatch.config import Settings
    from gpuwatch.store import ReadStore

DEFAULT_CONFIG: Final = Path("/etc/gpuwatch/gpuwatch.yaml")


def path_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--config`: the settings file."""
    return click.option(
        "--config",
        "config_path",
        type=click.Path(path_type=Path, dir_okay=False),
        envvar="GPUWATCH_CONFIG",
        help=f"Settings file (default {DEFAULT_CONFIG} if it is there, else built-in defaults).",
    )(function)


def state_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """`--state-dir`: the folder of the databases."""
    return click.option(
        "--state-dir",
        type=click.Path(path_type=Path, file_okay=False),
        help="Folder of the databases, if it is not the one of the settings.",
    )(function)


def config_path_of(given: Path | None) -> Path | None:
    """The settings file that counts; None for built-in defaults."""
    return given or (DEFAULT_CONFIG if DEFAULT_CONFIG.exists() else None)


def settings_of(given: Path | None, state_dir: Path | None = None) -> Settings:
    """The settings in force, with another state folder if one is given; ConfigError."""
    import msgspec  # noqa: PLC0415 (each command loads only what it needs)

    from gpuwatch import config  # noqa: PLC0415

    settings = config.load_settings(config_path_of(given))
    return msgspec.structs.replace(settings, state_dir=state_dir) if state_dir else settings


def duration_ms(text: str, option: str = "--for") -> int:
    """Milliseconds of `30m`; ConfigError names the option."""
    from gpuwatch import config  # noqa: PLC0415

    try:
        return int(config.Duration.parse(text))
    except ValueError as error:
        raise ConfigError([f"{option}: {error}"]) from error


def told(settings: Settings, code: str, /, **facts: object) -> str:
    """The phrase of the catalogue in the settings' language."""
    from gpuwatch.notify import words  # noqa: PLC0415 (each command loads only what it needs)

    return words(code, settings.lang, **{name: str(fact) for name, fact in facts.items()})


def open_view(settings: Settings) -> ReadStore:
    """The rows as they stand, wherever these settings keep them; StoreError."""
    from gpuwatch import store  # noqa: PLC0415

    url = store.state_url(settings.store)
    return store.open_read_only(settings.state_dir, url=url, host=settings.host)


def wish(settings: Settings, wished: Mapping[str, str | None], what: str, **facts: str) -> None:
    """Leave a wish beside the daemon, and who asked for it; StoreError."""
    from gpuwatch import store  # noqa: PLC0415

    audit = store.Audit(at_ms=clock.SystemClock().now_ms(), who=getpass.getuser(), what=what, facts=facts)
    url = store.state_url(settings.store)
    store.leave_wish(settings.state_dir, wished, audit=audit, url=url, host=settings.host)
