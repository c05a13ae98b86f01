"""Takes secrets out of JSON, by what they look like and the names that they stand under; keeps all else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

_HIDDEN: Final = "***"


def without_secrets(value: Any, redact: Callable[[str], str]) -> Any:  # noqa: ANN401 (JSON)
    """Text redacted, and all that stands under the name of a secret, or after an option of such a name."""
    if isinstance(value, str):
        return redact(value)
    if isinstance(value, Mapping):
        return {
            redact(str(name)): _HIDDEN if _is_secret(str(name), redact) else without_secrets(one, redact)
            for name, one in value.items()
        }
    if isinstance(value, (list, tuple)):
        before = ("", *value)
        pairs = zip(before, value, strict=False)
        return [
            _HIDDEN if _is_secret(last, redact, "--") else without_secrets(one, redact) for last, one in pairs
        ]
    return value


def _is_secret(name: object, redact: Callable[[str], str], prefix: str = "") -> bool:
    """Whether what such a name is given is taken out of text."""
    if not isinstance(name, str) or not name.startswith(prefix):
        return False
    return redact(f"{name}=x") != f"{name}=x"
