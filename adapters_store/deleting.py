"""What follows when a version or a user was taken out of the catalog: objects, copies, the receipt.

The catalog's deletion row is the work list. Whoever works on it may die at any point: objects are found by
listing, removing twice is no error, and another router goes on when the claim runs out.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable, Iterator

from tunefleet.adapters_store import views
from tunefleet.adapters_store.catalog import Catalog
from tunefleet.adapters_store.objects import ObjectStore, staging_prefix
from tunefleet.adapters_store.records import DeletionRecord
from tunefleet.adapters_store.steps import reached
from tunefleet.adapters_store.threads import Runner
from tunefleet.core import CONFIG_FILE, Receipt

logger = logging.getLogger(__name__)

CLAIM_S = 30.0  # renewed with every upload whose objects go
WAIT_S = 5.0  # that an answer waits for the last place
POLL_S = 0.05
_URLS = (
    "an upload had URLs of the object store, which work until they expire, an hour at most: files that are "
    "put there in that time are nobody's, and are collected a day later"
)


class Deletions:
    """Lives as long as the store that made it, which closes it.

    Args:
        on_removed: called when a deletion's objects are gone, or could not be removed.
    """

    def __init__(
        self,
        objects: ObjectStore,
        catalog: Catalog,
        router_id: str,
        *,
        lookup: Runner,
        transfer: Runner,
        on_removed: Callable[[], None],
        wait_s: float = WAIT_S,
    ) -> None:
        self._objects = objects
        self._catalog = catalog
        self._router_id = router_id
        self._lookup = lookup
        self._transfer = transfer
        self._on_removed = on_removed
        self._wait_s = wait_s
        self._removing: set[asyncio.Task[None]] = set()
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._in_work: set[str] = set()  # deletions whose objects a thread of ours removes

    async def settle(self, record: DeletionRecord) -> Receipt:
        """Removes the objects and waits, for a while, until every place has answered.

        Without the last answer the receipt is ``pending``, and the routers' watches go on.
        """
        clock = asyncio.get_running_loop().time
        until = clock() + self._wait_s
        removing = asyncio.ensure_future(self._transfer.to_the_end(lambda: self.remove(record)))
        self._removing.add(removing)
        removing.add_done_callback(self._over)
        await asyncio.wait([removing], timeout=self._wait_s)
        while (finished := await self.finish(record)) is None and clock() < until and not _failed(removing):
            await asyncio.sleep(POLL_S)
        if finished is None:
            finished = await self._lookup(lambda: self._catalog.deletion(record.tenant, record.deletion_id))
        return views.receipt(finished)

    async def finish(self, record: DeletionRecord) -> DeletionRecord | None:
        """Done, if every place has answered."""
        finished = await self._lookup(lambda: self._catalog.finish_deletion(record.deletion_id))
        if finished is not None:
            reached("delete:finished")
        return finished

    def remove(self, record: DeletionRecord, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Removes the objects, unless somebody else does. Blocking."""
        with self._alone(record.deletion_id) as alone:
            for prefix in record.unnoted if alone else ():
                if should_stop() or self._closing.is_set() or not self._claimed(record):
                    return
                self._remove(record.deletion_id, prefix)

    async def close(self) -> None:
        """Waits for one upload's objects to be removed; another router, or the next start, goes on."""
        self._closing.set()
        await asyncio.gather(*self._removing, return_exceptions=True)

    @contextlib.contextmanager
    def _alone(self, deletion_id: str) -> Iterator[bool]:
        """Two threads that remove the same objects would count each other's."""
        with self._lock:
            alone = deletion_id not in self._in_work
            self._in_work.add(deletion_id)
        try:
            yield alone
        finally:
            if alone:
                self._in_work.discard(deletion_id)

    def _claimed(self, record: DeletionRecord) -> bool:
        return self._catalog.claim_deletion(record.deletion_id, self._router_id, CLAIM_S)

    def _remove(self, deletion_id: str, prefix: str) -> None:
        """By listing, so that what a broken upload left goes too."""
        num_objects, kept = 0, self._may_still_come(prefix)
        for found in list(self._objects.list(f"{prefix}/")):
            deleted = self._objects.delete(found.key)
            num_objects += deleted.num_versions
            kept += deleted.kept
            reached("delete:object-gone")
        self._catalog.note_objects(deletion_id, prefix, num_objects, kept)
        reached("delete:noted")

    def _may_still_come(self, prefix: str) -> list[str]:
        is_staged = prefix == staging_prefix(*prefix.split("/")[-2:])
        has_urls = is_staged and self._objects.presign_put(f"{prefix}/{CONFIG_FILE}", expires_s=1) is not None
        return [_URLS] if has_urls else []

    def _over(self, removing: asyncio.Task[None]) -> None:
        self._removing.discard(removing)
        self._on_removed()
        if _failed(removing):
            logger.warning("objects of a deletion could not be removed yet: %s", removing.exception())


def _failed(removing: asyncio.Task[None]) -> bool:
    return removing.done() and not removing.cancelled() and removing.exception() is not None
