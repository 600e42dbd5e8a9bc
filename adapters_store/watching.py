"""A router's background work for the store: that it lives, what was deleted, what is pinned, what is garbage.

Each job repeats on its own. What fails, a database, a store or a machine, is tried again until it works; the
log has a line when that begins and one when it ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from typing import NamedTuple, Protocol, TypeVar

from tunefleet.adapters_store.catalog import Catalog
from tunefleet.adapters_store.collecting import Collector
from tunefleet.adapters_store.deleting import Deletions
from tunefleet.adapters_store.records import DeletionRecord
from tunefleet.adapters_store.steps import reached
from tunefleet.adapters_store.threads import Runner
from tunefleet.errors import TunefleetError
from tunefleet.messages import Forgotten, HeldAdapter

logger = logging.getLogger(__name__)

T = TypeVar("T")

LEASE_S = 10.0  # a router of which nothing was heard for so long is dead
MAX_BACKOFF_S = 5.0
COLLECT_AGE_S = 24 * 3600.0  # time to notice that a wrong backup of the catalog was restored
NUM_RECORDS = 100
PLACES = ("disk", "host", "device", "streams")  # of what a router and its machine count


class MachineSide(Protocol):
    """What a router and its machine do with what the catalog decided."""

    async def forget(self, digest: str, keys: Sequence[str] = ()) -> Forgotten:
        """Removes this machine's copies of an adapter, whose objects lay under ``keys``."""
        ...

    async def hold(self, adapters: Sequence[HeldAdapter]) -> None:
        """Exempts these from eviction, and no others."""
        ...

    async def end_streams(self, tenant: str, user_id: str) -> int:
        """Ends what this router is answering to a user; how many answers that were."""
        ...

    async def known_copies(self) -> Collection[str]:
        """Digests of which this machine has copies."""
        ...


class Intervals(NamedTuple):
    """Seconds from the end of a job to its next beginning."""

    beat_s: float = 2.0
    tell_s: float = 0.5
    hold_s: float = 2.0
    remove_s: float = 2.0
    collect_s: float = 3600.0


INTERVALS = Intervals()


class Wakes:
    """Set by what this router does itself, so that its watch needn't wait."""

    def __init__(self) -> None:
        self.deleted = asyncio.Event()
        self.pinned = asyncio.Event()


class Watched(NamedTuple):
    """What a watch works on."""

    catalog: Catalog
    base: str
    deletions: Deletions
    collector: Collector
    router_id: str
    wakes: Wakes
    lookup: Runner
    transfer: Runner


class Watch:
    """A router's jobs: ``running`` from its start to its stop, or ``round`` by round."""

    def __init__(
        self,
        watched: Watched,
        machine: MachineSide,
        intervals: Intervals,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._watched = watched
        self._catalog = watched.catalog
        self._machine = machine
        self._intervals = intervals
        self._clock = clock
        self._beaten_at = clock()
        self._swept = False  # no copy is here that the catalog doesn't know
        self._held: tuple[HeldAdapter, ...] = ()
        self._counted: dict[str, Counter[str]] = {}  # deletion -> copies that went before the last one
        self._over = threading.Event()
        wakes = watched.wakes
        self._jobs = (
            _Job("say that this router lives", self.beat, intervals.beat_s),
            _Job("forget what was deleted", self.tell, intervals.tell_s, wakes.deleted),
            _Job("hold what is pinned", self.hold, intervals.hold_s, wakes.pinned),
            _Job("remove objects of what was deleted", self.remove, intervals.remove_s),
            _Job("collect garbage", self.collect, intervals.collect_s),
        )

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Watch]:
        """Begins once the catalog counts on this router, so that no deletion is done without it.

        Raises:
            StoreError: the catalog can't be used. Later it may fail as it likes.
        """
        await self.beat()
        tasks = [asyncio.create_task(job.repeat(self._over.is_set)) for job in self._jobs]
        try:
            yield self
        finally:
            self._over.set()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._leave()

    async def round(self) -> None:
        """Every job once, in order."""
        for job in self._jobs:
            await job.work()

    async def beat(self) -> None:
        began = self._clock()
        await self._ask(lambda: self._catalog.beat(self._watched.router_id, LEASE_S))
        if began - self._beaten_at > LEASE_S:
            self._swept = False  # deletions may be done that did not wait for us
        self._beaten_at = began

    async def tell(self, *, leaving: bool = False) -> None:
        """Ends streams and forgets copies of what was deleted, and says so in the receipts.

        A request from before a deletion may fetch a copy as long as there are objects, so these go first;
        a router that is leaving has no such requests.
        """
        router_id = self._watched.router_id
        for record in await self._ask(lambda: self._catalog.unacked(router_id, NUM_RECORDS)):
            copies = await self._forgotten(record)
            if copies is not None and (leaving or not record.unnoted):
                await self._ack(record, copies)
        if not self._swept:
            await self._sweep()

    async def hold(self) -> None:
        """Tells the machine what is pinned, when that changed."""
        pinned = await self._ask(lambda: self._catalog.pinned(self._watched.base))
        held = tuple(HeldAdapter(each.ref, each.tier) for each in pinned)
        if held != self._held:
            await self._machine.hold(held)
            self._held = held

    async def remove(self) -> None:
        """Goes on with deletions that nobody works on. One that fails keeps none of the others."""
        failed: TunefleetError | None = None
        for record in await self._ask(lambda: self._catalog.pending_deletions(NUM_RECORDS)):
            try:
                await self._remove(record)
            except TunefleetError as error:
                failed = error
        if failed is not None:
            raise failed

    async def collect(self) -> None:
        """One router at a time does it."""
        watched, lease_s = self._watched, self._intervals.collect_s
        if await self._ask(lambda: self._catalog.claim("collector", watched.router_id, lease_s)):
            collected = await watched.transfer.to_the_end(
                lambda: watched.collector.collect(min_age_s=COLLECT_AGE_S, should_stop=self._over.is_set)
            )
            for sentence in collected.kept:
                logger.warning("not collected: %s", sentence)

    async def _leave(self) -> None:
        """Says what it still can. What fails here, the next start or the end of the lease makes good."""
        with contextlib.suppress(TunefleetError, OSError):
            await self.tell(leaving=True)
        with contextlib.suppress(TunefleetError):
            await self._ask(lambda: self._catalog.leave(self._watched.router_id))

    async def _sweep(self) -> None:
        """Forgets copies of what was deleted while nobody told this machine."""
        copies = list(await self._machine.known_copies())  # before the catalog, which knew each of them
        known = await self._ask(lambda: self._catalog.known_digests(copies))
        for digest in sorted(set(copies) - known):
            await self._machine.forget(digest)
        self._swept = True

    async def _forgotten(self, record: DeletionRecord) -> Counter[str] | None:
        """How many copies went, by place; None: a sequence still uses one, ask again."""
        gone: Counter[str] = Counter()
        in_use: set[str] = set()
        if record.name is None and record.user_id is not None:
            gone["streams"] += await self._machine.end_streams(record.tenant, record.user_id)
        for digest in record.digests:
            forgotten = await self._machine.forget(digest, record.prefixes)
            device = forgotten.device + forgotten.in_use
            gone.update(disk=forgotten.disk, host=forgotten.host, device=device)
            if forgotten.in_use:
                in_use.add(digest)
        gone |= self._counted.get(record.deletion_id, Counter())
        self._counted[record.deletion_id] = gone  # whatever fails from here on: they are gone only once
        # Somebody else's adapter with the same bytes may be in use forever.
        if in_use - await self._ask(lambda: self._catalog.known_digests(sorted(in_use))):
            return None
        return gone

    async def _ack(self, record: DeletionRecord, copies: Counter[str]) -> None:
        watched = self._watched
        counts = {place: copies[place] for place in PLACES}
        await self._ask(lambda: self._catalog.ack_deletion(record.deletion_id, watched.router_id, counts, ()))
        self._counted.pop(record.deletion_id, None)
        reached("delete:told")
        await watched.deletions.finish(record)

    async def _remove(self, record: DeletionRecord) -> None:
        deletions = self._watched.deletions
        await self._watched.transfer.to_the_end(lambda: deletions.remove(record, self._over.is_set))
        self._watched.wakes.deleted.set()
        await deletions.finish(record)

    async def _ask(self, work: Callable[[], T]) -> T:
        return await self._watched.lookup.to_the_end(work)


class _Job:
    """Something to do again and again, at once when it is woken."""

    def __init__(
        self,
        what: str,
        work: Callable[[], Awaitable[None]],
        interval_s: float,
        wake: asyncio.Event | None = None,
    ) -> None:
        self.work = work
        self._what = what
        self._interval_s = interval_s
        self._wake = wake or asyncio.Event()
        self._num_failures = 0  # in a row

    async def repeat(self, is_over: Callable[[], bool]) -> None:
        """Until it is cancelled, or over: work may swallow a cancellation that comes as it ends."""
        while not is_over():
            self._wake.clear()
            try:
                await self.work()
            except Exception as error:  # whatever failed may work later, and this router needs it then
                self._failed(error)
            else:
                self._worked()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._delay_s()):
                    await self._wake.wait()

    def _delay_s(self) -> float:
        backed_off = self._interval_s * 2.0**self._num_failures
        return max(self._interval_s, min(MAX_BACKOFF_S, backed_off))

    def _failed(self, error: Exception) -> None:
        if not self._num_failures:
            expected = isinstance(error, TunefleetError)
            logger.warning("can't %s, trying again: %s", self._what, error, exc_info=not expected)
        self._num_failures = min(self._num_failures + 1, 10)

    def _worked(self) -> None:
        if self._num_failures:
            logger.info("can %s again", self._what)
        self._num_failures = 0
