"""Makes a message's words out of the catalogue, English or Chinese; never how a channel draws them.

Rule 1: the title alone tells state, host, GPU or server, and the fact: it is what a phone shows.
Rule 2: the lines answer what it is, what gpuwatch does or why it does not, and what to run next.
Rule 3: a dry run says the same words, marked.
"""

from __future__ import annotations

import enum
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from gpuwatch.notify.catalogue import CATALOGUE

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import tzinfo

    from gpuwatch.notify.message import Decision, Message

FIELDS_MAX: Final = 10  # a person reads no more, and Slack draws no more
_DURATION_UNITS: Final = (
    (86_400_000, " d", " 天"),
    (3_600_000, " h", " 小时"),
    (60_000, " m", " 分"),
    (1000, " s", " 秒"),
)
_FACT_UNIT_MS: Final = {"left": 1, "age": 1, "per": 1, "seconds": 1000, "minutes": 60_000}
_INSTANTS: Final = frozenset({"until", "since"})
_FIGURE: Final = re.compile(r"\d{1,13}(\.\d+)?")  # more digits are no instant that a calendar knows
# Labels that the title and the named fields say already, or that only machines read.
_SAID: Final = frozenset({"alertname", "severity", "remediation", "server", "gpu"})
_ENDED: Final = frozenset({"resolved", "succeeded", "failed", "aborted"})


class Tone(enum.StrEnum):
    """What state a message tells of; its value is the sign that opens the title."""

    FIRING = "🔴"
    WAITING = "🟡"
    FIXING = "🟠"
    FIXED = "🟢"
    FAILED = "🟣"
    STOPPED = "⚪"
    RESOLVED = "✅"


_TONES: Final = {
    "firing": Tone.FIRING,
    "resolved": Tone.RESOLVED,
    "planned": Tone.FIXING,
    "awaiting_approval": Tone.WAITING,
    "applying": Tone.FIXING,
    "verifying": Tone.FIXING,
    "succeeded": Tone.FIXED,
    "rolling_back": Tone.FAILED,
    "rolled_back": Tone.FAILED,
    "failed": Tone.FAILED,
    "aborted": Tone.STOPPED,
    "dry_run": Tone.STOPPED,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A message in words. Only backticks are markup, which every channel we know can draw."""

    title: str
    lines: tuple[str, ...]
    fields: tuple[tuple[str, str], ...]
    footer: str
    tone: Tone


def words(code: str, lang: str, /, **facts: str) -> str:
    """The phrase for `code` in `lang` ("en", "zh") with human figures; the code itself if unknown.

    Figures are made human by the name of their fact: `left`, `age`, `per` and `*_ms` are
    milliseconds, `seconds`, `minutes` what they say, `until`, `since` and `*_at` epoch milliseconds,
    `*_bytes` bytes. Any value that is no number stands as it is.
    """
    phrase = CATALOGUE.get(code)
    if phrase is None:
        return code.rpartition(".")[2] or code
    template = phrase.zh if lang == "zh" else phrase.en
    human = {name: _human(name, value, lang) for name, value in facts.items()}
    return template.format_map(defaultdict(lambda: "?", human))


def duration(ms: float, lang: str) -> str:
    """The two largest units that count: `14 m 20 s`, `2 h 5 m`, `400 ms`."""
    left = max(0, int(ms))
    if left < 1000:
        return f"{left} 毫秒" if lang == "zh" else f"{left} ms"
    parts = []
    for unit_ms, en, zh in _DURATION_UNITS:
        count, left = divmod(left, unit_ms)
        parts.append(f"{count}{zh if lang == 'zh' else en}" if count else "")
    first = next(i for i, part in enumerate(parts) if part)
    return " ".join(part for part in parts[first : first + 2] if part)


def clock_time(at_ms: float, tz: tzinfo | None = None) -> str:
    """`10:31:05 UTC+8` in the host's time zone, or in `tz`."""
    local = datetime.fromtimestamp(at_ms / 1000, tz=UTC).astimezone(tz)
    offset = local.strftime("%z")
    hours, minutes = int(offset[:3]), offset[3:5]
    zone = f"{hours:+d}" if hours else ("" if minutes == "00" else offset[:1] + "0")
    return f"{local:%H:%M:%S} UTC{zone}" + (f":{minutes}" if minutes != "00" else "")


def needs_person(message: Message) -> bool:
    """Whether somebody should be called by name: for what gpuwatch does not heal by itself."""
    if message.state in {"awaiting_approval", "failed", "rolled_back"}:
        return True
    decision = message.decision
    healing = decision is not None and decision.code == "plan" and decision.mode == "auto"
    return message.state == "firing" and message.severity == "critical" and not healing


def compose(message: Message, lang: str) -> Text:
    """The message in "en" or "zh"; times in the host's time zone."""
    return Text(
        title=" ".join(_title(message, lang).split()),
        lines=tuple(_lines(message, lang)),
        fields=tuple(_fields(message, lang))[:FIELDS_MAX],
        footer=f"gpuwatch · {message.id} · {clock_time(message.at_ms)}",
        tone=_TONES[_ending(message)],
    )


def refused(decision: Decision, server: str, lang: str) -> str:
    """What would be done and why it is not, or why nothing is; for messages and for `gpuwatch status`."""
    why = words(decision.code, lang, **decision.facts)
    code = "did.refused" if decision.steps else "did.nothing"
    return words(code, lang, why=why, **_said(decision, server, lang))


def _human(name: str, value: str, lang: str) -> str:
    if not _FIGURE.fullmatch(value):
        return value
    if name in _INSTANTS or name.endswith("_at"):
        return clock_time(float(value))
    if name in _FACT_UNIT_MS or name.endswith("_ms"):
        return duration(float(value) * _FACT_UNIT_MS.get(name, 1), lang)
    if name.endswith("_bytes"):
        return f"{float(value) / 2**30:.1f} GiB"
    return value


def _title(message: Message, lang: str) -> str:
    place, dry = _place(message), ""
    if message.state == "firing":
        badge, fact = words(f"severity.{message.severity}", lang), _summary(message, lang)
        # The summary of a shipped rule names its GPU or server; one that does not is helped.
        place = "" if _names(fact, message) else place
    else:
        badge, fact = words(f"badge.{_ending(message)}", lang), _fact(message, lang)
        dry = "" if _ending(message) == "dry_run" else _dry(message.decision, lang)
    head = f"{_TONES[_ending(message)].value} [{badge}] {message.host}"
    return " · ".join(part for part in (head, place, fact) if part) + dry


def _ending(message: Message) -> str:
    """The state; but a dry run that came to its end has fixed nothing and must not say so."""
    return "dry_run" if message.outcome_code == "dry_run" else message.state


def _fact(message: Message, lang: str) -> str:
    lasted = duration(message.at_ms - message.since_ms, lang)
    outcome = words(message.outcome_code, lang, **message.outcome_facts)
    steps = _steps(message.decision, lang) or words("field.remediation", lang)
    return words(
        f"fact.{_ending(message)}",
        lang,
        alert=message.alert,
        lasted=lasted,
        steps=steps,
        outcome=outcome or words(f"remediation.{message.state}", lang),
    )


def _names(fact: str, message: Message) -> bool:
    gpu, server = message.labels.get("gpu"), message.server or message.labels.get("server")
    found = [rf"GPU\s?{re.escape(gpu)}"] if gpu else []
    found += [re.escape(server)] if server else []
    return any(re.search(rf"(?<![\w.-]){name}(?![\w-])", fact, re.ASCII) for name in found)


def _place(message: Message) -> str:
    gpu, server = message.labels.get("gpu"), message.server or message.labels.get("server")
    return " · ".join(part for part in (server, f"GPU {gpu}" if gpu else "") if part)


def _lines(message: Message, lang: str) -> Iterator[str]:
    """What it is, what is done, what to do next."""
    if message.state == "firing":
        yield from _firing_lines(message, lang)
    elif message.state == "resolved":
        yield words("it_was", lang, summary=_summary(message, lang))
    else:
        yield words("because", lang, cause=": ".join(dict.fromkeys((message.alert, _summary(message, lang)))))
    if message.state == "planned":
        yield _decided(message, lang)
    if _asks(message):
        remediation_id = message.decision.remediation_id if message.decision else ""
        yield words("next.approve", lang, id=remediation_id or message.id)
    elif message.state not in {"resolved", "succeeded"}:
        yield words("next.status", lang)


def _firing_lines(message: Message, lang: str) -> Iterator[str]:
    if description := _annotation(message, "description", lang):
        yield description
    yield _decided(message, lang)
    if runbook := _annotation(message, "runbook", lang):
        yield words("runbook", lang, text=runbook)


def _asks(message: Message) -> bool:
    decision = message.decision
    planned = decision is not None and decision.code == "plan" and decision.mode == "approve"
    return message.state == "awaiting_approval" or (message.state == "firing" and planned)


def _decided(message: Message, lang: str) -> str:
    decision = message.decision
    if decision is None:
        return words("did.undecided", lang)
    if decision.code != "plan":
        return refused(decision, message.server, lang)
    code = "did.ask" if decision.mode == "approve" else "did.plan"
    return words(code, lang, **_said(decision, message.server, lang))


def _said(decision: Decision, server: str, lang: str) -> dict[str, str]:
    return {"steps": _steps(decision, lang), "server": server, "dry": _dry(decision, lang)}


def _steps(decision: Decision | None, lang: str) -> str:
    steps = decision.steps if decision else ()
    return words("join.steps", lang).join(words(f"step.{step}", lang) for step in steps)


def _dry(decision: Decision | None, lang: str) -> str:
    return words("suffix.dry_run", lang) if decision and decision.dry_run else ""


def _fields(message: Message, lang: str) -> Iterator[tuple[str, str]]:
    yield words("field.alert", lang), message.alert
    if server := message.server or message.labels.get("server"):
        yield words("field.server", lang), server
    if gpu := message.labels.get("gpu"):
        yield "GPU", gpu
    if message.value is not None and math.isfinite(message.value) and message.state == "firing":
        yield words("field.value", lang), f"{message.value:.6g}"
    yield words("field.since", lang), clock_time(message.since_ms)
    if message.state in _ENDED:
        yield words("field.lasted", lang), duration(message.at_ms - message.since_ms, lang)
    yield from _decision_fields(message, lang)
    for name, value in message.labels.items():
        if name not in _SAID:
            yield name, _human(name, value, lang)


def _decision_fields(message: Message, lang: str) -> Iterator[tuple[str, str]]:
    decision = message.decision
    if decision and decision.mode:
        yield words("field.mode", lang), words(f"mode.{decision.mode}", lang)
    if decision and decision.remediation_id:
        yield words("field.remediation", lang), decision.remediation_id
    if _asks(message) and decision and (cost := _cost(decision, lang)):
        yield words("field.cost", lang), cost


def _cost(decision: Decision, lang: str) -> str:
    """What whoever approves pays for it."""
    names = (f"cost.{step}" for step in decision.steps)
    return words("join.costs", lang).join(words(name, lang) for name in names if name in CATALOGUE)


def _summary(message: Message, lang: str) -> str:
    return _annotation(message, "summary", lang) or message.alert


def _annotation(message: Message, name: str, lang: str) -> str:
    local = message.annotations.get(f"{name}_{lang}", "")
    return local or message.annotations.get(name, "")
