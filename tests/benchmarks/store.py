"""Uploads through a real server, and the way from the bucket into a slot, over a real S3 on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.numpy import save_file
from tests.benchmarks.bases import manifest_of, quickstart_base
from tests.benchmarks.bench import Bench
from tests.benchmarks.figures import Figure, figure
from tests.s3_servers import CREDENTIALS, JuiceFS

from tunefleet import Client
from tunefleet.adapters_store.objects import ObjectStore, StoredObject, open_store
from tunefleet.adapters_store.store import AdapterStore
from tunefleet.adapters_store.tiers import Tiers
from tunefleet.config import resolve
from tunefleet.core import AdapterRef, Manifest
from tunefleet.runtime.banks import Banks, map_prepared
from tunefleet.runtime.slots import Slot

MB = 1_000_000
SIZES_MB = (1, 5, 50)
UPLOAD_MB = 200
NUM_WAITERS = 100
MAX_RANK = 256
ARENA_BYTES = 2**30


class Uploads(NamedTuple):
    mb_per_s: list[float]
    extra_mb: float  # of the router's memory, over what it had before the first upload


class Climb(NamedTuple):
    """Seconds per stage of one cold adapter."""

    download: float
    prepare: float
    into_slot: float


class Crowd(NamedTuple):
    """Many requests for one cold digest."""

    num_downloads: int  # of the weights
    seconds: float


def measure(bench: Bench) -> Iterator[Figure]:
    """Of adapters for the quickstart base, whatever is measured otherwise: its server serves that."""
    manifest = manifest_of(quickstart_base())
    with s3() as server:
        size = bench.size(UPLOAD_MB, 2)
        upload = uploads(server, manifest, bench.repeats, size)
        yield figure(f"upload of {size} MB to S3", "MB/s", upload.mb_per_s)
        yield figure(f"upload of {size} MB: the router's memory grows by", "MB", [upload.extra_mb])
        for size in SIZES_MB[: bench.size(len(SIZES_MB), 1)]:
            yield from _stages(size, climbs(server, manifest, size, bench.repeats))
        found = crowd(server, manifest)
        name = f"{NUM_WAITERS} requests for a cold adapter"
        yield figure(f"{name}: downloads", "downloads", [found.num_downloads])
        yield figure(name, "ms", [1000 * found.seconds])


def _stages(size_mb: int, found: Sequence[Climb]) -> Iterator[Figure]:
    for stage, seconds in zip(Climb._fields, zip(*found, strict=True), strict=True):
        name = f"adapter of {size_mb} MB: {stage.replace('_', ' ')}"
        yield figure(name, "ms", (1000 * value for value in seconds))


@contextlib.contextmanager
def s3() -> Iterator[JuiceFS]:
    os.environ.update(CREDENTIALS)
    with tempfile.TemporaryDirectory() as folder:
        server = JuiceFS(Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.kill()


def uploads(server: JuiceFS, manifest: Manifest, repeats: int, size_mb: int) -> Uploads:
    """Of large adapters, with the client's own push, to a router in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adapters = [_adapter(folder / str(seed), manifest, size_mb * MB, seed) for seed in range(repeats + 1)]
        with _router(server, folder) as (url, pid), Client(url) as client:
            client.adapters.push("small", _adapter(folder / "small", manifest, MB, 99))
            before = _peak_mb(pid)
            seconds = []
            for adapter in adapters:
                started = time.perf_counter()
                client.adapters.push("large", adapter)
                seconds.append(time.perf_counter() - started)
            return Uploads([size_mb / value for value in seconds[1:]], _peak_mb(pid) - before)


def climbs(server: JuiceFS, manifest: Manifest, size_mb: int, repeats: int) -> list[Climb]:
    """Of so many adapters, each cold."""
    return asyncio.run(_climb(server, manifest, size_mb, repeats + 1))[1:]


def crowd(server: JuiceFS, manifest: Manifest) -> Crowd:
    return asyncio.run(_crowd(server, manifest))


async def _climb(server: JuiceFS, manifest: Manifest, size_mb: int, count: int) -> list[Climb]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store_url = server.url(server.make_bucket())
        refs = await _pushed(store_url, manifest, folder, size_mb, count)
        tiers = _tiers(open_store(store_url), manifest, folder)
        banks = Banks(manifest.linears, torch.float32, torch.device("cpu"), ARENA_BYTES)
        found = []
        for ref in refs:
            fetched = await tiers.fetch(ref)
            started = time.perf_counter()
            mapped = map_prepared(fetched.path, manifest.linears)
            banks.filling(Slot(mapped.rank_class, 0), mapped).copy(mapped.num_bytes)
            found.append(Climb(fetched.download_s, fetched.load_s, time.perf_counter() - started))
        await tiers.close()
        return found


async def _crowd(server: JuiceFS, manifest: Manifest) -> Crowd:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store_url = server.url(server.make_bucket())
        (ref,) = await _pushed(store_url, manifest, folder, 5, 1)
        objects = _Counting(open_store(store_url))
        tiers = _tiers(objects, manifest, folder)
        started = time.perf_counter()
        await asyncio.gather(*(tiers.fetch(ref) for _ in range(NUM_WAITERS)))
        seconds = time.perf_counter() - started
        await tiers.close()
        return Crowd(sum(key.endswith(".safetensors") for key in objects.opened), seconds)


class _Counting:
    """A store that notes which objects are opened from their start."""

    def __init__(self, objects: ObjectStore) -> None:
        self.opened: list[str] = []
        self._objects = objects

    def open(self, key: str, *, start: int = 0, length: int | None = None) -> StoredObject:
        if start == 0:
            self.opened.append(key)
        return self._objects.open(key, start=start, length=length)

    def __getattr__(self, name: str) -> object:
        return getattr(self._objects, name)


async def _pushed(
    store_url: str, manifest: Manifest, folder: Path, size_mb: int, count: int
) -> list[AdapterRef]:
    options = resolve(
        keywords={
            "store_url": store_url,
            "database_url": f"sqlite:///{folder}/catalog.db",
            "cache_dir": str(folder / "cache"),
            "max_adapter_rank": MAX_RANK,
        },
        environ={},
    )
    store = AdapterStore.open(options, manifest)
    try:
        for seed in range(count):
            await store.push(f"user-{seed}", _adapter(folder / f"in-{seed}", manifest, size_mb * MB, seed))
        return [(await store.resolve(f"user-{seed}")).ref for seed in range(count)]
    finally:
        await store.close()


def _tiers(objects: ObjectStore, manifest: Manifest, folder: Path) -> Tiers:
    return Tiers(
        objects,
        manifest,
        disk_dir=folder / "disk",
        host_dir=folder / "host",
        dtype="float32",
        host_cache_bytes=2**31,
        disk_cache_bytes=2**31,
    )


def _adapter(folder: Path, manifest: Manifest, num_bytes: int, seed: int) -> Path:
    """A random adapter on every linear layer, of the rank whose size comes nearest."""
    generator = np.random.default_rng(seed)
    per_rank = 4 * sum(spec.in_features + spec.out_features for spec in manifest.linears.values())
    rank = max(1, round(num_bytes / per_rank))
    tensors = {}
    for path, spec in manifest.linears.items():
        key = f"base_model.model.{path}"
        tensors[f"{key}.lora_A.weight"] = _normal(generator, rank, spec.in_features)
        tensors[f"{key}.lora_B.weight"] = _normal(generator, spec.out_features, rank)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    modules = sorted({path.rpartition(".")[2] for path in manifest.linears})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": modules}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _normal(generator: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return generator.normal(0, 0.02, (rows, columns)).astype(np.float32)


@contextlib.contextmanager
def _router(server: JuiceFS, folder: Path) -> Iterator[tuple[str, int]]:
    """``tunefleet serve`` on a free port: its URL and process id."""
    command = [sys.executable, "-m", "tunefleet.cli.main", "serve", "--port", "0"]
    command += ["--store-url", server.url(server.make_bucket()), "--max-adapter-rank", str(MAX_RANK)]
    command += ["--database-url", f"sqlite:///{folder}/catalog.db"]
    log = folder / "log"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, "TUNEFLEET_ADMIN_KEY": ""}
        ) as process,
    ):
        try:
            while (match := re.search(r"(http://127\.0\.0\.1:\d+)/v1", log.read_text())) is None:
                assert process.poll() is None, log.read_text()
                time.sleep(0.02)
            yield match[1], process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait()


def _peak_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1000
