"""What a router does until it dies: operations, each of which is one step from a state to the next.

``acknowledge`` follows each operation, as an answer to a client would. The world is what was there before.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import urllib3

from crashes.places import Place
from tunefleet.adapters_store.objects import ObjectStore, new_upload_id, object_prefix, open_store
from tunefleet.adapters_store.store import AdapterStore
from tunefleet.core import ADAPTER_FILES, WEIGHTS_FILE, UploadTicket
from tunefleet.errors import AdapterConflict, StoreError

ALICE, BOB, ACME = "alice@example.com", "bob@example.com", "acme"
HOUR_S = 3600.0
NUM_ROUNDS = 2  # of a watch until all is done: objects first, then this machine's word

Acknowledge = Callable[[], Awaitable[None]]
Scenario = Callable[[Place, Acknowledge, float], Awaitable[None]]


async def world(place: Place, acknowledge: Acknowledge, offset_s: float) -> None:
    """Two tenants with the same user ids, bytes that two users have, history, garbage, a begun upload."""
    async with place.opened(offset_s=offset_s) as store:
        for tenant in ("default", ACME):
            await _live_3_then_2_then_3(place, store, tenant)
            await store.push(BOB, place.adapter(1), tenant=tenant)
            await store.push(BOB, place.adapter(2), tenant=tenant)
        await store.push(ALICE, place.adapter(4), promote=False)
        await store.set_canary(ALICE, 1, 10, tenant=ACME)
        await store.set_pin(ALICE, "host", tenant=ACME)
        ticket = await store.begin_upload(ALICE)
        for file in ADAPTER_FILES:
            await store.put_file(ALICE, ticket.upload_id, file, place.adapter(5) / file)
        for tenant in ("default", "gone"):
            prefix = object_prefix(tenant, "ab" * 32, new_upload_id())
            for file in ADAPTER_FILES:
                store.objects.put(f"{prefix}/{file}", place.adapter(0) / file)
        for number in (1, 2, 3, 4):
            place.machine.fetch((await store.version(ALICE, number)).digest)


async def _live_3_then_2_then_3(place: Place, store: AdapterStore, tenant: str) -> None:
    for number in (1, 2, 3):
        await store.push(ALICE, place.adapter(number), tenant=tenant, metadata={"run": number})
    await store.rollback(ALICE, tenant=tenant)
    await store.promote(ALICE, 3, tenant=tenant)
    await store.push(ALICE, place.adapter(4), name="work", tenant=tenant)
    await store.update_user(ALICE, fallback="base", tenant=tenant)


async def upload(place: Place, acknowledge: Acknowledge, offset_s: float) -> None:
    async with place.opened(offset_s=offset_s) as store:
        for folder, promote in (
            (place.adapter(5), True),
            (place.adapter(5), True),
            (place.adapter(1), False),
        ):
            key = f"key-{folder.name}"
            await store.push(ALICE, folder, promote=promote, idempotency_key=key)
            await acknowledge()


async def first_upload(place: Place, acknowledge: Acknowledge, offset_s: float) -> None:
    """Of a user, of whom nothing may be there without it."""
    async with place.opened(offset_s=offset_s) as store:
        await store.push("carol@example.com", place.adapter(1), tenant="new")
        await acknowledge()


async def refused_upload(place: Place, acknowledge: Acknowledge, offset_s: float) -> None:
    def refuse() -> None:
        raise StoreError("out of order")

    async with place.opened(Interrupted(open_store(place.store_url), refuse), offset_s=offset_s) as store:
        try:
            await store.push(ALICE, place.adapter(5))
        except StoreError:
            await acknowledge()


async def deleted_while_uploading(place: Place, acknowledge: Acknowledge, offset_s: float) -> None:
    async def delete() -> None:
        async with place.opened(offset_s=offset_s) as store:
            await store.delete_user(ALICE)
            await acknowledge()

    objects = Interrupted(open_store(place.store_url), lambda: asyncio.run(delete()))
    async with place.opened(objects, offset_s=offset_s) as store:
        try:
            await store.push(ALICE, place.adapter(5))
        except AdapterConflict:
            await acknowledge()


async def uploaded_by_two(place: Place, acknowledge: Acknowledge, offset_s: float) -> None:
    """The same bytes at once: one of them makes the version, the other's objects go."""

    async def push() -> None:
        async with place.opened(offset_s=offset_s) as store:
            await store.push(ALICE, place.adapter(5))
            await acknowledge()

    objects = Interrupted(open_store(place.store_url), lambda: asyncio.run(push()))
    async with place.opened(objects, offset_s=offset_s) as store:
        assert not (await store.push(ALICE, place.adapter(5))).created
        await acknowledge()


async def upload_in_steps(place: Place, acknowledge: Acknowledge, offset_s: float) -> None:
    async with place.opened(offset_s=offset_s) as store:
        ticket = await store.begin_upload(ALICE, metadata={"run": 5})
        await acknowledge()
        for file in ADAPTER_FILES:
            await _put(store, ticket, file, place.adapter(5) / file)
            await acknowledge()
        await store.complete_upload(ALICE, ticket.upload_id)
        await acknowledge()
        await store.complete_upload(ALICE, ticket.upload_id)
        await acknowledge()


async def _put(store: AdapterStore, ticket: UploadTicket, file: str, path: Path) -> None:
    """To its URL, as a client does; through the router where the store has none."""
    put = ticket.files[file]
    if not put.url:
        return await store.put_file(ALICE, ticket.upload_id, file, path)
    with urllib3.PoolManager() as pool:
        response = pool.request(put.method, put.url, body=path.read_bytes(), headers=put.headers)
    assert response.status == 200
    return None


async def promote(place: Place, acknowledge: Acknowledge, offset_s: float) -> None:
    async with place.opened(offset_s=offset_s) as store:
        for version, live in ((4, 3), (1, 4), (4, None)):
            await store.promote(ALICE, version, if_live=live)
            await acknowledge()


async def rollback(place: Place, acknowledge: Acknowledge, offset_s: float) -> None:
    async with place.opened(offset_s=offset_s) as store:
        for to in (None, None, 3):
            await store.rollback(ALICE, to=to)
            await acknowledge()


async def canary(place: Place, acknowledge: Acknowledge, offset_s: float) -> None:
    async with place.opened(offset_s=offset_s) as store:
        for change in (
            lambda: store.set_canary(ALICE, 4, 20),
            lambda: store.set_canary(ALICE, 1, 50),
            lambda: store.promote(ALICE, 1),  # which ends it
            lambda: store.set_canary(ALICE, 4, 100),
            lambda: store.clear_canary(ALICE),
        ):
            await change()
            await acknowledge()


async def pin(place: Place, acknowledge: Acknowledge, offset_s: float) -> None:
    async with place.opened(offset_s=offset_s) as store:
        await store.set_pin(ALICE, "disk")
        await acknowledge()
        await store.clear_pin(ALICE)
        await acknowledge()


async def delete_version(place: Place, acknowledge: Acknowledge, offset_s: float) -> None:
    async with place.opened(offset_s=offset_s) as store:
        for version in (1, 4):
            await store.delete_version(ALICE, version)
            await acknowledge()


async def delete_user(place: Place, acknowledge: Acknowledge, offset_s: float) -> None:
    async with place.opened(offset_s=offset_s) as store:
        await store.delete_user(ALICE)
        await acknowledge()


async def finish_anothers_deletion(place: Place, acknowledge: Acknowledge, offset_s: float) -> None:
    """A router that serves goes on with what another one only began."""
    async with place.opened(offset_s=offset_s) as store:
        watch = store.watcher(place.machine)
        await watch.beat()
        catalog = place.catalog(offset_s)
        catalog.delete_user("default", ALICE)
        catalog.close()
        await acknowledge()
        for _ in range(NUM_ROUNDS):
            await watch.round()
        await acknowledge()


async def collect(place: Place, acknowledge: Acknowledge, offset_s: float) -> None:
    async with place.opened(offset_s=offset_s + 2 * HOUR_S) as store:
        assert (await store.collect(min_age_s=0)).num_objects == 6
        await acknowledge()


async def restart(place: Place, acknowledge: Acknowledge, offset_s: float) -> None:
    """What a router does after its start until nothing is left to do, at a time when all leases are over."""
    async with place.opened(offset_s=offset_s) as store:
        watch = store.watcher(place.machine)
        for _ in range(NUM_ROUNDS):
            await watch.round()
        await store.collect(min_age_s=0)


class Interrupted:
    """Objects of which the first weights are put after something else has happened."""

    def __init__(self, objects: ObjectStore, interrupt: Callable[[], None]) -> None:
        self._objects = objects
        self._interrupt: Callable[[], None] | None = interrupt
        for name in ("open", "delete", "list", "presign_put", "close"):
            setattr(self, name, getattr(objects, name))

    def put(self, key: str, source: Path) -> None:
        if key.endswith(WEIGHTS_FILE) and self._interrupt is not None:
            interrupt, self._interrupt = self._interrupt, None
            interrupt()
        self._objects.put(key, source)


SCENARIOS: dict[str, Scenario] = {
    scenario.__name__: scenario
    for scenario in (
        upload,
        first_upload,
        refused_upload,
        deleted_while_uploading,
        uploaded_by_two,
        upload_in_steps,
        promote,
        rollback,
        canary,
        pin,
        delete_version,
        delete_user,
        finish_anothers_deletion,
        collect,
    )
}
OTHERS: dict[str, Scenario] = {"world": world, "restart": restart}
