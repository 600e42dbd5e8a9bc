"""What tests of tiers share: stored adapters, a store that can be made to fail, a clock."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from adapter_factory import make_adapter, make_manifest
from tunefleet.adapters_store.memory_store import MemoryStore
from tunefleet.adapters_store.objects import ObjectStore, StoredObject
from tunefleet.adapters_store.prepare import prepare_adapter
from tunefleet.adapters_store.slot_layout import SlotLayout
from tunefleet.adapters_store.tiers import Tiers
from tunefleet.adapters_store.validation import check_adapter
from tunefleet.core import AdapterRef
from tunefleet.errors import AdapterLoadFailed, StoreError

MANIFEST = make_manifest()
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class WatchedStore(MemoryStore):
    """Counts downloads of weights; a test can hold them, all or those of one key, or make them fail."""

    def __init__(self) -> None:
        super().__init__()
        self.num_downloads = 0
        self.failure: StoreError | None = None
        self.may_answer = threading.Event()
        self.may_answer.set()
        self.gates: dict[str, threading.Event] = {}  # by key
        self.was_asked = threading.Event()

    def hold(self, ref: AdapterRef) -> None:
        """This ref's weights don't come before they are let go."""
        self.gates[f"{ref.key}/{WEIGHTS}"] = threading.Event()

    def let_go(self, ref: AdapterRef) -> None:
        self.gates[f"{ref.key}/{WEIGHTS}"].set()

    def lose(self, ref: AdapterRef) -> None:
        for file in (CONFIG, WEIGHTS):
            self.delete(f"{ref.key}/{file}")

    def open(
        self, key: str, *, start: int = 0, length: int | None = None, etag: str | None = None
    ) -> StoredObject:
        if key.endswith(WEIGHTS):
            self.num_downloads += 1
            self.was_asked.set()
            assert self.may_answer.wait(20)
            assert key not in self.gates or self.gates[key].wait(20)
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


def put_adapter(
    objects: ObjectStore, folder: Path, seed: int, *, r: int = 4, upload_id: str = ""
) -> AdapterRef:
    """Makes an adapter in ``folder`` and stores it; the same seed and rank are the same bytes."""
    made = make_adapter(folder, MANIFEST, seed=seed, r=r)
    checked = check_adapter(made, MANIFEST, max_rank=64)
    key = f"t/sha256/{checked.digest[:2]}/{checked.digest}/{upload_id or seed}"
    for file in (CONFIG, WEIGHTS):
        objects.put(f"{key}/{file}", made / file)
    return AdapterRef(checked.digest, "t", key, checked.weights_sha256, checked.size_bytes, checked.rank)


def prepared(folder: Path) -> bytes:
    """What the prepared file of an adapter must be."""
    out = folder.with_name(f"{folder.name}.prepared")
    checked = check_adapter(folder, MANIFEST, max_rank=64)
    prepare_adapter(folder, checked, out, layout=SlotLayout(MANIFEST.linears), dtype="bfloat16")
    return out.read_bytes()


class Setup:
    """Stored adapters and the tiers under test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.objects = WatchedStore()
        self.clock = Clock()

    def store(self, seed: int, r: int = 4, upload_id: str = "") -> AdapterRef:
        folder = self.folder / f"adapter-{seed}"
        return put_adapter(self.objects, folder, seed, r=r, upload_id=upload_id)

    def reference(self, seed: int) -> bytes:
        return prepared(self.folder / f"adapter-{seed}")

    @asynccontextmanager
    async def tiers(
        self,
        host_cache_bytes: int = 10**6,
        disk_cache_bytes: int = 10**6,
        *,
        fetch_wait_s: float = 20.0,
        forget_wait_s: float = 5.0,
        objects: ObjectStore | None = None,
    ) -> AsyncIterator[Tiers]:
        tiers = Tiers(
            objects or self.objects,
            MANIFEST,
            disk_dir=self.folder / "disk",
            host_dir=self.folder / "host",
            dtype="bfloat16",
            host_cache_bytes=host_cache_bytes,
            disk_cache_bytes=disk_cache_bytes,
            clock=self.clock,
            fetch_wait_s=fetch_wait_s,
            forget_wait_s=forget_wait_s,
        )
        try:
            yield tiers
            tiers.check()
        finally:
            for gate in (self.objects.may_answer, *self.objects.gates.values()):
                gate.set()
            await tiers.close()

    def disk_file(self, ref: AdapterRef, file: str = WEIGHTS) -> Path:
        return self.folder / "disk" / ref.digest / file

    def quarantined(self) -> list[Path]:
        return sorted((self.folder / "disk" / ".quarantine").glob("*"))


async def refusal_of(tiers: Tiers, ref: AdapterRef) -> AdapterLoadFailed:
    with pytest.raises(AdapterLoadFailed) as refusal:
        await tiers.fetch(ref)
    return refusal.value


def flipped(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])
