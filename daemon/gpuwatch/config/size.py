"""Sizes in settings: bytes, with binary units."""

from __future__ import annotations

import re
from typing import Final

_UNITS_BYTES: Final = {"TiB": 2**40, "GiB": 2**30, "MiB": 2**20, "KiB": 2**10, "B": 1}
_FORM: Final = re.compile(r"(\d+)\s*(TiB|GiB|MiB|KiB|B)", re.ASCII)


class Size(int):
    """Bytes; written `512MiB` or `2GiB`."""

    __slots__ = ()

    @classmethod
    def parse(cls, text: object) -> Size:
        """ValueError unless `text` is a size."""
        match = _FORM.fullmatch(text) if isinstance(text, str) else None
        if match is None:
            message = f"{text!r} is no size; write 512MiB or 2GiB"
            raise ValueError(message)
        return cls(int(match[1]) * _UNITS_BYTES[match[2]])

    def __str__(self) -> str:
        """In the largest unit that leaves nothing over."""
        unit, factor = next((u, f) for u, f in _UNITS_BYTES.items() if int(self) % f == 0)
        return f"{int(self) // factor}{unit}"
