"""Opens one connection to a PostgreSQL server, in a schema of this host's own; runs no query of the store.

A fleet shares a database: each host has the schema `gpuwatch_<host>`, made if it is not there.

Rule 1: nothing hangs: connecting, every statement and every wait for the network has a limit of seconds.
Rule 2: the one owner of a schema holds an advisory lock, which the server lets go of with its connection.
Rule 3: a connection that died fails what was being done, and is opened again by what comes next.
The URL may hold a password, so no error names it.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Any, Final

from sqlalchemy import create_engine, event, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.pool import NullPool

from gpuwatch.errors import StoreError
from gpuwatch.store.database import Database

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sqlalchemy import URL

_LONGEST_NAME: Final = 63  # PostgreSQL cuts off what is longer
_LIMITS: Final = {
    "connect_timeout": 5,  # seconds
    "tcp_user_timeout": 5_000,  # ms until data that nobody acknowledges ends the connection
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 2,
    "application_name": "gpuwatch",
}
_SESSION: Final = (("statement_timeout", "5s"), ("lock_timeout", "4s"))


def own(url: str, host: str) -> Database:
    """The writing connection; makes the schema. StoreError of kind `locked`: another gpuwatch has it."""
    return _open(url, host, owner=True)


def read(url: str, host: str) -> Database:
    """A reading connection, with or without a running daemon."""
    return _open(url, host, session=(("default_transaction_read_only", "on"),))


def wish(url: str, host: str) -> Database:
    """A connection for one short write beside the daemon's."""
    return _open(url, host)


def schema_of(host: str) -> str:
    """The schema of a host: `gpuwatch_` and its name; what an identifier lacks is `_`."""
    plain = re.sub(r"[^a-z0-9_]", "_", host.lower())
    return f"gpuwatch_{plain}"[:_LONGEST_NAME] if plain else "gpuwatch"


def _open(url: str, host: str, *, owner: bool = False, session: Sequence[tuple[str, str]] = ()) -> Database:
    parsed = _parsed(url)
    schema = schema_of(host)
    name = f"schema {schema} of the PostgreSQL database {parsed.database or ''}"
    try:
        engine = create_engine(parsed, connect_args=_LIMITS, poolclass=NullPool, hide_parameters=True)
    except ImportError as error:
        message = f"cannot open {name}: {error}; to cure it, install gpuwatch[postgresql]"
        raise StoreError(message) from error

    def prepare(connection: Any, _: object) -> None:  # noqa: ANN401 - a psycopg connection
        try:
            with connection.cursor() as cursor:
                if owner:
                    _take(cursor, schema)
                for key, value in (*_SESSION, ("search_path", f'"{schema}"'), *session):
                    cursor.execute("SELECT set_config(%s, %s, false)", (key, value))
            connection.commit()
        except BaseException:
            connection.close()
            raise

    event.listen(engine, "connect", prepare)
    return Database(name, engine)


def _parsed(url: str) -> URL:
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        # The error quotes the URL, password and all.
        parsed = None
    if parsed is None or parsed.drivername != "postgresql+psycopg":
        message = "cannot read the database URL; to cure it, write state_url as postgresql+psycopg://user@/db"
        raise StoreError(message)
    return parsed


def _take(cursor: Any, schema: str) -> None:  # noqa: ANN401 - a psycopg cursor
    key = int.from_bytes(hashlib.sha256(schema.encode()).digest()[:8], "big", signed=True)
    cursor.execute("SELECT pg_try_advisory_lock(%s)", (key,))
    if not cursor.fetchone()[0]:
        raise StoreError(
            f"another gpuwatch writes to the schema {schema}; to cure it, stop that one"
            " or give this host another name (host in the configuration)",
            kind="locked",
        )
    # Who may not create schemas may still have been given one.
    cursor.execute("SELECT count(*) FROM pg_namespace WHERE nspname = %s", (schema,))
    if not cursor.fetchone()[0]:
        cursor.execute(f'CREATE SCHEMA "{schema}"')
