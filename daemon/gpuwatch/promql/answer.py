"""What a query comes to, and what it may take; evaluates nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from gpuwatch.errors import QueryError

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuwatch.promql.selection import Series
    from gpuwatch.records import Labels

AnswerValue: TypeAlias = "list[tuple[Labels, float]] | float | str | list[Series]"


class Answer(NamedTuple):
    """A query's value, and what Prometheus remarks on it, each text with its `(line:column)` at the end.

    The value is an instant vector as (labels, value), a scalar, a string, or series: those of a range
    query, or of an instant query for a range vector.
    """

    value: AnswerValue
    warnings: tuple[str, ...] = ()
    infos: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Limits:
    """What one query may take: `samples` at once in memory, and time until `is_over` says so."""

    samples: int = 50_000_000
    is_over: Callable[[], bool] = lambda: False

    def check(self, samples: int) -> None:
        """QueryError if it takes more."""
        if samples > self.samples:
            raise QueryError(f"the query takes more than {self.samples} samples; name fewer series or less time")
        if self.is_over():
            raise QueryError("the query takes too long; name fewer series or less time")


LIMITS = Limits()
