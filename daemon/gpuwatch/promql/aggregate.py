"""The aggregations: one element a group, or for topk and bottomk a choice of each group."""

from __future__ import annotations

import math
from collections import Counter
from decimal import Decimal
from typing import TYPE_CHECKING, Final

from gpuwatch.errors import QueryError
from gpuwatch.promql.arithmetic import greatest, least, mean, quantile, shown, total, variance
from gpuwatch.promql.functions import sort
from gpuwatch.promql.values import Element, Vector

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gpuwatch.promql.ast import Aggregation
    from gpuwatch.records import Labels

_SIMPLE: Final[dict[str, Callable[[Sequence[float]], float]]] = {
    "sum": total,
    "avg": mean,
    "min": least,
    "max": greatest,
    "count": lambda values: float(len(values)),
    "group": lambda _: 1.0,
    "stddev": lambda values: math.sqrt(variance(values)),
    "stdvar": variance,
}


def aggregate(node: Aggregation, vector: Vector, param: float | str | None) -> Vector:
    """Group the vector by the node's labels and make of each group what the node asks."""
    if node.op in {"topk", "bottomk"} and param != param:
        raise QueryError("Parameter value is NaN", node.position)
    groups: dict[Labels, Vector] = {}
    for element in vector:
        groups.setdefault(_group_of(node, element.labels), []).append(element)
    if node.op in {"topk", "bottomk"}:
        return [chosen for group in groups.values() for chosen in _top(node, group, param)]
    if node.op == "count_values":
        if not param:
            raise QueryError(f'invalid label name "{param}"', node.position)
        return _count_values(groups, str(param))
    simple = _SIMPLE.get(node.op)
    result: Vector = []
    for labels, group in groups.items():
        values = [element.value for element in group]
        value = simple(values) if simple else quantile(float(param or 0), values)
        result.append(Element(labels, value, any(element.drop_name for element in group)))
    return result


def _group_of(node: Aggregation, labels: Labels) -> Labels:
    return labels.without("__name__", *node.labels) if node.without else labels.only(*node.labels)


def _top(node: Aggregation, group: Vector, param: float | str | None) -> Vector:
    k = float(param or 0)
    if k < 1:
        return []
    return sort(group, descending=node.op == "topk")[: int(min(k, len(group)))]


def _count_values(groups: dict[Labels, Vector], label: str) -> Vector:
    counts: Counter[Labels] = Counter()
    for labels, group in groups.items():
        for element in group:
            counts[labels.merged({label: _spelled_out(element.value)})] += 1
    return [Element(labels, float(count)) for labels, count in counts.items()]


def _spelled_out(value: float) -> str:
    """The fewest digits that tell the value, without an exponent."""
    if not math.isfinite(value):
        return shown(value)
    return format(Decimal(repr(value)), "f").removesuffix(".0")
