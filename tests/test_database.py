from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from tunefleet.adapters_store.database import Database
from tunefleet.errors import ConfigError, StoreError


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database(f"sqlite:///{tmp_path}/catalog.db")
    yield opened
    opened.close()


def test_a_commit_is_durable_the_log_is_wal_and_keys_are_checked(database: Database) -> None:
    with database.read() as connection:
        pragmas = [
            connection.exec_driver_sql(f"PRAGMA {name}").scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys")
        ]
    assert pragmas == ["wal", 2, 1]


def test_read_modify_write_of_many_threads_loses_nothing(database: Database) -> None:
    with database.write() as connection:
        connection.execute(text("CREATE TABLE counter (n INTEGER)"))
        connection.execute(text("INSERT INTO counter VALUES (0)"))

    def count() -> None:
        for _ in range(20):
            with database.write() as connection:
                number = connection.execute(text("SELECT n FROM counter")).scalar_one()
                connection.execute(text("UPDATE counter SET n = :n"), {"n": number + 1})

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with database.read() as connection:
        assert connection.execute(text("SELECT n FROM counter")).scalar_one() == 80


def test_a_reader_sees_one_state_while_somebody_writes(database: Database) -> None:
    count = text("SELECT count(*) FROM tenants")
    with database.read() as reader:
        assert reader.execute(count).scalar_one() == 0
        with database.write() as writer:
            writer.execute(text("INSERT INTO tenants VALUES ('a', 'now')"))
        assert reader.execute(count).scalar_one() == 0
    with database.read() as reader:
        assert reader.execute(count).scalar_one() == 1


def test_an_error_rolls_the_whole_transaction_back(database: Database) -> None:
    def fail() -> None:
        with database.write() as connection:
            connection.execute(text("INSERT INTO tenants VALUES ('a', 'now')"))
            connection.execute(text("INSERT INTO nowhere VALUES (1)"))

    with pytest.raises(StoreError, match="no such table: nowhere") as refusal:
        fail()
    assert refusal.value.code == "catalog_unavailable"
    with database.read() as connection:
        assert connection.execute(text("SELECT count(*) FROM tenants")).scalar_one() == 0


@pytest.mark.parametrize(
    "url", ["", "nonsense", "sqlite://", "sqlite:///:memory:", "mysql://x/y", "oracle://x"]
)
def test_a_database_that_is_not_supported_is_a_config_error(url: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        Database(url)
    assert refusal.value.param == "database_url"


def test_a_file_that_is_no_database_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "catalog.db").write_bytes(b"not a database, but long enough to look at" * 100)
    with pytest.raises(StoreError, match="catalog can't be used") as refusal:
        Database(f"sqlite:///{tmp_path}/catalog.db")
    assert refusal.value.code == "catalog_unavailable"


def test_a_folder_that_cant_be_made_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="catalog can't be used"):
        Database(f"sqlite:///{tmp_path}/file/catalog.db")
