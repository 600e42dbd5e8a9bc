"""Brings adapters up before they are asked for."""

from __future__ import annotations

import asyncio
import collections
import logging
from collections.abc import Hashable, Sequence

from tunefleet.adapters_store.tiers import Tiers
from tunefleet.core import AdapterRef, PinTier
from tunefleet.errors import AdapterLoadFailed
from tunefleet.messages import HeldAdapter

NUM_PREFETCHES = 2  # at once: most transfers are left to those who wait for theirs
RETRY_S = 30.0

log = logging.getLogger("tunefleet.tiers")


class Keeper:
    """Keeps held adapters in their tiers, and brings up those that are asked for, a few at a time.

    Lives as long as its Tiers; ``close`` it first. What can't be had is logged, and what is held tried again.
    """

    def __init__(self, tiers: Tiers, *, retry_s: float = RETRY_S) -> None:
        self._tiers = tiers
        self._retry_s = retry_s
        self._asked: collections.deque[HeldAdapter] = collections.deque()
        self._missing: collections.deque[HeldAdapter] = collections.deque()
        self._failed: dict[str, str] = {}  # held digests that failed -> what the log said
        self._workers: set[asyncio.Task[None]] = set()
        self._retry_timer: asyncio.TimerHandle | None = None
        self._idle = asyncio.Event()
        self._idle.set()

    def hold(self, holder: Hashable, adapters: Sequence[HeldAdapter]) -> None:
        """Holds these for ``holder``, instead of what it held before, and brings them to their tiers."""
        self._tiers.hold(holder, adapters)
        self._look()

    def release(self, holder: Hashable) -> None:
        self._tiers.hold(holder, ())
        self._look()

    def prefetch(self, ref: AdapterRef, tier: PinTier) -> None:
        self._asked.append(HeldAdapter(ref, tier))
        self._work()

    async def settled(self) -> None:
        """Returns when there is nothing to do for now."""
        await self._idle.wait()

    async def close(self) -> None:
        self._asked.clear()
        self._missing.clear()
        await asyncio.gather(*self._workers)
        if self._retry_timer is not None:
            self._retry_timer.cancel()

    def _look(self) -> None:
        """Looks for what is held and isn't there."""
        self._missing = collections.deque(self._tiers.missing_held())
        self._work()

    def _work(self) -> None:
        num_queued = len(self._asked) + len(self._missing)
        for _ in range(min(NUM_PREFETCHES - len(self._workers), num_queued)):
            self._idle.clear()
            worker = asyncio.get_running_loop().create_task(self._bring_all())
            self._workers.add(worker)
            worker.add_done_callback(self._on_worker_done)

    async def _bring_all(self) -> None:
        while self._asked or self._missing:
            wanted = (self._asked or self._missing).popleft()
            digest = wanted.adapter.digest
            try:
                await self._tiers.prefetch(wanted.adapter, wanted.tier)
                self._failed.pop(digest, None)
            except AdapterLoadFailed as error:
                if self._failed.get(digest) != error.code:
                    log.warning("%s (to be in the %s tier)", error.message, wanted.tier)
                self._failed[digest] = error.code

    def _on_worker_done(self, worker: asyncio.Task[None]) -> None:
        self._workers.discard(worker)
        if self._workers:
            return
        self._idle.set()
        held_digests = {held.adapter.digest for held in self._tiers.missing_held()}
        self._failed = {digest: code for digest, code in self._failed.items() if digest in held_digests}
        if self._failed:
            if self._retry_timer is not None:
                self._retry_timer.cancel()
            self._retry_timer = asyncio.get_running_loop().call_later(self._retry_s, self._look)
