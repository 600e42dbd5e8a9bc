"""Stored adapters whose objects the store lost or changed, healed by the same upload again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from store_kit import adapter, keys, opened
from tunefleet.adapters_store.catalog import Catalog
from tunefleet.adapters_store.memory_store import MemoryStore
from tunefleet.adapters_store.store import AdapterStore
from tunefleet.core import ADAPTER_FILES, WEIGHTS_FILE
from tunefleet.errors import StoreError

pytestmark = pytest.mark.anyio


def lost(store: AdapterStore, key: str, tmp_path: Path) -> None:
    store.objects.delete(key)


def emptied(store: AdapterStore, key: str, tmp_path: Path) -> None:
    (tmp_path / "none").write_bytes(b"")
    store.objects.put(key, tmp_path / "none")


def changed(store: AdapterStore, key: str, tmp_path: Path) -> None:
    content = bytearray(store.objects.open(key).stream.read())
    content[-1] ^= 1
    (tmp_path / "changed").write_bytes(content)
    store.objects.put(key, tmp_path / "changed")


@pytest.mark.parametrize("file", ADAPTER_FILES)
@pytest.mark.parametrize("damage", [lost, emptied, changed])
async def test_the_same_upload_heals_the_stores_copy(
    tmp_path: Path, damage: Callable[[AdapterStore, str, Path], None], file: str
) -> None:
    folder = adapter(tmp_path)
    async with opened(tmp_path, MemoryStore()) as store:
        await store.push("alice", folder)
        before = keys(store)
        key = next(key for key in before if key.endswith(file))
        damage(store, key, tmp_path)
        assert not (await store.push("alice", folder)).created
        assert before == keys(store)
        assert (folder / file).read_bytes() == store.objects.open(key).stream.read()


async def test_an_upload_in_steps_heals_too(tmp_path: Path) -> None:
    folder = adapter(tmp_path)
    async with opened(tmp_path, MemoryStore()) as store:
        await store.push("alice", folder)
        key = next(key for key in keys(store) if key.endswith(WEIGHTS_FILE))
        ticket = await store.begin_upload("alice")
        for file in ADAPTER_FILES:
            await store.put_file("alice", ticket.upload_id, file, folder / file)
        lost(store, key, tmp_path)
        assert not (await store.complete_upload("alice", ticket.upload_id)).created
        assert (folder / WEIGHTS_FILE).read_bytes() == store.objects.open(key).stream.read()


class DeletedMeanwhile(MemoryStore):
    """Its user is deleted while an object is written again."""

    then: Callable[[], object] | None = None

    def put(self, key: str, source: Path) -> None:
        super().put(key, source)
        then, self.then = self.then, None
        if then is not None:
            then()


async def test_what_comes_back_after_a_deletion_does_not_stay(tmp_path: Path) -> None:
    folder, objects = adapter(tmp_path), DeletedMeanwhile()
    async with opened(tmp_path, objects) as store:
        await store.push("alice", folder)
        lost(store, next(key for key in keys(store) if key.endswith(WEIGHTS_FILE)), tmp_path)
        catalog = Catalog(f"sqlite:///{tmp_path}/catalog.db")
        objects.then = lambda: catalog.delete_user("default", "alice")
        await store.push("alice", folder)
        catalog.close()
        assert [key for key in keys(store) if key.endswith(WEIGHTS_FILE)] == []


async def test_a_store_that_is_down_is_no_lost_object(tmp_path: Path) -> None:
    class Down(MemoryStore):
        is_down = False

        def put(self, key: str, source: Path) -> None:
            assert not self.is_down
            super().put(key, source)

        def open(self, key, **range_):  # type: ignore[no-untyped-def]
            if self.is_down:
                raise StoreError("it is down", code="store_unavailable")
            return super().open(key, **range_)

    objects = Down()
    async with opened(tmp_path, objects) as store:
        await store.push("alice", adapter(tmp_path))
        objects.is_down = True
        with pytest.raises(StoreError, match="it is down"):
            await store.push("alice", adapter(tmp_path))
