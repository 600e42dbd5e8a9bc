"""Lending adapters out of the host process's tiers to its replicas."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Iterable

from tunefleet.adapters_store.tiers import FORGET_WAIT_S, Tiers
from tunefleet.core import AdapterRef
from tunefleet.errors import AdapterLoadFailed
from tunefleet.messages import AdapterReady, AdapterUnavailable, Evict, Evicted, Forgotten
from tunefleet.runtime.replicas import Record


class Lending:
    """Keeps a prepared file in place from the offer until the replica has mapped it, or is gone.

    Args:
        forget_wait_s: replicas have so long to empty a slot.
    """

    def __init__(self, tiers: Tiers, *, forget_wait_s: float = FORGET_WAIT_S) -> None:
        self.tiers = tiers
        self._forget_wait_s = forget_wait_s
        self._lent: dict[str, Counter[str]] = {}  # replica -> digest -> offers
        self._evictions: dict[tuple[str, str], asyncio.Future[bool]] = {}  # replica, digest -> was it active

    async def lend(self, record: Record, ref: AdapterRef) -> None:
        """Brings an adapter to the host tier and offers it to a replica, or tells it why not."""
        try:
            fetched = await self.tiers.fetch(ref)
        except AdapterLoadFailed as error:
            record.send(_unavailable(ref, error))
            return
        if record.connection is None:
            return
        self.tiers.pin(ref.digest)
        self._lent.setdefault(record.replica_id, Counter())[ref.digest] += 1
        record.send(
            AdapterReady(
                digest=ref.digest,
                path=str(fetched.path),
                download_s=fetched.download_s,
                load_s=fetched.load_s,
            )
        )

    def mapped(self, record: Record, digest: str) -> None:
        """The replica holds the file's pages: its name may go."""
        lent = self._lent.get(record.replica_id)
        if lent and lent[digest]:
            lent[digest] -= 1
            self.tiers.unpin(digest)

    def end(self, record: Record) -> None:
        """The replica is gone, and everything in its slots."""
        for digest in self._lent.pop(record.replica_id, Counter()).elements():
            self.tiers.unpin(digest)
        for replica_id, digest in list(self._evictions):
            if replica_id == record.replica_id:
                self._evictions.pop((replica_id, digest)).set_result(digest in record.load.digests)

    async def forget(self, digest: str, records: Iterable[Record], keys: Collection[str] = ()) -> Forgotten:
        """Drops every copy on this machine; replicas that still use theirs drop it when they don't."""
        evictions = [self._evict(record, digest) for record in records if record.connection is not None]
        dropped = await self.tiers.forget(digest, keys)
        if evictions:
            await asyncio.wait(evictions, timeout=self._forget_wait_s)
        done = [eviction.result() for eviction in evictions if eviction.done()]
        return Forgotten(
            digest=digest,
            disk=dropped.disk,
            host=dropped.host,
            device=sum(done),
            in_use=len(evictions) - len(done),
            keys=tuple(keys),
        )

    def evicted(self, record: Record, message: Evicted) -> None:
        """The replica's slot is empty."""
        eviction = self._evictions.pop((record.replica_id, message.digest), None)
        if eviction is not None:
            eviction.set_result(message.was_active)

    def _evict(self, record: Record, digest: str) -> asyncio.Future[bool]:
        """Asks once, however many want to know."""
        key = record.replica_id, digest
        if key not in self._evictions:
            self._evictions[key] = asyncio.get_running_loop().create_future()
            record.send(Evict(digest=digest))
        return self._evictions[key]


def _unavailable(ref: AdapterRef, error: AdapterLoadFailed) -> AdapterUnavailable:
    return AdapterUnavailable(
        digest=ref.digest,
        key=ref.key,
        message=error.message,
        code=error.code,
        retry_after_s=error.retry_after_s or 0.0,
    )
