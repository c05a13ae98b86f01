"""Reads records out of rows, for the daemon and the command line alike; never writes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

import msgspec
from sqlalchemy import Select, func, select

from gpuwatch.errors import StoreError
from gpuwatch.records import (
    LIVE_PHASES,
    Alert,
    AlertState,
    Notification,
    Refusal,
    Remediation,
    Revision,
    ServerStart,
    ServerState,
    StartOutcome,
    Transition,
)
from gpuwatch.store.codec import from_json
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
from gpuwatch.store.writing import Audit

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sqlalchemy import Row

    from gpuwatch.store.database import Database

R = TypeVar("R")

UNREADABLE: Final = (msgspec.MsgspecError, ValueError)  # what reading a record out of a row may raise
_NOTIFICATION: Final = [c for c in NOTIFICATION.c if c.name != "seq"]
_UNSENT: Final = (NOTIFICATION.c.sent_at_ms.is_(None), NOTIFICATION.c.gave_up_at_ms.is_(None))


def transition_of(row: Mapping[str, Any]) -> Transition:
    """The change that a row of the history tells of; see `UNREADABLE`."""
    was, now = (None if row[name] is None else AlertState(row[name]) for name in ("was", "now"))
    alert = from_json(row["record"], Alert)
    named = replace(alert, labels=alert.labels.merged({"alertname": alert.rule}))
    return Transition(alert=named, was=was, now=now, at_ms=row["at_ms"])


def notification_of(row: Mapping[str, Any]) -> Notification:
    """The message in a row; see `UNREADABLE`."""
    return msgspec.convert(dict(row), Notification)


def audit_of(row: Mapping[str, Any]) -> Audit:
    """What a person asked for; see `UNREADABLE`."""
    facts = msgspec.json.decode(row["record"], type=dict[str, str])
    return Audit(at_ms=row["at_ms"], who=row["who"], what=row["what"], facts=facts)


class Rows:
    """What the daemon and other processes read alike. Every method is one query and may raise StoreError."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection, and let another process own the file if this one did; twice is once."""
        self._database.close()

    def active_alerts(self) -> list[Alert]:
        """Pending and firing, the longest active first."""
        return self._records(Alert, select(ALERT.c.record).order_by(ALERT.c.active_at_ms, ALERT.c.rule))

    def transitions(self, limit: int = 100, after_id: int = 0) -> list[tuple[int, Transition]]:
        """History with its ids, oldest first: the newest `limit`, or the next `limit` after an id."""
        chosen = select(TRANSITION).limit(limit)
        if after_id:
            rows = self._rows(chosen.where(TRANSITION.c.id > after_id).order_by(TRANSITION.c.id))
        else:
            rows = self._rows(chosen.order_by(TRANSITION.c.id.desc()))[::-1]
        return [(row.id, self._read(Transition, transition_of, row)) for row in rows]

    def servers(self) -> dict[str, ServerState]:
        """By name."""
        states = self._records(ServerState, select(SERVER.c.record).order_by(SERVER.c.name))
        return {state.name: state for state in states}

    def starts(self, server: str | None = None, limit: int = 100) -> list[ServerStart]:
        """How servers started, the newest first; of one server if it is named."""
        found = select(START.c.record).order_by(START.c.began_at_ms.desc(), START.c.server).limit(limit)
        if server is not None:
            found = found.where(START.c.server == server)
        return self._records(ServerStart, found)

    def revisions(self, server: str) -> list[Revision]:
        """All sets of arguments that a server has had, the newest first."""
        found = select(REVISION.c.record).where(REVISION.c.server == server)
        return self._records(Revision, found.order_by(REVISION.c.number.desc()))

    def last_good_start(self, server: str, configuration: str = "") -> ServerStart | None:
        """The newest start that became healthy, with this configuration if one is named."""
        found = select(START.c.record).where(
            START.c.server == server, START.c.outcome == StartOutcome.HEALTHY.value
        )
        if configuration:
            found = found.where(START.c.configuration == configuration)
        newest = self._records(ServerStart, found.order_by(START.c.began_at_ms.desc()).limit(1))
        return newest[0] if newest else None

    def live_remediations(self) -> list[Remediation]:
        """Those on their way, oldest first."""
        phases = sorted(phase.value for phase in LIVE_PHASES)
        found = select(REMEDIATION.c.record).where(REMEDIATION.c.phase.in_(phases))
        return self._records(Remediation, found.order_by(REMEDIATION.c.created_at_ms))

    def remediations(
        self, server: str | None = None, since_ms: int = 0, limit: int = 100
    ) -> list[Remediation]:
        """Those created at `since_ms` or later, the newest first; of one server if it is named."""
        found = select(REMEDIATION.c.record).where(REMEDIATION.c.created_at_ms >= since_ms)
        if server is not None:
            found = found.where(REMEDIATION.c.server == server)
        return self._records(Remediation, found.order_by(REMEDIATION.c.created_at_ms.desc()).limit(limit))

    def refusals(self) -> list[Refusal]:
        """Why nothing is done at present, in the order they were given."""
        return self._records(Refusal, select(REFUSAL.c.record).order_by(REFUSAL.c.id))

    def unsent(self, receiver: str, limit: int = 50) -> list[Notification]:
        """Neither sent nor given up, in the order they were first saved."""
        found = select(*_NOTIFICATION).where(NOTIFICATION.c.receiver == receiver, *_UNSENT)
        return self._notifications(found.order_by(NOTIFICATION.c.seq).limit(limit))

    def unsent_count(self) -> dict[str, int]:
        """By receiver; one without unsent messages is not named."""
        receiver = NOTIFICATION.c.receiver
        rows = self._rows(select(receiver, func.count()).where(*_UNSENT).group_by(receiver))
        return {row[0]: row[1] for row in rows}

    def sent_since(self, receiver: str, since_ms: int) -> list[int]:
        """When messages were sent, at `since_ms` or later, oldest first."""
        sent = NOTIFICATION.c.sent_at_ms
        found = select(sent).where(NOTIFICATION.c.receiver == receiver, sent >= since_ms)
        return [row[0] for row in self._rows(found.order_by(sent))]

    def notifications(self, limit: int = 100) -> list[Notification]:
        """The newest first."""
        return self._notifications(select(*_NOTIFICATION).order_by(NOTIFICATION.c.seq.desc()).limit(limit))

    def receivers(self) -> dict[str, str]:
        """The delivery state of each receiver, as JSON."""
        return self._pairs(select(RECEIVER.c.name, RECEIVER.c.record))

    def settings(self) -> dict[str, str]:
        """Wishes of people, left by the command line, and what the daemon keeps for itself."""
        return self._pairs(select(SETTING.c.name, SETTING.c.value))

    def audit(self, limit: int = 100) -> list[Audit]:
        """What people asked for, the newest first."""
        rows = self._rows(select(AUDIT).order_by(AUDIT.c.id.desc()).limit(limit))
        return [self._read(Audit, audit_of, row) for row in rows]

    def _rows(self, query: Select[*tuple[Any, ...]]) -> Sequence[Row[*tuple[Any, ...]]]:
        with self._database.reading("read rows") as connection:
            return connection.execute(query).all()

    def _pairs(self, query: Select[*tuple[Any, ...]]) -> dict[str, str]:
        return {row[0]: row[1] for row in self._rows(query)}

    def _notifications(self, query: Select[*tuple[Any, ...]]) -> list[Notification]:
        return [self._read(Notification, notification_of, row) for row in self._rows(query)]

    def _records(self, kind: type[R], query: Select[*tuple[Any, ...]]) -> list[R]:
        return [self._read(kind, lambda r: from_json(r["record"], kind), row) for row in self._rows(query)]

    def _read(self, kind: type[R], read: Callable[[Mapping[str, Any]], R], row: Row[*tuple[Any, ...]]) -> R:
        try:
            return read(dict(row._mapping))  # noqa: SLF001 - SQLAlchemy's public name for it
        except UNREADABLE as error:
            what = f"cannot read a {kind.__name__} in {self._database.name}: {error}"
            raise StoreError(
                f"{what}; to cure it, mend or delete that row of {kind.__name__.lower()}"
            ) from error
