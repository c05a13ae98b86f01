"""The arguments that vLLM logs at its start: read as text, never evaluated; no secret passes."""

from __future__ import annotations

import hashlib
import json
import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_LONGEST_CHARACTERS: Final = 64 * 1024
_LONGEST_VALUE_CHARACTERS: Final = 500
_TOKEN: Final = re.compile(
    r"""(?P<string>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")|(?P<open>[\[({])|(?P<close>[\])}])"""
    r"""|(?P<mark>[:,])|(?P<other>[^'"\[\](){}:,]+)"""
)
_HIDDEN: Final = (
    r"(?:api[_-]?keys?|password|passwd|passphrase|secret(?:[_-]\w+)?|credentials?(?:[_-]\w+)?|private[_-]key"
    r"|access[_-]key|auth(?:orization)?|connection[_-]string|sig(?:nature)?|token)"
)
_HIDDEN_NAME: Final = re.compile(rf"(?:\w*_)?{_HIDDEN}|watermark_config")
# Words of a model, no secrets; a reranker needs the first.
_VOCABULARY: Final = r"(?:classifier_from|bos|eos|pad|unk|sep|cls|mask)_token\b"
_HIDDEN_VALUE: Final = re.compile(
    rf"""(?i)((?:--|\b)(?!{_VOCABULARY})[\w-]{{0,40}}{_HIDDEN}['"]?\s*[:=]\s*)"""
    r"""(?:\[[^\]]*\]?|'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|(?:(?:bearer|basic)\s+)?[^\s,}\])&]+)"""
    rf"""|(--[\w-]{{0,40}}{_HIDDEN}\s+)(?!-)\S+(?:\s+(?!-)\S+)*"""
)
# `"--api-key", "…"`: an option and its value as two elements of a list, however often they are quoted.
_IN_LISTS: Final = re.compile(
    r"(?i)(--[\w-]{0,40}(?:key|password|passwd|secret|token|credentials?|authorization)\\*[\"']\s*,\s*(\\*[\"']))"
    r".*?(?=\2)"
)
_BARE: Final = re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|sk-[\w-]{16,})")
_CREDENTIALS_OF_URL: Final = re.compile(r"(?<=://)[^/\s@]+@")
# Where it listens, what it logs and how it speaks: a start needs the same memory with and without these.
_INDIFFERENT: Final = re.compile(
    "host|port|uds|config|model_tag|served_model_name|root_path|middleware|headless|shutdown_timeout"
    "|watchdog_config|enable_server_load_tracking|enable_auto_tool_choice|response_role"
    "|(?:ssl|uvicorn|log|enable_log|disable_log|allow|allowed|tool|chat_template|enable_ssl)_\\w+"
    "|chat_template|disable_(?:uvicorn|fastapi|frontend)_\\w+"
)


def arguments_of(text: str) -> dict[str, str]:
    """The arguments by name, from a dict as Python prints it, such as `{'model': 'a', 'port': 1}`.

    Strings lose their quotes; any other value stays as it is printed. What names a secret is left out.
    """
    found = {}
    for name, value in _pairs(text[:_LONGEST_CHARACTERS]):
        if not _HIDDEN_NAME.fullmatch(name):
            found[name] = _shortened(redacted(value))
    return found


def configuration_of(version: str, arguments: Mapping[str, str]) -> str:
    """The same twelve hexadecimal digits for starts that must need the same memory; empty if not told."""
    if not version or not arguments:
        return ""
    what = sorted((name, value) for name, value in arguments.items() if not _INDIFFERENT.fullmatch(name))
    return hashlib.sha256(json.dumps([version, what]).encode()).hexdigest()[:12]


def redacted(text: str) -> str:
    """The text without the values of what is named like a secret, and without credentials in URLs."""
    text = _HIDDEN_VALUE.sub(r"\1\2***", _IN_LISTS.sub(r"\1***", text))
    return _CREDENTIALS_OF_URL.sub("", _BARE.sub("***", text))


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    """What stands between commas and around the first colon, one bracket deep."""
    depth, parts = 0, [""]
    for token in _TOKEN.finditer(text):
        kind, said = token.lastgroup, token.group()
        depth -= kind == "close"
        if kind == "mark" and depth == 1 and said == ":" and len(parts) == 1:
            parts.append("")
        elif (kind == "mark" and depth == 1 and said == ",") or (kind == "close" and depth == 0):
            if len(parts) == 2:
                yield _unquoted(parts[0]), _unquoted(parts[1])
            parts = [""]
        elif depth >= 1:
            parts[-1] += said
        depth += kind == "open"
        if kind == "close" and depth == 0:
            return


def _unquoted(value: str) -> str:
    value = value.strip()
    is_string = len(value) >= 2 and value[0] == value[-1] and value[0] in "'\""
    return value[1:-1] if is_string else value


def _shortened(value: str) -> str:
    """Values that differ stay different."""
    if len(value) <= _LONGEST_VALUE_CHARACTERS:
        return value
    digest = hashlib.sha256(value.encode()).hexdigest()[:8]
    return f"{value[:_LONGEST_VALUE_CHARACTERS]}… ({digest})"
