"""What became of alerts over a stretch of time, gathered verdict by verdict, as text and as plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from gpuwatch.cli import answers
from gpuwatch.config import Duration
from gpuwatch.records import AlertState

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from gpuwatch.records import Labels, Transition
    from gpuwatch.rules import CompiledGroup, Verdict

_MOST_EPISODES: Final = 20


@dataclass(slots=True)
class Episode:
    """One alert from when it fired until it was resolved; `end_ms` is None if it still fires."""

    labels: Labels
    value: float
    active_ms: int
    start_ms: int
    end_ms: int | None = None

    def length_ms(self, until_ms: int) -> int:
        """How long it fired, up to an instant."""
        return (until_ms if self.end_ms is None else self.end_ms) - self.start_ms


@dataclass(slots=True)
class Past:
    """What became of one rule, or of all of one name."""

    pending: int = 0
    episodes: list[Episode] = field(default_factory=list)
    failures: int = 0
    failure: str = ""


@dataclass(slots=True)
class Story:
    """What became of the rules, by name; grows with each verdict."""

    alerts: dict[str, Past]
    recorded: dict[str, Past]
    _open: dict[tuple[str, Labels], Episode] = field(default_factory=dict)

    @classmethod
    def of(cls, groups: Sequence[CompiledGroup]) -> Story:
        """Nothing has happened yet."""
        rules = [rule for group in groups for rule in group.rules]
        return cls(
            {rule.name: Past() for rule in rules if not rule.is_recording},
            {rule.name: Past() for rule in rules if rule.is_recording},
        )

    def add(self, verdict: Verdict) -> None:
        """Take what was judged next."""
        for transition in verdict.transitions:
            self._add(transition)
        for evaluation in verdict.evaluations.values():
            for failure in evaluation.failures:
                past = self.alerts.get(failure.rule) or self.recorded[failure.rule]
                past.failures += 1
                past.failure = past.failure or failure.what

    def _add(self, transition: Transition) -> None:
        alert, at_ms = transition.alert, transition.at_ms
        key = alert.rule, alert.labels
        past = self.alerts[alert.rule]
        past.pending += transition.was is None
        if transition.now is AlertState.FIRING:
            self._open[key] = Episode(alert.labels, alert.value, alert.active_at_ms, at_ms)
            past.episodes.append(self._open[key])
        elif key in self._open:
            self._open.pop(key).end_ms = at_ms

    def troubles(self) -> Iterator[str]:
        """A line for each rule that could not be evaluated at times."""
        for name, past in (*self.alerts.items(), *self.recorded.items()):
            if past.failures:
                yield f"{name} failed {_times(past.failures)}, first with: {past.failure}"


def data(story: Story, instants: range) -> dict[str, Any]:
    """All of it, for programs; instants in ms since 1970."""
    return {
        "from_ms": instants[0],
        "to_ms": instants[-1],
        "step_ms": instants.step,
        "alerts": [
            {
                "alert": name,
                "pending": past.pending,
                "fired": len(past.episodes),
                **_lengths(past, instants[-1]),
                "failures": past.failures,
                "episodes": [_episode(one) for one in past.episodes],
            }
            for name, past in story.alerts.items()
        ],
    }


def _lengths(past: Past, until_ms: int) -> dict[str, int]:
    lengths = [one.length_ms(until_ms) for one in past.episodes]
    return {"total_ms": sum(lengths), "longest_ms": max(lengths, default=0)}


def _episode(one: Episode) -> dict[str, Any]:
    return {
        "labels": dict(one.labels),
        "value": answers.value_text(one.value),
        "active_at_ms": one.active_ms,
        "start_ms": one.start_ms,
        "end_ms": one.end_ms,
    }


def text(story: Story, instants: range) -> Iterator[str]:
    """A table of all rules, and what fired when."""
    span = f"{answers.local(instants[0])} to {answers.local(instants[-1])}"
    yield f"{len(story.alerts)} alerts from {span}, judged every {Duration(instants.step)}"
    if not story.alerts:
        return
    yield ""
    head = ("ALERT", "FIRED", "TOTAL", "LONGEST", "FIRST", "LAST")
    yield from answers.aligned([head, *(_row(*item, instants[-1]) for item in story.alerts.items())])
    for name, past in story.alerts.items():
        if past.episodes:
            yield from ("", name)
            yield from answers.aligned([_line(one, instants[-1]) for one in past.episodes[:_MOST_EPISODES]])
        if len(past.episodes) > _MOST_EPISODES:
            yield f"  and {len(past.episodes) - _MOST_EPISODES} more; --json has them all"


def _row(name: str, past: Past, until_ms: int) -> tuple[str, ...]:
    if not past.episodes:
        never = f"never; pending {_times(past.pending)}" if past.pending else "never pending"
        failed = f"; failed {_times(past.failures)}" if past.failures else ""
        return name, never + failed, "", "", "", ""
    lengths = _lengths(past, until_ms)
    return (
        name,
        str(len(past.episodes)),
        str(Duration(lengths["total_ms"])),
        str(Duration(lengths["longest_ms"])),
        answers.local(past.episodes[0].start_ms),
        answers.local(past.episodes[-1].start_ms),
    )


def _line(one: Episode, until_ms: int) -> tuple[str, ...]:
    end = "still fires" if one.end_ms is None else f"to {answers.local(one.end_ms)}"
    labels = one.labels.without("alertname", "remediation")
    shown = f"{labels} {answers.value_text(one.value)}"
    return f"  {answers.local(one.start_ms)}", end, str(Duration(one.length_ms(until_ms))), shown


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
