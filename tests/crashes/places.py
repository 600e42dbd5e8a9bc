"""A deployment in a folder: catalog, objects, a router's cache and its machine's copies."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec

from adapter_factory import make_adapter, make_manifest
from tunefleet.adapters_store.catalog import Catalog
from tunefleet.adapters_store.objects import ObjectStore, open_store
from tunefleet.adapters_store.store import AdapterStore
from tunefleet.messages import Forgotten, HeldAdapter

MANIFEST = make_manifest()
NUM_ADAPTERS = 7


class Place(msgspec.Struct, frozen=True):
    """All that routers share, and nothing of it is in a process."""

    folder: str
    database_url: str
    store_url: str
    adapters: str  # folder of the uploads' sources

    def catalog(self, offset_s: float = 0.0) -> Catalog:
        """With a clock that is so far ahead."""
        return Catalog(self.database_url, now=lambda: datetime.now(UTC) + timedelta(seconds=offset_s))

    @asynccontextmanager
    async def opened(
        self, objects: ObjectStore | None = None, *, offset_s: float = 0.0
    ) -> AsyncIterator[AdapterStore]:
        store = AdapterStore(
            objects or open_store(self.store_url),
            self.catalog(offset_s),
            MANIFEST,
            staging=Path(self.folder) / "staging",
            max_rank=64,
            max_upload_bytes=10**6,
        )
        try:
            yield store
        finally:
            await store.close()

    def adapter(self, number: int) -> Path:
        return Path(self.adapters) / str(number)

    @property
    def machine(self) -> Machine:
        return Machine(Path(self.folder) / "machine")


class Machine:
    """A router's machine whose disk survives: a file for each digest."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True)

    def fetch(self, digest: str) -> None:
        (self._folder / digest).touch()

    def copies(self) -> set[str]:
        return {path.name for path in self._folder.iterdir()}

    async def forget(self, digest: str, keys: Sequence[str] = ()) -> Forgotten:
        had = digest in self.copies()
        (self._folder / digest).unlink(missing_ok=True)
        return Forgotten(digest, disk=int(had))

    async def hold(self, adapters: Sequence[HeldAdapter]) -> None:
        pass

    async def end_streams(self, tenant: str, user_id: str) -> int:
        return 0

    async def known_copies(self) -> set[str]:
        return self.copies()


def make_adapters(folder: Path) -> Path:
    for number in range(NUM_ADAPTERS):
        make_adapter(folder / str(number), MANIFEST, seed=number)
    return folder


def in_folder(folder: Path, adapters: Path, database_url: str | None = None) -> Place:
    """Objects in files; the catalog too, unless it is elsewhere."""
    folder.mkdir()
    return Place(
        folder=str(folder),
        database_url=database_url or f"sqlite:///{folder}/catalog.db",
        store_url=(folder / "store").as_uri(),
        adapters=str(adapters),
    )


def copied(world: Place, folder: Path) -> Place:
    """The same world in another folder, objects and catalog in files."""
    shutil.copytree(world.folder, folder)
    return in_other_folder(world, folder)


def in_other_folder(world: Place, folder: Path) -> Place:
    return msgspec.structs.replace(
        world,
        folder=str(folder),
        database_url=f"sqlite:///{folder}/catalog.db",
        store_url=(folder / "store").as_uri(),
    )
