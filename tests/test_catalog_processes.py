"""Several threads and processes on one catalog, some of which die."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from catalog_kit import ALICE, BASE, at_once, push, upload
from tunefleet.adapters_store.catalog import AdapterName, Added, Catalog

ADD_TEN = """
import sys
from catalog_kit import ALICE, upload
from tunefleet.adapters_store.catalog import Catalog
sys.stdin.readline()
catalog = Catalog(sys.argv[1])
for number in range(int(sys.argv[2]), int(sys.argv[2]) + 10):
    catalog.add_version(ALICE, upload(number), promote=True)
catalog.close()
"""

PROMOTE = """
import sys
from catalog_kit import ALICE
from tunefleet.adapters_store.catalog import Catalog
from tunefleet.errors import AdapterConflict
catalog = Catalog(sys.argv[1])
print("ready", flush=True)
for line in sys.stdin:
    live = int(line)
    try:
        catalog.promote(ALICE, int(sys.argv[2]), if_live=live)
    except AdapterConflict:
        print("lost", flush=True)
    else:
        print("won", flush=True)
catalog.close()
"""

KILLED_EVERYWHERE = """
import os, signal, sys
from sqlalchemy import event
from catalog_kit import ALICE, begun, dump, push, upload
from tunefleet.adapters_store.catalog import Catalog

CHANGES = {
    "add": lambda catalog: catalog.add_version(ALICE, upload(9, "new"), promote=True, upload_id="u1"),
    "rollback": lambda catalog: catalog.rollback(ALICE),
    "delete": lambda catalog: catalog.delete_user("default", "alice"),
}

def opened(use):
    catalog = Catalog(sys.argv[1])
    try:
        return use(catalog)
    finally:
        catalog.close()

def prepare(catalog):
    push(catalog, ALICE, 1, 2)
    catalog.begin_upload(ALICE, begun(catalog, "u1", ttl_s=9999))

def change_until(catalog, change, step):
    left = [step]
    def die(*_):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
    event.listen(catalog._database.engine, "before_cursor_execute", die)
    event.listen(catalog._database.engine, "commit", die)
    CHANGES[change](catalog)

opened(prepare)
for change in CHANGES:
    before, step, status = opened(dump), 0, signal.SIGKILL
    while status == signal.SIGKILL:
        pid = os.fork()
        if pid == 0:
            opened(lambda catalog: change_until(catalog, change, step))
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        if status:
            assert opened(dump) == before, (change, step)
        step += 1
    assert status == 0
    assert opened(dump) != before
    print(change, step)
"""


def start(code: str, *arguments: str) -> subprocess.Popen[str]:
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ, text=True, bufsize=1
    )


def say(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def heard(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_two_uploads_at_once_for_a_new_user_are_two_versions(database_url: str) -> None:
    first, second = Catalog(database_url), Catalog(database_url)
    for number in range(5):
        adapter = AdapterName(f"tenant-{number}", "alice", "default", BASE)
        keys = [f"{number}/{side}" for side in (1, 2)]
        calls = [
            partial(catalog.add_version, adapter, upload(n, key), promote=True)
            for n, (catalog, key) in enumerate(zip((first, second), keys, strict=True))
        ]
        results = at_once(calls)
        added = [result for result in results if isinstance(result, Added)]
        assert sorted(each.record.version for each in added) == [1, 2], results
        assert first.live(adapter).version == 2
    for catalog in (first, second):
        catalog.close()


def test_threads_that_upload_at_once_get_a_number_each_without_a_gap(database_url: str) -> None:
    catalog = Catalog(database_url)
    results = at_once([partial(catalog.add_version, ALICE, upload(n), promote=True) for n in range(16)])
    numbers = [result.record.version for result in results if isinstance(result, Added)]
    records = catalog.versions(ALICE, after=None, limit=99)
    catalog.close()
    assert sorted(numbers) == list(range(1, 17))
    assert [record.version for record in records] == list(range(16, 0, -1))
    assert {record.digest for record in records} == {upload(number).digest for number in range(16)}


def test_processes_that_start_and_upload_at_once_lose_nothing(empty_database_url: str) -> None:
    processes = [start(ADD_TEN, empty_database_url, first) for first in ("0", "100", "200")]
    for process in processes:
        say(process, "go")
    for process in processes:
        process.communicate()
    assert [process.returncode for process in processes] == [0, 0, 0]
    catalog = Catalog(empty_database_url)
    versions = [record.version for record in catalog.versions(ALICE, after=None, limit=100)]
    catalog.close()
    assert versions == list(range(30, 0, -1))


def test_of_two_processes_that_promote_at_once_one_wins_and_all_see_it(database_url: str) -> None:
    catalog = Catalog(database_url)
    push(catalog, ALICE, 1, 2, 3)
    processes = [start(PROMOTE, database_url, version) for version in ("1", "2")]
    assert [heard(process) for process in processes] == ["ready"] * 2
    for _ in range(5):
        catalog.promote(ALICE, 3)
        for process in processes:
            say(process, "3")
        answers = [heard(process) for process in processes]
        assert sorted(answers) == ["lost", "won"]
        assert catalog.live(ALICE).version == answers.index("won") + 1  # on the next request
    for process in processes:
        process.communicate()
    catalog.close()


@pytest.mark.slow
def test_a_process_killed_anywhere_in_a_transaction_leaves_nothing_of_it(database_url: str) -> None:
    """Killed for real, before each statement and before the commit."""
    process = start(KILLED_EVERYWHERE, database_url)
    answer, _ = process.communicate()
    assert process.returncode == 0
    steps = dict(line.split() for line in answer.splitlines())
    assert {change: int(number) > 6 for change, number in steps.items()} == {
        "add": True,
        "rollback": True,
        "delete": True,
    }
