"""The link to this machine's host process: over its Unix socket, started when there is none."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

from tunefleet.config import runtime_dir
from tunefleet.core import AdapterRef, PinTier, ReplicaInfo, ReplicaState
from tunefleet.errors import CapacityError, ConfigError, ReplicaError, TunefleetError
from tunefleet.messages import (
    Forget,
    Forgotten,
    HeldAdapter,
    Hello,
    Hold,
    HostOptions,
    HostToRouter,
    Message,
    Prefetch,
    Refused,
    Replicas,
    Status,
    StatusRequest,
    Unheld,
    Wake,
    WakeFailed,
    Welcome,
)
from tunefleet.runtime.addresses import dial
from tunefleet.runtime.host import HOST_SOCKET
from tunefleet.runtime.host_link import OnChange
from tunefleet.runtime.launch import ensure_host
from tunefleet.runtime.wire import Connection

ANSWER_TIMEOUT_S = 30.0  # of a host process, to come up or to answer
DIAL_AGAIN_S = 0.02  # it holds its lock some time before it listens
START_AGAIN_S = (0.1, 0.5, 2.0)  # after starts in a row that ended at once


class LocalLink:
    """Lives from ``join`` to ``leave``; a lost host process is started again and joined."""

    def __init__(self, options: HostOptions) -> None:
        self._options = options
        self._state = Path(options.state_dir)
        self._folder = runtime_dir(self._state)
        self._log = self._state / "host.log"
        self._on_change: OnChange = lambda replicas: None
        self._host: Connection[HostToRouter] | None = None
        self._welcome: asyncio.Future[Welcome] | None = None
        self._rejoining: asyncio.Task[None] | None = None
        self._left = False
        self._ready: frozenset[str] = frozenset()  # replicas
        self._placing: dict[str, asyncio.Future[None]] = {}  # requests that wait for a replica
        self._asked: dict[str, asyncio.Future[HostToRouter]] = {}  # what was asked -> its answer
        self._held: tuple[HeldAdapter, ...] = ()  # told again to a host process that was lost

    def watch(self, on_change: OnChange) -> None:
        self._on_change = on_change

    async def join(self) -> None:
        try:
            await self._join()
        except BaseException:
            await self.leave()
            raise

    async def leave(self) -> None:
        self._left = True
        if self._rejoining is not None:
            self._rejoining.cancel()
        if self._host is not None:
            self._host.close()
        self._fail_placing(_closing())
        await asyncio.sleep(0)

    async def place(self, request_id: str) -> None:
        await self._joined()
        if self._left:
            raise _closing()
        future = self._placing[request_id] = asyncio.get_running_loop().create_future()
        self._send(Wake(request_id=request_id))
        try:
            await future
        finally:
            self._placing.pop(request_id, None)
            self._send(Unheld(request_id=request_id))

    async def forget(self, digest: str, keys: Sequence[str] = ()) -> Forgotten:
        asked = Forget(digest=digest, keys=tuple(keys))
        forgotten = await self._ask(asked, f"forget {digest} {asked.keys}")
        assert isinstance(forgotten, Forgotten)
        return forgotten

    def hold(self, adapters: Sequence[HeldAdapter]) -> None:
        self._held = tuple(adapters)
        self._send(Hold(adapters=self._held))

    async def prefetch(self, ref: AdapterRef, tier: PinTier) -> None:
        await self._joined()
        self._send(Prefetch(adapter=ref, tier=tier))

    async def status(self) -> Status:
        status = await self._ask(StatusRequest(), "status")
        assert isinstance(status, Status)
        return status

    # ---- to the host process and back

    def _send(self, message: Message) -> None:
        if self._host is not None:
            self._host.send(message)

    async def _ask(self, message: Message, question: str) -> HostToRouter:
        """The answer; those who ask the same at once share it."""
        await self._joined()
        future = self._asked.get(question)
        if future is None:
            future = self._asked[question] = asyncio.get_running_loop().create_future()
            self._send(message)
        try:
            return await asyncio.wait_for(asyncio.shield(future), ANSWER_TIMEOUT_S)
        except (TimeoutError, EOFError) as error:
            raise ReplicaError(
                "the host process gave no answer; try again", code="host_unavailable"
            ) from error
        finally:
            if self._asked.get(question) is future:
                del self._asked[question]

    def _on_message(self, host: Connection[HostToRouter], message: HostToRouter) -> None:
        match message:
            case Welcome():
                if self._welcome is not None and not self._welcome.done():
                    self._welcome.set_result(message)
            case Refused():
                if self._welcome is not None and not self._welcome.done():
                    self._welcome.set_exception(ConfigError(message.message))
            case Replicas():
                self._tell(message.replicas)
            case WakeFailed():
                self._place_failed(message)
            case Status():
                self._answered("status", message)
            case Forgotten():
                self._answered(f"forget {message.digest} {message.keys}", message)

    def _tell(self, replicas: tuple[ReplicaInfo, ...]) -> None:
        """Has the watcher know the replicas, and then those who wait for one that is READY."""
        before = self._ready
        self._ready = frozenset(
            replica.replica_id for replica in replicas if replica.state is ReplicaState.READY
        )
        self._on_change(replicas)
        if self._ready - before:
            for future in self._placing.values():
                if not future.done():
                    future.set_result(None)

    def _place_failed(self, message: WakeFailed) -> None:
        future = self._placing.get(message.request_id)
        if future is not None and not future.done():
            future.set_exception(
                CapacityError(
                    f"no replica could be started: {message.message}",
                    code="replica_start_failed",
                    retry_after_s=message.retry_after_s,
                )
            )

    def _fail_placing(self, error: TunefleetError) -> None:
        for future in self._placing.values():
            if not future.done():
                future.set_exception(error)

    def _answered(self, question: str, message: HostToRouter) -> None:
        future = self._asked.pop(question, None)
        if future is not None and not future.done():
            future.set_result(message)

    # ---- joining

    async def _joined(self) -> None:
        """Waits for a host process that was lost; starts it again where that has failed before."""
        is_lost = self._host is not None and not self._host.is_open
        if is_lost and not self._left:
            self._rejoin_soon()
        if self._rejoining is not None:
            await asyncio.shield(self._rejoining)

    async def _join(self) -> None:
        deadline = time.monotonic() + self._options.drain_timeout_s + ANSWER_TIMEOUT_S  # one may be leaving
        num_failures = 0
        while True:
            try:
                welcome = await self._hello()
                break
            except (OSError, EOFError) as error:
                if time.monotonic() > deadline:
                    raise ReplicaError(
                        f"the host process doesn't come up; its log is {self._log}", code="host_unavailable"
                    ) from error
            if await asyncio.to_thread(ensure_host, self._folder, self._state, self._log):
                await asyncio.sleep(DIAL_AGAIN_S)
            else:
                await asyncio.sleep(START_AGAIN_S[min(num_failures, len(START_AGAIN_S) - 1)])
                num_failures += 1
        if self._held:
            self._send(Hold(adapters=self._held))
        for request_id in self._placing:
            self._send(Wake(request_id=request_id))
        self._tell(welcome.replicas)

    async def _hello(self) -> Welcome:
        self._welcome = asyncio.get_running_loop().create_future()
        host = Connection[HostToRouter](HostToRouter, self._on_message, self._on_gone)
        await dial(str(self._folder / HOST_SOCKET), host)
        self._host = host
        host.send(Hello(options=self._options))
        return await asyncio.wait_for(self._welcome, ANSWER_TIMEOUT_S)  # its TimeoutError is an OSError

    def _on_gone(self, host: Connection[HostToRouter]) -> None:
        if self._welcome is not None and not self._welcome.done():
            self._welcome.set_exception(EOFError("the host process closed the connection"))
        elif host is self._host and not self._left:
            for question in list(self._asked):
                self._asked.pop(question).set_exception(EOFError("the host process is gone"))
            self._tell(())
            self._rejoin_soon()

    def _rejoin_soon(self) -> None:
        if self._rejoining is None:
            self._rejoining = asyncio.get_running_loop().create_task(self._rejoin())
            self._rejoining.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _rejoin(self) -> None:
        """A killed host process comes back; requests are held meanwhile."""
        try:
            await self._join()
        except TunefleetError as error:
            self._fail_placing(error)
            raise
        finally:
            self._rejoining = None


def _closing() -> ReplicaError:
    return ReplicaError("this router is closing; ask another one", code="host_unavailable")
