"""What tests of tiers share: stored adapters, a store that can be made to fail, a clock."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from adapter_factory import make_adapter, make_manifest
from tunefleet.adapters_store.memory_store import MemoryStore
from tunefleet.adapters_store.objects import StoredObject
from tunefleet.adapters_store.prepare import prepare_adapter
from tunefleet.adapters_store.tiers import Tiers
from tunefleet.adapters_store.validation import check_adapter
from tunefleet.core import AdapterRef
from tunefleet.errors import AdapterLoadFailed, StoreError

MANIFEST = make_manifest()
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class WatchedStore(MemoryStore):
    """Counts downloads of weights; a test can hold them, or make them fail."""

    def __init__(self) -> None:
        super().__init__()
        self.num_downloads = 0
        self.failure: StoreError | None = None
        self.may_answer = threading.Event()
        self.may_answer.set()

    def open(
        self, key: str, *, start: int = 0, length: int | None = None, etag: str | None = None
    ) -> StoredObject:
        if key.endswith(WEIGHTS):
            self.num_downloads += 1
            assert self.may_answer.wait(20)
        if self.failure is not None:
            raise self.failure
        return super().open(key, start=start, length=length, etag=etag)

    def change(self, key: str, change: Callable[[bytes], bytes]) -> None:
        self.replace(key, change(super().open(key).stream.read()))


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


class Setup:
    """Stored adapters and the tiers under test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.objects = WatchedStore()
        self.clock = Clock()

    def store(self, seed: int, r: int = 4) -> AdapterRef:
        folder = make_adapter(self.folder / f"adapter-{seed}", MANIFEST, seed=seed, r=r)
        checked = check_adapter(folder, MANIFEST, max_rank=64)
        key = f"t/sha256/{checked.digest}/{seed}"
        for file in (CONFIG, WEIGHTS):
            self.objects.put(f"{key}/{file}", folder / file)
        return AdapterRef(checked.digest, "t", key, checked.weights_sha256, checked.size_bytes, checked.rank)

    def reference(self, seed: int) -> bytes:
        """What the prepared file must be."""
        folder, out = self.folder / f"adapter-{seed}", self.folder / f"reference-{seed}"
        prepare_adapter(folder, check_adapter(folder, MANIFEST, max_rank=64), out, dtype="bfloat16")
        return out.read_bytes()

    @asynccontextmanager
    async def tiers(
        self, host_cache_bytes: int = 10**6, disk_cache_bytes: int = 10**6
    ) -> AsyncIterator[Tiers]:
        tiers = Tiers(
            self.objects,
            MANIFEST,
            disk_dir=self.folder / "disk",
            host_dir=self.folder / "host",
            dtype="bfloat16",
            host_cache_bytes=host_cache_bytes,
            disk_cache_bytes=disk_cache_bytes,
            clock=self.clock,
        )
        try:
            yield tiers
            tiers.check()
        finally:
            self.objects.may_answer.set()
            await tiers.close()

    def disk_file(self, ref: AdapterRef, file: str = WEIGHTS) -> Path:
        return self.folder / "disk" / ref.digest / file


async def refusal_of(tiers: Tiers, ref: AdapterRef) -> AdapterLoadFailed:
    with pytest.raises(AdapterLoadFailed) as refusal:
        await tiers.fetch(ref)
    return refusal.value


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])
