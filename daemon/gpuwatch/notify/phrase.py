"""The shape of a phrase; says none."""

from __future__ import annotations

from typing import NamedTuple


class Phrase(NamedTuple):
    """The same in both languages."""

    en: str
    zh: str
