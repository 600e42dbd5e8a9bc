"""A host process without processes: the shortest ``HostLink`` there is, and what tests serve from."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from tunefleet.core import AdapterRef, LoggedError, PinTier, ReplicaInfo, ReplicaState
from tunefleet.errors import CapacityError, ReplicaError
from tunefleet.messages import Forgotten, HeldAdapter, Status
from tunefleet.runtime.host_link import OnChange

RETRY_AFTER_S = 0.1
Start = Callable[[str], Awaitable[str]]


class MemoryHost:
    """Replicas by ``start``, for the links that ``link`` gives; lives in one event loop.

    Args:
        start: makes the replica of that id and returns its address, or raises ReplicaError.
        max_replicas, target_concurrency: one replica per so many waiting requests, up to so many replicas.
    """

    def __init__(self, start: Start, *, max_replicas: int = 1, target_concurrency: int = 32) -> None:
        self.errors: list[LoggedError] = []
        self.waiting: dict[str, asyncio.Future[None]] = {}  # requests that wait for a replica
        self.copies: dict[str, PinTier] = {}  # digest -> the tier it is in
        self._start = start
        self._max_replicas = max_replicas
        self._target_concurrency = target_concurrency
        self._replicas: dict[str, ReplicaInfo] = {}
        self._links: list[MemoryLink] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_started = 0

    @property
    def replicas(self) -> tuple[ReplicaInfo, ...]:
        return tuple(self._replicas.values())

    def link(self) -> MemoryLink:
        return MemoryLink(self)

    def attach(self, link: MemoryLink) -> None:
        self._links.append(link)
        link.tell(self.replicas)

    def detach(self, link: MemoryLink) -> None:
        if link in self._links:
            self._links.remove(link)

    def scale(self) -> None:
        """Starts the replicas that so many waiting requests are worth, and no more."""
        num_waiting = sum(not waiting.done() for waiting in self.waiting.values())
        wanted = min(math.ceil(num_waiting / self._target_concurrency), self._max_replicas)
        for _ in range(wanted - len(self._replicas)):
            self._num_started += 1
            new = ReplicaInfo(
                replica_id=f"r{self._num_started}", state=ReplicaState.NEW, address="", device="cpu"
            )
            self.update(new)
            task = asyncio.get_running_loop().create_task(self._run(new))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def update(self, replica: ReplicaInfo) -> None:
        """A replica's state or load is another."""
        self._replicas[replica.replica_id] = replica
        self._tell()

    def lose(self, replica_id: str) -> None:
        """A replica is gone; another starts for those who wait."""
        if self._replicas.pop(replica_id, None) is not None:
            self._tell()
            self.scale()

    def refuse(self, reason: str) -> None:
        """Nothing starts for those who wait, and why."""
        for waiting in self.waiting.values():
            if not waiting.done():
                waiting.set_exception(
                    CapacityError(
                        f"no replica could be started: {reason}",
                        code="replica_start_failed",
                        retry_after_s=RETRY_AFTER_S,
                    )
                )

    def restart(self) -> None:
        """The host process is gone, its replicas and copies with it, and comes back."""
        self._replicas.clear()
        self.copies.clear()
        links, self._links = self._links, []
        for link in links:
            link.tell(())
        for link in links:
            link.rejoin()
        self.scale()

    async def _run(self, new: ReplicaInfo) -> None:
        self.update(msgspec.structs.replace(new, state=ReplicaState.STARTING))
        try:
            address = await self._start(new.replica_id)
        except ReplicaError as error:
            reason = f"replica {new.replica_id}: {error.message}"
            self.errors.append(LoggedError(at=time.time(), message=reason))
            self.refuse(reason)
            self.lose(new.replica_id)
            return
        if new.replica_id in self._replicas:  # it may have been lost meanwhile
            self.update(msgspec.structs.replace(new, state=ReplicaState.READY, address=address))
            for waiting in self.waiting.values():
                if not waiting.done():
                    waiting.set_result(None)

    def _tell(self) -> None:
        for link in list(self._links):
            link.tell(self.replicas)


class MemoryLink:
    """One router's link to a MemoryHost; see ``HostLink``."""

    def __init__(self, host: MemoryHost) -> None:
        self.tell: OnChange = lambda replicas: None
        self._host = host
        self._held: tuple[HeldAdapter, ...] = ()

    def watch(self, on_change: OnChange) -> None:
        self.tell = on_change

    async def join(self) -> None:
        self._host.attach(self)

    async def leave(self) -> None:
        self._host.detach(self)

    def rejoin(self) -> None:
        """To a host process that came back: all that this router holds is told again."""
        self._host.attach(self)
        self.hold(self._held)

    async def place(self, request_id: str) -> None:
        waiting = self._host.waiting[request_id] = asyncio.get_running_loop().create_future()
        self._host.scale()
        try:
            await waiting
        finally:
            self._host.waiting.pop(request_id, None)

    async def forget(self, digest: str, keys: Sequence[str] = ()) -> Forgotten:
        tier = self._host.copies.pop(digest, None)
        return Forgotten(digest=digest, disk=int(tier is not None), host=int(tier == "host"))

    def hold(self, adapters: Sequence[HeldAdapter]) -> None:
        self._held = tuple(adapters)
        for held in adapters:
            self._host.copies[held.adapter.digest] = held.tier

    async def prefetch(self, ref: AdapterRef, tier: PinTier) -> None:
        self._host.copies.setdefault(ref.digest, tier)

    async def status(self) -> Status:
        host = self._host
        return Status(
            pid=os.getpid(),
            parked_pid=0,
            replicas=host.replicas,
            pss_bytes={},
            host_tier={digest: 1 for digest, tier in host.copies.items() if tier == "host"},
            disk_tier=dict.fromkeys(host.copies, 1),
            num_held=len(host.waiting),
            errors=tuple(host.errors),
        )
