"""Durations as Prometheus writes them, in settings and in rule files alike."""

from __future__ import annotations

import re
from typing import Final

_UNITS_MS: Final = {
    "y": 31_536_000_000,
    "w": 604_800_000,
    "d": 86_400_000,
    "h": 3_600_000,
    "m": 60_000,
    "s": 1000,
    "ms": 1,
}
_FORM: Final = re.compile("".join(rf"(?:(\d+){unit})?" for unit in _UNITS_MS), re.ASCII)


class Duration(int):
    """Milliseconds; written `500ms`, `30s`, `1h30m`: each unit once, the largest first."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: object) -> Duration:
        """ValueError unless `text` is a Prometheus duration."""
        if text in {"0", 0}:
            return cls(0)
        match = _FORM.fullmatch(text) if isinstance(text, str) and text else None
        if match is None:
            message = f"{text!r} is no duration; write 500ms, 30s, 5m or 1h30m"
            raise ValueError(message)
        counts = zip(match.groups(), _UNITS_MS.values(), strict=True)
        return cls(sum(int(count) * unit_ms for count, unit_ms in counts if count))

    def __str__(self) -> str:
        """The shortest way to write it, in days and less."""
        rest, text = int(self), ""
        for unit in ("d", "h", "m", "s", "ms"):
            count, rest = divmod(rest, _UNITS_MS[unit])
            text += f"{count}{unit}" if count else ""
        return text or "0s"
