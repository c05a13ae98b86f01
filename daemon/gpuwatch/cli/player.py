"""Walks a recording with its own clock through the real cycle, and says what happened; sends nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec

from gpuwatch import assembly, config, notify, sources
from gpuwatch.clock import ManualClock
from gpuwatch.cycle import TICK_MS, Cycle
from gpuwatch.store import Store

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from gpuwatch.cycle import Report

Event = dict[str, Any]


@dataclass
class _Listener:
    """A receiver that keeps what it is told."""

    lang: str
    pace: notify.Pace = field(default_factory=lambda: notify.Pace(burst=1000, per_ms=1000))
    heard: list[notify.Message] = field(default_factory=list)

    def send(self, message: notify.Message) -> None:
        """Keep it."""
        self.heard.append(message)


def replay(file: Path, config_path: Path | None, rule_files: tuple[Path, ...]) -> Iterator[Event]:
    """Every change of an alert or a remediation and every message, in order, as plain objects."""
    settings = assembly.for_recording(config.with_rules(config.load_settings(config_path), rule_files))
    settings = msgspec.structs.replace(settings, receivers=[])
    groups = assembly.compile_rules(settings)
    recording = sources.open_recording(file)
    start_ms = -(-recording.start_ms // TICK_MS) * TICK_MS
    clock = ManualClock(start_ms)
    store = Store(assembly.window_ms(groups))
    listener = _Listener(settings.lang)
    cycle = assembly.played(settings, groups, store, start_ms, recording, {"replay": listener})
    phases: dict[str, str] = {}
    for now_ms in walk(cycle, clock, TICK_MS):
        if cycle.last_report.at_ms == now_ms:
            yield from _changes(cycle.last_report, phases)
        yield from (_told(message, listener.lang, now_ms) for message in listener.heard)
        listener.heard.clear()
        if recording.ended:
            return


def walk(cycle: Cycle, manual: ManualClock, step_ms: int) -> Iterator[int]:
    """Run the cycle's jobs when they are due by a clock that this moves; gives each moment walked."""
    due_ms = {job.name: manual.now_ms() for job in cycle.jobs()}
    while True:
        now_ms = manual.now_ms()
        for job in cycle.jobs():
            if now_ms >= due_ms[job.name]:
                due_ms[job.name] = now_ms + job.every_ms
                cycle.guarded(job, now_ms)
        yield now_ms
        manual.advance(step_ms)


def as_text(event: Event) -> str:
    """One line for a person."""
    what = event.get("alert", "")
    match event["kind"]:
        case "alert":
            return f"{event['t']:.0f} alert {what} {event['state']} {event['labels']}"
        case "remediation":
            return (
                f"{event['t']:.0f} remediation {event['id']} {event['phase']} of {event['server']} for {what}"
            )
        case _:
            return f"{event['t']:.0f} message {event['title']}"


def _changes(report: Report, phases: dict[str, str]) -> Iterator[Event]:
    t = report.at_ms / 1000
    for change in report.transitions:
        yield {
            "t": t,
            "kind": "alert",
            "alert": change.alert.rule,
            "state": str(change.now) if change.now else "inactive",
            "labels": dict(change.alert.labels),
            "value": change.alert.value,
            "annotations": dict(change.alert.annotations),
        }
    for r in report.remediations:
        if phases.get(r.plan.id) != r.phase:
            phases[r.plan.id] = r.phase
            yield {
                "t": t,
                "kind": "remediation",
                "id": r.plan.id,
                "phase": str(r.phase),
                "state": str(r.phase),
                "server": r.plan.server,
                "alert": r.plan.alert,
                "labels": dict(r.plan.alert_labels),
                "steps": [step.action for step in r.plan.steps],
                "dry_run": r.plan.dry_run,
                "outcome": r.outcome,
            }


def _told(message: notify.Message, lang: str, now_ms: int) -> Event:
    text = notify.compose(message, lang)
    return {
        "t": now_ms / 1000,
        "kind": "notification",
        "alert": message.alert,
        "state": message.state,
        "labels": message.labels,
        "title": text.title,
        "lines": list(text.lines),
    }
