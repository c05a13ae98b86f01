"""A server's arguments as the file of `vllm serve --config`, and back; never asks vLLM.

What vLLM's loader drops or garbles is refused here or written another way: it drops `false` and empty lists,
makes the word `None` of null, and takes a value that begins with `-` for an option.
"""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Final

from gpuwatch.config.document import load_document
from gpuwatch.errors import ConfigError
from gpuwatch.servers.starts.arguments import redacted

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from gpuwatch.records import Argument

_NAME: Final = re.compile(r"[a-z][a-z0-9]*([-_][a-z0-9]+)*")
_NO: Final = "no_"
_MODEL: Final = "model"
_NEVER: Final = {
    "config": "is the file itself",
    "help": "is no setting",
}
_NOT_HERE: Final = (
    "holds a secret, and this file may be read by all; give it in the environment of the server's unit,"
    " as VLLM_API_KEY or HF_TOKEN"
)


def canonical(given: Mapping[str, object]) -> dict[str, Argument]:
    """The arguments by long name with underscores, sorted; `no-x: true` is x=False, null is left out.

    ConfigError has a line for each that a file cannot say.
    """
    arguments, mistakes = _sorted_out(given)
    if mistakes:
        raise ConfigError([f"{name}: {what}" for name, what in mistakes])
    return arguments


def loaded(path: Path) -> dict[str, Argument]:
    """The canonical arguments in a file, ours or a person's; ConfigError names file and line."""
    document = load_document(path)
    if not isinstance(document.value, dict):
        document.mistake((), "is no mapping of vLLM's options, such as `max-num-seqs: 64`")
        raise ConfigError(document.mistakes)
    arguments, mistakes = _sorted_out(document.value)
    for name, what in mistakes:
        document.mistake((name,), what)
    if document.mistakes:
        raise ConfigError(document.mistakes)
    return arguments


def dumped(arguments: Mapping[str, Argument]) -> str:
    """The file: an option a line, ASCII alone, the same for equal arguments; ConfigError as `canonical`."""
    return "".join(line(name, value) + "\n" for name, value in canonical(arguments).items())


def line(name: str, value: Argument) -> str:
    """One canonical argument as it stands in the file: `max-num-seqs: 64`."""
    option = name.replace("_", "-")
    return f"no-{option}: true" if value is False else f"{option}: {_written(value)}"


# ---- reading


def _sorted_out(given: Mapping[str, object]) -> tuple[dict[str, Argument], list[tuple[str, str]]]:
    """The arguments, and of each that cannot be one its name as given and why."""
    arguments: dict[str, Argument] = {}
    mistakes: list[tuple[str, str]] = []
    for key, value in given.items():
        if value is None:
            continue
        name, meant = _meant(key.replace("-", "_"), value)
        what = _wrong_name(key, name) or _wrong_value(meant) or _wrong_text(name, meant)
        if name in arguments:
            what = "is given twice"
        if what:
            mistakes.append((key, what))
        arguments[name] = meant
    if _MODEL not in arguments:
        mistakes.append((_MODEL, "is missing, and vLLM would serve a model of its own choice"))
    return dict(sorted(arguments.items())), mistakes


def _meant(name: str, value: object) -> tuple[str, object]:
    """`no_x: true` is x=False."""
    return (name.removeprefix(_NO), False) if name.startswith(_NO) and value is True else (name, value)


def _wrong_name(key: str, name: str) -> str:
    if "." in key:
        option, _, field = key.partition(".")
        return f"has a dot; write `{option}: {{{field}: …}}`"
    if not _NAME.fullmatch(key):
        return "is no long option of vLLM; write it without the dashes before it, as max-num-seqs"
    if name.startswith(_NO):
        return f"is dropped by vLLM unless it is true; write {name.removeprefix(_NO)}: true"
    return _NEVER.get(name, "")


def _wrong_value(value: object) -> str:
    """Why vLLM's loader would not pass on a value as it stands; empty if it would."""
    if isinstance(value, dict):
        return "" if _is_finite(value) else "holds infinity or NaN, which JSON cannot say"
    if isinstance(value, list):
        what = next((what for item in value if (what := _wrong_item(item))), "")
        return what if value else "is an empty list, which vLLM drops; leave it out"
    return _wrong_item(value) if not isinstance(value, bool) else ""


def _wrong_item(value: object) -> str:
    if isinstance(value, float) and (value < 0 or not math.isfinite(value)):
        return f"{value} cannot stand in a file that vLLM reads"
    if isinstance(value, str) and value.startswith("-"):
        return f"{value!r} begins with a dash, so vLLM would take it for an option"
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return "a list may hold texts and numbers; write anything else as a text that holds JSON"
    return ""


def _wrong_text(name: str, value: object) -> str:
    said = line(name, value)
    return _NOT_HERE if not isinstance(value, bool) and redacted(said) != said else ""


def _is_finite(value: object) -> bool:
    if isinstance(value, dict | list):
        return all(map(_is_finite, value.values() if isinstance(value, dict) else value))
    return not isinstance(value, float) or math.isfinite(value)


# ---- writing


def _written(value: Argument) -> str:
    """JSON, which YAML is a superset of but for two things: how it writes fractions and rare characters."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_text(str(k))}: {_written(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_written, value)) + "]"
    if isinstance(value, float):
        return _fraction(value)
    return _text(value) if isinstance(value, str) else json.dumps(value)


def _fraction(value: float) -> str:
    """YAML 1.1 takes `1e-05` for a text: a fraction has a dot."""
    digits, e, exponent = repr(value).partition("e")
    return digits + (".0" if "." not in digits and e else "") + e + exponent


def _text(value: str) -> str:
    """Characters above U+FFFF are two escapes in JSON, and one in YAML."""
    quoted = json.dumps(value, ensure_ascii=False)
    return re.sub(r"[^ -~]", lambda found: f"\\U{ord(found[0]):08x}", quoted)
