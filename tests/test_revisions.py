"""The schema through time: migrations run once, whoever opens the catalog first; data stays."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

from catalog_kit import ALICE, at_once, push, rows, upload
from tunefleet.adapters_store import revisions, schema
from tunefleet.adapters_store.catalog import Catalog
from tunefleet.adapters_store.database import Database
from tunefleet.adapters_store.repeats import upload_key
from tunefleet.errors import ConfigError, StoreError

TESTS = Path(__file__).parent
MIGRATIONS = Path(revisions.__file__).parent / "migrations"
FIRST_RELEASE = TESTS / "catalogs" / "before_migrations.sql"  # made by that release


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "PYTHONPATH": str(TESTS)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environ, capture_output=True, text=True)


def made_by_the_first_release(path: Path) -> str:
    with sqlite3.connect(path) as connection:
        connection.executescript(FIRST_RELEASE.read_text())
    connection.close()
    return f"sqlite:///{path}"


def test_the_newest_revision_is_the_scripts_head() -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    scripts = ScriptDirectory.from_config(config)
    assert scripts.get_heads() == [revisions.NEWEST]
    assert [script.revision for script in scripts.walk_revisions()] == list(reversed(revisions.REVISIONS))


def test_migrations_make_the_schema_that_the_code_uses(empty_database_url: str) -> None:
    database = Database(empty_database_url)

    def differences(connection: Connection) -> object:
        options = {
            "compare_type": True,
            "include_name": lambda name, _kind, _parents: name != "alembic_version",
        }
        return compare_metadata(MigrationContext.configure(connection, opts=options), schema.metadata)

    found = database.read(differences)
    database.close()
    assert found == []


def test_text_is_compared_by_bytes_in_every_column(postgres_url: str) -> None:
    database = Database(postgres_url)
    query = text(
        "SELECT table_name, column_name FROM information_schema.columns WHERE table_schema = 'public' "
        "AND data_type = 'character varying' AND collation_name IS DISTINCT FROM 'C' "
        "AND table_name != 'alembic_version'"
    )
    found = database.read(lambda connection: connection.execute(query).all())
    database.close()
    assert found == []


def test_a_catalog_of_the_first_release_is_taken_over_with_its_data(tmp_path: Path) -> None:
    catalog = Catalog(made_by_the_first_release(tmp_path / "catalog.db"))
    assert [(each.version, each.live) for each in catalog.versions(ALICE, after=None, limit=9)] == [
        (2, False),
        (1, True),
    ]
    assert catalog.live(ALICE).ref.digest == upload(1).digest
    assert catalog.user("default", "alice").num_adapters == 1
    again = catalog.answered(ALICE, "", upload_key("k2", 2))
    assert again is not None
    assert (again.record.version, again.record.live) == (2, True)
    assert catalog.rollback(ALICE).version == 2  # 1, 2, 1: its history is known
    assert catalog.rollback(ALICE).version == 1
    catalog.set_canary(ALICE, 2, 10)
    push(catalog, ALICE, 3)
    assert catalog.live(ALICE).version == 3
    assert len(catalog.catalog_id) == 36
    catalog.close()


def test_a_catalog_before_idempotency_keys_is_taken_over_too(tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    url = made_by_the_first_release(path)
    with sqlite3.connect(path) as connection:
        connection.execute("DROP TABLE upload_keys")
    connection.close()
    catalog = Catalog(url)
    assert catalog.answered(ALICE, "", upload_key("k2", 2)) is None
    assert catalog.live(ALICE).version == 1
    catalog.close()


def test_a_database_of_a_newer_release_is_refused_and_left_alone(database_url: str) -> None:
    catalog = Catalog(database_url)
    push(catalog, ALICE, 1)
    before = rows(catalog, "versions")
    set_revision = text("UPDATE alembic_version SET version_num = '0099'")
    catalog._database.write(lambda connection: connection.execute(set_revision))
    with pytest.raises(ConfigError, match=r"made by a newer tunefleet .*0099.*: upgrade") as refusal:
        Catalog(database_url)
    assert refusal.value.param == "database_url"
    assert rows(catalog, "versions") == before
    catalog.close()


def test_a_migration_that_fails_leaves_the_database_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "catalog.db"
    url = made_by_the_first_release(path)
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE deletions (x)")  # in the way, halfway through
    connection.close()
    for _ in range(2):
        with pytest.raises(StoreError, match="deletions already exists"):
            Catalog(url)
    with sqlite3.connect(path) as connection:
        tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        connection.execute("DROP TABLE deletions")
    connection.close()
    assert "alembic_version" not in tables
    assert "uploads" not in tables
    catalog = Catalog(url)
    assert catalog.live(ALICE).version == 1
    catalog.close()


OPEN = """
import sys
from tunefleet.adapters_store.catalog import Catalog
sys.stdin.readline()
catalog = Catalog(sys.argv[1])
print(catalog.catalog_id)
catalog.close()
"""


def test_processes_that_open_a_new_catalog_at_once_all_get_the_same(empty_database_url: str) -> None:
    command = [sys.executable, "-c", OPEN, empty_database_url]
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    answers = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert len(set(answers)) == 1


def test_threads_that_open_a_new_catalog_at_once_all_get_the_same(empty_database_url: str) -> None:
    def opened() -> str:
        catalog = Catalog(empty_database_url)
        catalog.close()
        return catalog.catalog_id

    assert len(set(at_once([opened] * 4))) == 1


def test_opening_prints_nothing_changes_no_logging_and_needs_alembic_once(tmp_path: Path) -> None:
    code = """
import logging, sys
from tunefleet.adapters_store.catalog import Catalog
before = (logging.root.level, list(logging.root.handlers), logging.getLogger("other").disabled)
Catalog(sys.argv[1]).close()
assert before == (logging.root.level, list(logging.root.handlers), logging.getLogger("other").disabled)
print("alembic" in sys.modules)
"""
    url = f"sqlite:///{tmp_path}/a folder with 100%/catalog.db"
    results = [run(code, url) for _ in range(2)]
    assert [(result.stdout, result.stderr) for result in results] == [("True\n", ""), ("False\n", "")]


def test_there_is_no_way_back() -> None:
    for path in sorted((MIGRATIONS / "versions").glob("r*.py")):
        assert "def downgrade" not in path.read_text()
        assert "op.drop" not in path.read_text()
