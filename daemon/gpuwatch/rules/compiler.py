"""Rule groups as written in, groups ready to be evaluated out; refuses what cannot be, with its place."""

from __future__ import annotations

import dataclasses
import zlib
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

from gpuwatch import promql
from gpuwatch.errors import QueryError, RuleError
from gpuwatch.records import Labels
from gpuwatch.rules.templates import Template, TemplateError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from gpuwatch.records import Alert, Place, Rule, RuleGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledRule:
    """A rule with its expression and its texts parsed. Its alerts are those it `owns`.

    `key` tells it from every other rule, and is the same after a reload that left name, labels and group
    as they were. `mark` tells its alerts from those of a rule of the same name that comes before it, where
    `fixed_labels`, which all that it gives has, do not.
    """

    rule: Rule
    expr: promql.Expr
    labels: Mapping[str, Template]
    annotations: Mapping[str, Template]
    fixed_labels: Mapping[str, str]
    key: str
    mark: str = ""

    @property
    def name(self) -> str:
        """The name of its alerts, or of the series that it records."""
        return self.rule.alert or self.rule.record

    @property
    def is_recording(self) -> bool:
        """Whether it gives series of its own name instead of alerts."""
        return bool(self.rule.record)

    def owns(self, alert: Alert) -> bool:
        """Whether the alert is this rule's: by name, by the labels that all its alerts carry, and by mark."""
        return (
            alert.rule == self.rule.alert
            and self.mark in alert.held_by
            and all(alert.labels.get(name) == value for name, value in self.fixed_labels.items())
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledGroup:
    """A group whose rules are evaluated in order every `interval_ms`, at the instants of `slot_ms`.

    `window_ms` is the longest look-back that any of its expressions needs, `limit` how many alerts or
    series each of its rules may give (0: any number).
    """

    name: str
    interval_ms: int
    rules: tuple[CompiledRule, ...]
    window_ms: int
    place: Place
    limit: int = 0
    query_offset_ms: int = 0

    @property
    def key(self) -> str:
        """Which group of all files it is."""
        return f"{self.place.file};{self.name}"

    def slot_ms(self, now_ms: int) -> int:
        """The last instant up to now at which the group is to be evaluated.

        Slots are multiples of the interval and whole seconds, shifted for each group by another number of
        seconds, so that not all come at once. The shift does not depend on the folder: a rule file fires at
        the same second wherever it is installed.
        """
        text = f"{PurePath(self.place.file).name};{self.name}"
        shift_ms = zlib.crc32(text.encode()) % max(self.interval_ms // 1000, 1) * 1000
        return now_ms - (now_ms - shift_ms) % self.interval_ms


def compile_groups(groups: Sequence[RuleGroup]) -> tuple[CompiledGroup, ...]:
    """Parse all expressions and templates; RuleError with file, line and column of the first mistake."""
    seen: dict[str, list[CompiledRule]] = {}
    keys: set[str] = set()
    return tuple(_group(group, seen, keys) for group in groups)


def _group(group: RuleGroup, seen: dict[str, list[CompiledRule]], keys: set[str]) -> CompiledGroup:
    rules = tuple(_marked(_rule(rule, group, keys), seen) for rule in group.rules)
    return CompiledGroup(
        name=group.name,
        interval_ms=group.interval_ms,
        rules=rules,
        window_ms=max((promql.window_ms(rule.expr) for rule in rules), default=0) + group.query_offset_ms,
        place=group.place,
        limit=group.limit,
        query_offset_ms=group.query_offset_ms,
    )


def _rule(rule: Rule, group: RuleGroup, keys: set[str]) -> CompiledRule:
    labels = {} if rule.record else _templates(rule, group, "labels", rule.labels)
    return CompiledRule(
        rule=rule,
        expr=_expr(rule, group),
        labels=labels,
        annotations=_templates(rule, group, "annotations", rule.annotations),
        fixed_labels={
            name: text
            for name, text in rule.labels.items()
            if name != "alertname" and (name not in labels or labels[name].is_constant)
        },
        key=_key(rule, group, keys),
    )


def _key(rule: Rule, group: RuleGroup, keys: set[str]) -> str:
    """File, group, name and labels, and a number for those that are the same in all of these."""
    named = Labels([("__name__", rule.alert or rule.record), *rule.labels.items()])
    key = first = f"{rule.place.file};{group.name}/{named}"
    number = 1
    while key in keys:
        number += 1
        key = f"{first}#{number}"
    keys.add(key)
    return key


def _marked(rule: CompiledRule, seen: dict[str, list[CompiledRule]]) -> CompiledRule:
    """The rule with a mark if there is one before it whose alerts might be taken for its own."""
    if rule.is_recording:
        return rule
    others = seen.setdefault(rule.name, [])
    if not all(_differ(rule.fixed_labels, other.fixed_labels) for other in others):
        rule = dataclasses.replace(rule, mark=str(len(others) + 1))
    others.append(rule)
    return rule


def _differ(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    return any(one[name] != other[name] for name in one.keys() & other.keys())


def _expr(rule: Rule, group: RuleGroup) -> promql.Expr:
    try:
        expr = promql.parse(rule.expr)
    except QueryError as error:
        place = place_of(rule.expr_place, rule.expr, error.position)
        raise RuleError(place, f"{_said(rule, group)}: expr: {error.what}") from error
    if expr.type not in {promql.ValueType.VECTOR, promql.ValueType.SCALAR}:
        what = f"expr: a rule needs an instant vector or a scalar, not a {expr.type}"
        raise RuleError(rule.expr_place, f"{_said(rule, group)}: {what}")
    return expr


def _templates(rule: Rule, group: RuleGroup, kind: str, texts: Mapping[str, str]) -> dict[str, Template]:
    parsed = {}
    for name, text in texts.items():
        try:
            parsed[name] = Template(text, rule.alert)
        except TemplateError as error:
            start = rule.text_places.get(f"{kind}.{name}")
            place = place_of(start, text, error.position) if start else rule.place
            raise RuleError(place, f"{_said(rule, group)}: {kind}.{name}: {error.what}") from error
    return parsed


def _said(rule: Rule, group: RuleGroup) -> str:
    kind = "record" if rule.record else "alert"
    return f"group {group.name!r}, {kind} {(rule.alert or rule.record)!r}"


def place_of(start: Place, text: str, position: int) -> Place:
    """The place of a character of a text that begins at `start` and whose lines keep that column."""
    before = text[:position]
    column = start.column + position - (before.rfind("\n") + 1)
    return dataclasses.replace(start, line=start.line + before.count("\n"), column=column)


def alerting(groups: Iterable[CompiledGroup]) -> dict[str, list[CompiledRule]]:
    """The alerting rules of all groups by name."""
    found: dict[str, list[CompiledRule]] = {}
    for group in groups:
        for rule in group.rules:
            if not rule.is_recording:
                found.setdefault(rule.name, []).append(rule)
    return found
