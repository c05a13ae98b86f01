"""Reads YAML nodes strictly: noting each mistake with its place, and going on; builds nothing."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import yaml

from gpuwatch.config.document import refuse_depth
from gpuwatch.config.duration import Duration
from gpuwatch.records import Place

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

Keys = dict[str, yaml.Node]

_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_MERGE: Final = "tag:yaml.org,2002:merge"
_NULLS: Final = frozenset({"", "~", "null", "Null", "NULL"})
_NUMBER: Final = re.compile(
    r"[-+]?(\d[\d_]*(\.\d*)?|\.\d+)([eE][-+]?\d+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
)
_TRUE: Final = frozenset({"true", "yes", "on", "y"})
_FALSE: Final = frozenset({"false", "no", "off", "n"})


class NodeReader:
    """Reads the nodes of one file; what is wrong is noted in `mistakes` and read as if it were not there."""

    def __init__(self, path: Path) -> None:
        self.mistakes: list[str] = []
        self._path = path
        self._lines: list[str] = []

    def root(self) -> yaml.Node | None:
        """The file's first document; None if it is empty or no YAML at all, which is noted."""
        try:
            text = self._path.read_text(encoding="utf-8")
            self._lines = text.split("\n")
            refuse_depth(text)
            documents: Iterator[yaml.Node] = yaml.compose_all(text, Loader=_LOADER)
            return next(documents, None)
        except OSError as error:
            self.mistakes.append(f"{self._path}: cannot be read: {error.strerror}")
        except UnicodeDecodeError as error:
            self.mistakes.append(f"{self._path}: is not UTF-8: {error.reason} at byte {error.start}")
        except yaml.YAMLError as error:
            self.mistakes.append(self._syntax(error))
        return None

    def mapping(self, node: yaml.Node | None, allowed: frozenset[str] | None, what: str) -> Keys:
        """The values by key, those merged by `<<` too; only `allowed` keys if that is given."""
        if node is None or is_null(node):
            return {}
        if not isinstance(node, yaml.MappingNode):
            self.mistake(node, f"{what} must be a mapping of keys to values")
            return {}
        merged: Keys = {}
        found: Keys = {}
        for key_node, value in node.value:
            if key_node.tag == _MERGE:
                merged |= self._merged(value, allowed, what)
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                self.mistake(key_node, f"a key of {what} must be a text")
                continue
            key = str(key_node.value)
            if key in found:
                self.mistake(key_node, f"{key!r} is given twice")
            if allowed is not None and key not in allowed:
                known = ", ".join(sorted(allowed))
                self.mistake(key_node, f"{key!r}: is unknown in {what}; known are {known}")
            found[key] = value
        return {**merged, **found}

    def _merged(self, node: yaml.Node, allowed: frozenset[str] | None, what: str) -> Keys:
        parts = node.value if isinstance(node, yaml.SequenceNode) else [node]
        keys: Keys = {}
        for part in reversed(parts):
            keys |= self.mapping(part, allowed, what)
        return keys

    def sequence(self, node: yaml.Node | None, what: str) -> list[yaml.Node]:
        """The items of a list; none if it is left out."""
        if node is None or is_null(node):
            return []
        if not isinstance(node, yaml.SequenceNode):
            self.mistake(node, f"{what} must be a list")
            return []
        return list(node.value)

    def text(self, node: yaml.Node | None, what: str) -> str:
        """A scalar as it is written, whatever YAML would make of it; empty if it is left out."""
        if node is None or is_null(node):
            return ""
        if not isinstance(node, yaml.ScalarNode):
            self.mistake(node, f"{what} must be a text")
            return ""
        return str(node.value)

    def texts(self, node: yaml.Node | None, what: str) -> dict[str, str]:
        """A mapping of texts."""
        return {
            key: self.text(value, f"{what}.{key}") for key, value in self.mapping(node, None, what).items()
        }

    def duration_ms(self, node: yaml.Node | None, what: str) -> int:
        """Milliseconds of `1h30m`; 0 if it is left out."""
        if node is None or is_null(node):
            return 0
        try:
            return Duration.parse(self.text(node, what))
        except ValueError as error:
            self.mistake(node, f"{what}: {error}")
            return 0

    def number(self, node: yaml.Node | None, what: str) -> float:
        """A number, `.inf` and `.nan` among them; 0 if it is left out."""
        if node is None or is_null(node):
            return 0.0
        text = self.text(node, what)
        if getattr(node, "style", None) or not _NUMBER.fullmatch(text):
            self.mistake(node, f"{what} must be a number, not {text!r}")
            return 0.0
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))

    def flag(self, node: yaml.Node | None, what: str) -> bool:
        """True or false; false if it is left out."""
        text = self.text(node, what).lower()
        if node is not None and text not in _TRUE | _FALSE | {""}:
            self.mistake(node, f"{what} must be true or false, not {text!r}")
        return text in _TRUE

    def place(self, node: yaml.Node) -> Place:
        """Where a node begins."""
        mark = node.start_mark
        return Place(file=str(self._path), line=mark.line + 1, column=mark.column + 1)

    def text_place(self, node: yaml.Node) -> Place:
        """Where a scalar's text begins: after its quote, or on the first line of its block."""
        place, style = self.place(node), getattr(node, "style", None)
        if style in {"'", '"'}:
            return Place(file=place.file, line=place.line, column=place.column + 1)
        if style not in {"|", ">"}:
            return place
        block = self._lines[place.line :]
        lead = next((i for i, line in enumerate(block) if line.strip()), 0)
        indent = len(block[lead]) - len(block[lead].lstrip()) if block else 0
        # The text begins with the empty lines above the first written one; those have no column.
        first = place.line + 1 + (lead if style == ">" else 0)
        return Place(file=place.file, line=first, column=indent + 1)

    def mistake(self, node: yaml.Node, what: str) -> None:
        """Note a mistake at a node."""
        self.mistakes.append(f"{self.place(node)}: {what}")

    def _syntax(self, error: yaml.YAMLError) -> str:
        mark = getattr(error, "problem_mark", None)
        where = f"{self._path}:{mark.line + 1}:{mark.column + 1}" if mark else str(self._path)
        return f"{where}: is no YAML: {getattr(error, 'problem', None) or error}"


def is_null(node: yaml.Node) -> bool:
    """Whether a node says nothing: `key:` or `key: null`."""
    return isinstance(node, yaml.ScalarNode) and not node.style and node.value in _NULLS
