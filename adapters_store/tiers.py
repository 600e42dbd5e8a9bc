"""A machine's copies of adapters: store to disk to memory, for one host process.

The disk tier holds the files as uploaded and survives restarts. The host tier holds prepared files in memory
(a tmpfs where there is one), which replicas map. Every copy is verified against the digest each time it goes
up a tier, so a byte that rotted or was tampered with is dropped and fetched anew, never served.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import hashlib
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tunefleet.adapters_store.byte_budget import ByteBudget
from tunefleet.adapters_store.downloads import download
from tunefleet.adapters_store.objects import ObjectStore
from tunefleet.adapters_store.prepare import PreparedDtype, prepare_adapter, prepared_bytes
from tunefleet.adapters_store.threads import Runner
from tunefleet.adapters_store.validation import CheckedAdapter, Identity, check_tensors, identify
from tunefleet.core import ADAPTER_FILES, AdapterRef, Manifest
from tunefleet.errors import AdapterInvalid, AdapterLoadFailed, InvalidState, StoreError

RETRY_AFTER_S = 1.0  # a failure is remembered this long, so that a crowd asks the store once
NUM_TRANSFERS = 4
NUM_LOADS = 2

_DIGEST = re.compile(r"[0-9a-f]{64}")
_SHM = Path("/dev/shm")


class Fetched(NamedTuple):
    """A prepared file, and what it took to have it; zeros if it was there."""

    path: Path
    download_s: float
    load_s: float


class _CopyCorrupt(Exception):
    """A disk copy is not the adapter it should be."""


class Tiers:
    """Disk and host tier of one machine; one host process at a time owns the two folders.

    Everything runs on one event loop; I/O runs in threads. ``fetch`` may be called by any number of tasks:
    one of them does the work. A fetched path stays until its digest is evicted, which pinning prevents: pin
    right after ``fetch`` returns, with no await between, and unpin when the last replica has unmapped it.
    """

    def __init__(
        self,
        objects: ObjectStore,
        manifest: Manifest,
        *,
        disk_dir: Path,
        host_dir: Path,
        dtype: PreparedDtype,
        host_cache_bytes: int,
        disk_cache_bytes: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._objects = objects
        self._manifest = manifest
        self._disk_dir = disk_dir
        self._incoming = disk_dir / ".incoming"
        self._host_dir = host_dir
        self._dtype: PreparedDtype = dtype
        self._clock = clock
        self._disk = ByteBudget(disk_cache_bytes)
        self._host = ByteBudget(host_cache_bytes)
        self._pins: collections.Counter[str] = collections.Counter()
        self._flights: dict[str, asyncio.Task[Fetched]] = {}
        self._forgotten: set[str] = set()  # digests to drop once their flight is over
        self._failures: dict[str, tuple[float, AdapterLoadFailed]] = {}
        self._transfer = Runner(NUM_TRANSFERS)
        self._prepare = Runner(NUM_LOADS)
        self._start()

    async def fetch(self, ref: AdapterRef) -> Fetched:
        """The prepared file of an adapter, brought up from wherever a copy is.

        Raises:
            AdapterLoadFailed: out of reach, corrupt or too large; ``retry_after_s`` says when to ask again.
        """
        self._pins[_checked(ref.digest)] += 1  # until this caller has it, nobody's eviction may take it
        try:
            if self._is_on_host(ref.digest):
                self._host.touch(ref.digest)
                return Fetched(self._host_path(ref.digest), 0.0, 0.0)
            self._raise_recent_failure(ref.digest)
            fetched = await asyncio.shield(self._flights.get(ref.digest) or self._launch(ref))
            if ref.digest not in self._host:
                raise _deleted(ref.digest)
            return fetched
        finally:
            self.unpin(ref.digest)

    def pin(self, digest: str) -> None:
        """Keeps the prepared file of a fetched digest until ``unpin``; pins count."""
        if digest not in self._host:
            raise InvalidState(f"{digest} is not in the host tier")
        self._pins[digest] += 1

    def unpin(self, digest: str) -> None:
        if self._pins[digest] <= 0:
            raise InvalidState(f"{digest} is not pinned")
        self._pins[digest] -= 1
        if not self._pins[digest]:
            del self._pins[digest]

    async def forget(self, digest: str) -> None:
        """Drops every copy, mapped or not (a mapped file's memory goes with the last mapping)."""
        flight = self._flights.get(digest)
        if flight is not None:
            self._forgotten.add(digest)
            await asyncio.wait([flight])
        await self._drop(digest)

    def host_bytes(self) -> dict[str, int]:
        """Size of each prepared file in memory, the one to be evicted first at the front."""
        return self._host.sizes()

    def disk_bytes(self) -> dict[str, int]:
        return self._disk.sizes()

    async def close(self) -> None:
        """Waits for what is under way, then empties the host tier."""
        if self._flights:
            await asyncio.wait(list(self._flights.values()))
        await self._prepare(lambda: shutil.rmtree(self._host_dir, ignore_errors=True))

    def check(self) -> None:
        """Raises InvalidState unless folders and books agree; only while nothing is under way."""
        on_host = {path.name: path.stat().st_size for path in self._host_dir.iterdir()}
        if on_host != {self._host_path(digest).name: size for digest, size in self._host.sizes().items()}:
            raise InvalidState("the host folder differs from its books")
        on_disk = {path.name for path in self._disk_dir.iterdir() if _DIGEST.fullmatch(path.name)}
        leftovers = [*self._incoming.iterdir(), *self._disk_dir.glob(".gone-*")]
        if on_disk != self._disk.sizes().keys() or leftovers:
            raise InvalidState("the disk folder differs from its books")
        self._host.check()
        self._disk.check()

    def _start(self) -> None:
        """Takes over the disk copies of earlier processes and clears what crashes left."""
        leftovers = list(self._disk_dir.glob(".*")) if self._disk_dir.exists() else []
        _remove([*leftovers, self._host_dir])
        self._incoming.mkdir(mode=0o700, parents=True)
        self._host_dir.mkdir(mode=0o700, parents=True)
        copies = [path for path in self._disk_dir.iterdir() if _DIGEST.fullmatch(path.name)]
        for path in sorted(copies, key=lambda path: path.stat().st_mtime):
            size = sum((path / file).stat().st_size for file in ADAPTER_FILES if (path / file).is_file())
            victims = self._disk.victims(size, self._is_moving)
            if victims is None:
                shutil.rmtree(path, ignore_errors=True)
                continue
            for digest in victims:
                self._disk.remove(digest)
                shutil.rmtree(self._disk_path(digest), ignore_errors=True)
            self._disk.add(path.name, size)

    def _launch(self, ref: AdapterRef) -> asyncio.Task[Fetched]:
        """Starts the one flight of a digest; it goes on if those who wait are cancelled."""
        flight = asyncio.create_task(self._bring(ref))
        self._flights[ref.digest] = flight
        flight.add_done_callback(lambda done: self._landed(ref.digest, done))
        return flight

    def _landed(self, digest: str, flight: asyncio.Task[Fetched]) -> None:
        del self._flights[digest]
        error = None if flight.cancelled() else flight.exception()
        if isinstance(error, AdapterLoadFailed) and error.code != "adapter_deleted":
            now = self._clock()
            self._failures = {key: value for key, value in self._failures.items() if value[0] > now}
            self._failures[digest] = (now + RETRY_AFTER_S, error)

    def _raise_recent_failure(self, digest: str) -> None:
        until, error = self._failures.get(digest, (0.0, None))
        if error is not None and self._clock() < until:
            raise _failed(error.message, error.code, retry_after_s=error.retry_after_s) from error

    async def _bring(self, ref: AdapterRef) -> Fetched:
        """One flight: every way it can fail is an AdapterLoadFailed."""
        try:
            fetched = await self._climb(ref)
        except (AdapterInvalid, StoreError, OSError) as error:
            raise _failed(
                f"adapter {ref.digest[:12]} can't be fetched: {error}", "adapter_unavailable"
            ) from error
        finally:
            is_forgotten = ref.digest in self._forgotten
            if is_forgotten:
                self._forgotten.discard(ref.digest)
                await self._drop(ref.digest)
        if is_forgotten:
            raise _deleted(ref.digest)
        return fetched

    async def _climb(self, ref: AdapterRef) -> Fetched:
        """Store to disk to host; a disk copy that turns out corrupt is replaced once."""
        download_s = 0.0
        while True:
            is_fresh = ref.digest not in self._disk
            if is_fresh:
                download_s += await self._to_disk(ref)
            try:
                load_s = await self._to_host(ref)
                return Fetched(self._host_path(ref.digest), download_s, load_s)
            except _CopyCorrupt as error:
                await self._drop_disk(ref.digest)
                if is_fresh:
                    raise _failed(
                        f"adapter {ref.digest[:12]}: the store's copy is not what was uploaded ({error}); "
                        "upload it again",
                        "adapter_corrupt",
                    ) from error

    async def _to_disk(self, ref: AdapterRef) -> float:
        """Downloads both files; returns seconds."""
        began = self._clock()
        await self._make_room(self._disk, ref.digest, ref.size_bytes, "disk_cache_bytes")
        try:
            await self._transfer(lambda: self._download(ref))
        except BaseException:
            self._disk.remove(ref.digest)
            raise
        return self._clock() - began

    async def _to_host(self, ref: AdapterRef) -> float:
        """Verifies the disk copy and writes the prepared file; returns seconds."""
        began = self._clock()
        checked = await self._prepare(lambda: self._verified(ref))
        self._disk.touch(ref.digest)
        size = prepared_bytes(checked, self._dtype)
        await self._make_room(self._host, ref.digest, size, "host_cache_bytes")
        disk, out = self._disk_path(ref.digest), self._host_path(ref.digest)
        try:
            await self._prepare(lambda: prepare_adapter(disk, checked, out, dtype=self._dtype))
        except BaseException:
            self._host.remove(ref.digest)
            raise
        return self._clock() - began

    async def _make_room(self, budget: ByteBudget, digest: str, size: int, option: str) -> None:
        """Books ``size`` for ``digest`` at once, then removes the files of those that had to go."""
        is_busy = self._is_needed if budget is self._host else self._is_moving
        victims = budget.victims(size, is_busy)
        if victims is None:
            is_hopeless = size > budget.max_bytes
            raise _failed(
                f"adapter {digest[:12]} needs {size} bytes of {option} ({budget.max_bytes})"
                + ("" if is_hopeless else ", which is in use"),
                "adapter_too_large" if is_hopeless else "adapter_no_room",
                retry_after_s=None if is_hopeless else RETRY_AFTER_S,
            )
        path_of = self._host_path if budget is self._host else self._disk_path
        for victim in victims:
            budget.remove(victim)
        gone = [_set_aside(path_of(victim)) for victim in victims]
        budget.add(digest, size)
        if gone:
            await self._prepare(lambda: _remove(gone))

    def _is_on_host(self, digest: str) -> bool:
        """Booked, written and still there: a tmpfs may be cleared by somebody else."""
        if digest not in self._host or digest in self._flights:
            return False
        if self._host_path(digest).exists():
            return True
        self._host.remove(digest)
        return False

    def _is_moving(self, digest: str) -> bool:
        return digest in self._flights

    def _is_needed(self, digest: str) -> bool:
        return digest in self._flights or digest in self._pins

    def _download(self, ref: AdapterRef) -> None:
        incoming = self._incoming / uuid.uuid4().hex
        incoming.mkdir(mode=0o700)
        try:
            for file in ADAPTER_FILES:
                download(self._objects, f"{ref.key}/{file}", incoming / file, max_bytes=ref.size_bytes)
            target = self._disk_path(ref.digest)
            shutil.rmtree(target, ignore_errors=True)
            incoming.rename(target)
        finally:
            shutil.rmtree(incoming, ignore_errors=True)

    def _verified(self, ref: AdapterRef) -> CheckedAdapter:
        folder = self._disk_path(ref.digest)
        identity = _identity(folder)
        if identity.digest != ref.digest or identity.weights_sha256 != ref.weights_sha256:
            raise _CopyCorrupt(f"its digest is {identity.digest[:12]}")
        with contextlib.suppress(OSError):
            os.utime(folder)  # the order of use, for the next process
        try:
            return check_tensors(folder, identity, self._manifest, max_rank=ref.rank)
        except AdapterInvalid as error:
            raise _failed(error.message, error.code, retry_after_s=None) from error

    async def _drop(self, digest: str) -> None:
        if digest in self._host:
            self._host.remove(digest)
            gone = [_set_aside(self._host_path(digest))]
            await self._prepare(lambda: _remove(gone))
        await self._drop_disk(digest)

    async def _drop_disk(self, digest: str) -> None:
        if digest in self._disk:
            self._disk.remove(digest)
            gone = [_set_aside(self._disk_path(digest))]
            await self._prepare(lambda: _remove(gone))

    def _disk_path(self, digest: str) -> Path:
        return self._disk_dir / _checked(digest)

    def _host_path(self, digest: str) -> Path:
        return self._host_dir / f"{_checked(digest)}.safetensors"


def default_host_dir(disk_dir: Path, host_cache_bytes: int) -> Path:
    """A private folder in memory, or one beside the disk tier where ``/dev/shm`` is missing or too small."""
    parent = _SHM / f"tunefleet-{os.getuid()}"
    try:
        parent.mkdir(mode=0o700, exist_ok=True)
        status, space = parent.lstat(), os.statvfs(parent)
    except OSError:
        return disk_dir / "host"
    is_ours = status.st_uid == os.getuid() and status.st_mode == stat.S_IFDIR | 0o700
    if not is_ours or space.f_bavail * space.f_frsize < host_cache_bytes:
        return disk_dir / "host"
    return parent / hashlib.sha256(str(disk_dir.absolute()).encode()).hexdigest()[:12]


def _identity(folder: Path) -> Identity:
    try:
        return identify(folder)
    except (AdapterInvalid, OSError) as error:
        raise _CopyCorrupt(str(error)) from error


def _set_aside(path: Path) -> Path:
    """Takes a copy's name away at once, so that its slow removal can't hit the next copy of that name."""
    gone = path.with_name(f".gone-{uuid.uuid4().hex}")
    with contextlib.suppress(FileNotFoundError):
        path.rename(gone)
    return gone


def _remove(paths: list[Path]) -> None:
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _checked(digest: str) -> str:
    if not _DIGEST.fullmatch(digest):
        raise InvalidState(f"{digest!r} is no digest")
    return digest


def _failed(message: str, code: str, *, retry_after_s: float | None = RETRY_AFTER_S) -> AdapterLoadFailed:
    return AdapterLoadFailed(message, code=code, param="adapter", retry_after_s=retry_after_s)


def _deleted(digest: str) -> AdapterLoadFailed:
    return _failed(f"adapter {digest[:12]} was deleted meanwhile", "adapter_deleted", retry_after_s=None)
