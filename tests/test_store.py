from __future__ import annotations

import asyncio
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from adapter_factory import write_config
from store_kit import MANIFEST, adapter, keys, opened
from tunefleet.adapters_store.arguments import check_metadata
from tunefleet.adapters_store.memory_store import MemoryStore
from tunefleet.adapters_store.objects import StoredObject
from tunefleet.adapters_store.store import AdapterStore
from tunefleet.config import Options
from tunefleet.core import ADAPTER_FILES
from tunefleet.errors import AdapterConflict, AdapterInvalid, AdapterNotFound, RequestInvalid, StoreError

pytestmark = pytest.mark.anyio


class BrokenStore(MemoryStore):
    """Takes so many puts, then fails."""

    def __init__(self, num_puts: int) -> None:
        super().__init__()
        self.num_puts = num_puts

    def put(self, key: str, source: Path) -> None:
        if not self.num_puts:
            raise StoreError("out of order")
        self.num_puts -= 1
        super().put(key, source)


class LyingStore(MemoryStore):
    """Gives other bytes than it got."""

    def open(
        self, key: str, *, start: int = 0, length: int | None = None, etag: str | None = None
    ) -> StoredObject:
        stored = super().open(key, start=start, length=length, etag=etag)
        content = bytearray(stored.stream.read())
        content[-1] ^= 1
        return StoredObject(type(stored.stream)(bytes(content)), stored.size_bytes)  # type: ignore[call-arg]


async def test_a_push_answers_as_the_contract_says_and_is_live_at_once(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        version, created = await store.push("alice", adapter(tmp_path), metadata={"run": "42"})
        assert created
        assert (version.user_id, version.name, version.version, version.live) == ("alice", "default", 1, True)
        assert (version.base, version.rank) == (MANIFEST.base_id, 4)
        assert version.target_modules == ("down_proj", "q_proj", "v_proj")
        assert version.metadata == {"run": "42"}
        assert version == await store.version("alice", 1)
        ref, number, fallback = await store.resolve("alice")
        assert (ref.digest, number, fallback) == (version.digest, 1, None)
        assert keys(store) == [f"{ref.key}/{file}" for file in ADAPTER_FILES]


async def test_the_same_bytes_again_change_nothing(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        first = await store.push("alice", adapter(tmp_path))
        again = await store.push("alice", adapter(tmp_path), metadata={"other": True}, promote=False)
        assert (again.created, again.version) == (False, first.version)
        assert len(keys(store)) == 2


async def test_versions_are_pushed_promoted_and_paged(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        for seed in range(3):
            await store.push("alice", adapter(tmp_path, seed), promote=seed == 0)
        assert (await store.resolve("alice")).version == 1
        assert (await store.resolve("alice", version=3)).version == 3
        assert (await store.promote("alice", 2, if_live=1)).live
        assert (await store.resolve("alice")).version == 2
        with pytest.raises(AdapterConflict):
            await store.promote("alice", 3, if_live=1)
        page = await store.versions("alice", after=3, limit=1)
        assert [(version.version, version.live) for version in page] == [(2, True)]


async def test_users_names_and_tenants_are_apart(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.push("alice", adapter(tmp_path, 0))
        await store.push("alice", adapter(tmp_path, 1), name="work")
        await store.push("alice", adapter(tmp_path, 2), tenant="acme")
        digests = {
            (await store.resolve("alice", **whose)).ref.digest  # type: ignore[arg-type]
            for whose in ({}, {"name": "work"}, {"tenant": "acme"})
        }
        assert len(digests) == 3
        assert [(user.user_id, user.num_adapters) for user in await store.users()] == [("alice", 2)]
        assert (await store.user("alice", tenant="acme")).num_adapters == 1
        with pytest.raises(AdapterNotFound):
            await store.resolve("bob")


async def test_the_same_bytes_of_two_users_are_two_uploads(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        for user in ("alice", "bob"):
            await store.push(user, adapter(tmp_path))
        refs = [(await store.resolve(user)).ref for user in ("alice", "bob")]
        assert refs[0].digest == refs[1].digest
        assert refs[0].key != refs[1].key
        assert len(keys(store)) == 4


async def test_a_bad_upload_stores_nothing(tmp_path: Path) -> None:
    folder = adapter(tmp_path)
    write_config(folder, {"use_dora": True})
    async with opened(tmp_path) as store:
        with pytest.raises(AdapterInvalid, match="DoRA"):
            await store.push("alice", folder)
        assert keys(store) == []
        assert await store.users() == []


@pytest.mark.parametrize("num_puts", [0, 1])
async def test_a_store_that_fails_leaves_no_version_and_no_objects(tmp_path: Path, num_puts: int) -> None:
    async with opened(tmp_path, BrokenStore(num_puts)) as store:
        with pytest.raises(StoreError, match="out of order"):
            await store.push("alice", adapter(tmp_path))
        assert keys(store) == []
        with pytest.raises(AdapterNotFound):
            await store.resolve("alice")


async def test_a_catalog_that_fails_leaves_no_objects(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.push("alice", adapter(tmp_path, 0))
        stored = keys(store)
        with sqlite3.connect(tmp_path / "catalog.db") as connection:
            connection.execute("ALTER TABLE live_history RENAME TO gone")
        connection.close()
        with pytest.raises(StoreError, match="catalog"):
            await store.push("alice", adapter(tmp_path, 1))
        assert keys(store) == stored
        assert (await store.resolve("alice")).version == 1


async def test_an_upload_of_exactly_the_limit_is_taken_one_byte_more_is_not(tmp_path: Path) -> None:
    folder = adapter(tmp_path)
    size = (folder / ADAPTER_FILES[1]).stat().st_size
    async with opened(tmp_path, max_upload_bytes=size) as store:
        assert (await store.push("alice", folder)).created
    async with opened(tmp_path, max_upload_bytes=size - 1) as store:
        with pytest.raises(AdapterInvalid, match=f"larger than {size - 1} bytes") as refusal:
            await store.push("bob", folder)
        assert (refusal.value.code, refusal.value.param) == ("adapter_too_large", ADAPTER_FILES[1])


async def test_a_sparse_giant_is_refused_without_reading_it_all(tmp_path: Path) -> None:
    folder = adapter(tmp_path)
    os.truncate(folder / ADAPTER_FILES[1], 2**40)
    os.truncate(folder / ADAPTER_FILES[0], 2**40)
    async with opened(tmp_path) as store:
        with pytest.raises(AdapterInvalid) as refusal:
            await store.push("alice", folder)
        assert refusal.value.code == "adapter_too_large"


async def test_a_cancelled_push_runs_to_its_end(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        push = asyncio.ensure_future(store.push("alice", adapter(tmp_path)))
        await asyncio.sleep(0)
        push.cancel()
        with pytest.raises(asyncio.CancelledError):
            await push
        found = await store.users()
        stored = keys(store)
        assert (len(found), len(stored)) == (1, 2)


async def test_pushes_at_once_get_a_version_each(tmp_path: Path) -> None:
    folders = [adapter(tmp_path, seed) for seed in range(6)]
    async with opened(tmp_path) as store:
        pushed = await asyncio.gather(*(store.push("alice", folder) for folder in folders))
        assert sorted(answer.version.version for answer in pushed) == [1, 2, 3, 4, 5, 6]
        assert len(await store.versions("alice")) == 6


async def test_the_same_bytes_pushed_at_once_become_one_version(tmp_path: Path) -> None:
    folder = adapter(tmp_path)
    async with opened(tmp_path) as store:
        pushed = await asyncio.gather(*(store.push("alice", folder) for _ in range(4)))
        assert sorted(answer.created for answer in pushed) == [False, False, False, True]
        assert len(keys(store)) == 2


PUSH = """
import asyncio, sys
from pathlib import Path
from adapter_factory import make_manifest
from tunefleet.adapters_store.store import AdapterStore
from tunefleet.config import Options
async def main():
    store = AdapterStore.open(Options(store_url=sys.argv[1], cache_dir=sys.argv[2]), make_manifest())
    sys.stdin.readline()
    print((await store.push("alice", Path(sys.argv[3]))).version.version)
    await store.close()
asyncio.run(main())
"""


async def test_two_processes_pushing_for_one_user_make_two_versions(tmp_path: Path) -> None:
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    url, cache = (tmp_path / "store").as_uri(), str(tmp_path / "cache")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PUSH, url, cache, str(adapter(tmp_path, seed))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environ,
        )
        for seed in (0, 1)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.flush()
    answers = [process.communicate()[0] for process in processes]
    assert sorted(answers) == [b"1\n", b"2\n"]
    store = AdapterStore.open(Options(store_url=url, cache_dir=cache), MANIFEST)
    versions = await store.versions("alice")
    assert [version.version for version in versions] == [2, 1]
    assert len({version.digest for version in versions}) == 2
    assert len(keys(store)) == 4
    await store.close()


PUSH_ON = """
import asyncio, sys
from pathlib import Path
from adapter_factory import make_adapter, make_manifest
from tunefleet.adapters_store.store import AdapterStore
from tunefleet.config import Options
async def main():
    manifest = make_manifest()
    store = AdapterStore.open(Options(store_url=sys.argv[1], cache_dir=sys.argv[2]), manifest)
    for seed in range(10_000):
        pushed = await store.push("alice", make_adapter(Path(sys.argv[3]), manifest, seed=seed))
        print(pushed.version.version, pushed.version.digest, flush=True)
asyncio.run(main())
"""


async def test_an_acknowledged_push_survives_a_kill(tmp_path: Path) -> None:
    environ = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    url, cache = (tmp_path / "store").as_uri(), str(tmp_path / "cache")
    with subprocess.Popen(
        [sys.executable, "-c", PUSH_ON, url, cache, str(tmp_path / "adapter")],
        stdout=subprocess.PIPE,
        env=environ,
    ) as process:
        assert process.stdout is not None
        acknowledged = [process.stdout.readline().split() for _ in range(5)]
        process.kill()
        acknowledged += [line.split() for line in process.stdout if line.endswith(b"\n")]
    store = AdapterStore.open(Options(store_url=url, cache_dir=cache), MANIFEST)
    for number, digest in acknowledged:
        assert (await store.version("alice", int(number))).digest == digest.decode()
    for version in await store.versions("alice"):  # whatever is visible is whole
        for file in ADAPTER_FILES:
            stored = await store.open_file("alice", version.version, file)
            assert sum([len(chunk) async for chunk in stored]) == stored.size_bytes
    assert (await store.resolve("alice")).version >= len(acknowledged)
    await store.close()


@pytest.mark.parametrize("file", ADAPTER_FILES)
async def test_files_come_back_byte_for_byte(tmp_path: Path, file: str) -> None:
    folder = adapter(tmp_path)
    async with opened(tmp_path) as store:
        await store.push("alice", folder)
        stored = await store.open_file("alice", 1, file)
        content = b"".join([chunk async for chunk in stored])
        assert content == (folder / file).read_bytes()
        assert stored.size_bytes == len(content)


async def test_a_file_opened_and_not_read_is_closed(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        await store.push("alice", adapter(tmp_path))
        await (await store.open_file("alice", 1, ADAPTER_FILES[0])).aclose()
        with pytest.raises(AdapterNotFound) as refusal:
            await store.open_file("alice", 1, "../../catalog.db")
        assert refusal.value.code == "file_not_found"


async def test_a_stored_file_that_changed_never_comes_back_whole(tmp_path: Path) -> None:
    async with opened(tmp_path, LyingStore()) as store:
        await store.push("alice", adapter(tmp_path))
        stored = await store.open_file("alice", 1, ADAPTER_FILES[1])
        received = b""

        async def receive() -> None:
            nonlocal received
            async for chunk in stored:
                received += chunk

        with pytest.raises(StoreError, match="not what was uploaded"):
            await receive()
        assert len(received) < stored.size_bytes


@pytest.mark.parametrize(
    "metadata",
    [
        {"a": "x" * 4096},
        {"a": float("nan")},
        {"a": b"bytes"},
        {"a": "\ud800"},
        {"a": {1, 2}},
    ],
)
async def test_metadata_that_is_no_small_json_is_refused(tmp_path: Path, metadata: dict[str, object]) -> None:
    async with opened(tmp_path) as store:
        with pytest.raises(RequestInvalid) as refusal:
            await store.push("alice", adapter(tmp_path), metadata=metadata)
        assert (refusal.value.code, refusal.value.param) == ("invalid_metadata", "metadata")


def test_metadata_of_exactly_the_limit_is_kept() -> None:
    metadata: dict[str, object] = {"a": "x" * (4096 - len('{"a": ""}'))}
    assert metadata == check_metadata(metadata)


BAD_IDS = [
    "",
    ".",
    "..",
    "a/b",
    "a\\b",
    "a\0",
    "a\n",
    "ä",
    "a b",
    "😀",
    "x" * 129,
    "%2e%2e/",
    "${x}",
    "{{x}}",
    "'; --",
]


@pytest.mark.parametrize("user_id", BAD_IDS)
async def test_a_user_id_that_is_not_allowed_is_refused_everywhere(tmp_path: Path, user_id: str) -> None:
    async with opened(tmp_path) as store:
        calls: list[Callable[[], object]] = [
            lambda: store.push(user_id, tmp_path),
            lambda: store.resolve(user_id),
            lambda: store.versions(user_id),
            lambda: store.version(user_id, 1),
            lambda: store.user(user_id),
            lambda: store.promote(user_id, 1),
            lambda: store.open_file(user_id, 1, ADAPTER_FILES[0]),
        ]
        for call in calls:
            with pytest.raises(RequestInvalid) as refusal:
                await call()  # type: ignore[misc]
            assert refusal.value.code == "invalid_user_id"


@pytest.mark.parametrize(
    "user_id", ["default", "__base__", "a", "a1", "-a", "user:x", "a@b.c", "~", "...", "A|b=c+d"]
)
async def test_ids_that_look_special_are_just_ids(tmp_path: Path, user_id: str) -> None:
    async with opened(tmp_path) as store:
        await store.push(user_id, adapter(tmp_path))
        assert (await store.resolve(user_id)).version == 1
        assert [user.user_id for user in await store.users()] == [user_id]


@pytest.mark.parametrize("name", ["", "Default", "a/b", "-a", "..", "x" * 65, "ä"])
async def test_an_adapter_name_that_is_not_allowed_is_refused(tmp_path: Path, name: str) -> None:
    async with opened(tmp_path) as store:
        with pytest.raises(RequestInvalid) as refusal:
            await store.resolve("alice", name=name)
        assert refusal.value.code == "invalid_adapter_name"


async def test_numbers_and_pages_out_of_range_are_refused(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        for number in (0, -1, 2**31, True):
            with pytest.raises(RequestInvalid):
                await store.resolve("alice", version=number)
        for limit in (0, -1, 10**9):
            with pytest.raises(RequestInvalid):
                await store.versions("alice", limit=limit)


async def test_copies_that_dead_processes_left_are_removed_at_start(tmp_path: Path) -> None:
    dead = tmp_path / "staging" / "dead"
    dead.mkdir(parents=True)
    os.utime(dead, (0, 0))
    async with opened(tmp_path):
        assert not dead.exists()
