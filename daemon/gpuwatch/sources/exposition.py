"""Parses Prometheus' text exposition format; fetches nothing and knows no metric by name.

Rule 1: one malformed line refuses the page, as Prometheus does: half a page is a wrong page.
Rule 2: NaN is no sample. Timestamps, comments, types and help are passed over.
Rule 3: `*_created` series only say when a counter began and would double the series: left out.
"""

from __future__ import annotations

import re
import sys
from typing import Final

from gpuwatch.errors import SourceError
from gpuwatch.records import Labels, Sample

_NAME: Final = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL: Final = re.compile(r'[ \t]*([a-zA-Z_][a-zA-Z0-9_]*)[ \t]*=[ \t]*"((?:[^"\\]|\\.)*)"[ \t]*(,|$)')
_ESCAPE: Final = re.compile(r"\\(.)")
_ESCAPES: Final = {"n": "\n", "\\": "\\", '"': '"'}
_MOST_SERIES: Final = 50_000
_EXCERPT_CHARACTERS: Final = 80


class _MalformedError(ValueError):
    pass


class Exposition:
    """Makes samples of the pages of one exporter, which repeat the same series again and again."""

    def __init__(self, **labels: str) -> None:
        """`labels` are put on every series; its own of that name becomes `exported_…`, as in Prometheus."""
        self._labels = labels
        self._series: dict[str, Labels | None] = {}

    def samples(self, page: str, now_ms: int) -> list[Sample]:
        """One sample a series; the last line wins. SourceError names the first malformed line."""
        values: dict[Labels, float] = {}
        for number, raw in enumerate(page.split("\n"), start=1):
            line = raw.strip()
            if not line or line[0] == "#":
                continue
            try:
                self._take(line, values)
            except _MalformedError:
                excerpt = line[:_EXCERPT_CHARACTERS]
                message = f"parse metrics: line {number} is not Prometheus' text format: {excerpt!r}"
                raise SourceError(message) from None
        return [Sample(labels, now_ms, value) for labels, value in values.items()]

    def _take(self, line: str, values: dict[Labels, float]) -> None:
        end = line.rfind("}") + 1
        series, rest = (line[:end], line[end:]) if end else _halves(line)
        labels, value = self._series_labels(series), _value(rest.split())
        if labels is not None and value == value:
            values[labels] = value

    def _series_labels(self, series: str) -> Labels | None:
        """None for a series that is left out."""
        try:
            return self._series[series]
        except KeyError:
            if len(self._series) >= _MOST_SERIES:
                self._series.clear()
            self._series[series] = labels = self._parsed(series)
            return labels

    def _parsed(self, series: str) -> Labels | None:
        name, pairs = parse_series(series)
        if name.endswith("_created"):
            return None
        renamed = [(f"exported_{k}" if k in self._labels else k, v) for k, v in pairs]
        whole = [("__name__", name), *renamed, *self._labels.items()]
        # Hundreds of series have the same names and values: one string for all of them.
        return Labels((sys.intern(k), sys.intern(v)) for k, v in whole)


def parse_series(text: str) -> tuple[str, list[tuple[str, str]]]:
    """`name{a="b"}` as name and label pairs; ValueError if it is none."""
    name, brace, inner = text.strip().partition("{")
    name = name.rstrip()
    if not _NAME.fullmatch(name):
        raise _MalformedError(text)
    return name, _pairs(inner.rstrip()[:-1].strip()) if brace else []


def _pairs(inner: str) -> list[tuple[str, str]]:
    pairs: dict[str, str] = {}
    position = 0
    while position < len(inner):
        match = _LABEL.match(inner, position)
        if not match or match[1] in pairs:
            raise _MalformedError(inner)
        pairs[match[1]] = _unescaped(match[2]) if "\\" in match[2] else match[2]
        position = match.end()
    return list(pairs.items())


def _unescaped(value: str) -> str:
    return _ESCAPE.sub(lambda found: _ESCAPES.get(found[1], found[0]), value)


def _halves(line: str) -> tuple[str, str]:
    series, *rest = line.split(None, 1)
    return series, rest[0] if rest else ""


def _value(words: list[str]) -> float:
    """The value of `[value]` or `[value, timestamp]`; Python's own `1_000` is no number here."""
    if not 1 <= len(words) <= 2 or "_" in words[0]:
        raise _MalformedError(words)
    try:
        return float(words[0])
    except ValueError:
        raise _MalformedError(words) from None
