"""Rule groups as written in, groups ready to be evaluated out; refuses what cannot be, with its place."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

from gpuwatch import promql
from gpuwatch.errors import QueryError, RuleError
from gpuwatch.rules.templates import Template, TemplateError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from gpuwatch.records import Alert, Place, Rule, RuleGroup


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledRule:
    """A rule with its expression and its texts parsed. Its alerts are those it `owns`."""

    rule: Rule
    expr: promql.Expr
    labels: Mapping[str, Template]
    annotations: Mapping[str, Template]
    fixed_labels: Mapping[str, str]  # those of `rule.labels` that are the same on every alert

    @property
    def name(self) -> str:
        """The alert's name."""
        return self.rule.alert

    def owns(self, alert: Alert) -> bool:
        """Whether the alert is this rule's: by name, and by the labels that all its alerts carry."""
        return alert.rule == self.name and all(
            alert.labels.get(name) == value for name, value in self.fixed_labels.items()
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledGroup:
    """A group whose rules are evaluated in order every `interval_ms`.

    `window_ms` is the longest look-back that any of its expressions needs.
    """

    name: str
    interval_ms: int
    rules: tuple[CompiledRule, ...]
    window_ms: int
    place: Place


def compile_groups(groups: Sequence[RuleGroup]) -> tuple[CompiledGroup, ...]:
    """Parse all expressions and templates; RuleError with file, line and column of the first mistake."""
    compiled = tuple(_group(group) for group in groups)
    _refuse_twins(rule for group in compiled for rule in group.rules)
    return compiled


def _group(group: RuleGroup) -> CompiledGroup:
    rules = tuple(_rule(rule, group.name) for rule in group.rules)
    return CompiledGroup(
        name=group.name,
        interval_ms=group.interval_ms,
        rules=rules,
        window_ms=max((promql.window_ms(rule.expr) for rule in rules), default=0),
        place=group.place,
    )


def _rule(rule: Rule, group: str) -> CompiledRule:
    labels = _templates(rule, group, "labels", rule.labels)
    return CompiledRule(
        rule=rule,
        expr=_expr(rule, group),
        labels=labels,
        annotations=_templates(rule, group, "annotations", rule.annotations),
        fixed_labels={name: rule.labels[name] for name, text in labels.items() if text.is_constant},
    )


def _expr(rule: Rule, group: str) -> promql.Expr:
    try:
        expr = promql.parse(rule.expr)
    except QueryError as error:
        place = place_of(rule.expr_place, rule.expr, error.position)
        raise RuleError(place, f"group {group!r}, alert {rule.alert!r}: expr: {error.what}") from error
    if expr.type not in {promql.ValueType.VECTOR, promql.ValueType.SCALAR}:
        what = f"expr: an alert needs an instant vector or a scalar, not a {expr.type}"
        raise RuleError(rule.expr_place, f"group {group!r}, alert {rule.alert!r}: {what}")
    return expr


def _templates(rule: Rule, group: str, kind: str, texts: Mapping[str, str]) -> dict[str, Template]:
    parsed = {}
    for name, text in texts.items():
        try:
            parsed[name] = Template(text)
        except TemplateError as error:
            start = rule.text_places.get(f"{kind}.{name}")
            place = place_of(start, text, error.position) if start else rule.place
            what = f"group {group!r}, alert {rule.alert!r}: {kind}.{name}: {error.what}"
            raise RuleError(place, what) from error
    return parsed


def place_of(start: Place, text: str, position: int) -> Place:
    """The place of a character of a text that begins at `start` and whose lines keep that column."""
    before = text[:position]
    column = start.column + position - (before.rfind("\n") + 1)
    return dataclasses.replace(start, line=start.line + before.count("\n"), column=column)


def _refuse_twins(rules: Iterable[CompiledRule]) -> None:
    """Rules of one name must differ in a label that all their alerts carry: it tells whose an alert is."""
    for one, other in combinations(rules, 2):
        if one.name == other.name and not _differ(one.fixed_labels, other.fixed_labels):
            raise RuleError(
                other.rule.place,
                f"alert {other.name!r} is also at {one.rule.place}, and no label tells the two apart: "
                "give them different values of one label, such as severity",
            )


def _differ(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
    return any(one[name] != other[name] for name in one.keys() & other.keys())
