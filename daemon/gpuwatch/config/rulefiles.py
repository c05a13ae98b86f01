"""Decodes Prometheus rule files strictly, each thing with its place; parses no expression.

Alerting rules only; recording rules, `limit`, `query_offset` and `partial_response_strategy` are
refused with the reason. The default interval is 1s, gpuwatch's own tick, where a Prometheus server
has 1m.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import yaml

from gpuwatch.config.duration import Duration
from gpuwatch.errors import ConfigError
from gpuwatch.records import Place, Rule, RuleGroup

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

DEFAULT_INTERVAL_MS: Final = 1000

_LOADER: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_LABEL_NAME: Final = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")
_GROUP_KEYS: Final = frozenset({"name", "interval", "labels", "rules"})
_RULE_KEYS: Final = frozenset({"alert", "expr", "for", "keep_firing_for", "labels", "annotations"})
_LATER: Final = {
    "record": "recording rules are not supported yet: write their expression into the alerts that use them",
    "limit": "is not supported yet: leave it out",
    "query_offset": "is not supported yet: leave it out",
    "partial_response_strategy": "is Thanos' own: leave it out",
}


def load_rules(paths: Iterable[Path]) -> tuple[RuleGroup, ...]:
    """The groups of all files in order; ConfigError with all mistakes, each `file:line:column: what`."""
    groups: list[RuleGroup] = []
    mistakes: list[str] = []
    for path in paths:
        reader = _Reader(str(path))
        groups += reader.groups(path)
        mistakes += reader.mistakes
    if mistakes:
        raise ConfigError(mistakes)
    return tuple(groups)


class _Reader:
    """Reads one file and gathers its mistakes; what is wrong is noted and left out."""

    def __init__(self, file: str) -> None:
        self.mistakes: list[str] = []
        self._file = file
        self._lines: list[str] = []

    def groups(self, path: Path) -> list[RuleGroup]:
        try:
            text = path.read_text(encoding="utf-8")
            self._lines = text.split("\n")
            root = yaml.compose(text, Loader=_LOADER)
        except OSError as error:
            self.mistakes.append(f"{path}: cannot be read: {error.strerror}")
            return []
        except UnicodeDecodeError as error:
            self.mistakes.append(f"{path}: is not UTF-8: {error.reason} at byte {error.start}")
            return []
        except yaml.YAMLError as error:
            self.mistakes.append(self._syntax(error))
            return []
        if root is None:
            return []
        nodes = self._sequence(self._mapping(root, frozenset({"groups"}), "the file").get("groups"), "groups")
        groups = [group for node in nodes if (group := self._group(node))]
        self._check_names(groups)
        return groups

    # ---- groups and rules

    def _group(self, node: yaml.Node) -> RuleGroup | None:
        keys = self._mapping(node, _GROUP_KEYS, "a group")
        name = self._text(keys.get("name"), "name")
        if not name:
            self._mistake(node, "this group has no name")
            return None
        labels = self._texts(keys.get("labels"), "labels")
        nodes = self._sequence(keys.get("rules"), "rules")
        rules = [rule for rule_node in nodes if (rule := self._rule(rule_node, labels))]
        return RuleGroup(
            name=name,
            interval_ms=self._duration(keys.get("interval"), "interval") or DEFAULT_INTERVAL_MS,
            rules=tuple(rules),
            place=self._place(node),
        )

    def _rule(self, node: yaml.Node, group_labels: dict[str, str]) -> Rule | None:
        keys = self._mapping(node, _RULE_KEYS, "a rule")
        alert = self._text(keys.get("alert"), "alert")
        expr = keys.get("expr")
        if not alert and "record" not in keys:
            self._mistake(node, "this rule has no alert name")
        if expr is None:
            self._mistake(node, f"alert {alert!r} has no expr")
        text = self._text(expr, "expr")
        if not alert or not isinstance(expr, yaml.ScalarNode) or not text.strip():
            return None
        return Rule(
            alert=alert,
            expr=text,
            for_ms=self._duration(keys.get("for"), "for"),
            keep_firing_for_ms=self._duration(keys.get("keep_firing_for"), "keep_firing_for"),
            labels={**group_labels, **self._texts(keys.get("labels"), "labels")},
            annotations=self._texts(keys.get("annotations"), "annotations"),
            place=self._place(node),
            expr_place=self._text_place(expr),
            text_places=self._text_places(keys),
        )

    def _check_names(self, groups: list[RuleGroup]) -> None:
        first: dict[str, RuleGroup] = {}
        for group in groups:
            other = first.setdefault(group.name, group)
            if other is not group:
                self.mistakes.append(
                    f"{group.place}: group {group.name!r} is also at line {other.place.line}: "
                    "the names of a file's groups must differ"
                )

    # ---- YAML

    def _mapping(self, node: yaml.Node, allowed: frozenset[str] | None, what: str) -> dict[str, yaml.Node]:
        if not isinstance(node, yaml.MappingNode):
            self._mistake(node, f"{what} must be a mapping of keys to values")
            return {}
        found: dict[str, yaml.Node] = {}
        for key_node, value in node.value:
            key = str(key_node.value)
            if key in found:
                self._mistake(key_node, f"{key!r} is given twice")
            if allowed is not None and key not in allowed:
                why = _LATER.get(key, f"is unknown in {what}; known are {', '.join(sorted(allowed))}")
                self._mistake(key_node, f"{key!r}: {why}")
            found[key] = value
        return found

    def _sequence(self, node: yaml.Node | None, what: str) -> list[yaml.Node]:
        if node is None or _is_null(node):
            return []
        if not isinstance(node, yaml.SequenceNode):
            self._mistake(node, f"{what} must be a list")
            return []
        return list(node.value)

    def _texts(self, node: yaml.Node | None, what: str) -> dict[str, str]:
        if node is None or _is_null(node):
            return {}
        texts: dict[str, str] = {}
        for name, value in self._mapping(node, None, what).items():
            if not _LABEL_NAME.fullmatch(name) or name == "__name__":
                self._mistake(value, f"{what}: {name!r} is no label name")
            texts[name] = self._text(value, f"{what}.{name}")
        return texts

    def _text(self, node: yaml.Node | None, what: str) -> str:
        if node is None:
            return ""
        if not isinstance(node, yaml.ScalarNode) or _is_null(node):
            self._mistake(node, f"{what} must be a text")
            return ""
        return str(node.value)

    def _duration(self, node: yaml.Node | None, what: str) -> int:
        if node is None:
            return 0
        text = self._text(node, what)
        try:
            return Duration.parse(text)
        except ValueError as error:
            self._mistake(node, f"{what}: {error}")
            return 0

    # ---- places

    def _place(self, node: yaml.Node) -> Place:
        mark = node.start_mark
        return Place(file=self._file, line=mark.line + 1, column=mark.column + 1)

    def _mistake(self, node: yaml.Node, what: str) -> None:
        self.mistakes.append(f"{self._place(node)}: {what}")

    def _syntax(self, error: yaml.YAMLError) -> str:
        mark = getattr(error, "problem_mark", None)
        where = f"{self._file}:{mark.line + 1}:{mark.column + 1}" if mark else self._file
        return f"{where}: is no YAML: {getattr(error, 'problem', None) or error}"

    def _text_places(self, keys: dict[str, yaml.Node]) -> dict[str, Place]:
        places: dict[str, Place] = {}
        for kind in ("labels", "annotations"):
            node = keys.get(kind)
            if isinstance(node, yaml.MappingNode):
                places |= {f"{kind}.{key.value}": self._text_place(value) for key, value in node.value}
        return places

    def _text_place(self, node: yaml.Node) -> Place:
        """Where a scalar's text begins: after its quote, or on the first line of its block."""
        mark = node.start_mark
        style = getattr(node, "style", None)
        if style in {"'", '"'}:
            return Place(file=self._file, line=mark.line + 1, column=mark.column + 2)
        if style not in {"|", ">"}:
            return self._place(node)
        block = self._lines[mark.line + 1 :]
        lead = next((i for i, line in enumerate(block) if line.strip()), 0)
        indent = len(block[lead]) - len(block[lead].lstrip()) if block else 0
        # The text begins with the empty lines above the first written one; those have no column.
        first = mark.line + 2 + (lead if style == ">" else 0)
        return Place(file=self._file, line=first, column=indent + 1)


def _is_null(node: yaml.Node) -> bool:
    return (
        isinstance(node, yaml.ScalarNode)
        and not node.style
        and node.value in {"", "~", "null", "Null", "NULL"}
    )
