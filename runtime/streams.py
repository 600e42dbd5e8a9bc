"""Tokens from replicas to requests: a channel per replica, a run per request.

A run outlives its replica: it goes on at another one, from the tokens already given.
"""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple, Protocol

import msgspec

from tunefleet.core import FinishReason, ReplicaInfo
from tunefleet.errors import AdapterLoadFailed, CapacityError, ReplicaError, TunefleetError
from tunefleet.messages import Cancel, ForgetUser, Progress, Rejected, ReplicaToRouter, Step, Submit, Trial
from tunefleet.runtime.addresses import dial
from tunefleet.runtime.losses import Loss, Losses
from tunefleet.runtime.placing import Placed, Placing
from tunefleet.runtime.wire import Connection


class Elsewhere(enum.Enum):
    """Why a replica hasn't begun with a request, which is nobody's fault."""

    REJECTED = "it takes nothing new"
    CLOSED = "the channel was closed before"
    CANCELLED = "nobody wants the rest"


News = Progress | Loss | Elsewhere


class _Listener(NamedTuple):
    queue: asyncio.Queue[News]
    on_end: Callable[[], None]


class Channel:
    """A connection to one replica, shared by all of a router's runs on it."""

    def __init__(self, on_close: Callable[[], object]) -> None:
        self._connection = Connection[ReplicaToRouter](ReplicaToRouter, self._on_message, self._on_close)
        self._listeners: dict[str, _Listener] = {}  # by request id
        self._on_closed = on_close
        self._on_trial = ""  # the request that alone is being computed, whoever's it is

    async def open(self, address: str) -> None:
        await dial(address, self._connection)

    def close(self) -> None:
        self._connection.close()

    def submit(self, work: Submit, on_end: Callable[[], None]) -> asyncio.Queue[News]:
        """The news of a sequence, up to its last Progress or whatever else ends its time here.

        Args:
            on_end: called when that comes, however late it is read; not for who leaves before.
        """
        queue: asyncio.Queue[News] = asyncio.Queue()
        self._listeners[work.request_id] = _Listener(queue, on_end)
        if self._connection.is_open:
            self._connection.send(work)
        else:
            self._put(work.request_id, Elsewhere.CLOSED)
        return queue

    def leave(self, request_id: str) -> None:
        """Nobody wants the rest."""
        if self._listeners.pop(request_id, None) is not None:
            self._connection.send(Cancel(request_id=request_id))

    def forget_user(self, tenant: str, user_id: str) -> None:
        """Behind all that was submitted and cancelled on this connection before."""
        self._connection.send(ForgetUser(tenant=tenant, user_id=user_id))

    def _on_message(self, _: Connection[ReplicaToRouter], message: ReplicaToRouter) -> None:
        match message:
            case Step():
                for progress in message.items:
                    self._put(progress.request_id, progress)
            case Rejected():
                self._put(message.request_id, Elsewhere.REJECTED)
            case Trial():
                self._on_trial = message.request_id

    def _put(self, request_id: str, news: News) -> None:
        listener = self._listeners.get(request_id)
        if listener is None:
            return
        listener.queue.put_nowait(news)
        if not isinstance(news, Progress) or news.finish_reason is not None:
            del self._listeners[request_id]
            listener.on_end()

    def _on_close(self, _: Connection[ReplicaToRouter]) -> None:
        self._on_closed()
        for request_id in list(self._listeners):
            self._put(request_id, self._loss_of(request_id))

    def _loss_of(self, request_id: str) -> Loss:
        if not self._on_trial:
            return Loss.TOGETHER
        return Loss.ALONE if request_id == self._on_trial else Loss.BESIDE


class Channels(Protocol):
    """Where a run finds the channel of its replica; the machine."""

    async def channel(self, replica: ReplicaInfo) -> Channel:
        """Raises OSError when the replica can't be reached."""
        ...


class MachineRun:
    """One sequence, on one replica after another if need be; see ``dispatch.Run``."""

    def __init__(self, placing: Placing, channels: Channels, work: Submit) -> None:
        self.wake_s = 0.0
        self.cold_base = False
        self.replica_id = ""
        self._placing = placing
        self._channels = channels
        self._work = work
        self._generated: list[int] = list(work.generated)
        self._losses = Losses()
        self._address = ""
        self._placed: Placed | None = None
        self._channel: Channel | None = None
        self._queue: asyncio.Queue[News] = asyncio.Queue()
        self._finished = False

    async def __aiter__(self) -> AsyncIterator[Progress]:
        self.cold_base = not self._placing.is_ready
        try:
            while not self._finished:
                await self._move()
                while isinstance(news := await self._queue.get(), Progress):
                    yield self._take(news)
                    if self._finished:
                        return
                self._lose(news)
        finally:
            self._leave()

    async def aclose(self) -> None:
        self._leave()
        self._finished = True
        self._queue.put_nowait(Elsewhere.CANCELLED)

    async def _move(self) -> None:
        """Hands the sequence to a replica, with what earlier ones generated."""
        started = time.monotonic()
        is_first = not self.replica_id
        placed, self._channel = await self._reach()
        self.replica_id, self._address = placed.replica.replica_id, placed.replica.address
        if is_first and placed.was_held:
            self.wake_s = time.monotonic() - started
        if not self._finished:  # else it was closed meanwhile
            self._queue = self._channel.submit(self._continued(), self._give_back)

    async def _reach(self) -> tuple[Placed, Channel]:
        """A place, and the way there."""
        digest = self._work.adapter.digest if self._work.adapter else None
        while True:
            placed = self._placed = await self._placing.place(
                self._work.request_id, digest, is_accepted=bool(self.replica_id)
            )
            try:
                return placed, await self._channels.channel(placed.replica)
            except OSError:
                self._give_back()

    def _continued(self) -> Submit:
        return msgspec.structs.replace(
            self._work, generated=tuple(self._generated), suspect=self._losses.is_suspect
        )

    def _take(self, progress: Progress) -> Progress:
        if progress.finish_reason is FinishReason.ERROR:
            self._finished = True
            raise _error(progress)
        if progress.tokens:
            self._generated += progress.tokens
            self._losses.clear()
        self._finished = progress.finish_reason is not None
        return progress

    def _lose(self, news: Loss | Elsewhere) -> None:
        """The replica is gone, or takes nothing any more."""
        if news is Elsewhere.REJECTED:
            self._placing.disregard(self._address)
        self._leave()
        if isinstance(news, Loss):
            self._losses.note(news)

    def _leave(self) -> None:
        """Cancels the sequence where it still runs; safe to call again."""
        if self._channel is not None:
            self._channel.leave(self._work.request_id)
            self._channel = None
        self._give_back()

    def _give_back(self) -> None:
        """The replica doesn't run it any more."""
        placed, self._placed = self._placed, None
        if placed is not None:
            self._placing.release(placed)


def _error(progress: Progress) -> TunefleetError:
    if progress.error_code == "queue_full":
        return CapacityError(progress.error, code="queue_full", retry_after_s=progress.retry_after_s or 1.0)
    if progress.error_code.startswith(("adapter_", "store_")):
        return AdapterLoadFailed(
            progress.error, code=progress.error_code, retry_after_s=progress.retry_after_s or None
        )
    return ReplicaError(progress.error, code=progress.error_code)
