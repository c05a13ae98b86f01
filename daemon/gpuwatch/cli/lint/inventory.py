"""What is known of metrics, stored or promised: kinds, series, labels; judges no rule and reads no file."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from gpuwatch import catalogue
from gpuwatch.promql import metric_of
from gpuwatch.records import MetricKind

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from gpuwatch.promql import Matcher
    from gpuwatch.records import Labels

ALERT_SERIES: Final = frozenset({"ALERTS", "ALERTS_FOR_STATE"})
_COUNTERS: Final = ("_total", "_bucket")
_PARTS: Final = ("_sum", "_count")  # of a histogram or summary, where both are there
_SUFFIXES: Final = ("_total", "_bucket", "_sum", "_count", "")


@dataclass(frozen=True)
class Inventory:
    """`stored`: the series of each metric on this host; None if there is no database to tell.

    `recorded`: the metrics that recording rules make.
    """

    stored: dict[str, list[Labels]] | None
    recorded: frozenset[str] = field(default_factory=frozenset)

    @classmethod
    def of(cls, series: Iterable[Labels] | None, recorded: Iterable[str] = ()) -> Inventory:
        """From all series that are stored, if that is known."""
        stored: dict[str, list[Labels]] | None = None if series is None else {}
        for labels in series or ():
            if stored is not None:
                stored.setdefault(labels.metric, []).append(labels)
        return cls(stored, frozenset(recorded) | ALERT_SERIES)

    def is_unseen(self, metric: str) -> bool:
        """Whether it is neither stored nor made by gpuwatch, by a rule or by a server yet to come."""
        if self.stored is None or metric in self.stored:
            return False
        if metric in catalogue.CATALOGUE or metric in self.recorded:
            return False
        family = metric.partition(":")[0] + ":"  # before the first server answered, no vllm: is stored
        return family != "vllm:" or any(name.startswith(family) for name in self.stored)

    def series(self, matchers: Sequence[Matcher]) -> list[Labels]:
        """The stored series that all matchers accept."""
        name = metric_of(matchers)
        return [
            labels
            for labels in (self.stored or {}).get(name, ())
            if all(matcher.matches(labels.get(matcher.name)) for matcher in matchers)
        ]

    def labels(self, metric: str) -> frozenset[str] | None:
        """The names of all labels that series of a metric may have; None if that is not known."""
        if not metric or metric in self.recorded:
            return None
        made = catalogue.CATALOGUE.get(metric)
        stored = (self.stored or {}).get(metric)
        if made is None and not stored:
            return None
        names = {name for labels in stored or () for name, _ in labels}
        return frozenset(names | set(made.labels if made else ())) - {"__name__"}

    def kind(self, metric: str) -> MetricKind | None:
        """Counter or gauge, where the catalogue, a client library's habit or the stored series tell."""
        if metric in catalogue.CATALOGUE:
            return catalogue.CATALOGUE[metric].kind
        if metric in self.recorded:
            return None
        if metric.endswith(_COUNTERS) or self._is_part(metric):
            return MetricKind.COUNTER
        # vLLM's client library ends every counter in _total, and what ends in nothing of the kind is a gauge.
        is_gauge = (
            metric.startswith("vllm:") and metric in (self.stored or {}) and not metric.endswith(_PARTS)
        )
        return MetricKind.GAUGE if is_gauge else None

    def _is_part(self, metric: str) -> bool:
        """Whether it is the `_sum` or `_count` of a histogram or summary."""
        base = metric.rpartition("_")[0]
        return metric.endswith(_PARTS) and all(base + part in (self.stored or {}) for part in _PARTS)

    def nearest_metric(self, metric: str) -> str:
        """A known metric with nearly this name; empty if there is none."""
        known = {*(self.stored or ()), *catalogue.CATALOGUE, *self.recorded} - ALERT_SERIES
        base = next((metric.removesuffix(end) for end in _SUFFIXES if end and metric.endswith(end)), metric)
        near = (start + end for start in (metric, base) for end in _SUFFIXES)
        return next((name for name in near if name in known), "") or nearest(metric, known)


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word that resembles this one most; empty if none does."""
    return "".join(difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.8))
