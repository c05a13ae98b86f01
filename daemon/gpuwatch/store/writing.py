"""What one tick changes, and how it is written; never opens a transaction of its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import bindparam, delete, or_
from sqlalchemy.dialects.sqlite import insert

from gpuwatch.records import LIVE_PHASES, Alert, Notification, Refusal, Remediation, ServerState, Transition
from gpuwatch.store.codec import labels_json, to_json
from gpuwatch.store.schema import (
    ALERT,
    NOTIFICATION,
    RECEIVER,
    REFUSAL,
    REMEDIATION,
    SERVER,
    SETTING,
    TICK,
    TRANSITION,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sqlalchemy import Connection, Executable, TableClause

Columns = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """All that one tick changes beside its samples: saved whole or not at all.

    `alerts` (pending, firing), `servers`, `remediations`, `notifications` and `receivers` change
    the row of the same identity, or add it. `ended` alerts leave the active ones. `transitions`
    are added to the history. `refusals` replace the present ones unless None. `receivers` are the
    JSON of a delivery state by name. A setting of None is deleted.
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


def upsert(table: TableClause, *key: str) -> Executable:
    """Insert, or change the row that has this key in place: its rowid, and so its order, stays."""
    statement = insert(table)
    changed = {c.name: statement.excluded[c.name] for c in table.c if c.name not in {*key, "seq"}}
    return statement.on_conflict_do_update(index_elements=key, set_=changed)


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
    """A new row of the history."""
    return {
        "at_ms": transition.at_ms,
        "rule": transition.alert.rule,
        "was": transition.was and transition.was.value,
        "now": transition.now and transition.now.value,
        "record": to_json(transition),
    }


def server_row(server: ServerState) -> Columns:
    """The row of a server."""
    return {"name": server.name, "phase": server.phase.value, "record": to_json(server)}


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
    """The row of a message."""
    return {
        "id": notification.id,
        "receiver": notification.receiver,
        "created_at_ms": notification.created_at_ms,
        "sent_at_ms": notification.sent_at_ms,
        "gave_up_at_ms": notification.gave_up_at_ms,
        "record": to_json(notification),
    }


def refusal_row(refusal: Refusal) -> Columns:
    """A row of the present refusals."""
    return {
        "server": refusal.server,
        "alert": refusal.alert,
        "code": refusal.code,
        "record": to_json(refusal),
    }


# Built once: SQLAlchemy finds the compiled text of a statement by the object.
_SAVE_TICK: Final = upsert(TICK, "id")
_SAVE_ALERT: Final = upsert(ALERT, "rule", "labels")
_SAVE_SERVER: Final = upsert(SERVER, "name")
_SAVE_REMEDIATION: Final = upsert(REMEDIATION, "id")
_SAVE_NOTIFICATION: Final = upsert(NOTIFICATION, "id")
_SAVE_RECEIVER: Final = upsert(RECEIVER, "name")
_SAVE_SETTING: Final = upsert(SETTING, "name")
_ADD_TRANSITION: Final = insert(TRANSITION)
_ADD_REFUSAL: Final = insert(REFUSAL)
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
)


def write_changes(connection: Connection, changes: Changes, tick_ms: int | None) -> None:
    """Write them, and that there was a tick at `tick_ms`, unless it is None."""
    _write(connection, _SAVE_TICK, [] if tick_ms is None else [{"id": 1, "at_ms": tick_ms}])
    # Ended first: an alert that ended and began again within the tick stays.
    _write(connection, _END_ALERT, [alert_key(alert) for alert in changes.ended])
    _write(connection, _SAVE_ALERT, [alert_row(alert) for alert in changes.alerts])
    _write(connection, _ADD_TRANSITION, [transition_row(t) for t in changes.transitions])
    _write(connection, _SAVE_SERVER, [server_row(server) for server in changes.servers])
    _write(connection, _SAVE_REMEDIATION, [remediation_row(r) for r in changes.remediations])
    _write(connection, _SAVE_NOTIFICATION, [notification_row(n) for n in changes.notifications])
    _write(connection, _SAVE_RECEIVER, [{"name": k, "record": v} for k, v in changes.receivers.items()])
    if changes.refusals is not None:
        connection.execute(_CLEAR_REFUSALS)
        _write(connection, _ADD_REFUSAL, [refusal_row(refusal) for refusal in changes.refusals])
    write_settings(connection, changes.settings)


def write_settings(connection: Connection, settings: Mapping[str, str | None]) -> None:
    """Change settings; None deletes."""
    kept = [{"name": name, "value": value} for name, value in settings.items() if value is not None]
    _write(connection, _SAVE_SETTING, kept)
    _write(connection, _DELETE_SETTING, [{"name": k} for k, value in settings.items() if value is None])


def prune_history(connection: Connection, before_ms: int) -> int:
    """Delete what is over and was so before `before_ms`; never an unsent message or a live remediation."""
    return sum(connection.execute(s, {"before_ms": before_ms}).rowcount for s in _PRUNE_HISTORY)


def _write(connection: Connection, statement: Executable, rows: Sequence[Columns]) -> None:
    if rows:
        connection.execute(statement, rows)
