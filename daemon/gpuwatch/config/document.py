"""A YAML file as plain values, with the place of each; refuses what YAML 1.1 makes surprising.

Duplicate keys, anchors that nest without end and the many spellings of true (`yes`, `on`) are
mistakes here, not surprises later.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import yaml

from gpuwatch.errors import ConfigError
from gpuwatch.records import Place

if TYPE_CHECKING:
    from pathlib import Path

_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_INTEGER: Final = re.compile(r"[-+]?(0|[1-9][0-9_]*)")
_FLOAT: Final = re.compile(r"(?i:[-+]?[0-9]+(\.[0-9]*)?(e[-+]?[0-9]+)?|[-+]?\.[0-9]+|[-+]?\.inf|\.nan)")
_LOOSE_BOOLEAN: Final = re.compile(r"(?i:yes|no|on|off|y|n)")
_MAX_BYTES: Final = 4 * 1024 * 1024
_MAX_DEPTH: Final = 32

PathKey = tuple[str | int, ...]


@dataclass(slots=True)
class Document:
    """`value` as plain Python; `places` by path (`("servers", 0, "name")`); `mistakes` found so far."""

    file: str
    value: Any = None
    places: dict[PathKey, Place] = field(default_factory=dict)
    mistakes: list[str] = field(default_factory=list)

    def place(self, path: PathKey) -> Place:
        """Where `path` stands, or the nearest thing above it."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, Place(file=self.file, line=1))

    def mistake(self, path: PathKey, what: str) -> None:
        """Note a mistake at a path."""
        place = self.place(path)
        self.mistakes.append(f"{place.file}:{place.line}: {dotted(path)}{what}")


def dotted(path: PathKey) -> str:
    """`servers[0].name: `, empty for the whole file."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return f"{text.lstrip('.')}: " if text else ""


def refuse_depth(text: str) -> None:
    """YAMLError if a file's first document is nested so deep that composing it could exhaust the C stack."""
    depth = 0
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, yaml.DocumentEndEvent):
            return
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            what = f"it is nested deeper than {_MAX_DEPTH} levels"
            raise yaml.MarkedYAMLError(problem=what, problem_mark=event.start_mark)  # type: ignore[arg-type]


def load_document(path: Path) -> Document:
    """Read a YAML file; ConfigError if it cannot be read or is no YAML at all."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from error
    if len(raw) > _MAX_BYTES:
        raise ConfigError([f"{path}: {len(raw)} bytes are more than any configuration needs"])
    try:
        text = raw.decode("utf-8")
        refuse_depth(text)
        root = yaml.compose(text, Loader=_LOADER)
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: is not UTF-8: {error.reason} at byte {error.start}"]) from error
    except yaml.YAMLError as error:
        raise ConfigError([_syntax_text(path, error)]) from error
    document = Document(file=str(path))
    if root is not None:
        document.value = _plain(root, (), document)
    return document


def _syntax_text(path: Path, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
    return f"{where}: is no YAML: {getattr(error, 'problem', None) or error}"


def _plain(node: yaml.Node, path: PathKey, document: Document) -> Any:  # noqa: ANN401 (a YAML value is anything)
    mark = node.start_mark
    document.places[path] = Place(file=document.file, line=mark.line + 1, column=mark.column + 1)
    if isinstance(node, yaml.MappingNode):
        return _plain_mapping(node, path, document)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, (*path, i), document) for i, item in enumerate(node.value)]
    return _plain_scalar(str(node.value), bool(getattr(node, "style", None)), path, document)


def _plain_mapping(node: yaml.MappingNode, path: PathKey, document: Document) -> dict[str, Any]:
    mapping: dict[str, Any] = {}
    for key_node, value_node in node.value:
        key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "?"
        value = _plain(value_node, (*path, key), document)
        mark = key_node.start_mark
        document.places[(*path, key)] = Place(file=document.file, line=mark.line + 1, column=mark.column + 1)
        if key in mapping:
            document.mistake((*path, key), "is given twice")
        mapping[key] = value
    return mapping


def _plain_scalar(text: str, quoted: bool, path: PathKey, document: Document) -> Any:  # noqa: ANN401, FBT001
    if quoted:  # or a block: text as it stands
        return text
    if text in {"", "~", "null"}:
        return None
    if text in {"true", "false"}:
        return text == "true"
    if _LOOSE_BOOLEAN.fullmatch(text):
        document.mistake(
            path, f"{text!r} may mean true or the word; write true, false or put quotes round it"
        )
        return text
    if _INTEGER.fullmatch(text):
        return int(text.replace("_", ""))
    return float(text.replace(".inf", "inf").replace(".nan", "nan")) if _FLOAT.fullmatch(text) else text
