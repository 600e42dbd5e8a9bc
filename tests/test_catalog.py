from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tunefleet.adapters_store.catalog import _LIVE, AdapterName, Catalog, NewVersion
from tunefleet.errors import AdapterConflict, AdapterNotFound

ALICE = AdapterName("default", "alice", "default", "tiny@1")
NOON = datetime(2026, 11, 24, 12, 0, 0, 5, tzinfo=UTC)


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[Catalog]:
    opened = Catalog(f"sqlite:///{tmp_path}/catalog.db", now=lambda: NOON)
    yield opened
    opened.close()


def upload(number: int, key: str = "") -> NewVersion:
    return NewVersion(
        digest=f"{number:064x}",
        object_key=key or f"default/{number}",
        config_sha256="c" * 64,
        weights_sha256=f"{number:064d}",
        size_bytes=100 + number,
        rank=8,
        target_modules=("q_proj", "v_proj"),
        warnings=("odd",),
        metadata={"run": number},
    )


def test_an_upload_is_found_live_and_by_number(catalog: Catalog) -> None:
    record, created = catalog.add_version(ALICE, upload(1), promote=True)
    assert created
    assert (record.version, record.live, record.created_at) == (1, True, "2026-11-24T12:00:00.000005Z")
    assert record == catalog.version(ALICE, 1)
    found = catalog.live(ALICE)
    assert found == catalog.numbered(ALICE, 1)
    assert (found.version, found.fallback) == (1, None)
    assert (found.ref.digest, found.ref.key, found.ref.weights_sha256) == (
        upload(1).digest,
        "default/1",
        upload(1).weights_sha256,
    )
    assert (found.ref.tenant, found.ref.size_bytes, found.ref.rank) == ("default", 101, 8)
    assert record.metadata == {"run": 1}
    assert (record.target_modules, record.warnings) == (("q_proj", "v_proj"), ("odd",))


def test_the_digest_of_the_newest_version_changes_nothing(catalog: Catalog) -> None:
    first = catalog.add_version(ALICE, upload(1), promote=True)
    again = catalog.add_version(ALICE, upload(1, key="other"), promote=False)
    assert (again.created, again.record) == (False, first.record)
    assert len(catalog.versions(ALICE, after=None, limit=10)) == 1


def test_the_digest_of_an_older_version_is_a_new_version(catalog: Catalog) -> None:
    for number, key in ((1, "a"), (2, "b"), (1, "c")):
        catalog.add_version(ALICE, upload(number, key), promote=True)
    assert [record.version for record in catalog.versions(ALICE, after=None, limit=10)] == [3, 2, 1]
    assert catalog.live(ALICE).ref.key == "c"


def test_an_upload_without_promote_stays_behind_the_live_one(catalog: Catalog) -> None:
    catalog.add_version(ALICE, upload(1), promote=True)
    record, _ = catalog.add_version(ALICE, upload(2), promote=False)
    assert not record.live
    assert catalog.live(ALICE).version == 1
    assert catalog.numbered(ALICE, 2).ref.digest == upload(2).digest
    newest = catalog.answered(ALICE, upload(2).digest)
    assert newest is not None
    assert (newest.record.version, newest.created) == (2, False)


def test_promote_is_one_commit_with_its_history(catalog: Catalog, tmp_path: Path) -> None:
    for number in (1, 2):
        catalog.add_version(ALICE, upload(number), promote=number == 1)
    assert catalog.promote(ALICE, 2, if_live=1).live
    catalog.promote(ALICE, 2)  # already live: no entry
    catalog.promote(ALICE, 1)
    with sqlite3.connect(tmp_path / "catalog.db") as connection:
        history = connection.execute("SELECT version FROM live_history ORDER BY entry_id").fetchall()
    connection.close()
    assert history == [(1,), (2,), (1,)]
    assert [record.live for record in catalog.versions(ALICE, after=None, limit=10)] == [False, True]


def test_promote_with_another_live_version_is_a_conflict(catalog: Catalog) -> None:
    for number in (1, 2):
        catalog.add_version(ALICE, upload(number), promote=True)
    with pytest.raises(AdapterConflict, match="version 2 of 'alice' is live, not 1") as refusal:
        catalog.promote(ALICE, 1, if_live=1)
    assert refusal.value.code == "live_version_changed"
    assert catalog.live(ALICE).version == 2


def test_what_is_not_there_is_not_found_with_what_to_do(catalog: Catalog) -> None:
    with pytest.raises(AdapterNotFound, match="tunefleet adapters push alice DIR"):
        catalog.live(ALICE)
    catalog.add_version(ALICE, upload(1), promote=False)
    with pytest.raises(AdapterNotFound, match="none is live: promote"):
        catalog.live(ALICE)
    for call in (catalog.numbered, catalog.version, catalog.promote):
        with pytest.raises(AdapterNotFound, match="no version 2") as refusal:
            call(ALICE, 2)
        assert refusal.value.code == "adapter_not_found"
    with pytest.raises(AdapterNotFound) as missing:
        catalog.user("default", "nobody")
    assert missing.value.code == "user_not_found"


@pytest.mark.parametrize(
    "other",
    [
        ALICE._replace(tenant="other"),
        ALICE._replace(user_id="Alice"),
        ALICE._replace(user_id="alice1"),
        ALICE._replace(user_id="alic"),
        ALICE._replace(user_id="' OR 1=1 --"),
        ALICE._replace(name="work"),
        ALICE._replace(base="tiny@2"),
    ],
)
def test_tenants_users_names_and_bases_never_mix(catalog: Catalog, other: AdapterName) -> None:
    catalog.add_version(ALICE, upload(1), promote=True)
    with pytest.raises(AdapterNotFound):
        catalog.live(other)
    record, _ = catalog.add_version(other, upload(2), promote=True)
    assert record.version == 1
    assert catalog.live(ALICE).ref.digest == upload(1).digest
    assert catalog.live(other).ref.digest == upload(2).digest


def test_a_users_own_fallback_is_told_found_or_not(catalog: Catalog, tmp_path: Path) -> None:
    catalog.add_version(ALICE, upload(1), promote=True)
    with sqlite3.connect(tmp_path / "catalog.db") as connection:
        connection.execute("UPDATE users SET fallback = 'base'")
    connection.close()
    assert catalog.live(ALICE).fallback == "base"
    with pytest.raises(AdapterNotFound) as refusal:
        catalog.live(ALICE._replace(name="work"))
    assert refusal.value.fallback == "base"


def test_pages_go_by_cursor(catalog: Catalog) -> None:
    for number in range(5):
        catalog.add_version(ALICE, upload(number), promote=True)
        catalog.add_version(ALICE._replace(user_id=f"u{number}"), upload(number, f"u{number}"), promote=True)
    catalog.add_version(ALICE._replace(user_id="u1", name="work"), upload(9), promote=True)
    assert [record.version for record in catalog.versions(ALICE, after=4, limit=2)] == [3, 2]
    page = catalog.users("default", after="alice", limit=2)
    assert [(user.user_id, user.num_adapters) for user in page] == [("u0", 1), ("u1", 2)]
    assert catalog.users("default", after="u4", limit=2) == []
    assert catalog.users("other", after=None, limit=2) == []
    assert catalog.user("default", "u1").num_adapters == 2


def test_a_lookup_uses_unique_indexes_only(catalog: Catalog, tmp_path: Path) -> None:
    query = str(_LIVE.compile(catalog._database.engine))
    with sqlite3.connect(tmp_path / "catalog.db") as connection:
        plan = connection.execute(f"EXPLAIN QUERY PLAN {query}", ("x",) * query.count("?")).fetchall()
    connection.close()
    steps = [row[3] for row in plan]
    assert len(steps) == 3
    assert all(step.startswith("SEARCH") and "INDEX" in step for step in steps), steps


def test_a_catalog_is_what_the_last_process_left(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/new/folder/catalog.db"
    for expected in (1, 2):
        catalog = Catalog(url)
        record, _ = catalog.add_version(ALICE, upload(expected), promote=True)
        catalog.close()
        assert record.version == expected


def test_threads_that_upload_at_once_get_a_number_each(catalog: Catalog) -> None:
    def add(number: int) -> None:
        catalog.add_version(ALICE, upload(number), promote=True)

    threads = [threading.Thread(target=add, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    records = catalog.versions(ALICE, after=None, limit=10)
    assert [record.version for record in records] == [8, 7, 6, 5, 4, 3, 2, 1]
    assert {record.digest for record in records} == {upload(number).digest for number in range(8)}


ADD_TEN = """
import sys
from test_catalog import ALICE, upload
from tunefleet.adapters_store.catalog import Catalog
sys.stdin.readline()
catalog = Catalog(sys.argv[1])
for number in range(int(sys.argv[2]), int(sys.argv[2]) + 10):
    catalog.add_version(ALICE, upload(number), promote=True)
catalog.close()
"""


def test_processes_that_start_and_upload_at_once_lose_nothing(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/catalog.db"
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command, firsts = [sys.executable, "-c", ADD_TEN, url], ("0", "100", "200")
    processes = [subprocess.Popen([*command, first], stdin=subprocess.PIPE, env=environ) for first in firsts]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.flush()
    for process in processes:
        process.communicate()
    assert [process.returncode for process in processes] == [0, 0, 0]
    catalog = Catalog(url)
    versions = [record.version for record in catalog.versions(ALICE, after=None, limit=100)]
    catalog.close()
    assert versions == list(range(30, 0, -1))
