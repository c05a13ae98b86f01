"""Which labels the elements of an expression can have, told from the expression alone; evaluates nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from gpuwatch.promql import metric_of
from gpuwatch.promql.ast import (
    Aggregation,
    Binary,
    Call,
    Cardinality,
    Expr,
    StringLiteral,
    ValueType,
    VectorSelector,
    children,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from gpuwatch.cli.lint.inventory import Inventory

_NAME = frozenset({"__name__"})


class Names(NamedTuple):
    """The labels that an element may have (None: any) and those that each one has; no metric's name."""

    possible: frozenset[str] | None
    certain: frozenset[str]

    def may_have(self, label: str) -> bool:
        """Whether an element can have the label."""
        return self.possible is None or label in self.possible

    def only(self, labels: Iterable[str]) -> Names:
        """What is left of them by these labels."""
        kept = frozenset(labels)
        return Names(kept if self.possible is None else self.possible & kept, self.certain & kept)

    def less(self, labels: Iterable[str]) -> Names:
        """What is left of them without these labels."""
        gone = frozenset(labels)
        return Names(None if self.possible is None else self.possible - gone, self.certain - gone)

    def plus(self, labels: Iterable[str]) -> Names:
        """Together with labels that an element may get."""
        return Names(None if self.possible is None else self.possible | frozenset(labels), self.certain)

    def either(self, other: Names) -> Names:
        """Of elements that are of the one or of the other kind."""
        both = None if None in {self.possible, other.possible} else self.possible | other.possible  # type: ignore[operator]
        return Names(both, self.certain & other.certain)


NONE = Names(frozenset(), frozenset())


def names_of(expr: Expr, known: Inventory) -> Names:
    """The labels of the elements that an expression gives, as far as can be told."""
    match expr:
        case VectorSelector():
            return _of_selector(expr, known)
        case Aggregation():
            return _of_aggregation(expr, names_of(expr.expr, known))
        case Binary():
            return _of_binary(expr, names_of(expr.left, known), names_of(expr.right, known))
        case Call():
            return _of_call(expr, known)
        case _:
            return _of_inner(expr, known)


def _of_inner(expr: Expr, known: Inventory) -> Names:
    """Those of the one vector within."""
    vectors = [one for one in children(expr) if one.type in {ValueType.VECTOR, ValueType.MATRIX}]
    has_labels = vectors and expr.type is not ValueType.SCALAR
    return names_of(vectors[-1], known) if has_labels else NONE


def _of_call(call: Call, known: Inventory) -> Names:
    match call.function:
        case "absent" | "absent_over_time":
            return Names(_equalities(call), frozenset())
        case "label_replace" | "label_join":
            written = call.args[1]
            names = _of_inner(call, known)
            return names.plus({written.value}) if isinstance(written, StringLiteral) else names
        case "histogram_quantile" | "histogram_fraction":
            return _of_inner(call, known).less({"le"})
        case _:
            return _of_inner(call, known)


def _of_selector(selector: VectorSelector, known: Inventory) -> Names:
    metric = metric_of(selector.matchers)
    possible = known.labels(metric)
    needed = frozenset(m.name for m in selector.matchers if not m.matches(""))
    if possible is None:
        return Names(None, needed - _NAME)
    series = [frozenset(name for name, _ in labels) for labels in known.series(selector.matchers)]
    on_all = frozenset.intersection(*series) if series else frozenset()
    return Names(possible, (on_all | (needed & possible)) - _NAME)


def _equalities(call: Call) -> frozenset[str]:
    """The labels that absent() makes of its selector's `label="value"`."""
    selectors = [one for arg in call.args for one in (arg, *children(arg)) if isinstance(one, VectorSelector)]
    return frozenset(m.name for one in selectors for m in one.matchers if m.op == "=") - _NAME


def _of_aggregation(node: Aggregation, inner: Names) -> Names:
    if node.op in {"topk", "bottomk", "limitk", "limit_ratio"}:
        return inner
    kept = inner.less(node.labels) if node.without else inner.only(node.labels)
    if node.op == "count_values" and isinstance(node.param, StringLiteral):
        return kept.plus({node.param.value})
    return kept


def _of_binary(node: Binary, left: Names, right: Names) -> Names:
    if node.left.type is ValueType.SCALAR or node.right.type is ValueType.SCALAR:
        return right if node.left.type is ValueType.SCALAR else left
    if node.op == "or":
        return left.either(right)
    matching = node.matching
    match matching.cardinality:
        case Cardinality.MANY_TO_MANY:
            return left
        case Cardinality.MANY_TO_ONE:
            return left.plus(matching.include)
        case Cardinality.ONE_TO_MANY:
            return right.plus(matching.include)
        case Cardinality.ONE_TO_ONE:
            return left.only(matching.labels) if matching.on else left.less(matching.labels)
