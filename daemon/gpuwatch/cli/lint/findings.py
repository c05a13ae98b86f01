"""Tells what in a rule is right to Prometheus and still looks mistaken, by what this host stores.

A doubtful case is passed over: a remark that is wrong costs more than one that is missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from gpuwatch.cli.lint.inventory import Inventory, nearest
from gpuwatch.cli.lint.labelnames import Names, names_of
from gpuwatch.cli.lint.never import always_true, never_true
from gpuwatch.promql import metric_of
from gpuwatch.promql.ast import (
    Aggregation,
    Binary,
    Call,
    Expr,
    MatrixSelector,
    VectorSelector,
    children,
    walk,
)
from gpuwatch.records import MetricKind
from gpuwatch.rules.compiler import place_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from gpuwatch.promql import Matcher
    from gpuwatch.records import Place
    from gpuwatch.rules import CompiledGroup, CompiledRule

    Found = Iterator[tuple[int, str]]  # positions in the expression, and what is wrong there

# A counter may stand bare in these: they take no value of it, or cope with its resets.
_COUNTERS_WELCOME: Final = frozenset(
    {
        *("rate", "increase", "irate", "resets", "changes", "absent", "absent_over_time", "timestamp"),
        *("count_over_time", "present_over_time", "count", "group", "unless"),
    }
)
_RATES: Final = frozenset({"rate", "increase", "irate"})
_NAME: Final = frozenset({"__name__"})
# Labels that a host's series have from the start; the values of others may come with an event.
_LASTING: Final = frozenset({"gpu", "uuid", "server", "model_name"})


@dataclass(frozen=True, slots=True)
class Finding:
    """A remark on one rule."""

    place: Place
    rule: str
    what: str

    def __str__(self) -> str:
        """`file:line:column: rule: what`."""
        return f"{self.place}: {self.rule}: {self.what}"


def lint(groups: Sequence[CompiledGroup], known: Inventory) -> list[Finding]:
    """All remarks on the rules, in the order of the file."""
    rules = [rule for group in groups for rule in group.rules]
    found = [finding for rule in rules for finding in _of_rule(rule, known)]
    return sorted([*found, *_duplicates(rules)], key=lambda f: (f.place.file, f.place.line, f.place.column))


def _of_rule(rule: CompiledRule, known: Inventory) -> Iterator[Finding]:
    checks: list[Callable[[Expr], Found]] = [
        lambda expr: _selectors(expr, known),
        lambda expr: _counters(expr, known),
        lambda expr: _rated_gauges(expr, known),
        lambda expr: _groupings(expr, known),
        lambda expr: _matchings(expr, known),
    ]
    if not rule.is_recording:
        checks += [never_true, always_true]
    for check in checks:
        for position, what in check(rule.expr):
            yield Finding(place_of(rule.rule.expr_place, rule.rule.expr, position), _title(rule), what)
    yield from _templates(rule, known)


def _title(rule: CompiledRule) -> str:
    return f"{'record' if rule.is_recording else 'alert'} {rule.name}"


def _duplicates(rules: Iterable[CompiledRule]) -> Iterator[Finding]:
    keys = [(rule, (rule.name, tuple(sorted(rule.rule.labels.items())))) for rule in rules]
    first: dict[object, Place] = {}
    for rule, key in keys:
        if key in first:
            what = f"the same name and labels as at {first[key]}: give them a label that tells them apart"
            yield Finding(rule.rule.place, _title(rule), what)
        first.setdefault(key, rule.rule.place)


# ---- selectors


def _selectors(expr: Expr, known: Inventory) -> Found:
    for node, _ in walk(expr):
        if isinstance(node, VectorSelector):
            yield from ((node.position, what) for what in _of_selector(node.matchers, known))


def _of_selector(matchers: Sequence[Matcher], known: Inventory) -> Iterator[str]:
    contradictions = list(_contradictions(matchers))
    if contradictions:
        yield contradictions[0]
        return
    metric = metric_of(matchers)
    if metric and known.is_unseen(metric):
        near = known.nearest_metric(metric)
        cure = f"did you mean {near}?" if near else "is its name right, and does anything export it?"
        yield f"the metric {metric} was never seen on this host; {cure}"
    labels = known.labels(metric)
    needed = [matcher for matcher in matchers if matcher.name != "__name__" and not matcher.matches("")]
    missing = [matcher.name for matcher in needed if labels is not None and matcher.name not in labels]
    if missing:
        have = ", ".join(sorted(labels or ())) or "none"
        yield f"no series of {metric} has {_labels(missing)}, so this selects nothing; they have {have}"
        return
    for matcher in needed:
        yield from _unseen_value(metric, matcher, known)


def _contradictions(matchers: Sequence[Matcher]) -> Iterator[str]:
    for one in matchers:
        if one.op == "=":
            for other in matchers:
                if other.name == one.name and not other.matches(one.value):
                    yield f"{one} and {other} exclude each other, so this selects nothing"


def _unseen_value(metric: str, matcher: Matcher, known: Inventory) -> Iterator[str]:
    values = {series.get(matcher.name) for series in (known.stored or {}).get(metric, ())} - {""}
    if matcher.op != "=" or not values or matcher.value in values:
        return
    near = _misspelt(matcher.value, values)
    if near or matcher.name in _LASTING:
        cure = f"did you mean {near!r}?" if near else f"seen were {', '.join(map(repr, sorted(values)[:8]))}"
        yield f"no series of {metric} was ever seen with {matcher}; {cure}"


def _misspelt(value: str, values: Iterable[str]) -> str:
    """The value that was meant; numbers and opposites ("corrected", "uncorrected") resemble by nature."""
    near = "" if value.isdigit() else nearest(value, values)
    return "" if near.endswith(value) or value.endswith(near) else near


# ---- counters and gauges


def _counters(expr: Expr, known: Inventory, *, welcome: bool = False) -> Found:
    """Counters whose value is taken as it is."""
    if isinstance(expr, VectorSelector):
        metric = metric_of(expr.matchers)
        if not welcome and known.kind(metric) is MetricKind.COUNTER:
            what = f"{metric} is a counter, and only rises until its process starts again"
            yield expr.position, f"{what}: take rate() or increase()"
        return
    match expr:
        case Call(function=name) | Aggregation(op=name) | Binary(op=name):
            welcome = welcome or name in _COUNTERS_WELCOME
        case _:
            pass
    for index, inner in enumerate(children(expr)):
        is_condition = isinstance(expr, Binary) and expr.op == "and" and index == 1
        yield from _counters(inner, known, welcome=welcome or is_condition)


def _rated_gauges(expr: Expr, known: Inventory) -> Found:
    for node, _ in walk(expr):
        if isinstance(node, Call) and node.function in _RATES and isinstance(node.args[0], MatrixSelector):
            metric = metric_of(node.args[0].selector.matchers)
            if known.kind(metric) is MetricKind.GAUGE:
                what = f"{metric} is a gauge, and {node.function}() takes each fall for a restart from 0"
                yield node.position, f"{what}: take deriv() or delta()"


# ---- labels of results


def _groupings(expr: Expr, known: Inventory) -> Found:
    for node, _ in walk(expr):
        if isinstance(node, Aggregation):
            names = names_of(node.expr, known)
            missing = [label for label in node.labels if label != "__name__" and not names.may_have(label)]
            near = nearest(missing[0], names.possible or ()) if missing else ""
            if near or (missing and not node.without):
                clause = f"{'without' if node.without else 'by'} ({', '.join(missing)})"
                yield node.position, f"{clause}: nothing here has {_labels(missing)}{_meant(near)}"


def _matchings(expr: Expr, known: Inventory) -> Found:
    for node, _ in walk(expr):
        if isinstance(node, Binary) and node.matching.on:
            left, right = names_of(node.left, known), names_of(node.right, known)
            for label in node.matching.labels:
                what = _mismatch(label, left, right)
                if what:
                    yield node.position, f"on ({label}): {what}"


def _mismatch(label: str, left: Names, right: Names) -> str:
    """What is wrong with matching on a label; empty if nothing is."""
    if not left.may_have(label) and not right.may_have(label):
        near = nearest(label, (left.possible or frozenset()) & (right.possible or frozenset()))
        return f"neither side has this label{_meant(near)}"
    for side, this, other in (("left", left, right), ("right", right, left)):
        if not this.may_have(label) and label in other.certain:
            return f"the {side} side never has this label and the other always, so nothing matches"
    return ""


def _labels(names: Sequence[str]) -> str:
    return f"the label{'' if len(names) == 1 else 's'} {', '.join(names)}"


def _meant(near: str) -> str:
    return f"; did you mean {near}?" if near else ""


# ---- templates


def _templates(rule: CompiledRule, known: Inventory) -> Iterator[Finding]:
    names = names_of(rule.expr, known)
    for kind, texts in (("labels", rule.labels), ("annotations", rule.annotations)):
        for name, template in texts.items():
            key = f"{kind}.{name}"
            if kind == "labels" and template.uses_value:
                what = f"{key} holds $value: each new value is a new alert; say the value in an annotation"
                yield _in_text(rule, key, "$value", what)
            for label in sorted(template.labels_used - _NAME):
                if not names.may_have(label):
                    near = nearest(label, names.possible or ())
                    own = "; it is the rule's own: write its value" if label in rule.labels else _meant(near)
                    what = f"{key}: $labels.{label} is always empty, as no element has this label{own}"
                    yield _in_text(rule, key, f"$labels.{label}", what)


def _in_text(rule: CompiledRule, key: str, word: str, what: str) -> Finding:
    kind, name = key.split(".", 1)
    text = (rule.rule.labels if kind == "labels" else rule.rule.annotations)[name]
    start = rule.rule.text_places.get(key)
    place = place_of(start, text, max(text.find(word), 0)) if start else rule.rule.place
    return Finding(place, _title(rule), what)
