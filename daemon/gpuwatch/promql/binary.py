"""The operators between scalars and vectors, with Prometheus' matching of elements; selects nothing."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from gpuwatch.errors import QueryError
from gpuwatch.promql.arithmetic import ARITHMETIC, COMPARISON
from gpuwatch.promql.ast import Binary, Cardinality, Matching
from gpuwatch.promql.values import Element, Vector, unnamed
from gpuwatch.records import escaped

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuwatch.records import Labels


def scalars(op: str, left: float, right: float) -> float:
    """Two scalars; a comparison yields 1 or 0."""
    if op in COMPARISON:
        return float(COMPARISON[op](left, right))
    return ARITHMETIC[op](left, right)


def vector_and_scalar(node: Binary, vector: Vector, scalar: float, *, scalar_first: bool) -> Vector:
    """Each element with the scalar; a comparison without `bool` keeps the elements for which it holds."""
    result: Vector = []
    for element in vector:
        sides = (scalar, element.value) if scalar_first else (element.value, scalar)
        if node.op in COMPARISON and not node.return_bool:
            if COMPARISON[node.op](*sides):
                result.append(element)
        else:
            result.append(Element(element.labels, scalars(node.op, *sides), drop_name=True))
    return result


def set_operation(node: Binary, left: Vector, right: Vector) -> Vector:
    """`and`, `or`, `unless`: the left elements that have a partner, or all and the right ones without."""
    key = _signature(node.matching)
    lefts, rights = ({key(e.labels) for e in side} for side in (left, right))
    if node.op == "or":
        return [*left, *(e for e in right if key(e.labels) not in lefts)]
    return [e for e in left if (key(e.labels) in rights) == (node.op == "and")]


def vectors(node: Binary, left: Vector, right: Vector) -> Vector:
    """Each left element with its partner on the right, or the other way round for group_right."""
    swapped = node.matching.cardinality is Cardinality.ONE_TO_MANY
    one_to_one = node.matching.cardinality is Cardinality.ONE_TO_ONE
    many, one = (right, left) if swapped else (left, right)
    if not many or not one:
        return []
    key = _signature(node.matching)
    partners = _partners(node, one, key)
    seen: set[Labels] = set()
    result: Vector = []
    for element in many:
        partner = partners.get(key(element.labels))
        if partner is None:
            continue
        sides = (partner.value, element.value) if swapped else (element.value, partner.value)
        value = _kept(node, *sides)
        labels = _result_labels(node, element.labels, partner.labels)
        if one_to_one or value is not None:
            _check_once(node, key(element.labels) if one_to_one else labels, seen)
        if value is not None:
            result.append(Element(labels, value, drop_name=node.return_bool or element.drop_name))
    return result


def _kept(node: Binary, left: float, right: float) -> float | None:
    if node.op in COMPARISON and not node.return_bool:
        return left if COMPARISON[node.op](left, right) else None
    return scalars(node.op, left, right)


def _signature(matching: Matching) -> Callable[[Labels], Labels]:
    names = matching.labels
    if matching.on:
        return lambda labels: labels.only(*names)
    return lambda labels: labels.without("__name__", *names)


def _partners(node: Binary, one: Vector, key: Callable[[Labels], Labels]) -> dict[Labels, Element]:
    partners: dict[Labels, Element] = {}
    for element in one:
        group = key(element.labels)
        if group in partners:
            side = "left" if node.matching.cardinality is Cardinality.ONE_TO_MANY else "right"
            twins = sorted(map(_braced, (element.labels, partners[group].labels)))
            raise QueryError(
                f"found duplicate series for the match group {_braced(group)} on the {side} hand-side "
                f"of the operation: [{', '.join(twins)}];"
                "many-to-many matching not allowed: matching labels must be unique on one side",
                node.position,
            )
        partners[group] = element
    return partners


def _check_once(node: Binary, identity: Labels, seen: set[Labels]) -> None:
    """QueryError if a second element of the many side comes out like one before."""
    if identity in seen:
        how = "grouping labels must ensure unique matches"
        if node.matching.cardinality is Cardinality.ONE_TO_ONE:
            how = "many-to-one matching must be explicit (group_left/group_right)"
        raise QueryError(f"multiple matches for labels: {how}", node.position)
    seen.add(identity)


def _result_labels(node: Binary, many: Labels, one: Labels) -> Labels:
    matching = node.matching
    labels = many if node.op in COMPARISON else unnamed(many)
    if matching.cardinality is Cardinality.ONE_TO_ONE:
        if matching.on:
            return labels.only(*matching.labels)
        return labels.without(*matching.labels)
    return labels.merged({name: one.get(name) for name in matching.include})


def _braced(labels: Labels) -> str:
    inner = ", ".join(f'{name}="{escaped(value)}"' for name, value in labels)
    return f"{{{inner}}}"


def negated(vector: Vector) -> Vector:
    """Each element with the other sign."""
    return [
        Element(e.labels, -e.value if not math.isnan(e.value) else e.value, drop_name=True) for e in vector
    ]
