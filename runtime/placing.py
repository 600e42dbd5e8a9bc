"""A router's requests on their way to a replica: placed at once, or held until one has room."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any, NamedTuple

from tunefleet.core import ReplicaInfo, ReplicaState
from tunefleet.errors import CapacityError
from tunefleet.messages import HostOptions
from tunefleet.runtime.host_link import HostLink
from tunefleet.runtime.placement import Room, choose

HELD_RETRY_AFTER_S = 1.0  # a start takes less, and then the queue moves
TIMEOUT_RETRY_AFTER_S = 5.0


class Placed(NamedTuple):
    """A request's place on a replica, kept until it is given back by ``Placing.release``."""

    replica: ReplicaInfo
    was_held: bool  # no replica had room when it came


class _Held(NamedTuple):
    digest: str | None
    place: asyncio.Future[Placed]


class Placing:
    """Knows the replicas and this router's own requests on them; lives as long as its link.

    Held requests are placed first come, first served, as soon as the link has news or a place comes back.
    """

    def __init__(self, link: HostLink, options: HostOptions, rng: random.Random | None = None) -> None:
        self.replicas: tuple[ReplicaInfo, ...] = ()
        self._link = link
        self._options = options
        self._rng = rng or random.Random()
        self._in_flight: Counter[str] = Counter()  # this router's requests by replica
        self._held: dict[str, _Held] = {}  # by request id
        self._changed = asyncio.Event()
        link.watch(self._on_change)

    @property
    def is_ready(self) -> bool:
        """Some replica is READY."""
        return any(replica.state is ReplicaState.READY for replica in self.replicas)

    @property
    def num_held(self) -> int:
        return len(self._held)

    async def changed(self) -> None:
        """Returns at the link's next news."""
        await self._changed.wait()

    async def place(self, request_id: str, digest: str | None, *, is_accepted: bool = False) -> Placed:
        """A place on a READY replica; waits for one to start or to have room, if need be.

        Args:
            is_accepted: it ran already, and its client may have part of the answer: neither a queue that is
                full nor a start that fails is a reason to refuse it now; only time is.

        Raises:
            CapacityError: ``cold_start_queue_full``, ``cold_start_timeout`` or ``replica_start_failed``.
            ReplicaError: no host process comes up (``host_unavailable``).
        """
        placed = self._try(digest, was_held=False)
        if placed is not None:
            return placed
        if len(self._held) >= self._options.max_queue and not is_accepted:
            raise CapacityError(
                f"{len(self._held)} requests wait for a replica already; try again, or raise max_queue",
                code="cold_start_queue_full",
                retry_after_s=HELD_RETRY_AFTER_S,
            )
        timeout_s = self._options.cold_start_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                return await (self._outwait if is_accepted else self._wait)(request_id, digest)
        except TimeoutError:
            raise CapacityError(
                f"no replica was ready within {timeout_s:g} s; try again, or raise cold_start_timeout_s",
                code="cold_start_timeout",
                retry_after_s=TIMEOUT_RETRY_AFTER_S,
            ) from None

    def release(self, placed: Placed) -> None:
        """The request runs there no more: the next may have its place."""
        replica_id = placed.replica.replica_id
        self._in_flight[replica_id] -= 1
        if not self._in_flight[replica_id]:
            del self._in_flight[replica_id]
        self._place_held()

    def disregard(self, address: str) -> None:
        """A replica takes nothing any more; don't choose it again before the link says otherwise."""
        self.replicas = tuple(replica for replica in self.replicas if replica.address != address)

    async def _outwait(self, request_id: str, digest: str | None) -> Placed:
        """Comes again after each start that fails."""
        while True:
            try:
                return await self._wait(request_id, digest)
            except CapacityError as error:
                await asyncio.sleep(error.retry_after_s)

    async def _wait(self, request_id: str, digest: str | None) -> Placed:
        """Holds a request, and has the host process know of it."""
        held = self._held[request_id] = _Held(digest, asyncio.get_running_loop().create_future())
        waking = asyncio.create_task(self._wake(request_id))
        either: set[asyncio.Future[Any]] = {waking, held.place}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if (
                not held.place.done()
            ):  # nothing starts: the queue of a replica that is full is better than none
                placed = self._try(digest, was_held=True, hold=False)
                if placed is not None:
                    return placed
                await waking  # raises why
            return held.place.result()
        except BaseException:
            if held.place.done():
                self.release(held.place.result())
            raise
        finally:
            self._held.pop(request_id, None)
            if not waking.cancel() and not waking.cancelled():
                waking.exception()  # which came too late to matter

    async def _wake(self, request_id: str) -> None:
        """Waits for one replica after another: each may be full, or gone, when its turn comes."""
        while True:
            await self._link.place(request_id)

    def _on_change(self, replicas: tuple[ReplicaInfo, ...]) -> None:
        self.replicas = replicas
        self._place_held()
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _place_held(self) -> None:
        """Where one can't be placed, nor can those behind it: what holds them holds all adapters alike."""
        for request_id, held in list(self._held.items()):
            placed = self._try(held.digest, was_held=True)
            if placed is None:
                return
            del self._held[request_id]
            held.place.set_result(placed)

    def _try(self, digest: str | None, *, was_held: bool, hold: bool = True) -> Placed | None:
        room = Room(self._options.max_num_seqs, self._in_flight)
        replica = choose(self.replicas, digest, room, self._rng, hold=hold)
        if replica is None:
            return None
        self._in_flight[replica.replica_id] += 1
        return Placed(replica, was_held)
