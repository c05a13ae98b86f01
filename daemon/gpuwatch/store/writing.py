"""What one tick changes, and how it is written; never opens a transaction of its own.

Rule: whatever is written twice is as if it were written once, because a commit whose answer was lost is
written again.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import bindparam, delete, insert, or_, text

from gpuwatch.records import (
    LIVE_PHASES,
    Alert,
    Notification,
    Refusal,
    Remediation,
    Revision,
    ServerStart,
    ServerState,
    StartOutcome,
    Transition,
)
from gpuwatch.store.codec import clean, labels_json, to_json
from gpuwatch.store.schema import (
    ALERT,
    AUDIT,
    NOTIFICATION,
    RECEIVER,
    REFUSAL,
    REMEDIATION,
    REVISION,
    SERVER,
    SETTING,
    START,
    TRANSITION,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy import Connection, Executable, TableClause

Columns = dict[str, Any]

_KEPT_ANNOTATIONS: Final = ("summary",)
_IN_HISTORY_TOO: Final = ("labels", "value", "host", "since_ms")
_SERIAL: Final = frozenset({(TRANSITION, "id"), (NOTIFICATION, "seq"), (REFUSAL, "id"), (AUDIT, "id")})


@dataclass(frozen=True, slots=True, kw_only=True)
class Audit:
    """That a person asked for something: `what` as the command is called, `facts` what it was given."""

    at_ms: int
    who: str
    what: str
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """All that one tick changes beside its samples: saved whole or not at all.

    `alerts` (pending, firing), `servers`, `starts`, `remediations`, `notifications` and `receivers`
    change the row of the same identity, or add it. `ended` alerts leave the active ones. `transitions`
    and `revisions` are added to the history. `refusals` replace the present ones unless None. `receivers`
    are the JSON of a delivery state by name. A setting of None is deleted. `audit` is added to what is there.
    """

    alerts: Sequence[Alert] = ()
    ended: Sequence[Alert] = ()
    transitions: Sequence[Transition] = ()
    servers: Sequence[ServerState] = ()
    remediations: Sequence[Remediation] = ()
    notifications: Sequence[Notification] = ()
    receivers: Mapping[str, str] = field(default_factory=dict)
    refusals: Sequence[Refusal] | None = None
    settings: Mapping[str, str | None] = field(default_factory=dict)
    audit: Sequence[Audit] = ()
    starts: Sequence[ServerStart] = ()
    revisions: Sequence[Revision] = ()


def _columns(table: TableClause) -> list[str]:
    """Those that a writer fills in; the database counts the others up."""
    return [c.name for c in table.c if (table, c.name) not in _SERIAL]


def upsert(table: TableClause, *key: str) -> Executable:
    """Insert, or change the row that has this key in place: its number, and so its order, stays."""
    changed = ", ".join(f"{name} = excluded.{name}" for name in _columns(table) if name not in key)
    return _insert(table, f"({', '.join(key)}) DO UPDATE SET {changed}")


def add(table: TableClause) -> Executable:
    """Insert, unless the row is there already."""
    return _insert(table, "DO NOTHING")


def _insert(table: TableClause, on_conflict: str) -> Executable:
    # As text, because it is the same for every database and SQLAlchemy's constructs are not.
    names = _columns(table)
    values = ", ".join(f":{name}" for name in names)
    return text(f"INSERT INTO {table.name} ({', '.join(names)}) VALUES ({values}) ON CONFLICT {on_conflict}")


def alert_key(alert: Alert) -> Columns:
    """What tells an alert from every other."""
    return {"rule": alert.rule, "labels": labels_json(alert.labels)}


def alert_row(alert: Alert) -> Columns:
    """The row of an active alert."""
    return {
        **alert_key(alert),
        "state": alert.state.value,
        "active_at_ms": alert.active_at_ms,
        "record": to_json(alert),
    }


def transition_row(transition: Transition) -> Columns:
    """A row of the history. Of the annotations it keeps the summary; the others stand in the rule file.

    The label `alertname` is the rule, and left out.
    """
    alert = transition.alert
    told = json.dumps([alert.rule, labels_json(alert.labels), transition.was, transition.now])
    digest = hashlib.sha256(told.encode()).digest()
    return {
        "at_ms": transition.at_ms,
        "digest": int.from_bytes(digest[:8], "big", signed=True),
        "rule": alert.rule,
        "was": transition.was,
        "now": transition.now,
        "record": to_json(
            replace(alert, labels=alert.labels.without("alertname"), annotations=_kept(alert.annotations))
        ),
    }


def server_row(server: ServerState) -> Columns:
    """The row of a server."""
    return {"name": server.name, "phase": server.phase.value, "record": to_json(server)}


def revision_row(revision: Revision) -> Columns:
    """The row of a set of arguments; what it measured is in the rows of its starts."""
    return {
        "server": clean(revision.server),
        "number": revision.number,
        "created_at_ms": revision.created_at_ms,
        "record": to_json(revision),
    }


def start_row(start: ServerStart) -> Columns:
    """The row of a start."""
    return {
        "server": clean(start.server),
        "began_at_ms": start.began_at_ms,
        "outcome": start.outcome.value,
        "configuration": clean(start.configuration),
        "record": to_json(start),
    }


def remediation_row(remediation: Remediation) -> Columns:
    """The row of a remediation."""
    return {
        "id": remediation.plan.id,
        "server": remediation.plan.server,
        "phase": remediation.phase.value,
        "created_at_ms": remediation.created_at_ms,
        "record": to_json(remediation),
    }


def notification_row(notification: Notification) -> Columns:
    """The row of a message. Once it is over, its body is as short as the history's."""
    over = notification.sent_at_ms is not None or notification.gave_up_at_ms is not None
    return {
        "id": notification.id,
        "receiver": notification.receiver,
        "created_at_ms": notification.created_at_ms,
        "next_attempt_at_ms": notification.next_attempt_at_ms,
        "attempts": notification.attempts,
        "sent_at_ms": notification.sent_at_ms,
        "gave_up_at_ms": notification.gave_up_at_ms,
        "error": clean(notification.error),
        "body": _shortened(notification.body) if over else clean(notification.body),
    }


def _shortened(body: str) -> str:
    """The body without what is empty, or stands in the history or the rule file; no JSON object: as it is."""
    try:
        event = json.loads(body)
        kept = event | {"annotations": _kept(event.get("annotations", {}))}
    except (ValueError, AttributeError, TypeError):
        return clean(body)
    return to_json(
        {k: v for k, v in kept.items() if v not in (None, "", {}, []) and k not in _IN_HISTORY_TOO}
    )


def _kept(annotations: Mapping[str, str]) -> Mapping[str, str]:
    return {name: annotations[name] for name in _KEPT_ANNOTATIONS if name in annotations}


def refusal_row(refusal: Refusal) -> Columns:
    """A row of the present refusals."""
    return {
        "server": refusal.server,
        "alert": refusal.alert,
        "code": refusal.code,
        "record": to_json(refusal),
    }


def audit_row(audit: Audit) -> Columns:
    """A row of what people asked for."""
    return {
        "at_ms": audit.at_ms,
        "who": clean(audit.who),
        "what": clean(audit.what),
        "record": to_json(audit.facts),
    }


# Built once: SQLAlchemy finds the compiled text of a statement by the object.
SAVE: Final[Mapping[str, Executable]] = {
    ALERT.name: upsert(ALERT, "rule", "labels"),
    TRANSITION.name: add(TRANSITION),
    SERVER.name: upsert(SERVER, "name"),
    REMEDIATION.name: upsert(REMEDIATION, "id"),
    NOTIFICATION.name: upsert(NOTIFICATION, "id"),
    RECEIVER.name: upsert(RECEIVER, "name"),
    REFUSAL.name: add(REFUSAL),
    SETTING.name: upsert(SETTING, "name"),
    AUDIT.name: add(AUDIT),
    START.name: upsert(START, "server", "began_at_ms"),
    REVISION.name: add(REVISION),
}
_END_ALERT: Final = delete(ALERT).where(
    ALERT.c.rule == bindparam("rule"), ALERT.c.labels == bindparam("labels")
)
_CLEAR_REFUSALS: Final = delete(REFUSAL)
_DELETE_SETTING: Final = delete(SETTING).where(SETTING.c.name == bindparam("name"))
_PRUNE_HISTORY: Final = (
    delete(TRANSITION).where(TRANSITION.c.at_ms < bindparam("before_ms")),
    delete(REMEDIATION).where(
        REMEDIATION.c.created_at_ms < bindparam("before_ms"),
        REMEDIATION.c.phase.not_in(sorted(phase.value for phase in LIVE_PHASES)),
    ),
    delete(NOTIFICATION).where(
        NOTIFICATION.c.created_at_ms < bindparam("before_ms"),
        or_(NOTIFICATION.c.sent_at_ms.is_not(None), NOTIFICATION.c.gave_up_at_ms.is_not(None)),
    ),
    delete(AUDIT).where(AUDIT.c.at_ms < bindparam("before_ms")),
)
_KEPT_STARTS: Final = 50  # of each server, and of its configurations the last good one beside
_PRUNE_STARTS: Final = text(f"""
DELETE FROM start WHERE (server, began_at_ms) NOT IN (
  SELECT server, began_at_ms FROM (
    SELECT server, began_at_ms, row_number() OVER (PARTITION BY server ORDER BY began_at_ms DESC) AS place
    FROM start
  ) AS newest WHERE place <= {_KEPT_STARTS}
  UNION ALL
  SELECT server, began_at_ms FROM (
    SELECT server, began_at_ms, row_number() OVER (PARTITION BY server ORDER BY began_at_ms DESC) AS place
    FROM (
      SELECT server, max(began_at_ms) AS began_at_ms FROM start
      WHERE outcome = '{StartOutcome.HEALTHY}' GROUP BY server, configuration
    ) AS good
  ) AS last_good WHERE place <= {_KEPT_STARTS}
)""")


def write_changes(connection: Connection, changes: Changes) -> None:
    """Write them."""
    # Ended first: an alert that ended and began again within the tick stays.
    _write(connection, _END_ALERT, [alert_key(alert) for alert in changes.ended])
    save(connection, ALERT, [alert_row(alert) for alert in changes.alerts])
    save(connection, TRANSITION, [transition_row(t) for t in changes.transitions])
    save(connection, SERVER, [server_row(server) for server in changes.servers])
    save(connection, REMEDIATION, [remediation_row(r) for r in changes.remediations])
    save(connection, NOTIFICATION, [notification_row(n) for n in changes.notifications])
    save(connection, RECEIVER, [{"name": k, "record": v} for k, v in changes.receivers.items()])
    if changes.refusals is not None:
        connection.execute(_CLEAR_REFUSALS)
        save(connection, REFUSAL, [refusal_row(refusal) for refusal in changes.refusals])
    save(connection, AUDIT, [audit_row(audit) for audit in changes.audit])
    save(connection, START, [start_row(start) for start in changes.starts])
    save(connection, REVISION, [revision_row(revision) for revision in changes.revisions])
    write_settings(connection, changes.settings)


def write_settings(connection: Connection, settings: Mapping[str, str | None]) -> None:
    """Change settings; None deletes."""
    kept = [
        {"name": clean(name), "value": clean(value)} for name, value in settings.items() if value is not None
    ]
    save(connection, SETTING, kept)
    _write(
        connection, _DELETE_SETTING, [{"name": clean(k)} for k, value in settings.items() if value is None]
    )


def save(connection: Connection, table: TableClause, rows: Sequence[Columns]) -> None:
    """Add rows, or change those of the same key."""
    _write(connection, SAVE[table.name], rows)


def put(connection: Connection, table: TableClause, rows: Sequence[Columns]) -> None:
    """Add rows with all their columns, numbers included; what stands there with the same key stays."""
    if rows:
        connection.execute(insert(table).prefix_with("OR IGNORE"), rows)


def prune_history(connection: Connection, before_ms: int) -> int:
    """Delete what is over and was so before `before_ms`; never an unsent message or a live remediation.

    Of starts the newest are kept, and the last good one of each configuration, whatever their age.
    """
    deleted = sum(connection.execute(s, {"before_ms": before_ms}).rowcount for s in _PRUNE_HISTORY)
    return deleted + connection.execute(_PRUNE_STARTS).rowcount


def _write(connection: Connection, statement: Executable, rows: Sequence[Columns]) -> None:
    if rows:
        connection.execute(statement, rows)
