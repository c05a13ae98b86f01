"""The tables as they are today; how a file comes to have them is told by `migrations`.

A record is a row: what is searched has a column, and `record` holds all of it as JSON.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import TableClause, column, table

MIGRATION: Final = table("migration", column("version"), column("name"))
TICK: Final = table("tick", column("id"), column("at_ms"))
SERIES: Final = table("series", column("id"), column("labels"), column("metric"))
SAMPLE: Final = table("sample", column("at_ms"), column("series_id"), column("value"))
ALERT: Final = table(
    "alert", column("rule"), column("labels"), column("state"), column("active_at_ms"), column("record")
)
TRANSITION: Final = table(
    "transition",
    column("id"),
    column("at_ms"),
    column("rule"),
    column("was"),
    column("now"),
    column("record"),
)
SERVER: Final = table("server", column("name"), column("phase"), column("record"))
REMEDIATION: Final = table(
    "remediation",
    column("id"),
    column("server"),
    column("phase"),
    column("created_at_ms"),
    column("record"),
)
NOTIFICATION: Final = table(
    "notification",
    column("seq"),
    column("id"),
    column("receiver"),
    column("created_at_ms"),
    column("sent_at_ms"),
    column("gave_up_at_ms"),
    column("record"),
)
RECEIVER: Final = table("receiver", column("name"), column("record"))
REFUSAL: Final = table(
    "refusal", column("id"), column("server"), column("alert"), column("code"), column("record")
)
SETTING: Final = table("setting", column("name"), column("value"))

TABLES: Final[tuple[TableClause, ...]] = (
    MIGRATION,
    TICK,
    SERIES,
    SAMPLE,
    ALERT,
    TRANSITION,
    SERVER,
    REMEDIATION,
    NOTIFICATION,
    RECEIVER,
    REFUSAL,
    SETTING,
)
