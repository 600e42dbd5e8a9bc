"""The collector: what it removes, and what it must never."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from s3_servers import S3Server
from store_kit import Clock, adapter, keys, opened, put_all
from tunefleet.adapters_store.catalog import Catalog
from tunefleet.adapters_store.memory_store import MemoryStore
from tunefleet.adapters_store.objects import (
    Deleted,
    ListedObject,
    new_upload_id,
    object_prefix,
    open_store,
    staging_prefix,
)
from tunefleet.adapters_store.pushing import INTENT_S
from tunefleet.adapters_store.staged_uploads import TTL_S
from tunefleet.adapters_store.store import AdapterStore
from tunefleet.core import ADAPTER_FILES
from tunefleet.errors import AdapterNotFound

pytestmark = pytest.mark.anyio

DAY_S = 24 * 3600.0
LATER = "2027-01-01T00:00:00.000000Z"


def orphan(store: AdapterStore, source: Path, tenant: str = "default") -> list[str]:
    """Objects as a push leaves them that died before its commit, long ago."""
    prefix = object_prefix(tenant, "ab" + "0" * 62, new_upload_id())
    for file in ADAPTER_FILES:
        store.objects.put(f"{prefix}/{file}", source / file)
    return [f"{prefix}/{file}" for file in ADAPTER_FILES]


async def test_what_nothing_refers_to_goes_and_everything_else_stays(tmp_path: Path) -> None:
    clock = Clock()
    async with opened(tmp_path, MemoryStore(now=clock), clock=clock) as store:
        folder = adapter(tmp_path)
        await store.push("alice", folder)
        await store.push("bob", folder, tenant="acme")
        kept = keys(store)
        garbage = orphan(store, folder) + orphan(store, folder, "staging") + orphan(store, folder, "gone")
        late = f"{staging_prefix('default', new_upload_id())}/{ADAPTER_FILES[0]}"
        store.objects.put(late, folder / ADAPTER_FILES[0])
        clock.turn(DAY_S + 1)
        num_bytes = sum(found.size_bytes for found in store.objects.list("") if found.key not in kept)
        dry = await store.collect(min_age_s=DAY_S, dry_run=True)
        assert (len(garbage) + 1, num_bytes, ()) == dry
        assert len(kept) + len(garbage) + 1 == len(keys(store))
        assert dry == await store.collect(min_age_s=DAY_S)
        assert kept == keys(store)
        assert await store.collect(min_age_s=DAY_S) == (0, 0, ())


async def test_what_is_young_stays(tmp_path: Path) -> None:
    clock = Clock()
    async with opened(tmp_path, MemoryStore(now=clock), clock=clock) as store:
        garbage = orphan(store, adapter(tmp_path))
        clock.turn(DAY_S - 1)
        assert (await store.collect(min_age_s=DAY_S)).num_objects == 0
        assert garbage == keys(store)


@pytest.mark.parametrize(
    "key", ["README.md", "backups/catalog.db", "default/sha256/ab/x/y/z", "staging/default/not-an-id/file"]
)
async def test_what_is_none_of_ours_stays(tmp_path: Path, key: str) -> None:
    clock = Clock()
    async with opened(tmp_path, MemoryStore(now=clock), clock=clock) as store:
        store.objects.put(key, adapter(tmp_path) / ADAPTER_FILES[0])
        clock.turn(DAY_S)
        assert (await store.collect(min_age_s=0)).num_objects == 0
        assert [key] == keys(store)


async def test_files_of_an_upload_go_when_it_has_expired_and_not_before(tmp_path: Path) -> None:
    clock = Clock()
    async with opened(tmp_path, MemoryStore(now=clock), clock=clock) as store:
        ticket = await store.begin_upload("alice")
        await put_all(store, "alice", ticket, adapter(tmp_path))
        clock.turn(TTL_S - 1)
        assert (await store.collect(min_age_s=0)).num_objects == 0
        clock.turn(1)
        assert (await store.collect(min_age_s=0)).num_objects == 2
        assert keys(store) == []
        with pytest.raises(AdapterNotFound):
            await store.complete_upload("alice", ticket.upload_id)


class TickingStore(MemoryStore):
    """A second goes by whenever everything is listed; notes what the catalog says when it deletes."""

    def __init__(self, clock: Clock) -> None:
        super().__init__(now=clock)
        self.clock = clock
        self.on_delete = lambda: None

    def list(self, prefix: str) -> Iterator[ListedObject]:
        if not prefix:
            self.clock.turn(1)
        return super().list(prefix)

    def delete(self, key: str) -> Deleted:
        self.on_delete()
        return super().delete(key)


async def test_an_upload_that_expires_while_it_is_collected_is_ended_before_it_is_removed(
    tmp_path: Path,
) -> None:
    """A router whose clock is behind must not commit it any more."""
    clock = Clock()
    objects = TickingStore(clock)
    async with opened(tmp_path, objects, clock=clock) as store:
        ticket = await store.begin_upload("alice")
        await put_all(store, "alice", ticket, adapter(tmp_path))
        clock.turn(TTL_S - 1)
        extended: list[bool] = []
        catalog = Catalog(f"sqlite:///{tmp_path}/catalog.db", now=Clock())  # its clock stood still
        objects.on_delete = lambda: extended.append(catalog.extend_upload(ticket.upload_id, LATER))
        assert (await store.collect(min_age_s=0)).num_objects == 2
        assert extended == [False, False]
        catalog.close()


async def test_a_store_with_another_catalogs_mark_is_left_alone(tmp_path: Path) -> None:
    objects = MemoryStore()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    async with opened(tmp_path / "one", objects) as one, opened(tmp_path / "two", objects) as two:
        await one.push("alice", adapter(tmp_path))
        await two.push("bob", adapter(tmp_path))
        orphan(one, adapter(tmp_path))
        stored = keys(one)
        for store in (one, two):
            num_objects, _, kept = await store.collect(min_age_s=-1)
            assert num_objects == 0
            assert ["prefix of its own" in sentence for sentence in kept] == [True]
        assert stored == keys(one)
        named = kept[0].rpartition(" ")[2]  # the last one's message names the mark of the first
        objects.delete(next(found.key for found in objects.list("catalogs/") if found.key != named))
        assert (await one.collect(min_age_s=-1)).num_objects == 4  # bob's too: his catalog is said to be gone
        assert (await one.resolve("alice")).version == 1


async def test_uploads_and_deletions_beside_a_collector_that_never_rests(
    tmp_path: Path, database_url: str
) -> None:
    """In threads, without a minimal age: nothing that is acknowledged may lose an object."""
    objects, over = MemoryStore(), asyncio.Event()
    async with opened(tmp_path, objects, database_url=database_url) as store:
        folders = [adapter(tmp_path, seed) for seed in range(4)]

        async def collect() -> None:
            while not over.is_set():
                await store.collect(min_age_s=-1)

        async def work(user: str) -> None:
            for folder in folders:
                await store.push(user, folder)
                ticket = await store.begin_upload(user, name="work")
                await put_all(store, user, ticket, folder, name="work")
                await store.complete_upload(user, ticket.upload_id, name="work")
            await store.delete_version(user, 1)

        collecting = [asyncio.create_task(collect()) for _ in range(2)]
        users = [f"user{number}" for number in range(4)]
        try:
            await asyncio.gather(*(work(user) for user in users))
        finally:
            over.set()
        await asyncio.gather(*collecting)
        assert len(users) * (3 + 4) * 2 == len(keys(store))
        for user in users:
            for name, numbers in (("default", (2, 3, 4)), ("work", (1, 2, 3, 4))):
                for number in numbers:
                    for file in ADAPTER_FILES:
                        stored = await store.open_file(user, number, file, name=name)
                        assert stored.size_bytes == sum([len(chunk) async for chunk in stored])


@pytest.mark.s3
async def test_a_bucket_is_collected_page_by_page(
    tmp_path: Path, juicefs: S3Server, postgres_url: str
) -> None:
    objects = open_store(juicefs.url(juicefs.make_bucket(), "prod"))
    async with opened(tmp_path, objects, database_url=postgres_url) as store:
        folder = adapter(tmp_path)
        await store.push("alice", folder)
        kept = keys(store)
        for _ in range(3):
            orphan(store, folder)
        assert (await store.collect(min_age_s=INTENT_S)).num_objects == 0
        assert (await store.collect(min_age_s=-60)).num_objects == 6
        assert kept == keys(store)
