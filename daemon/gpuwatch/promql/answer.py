"""What a query comes to, what is remarked on it, and what it may take; evaluates nothing."""

from __future__ import annotations

import datetime as dt
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, Self, TypeAlias

from gpuwatch.errors import QueryError
from gpuwatch.promql.arithmetic import shown

if TYPE_CHECKING:
    from collections.abc import Callable

    from gpuwatch.promql.selection import Series
    from gpuwatch.records import Labels

AnswerValue: TypeAlias = "list[tuple[Labels, float]] | float | str | list[Series]"

_MINUTE_MS: Final = 60_000


class Remark(str):
    """A warning or an info in Prometheus' words, less its place: `position` counts characters from 0."""

    __slots__ = ("detail", "position")
    detail: str
    position: int

    def __new__(cls, text: str, position: int, detail: str = "") -> Self:
        """A text about what stands at a position of the expression; `detail` is told with the place."""
        remark = super().__new__(cls, text)
        remark.position = position
        remark.detail = detail
        return remark

    def located(self, expression: str) -> str:
        """The text with all figures, and `(line:column)` at its end, as a Prometheus server shows it."""
        lines = expression[: self.position].split("\n")
        return f"{self}{self.detail} ({len(lines)}:{len(lines[-1]) + 1})"


class Answer(NamedTuple):
    """A query's value and what is remarked on it.

    The value is an instant vector as (labels, value), a scalar, a string, or series: those of a range
    query, or of an instant query for a range vector.
    """

    value: AnswerValue
    warnings: tuple[Remark, ...] = ()
    infos: tuple[Remark, ...] = ()


@dataclass(frozen=True, slots=True)
class Limits:
    """What one query may take: `samples` held in memory, and time until `is_over` says so.

    `subquery_step_ms` is the step of a subquery that names none: a server's evaluation interval.
    """

    samples: int = 50_000_000
    is_over: Callable[[], bool] = lambda: False
    subquery_step_ms: int = _MINUTE_MS


class Remarks:
    """Gathers remarks, each once."""

    def __init__(self) -> None:
        self._warnings: dict[str, Remark] = {}
        self._infos: dict[str, Remark] = {}
        self._repairs: dict[str, _Repairs] = {}

    def warn(self, what: str, position: int) -> None:
        """Note what makes the result doubtful."""
        self._warnings.setdefault(what, Remark(f"PromQL warning: {what}", position))

    def inform(self, what: str, position: int, detail: str = "") -> None:
        """Note what may be meant otherwise."""
        self._infos.setdefault(what, Remark(f"PromQL info: {what}", position, detail))

    def repaired(self, metric: str, position: int, at_ms: int, repair: Repair) -> None:
        """Note that a histogram's buckets had to be made to grow; one remark tells all of a metric's."""
        about = f' for metric name "{metric}"' if metric else ""
        self._repairs.setdefault(about, _Repairs(position)).add(at_ms, repair)

    def answer(self, value: AnswerValue) -> Answer:
        """The value with all that was remarked."""
        for about, repairs in self._repairs.items():
            self.inform(_REPAIRED + about, repairs.position, str(repairs))
        return Answer(value, tuple(self._warnings.values()), tuple(self._infos.values()))


class Repair(NamedTuple):
    """Between which bounds the counts of a histogram fell, and by how much at most."""

    low: float
    high: float
    most: float


_REPAIRED: Final = (
    "input to histogram_quantile needed to be fixed for monotonicity "
    "(see https://prometheus.io/docs/prometheus/latest/querying/functions/#histogram_quantile)"
)


@dataclass(slots=True)
class _Repairs:
    position: int
    count: int = 0
    from_ms: int = 0
    to_ms: int = 0
    low: float = math.inf
    high: float = -math.inf
    most: float = 0.0

    def add(self, at_ms: int, repair: Repair) -> None:
        self.from_ms = min(self.from_ms, at_ms) if self.count else at_ms
        self.to_ms = max(self.to_ms, at_ms) if self.count else at_ms
        self.count += 1
        self.low, self.high = min(self.low, repair.low), max(self.high, repair.high)
        self.most = max(self.most, repair.most)

    def __str__(self) -> str:
        start, end = (_shown_time(at_ms) for at_ms in (self.from_ms, self.to_ms))
        return (
            f", from buckets {shown(self.low)} to {shown(self.high)}, with a max diff of {self.most:.2g}, "
            f"over {self.count} samples from {start} to {end}"
        )


def _shown_time(at_ms: int) -> str:
    at = dt.datetime.fromtimestamp(0, dt.UTC) + dt.timedelta(seconds=at_ms // 1000)
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")


def refuse(what: str) -> QueryError:
    """What to raise when a query takes more than it may."""
    return QueryError(f"the query takes {what}; name fewer series, or less time")
