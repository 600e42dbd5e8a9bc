"""What tests of the store share: a store in the test's folder, a clock to turn, a machine that notes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from adapter_factory import make_adapter, make_manifest
from tunefleet.adapters_store.catalog import Catalog
from tunefleet.adapters_store.memory_store import MemoryStore
from tunefleet.adapters_store.objects import ObjectStore
from tunefleet.adapters_store.store import AdapterStore
from tunefleet.core import ADAPTER_FILES, DEFAULT_ADAPTER, UploadTicket
from tunefleet.messages import Forgotten, HeldAdapter

MANIFEST = make_manifest()


class Clock:
    """Stands still until it is turned; of objects and catalog alike."""

    def __init__(self) -> None:
        self.at = datetime(2026, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.at

    def turn(self, seconds: float) -> None:
        self.at += timedelta(seconds=seconds)


class NotedMachine:
    """A router's machine: has the copies that the test gives it, and notes what it is told."""

    def __init__(self, *copies: str) -> None:
        self.copies = set(copies)
        self.in_use: set[str] = set()
        self.forgotten: list[str] = []
        self.held: list[tuple[HeldAdapter, ...]] = []
        self.streams: dict[tuple[str, str], int] = {}
        self.error: Exception | None = None

    async def forget(self, digest: str, keys: Sequence[str] = ()) -> Forgotten:
        self._fail()
        self.forgotten.append(digest)
        had = digest in self.copies
        self.copies.discard(digest)
        busy = digest in self.in_use
        return Forgotten(digest, disk=had, host=had, device=had and not busy, in_use=busy)

    async def hold(self, adapters: Sequence[HeldAdapter]) -> None:
        self._fail()
        self.held.append(tuple(adapters))

    async def end_streams(self, tenant: str, user_id: str) -> int:
        self._fail()
        return self.streams.pop((tenant, user_id), 0)

    async def known_copies(self) -> set[str]:
        self._fail()
        return set(self.copies)

    def _fail(self) -> None:
        if self.error is not None:
            raise self.error


@asynccontextmanager
async def opened(
    tmp_path: Path,
    objects: ObjectStore | None = None,
    *,
    max_upload_bytes: int = 10**6,
    deletion_wait_s: float = 5.0,
    clock: Clock | None = None,
    database_url: str | None = None,
) -> AsyncIterator[AdapterStore]:
    """A store over ``objects`` and the folder's catalog; leaves no private copies."""
    database_url = database_url or f"sqlite:///{tmp_path}/catalog.db"
    store = AdapterStore(
        MemoryStore() if objects is None else objects,
        Catalog(database_url, now=clock) if clock else Catalog(database_url),
        MANIFEST,
        staging=tmp_path / "staging",
        max_rank=64,
        max_upload_bytes=max_upload_bytes,
        deletion_wait_s=deletion_wait_s,
    )
    try:
        yield store
        assert list((tmp_path / "staging").iterdir()) == []
    finally:
        await store.close()


def adapter(tmp_path: Path, seed: int = 0) -> Path:
    return make_adapter(tmp_path / f"adapter-{seed}", MANIFEST, seed=seed)


def keys(store: AdapterStore) -> list[str]:
    """Of everything stored but the catalog's mark."""
    return [found.key for found in store.objects.list("") if not found.key.startswith("catalogs/")]


async def put_all(
    store: AdapterStore, user_id: str, ticket: UploadTicket, folder: Path, *, name: str = DEFAULT_ADAPTER
) -> None:
    """Stages both files through the server."""
    for file in ADAPTER_FILES:
        await store.put_file(user_id, ticket.upload_id, file, folder / file, name=name)
