"""A machine's copies of adapters: store to disk to memory, for one host process.

The disk tier holds the files as uploaded and survives restarts. The host tier holds prepared files in memory
(a tmpfs where there is one), which replicas map. Every copy is verified against the digest each time it goes
up a tier, so a byte that rotted or was tampered with is dropped and fetched anew, never served.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import logging
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tunefleet.adapters_store.copies import Copies, checked_digest
from tunefleet.adapters_store.disk_tier import CopyCorrupt, DiskTier
from tunefleet.adapters_store.failures import Failures, load_failed
from tunefleet.adapters_store.flights import Fetched, Flight, FlightAbandoned
from tunefleet.adapters_store.holds import Holds
from tunefleet.adapters_store.host_tier import HostTier
from tunefleet.adapters_store.objects import DISK_FULL, ObjectStore
from tunefleet.adapters_store.prepare import (
    PreparedDtype,
    max_prepared_bytes,
    prepare_adapter,
    prepared_bytes,
)
from tunefleet.adapters_store.slot_layout import SlotLayout
from tunefleet.adapters_store.threads import Runner
from tunefleet.core import AdapterRef, Manifest, PinTier
from tunefleet.errors import AdapterInvalid, AdapterLoadFailed, InvalidState, StoreError
from tunefleet.messages import HeldAdapter

FETCH_WAIT_S = 20.0  # a request waits so long for an adapter, while its flight may go on
SLOW_RETRY_S = 5.0
FORGET_WAIT_S = 5.0
NUM_TRANSFERS = 8
NUM_LOADS = 2

_BAD_OBJECTS = {"object_corrupt": "adapter_corrupt", "object_not_found": "adapter_lost"}

log = logging.getLogger("tunefleet.tiers")


class Dropped(NamedTuple):
    """Copies that were there and are gone."""

    disk: int
    host: int


class Tiers:
    """Disk and host tier of one machine; one host process at a time owns the two folders.

    Everything runs on one event loop; I/O runs in threads. ``fetch`` may be called by any number of tasks:
    one of them does the work. A fetched path stays until its digest is evicted, which pinning prevents: pin
    right after ``fetch`` returns, with no await between, and unpin when the last replica has unmapped it.

    Args:
        clock: monotonic seconds.
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
        fetch_wait_s: float = FETCH_WAIT_S,
        forget_wait_s: float = FORGET_WAIT_S,
    ) -> None:
        self._objects = objects
        self._manifest = manifest
        self._layout = SlotLayout(manifest.linears)
        self._dtype: PreparedDtype = dtype
        self._clock = clock
        self._fetch_wait_s = fetch_wait_s
        self._forget_wait_s = forget_wait_s
        self._disk = DiskTier(disk_dir, disk_cache_bytes)
        self._host = HostTier(host_dir, host_cache_bytes)
        self._pins: collections.Counter[str] = collections.Counter()
        self._holds = Holds(
            disk_bytes=disk_cache_bytes, host_bytes=host_cache_bytes, prepared_bytes=self._prepared_bytes
        )
        self._flights: dict[str, Flight] = {}
        self._tasks: dict[Flight, asyncio.Task[None]] = {}  # of abandoned flights too
        self._failures = Failures(clock)
        self._transfer = Runner(NUM_TRANSFERS)
        self._prepare = Runner(NUM_LOADS)

    async def fetch(self, ref: AdapterRef) -> Fetched:
        """The prepared file of an adapter, brought up from wherever a copy is.

        Raises:
            AdapterLoadFailed: out of reach, slow, corrupt or too large; ``retry_after_s`` says when to ask
                again, None that there is no use in it.
        """
        try:
            async with asyncio.timeout(self._fetch_wait_s):
                return await self._up(ref, "host")
        except TimeoutError:
            raise AdapterLoadFailed(
                f"adapter {ref.digest[:12]} is still on its way after {self._fetch_wait_s:g} s; try again",
                code="adapter_slow",
                param="adapter",
                retry_after_s=SLOW_RETRY_S,
            ) from None

    async def prefetch(self, ref: AdapterRef, tier: PinTier) -> None:
        """Brings an adapter up to ``tier``, however long that takes; raises as ``fetch``."""
        await self._up(ref, tier)

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

    def hold(self, holder: Hashable, adapters: Sequence[HeldAdapter]) -> None:
        """Exempts adapters from eviction, as soon as they are there, instead of what ``holder`` held before.

        What doesn't fit is refused with a line in the log.
        """
        self._holds.hold(holder, adapters)

    def missing_held(self) -> list[HeldAdapter]:
        """Held adapters that are not in their tier."""
        return [
            held
            for held in self._holds.granted()
            if held.adapter.digest not in self._disk
            or (held.tier == "host" and held.adapter.digest not in self._host)
        ]

    async def forget(self, digest: str, keys: Collection[str] = ()) -> Dropped:
        """Drops every copy, mapped or not (a mapped file's memory goes with the last mapping).

        What is on its way is dropped when it arrives; that is waited for, but not for long.

        Args:
            keys: of the objects that were deleted. If the same bytes are on their way from others, they are
                somebody else's by now, and stay. Without any: whatever there is.
        """
        flight = self._flights.get(checked_digest(digest))
        if flight is not None and keys and flight.ref.key not in keys:
            return Dropped(0, 0)
        if flight is not None:
            del self._flights[digest]
            flight.abandon()
        self._holds.forget(digest)
        disk, host = self._disk.take_out(digest), self._host.take_out(digest)
        await self._disk.remove([disk])
        await self._host.remove([host])
        if flight is not None:
            await asyncio.wait([self._tasks[flight]], timeout=self._forget_wait_s)
        return Dropped(int(disk is not None), int(host is not None))

    def host_bytes(self) -> dict[str, int]:
        """Size of each prepared file in memory, the one to be evicted first at the front."""
        return self._host.sizes()

    def disk_bytes(self) -> dict[str, int]:
        return self._disk.sizes()

    async def close(self) -> None:
        """Waits for what is under way, then empties the host tier."""
        if self._tasks:
            await asyncio.wait(list(self._tasks.values()))
        await self._host.close()

    def check(self) -> None:
        """Raises InvalidState unless folders and books agree; only while nothing is under way."""
        self._host.check()
        self._disk.check()

    async def _up(self, ref: AdapterRef, tier: PinTier) -> Fetched:
        """Joins or starts flights until the adapter is in ``tier``, or its own objects have failed.

        Others may have the same bytes under other keys: what becomes of theirs is not this caller's trouble.
        """
        digest = checked_digest(ref.digest)
        self._pins[digest] += 1  # until this caller has it, nobody's eviction may take it
        try:
            while not self._is_in(digest, tier):
                flight = self._flights.get(digest) or self._launch(ref, tier)
                with self._anothers_trouble(flight.ref, ref):
                    await asyncio.wait([flight.landed])  # which doesn't end with this caller
                    fetched = flight.landed.result()
                    if self._is_in(digest, tier):
                        return fetched
            copies = self._copies(tier)
            copies.touch(digest)
            return Fetched(copies.path(digest), 0.0, 0.0)
        finally:
            self.unpin(digest)

    @contextlib.contextmanager
    def _anothers_trouble(self, theirs: AdapterRef, ours: AdapterRef) -> Iterator[None]:
        try:
            yield
        except AdapterLoadFailed:
            if theirs.key == ours.key:
                raise

    def _is_in(self, digest: str, tier: PinTier) -> bool:
        return self._copies(tier).is_there(digest)

    def _copies(self, tier: PinTier) -> Copies:
        return self._host if tier == "host" else self._disk

    def _launch(self, ref: AdapterRef, tier: PinTier) -> Flight:
        """Starts the one flight of a digest; it goes on if those who wait are cancelled."""
        self._failures.raise_recent(ref)
        flight = self._flights[ref.digest] = Flight(ref, tier)
        task = self._tasks[flight] = asyncio.create_task(self._fly(flight))
        task.add_done_callback(lambda _: self._tasks.pop(flight))
        return flight

    async def _fly(self, flight: Flight) -> None:
        """One flight: every way in which it can fail is an AdapterLoadFailed."""
        result: Fetched | AdapterLoadFailed
        try:
            result = await self._climb(flight)
        except FlightAbandoned:
            return
        except Exception as error:  # whatever it is, those who wait must be told
            result = _failure(flight.ref, error)
        if flight.is_abandoned:
            return
        del self._flights[flight.ref.digest]
        if isinstance(result, AdapterLoadFailed):
            self._failures.note(flight.ref, result)
        flight.land(result)

    async def _climb(self, flight: Flight) -> Fetched:
        """Store to disk to host; a disk copy that turns out corrupt is replaced once."""
        digest = flight.ref.digest
        download_s = 0.0
        while True:
            is_fresh = not self._is_in(digest, "disk")
            if is_fresh:
                download_s += await self._to_disk(flight)
            try:
                load_s = await self._to_host(flight)
                return Fetched(self._copies(flight.tier).path(digest), download_s, load_s)
            except CopyCorrupt as error:
                flight.check()
                if is_fresh:
                    await self._disk.quarantine(digest)
                    raise _corrupt(flight.ref, error) from error
                log.warning("the disk copy of adapter %s is corrupt (%s); fetching it again", digest, error)
                await self._disk.remove([self._disk.take_out(digest)])
                flight.check()

    async def _to_disk(self, flight: Flight) -> float:
        """Downloads both files; returns seconds."""
        began, ref = self._clock(), flight.ref
        with self._booking(self._disk, flight):
            await self._disk.book(ref.digest, ref.size_bytes, self._is_needed_on_disk)
            flight.check()
            received = await self._transfer(lambda: self._disk.receive(self._objects, ref))
            if flight.is_abandoned:
                await self._disk.discard(received)
            flight.check()
            await self._disk.publish(received, ref.digest)
        return self._clock() - began

    async def _to_host(self, flight: Flight) -> float:
        """Verifies the disk copy and, if it goes there, writes the prepared file; returns seconds."""
        began, digest = self._clock(), flight.ref.digest
        checked = await self._prepare(lambda: self._disk.verified(flight.ref, self._manifest))
        flight.check()
        self._disk.touch(digest)
        if flight.tier == "disk":
            return self._clock() - began
        disk, written = self._disk.path(digest), self._host.new_path()
        with self._booking(self._host, flight):
            size = prepared_bytes(checked, self._layout, self._dtype)
            await self._host.book(digest, size, self._is_needed_on_host)
            flight.check()
            await self._prepare(
                lambda: prepare_adapter(disk, checked, written, layout=self._layout, dtype=self._dtype)
            )
            if flight.is_abandoned:
                await self._host.remove([written])
            flight.check()
            await self._host.publish(written, digest)
        return self._clock() - began

    @contextlib.contextmanager
    def _booking(self, copies: Copies, flight: Flight) -> Iterator[None]:
        """Takes a booking back if no copy comes to be; that of an abandoned flight is gone already."""
        flight.check()
        try:
            yield
            flight.check()
        except BaseException:
            if not flight.is_abandoned and flight.ref.digest in copies:
                copies.unbook(flight.ref.digest)
            raise

    def _is_needed_on_disk(self, digest: str) -> bool:
        return digest in self._flights or self._holds.tier(digest) is not None

    def _is_needed_on_host(self, digest: str) -> bool:
        return digest in self._flights or digest in self._pins or self._holds.tier(digest) == "host"

    def _prepared_bytes(self, ref: AdapterRef) -> int:
        """Of a prepared file: as it is, or at most."""
        known = self._host.size_of(ref.digest)
        return max_prepared_bytes(ref.rank, self._layout, self._dtype) if known is None else known


def _failure(ref: AdapterRef, error: Exception) -> AdapterLoadFailed:
    """What those who wait are told, and the log where somebody has to do something."""
    name = f"adapter {ref.digest[:12]}"
    if isinstance(error, AdapterLoadFailed):
        return error
    if isinstance(error, AdapterInvalid):
        failed = load_failed(f"{name} can't be served: {error.message}", "adapter_invalid", for_good=True)
    elif isinstance(error, StoreError) and error.code in _BAD_OBJECTS:
        log.error("%s under %s: %s", name, ref.key, error)
        failed = load_failed(f"{name}: {error.message}; upload it again", _BAD_OBJECTS[error.code])
    else:
        if not isinstance(error, (StoreError, OSError)):
            log.error("%s can't be fetched", name, exc_info=error)
        code = "adapter_no_room" if _is_full(error) else "adapter_unavailable"
        failed = load_failed(f"{name} can't be fetched now: {error}", code)
    failed.__cause__ = error
    return failed


def _is_full(error: Exception) -> bool:
    """The disk has less room than the budget says."""
    if isinstance(error, StoreError):
        return error.code == "disk_full"
    return isinstance(error, OSError) and error.errno in DISK_FULL


def _corrupt(ref: AdapterRef, error: CopyCorrupt) -> AdapterLoadFailed:
    log.error("the store's copy of adapter %s under %s is corrupt: %s", ref.digest, ref.key, error)
    return load_failed(
        f"adapter {ref.digest[:12]}: the store's copy is not what was uploaded ({error}); upload it again",
        "adapter_corrupt",
    )
