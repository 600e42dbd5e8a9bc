"""Tokens from replicas to requests: a channel per replica, a run per request.

A run outlives its replica: it goes on at another one, from the tokens already given.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

import msgspec

from tunefleet.core import FinishReason
from tunefleet.errors import AdapterLoadFailed, CapacityError, ReplicaError, TunefleetError
from tunefleet.messages import Cancel, ForgetUser, Progress, Rejected, ReplicaToRouter, Step, Submit
from tunefleet.runtime.placement import choose
from tunefleet.runtime.wire import Connection

if TYPE_CHECKING:
    from tunefleet.runtime.machine import Machine

MAX_REPLICA_LOSSES = 2  # a request that outlives so many replicas may be what ends them
_LOST = object()  # in a run's queue: its replica is gone
_CLOSED = object()  # in a run's queue: nobody wants the rest


class Channel:
    """A connection to one replica, shared by all of a router's runs on it."""

    def __init__(self, on_close: Callable[[], object]) -> None:
        self._connection: Connection[ReplicaToRouter] | None = None
        self._queues: dict[str, asyncio.Queue[object]] = {}
        self._on_closed = on_close

    async def open(self, address: str) -> None:
        _, self._connection = await asyncio.get_running_loop().create_unix_connection(
            lambda: Connection[ReplicaToRouter](ReplicaToRouter, self._on_message, self._on_close), address
        )

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()

    def submit(self, work: Submit) -> asyncio.Queue[object]:
        """The queue gets Progress items, Rejected, or ``_LOST``."""
        queue: asyncio.Queue[object] = asyncio.Queue()
        if self._connection is None or not self._connection.is_open:
            queue.put_nowait(_LOST)
        else:
            self._queues[work.request_id] = queue
            self._connection.send(work)
        return queue

    def leave(self, request_id: str, *, cancel: bool) -> None:
        if self._queues.pop(request_id, None) is not None and cancel and self._connection is not None:
            self._connection.send(Cancel(request_id=request_id))

    def forget_user(self, tenant: str, user_id: str) -> None:
        """Behind all that was submitted and cancelled on this connection before."""
        if self._connection is not None and self._connection.is_open:
            self._connection.send(ForgetUser(tenant=tenant, user_id=user_id))

    def _on_message(self, _: Connection[ReplicaToRouter], message: ReplicaToRouter) -> None:
        if isinstance(message, Rejected):
            self._put(message.request_id, message)
        elif isinstance(message, Step):
            for progress in message.items:
                self._put(progress.request_id, progress)

    def _put(self, request_id: str, item: object) -> None:
        queue = self._queues.get(request_id)
        if queue is not None:
            queue.put_nowait(item)

    def _on_close(self, _: Connection[ReplicaToRouter]) -> None:
        self._on_closed()
        for queue in self._queues.values():
            queue.put_nowait(_LOST)
        self._queues.clear()


class MachineRun:
    """One sequence, on one replica after another if need be; see ``dispatch.Run``."""

    def __init__(self, machine: Machine, work: Submit) -> None:
        self.wake_s = 0.0
        self.cold_base = False
        self.replica_id = ""
        self._machine = machine
        self._work = work
        self._generated: list[int] = list(work.generated)
        self._channel: Channel | None = None
        self._queue: asyncio.Queue[object] | None = None
        self._finished = False

    async def __aiter__(self) -> AsyncIterator[Progress]:
        num_losses = 0
        try:
            while not self._finished:
                queue = self._queue = await self._place()
                while not self._finished:
                    item = await queue.get()
                    if isinstance(item, Progress):
                        yield self._take(item)
                    else:
                        num_losses += item is _LOST
                        self._machine.disregard(self.replica_id)
                        self._leave(cancel=False)
                        break
                if num_losses > MAX_REPLICA_LOSSES:
                    raise ReplicaError(
                        f"the request was running when {num_losses} replicas ended; it is not tried again",
                        code="replica_lost",
                    )
        finally:
            self._leave(cancel=not self._finished)

    async def aclose(self) -> None:
        self._leave(cancel=not self._finished)
        self._finished = True
        if self._queue is not None:
            self._queue.put_nowait(_CLOSED)

    async def _place(self) -> asyncio.Queue[object]:
        """Hands the sequence to a replica, with what earlier ones generated."""
        started = time.monotonic()
        digest = self._work.adapter.digest if self._work.adapter else None
        is_first = not self.replica_id
        if is_first:
            self.cold_base = choose(self._machine.replicas, digest) is None
        while True:
            replica = await self._machine.place(self._work.request_id, digest)
            with contextlib.suppress(OSError):
                self._channel = await self._machine.channel(replica)
                break
        self.replica_id = replica.replica_id
        if is_first and self.cold_base:
            self.wake_s = time.monotonic() - started
        return self._channel.submit(_with_generated(self._work, self._generated))

    def _take(self, progress: Progress) -> Progress:
        if progress.finish_reason is FinishReason.ERROR:
            self._finished = True
            raise _error(progress)
        self._generated += progress.tokens
        self._finished = progress.finish_reason is not None
        return progress

    def _leave(self, *, cancel: bool) -> None:
        if self._channel is not None:
            self._channel.leave(self._work.request_id, cancel=cancel)
            self._channel = None


def _with_generated(work: Submit, generated: list[int]) -> Submit:
    return msgspec.structs.replace(work, generated=tuple(generated))


def _error(progress: Progress) -> TunefleetError:
    if progress.error_code == "queue_full":
        return CapacityError(progress.error, code="queue_full", retry_after_s=progress.retry_after_s or 1.0)
    if progress.error_code.startswith(("adapter_", "store_")):
        return AdapterLoadFailed(
            progress.error, code=progress.error_code, retry_after_s=progress.retry_after_s or None
        )
    return ReplicaError(progress.error, code=progress.error_code)
