"""Replicas without processes or a model: what a host process sees of them. Ships, for tests of backends."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

from tunefleet.errors import ReplicaError
from tunefleet.messages import (
    Drain,
    Fork,
    Forked,
    HostToReplica,
    Reaped,
    ReplicaHello,
    ReplicaLoad,
    ReplicaReady,
)
from tunefleet.runtime.wire import Connection


class FakeReplica:
    """Says what a replica says to its host process; takes no requests.

    Attributes:
        drains: its Drain messages so far; ``drained`` is set from the first one on.
        ended: set once it has left.
        hangs: a Drain doesn't make it leave.
    """

    def __init__(self, fork: Fork, on_end: Callable[[int], None]) -> None:
        self.fork = fork
        self.drains: list[Drain] = []
        self.drained = asyncio.Event()
        self.ended = asyncio.Event()
        self.hangs = False
        self._on_end = on_end
        self._host: Connection[HostToReplica] | None = None
        self._num_running = 0

    async def connect(self) -> None:
        """Raises OSError: there is no host process."""
        _, self._host = await asyncio.get_running_loop().create_unix_connection(
            lambda: Connection[HostToReplica](HostToReplica, self._on_host, lambda _: self.end(0)),
            self.fork.host_socket,
        )
        self._host.send(ReplicaHello(replica_id=self.fork.replica_id, pid=0))

    def ready(self) -> None:
        self._send(ReplicaReady(address=self.fork.address, stages={}))
        self.load(0)

    def load(self, num_running: int) -> None:
        """It runs so many requests; draining, it leaves at none."""
        self._num_running = num_running
        self._send(ReplicaLoad(num_running=num_running, num_waiting=0, num_steps=0, digests=()))
        self._leave_if_done()

    def end(self, exit_code: int) -> None:
        if not self.ended.is_set():
            self.ended.set()
            if self._host is not None:
                self._host.close()
            self._on_end(exit_code)

    def _on_host(self, _: Connection[HostToReplica], message: HostToReplica) -> None:
        if isinstance(message, Drain):
            self.drains.append(message)
            self.drained.set()
            self._leave_if_done()

    def _leave_if_done(self) -> None:
        """Or if it has no time to finish."""
        is_done = not self._num_running or not self.drains[-1].timeout_s if self.drains else False
        if is_done and not self.hangs:
            self.end(0)

    def _send(self, message: ReplicaReady | ReplicaLoad) -> None:
        assert self._host is not None
        self._host.send(message)


class FakeStarter:
    """Starts replicas in this process; its ``attach`` is a ``starter.StarterFactory``.

    Attributes:
        replicas: all that it started, in order.
        refusals: reasons why it can't get ready, one for each of the next starts.
        exit_codes: how the next starts end before they are READY.
        gate: replicas connect and become READY while it is set.
        num_closed: how often it was closed.
    """

    def __init__(self) -> None:
        self.pid = 0
        self.replicas: list[FakeReplica] = []
        self.refusals: list[str] = []
        self.exit_codes: list[int] = []
        self.gate = asyncio.Event()
        self.gate.set()
        self.num_closed = 0
        self._children: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def attach(
        self,
        base_dir: Path,
        *,
        on_forked: Callable[[Forked], None],
        on_reaped: Callable[[Reaped], None],
        on_lost: Callable[[], None],
    ) -> FakeStarter:
        self._on_forked, self._on_reaped, self._on_lost = on_forked, on_reaped, on_lost
        return self

    async def ensure(self) -> None:
        await asyncio.sleep(0)
        self.pid = os.getpid()  # one whose memory can be looked at

    async def fork(self, message: Fork) -> None:
        if self.refusals:
            raise ReplicaError(self.refusals.pop(0), code="replica_start_failed")
        replica = FakeReplica(message, lambda exit_code: self._reap(message.replica_id, exit_code))
        self.replicas.append(replica)
        self._children.add(message.replica_id)
        self._on_forked(Forked(replica_id=message.replica_id, pid=0))
        task = asyncio.get_running_loop().create_task(self._start(replica))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        self.pid = 0
        self.num_closed += 1

    def lose(self) -> None:
        """As if the parked process had ended."""
        self.pid = 0
        self._children.clear()
        self._on_lost()

    async def _start(self, replica: FakeReplica) -> None:
        if self.exit_codes:
            exit_code = self.exit_codes.pop(0)
            await replica.connect()
            replica.end(exit_code)
        else:
            await self.gate.wait()
            await replica.connect()
            replica.ready()

    def _reap(self, replica_id: str, exit_code: int) -> None:
        if replica_id in self._children:
            self._children.discard(replica_id)
            self._on_reaped(Reaped(replica_id=replica_id, pid=0, exit_code=exit_code))
