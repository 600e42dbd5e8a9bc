"""Lending adapters out of the host process's tiers to its replicas."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable

from tunefleet.adapters_store.tiers import Tiers
from tunefleet.core import AdapterRef
from tunefleet.errors import AdapterLoadFailed, TunefleetError
from tunefleet.messages import AdapterReady, AdapterUnavailable, Evict
from tunefleet.runtime.replicas import Record

RETRY_AFTER_S = 1.0


@dataclasses.dataclass
class Lending:
    """Keeps a prepared file in place from the offer until the replica has mapped it, or is gone."""

    tiers: Tiers
    _lent: dict[str, Counter[str]] = dataclasses.field(default_factory=dict)  # replica -> digest -> offers

    async def lend(self, record: Record, ref: AdapterRef) -> None:
        """Brings an adapter to the host tier and offers it to a replica, or tells it why not."""
        try:
            fetched = await self.tiers.fetch(ref)
        except TunefleetError as error:
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
        """The replica is gone."""
        for digest in self._lent.pop(record.replica_id, Counter()).elements():
            self.tiers.unpin(digest)

    async def forget(self, digest: str, records: Iterable[Record]) -> None:
        """Drops every copy on this machine."""
        for record in records:
            record.send(Evict(digest=digest))
        await self.tiers.forget(digest)


def _unavailable(ref: AdapterRef, error: TunefleetError) -> AdapterUnavailable:
    retry_after_s = error.retry_after_s if isinstance(error, AdapterLoadFailed) else None
    return AdapterUnavailable(
        digest=ref.digest,
        key=ref.key,
        message=error.message,
        code=error.code,
        retry_after_s=RETRY_AFTER_S if retry_after_s is None else retry_after_s,
    )
