"""What `gpuwatch why` shows: how something was decided and what came of it, gathered from rows alone.

A code without words stands as it is. Names that others chose never command the terminal.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any, Final

from gpuwatch.cli import past, units
from gpuwatch.cli.answers import aligned, local
from gpuwatch.cli.capture import redactor
from gpuwatch.cli.past import label
from gpuwatch.errors import ConfigError
from gpuwatch.notify import duration, incident_id, words
from gpuwatch.records import Labels, Phase
from gpuwatch.remediation.steps import present, undo_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from gpuwatch.cli.past import Row, Seen
    from gpuwatch.records import Alert, Considered, Refusal, Remediation, Step
    from gpuwatch.store import Audit, ReadStore

_MOST: Final = 1_000
_WORDS: Final = frozenset({"approve", "deny", "abort"})
_BLOCKER: Final = "blocker:"
_OF_ALERTS: Final = ("value", "summary", "summary_zh")
_TAKEN_BACK: Final = frozenset({Phase.ROLLING_BACK, Phase.ROLLED_BACK, Phase.FAILED, Phase.ABORTED})


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
        "steps": _steps(r, r.plan.steps, is_undo=False),
        "undo": _steps(r, _undo(r), is_undo=True),
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
        "signals": {name: signals[name] for name in _OF_ALERTS if name in signals},
        "considered": _considered(refusal.considered),
    }


def _considered(found: Iterable[Considered]) -> list[Seen]:
    return [{"option": one.option, "code": one.code, "facts": dict(one.facts)} for one in found]


def _is_about(audit: Audit, remediation_id: str) -> bool:
    return audit.what in _WORDS and audit.facts.get("remediation") == remediation_id


def _said(audit: Audit) -> Seen:
    return {"at_ms": audit.at_ms, "by": audit.who, "word": audit.what}


def _steps(r: Remediation, steps: Iterable[Step], *, is_undo: bool) -> list[Seen]:
    """Each step with its state: how it ended, `under_way`, `open`, or `unknown` where no row tells."""
    over = [each for each in r.course if each.is_undo is is_undo]
    known = [_state(str(each.end), each.began_at_ms, each.ended_at_ms, each.detail) for each in over]
    if present(r) is not None and is_undo is (r.phase is Phase.ROLLING_BACK):
        known.append(_state("under_way", r.since_ms))
    is_kept = r.asked_at_ms is None or bool(r.course) or r.phase is Phase.APPLYING
    rest = _state("open" if is_kept else "unknown")
    hide = redactor(())  # an operator's own command may hold a secret
    return [
        {
            **dataclasses.asdict(step),
            "args": {name: hide(value) for name, value in step.args.items()},
            **(known[place] if place < len(known) else rest),
        }
        for place, step in enumerate(steps)
    ]


def _undo(r: Remediation) -> tuple[Step, ...]:
    """What was taken back, or would be."""
    return undo_of(r) if r.phase in _TAKEN_BACK else r.plan.undo


def _state(name: str, began_ms: int | None = None, ended_ms: int | None = None, detail: str = "") -> Seen:
    return {"state": name, "began_at_ms": began_ms, "ended_at_ms": ended_ms, "detail": detail}


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
    signals = dict(_in_one_language(one["signals"], lang))
    if one["alert"]:
        labels = str(Labels(one["labels"].items()).without("alertname") or "")
        yield label("alert", lang), one["alert"] + labels
    else:
        signals.pop("why", None)  # stands above, as the cause
    for name, value in signals.items():
        yield label("seen", lang), _signal(name, value, lang)
    options = [each for each in one["considered"] if not each["option"].startswith(_BLOCKER)]
    blockers = [each for each in one["considered"] if each["option"].startswith(_BLOCKER)]
    for each in options:
        option = words(f"option.{each['option']}", lang)
        yield label("considered", lang), f"{option}: {_judged(each, lang)}"
    passed = ", ".join(each["option"].removeprefix(_BLOCKER) for each in blockers if each["code"] == "passed")
    if passed:
        yield label("passed", lang), passed


def _judged(considered: Mapping[str, Any], lang: str) -> str:
    """The code in words, with the figures of an option that has no words for them."""
    facts = considered["facts"]
    told = words(considered["code"], lang, **facts)
    if told != words(considered["code"], lang):
        return told  # its words hold its figures
    figures = _figures(facts, lang)
    return f"{told} ({figures})" if figures else told


def _figures(given: Mapping[str, str], lang: str) -> str:
    """`from 256, to 128`; what has no words stands with its name."""
    found = []
    for name, value in given.items():
        told = words(f"arg.{name}", lang, **{name: value})
        found.append(f"{name} {value}" if told == name else told)
    return ", ".join(found)


def _in_one_language(signals: Mapping[str, str], lang: str) -> dict[str, str]:
    """The signals with the summary of that language, if it has one."""
    kept = {name: value for name, value in signals.items() if not name.startswith("summary_")}
    translated = signals.get(f"summary_{lang}")
    return {**kept, "summary": translated} if translated else kept


def _signal(name: str, value: str, lang: str) -> str:
    """`81604378624` of `free_bytes:GPU-0` with its unit, a fraction in six digits; words as they are."""
    base, _, of = name.partition(":")
    unit = units.unit_of_metric(base)
    with contextlib.suppress(ValueError):
        if unit:
            value = units.human(float(value), unit)
        elif "." in value:
            value = f"{float(value):.6g}"
    return " ".join(part for part in (words(f"signal.{base}", lang), of, value) if part)


def _course_rows(one: Seen, lang: str) -> Iterator[Row]:
    """What people said of it, each step, what is done to take it back, the proof and the cost."""
    for said in one["said"]:
        word = words(f"said.{said['word']}", lang)
        yield label("said", lang), f"{word} {said['by']} {local(said['at_ms'])}"
    yield from _walk_rows(one, lang)
    yield label("verified_for", lang), duration(one["verify_for_ms"], lang)
    yield from past.costs(one, lang)
    if one["bundle"]:
        yield label("bundle", lang), one["bundle"]


def _walk_rows(one: Seen, lang: str) -> Iterator[Row]:
    """A table of the steps, those of the undo last."""
    heads = [label(name, lang) for name in ("action", "began", "took", "within", "end")]
    lines = aligned([heads, *(_step(step, lang) for step in (*one["steps"], *one["undo"]))])
    names = ["steps", *("steps" for _ in one["steps"]), *("undo" for _ in one["undo"])]
    yield from ((label(name, lang), line) for name, line in zip(names, lines, strict=True))


def _step(step: Mapping[str, Any], lang: str) -> tuple[str, ...]:
    """Its name with its arguments, when it began, how long it took and may take, and how it ended."""
    args = _figures(step["args"], lang)
    began_ms, ended_ms = step["began_at_ms"], step["ended_at_ms"]
    state = words(f"step_state.{step['state']}", lang)
    return (
        words(f"step.{step['action']}", lang) + (f" ({args})" if args else ""),
        "-" if began_ms is None else local(began_ms),
        "-" if ended_ms is None else duration(ended_ms - began_ms, lang),
        duration(step["within_ms"], lang),
        f"{state}: {step['detail']}" if step["detail"] else state,
    )
