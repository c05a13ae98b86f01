"""What `gpuwatch why` shows: how something was decided and what came of it, gathered from rows alone.

A code without words stands as it is. Names that others chose never command the terminal.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any, Final

from gpuwatch.cli import past, units
from gpuwatch.cli.answers import aligned, local
from gpuwatch.cli.past import label
from gpuwatch.errors import ConfigError
from gpuwatch.notify import duration, incident_id, words
from gpuwatch.records import Labels, Phase

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from gpuwatch.cli.past import Row, Seen
    from gpuwatch.records import Alert, Considered, Refusal, Remediation, Step
    from gpuwatch.store import Audit, ReadStore

_MOST: Final = 1_000
_WORDS: Final = frozenset({"approve", "deny", "abort"})
_BLOCKER: Final = "blocker:"
_AFTER_A_FAILURE: Final = frozenset({Phase.ROLLING_BACK, Phase.ROLLED_BACK, Phase.FAILED})
# Outcomes that say nothing of how far it had come: where no step failed else, the proof did.
_CALLED_OFF: Final = frozenset({"aborted_by", "alert_over", "server_gone", "stopped_by_operator"})


def gather(rows: ReadStore, state_dir: Path, what: str | None, now_ms: int) -> list[Seen]:
    """The remediation `what`, or what is decided about the alert of that name or id, as plain values.

    All present refusals if `what` is None. StoreError; ConfigError if there is neither.
    """
    active = rows.active_alerts()
    refusals = rows.refusals()
    if what is None:
        return [_of_refusal(refusal, active) for refusal in refusals]
    found = rows.remediations(limit=_MOST)
    meant = next((r for r in found if r.plan.id == what.upper()), None)
    alerts = {alert.identity for alert in active if incident_id(alert) == what.upper()}
    refused = [r for r in refusals if r.alert == what or (r.alert, r.alert_labels) in alerts]
    if meant is None and refused:
        return [_of_refusal(refusal, active) for refusal in refused]
    meant = meant or next((r for r in found if r.plan.alert == what or _alert_of(r) in alerts), None)
    if meant is None:
        known = ", ".join([*(r.plan.id for r in found[:10]), *sorted({a.rule for a in active})]) or "none"
        raise ConfigError([f"why {what}: no such remediation, and nothing is decided about it; try: {known}"])
    return [_explained(meant, rows, state_dir, now_ms)]


def _alert_of(r: Remediation) -> tuple[str, Labels]:
    return r.plan.alert, r.plan.alert_labels


def _explained(r: Remediation, rows: ReadStore, state_dir: Path, now_ms: int) -> Seen:
    bundle = state_dir / "bundles" / f"{r.plan.id}.tar.gz"
    return past.of_remediation(r, now_ms) | {
        "policy": r.plan.policy,
        "signals": dict(r.plan.signals),
        "considered": _considered(r.plan.considered),
        "said": [_said(audit) for audit in reversed(rows.audit(_MOST)) if _is_about(audit, r.plan.id)],
        "steps": _steps(r.plan.steps, *_reached(r), r),
        "undo": _steps(r.plan.undo, *_reached_in_undo(r), r),
        "verify_for_ms": r.plan.verify_for_ms,
        "bundle": str(bundle) if bundle.exists() else None,
    }


def _of_refusal(refusal: Refusal, active: Iterable[Alert]) -> Seen:
    alert = next((a for a in active if a.identity == (refusal.alert, refusal.alert_labels)), None)
    signals = {"value": f"{alert.value:.6g}", **alert.annotations} if alert else {}
    return {
        "id": None,
        "server": refusal.server,
        "alert": refusal.alert,
        "labels": dict(refusal.alert_labels),
        "refusal": refusal.code,
        "facts": dict(refusal.facts),
        "actions": list(refusal.steps),
        "signals": {name: signals[name] for name in ("value", "summary") if name in signals},
        "considered": _considered(refusal.considered),
    }


def _considered(found: Iterable[Considered]) -> list[Seen]:
    return [{"option": one.option, "code": one.code, "facts": dict(one.facts)} for one in found]


def _is_about(audit: Audit, remediation_id: str) -> bool:
    return audit.what in _WORDS and audit.facts.get("remediation") == remediation_id


def _said(audit: Audit) -> Seen:
    return {"at_ms": audit.at_ms, "by": audit.who, "word": audit.what}


def _reached(r: Remediation) -> tuple[int, str]:
    """How many of the plan's steps are done, and what became of the next; -1 where no row tells."""
    names = [step.action for step in r.plan.steps]
    if r.phase is Phase.APPLYING:
        return r.step_index, "under_way"
    if r.phase in {Phase.VERIFYING, Phase.SUCCEEDED}:
        return len(names), ""
    if r.facts.get("step") in names:
        return names.index(r.facts["step"]), "failed"
    if r.phase not in _AFTER_A_FAILURE:
        return r.step_index, ""
    return (-1 if r.outcome in _CALLED_OFF else len(names)), ""


def _reached_in_undo(r: Remediation) -> tuple[int, str]:
    if r.phase is Phase.ROLLING_BACK:
        return r.step_index, "under_way"
    if r.phase is Phase.ROLLED_BACK:
        return len(r.plan.undo), ""
    names = [step.action for step in r.plan.undo]
    return (names.index(r.facts["undo_step"]), "failed") if r.facts.get("undo_step") in names else (0, "")


def _steps(steps: Iterable[Step], done: int, present: str, r: Remediation) -> list[Seen]:
    """Each step with its state: done, under_way, failed, open, or unknown."""
    found = []
    for place, step in enumerate(steps):
        state = "unknown" if done < 0 else "done" if place < done else "open"
        if place == done and present:
            state = present
        since_ms = r.since_ms if state == "under_way" else None
        found.append({**dataclasses.asdict(step), "state": state, "since_ms": since_ms})
    return found


def render(found: Iterable[Seen], lang: str) -> str:
    """For each a headline, and below it a label and a value on each line."""
    return "\n\n".join(past.printable(_lines(one, lang)) for one in found)


def _lines(one: Seen, lang: str) -> Iterator[str]:
    if one["id"] is None:
        yield f"{one['alert']}  {one['server']}".rstrip()
        table = [*_refused_rows(one, lang), *_seen_rows(one, lang)]
    else:
        yield f"{one['id']}  {past.headline(one, lang)}"
        table = [*past.circumstances(one, lang), *_seen_rows(one, lang), *_course_rows(one, lang)]
    for line in aligned(_once(table)):
        yield f"  {line}"


def _once(table: Iterable[Row]) -> list[Row]:
    """The rows; a label that stands above already is left out."""
    rows = list(table)
    return [
        (label if not i or rows[i - 1][0] != label else "", value) for i, (label, value) in enumerate(rows)
    ]


def _refused_rows(one: Seen, lang: str) -> Iterator[Row]:
    yield label("not_done", lang), past.done(one, lang) or "-"
    yield label("because", lang), words(one["refusal"], lang, **one["facts"])


def _seen_rows(one: Seen, lang: str) -> Iterator[Row]:
    """The alert, what else was seen, what was considered, and the blockers that were asked."""
    yield label("alert", lang), one["alert"] + str(Labels(one["labels"].items()).without("alertname") or "")
    for name, value in one["signals"].items():
        yield label("seen", lang), _signal(name, value, lang)
    options = [each for each in one["considered"] if not each["option"].startswith(_BLOCKER)]
    blockers = [each for each in one["considered"] if each["option"].startswith(_BLOCKER)]
    for each in options:
        yield label("considered", lang), f"{each['option']}: {_judged(each, lang)}"
    passed = ", ".join(each["option"].removeprefix(_BLOCKER) for each in blockers if each["code"] == "passed")
    if passed:
        yield label("passed", lang), passed


def _judged(considered: Mapping[str, Any], lang: str) -> str:
    """The code in words, with the figures of an option that has no words for them."""
    facts = considered["facts"]
    told = words(considered["code"], lang, **facts)
    if told != words(considered["code"], lang):
        return told  # its words hold its figures
    figures = ", ".join(f"{name} {value}" for name, value in facts.items())
    return f"{told} ({figures})" if figures else told


def _signal(name: str, value: str, lang: str) -> str:
    """`81604378624` of `free_bytes:GPU-0` with its unit; what is no number stands as it is."""
    base, _, of = name.partition(":")
    unit = units.unit_of_metric(base)
    with contextlib.suppress(ValueError):
        value = units.human(float(value), unit) if unit else value
    return " ".join(part for part in (words(f"signal.{base}", lang), of, value) if part)


def _course_rows(one: Seen, lang: str) -> Iterator[Row]:
    """What people said of it, each step, what is done to take it back, the proof and the cost."""
    for said in one["said"]:
        word = words(f"said.{said['word']}", lang)
        yield label("said", lang), f"{word} {said['by']} {local(said['at_ms'])}"
    for name in ("steps", "undo"):
        for step in one[name]:
            yield label(name, lang), _step(step, lang)
    yield label("verified_for", lang), duration(one["verify_for_ms"], lang)
    yield from past.costs(one, lang)
    if one["bundle"]:
        yield label("bundle", lang), one["bundle"]


def _step(step: Mapping[str, Any], lang: str) -> str:
    args = ", ".join(f"{name} {value}" for name, value in step["args"].items())
    since = "" if step["since_ms"] is None else f" {local(step['since_ms'])}"
    within = f"{label('within', lang)} {duration(step['within_ms'], lang)}"
    name = words(f"step.{step['action']}", lang) + (f" ({args})" if args else "")
    state = words(f"step_state.{step['state']}", lang)
    return f"{name}: {state}{since}, {within}"
