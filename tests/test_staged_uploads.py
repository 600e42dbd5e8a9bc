"""Uploads in three steps: begin, put, complete."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import urllib3

from s3_servers import S3Server
from store_kit import Clock, adapter, keys, opened, put_all
from tunefleet.adapters_store.memory_store import MemoryStore
from tunefleet.adapters_store.objects import open_store, staging_prefix
from tunefleet.adapters_store.staged_uploads import TTL_S
from tunefleet.adapters_store.store import AdapterStore
from tunefleet.core import ADAPTER_FILES, CONFIG_FILE, WEIGHTS_FILE, UploadTicket
from tunefleet.errors import AdapterError, AdapterInvalid, AdapterNotFound, RequestInvalid, StoreError

pytestmark = pytest.mark.anyio


async def begun(store: AdapterStore, folder: Path, user_id: str = "alice") -> UploadTicket:
    """An upload whose files are put."""
    ticket = await store.begin_upload(user_id)
    await put_all(store, user_id, ticket, folder)
    return ticket


async def test_files_that_were_put_become_a_version_and_leave_the_staging_place(tmp_path: Path) -> None:
    folder = adapter(tmp_path)
    async with opened(tmp_path) as store:
        ticket = await store.begin_upload("alice", metadata={"run": "42"})
        assert [file.url for file in ticket.files.values()] == [""] * 2
        assert list(ADAPTER_FILES) == list(ticket.files)
        await put_all(store, "alice", ticket, folder)
        assert [f"{staging_prefix('default', ticket.upload_id)}/{file}" for file in ADAPTER_FILES] == keys(
            store
        )
        version, created = await store.complete_upload("alice", ticket.upload_id)
        assert (created, version.version, version.live, version.metadata) == (True, 1, True, {"run": "42"})
        ref = (await store.resolve("alice")).ref
        assert [f"{ref.key}/{file}" for file in ADAPTER_FILES] == keys(store)
        stored = await store.open_file("alice", 1, WEIGHTS_FILE)
        assert (folder / WEIGHTS_FILE).read_bytes() == b"".join([chunk async for chunk in stored])


async def test_what_was_said_at_the_beginning_holds_at_the_end(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.push("alice", adapter(tmp_path, 1))
        ticket = await store.begin_upload("alice", promote=False)
        await put_all(store, "alice", ticket, adapter(tmp_path, 2))
        version = (await store.complete_upload("alice", ticket.upload_id)).version
        assert (version.version, version.live) == (2, False)
        assert (await store.resolve("alice")).version == 1


async def test_completed_again_it_answers_the_same_and_makes_no_second_version(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        ticket = await begun(store, adapter(tmp_path, 1))
        first = await store.complete_upload("alice", ticket.upload_id)
        await store.push("alice", adapter(tmp_path, 2))
        assert first == await store.complete_upload("alice", ticket.upload_id, idempotency_key="k1")
        assert [version.version for version in await store.versions("alice")] == [2, 1]
        assert len(keys(store)) == 4


async def test_completed_at_once_it_is_one_version(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        ticket = await begun(store, adapter(tmp_path))
        answers = await asyncio.gather(*(store.complete_upload("alice", ticket.upload_id) for _ in range(6)))
        assert [answers[0]] * 6 == answers
        assert answers[0].created
        assert len(await store.versions("alice")) == 1
        assert len(keys(store)) == 2


async def test_a_staged_file_that_changes_later_changes_nothing(tmp_path: Path) -> None:
    objects = MemoryStore()
    async with opened(tmp_path, objects) as store:
        ticket = await begun(store, adapter(tmp_path, 1))
        first = await store.complete_upload("alice", ticket.upload_id)
        late = f"{staging_prefix('default', ticket.upload_id)}/{WEIGHTS_FILE}"
        objects.replace(late, (adapter(tmp_path, 2) / WEIGHTS_FILE).read_bytes())
        assert first == await store.complete_upload("alice", ticket.upload_id)
        assert (await store.resolve("alice")).ref.digest == first.version.digest
        assert late not in keys(store)


class SwappingStore(MemoryStore):
    """A client that puts other weights the moment that the first ones were read."""

    def __init__(self, other: bytes) -> None:
        super().__init__()
        self.other = other

    def put(self, key: str, source: Path) -> None:
        if not key.startswith(("staging/", "catalogs/")):
            for staged in [found.key for found in self.list("staging/") if found.key.endswith(WEIGHTS_FILE)]:
                self.replace(staged, self.other)
        super().put(key, source)


async def test_what_was_checked_is_what_is_stored_whatever_is_staged_meanwhile(tmp_path: Path) -> None:
    first, other = adapter(tmp_path, 1), adapter(tmp_path, 2)
    async with opened(tmp_path, SwappingStore((other / WEIGHTS_FILE).read_bytes())) as store:
        ticket = await begun(store, first)
        await store.complete_upload("alice", ticket.upload_id)
        stored = await store.open_file("alice", 1, WEIGHTS_FILE)
        assert (first / WEIGHTS_FILE).read_bytes() == b"".join([chunk async for chunk in stored])


class RottenStore(MemoryStore):
    """Keeps other weights than it was given, but for those in the staging place."""

    def put(self, key: str, source: Path) -> None:
        super().put(key, source)
        if key.endswith(WEIGHTS_FILE) and not key.startswith("staging/"):
            content = bytearray(source.read_bytes())
            content[-1] ^= 1
            self.replace(key, bytes(content))


async def test_a_stored_copy_that_is_not_what_was_put_is_no_version(tmp_path: Path) -> None:
    async with opened(tmp_path, RottenStore()) as store:
        ticket = await begun(store, adapter(tmp_path))
        with pytest.raises(StoreError) as refusal:
            await store.complete_upload("alice", ticket.upload_id)
        assert refusal.value.code == "object_corrupt"
        with pytest.raises(AdapterNotFound):
            await store.resolve("alice")
        assert all(key.startswith("staging/") for key in keys(store))


@pytest.mark.parametrize("missing", ADAPTER_FILES)
async def test_a_file_that_was_not_put_is_named_and_can_still_come(tmp_path: Path, missing: str) -> None:
    folder = adapter(tmp_path)
    async with opened(tmp_path) as store:
        ticket = await store.begin_upload("alice")
        for file in set(ADAPTER_FILES) - {missing}:
            await store.put_file("alice", ticket.upload_id, file, folder / file)
        with pytest.raises(AdapterInvalid, match=f"{missing} was not put") as refusal:
            await store.complete_upload("alice", ticket.upload_id)
        assert (refusal.value.code, refusal.value.param) == ("missing_file", missing)
        await store.put_file("alice", ticket.upload_id, missing, folder / missing)
        assert (await store.complete_upload("alice", ticket.upload_id)).created


async def test_a_bad_file_can_be_replaced(tmp_path: Path) -> None:
    folder = adapter(tmp_path)
    bad = tmp_path / "bad"
    bad.write_text("{}")
    async with opened(tmp_path) as store:
        ticket = await begun(store, folder)
        await store.put_file("alice", ticket.upload_id, CONFIG_FILE, bad)
        with pytest.raises(AdapterInvalid):
            await store.complete_upload("alice", ticket.upload_id)
        await store.put_file("alice", ticket.upload_id, CONFIG_FILE, folder / CONFIG_FILE)
        assert (await store.complete_upload("alice", ticket.upload_id)).version.version == 1


async def test_a_file_over_the_limit_is_refused_when_it_is_put_and_when_it_was_put_elsewhere(
    tmp_path: Path,
) -> None:
    folder, objects = adapter(tmp_path), MemoryStore()
    size = (folder / WEIGHTS_FILE).stat().st_size
    async with opened(tmp_path, objects, max_upload_bytes=size - 1) as store:
        ticket = await store.begin_upload("alice")
        await store.put_file("alice", ticket.upload_id, CONFIG_FILE, folder / CONFIG_FILE)
        with pytest.raises(AdapterInvalid, match=f"larger than {size - 1} bytes"):
            await store.put_file("alice", ticket.upload_id, WEIGHTS_FILE, folder / WEIGHTS_FILE)
        objects.put(f"{staging_prefix('default', ticket.upload_id)}/{WEIGHTS_FILE}", folder / WEIGHTS_FILE)
        with pytest.raises(AdapterInvalid, match=f"larger than {size - 1} bytes") as refusal:
            await store.complete_upload("alice", ticket.upload_id)
        assert (refusal.value.code, refusal.value.param) == ("adapter_too_large", WEIGHTS_FILE)


async def test_an_upload_that_expired_is_not_there(tmp_path: Path) -> None:
    clock, folder = Clock(), adapter(tmp_path)
    async with opened(tmp_path, clock=clock) as store:
        ticket = await begun(store, folder)
        assert ticket.expires_at == "2026-01-01T00:15:00.000000Z"
        clock.turn(TTL_S)
        for call in (
            store.complete_upload("alice", ticket.upload_id),
            store.put_file("alice", ticket.upload_id, CONFIG_FILE, folder / CONFIG_FILE),
        ):
            with pytest.raises(AdapterNotFound, match="begin a new one") as refusal:
                await call
            assert refusal.value.code == "upload_not_found"


@pytest.mark.parametrize(
    "whose",
    [{"user_id": "bob"}, {"user_id": "alice", "tenant": "acme"}, {"user_id": "alice", "name": "work"}],
)
async def test_an_upload_of_somebody_else_is_not_there(tmp_path: Path, whose: dict[str, str]) -> None:
    async with opened(tmp_path) as store:
        ticket = await begun(store, adapter(tmp_path))
        stored = keys(store)
        with pytest.raises(AdapterNotFound) as refusal:
            await store.complete_upload(upload_id=ticket.upload_id, **whose)
        assert refusal.value.code == "upload_not_found"
        with pytest.raises(AdapterNotFound):
            await store.put_file(
                upload_id=ticket.upload_id, file=CONFIG_FILE, path=adapter(tmp_path) / CONFIG_FILE, **whose
            )
        assert stored == keys(store)


@pytest.mark.parametrize(
    "upload_id", ["", "x", "../x", "0" * 32, "0" * 31 + "\0", "x" * 10_000, "A" * 32, "é"]
)
async def test_an_upload_id_that_was_never_given_is_not_there(tmp_path: Path, upload_id: str) -> None:
    async with opened(tmp_path) as store:
        await store.push("alice", adapter(tmp_path))
        with pytest.raises(AdapterNotFound) as refusal:
            await store.complete_upload("alice", upload_id)
        assert refusal.value.code == "upload_not_found"


async def test_a_push_under_way_is_no_upload_to_complete(tmp_path: Path) -> None:
    objects = MemoryStore()
    async with opened(tmp_path, objects) as store:
        await store.push("alice", adapter(tmp_path))
        upload_id = keys(store)[0].split("/")[-2]
        with pytest.raises(AdapterNotFound):
            await store.complete_upload("alice", upload_id)


@pytest.mark.parametrize("file", ["", "README.md", "../x", "adapter_config.json/", "ADAPTER_CONFIG.JSON"])
async def test_other_files_than_the_two_are_refused(tmp_path: Path, file: str) -> None:
    async with opened(tmp_path) as store:
        ticket = await store.begin_upload("alice")
        with pytest.raises(AdapterNotFound) as refusal:
            await store.put_file("alice", ticket.upload_id, file, adapter(tmp_path) / CONFIG_FILE)
        assert refusal.value.code == "file_not_found"


@pytest.mark.parametrize("ttl_s", [0, -1, 3601, True])
async def test_a_time_to_live_out_of_range_is_refused(tmp_path: Path, ttl_s: int) -> None:
    async with opened(tmp_path) as store:
        with pytest.raises(RequestInvalid) as refusal:
            await store.begin_upload("alice", ttl_s=ttl_s)
        assert (refusal.value.code, refusal.value.param) == ("invalid_ttl", "ttl_s")


class LateStore(MemoryStore):
    """Deletes the user while a file is being staged."""

    def __init__(self) -> None:
        super().__init__()
        self.during = lambda: None

    def put(self, key: str, source: Path) -> None:
        if key.startswith("staging/"):
            self.during()
        super().put(key, source)


async def test_a_file_that_comes_after_its_user_was_deleted_does_not_stay(tmp_path: Path) -> None:
    objects = LateStore()
    async with opened(tmp_path, objects) as store:
        ticket = await store.begin_upload("alice")
        loop = asyncio.get_running_loop()
        objects.during = lambda: asyncio.run_coroutine_threadsafe(store.delete_user("alice"), loop).result(30)
        with pytest.raises(AdapterNotFound) as refusal:
            await store.put_file("alice", ticket.upload_id, CONFIG_FILE, adapter(tmp_path) / CONFIG_FILE)
        assert refusal.value.code == "upload_not_found"
        assert keys(store) == []


def put_to(ticket: UploadTicket, file: str, body: bytes, **headers: str) -> int:
    """As a client does it: the request that the ticket says."""
    asked = ticket.files[file]
    answer = urllib3.PoolManager().request(
        asked.method, asked.url, body=body, headers={**asked.headers, **headers}, retries=False
    )
    return answer.status


@pytest.mark.s3
async def test_files_put_to_the_stores_own_urls_become_a_version(
    tmp_path: Path, juicefs: S3Server, postgres_url: str
) -> None:
    folder = adapter(tmp_path)
    objects = open_store(juicefs.url(juicefs.make_bucket(), "prod"))
    async with opened(tmp_path, objects, database_url=postgres_url) as store:
        ticket = await store.begin_upload("alice")
        for file in ADAPTER_FILES:
            assert put_to(ticket, file, (folder / file).read_bytes()) == 200
        with pytest.raises(AdapterError):
            await store.complete_upload("bob", ticket.upload_id)
        first, *others = await asyncio.gather(
            *(store.complete_upload("alice", ticket.upload_id) for _ in range(3))
        )
        assert [first] * 2 == others
        assert put_to(ticket, WEIGHTS_FILE, b"other bytes") == 200  # its URL still works, for nothing
        assert first == await store.complete_upload("alice", ticket.upload_id)
        stored = await store.open_file("alice", 1, WEIGHTS_FILE)
        assert (folder / WEIGHTS_FILE).read_bytes() == b"".join([chunk async for chunk in stored])
        assert len(keys(store)) == 2


@pytest.mark.s3
async def test_a_url_puts_one_file_in_one_place(tmp_path: Path, juicefs: S3Server) -> None:
    objects = open_store(juicefs.url(juicefs.make_bucket(), "prod"))
    async with opened(tmp_path, objects) as store:
        ticket = await store.begin_upload("alice")
        url = ticket.files[CONFIG_FILE].url
        moved = url.replace(ticket.upload_id, "0" * 32)
        assert urllib3.PoolManager().request("PUT", moved, body=b"{}", retries=False).status == 403
        assert keys(store) == []
