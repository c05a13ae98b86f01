"""What `gpuwatch history` shows: what was done to servers and what it cost, gathered from rows alone.

A code without words stands as it is. Names that others chose never command the terminal.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final

from gpuwatch.cli import units
from gpuwatch.cli.answers import local
from gpuwatch.cli.plot import visible
from gpuwatch.notify import duration, words
from gpuwatch.records import LIVE_PHASES, Phase
from gpuwatch.remediation.shadow import score
from gpuwatch.remediation.steps import present

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from gpuwatch.records import PastStep, Remediation
    from gpuwatch.store import ReadStore

Seen = dict[str, Any]
Row = tuple[str, str]
"""A label and a value."""

_MOST_STARTS: Final = 1_000
_MOST_TRANSITIONS: Final = 2_000
_COUNTS: Final = ("requests_finished", "requests_aborted", "requests_refused")
_PAIRS: Final = {"memory": "memory_{}_bytes", "throughput": "tokens_per_s_{}"}


def gather(rows: ReadStore, server: str | None, limit: int, now_ms: int) -> list[Seen]:
    """The remediations of a server, or of all, the newest first, as plain values; StoreError."""
    found = rows.remediations(server, limit=limit)
    shadows = _shadows(rows, [r for r in found if r.phase is Phase.REHEARSED], now_ms)
    return [of_remediation(r, now_ms) | {"left_alone": shadows.get(r.plan.id)} for r in found]


def _shadows(rows: ReadStore, rehearsed: Sequence[Remediation], now_ms: int) -> dict[str, Seen]:
    """What became of each problem that was left alone, as far as the changes of alerts go back."""
    if not rehearsed:
        return {}
    changes = [transition for _, transition in rows.transitions(limit=_MOST_TRANSITIONS)]
    from_ms = changes[0].at_ms if len(changes) == _MOST_TRANSITIONS else 0
    starts = {server: rows.starts(server, _MOST_STARTS) for server in {r.plan.server for r in rehearsed}}
    return {
        r.plan.id: dataclasses.asdict(score(r, changes, starts[r.plan.server], now_ms))
        for r in rehearsed
        if r.created_at_ms >= from_ms
    }


def of_remediation(r: Remediation, now_ms: int) -> Seen:
    """What is known of a remediation, as plain values."""
    plan, is_live, step = r.plan, r.phase in LIVE_PHASES, present(r)
    return {
        "id": plan.id,
        "created_at_ms": r.created_at_ms,
        "ended_at_ms": None if is_live else r.since_ms,
        "took_ms": max(0, (now_ms if is_live else r.since_ms) - r.created_at_ms),
        "longest_step": _longest(r.course),
        "server": plan.server,
        "actions": list(plan.actions),
        "kind": str(plan.kind),
        "alert": plan.alert,
        "why": plan.signals.get("why", ""),
        "labels": dict(plan.alert_labels),
        "by": plan.by or "gpuwatch",
        "approved_by": r.facts.get("approved_by", ""),
        "mode": str(plan.mode),
        "dry_run": plan.dry_run,
        "phase": str(r.phase),
        "since_ms": r.since_ms,
        "step": step.action if step else None,
        "outcome": r.outcome,
        "facts": dict(r.facts),
        "before": plan.before,
        "after": plan.after,
        "account": dict(r.account),
    }


def _longest(course: Iterable[PastStep]) -> Seen | None:
    """The step that took the most time, of those that are over and took any."""
    took = [(past.ended_at_ms - past.began_at_ms, past.action) for past in course]
    took_ms, action = max(took, default=(0, ""))
    return {"action": action, "took_ms": took_ms} if took_ms > 0 else None


def render(found: Iterable[Seen], lang: str) -> str:
    """For each a headline, and below it the circumstances and the cost."""
    return "\n\n".join(printable(_lines(one, lang)) for one in found)


def printable(lines: Iterable[str]) -> str:
    """The lines without what commands a terminal."""
    return "\n".join(visible(line) for line in lines)


def _lines(one: Seen, lang: str) -> Iterator[str]:
    yield f"{one['id']}  {local(one['created_at_ms'])}  {headline(one, lang)}"
    for group in (circumstances(one, lang), costs(one, lang)):
        told = " · ".join(f"{name} {value}" for name, value in group)
        if told:
            yield f"    {told}"


def headline(one: Seen, lang: str) -> str:
    """The server, what was done to it, and how that ended."""
    return "  ".join(part for part in (one["server"], done(one, lang), _ending(one, lang)) if part)


def done(one: Seen, lang: str) -> str:
    """The actions in words."""
    return words("join.steps", lang).join(words(f"step.{name}", lang) for name in one["actions"])


def _ending(one: Seen, lang: str) -> str:
    phase = words(f"remediation.{one['phase']}", lang)
    return f"{phase}: {words(one['outcome'], lang, **one['facts'])}" if one["outcome"] else phase


def circumstances(one: Seen, lang: str) -> Iterator[Row]:
    """Why, by whom, how long, between which revisions, and what became of a problem left alone."""
    if cause := one["alert"] or one["why"]:
        yield label("because", lang), " ".join(cause.split())
    yield label("by", lang), ", ".join(dict.fromkeys(x for x in (one["by"], one["approved_by"]) if x))
    yield label("mode", lang), words(f"mode.{one['mode']}", lang)
    if one["step"]:
        yield label("step", lang), present_step(one["step"], one["since_ms"], lang)
    if one["took_ms"]:
        yield label("took", lang), duration(one["took_ms"], lang)
    if longest := one["longest_step"]:
        step = words(f"step.{longest['action']}", lang)
        yield label("longest", lang), f"{step} {duration(longest['took_ms'], lang)}"
    if one["before"] is not None or one["after"] is not None:
        yield label("revision", lang), _arrow(_shown(one["before"]), _shown(one["after"]))
    if left := one.get("left_alone"):
        after_ms = left["cleared_after_ms"]
        lasted = "" if after_ms is None else f" ({duration(after_ms, lang)})"
        yield label("left_alone", lang), words(f"shadow.{left['by']}", lang) + lasted


def present_step(step: str, since_ms: int, lang: str) -> str:
    """A step that is under way, and since when."""
    return f"{words(f'step.{step}', lang)} ({words('cli.since', lang, since=str(since_ms))})"


def costs(one: Seen, lang: str) -> Iterator[Row]:
    """What the account knows."""
    account = one["account"]
    if "seconds_without_service" in account:
        without_ms = 1000 * account["seconds_without_service"]
        yield label("without_service", lang), duration(without_ms, lang) if without_ms else "0"
    for name in _COUNTS:
        if name in account:
            yield label(name, lang), units.number(account[name])
    for name, form in _PAIRS.items():
        pair = [account.get(form.format(when)) for when in ("before", "after")]
        if pair != [None, None]:
            yield label(name, lang), _arrow(*(_figure(name, value) for value in pair))


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return "?"
    return units.human(value, "bytes") if name == "memory" else f"{units.number(value)}/s"


def label(name: str, lang: str) -> str:
    """What stands before a value."""
    return words(f"history.{name}", lang)


def _arrow(before: str, after: str) -> str:
    return f"{before} → {after}"


def _shown(value: object) -> str:
    return "?" if value is None else str(value)
