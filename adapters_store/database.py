"""The SQL database behind the catalog: connections, transactions, errors.

Work is a function of a connection. A write is one transaction, alone among those that lock the same rows
(Postgres) or among all writers (SQLite). It runs again from the start where the database gave up a deadlock
or the connection was lost before its commit, so it must have no other effects.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from tunefleet.adapters_store import revisions
from tunefleet.adapters_store.postgres_backend import PostgresBackend
from tunefleet.adapters_store.sqlite_backend import SqliteBackend
from tunefleet.adapters_store.steps import reached
from tunefleet.errors import ConfigError, StoreError

MAX_ATTEMPTS = 5
BUSY_TIMEOUT_S = 10.0

T = TypeVar("T")


class Database:
    """A pool of connections to an up-to-date database; whoever opens it closes it.

    Args:
        database_url: ``sqlite:///path`` or ``postgresql://user:password@host/name``.
        busy_timeout_s: how long a statement waits for other writers.
    """

    def __init__(self, database_url: str, *, busy_timeout_s: float = BUSY_TIMEOUT_S) -> None:
        url = _parsed(database_url)
        self._password = url.password
        self._backend = _backend(url, busy_timeout_s)
        self.engine = self._backend.engine
        self._single = self.engine.execution_options(**self._backend.single)
        self._reader = self.engine.execution_options(**self._backend.reader)
        self._writer = self.engine.execution_options(**self._backend.writer)
        try:
            self.catalog_id = self._open()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self.engine.dispose()

    def look(self, work: Callable[[Connection], T]) -> T:
        """Runs one SELECT, which sees what was committed before it. Never waits for writers."""
        return self._again(self._single, work)

    def read(self, work: Callable[[Connection], T]) -> T:
        """Runs SELECTs that see one state of the database. Never waits for writers."""
        return self._again(self._reader, work)

    def write(self, work: Callable[[Connection], T]) -> T:
        """Commits what ``work`` did at its end, or nothing of it on any error."""
        return self._again(self._writer, work, commit=True)

    def _open(self) -> str:
        with self._told():
            with self._backend.opening():
                if not self._again(self._reader, revisions.is_newest):
                    self._again(self._backend.migrator, revisions.upgrade, commit=True)
            return self._again(self._single, revisions.catalog_id)

    def _again(self, engine: Engine, work: Callable[[Connection], T], *, commit: bool = False) -> T:
        """Runs work, once more after an error that another try may not meet."""
        with self._told():
            for attempt in range(1, MAX_ATTEMPTS + 1):
                try:
                    return _once(engine, work, commit=commit)
                except DBAPIError as error:
                    if attempt == MAX_ATTEMPTS or not self._is_passing(error, attempt):
                        raise
                time.sleep(random.uniform(0, 0.01 * 2**attempt))  # those that met don't meet again
        raise AssertionError("unreachable")

    def _is_passing(self, error: DBAPIError, attempt: int) -> bool:
        if error.connection_invalidated:  # all connections are replaced then: one try tells
            return attempt == 1
        return self._backend.is_passing(error)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Turns errors of the database into ours, without secrets."""
        try:
            yield
        except PoolTimeout as error:
            raise StoreError(
                "the catalog is busy: all connections are in use; try again", code="catalog_busy"
            ) from error
        except DBAPIError as error:
            if self._backend.is_busy(error):
                raise StoreError(
                    f"the catalog is busy: {self._shown(error)}; try again", code="catalog_busy"
                ) from error
            raise self._unavailable(error) from error
        except (SQLAlchemyError, OSError) as error:
            raise self._unavailable(error) from error

    def _unavailable(self, error: Exception) -> StoreError:
        return StoreError(f"the catalog can't be used: {self._shown(error)}", code="catalog_unavailable")

    def _shown(self, error: Exception) -> str:
        """The first line: the others hold keys and values."""
        cause = getattr(error, "orig", None) or getattr(error, "strerror", None) or error
        line = str(cause).partition("\n")[0]
        return line.replace(self._password, "***") if self._password else line


def _once(engine: Engine, work: Callable[[Connection], T], *, commit: bool) -> T:
    with engine.connect() as connection:
        result = work(connection)
        if commit:
            _commit(connection)
        return result


def _commit(connection: Connection) -> None:
    reached("catalog:committing")
    try:
        connection.commit()
    except DBAPIError as error:
        if not error.connection_invalidated:
            raise
        raise StoreError(
            "the catalog's connection was lost while it committed, so the change was made or not: "
            "look, then retry",
            code="catalog_unavailable",
        ) from error


def _parsed(database_url: str) -> URL:
    try:
        url = make_url(database_url)
    except (ArgumentError, ValueError):
        raise _unsupported() from None  # the cause holds the URL, with its password
    if "@" in (url.host or ""):
        raise ConfigError(
            "database_url has an @ too many: write %40 for one in the user's name or password",
            param="database_url",
        )
    if url.get_backend_name() == "sqlite" and url.database and url.database != ":memory:":
        return url
    if url.drivername in ("postgresql", "postgresql+psycopg") and url.database:
        return url.set(drivername="postgresql+psycopg")
    raise _unsupported()


def _unsupported() -> ConfigError:
    return ConfigError(
        "database_url must be a file of SQLite, sqlite:///path, or a database of Postgres, "
        "postgresql://user:password@host:port/name",
        param="database_url",
    )


def _backend(url: URL, busy_timeout_s: float) -> SqliteBackend | PostgresBackend:
    if url.get_backend_name() == "sqlite":
        return SqliteBackend(url, busy_timeout_s)
    return PostgresBackend(url, busy_timeout_s)
