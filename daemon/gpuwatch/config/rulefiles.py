"""Decodes Prometheus rule files strictly, each thing with its place; parses no expression.

What a Prometheus 3 server loads is loaded, and `kind: PrometheusRule` too, of which only `spec` counts.
The default interval is 1s, gpuwatch's own tick, where a Prometheus server has 1m.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

import yaml

from gpuwatch.config.nodes import Keys, NodeReader, is_null
from gpuwatch.errors import ConfigError
from gpuwatch.records import Place, Rule, RuleGroup

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

DEFAULT_INTERVAL_MS: Final = 1000

_LONGEST_MS: Final = 2**63 // 10**6  # a server counts nanoseconds in 64 bits
_KIND: Final = "PrometheusRule"
_FILE_KEYS: Final = frozenset({"groups"})
_GROUP_KEYS: Final = frozenset({"name", "interval", "query_offset", "limit", "labels", "rules"})
_RULE_KEYS: Final = frozenset({"record", "alert", "expr", "for", "keep_firing_for", "labels", "annotations"})
_THANOS_KEYS: Final = frozenset(
    {"partial_response_strategy"}
)  # of a PrometheusRule's group; says nothing to us
_INTEGER: Final = re.compile(r"[-+]?\d+")


def load_rules(paths: Iterable[Path]) -> tuple[RuleGroup, ...]:
    """The groups of all files in order; ConfigError with all mistakes, each `file:line:column: what`."""
    groups: list[RuleGroup] = []
    mistakes: list[str] = []
    for path in paths:
        found, wrong = read_rules(path)
        groups += found
        mistakes += wrong
    if mistakes:
        raise ConfigError(mistakes)
    return tuple(groups)


def read_rules(path: Path) -> tuple[list[RuleGroup], list[str]]:
    """What can be read of a file, and its mistakes, each `file:line:column: what`."""
    reader = _Reader(path)
    try:
        return reader.groups(), reader.mistakes
    except RecursionError:
        return [], [*reader.mistakes, f"{path}: has a part that holds itself"]


class _Reader(NodeReader):
    """Reads one rule file; only its first document counts."""

    _group_keys = _GROUP_KEYS

    def groups(self) -> list[RuleGroup]:
        """The groups that can be read."""
        root = self.root()
        keys = self._unwrapped(root) if _is_resource(root) else self.mapping(root, _FILE_KEYS, "the file")
        nodes = self.sequence(keys.get("groups"), "groups")
        groups = [group for node in nodes if (group := self._group(node))]
        self._check_names(groups)
        return groups

    def _unwrapped(self, root: yaml.Node | None) -> Keys:
        """What a Kubernetes object of this kind holds of a rule file; its metadata is its own affair."""
        self._group_keys = _GROUP_KEYS | _THANOS_KEYS
        return self.mapping(self.mapping(root, None, "the file").get("spec"), _FILE_KEYS, "spec")

    def _group(self, node: yaml.Node) -> RuleGroup | None:
        keys = self.mapping(node, self._group_keys, "a group")
        name = self.text(keys.get("name"), "name")
        if not name:
            self.mistake(node, "this group has no name")
            return None
        labels, places = self._labels(keys, "labels"), self._text_places(keys)
        nodes = self.sequence(keys.get("rules"), "rules")
        rules = [rule for rule_node in nodes if (rule := self._rule(rule_node, labels, places))]
        return RuleGroup(
            name=name,
            interval_ms=self._duration(keys, "interval") or DEFAULT_INTERVAL_MS,
            rules=tuple(rules),
            place=self.place(node),
            limit=self._limit(keys.get("limit")),
            query_offset_ms=self._duration(keys, "query_offset"),
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

    # ---- rules

    def _rule(
        self, node: yaml.Node, group_labels: dict[str, str], group_places: dict[str, Place]
    ) -> Rule | None:
        keys = self.mapping(node, _RULE_KEYS, "a rule")
        rule = Rule(
            alert=self.text(keys.get("alert"), "alert"),
            record=self.text(keys.get("record"), "record"),
            expr=self.text(keys.get("expr"), "expr"),
            for_ms=self._duration(keys, "for"),
            keep_firing_for_ms=self._duration(keys, "keep_firing_for"),
            labels=group_labels | self._labels(keys, "labels"),
            annotations=self._labels(keys, "annotations"),
            place=self.place(node),
            expr_place=self.text_place(keys.get("expr", node)),
            text_places=group_places | self._text_places(keys),
        )
        known = len(self.mistakes)
        self._check_rule(node, keys, rule)
        return rule if len(self.mistakes) == known else None

    def _check_rule(self, node: yaml.Node, keys: Keys, rule: Rule) -> None:
        if not rule.alert and not rule.record:
            self.mistake(node, "this rule has no name: give it alert or record")
        if rule.alert and rule.record:
            self.mistake(node, f"this rule is alert {rule.alert!r} and record {rule.record!r}: it can be one")
        if not rule.expr.strip():
            name = rule.alert or rule.record
            self.mistake(node, f"rule {name!r} has no expr" if name else "this rule has no expr")
        if rule.record:
            self._check_recording(keys, rule)

    def _check_recording(self, keys: Keys, rule: Rule) -> None:
        if "{" in rule.record or "}" in rule.record:
            what = "is no name of a series: labels go into labels, an expression into expr"
            self.mistake(keys["record"], f"record: {rule.record!r} {what}")
        given = {
            "for": rule.for_ms,
            "keep_firing_for": rule.keep_firing_for_ms,
            "annotations": rule.annotations,
        }
        for key, value in given.items():
            if value:
                self.mistake(keys[key], f"{key}: is for alerts; record {rule.record!r} has no use for it")

    # ---- values

    def _labels(self, keys: Keys, what: str) -> dict[str, str]:
        node = keys.get(what)
        texts = self.texts(node, what)
        for name in texts:
            if node is not None and (not name or (name == "__name__" and what == "labels")):
                self.mistake(node, f"{what}: {name!r} is no label name")
        return texts

    def _duration(self, keys: Keys, what: str) -> int:
        node = keys.get(what)
        duration_ms = self.duration_ms(node, what)
        if node is not None and duration_ms > _LONGEST_MS:
            self.mistake(node, f"{what}: is longer than the 292 years that a server can count")
        return duration_ms

    def _limit(self, node: yaml.Node | None) -> int:
        """A number of alerts or series; 0 and less set no limit."""
        if node is None or is_null(node):
            return 0
        text = self.text(node, "limit")
        if getattr(node, "style", None) or not _INTEGER.fullmatch(text):
            self.mistake(node, f"limit must be a whole number, not {text!r}")
            return 0
        return max(0, int(text))

    def _text_places(self, keys: Keys) -> dict[str, Place]:
        places: dict[str, Place] = {}
        for kind in ("labels", "annotations"):
            node = keys.get(kind)
            if isinstance(node, yaml.MappingNode):
                places |= {f"{kind}.{key.value}": self.text_place(value) for key, value in node.value}
        return places


def _is_resource(root: yaml.Node | None) -> bool:
    """Whether a file is an object for Kubernetes that wraps a rule file."""
    return isinstance(root, yaml.MappingNode) and any(
        key.value == "kind" and value.value == _KIND for key, value in root.value
    )
