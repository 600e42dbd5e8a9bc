"""The SQL database behind the catalog: connections, transactions, tables, errors.

SQLite, as a file that several processes share. Writers take the lock at once (``BEGIN IMMEDIATE``: the
default mode loses updates), and a commit is on the disk when it returns (``synchronous=FULL``).
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from tunefleet.adapters_store import schema
from tunefleet.errors import ConfigError, StoreError

NUM_CONNECTIONS = 16
BUSY_TIMEOUT_MS = 10_000


class Database:
    """A pool of connections; whoever opens it closes it. Each transaction is a ``with`` block."""

    def __init__(self, database_url: str) -> None:
        url = _checked_url(database_url)
        self.engine = _engine(url)
        self._writer = self.engine.execution_options(write=True)
        with _store_errors():
            _create_tables(self._writer, Path(str(url.database)))

    def close(self) -> None:
        self.engine.dispose()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A consistent view; never waits for writers."""
        with _store_errors(), self.engine.begin() as connection:
            yield connection

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """Alone among writers from the start; commits at the end, or rolls back on any error."""
        with _store_errors(), self._writer.begin() as connection:
            yield connection


def _checked_url(database_url: str) -> URL:
    try:
        url = make_url(database_url)
    except ArgumentError as error:
        raise ConfigError("database_url must look like sqlite:///path", param="database_url") from error
    if url.get_backend_name() != "sqlite" or not url.database or url.database == ":memory:":
        raise ConfigError("database_url must be a file of SQLite: sqlite:///path", param="database_url")
    return url


def _engine(url: URL) -> Engine:
    engine = create_engine(url, pool_size=NUM_CONNECTIONS, max_overflow=0)
    event.listen(engine, "connect", _on_connect)
    event.listen(engine, "begin", _on_begin)
    return engine


def _on_connect(connection: sqlite3.Connection, _record: object) -> None:
    connection.isolation_level = None  # the driver's own BEGIN comes too late
    for pragma in (
        f"busy_timeout={BUSY_TIMEOUT_MS}",
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _on_begin(connection: Connection) -> None:
    is_write = connection.get_execution_options().get("write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if is_write else "BEGIN")


def _create_tables(writer: Engine, database: Path) -> None:
    """Under a lock of its own: two processes that switch a file to WAL at once fail, they don't wait."""
    database.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(f"{database}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        with writer.begin() as connection:
            schema.metadata.create_all(connection)
    finally:
        os.close(fd)


@contextmanager
def _store_errors() -> Iterator[None]:
    try:
        yield
    except SQLAlchemyError as error:
        cause = getattr(error, "orig", None) or error
        raise StoreError(f"the catalog can't be used: {cause}", code="catalog_unavailable") from error
    except OSError as error:
        raise StoreError(
            f"the catalog can't be used: {error.strerror}", code="catalog_unavailable"
        ) from error
