"""SQLite, as a file that several processes of one machine share.

Writers take the lock at once (``BEGIN IMMEDIATE``: the driver's default loses updates), and a commit is on
the disk when it returns (``synchronous=FULL``).
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, create_engine, event
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError

NUM_CONNECTIONS = 16
POOL_TIMEOUT_S = 5.0


class SqliteBackend:
    """How the database is reached, and what its errors mean."""

    single: Mapping[str, object] = {"begin": None}
    reader: Mapping[str, object] = {"begin": "BEGIN"}
    writer: Mapping[str, object] = {"begin": "BEGIN IMMEDIATE"}

    def __init__(self, url: URL, busy_timeout_s: float) -> None:
        self._path = Path(str(url.database))
        self._busy_timeout_ms = int(busy_timeout_s * 1000)
        self.engine = create_engine(
            url,
            pool_size=NUM_CONNECTIONS,
            max_overflow=0,
            pool_timeout=POOL_TIMEOUT_S,
            hide_parameters=True,
        )
        self.migrator = self.engine.execution_options(**self.writer)
        event.listen(self.engine, "connect", self._on_connect)
        event.listen(self.engine, "begin", _on_begin)

    @contextmanager
    def opening(self) -> Iterator[None]:
        """One process at a time: two that switch a file to WAL at once fail, they don't wait."""
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(f"{self._path}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def is_passing(self, _error: DBAPIError) -> bool:
        return False  # a busy database was waited for already

    def is_busy(self, error: DBAPIError) -> bool:
        return getattr(error.orig, "sqlite_errorcode", 0) & 0xFF in (
            sqlite3.SQLITE_BUSY,
            sqlite3.SQLITE_LOCKED,
        )

    def _on_connect(self, connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None  # the driver's own BEGIN comes too late
        for pragma in (
            f"busy_timeout={self._busy_timeout_ms}",
            "journal_mode=WAL",
            "synchronous=FULL",
            "foreign_keys=ON",
        ):
            connection.execute(f"PRAGMA {pragma}")


def _on_begin(connection: Connection) -> None:
    statement = connection.get_execution_options().get("begin", "BEGIN")
    if statement:
        connection.exec_driver_sql(statement)
