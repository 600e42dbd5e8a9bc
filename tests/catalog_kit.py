"""What tests of the catalog share: names, uploads, a clock to set, rows to look at."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta

from sqlalchemy import Connection, select

from tunefleet.adapters_store import schema
from tunefleet.adapters_store.catalog import AdapterName, Catalog, NewVersion, UploadRecord

BASE = "tiny@1"
ALICE = AdapterName("default", "alice", "default", BASE)
NOON = datetime(2026, 11, 24, 12, 0, 0, 5, tzinfo=UTC)


class Clock:
    """Stands still until it is moved, forwards or back."""

    def __init__(self) -> None:
        self.at = NOON

    def __call__(self) -> datetime:
        return self.at

    def move(self, seconds: float) -> None:
        self.at += timedelta(seconds=seconds)


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


def begun(catalog: Catalog, upload_id: str, *, ttl_s: float = 60.0) -> UploadRecord:
    return UploadRecord(
        upload_id=upload_id,
        object_key=f"staging/default/{upload_id}",
        kind="staged",
        promote=True,
        metadata={"run": 1},
        created_at=catalog.timestamp(),
        expires_at=catalog.timestamp(ttl_s),
    )


def push(catalog: Catalog, adapter: AdapterName, *numbers: int) -> None:
    """Uploads that become live one after another."""
    for number in numbers:
        key = "/".join((*adapter, str(number)))
        catalog.add_version(adapter, upload(number, key), promote=True)


def rows(catalog: Catalog, table: str) -> list[tuple[object, ...]]:
    """All of a table, in the order of its primary key."""
    found = schema.metadata.tables[table]

    def look(connection: Connection) -> list[tuple[object, ...]]:
        return [tuple(row) for row in connection.execute(select(found).order_by(*found.primary_key))]

    return catalog._database.read(look)


def dump(catalog: Catalog) -> str:
    """Everything in the database, as text."""
    return "\n".join(f"{table}: {rows(catalog, table)}" for table in schema.metadata.tables)


def at_once(calls: Sequence[Callable[[], object]]) -> list[object]:
    """Runs calls in threads that start together; results or exceptions, in order."""
    results: list[object] = [None] * len(calls)
    barrier = threading.Barrier(len(calls))

    def run(index: int) -> None:
        barrier.wait()
        try:
            results[index] = calls[index]()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
