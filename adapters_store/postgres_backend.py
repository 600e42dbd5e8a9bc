"""Postgres, for routers on several machines; the driver is psycopg 3.

Writers lock the rows that they decide about (``SELECT ... FOR UPDATE``). Every wait ends: for a connection,
for a lock, for a statement.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from sqlalchemy import create_engine, event
from sqlalchemy.engine import URL
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DBAPIError

NUM_CONNECTIONS = 16
POOL_TIMEOUT_S = 5.0
CONNECT_TIMEOUT_S = 5
STATEMENT_TIMEOUT_S = 30.0

_GIVEN_UP = ("40001", "40P01")  # serialization_failure, deadlock_detected
_BUSY = ("53300", "55P03", "57014", *_GIVEN_UP)  # too many connections, lock timeout, statement timeout


class PostgresBackend:
    """How the database is reached, and what its errors mean."""

    single: Mapping[str, object] = {"isolation_level": "AUTOCOMMIT"}
    reader: Mapping[str, object] = {"isolation_level": "REPEATABLE READ"}
    writer: Mapping[str, object] = {"isolation_level": "READ COMMITTED"}

    def __init__(self, url: URL, busy_timeout_s: float) -> None:
        self._lock_timeout_ms = int(busy_timeout_s * 1000)
        defaults = {"connect_timeout": CONNECT_TIMEOUT_S, "target_session_attrs": "read-write"}
        self.engine = create_engine(
            url,
            pool_size=NUM_CONNECTIONS,
            max_overflow=0,
            pool_timeout=POOL_TIMEOUT_S,
            hide_parameters=True,
            connect_args={key: value for key, value in defaults.items() if key not in url.query},
        )
        self.migrator = self.engine.execution_options(**self.writer)
        event.listen(self.engine, "connect", self._on_connect)

    @contextmanager
    def opening(self) -> Iterator[None]:
        """The migration itself takes an advisory lock."""
        yield

    def is_passing(self, error: DBAPIError) -> bool:
        return _state(error) in _GIVEN_UP

    def is_busy(self, error: DBAPIError) -> bool:
        return _state(error) in _BUSY

    def _on_connect(self, connection: DBAPIConnection, _record: object) -> None:
        cursor = connection.cursor()
        cursor.execute(f"SET statement_timeout = {int(STATEMENT_TIMEOUT_S * 1000)}")
        cursor.execute(f"SET lock_timeout = {self._lock_timeout_ms}")
        cursor.close()
        connection.commit()


def _state(error: DBAPIError) -> str | None:
    state: str | None = getattr(error.orig, "sqlstate", None)
    return state
