"""What the guests of a server tell of its limits, its requests and its pauses, as samples; limits nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from gpuwatch.records import Labels, Metric, MetricKind

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from gpuwatch.sources.guests import Admission, Engine, Figures

IN_FLIGHT: Final = "server_requests_in_flight"
LIMIT: Final = "server_limit"
REFUSED: Final = "server_admission_refused_total"
PAUSED: Final = "server_guest_paused"
GUESTS: Final = "server_guests"

METRICS: Final = (
    Metric(
        name=IN_FLIGHT,
        kind=MetricKind.GAUGE,
        help="Requests that the API holds; source is admission (the guest's count) or load (GET /load).",
        labels=("server", "source"),
    ),
    Metric(
        name=LIMIT,
        kind=MetricKind.GAUGE,
        help="The limit in force on sequences that run, tokens of a step, or requests admitted.",
        labels=("server", "limit"),
    ),
    Metric(
        name=REFUSED,
        kind=MetricKind.COUNTER,
        help="Requests that the admission limit has refused; begins anew with the API's processes.",
        labels=("server",),
    ),
    Metric(
        name=PAUSED,
        kind=MetricKind.GAUGE,
        help="1 while the scheduler of an engine is paused, else 0; none where the guest cannot know.",
        labels=("server",),
    ),
    Metric(
        name=GUESTS,
        kind=MetricKind.GAUGE,
        help="Guests that answer; part is guest (all of them) or door (those that can limit admission).",
        labels=("server", "part"),
    ),
)


def values(server: str, figures: Iterable[Figures]) -> Iterator[tuple[Labels, float]]:
    """The series of one server, of what its processes told."""
    told = list(figures)
    doors = sum(f.admission is not None for f in told)
    yield Labels.of(GUESTS, server=server, part="guest"), float(len(told))
    yield Labels.of(GUESTS, server=server, part="door"), float(doors)
    yield from _of_admission(server, [f.admission for f in told if f.admission is not None])
    yield from _of_engines(server, [f.engine for f in told if f.engine is not None])


def _of_admission(server: str, api: list[Admission]) -> Iterator[tuple[Labels, float]]:
    """Each API process has a share of the limit: together they are one door."""
    if api:
        in_flight = Labels.of(IN_FLIGHT, server=server, source="admission")
        yield in_flight, float(sum(one.in_flight for one in api))
        yield Labels.of(REFUSED, server=server), float(sum(one.refused for one in api))
    limits = [one.limit for one in api if one.limit is not None]
    if limits and len(limits) == len(api):  # a door that is open bounds nothing
        yield Labels.of(LIMIT, server=server, limit="admission"), float(sum(limits))


def _of_engines(server: str, engines: list[Engine]) -> Iterator[tuple[Labels, float]]:
    """Each engine has the whole limit for itself; of several the lowest is told."""
    for name in ("running", "tokens"):
        found = [engine.limits[name] for engine in engines if name in engine.limits]
        if found:
            yield Labels.of(LIMIT, server=server, limit=name), float(min(found))
    paused = [engine.paused for engine in engines if engine.paused is not None]
    if paused:
        yield Labels.of(PAUSED, server=server), float(any(paused))
