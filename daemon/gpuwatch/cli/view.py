"""What `gpuwatch status` and `gpuwatch alerts` show: gathered from rows, so also while the daemon is down."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Any, Final

from gpuwatch import notify
from gpuwatch.records import LIVE_PHASES, AlertState, Labels, Refusal, Remediation
from gpuwatch.remediation import present

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from gpuwatch.config import Settings
    from gpuwatch.store import ReadStore

Seen = dict[str, Any]

_RUNNING_WITHIN_MS: Final = 15_000
_LOOKBACK_MS: Final = 300_000
_GIB: Final = 1 << 30
_GPU_FIGURES: Final = (
    "gpu_memory_used_bytes",
    "gpu_memory_total_bytes",
    "gpu_memory_free_bytes",
    "gpu_memory_reserved_bytes",
    "gpu_utilization_ratio",
    "gpu_temperature_celsius",
    "gpu_temperature_margin_celsius",
    "gpu_power_draw_watts",
    "gpu_power_limit_watts",
)
_SERVER_FIGURES: Final = {
    "requests_running": "vllm:num_requests_running",
    "requests_waiting": "vllm:num_requests_waiting",
    "kv_cache_usage_ratio": "vllm:kv_cache_usage_perc",
    "preemptions": "vllm:num_preemptions_total",
}


def gather(view: ReadStore, settings: Settings, now_ms: int) -> Seen:
    """Everything `status` shows, as plain values; StoreError."""
    written_ms = view.last_tick_ms() or 0
    running = 0 <= now_ms - written_ms <= _RUNNING_WITHIN_MS
    latest = view.latest(written_ms, _LOOKBACK_MS)
    rows = view.settings()
    refusals = view.refusals()
    paused_ms = int(rows.get("paused_until_ms", "0"))
    remediations = view.remediations(limit=5)
    return {
        "host": settings.host,
        "running": running,
        "at_ms": written_ms,
        "age_ms": now_ms - written_ms,
        "mode": str(settings.remediation.mode),
        "paused_until_ms": paused_ms if paused_ms > (now_ms if running else written_ms) else None,
        "gpus": _gpus(latest),
        "servers": [_server(state, latest, written_ms) for state in view.servers().values()],
        "alerts": [_alert(a, refusals, remediations) for a in view.active_alerts()],
        "wishes": [_refusal(r) for r in refusals if not r.alert],
        "remediations": [_remediation(r) for r in remediations],
        "unsent": view.unsent_count(),
    }


def gather_alerts(view: ReadStore, limit: int) -> Seen:
    """Active alerts and the last changes of state."""
    return {
        "active": [_alert(a, view.refusals(), []) for a in view.active_alerts()],
        "changes": [
            {
                "at_ms": t.at_ms,
                "alert": t.alert.rule,
                "state": str(t.now or "inactive"),
                "labels": dict(t.alert.labels),
            }
            for _, t in reversed(view.transitions(limit=limit))
        ],
    }


def render(seen: Seen, lang: str) -> str:
    """A table that a person likes to read."""
    blocks = [
        _headline(seen, lang),
        _table(
            ("GPU", "NAME", "USED / TOTAL", "FREE", "UTIL", "TEMP", "MARGIN", "POWER"),
            [_gpu_row(gpu) for gpu in seen["gpus"]],
        )
        or "no GPU has been read",
        _table(
            ("SERVER", "STATE", "SINCE", "RUNNING", "WAITING", "KV CACHE", "PREEMPTED"),
            [_server_row(s, lang) for s in seen["servers"]],
        )
        or "no server is configured",
        _alerts_block(seen, lang),
        _wishes_block(seen, lang),
        _remediations_block(seen, lang),
    ]
    return "\n\n".join(block for block in blocks if block)


def render_alerts(seen: Seen) -> str:
    """Active alerts, then the last changes, newest first."""
    active = _table(
        ("STATE", "SEVERITY", "ALERT", "LABELS", "SINCE"),
        [
            (a["state"], a["severity"], a["alert"], _shown_labels(a["labels"]), _clock(a["active_at_ms"]))
            for a in seen["active"]
        ],
    )
    changes = _table(
        ("AT", "STATE", "ALERT", "LABELS"),
        [(_clock(c["at_ms"]), c["state"], c["alert"], _shown_labels(c["labels"])) for c in seen["changes"]],
    )
    return f"{active or 'no alert is active'}\n\n{changes or 'nothing has changed yet'}"


def _gpus(latest: dict[Labels, float]) -> list[Seen]:
    gpus: dict[str, Seen] = {}
    for labels, value in latest.items():
        if labels.metric in _GPU_FIGURES:
            gpu = gpus.setdefault(labels.get("uuid"), {"gpu": labels.get("gpu"), "uuid": labels.get("uuid")})
            gpu[labels.metric.removeprefix("gpu_")] = value
    for labels, value in latest.items():
        if labels.metric == "gpu_info" and labels.get("uuid") in gpus:
            gpus[labels.get("uuid")] |= {"name": labels.get("name")}
        if labels.metric == "up" and labels.get("uuid"):
            gpu = gpus.setdefault(labels.get("uuid"), {"gpu": labels.get("gpu"), "uuid": labels.get("uuid")})
            gpu["up"] = bool(value)
    return sorted(gpus.values(), key=lambda gpu: (len(gpu["gpu"]), gpu["gpu"]))


def _server(state: Any, latest: dict[Labels, float], at_ms: int) -> Seen:  # noqa: ANN401 (a ServerState)
    own = {labels.metric: 0.0 for labels in latest if labels.get("server") == state.name}
    for labels, value in latest.items():
        if labels.get("server") == state.name:
            own[labels.metric] += value
    figures = {name: own[metric] for name, metric in _SERVER_FIGURES.items() if metric in own}
    return {
        "name": state.name,
        "phase": str(state.phase),
        "reason": state.reason,
        "since_ms": state.since_ms,
        "for_ms": at_ms - state.since_ms,
        "supervisor": str(state.supervisor.phase),
        "starting_since_ms": state.starting_since_ms,
        **figures,
    }


def _alert(alert: Any, refusals: Sequence[Refusal], remediations: Iterable[Remediation]) -> Seen:  # noqa: ANN401
    why = [r for r in refusals if (r.alert, r.alert_labels) == (alert.rule, alert.labels)]
    by = [r for r in remediations if (r.plan.alert, r.plan.alert_labels) == (alert.rule, alert.labels)]
    return {
        "alert": alert.rule,
        "state": str(alert.state),
        "severity": alert.labels.get("severity"),
        "labels": dict(alert.labels),
        "value": alert.value,
        "active_at_ms": alert.active_at_ms,
        "fired_at_ms": alert.fired_at_ms,
        "summary": alert.annotations.get("summary", ""),
        "annotations": dict(alert.annotations),
        "refusal": _refusal(why[0]) if why else None,
        "remediation": by[0].plan.id if by else None,
    }


def _refusal(r: Refusal) -> Seen:
    return {"code": r.code, "facts": dict(r.facts), "steps": list(r.steps), "server": r.server}


def _remediation(r: Remediation) -> Seen:
    step = present(r)
    return {
        "id": r.plan.id,
        "server": r.plan.server,
        "alert": r.plan.alert,
        "steps": list(r.plan.actions or (step.action for step in r.plan.steps)),
        "step": step.action if step else None,
        "phase": str(r.phase),
        "live": r.phase in LIVE_PHASES,
        "since_ms": r.since_ms,
        "created_at_ms": r.created_at_ms,
        "dry_run": r.plan.dry_run,
        "outcome": r.outcome,
        "facts": dict(r.facts),
    }


def _headline(seen: Seen, lang: str) -> str:
    at = _clock(seen["at_ms"])
    if seen["running"]:
        state = f"running, last look {at}"
    else:
        state = f"NOT RUNNING; this is how things stood at {at}, {notify.duration(seen['age_ms'], lang)} ago"
    paused = "" if seen["paused_until_ms"] is None else " · remediation is PAUSED (gpuwatch resume)"
    return f"gpuwatch on {seen['host']} · {state} · mode {seen['mode']}{paused}"


def _gpu_row(gpu: Seen) -> tuple[str, ...]:
    name = gpu.get("name") or gpu["uuid"]
    if not gpu.get("up", True):
        return (gpu["gpu"], name, "LOST", "", "", "", "", "")
    power, limit = (_figure(gpu.get(f"power_{what}_watts"), "{:.0f}") for what in ("draw", "limit"))
    return (
        gpu["gpu"],
        name,
        f"{_gib(gpu.get('memory_used_bytes'))} / {_gib(gpu.get('memory_total_bytes'))} GiB",
        f"{_gib(gpu.get('memory_free_bytes'))} GiB",
        _figure(gpu.get("utilization_ratio"), "{:.0%}"),
        _figure(gpu.get("temperature_celsius"), "{:.0f} °C"),
        _figure(gpu.get("temperature_margin_celsius"), "{:.0f} °C"),
        f"{power} / {limit} W",
    )


def _server_row(server: Seen, lang: str) -> tuple[str, ...]:
    serving = server["phase"] == "serving"
    figure: Callable[[str, str], str] = lambda key, form: _figure(server.get(key), form) if serving else "-"  # noqa: E731
    return (
        server["name"],
        server["phase"].upper() if server["phase"] == "down" else server["phase"],
        f"{_clock(server['since_ms'])} ({notify.duration(server['for_ms'], lang)})",
        figure("requests_running", "{:.0f}"),
        figure("requests_waiting", "{:.0f}"),
        figure("kv_cache_usage_ratio", "{:.0%}"),
        figure("preemptions", "{:.0f}"),
    )


def _alerts_block(seen: Seen, lang: str) -> str:
    firing = [a for a in seen["alerts"] if a["state"] == AlertState.FIRING]
    if not firing:
        return "no alert is firing"
    lines = ["FIRING"]
    for alert in firing:
        summary = alert["annotations"].get(f"summary_{lang}") or alert["summary"]
        lines.append(f"  {alert['severity'].upper():9}{alert['alert']}  since {_clock(alert['fired_at_ms'])}")
        lines.append(f"           {summary or _shown_labels(alert['labels'])}")
        lines.append(f"           → {_why(alert, lang)}")
    return "\n".join(lines)


def _wishes_block(seen: Seen, lang: str) -> str:
    """What a person asked for that is not taken up, and why."""
    return "\n".join(f"WISHED\n  {_refused(wish, lang)}" for wish in seen["wishes"])


def _why(alert: Seen, lang: str) -> str:
    """What is done about it, or what would be and why it is not."""
    refusal = alert["refusal"]
    if not refusal:
        return f"remediation {alert['remediation']}" if alert["remediation"] else ""
    return _refused(refusal, lang)


def _refused(refusal: Seen, lang: str) -> str:
    decision = notify.Decision(
        code=refusal["code"],
        facts=refusal["facts"],
        steps=tuple(refusal["steps"]),
        dry_run=refusal["code"] == "observe_mode",
    )
    return notify.refused(decision, refusal["server"], lang)


def _remediations_block(seen: Seen, lang: str) -> str:
    rows = [
        (
            r["id"],
            ",".join(r["steps"]) + (" (dry run)" if r["dry_run"] else ""),
            r["server"],
            r["alert"],
            r["phase"] + (f": {notify.words('step.' + r['step'], lang)}" if r["step"] else ""),
            _clock(r["since_ms"]),
            notify.words(r["outcome"], lang, **r["facts"]) if r["outcome"] else "",
        )
        for r in seen["remediations"]
    ]
    return _table(("REMEDIATION", "STEPS", "SERVER", "ALERT", "PHASE", "AT", "OUTCOME"), rows)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """Columns as wide as their widest cell; empty without rows."""
    if not rows:
        return ""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in (head, *rows)
    )
    return "\n".join(line.rstrip() for line in lines)


def _gib(value: float | None) -> str:
    return _figure(value if value is None else value / _GIB, "{:.1f}")


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def _clock(at_ms: int) -> str:
    return dt.datetime.fromtimestamp(at_ms / 1000, tz=dt.UTC).astimezone().strftime("%H:%M:%S")


def _shown_labels(labels: dict[str, str]) -> str:
    hidden = {"alertname", "severity", "remediation", "uuid"}
    return ", ".join(f"{name}={value}" for name, value in labels.items() if name not in hidden)
