"""Deletions of versions and users, their receipts, and what goes on by itself."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from s3_servers import S3Server
from store_kit import Clock, NotedMachine, adapter, keys, opened, put_all
from tunefleet.adapters_store.deleting import CLAIM_S
from tunefleet.adapters_store.file_store import FileStore
from tunefleet.adapters_store.memory_store import MemoryStore
from tunefleet.adapters_store.objects import Deleted, open_store
from tunefleet.config import Options
from tunefleet.core import ADAPTER_FILES, WEIGHTS_FILE
from tunefleet.errors import AdapterConflict, AdapterNotFound, StoreError

pytestmark = pytest.mark.anyio


class StubbornStore(MemoryStore):
    """Deletes nothing while it is told not to."""

    def __init__(self) -> None:
        super().__init__()
        self.deletes = False

    def delete(self, key: str) -> Deleted:
        if not self.deletes:
            raise StoreError("out of order", code="store_unavailable")
        return super().delete(key)


async def test_a_version_goes_with_its_objects_and_the_receipt_says_so(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        first = (await store.push("alice", adapter(tmp_path, 1))).version
        await store.push("alice", adapter(tmp_path, 2))
        receipt = await store.delete_version("alice", 1)
        assert (receipt.status, receipt.user_id, receipt.name, receipt.version) == (
            "done",
            None,
            "default",
            1,
        )
        assert receipt.digests == (first.digest,)
        assert (receipt.removed["versions"], receipt.removed["objects"]) == (1, 2)
        assert receipt.kept == ()
        assert receipt.finished_at is not None
        assert receipt == await store.deletion(receipt.deletion_id)
        assert [version.version for version in await store.versions("alice")] == [2]
        assert len(keys(store)) == 2
        with pytest.raises(AdapterNotFound):
            await store.delete_version("alice", 1)


async def test_live_and_canary_versions_stay(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        for seed in (1, 2, 3):
            await store.push("alice", adapter(tmp_path, seed))
        await store.set_canary("alice", 1, 10)
        for version, code in ((3, "version_is_live"), (1, "version_is_canary")):
            with pytest.raises(AdapterConflict) as refusal:
                await store.delete_version("alice", version)
            assert refusal.value.code == code
        assert len(keys(store)) == 6


async def test_a_user_goes_with_adapters_uploads_and_objects_and_nobody_else(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.push("bob", adapter(tmp_path, 1))
        others = keys(store)
        await store.push("alice", adapter(tmp_path, 1))
        await store.push("alice", adapter(tmp_path, 2), name="work")
        ticket = await store.begin_upload("alice")
        await put_all(store, "alice", ticket, adapter(tmp_path, 3))
        receipt = await store.delete_user("alice")
        assert (receipt.status, receipt.user_id, receipt.name, receipt.version) == ("done", None, None, None)
        counts = {place: receipt.removed[place] for place in ("versions", "uploads", "objects")}
        assert counts == {"versions": 2, "uploads": 1, "objects": 6}
        assert others == keys(store)
        assert (await store.resolve("bob")).version == 1
        for call in (store.user("alice"), store.resolve("alice"), store.resolve("alice", name="work")):
            with pytest.raises(AdapterNotFound):
                await call
        with pytest.raises(AdapterNotFound):
            await store.complete_upload("alice", ticket.upload_id)


async def test_a_user_without_adapters_can_be_deleted_and_one_that_is_gone_cannot(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.update_user("alice", fallback="base")
        receipt = await store.delete_user("alice")
        assert (receipt.status, receipt.digests, receipt.removed["objects"]) == ("done", (), 0)
        with pytest.raises(AdapterNotFound) as refusal:
            await store.delete_user("alice")
        assert refusal.value.code == "user_not_found"
        assert receipt == await store.deletion(receipt.deletion_id)


async def test_a_receipt_is_the_tenants_own(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.push("alice", adapter(tmp_path), tenant="acme")
        receipt = await store.delete_user("alice", tenant="acme")
        assert receipt == await store.deletion(receipt.deletion_id, tenant="acme")
        for deletion_id in (receipt.deletion_id, "", "x", "0" * 36, "\0" * 36):
            with pytest.raises(AdapterNotFound) as refusal:
                await store.deletion(deletion_id)
            assert refusal.value.code == "deletion_not_found"


async def test_a_user_who_comes_back_begins_anew_and_is_left_alone(tmp_path: Path) -> None:
    objects, clock, folder = StubbornStore(), Clock(), adapter(tmp_path)
    async with opened(tmp_path, objects, clock=clock) as store:
        await store.push("alice", folder)
        pending = await store.delete_user("alice")
        assert (await store.push("alice", folder)).version.version == 1
        objects.deletes = True
        clock.turn(CLAIM_S)
        await store.watcher(NotedMachine()).remove()
        assert (await store.deletion(pending.deletion_id)).status == "done"
        ref = (await store.resolve("alice")).ref
        assert [f"{ref.key}/{file}" for file in ADAPTER_FILES] == keys(store)


async def test_a_store_that_fails_makes_a_pending_receipt_that_another_router_finishes(
    tmp_path: Path,
) -> None:
    objects, clock = StubbornStore(), Clock()
    async with (
        opened(tmp_path, objects, clock=clock) as store,
        opened(tmp_path, objects, clock=clock) as other,
    ):
        await store.push("alice", adapter(tmp_path))
        receipt = await store.delete_user("alice")
        assert (receipt.status, receipt.user_id, receipt.finished_at) == ("pending", "alice", None)
        with pytest.raises(AdapterNotFound):
            await store.resolve("alice")
        watch = other.watcher(NotedMachine())
        await watch.remove()  # the first one still claims it
        clock.turn(CLAIM_S)
        with pytest.raises(StoreError, match="out of order"):
            await watch.remove()
        objects.deletes = True
        clock.turn(CLAIM_S)
        await watch.remove()
        assert (await store.deletion(receipt.deletion_id)).status == "done"
        assert keys(store) == []


class PickyStore(StubbornStore):
    """Never deletes some keys."""

    def __init__(self) -> None:
        super().__init__()
        self.never: list[str] = []

    def delete(self, key: str) -> Deleted:
        if key in self.never:
            raise StoreError("denied", code="store_denied")
        return super().delete(key)


async def test_a_deletion_that_fails_keeps_none_of_the_others(tmp_path: Path) -> None:
    objects, clock = PickyStore(), Clock()
    async with opened(tmp_path, objects, clock=clock) as store:
        await store.push("alice", adapter(tmp_path, 1))
        objects.never = keys(store)
        await store.push("bob", adapter(tmp_path, 2))
        receipts = [await store.delete_user(user) for user in ("alice", "bob")]
        objects.deletes = True
        clock.turn(CLAIM_S)
        with pytest.raises(StoreError, match="denied"):
            await store.watcher(NotedMachine()).remove()
        found = [await store.deletion(receipt.deletion_id) for receipt in receipts]
        assert [receipt.status for receipt in found] == ["pending", "done"]
        assert objects.never == keys(store)


async def test_a_receipt_waits_for_every_living_router(tmp_path: Path) -> None:
    objects = MemoryStore()
    async with opened(tmp_path, objects) as store, opened(tmp_path, objects) as other:
        version = (await store.push("alice", adapter(tmp_path))).version
        machines = [NotedMachine(version.digest), NotedMachine(version.digest)]
        machines[1].streams["default", "alice"] = 3
        watches = [store.watcher(machines[0]), other.watcher(machines[1])]
        for watch in watches:
            await watch.round()
        deletion = asyncio.create_task(store.delete_user("alice"))
        while list(objects.list("default/")) or not machines[1].forgotten:
            await watches[1].tell()
        assert not deletion.done()
        while not deletion.done():
            await watches[1].tell()
            await watches[0].tell()
        receipt = await deletion
        counts = {place: receipt.removed[place] for place in ("disk", "host", "device", "streams")}
        assert counts == {"disk": 2, "host": 2, "device": 2, "streams": 3}
        assert receipt.status == "done"
        assert [set(), set()] == [machine.copies for machine in machines]


async def test_a_receipt_that_waits_too_long_is_pending_and_a_dead_router_is_named(tmp_path: Path) -> None:
    objects, clock = MemoryStore(), Clock()
    async with opened(tmp_path, objects, clock=clock, deletion_wait_s=0.01) as store:
        await store.push("alice", adapter(tmp_path))
        async with opened(tmp_path, objects, clock=clock) as dead:
            await dead.watcher(NotedMachine()).beat()
        receipt = await store.delete_user("alice")
        assert receipt.status == "pending"
        assert receipt.removed["objects"] == 2
        clock.turn(3600)
        await store.watcher(NotedMachine()).remove()
        finished = await store.deletion(receipt.deletion_id)
        assert (finished.status, len(finished.kept)) == ("done", 1)


DELETE = """
import asyncio, sys
from adapter_factory import make_manifest
from tunefleet.adapters_store.store import AdapterStore
from tunefleet.config import Options
async def main():
    store = AdapterStore.open(Options(store_url=sys.argv[1], cache_dir=sys.argv[2]), make_manifest())
    await store.delete_user("alice")
asyncio.run(main())
"""


@pytest.mark.parametrize("step", ["delete:marked", "delete:object-gone#3"])
async def test_a_deletion_goes_on_after_a_crash(tmp_path: Path, step: str) -> None:
    options = Options(store_url=(tmp_path / "store").as_uri(), cache_dir=str(tmp_path / "cache"))
    objects = FileStore(tmp_path / "store" / "objects")
    async with opened(tmp_path, objects, database_url=options.database_url) as store:
        for seed in (1, 2):
            await store.push("alice", adapter(tmp_path, seed))
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "TUNEFLEET_CRASH_AT": step}
    command = [sys.executable, "-c", DELETE, options.store_url, options.cache_dir]
    assert subprocess.run(command, env=environ).returncode == -signal.SIGKILL
    clock = Clock()
    clock.turn(100 * 365 * 24 * 3600)
    async with opened(tmp_path, objects, database_url=options.database_url, clock=clock) as store:
        assert await store.users() == []
        await store.watcher(NotedMachine()).round()
        assert keys(store) == []


@pytest.mark.s3
async def test_on_a_versioned_bucket_every_object_version_goes(
    tmp_path: Path, seaweedfs: S3Server, postgres_url: str
) -> None:
    bucket = seaweedfs.make_bucket(versioned=True)
    objects = open_store(seaweedfs.url(bucket))
    async with opened(tmp_path, objects, database_url=postgres_url) as store:
        folder = adapter(tmp_path)
        await store.push("alice", folder)
        objects.put(next(key for key in keys(store) if key.endswith(WEIGHTS_FILE)), folder / WEIGHTS_FILE)
        receipt = await store.delete_user("alice")
        assert (receipt.status, receipt.removed["objects"], receipt.kept) == ("done", 3, ())
        left = seaweedfs.client().list_objects(bucket, recursive=True, include_version=True)
        assert [each.object_name for each in left if "catalogs/" not in str(each.object_name)] == []


@pytest.mark.s3
async def test_urls_that_still_work_are_named_in_the_receipt(tmp_path: Path, juicefs: S3Server) -> None:
    objects = open_store(juicefs.url(juicefs.make_bucket()))
    async with opened(tmp_path, objects) as store:
        await store.begin_upload("alice")
        receipt = await store.delete_user("alice")
        assert receipt.status == "done"
        assert ["URLs" in sentence for sentence in receipt.kept] == [True]
