"""The tables of state as they are today; how a database comes to have them is told by `migrations`.

A record is a row: what is searched has a column, and `record` holds the rest or all of it as JSON.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import BigInteger, ColumnClause, TableClause, Text, column, table

MIGRATION: Final = table("migration", column("version"), column("name"))


def _texts(*names: str) -> list[ColumnClause[str]]:
    return [column(name, Text()) for name in names]


def _numbers(*names: str) -> list[ColumnClause[int]]:
    return [column(name, BigInteger()) for name in names]


ALERT: Final = table(
    "alert", *_texts("rule", "labels", "state"), *_numbers("active_at_ms"), *_texts("record")
)
TRANSITION: Final = table(
    "transition", *_numbers("id", "at_ms", "digest"), *_texts("rule", "was", "now", "record")
)
SERVER: Final = table("server", *_texts("name", "phase", "record"))
REMEDIATION: Final = table(
    "remediation", *_texts("id", "server", "phase"), *_numbers("created_at_ms"), *_texts("record")
)
NOTIFICATION: Final = table(
    "notification",
    *_numbers("seq"),
    *_texts("id", "receiver"),
    *_numbers("created_at_ms", "next_attempt_at_ms", "attempts", "sent_at_ms", "gave_up_at_ms"),
    *_texts("error", "body"),
)
RECEIVER: Final = table("receiver", *_texts("name", "record"))
REFUSAL: Final = table("refusal", *_numbers("id"), *_texts("server", "alert", "code", "record"))
SETTING: Final = table("setting", *_texts("name", "value"))
AUDIT: Final = table("audit", *_numbers("id", "at_ms"), *_texts("who", "what", "record"))
START: Final = table(
    "start", *_texts("server"), *_numbers("began_at_ms"), *_texts("outcome", "configuration", "record")
)
REVISION: Final = table(
    "revision", *_texts("server"), *_numbers("number", "created_at_ms"), *_texts("record")
)

STATE_TABLES: Final[tuple[TableClause, ...]] = (
    ALERT,
    TRANSITION,
    SERVER,
    REMEDIATION,
    NOTIFICATION,
    RECEIVER,
    REFUSAL,
    SETTING,
    AUDIT,
    START,
    REVISION,
)
