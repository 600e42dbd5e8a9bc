"""Connections, transactions and errors of the two databases that we support."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from catalog_kit import ALICE, at_once, push
from postgres_server import PostgresServer
from tunefleet.adapters_store import postgres_backend, sqlite_backend
from tunefleet.adapters_store.catalog import Catalog
from tunefleet.adapters_store.database import MAX_ATTEMPTS, Database
from tunefleet.errors import AdapterNotFound, ConfigError, StoreError

COUNT = text("SELECT count(*) FROM tenants")
ADD = text("INSERT INTO tenants VALUES ('a', 'now')")


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    opened = Database(database_url)
    yield opened
    opened.close()


def count(connection: Connection) -> int:
    return int(connection.execute(COUNT).scalar_one())


def add(connection: Connection) -> None:
    connection.execute(ADD)


def test_sqlite_commits_to_the_disk_logs_ahead_and_checks_keys(tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path}/catalog.db")
    names = ("journal_mode", "synchronous", "foreign_keys")
    pragmas = [
        database.read(lambda connection, name=name: connection.exec_driver_sql(f"PRAGMA {name}").scalar())
        for name in names
    ]
    database.close()
    assert pragmas == ["wal", 2, 1]


def test_postgres_waits_for_nothing_forever(postgres_url: str) -> None:
    database = Database(postgres_url, busy_timeout_s=7)
    names = ("statement_timeout", "lock_timeout")
    settings = [
        database.read(lambda connection, name=name: connection.execute(text(f"SHOW {name}")).scalar())
        for name in names
    ]
    database.close()
    assert settings == ["30s", "7s"]


def test_read_modify_write_of_many_threads_loses_nothing(database: Database) -> None:
    database.write(lambda connection: connection.execute(text("CREATE TABLE counter (n INTEGER)")))
    database.write(lambda connection: connection.execute(text("INSERT INTO counter VALUES (0)")))

    def increment(connection: Connection) -> None:
        number = connection.execute(_locked(connection, "SELECT n FROM counter")).scalar_one()
        connection.execute(text("UPDATE counter SET n = :n"), {"n": number + 1})

    def increment_often() -> None:
        for _ in range(15):
            database.write(increment)

    assert at_once([increment_often] * 4) == [None] * 4
    assert database.read(lambda connection: connection.execute(text("SELECT n FROM counter")).scalar()) == 60


def _locked(connection: Connection, query: str) -> object:
    return text(query + (" FOR UPDATE" if connection.dialect.name == "postgresql" else ""))


def test_a_reader_sees_one_state_while_somebody_writes(database: Database) -> None:
    def read(connection: Connection) -> list[int]:
        before = count(connection)
        database.write(add)
        return [before, count(connection)]

    assert database.read(read) == [0, 0]
    assert database.look(count) == 1


def test_a_reader_never_waits_for_a_writer(database: Database) -> None:
    def write(connection: Connection) -> list[int]:
        add(connection)
        return [database.look(count), database.read(count)]

    assert database.write(write) == [0, 0]


def test_an_error_rolls_the_whole_transaction_back(database: Database) -> None:
    def fail(connection: Connection) -> None:
        add(connection)
        connection.execute(text("INSERT INTO nowhere VALUES (1)"))

    with pytest.raises(StoreError, match="nowhere") as refusal:
        database.write(fail)
    assert refusal.value.code == "catalog_unavailable"

    def raise_ours(connection: Connection) -> None:
        add(connection)
        raise AdapterNotFound("no")

    with pytest.raises(AdapterNotFound):
        database.write(raise_ours)
    assert database.look(count) == 0


@pytest.mark.parametrize(
    "url",
    [
        "",
        "nonsense",
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///",
        "mysql://u:s3cret@x/y",
        "oracle://u:s3cret@x",
        "postgres://u:s3cret@x/y",
        "postgresql+asyncpg://u:s3cret@x/y",
        "postgresql+psycopg2://u:s3cret@x/y",
        "postgresql://u:s3cret@x",
        "postgresql://u:s3cret@x:port/y",
    ],
)
def test_a_database_that_is_not_supported_is_a_config_error(url: str) -> None:
    with pytest.raises(ConfigError, match="postgresql://user:password@host:port/name") as refusal:
        Database(url)
    assert refusal.value.param == "database_url"
    assert "s3cret" not in repr(refusal.value)
    assert refusal.value.__cause__ is None


def test_both_names_of_postgres_driver_are_one(postgres_url: str) -> None:
    catalog = Catalog(postgres_url)
    same = Catalog(postgres_url.replace("postgresql://", "postgresql+psycopg://"))
    assert catalog.catalog_id == same.catalog_id
    for each in (catalog, same):
        each.close()


def test_a_file_that_is_no_database_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "catalog.db").write_bytes(b"not a database, but long enough to look at" * 100)
    with pytest.raises(StoreError, match="catalog can't be used") as refusal:
        Database(f"sqlite:///{tmp_path}/catalog.db")
    assert refusal.value.code == "catalog_unavailable"


def test_a_folder_that_cant_be_made_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="catalog can't be used"):
        Database(f"sqlite:///{tmp_path}/file/catalog.db")


def test_a_postgres_that_cant_be_reached_is_a_store_error_without_the_password(
    postgres: PostgresServer,
) -> None:
    postgres.execute("CREATE ROLE locked LOGIN PASSWORD 'right'")
    there = f"127.0.0.1:{postgres.port}"
    for target in (
        f"locked:s3cret@{there}/postgres",
        f"app:s3cret@{there}/nowhere",
        "app:s3cret@127.0.0.1:1/x",
    ):
        with pytest.raises(StoreError, match="catalog can't be used") as refusal:
            Database(f"postgresql://{target}")
        assert refusal.value.code == "catalog_unavailable"
        assert "s3cret" not in str(refusal.value)


def test_a_sqlite_that_is_locked_for_long_is_busy(tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    catalog = Catalog(f"sqlite:///{path}", busy_timeout_s=0.05)
    push(catalog, ALICE, 1)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="catalog is busy: database is locked; try again") as refusal:
        push(catalog, ALICE, 2)
    assert refusal.value.code == "catalog_busy"
    assert catalog.live(ALICE).version == 1  # readers don't wait
    other.execute("ROLLBACK")
    other.close()
    push(catalog, ALICE, 2)
    assert catalog.live(ALICE).version == 2
    catalog.close()


def test_a_postgres_row_that_is_locked_for_long_is_busy(postgres_url: str) -> None:
    catalog = Catalog(postgres_url, busy_timeout_s=0.05)
    push(catalog, ALICE, 1)
    database = Database(postgres_url)

    def hold(connection: Connection) -> StoreError:
        connection.execute(text("SELECT user_id FROM users FOR UPDATE"))
        with pytest.raises(StoreError, match="busy: canceling statement due to lock timeout; try") as refusal:
            push(catalog, ALICE, 2)
        assert catalog.live(ALICE).version == 1
        return refusal.value

    assert database.write(hold).code == "catalog_busy"
    push(catalog, ALICE, 2)
    for each in (catalog, database):
        each.close()


def test_when_all_connections_are_in_use_the_next_caller_is_told_soon(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for backend in (sqlite_backend, postgres_backend):
        assert backend.POOL_TIMEOUT_S <= 5
        monkeypatch.setattr(backend, "POOL_TIMEOUT_S", 0.05)
        monkeypatch.setattr(backend, "NUM_CONNECTIONS", 2)
    database = Database(database_url)

    def look_within(_: Connection) -> int:
        return database.look(lambda _: database.look(count))

    with pytest.raises(StoreError, match="all connections are in use; try again") as refusal:
        database.read(look_within)
    assert refusal.value.code == "catalog_busy"
    assert database.look(count) == 0
    database.close()


def test_a_deadlock_is_given_up_and_tried_again(postgres_url: str) -> None:
    database = Database(postgres_url)
    database.write(lambda connection: connection.execute(text("SET deadlock_timeout = '50ms'")))
    for tenant in ("x", "y"):
        database.write(lambda c, t=tenant: c.execute(text(f"INSERT INTO tenants VALUES ('{t}', '0')")))
    both_hold_one = threading.Barrier(2)
    attempts: list[str] = []

    def touch(connection: Connection, first: str, second: str) -> None:
        attempts.append(first)
        connection.execute(text("SET LOCAL deadlock_timeout = '50ms'"))
        connection.execute(text(f"UPDATE tenants SET created_at = created_at || 1 WHERE tenant = '{first}'"))
        if len(attempts) <= 2:
            both_hold_one.wait()
        connection.execute(text(f"UPDATE tenants SET created_at = created_at || 1 WHERE tenant = '{second}'"))

    results = at_once(
        [
            lambda: database.write(lambda connection: touch(connection, "x", "y")),
            lambda: database.write(lambda connection: touch(connection, "y", "x")),
        ]
    )
    assert results == [None, None]
    assert len(attempts) == 3
    rows = database.read(lambda c: c.execute(text("SELECT created_at FROM tenants")).scalars().all())
    assert rows == ["011", "011"]
    database.close()


def test_a_transaction_that_never_gets_through_is_busy(postgres_url: str) -> None:
    database = Database(postgres_url)
    attempts = []

    def fail(connection: Connection) -> None:
        attempts.append(1)
        connection.execute(text("DO $$ BEGIN RAISE EXCEPTION SQLSTATE '40001'; END $$"))

    with pytest.raises(StoreError) as refusal:
        database.write(fail)
    assert (refusal.value.code, len(attempts)) == ("catalog_busy", MAX_ATTEMPTS)
    database.close()


def test_after_a_restart_of_postgres_the_next_request_works(
    postgres: PostgresServer, postgres_url: str
) -> None:
    catalog = Catalog(postgres_url)
    push(catalog, ALICE, 1)
    assert at_once([lambda: catalog.live(ALICE).version] * 4) == [1] * 4  # several connections
    postgres.stop()
    with pytest.raises(StoreError, match="catalog can't be used") as refusal:
        catalog.live(ALICE)
    assert refusal.value.code == "catalog_unavailable"
    postgres.start()
    assert catalog.live(ALICE).version == 1
    postgres.stop()
    postgres.start()
    push(catalog, ALICE, 2)
    assert catalog.live(ALICE).version == 2
    catalog.close()


def test_a_connection_that_is_lost_in_a_commit_says_that_it_may_have_happened(postgres_url: str) -> None:
    database = Database(postgres_url)
    calls = []

    def lose(connection: Connection) -> None:
        calls.append(1)
        add(connection)
        pid = connection.connection.driver_connection.info.backend_pid  # type: ignore[union-attr]
        database.look(lambda other: other.execute(text(f"SELECT pg_terminate_backend({pid})")))
        deadline = time.monotonic() + 5
        alive = text(f"SELECT count(*) FROM pg_stat_activity WHERE pid = {pid}")
        while database.look(lambda other: other.execute(alive).scalar_one()):
            assert time.monotonic() < deadline

    with pytest.raises(StoreError, match="made or not: look, then retry"):
        database.write(lose)
    assert len(calls) == 1  # it is not made twice
    assert database.look(count) == 0
    database.close()


FILL = """
import resource, signal, sys
from catalog_kit import ALICE, push
from tunefleet.adapters_store.catalog import Catalog
from tunefleet.errors import StoreError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
catalog = Catalog(sys.argv[1])
push(catalog, ALICE, 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (512 * 1024, resource.RLIM_INFINITY))
stored = 1
try:
    while True:
        push(catalog, ALICE, stored + 1)
        stored += 1
except StoreError as error:
    assert catalog.live(ALICE).version == stored
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    push(catalog, ALICE, stored + 1)
    print(stored + 1, error.code, error)
catalog.close()
"""


def test_a_full_disk_is_told_loses_nothing_and_passes(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/catalog.db"
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    result = subprocess.run([sys.executable, "-c", FILL, url], env=environ, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    stored, code = result.stdout.split()[:2]
    assert code == "catalog_unavailable"
    catalog = Catalog(url)
    assert catalog.live(ALICE).version == int(stored)
    assert len(catalog.versions(ALICE, after=None, limit=10_000)) == int(stored)
    catalog.close()


def test_parameters_are_in_no_message(database: Database) -> None:
    def insert(connection: Connection) -> None:
        connection.execute(text("INSERT INTO nowhere VALUES (:secret)"), {"secret": "s3cret"})

    with pytest.raises(StoreError) as refusal:
        database.write(insert)
    assert "s3cret" not in str(refusal.value)
    assert isinstance(refusal.value.__cause__, DBAPIError)
    assert "s3cret" not in str(refusal.value.__cause__)
