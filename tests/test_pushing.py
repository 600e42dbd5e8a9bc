"""Pushes against the collector, deletions, lost answers and crashes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from store_kit import MANIFEST, Clock, adapter, keys, opened
from tunefleet.adapters_store.catalog import Catalog
from tunefleet.adapters_store.file_store import FileStore
from tunefleet.adapters_store.memory_store import MemoryStore
from tunefleet.adapters_store.pushing import INTENT_S
from tunefleet.adapters_store.records import Added
from tunefleet.adapters_store.store import AdapterStore
from tunefleet.config import Options
from tunefleet.core import ADAPTER_FILES
from tunefleet.errors import AdapterConflict, AdapterNotFound, StoreError

pytestmark = pytest.mark.anyio


class GatedStore(MemoryStore):
    """Holds the put of a weights file until the test lets it go."""

    def __init__(self) -> None:
        super().__init__()
        self.arrived = threading.Event()
        self.go = threading.Event()

    def put(self, key: str, source: Path) -> None:
        if key.endswith(ADAPTER_FILES[1]):
            self.arrived.set()
            assert self.go.wait(30)
        super().put(key, source)


async def gated_push(store: AdapterStore, folder: Path, objects: GatedStore) -> asyncio.Task[object]:
    """A push that is in the middle of its second object."""
    push: asyncio.Task[object] = asyncio.create_task(store.push("alice", folder))  # type: ignore[arg-type]
    await asyncio.to_thread(objects.arrived.wait, 30)
    return push


async def test_a_collector_leaves_a_push_under_way_alone(tmp_path: Path) -> None:
    objects = GatedStore()
    async with opened(tmp_path, objects) as store:
        push = await gated_push(store, adapter(tmp_path), objects)
        assert (await store.collect(min_age_s=-1)).num_objects == 0
        objects.go.set()
        await push
        assert (await store.resolve("alice")).version == 1
        assert len(keys(store)) == 2


async def test_a_push_whose_intent_was_collected_fails_and_leaves_nothing(tmp_path: Path) -> None:
    clock, objects = Clock(), GatedStore()
    async with opened(tmp_path, objects, clock=clock) as store:
        push = await gated_push(store, adapter(tmp_path), objects)
        clock.turn(INTENT_S + 1)
        assert (await store.collect(min_age_s=-(10**9))).num_objects == 1
        objects.go.set()
        with pytest.raises(AdapterConflict, match="upload again") as refusal:
            await push
        assert refusal.value.code == "upload_expired"
        assert keys(store) == []


async def test_a_user_deleted_during_a_push_stays_deleted(tmp_path: Path) -> None:
    objects = GatedStore()
    async with opened(tmp_path, objects) as store:
        push = await gated_push(store, adapter(tmp_path), objects)
        receipt = await store.delete_user("alice")
        assert (receipt.status, receipt.removed["uploads"], receipt.removed["objects"]) == ("done", 1, 1)
        objects.go.set()
        with pytest.raises(AdapterConflict) as refusal:
            await push
        assert refusal.value.code == "upload_expired"
        assert keys(store) == []
        with pytest.raises(AdapterNotFound):
            await store.user("alice")


class ForgetfulCatalog(Catalog):
    """Commits and loses the answer, as a network may."""

    def add_version(self, *args: object, **more: object) -> Added:
        super().add_version(*args, **more)  # type: ignore[arg-type]
        raise StoreError("connection lost", code="catalog_unavailable")


async def test_objects_stay_when_the_answer_to_their_commit_is_lost(tmp_path: Path) -> None:
    store = AdapterStore(
        MemoryStore(),
        ForgetfulCatalog(f"sqlite:///{tmp_path}/catalog.db"),
        MANIFEST,
        staging=tmp_path / "staging",
        max_rank=64,
        max_upload_bytes=10**6,
    )
    with pytest.raises(StoreError, match="connection lost"):
        await store.push("alice", adapter(tmp_path))
    ref = (await store.resolve("alice")).ref
    assert [f"{ref.key}/{file}" for file in ADAPTER_FILES] == keys(store)
    await store.close()


async def test_a_long_put_keeps_its_intent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extended = threading.Event()

    class Watched(Catalog):
        def extend_upload(self, upload_id: str, expires_at: str) -> bool:
            done = super().extend_upload(upload_id, expires_at)
            objects.go.set()
            extended.set()
            return done

    monkeypatch.setattr("tunefleet.adapters_store.pushing.EXTEND_S", 0.01)
    objects = GatedStore()
    store = AdapterStore(
        objects,
        Watched(f"sqlite:///{tmp_path}/catalog.db"),
        MANIFEST,
        staging=tmp_path / "staging",
        max_rank=64,
        max_upload_bytes=10**6,
    )
    assert (await store.push("alice", adapter(tmp_path))).created
    assert extended.is_set()
    await store.close()


PUSH = """
import asyncio, sys
from pathlib import Path
from adapter_factory import make_manifest
from tunefleet.adapters_store.store import AdapterStore
from tunefleet.config import Options
async def main():
    store = AdapterStore.open(Options(store_url=sys.argv[1], cache_dir=sys.argv[2]), make_manifest())
    print((await store.push("alice", Path(sys.argv[3]))).version.version)
asyncio.run(main())
"""


@pytest.mark.parametrize(
    ("step", "num_objects", "is_there"),
    [
        ("upload:weights-put", 2, False),
        ("upload:committed", 2, True),
    ],
)
async def test_a_push_that_dies_leaves_a_version_or_garbage(
    tmp_path: Path, step: str, num_objects: int, is_there: bool
) -> None:
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "TUNEFLEET_CRASH_AT": step}
    url, cache = (tmp_path / "store").as_uri(), str(tmp_path / "cache")
    command = [sys.executable, "-c", PUSH, url, cache, str(adapter(tmp_path))]
    assert subprocess.run(command, env=environ).returncode == -signal.SIGKILL
    options = Options(store_url=url, cache_dir=cache)
    catalog, clock = options.database_url, Clock()
    async with opened(tmp_path, FileStore(tmp_path / "store" / "objects"), database_url=catalog) as store:
        assert num_objects == len(keys(store))
        assert (await store.collect(min_age_s=-1)).num_objects == 0  # its intent has not expired
    clock.turn(100 * 365 * 24 * 3600)
    async with opened(
        tmp_path, FileStore(tmp_path / "store" / "objects"), database_url=catalog, clock=clock
    ) as store:
        collected = await store.collect(min_age_s=0)
        assert (num_objects if not is_there else 0) == collected.num_objects
        assert (2 if is_there else 0) == len(keys(store))
        assert (await store.push("alice", adapter(tmp_path))).version.version == 1
