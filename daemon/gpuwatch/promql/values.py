"""What the evaluator passes about: elements of instant vectors, windows of range vectors; decides nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from gpuwatch.errors import QueryError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gpuwatch.records import Labels


class Element(NamedTuple):
    """One element of an instant vector.

    A function drops the metric's name only when the whole query is done, as Prometheus 3 does with
    delayed name removal: until then `drop_name` remembers it, so that label_replace can use the name.
    """

    labels: Labels
    value: float
    drop_name: bool = False


Vector: TypeAlias = list[Element]
Value: TypeAlias = float | str | Vector


class Window(NamedTuple):
    """The samples of one series in `(start_ms, end_ms]`, markers left out; at least one.

    `now_ms` is the evaluation's instant, which an offset sets apart from `end_ms`.
    """

    labels: Labels
    at_ms: Sequence[int]
    values: Sequence[float]
    start_ms: int
    end_ms: int
    now_ms: int
    drop_name: bool = False


def unnamed(labels: Labels) -> Labels:
    """The labels without the metric's name, nor its type and unit, which go with it."""
    return labels.without("__name__", "__type__", "__unit__")


def settled(vector: Vector, position: int) -> list[tuple[Labels, float]]:
    """The vector with names dropped where they are due; QueryError if two elements then look the same."""
    result = [(unnamed(e.labels) if e.drop_name else e.labels, e.value) for e in vector]
    if len({labels for labels, _ in result}) < len(result):
        raise QueryError("vector cannot contain metrics with the same labelset", position)
    return result
