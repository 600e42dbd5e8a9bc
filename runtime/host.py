"""The host process: ``python -m tunefleet.runtime.host STATE_DIR``; one per machine and state folder.

Owns the devices, the parked process, the replicas and the adapter tiers. The first router starts it, others
join, and it leaves after the last one. It runs no model code and imports no torch.
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path

from tunefleet.adapters_store.host_tier import default_host_dir
from tunefleet.adapters_store.keeper import Keeper
from tunefleet.adapters_store.objects import open_store
from tunefleet.adapters_store.prepare import PreparedDtype
from tunefleet.adapters_store.tiers import Tiers
from tunefleet.config import runtime_dir
from tunefleet.core import AdapterRef, Manifest
from tunefleet.errors import TunefleetError
from tunefleet.messages import (
    AdapterMapped,
    Evicted,
    FetchAdapter,
    Forget,
    Hello,
    Hold,
    HostOptions,
    Prefetch,
    Refused,
    ReplicaHello,
    ReplicaLoad,
    ReplicaReady,
    Replicas,
    ReplicaToHost,
    RouterToHost,
    Status,
    StatusRequest,
    Unheld,
    Wake,
    WakeFailed,
    Welcome,
)
from tunefleet.runtime.base import read_manifest
from tunefleet.runtime.lending import Lending
from tunefleet.runtime.memory import MemoryMeter
from tunefleet.runtime.replicas import Record
from tunefleet.runtime.supervisor import Supervisor, Watcher
from tunefleet.runtime.wire import Connection

HOST_SOCKET = "host.sock"
REPLICA_SOCKETS = "r*-*.sock"
LINGER_S = 2.0  # after the last router left, so that a restart of it finds a warm machine

Inbound = RouterToHost | ReplicaToHost
Supervise = Callable[[HostOptions, Path, Path, Watcher], Supervisor]

log = logging.getLogger("tunefleet.host")


class HostProcess:
    """Answers the socket: routers and replicas come to one address, their first message says which they are.

    Idle until a router's Hello brings the options; lives until a while after its last router left. SIGTERM
    lets the replicas finish what they have; what comes meanwhile waits for the next host process. A second
    one ends it at once.

    Args:
        supervise: makes what keeps the replicas.
    """

    def __init__(self, folder: Path, supervise: Supervise = Supervisor) -> None:
        self._folder = folder
        self._supervise = supervise
        self._socket = folder / HOST_SOCKET
        self._owned: _Owned | None = None
        self._routers: set[Connection[Inbound]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._linger_timer: asyncio.TimerHandle | None = None
        self._leaving = False
        self._done = asyncio.Event()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.leave)
        for left in (self._socket, *self._folder.glob(REPLICA_SOCKETS)):  # by a host process that was killed
            left.unlink(missing_ok=True)
        server = await loop.create_unix_server(
            lambda: Connection[Inbound](Inbound, self._on_message, self._on_close), self._socket
        )
        self._linger()
        await self._done.wait()
        server.close()
        self._socket.unlink(missing_ok=True)
        for task in list(self._tasks):
            task.cancel()
        if self._owned is not None:
            await self._owned.close()
        for router in self._routers:
            router.close()

    def leave(self) -> None:
        """Once what runs is answered; asked again: now."""
        if self._owned is None or self._leaving:
            self._done.set()
        else:
            self._leaving = True
            self._spawn(self._drain(self._owned))

    async def _drain(self, owned: _Owned) -> None:
        log.info("leaving once the replicas have finished what they have")
        await owned.supervisor.drain()
        self._done.set()

    def _on_message(self, connection: Connection[Inbound], message: Inbound) -> None:
        owned = self._owned
        if isinstance(message, Hello):
            self._greet(connection, message)
        elif owned is None:
            connection.close()  # nothing but a Hello can come first
        elif isinstance(message, ReplicaHello):
            owned.supervisor.attach(connection, message)  # type: ignore[arg-type]
        elif connection in self._routers:
            self._on_router(owned, connection, message)
        else:
            record = owned.supervisor.replicas.of(connection)
            if record is not None:
                self._on_replica(owned, record, message)

    def _on_router(self, owned: _Owned, router: Connection[Inbound], message: Inbound) -> None:
        match message:
            case Wake():
                owned.held[message.request_id] = router
                owned.supervisor.scale()
            case Unheld():
                owned.held.pop(message.request_id, None)
                owned.supervisor.scale()
            case StatusRequest():
                router.send(owned.status())
            case Forget():
                self._spawn(self._forget(owned, router, message))
            case Hold():
                owned.keeper.hold(router, message.adapters)
            case Prefetch():
                owned.keeper.prefetch(message.adapter, message.tier)

    async def _forget(self, owned: _Owned, router: Connection[Inbound], asked: Forget) -> None:
        owned.supervisor.sizing.forget(asked.digest)
        router.send(await owned.lending.forget(asked.digest, owned.supervisor.replicas, asked.keys))

    def _on_replica(self, owned: _Owned, record: Record, message: Inbound) -> None:
        match message:
            case ReplicaReady():
                owned.supervisor.ready(record, message)
            case ReplicaLoad():
                owned.supervisor.loaded(record, message)
            case FetchAdapter():
                owned.supervisor.sizing.asked_for(message.adapter)
                self._spawn(owned.lending.lend(record, message.adapter))
            case AdapterMapped():
                owned.lending.mapped(record, message.digest)
            case Evicted():
                owned.lending.evicted(record, message)

    def _on_close(self, connection: Connection[Inbound]) -> None:
        owned = self._owned
        if owned is None:
            return
        if connection in self._routers:
            self._routers.discard(connection)
            owned.release(connection)
            owned.supervisor.scale()
            self._linger()
        elif (record := owned.supervisor.replicas.of(connection)) is not None:
            owned.supervisor.disconnected(record)

    def _greet(self, router: Connection[Inbound], hello: Hello) -> None:
        """Takes a router in; the first one's options are the host process's."""
        try:
            owned = self._owned = self._owned or _Owned(
                hello.options, self._folder, self._routers, self._supervise
            )
        except TunefleetError as error:
            router.send(Refused(message=error.message))
            return
        difference = _difference(owned.options, hello.options)
        if difference and self._leaving:
            router.close()  # it comes again, to the next host process
            return
        if difference:
            text = f"the host process of this store and base runs with another {difference}"
            router.send(Refused(message=f"{text}; stop it first, or set another cache_dir"))
            return
        self._routers.add(router)
        if self._linger_timer is not None:
            self._linger_timer.cancel()
        router.send(owned.welcome())
        owned.supervisor.scale()

    def _linger(self) -> None:
        """Leaves after the last router, unless another comes soon."""
        if not self._routers:
            self._linger_timer = asyncio.get_running_loop().call_later(LINGER_S, self._leave_if_alone)

    def _leave_if_alone(self) -> None:
        if not self._routers:
            self._done.set()

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Owned:
    """What a host process owns once it knows its options; tells its routers what becomes of it."""

    def __init__(
        self,
        options: HostOptions,
        folder: Path,
        routers: set[Connection[Inbound]],
        supervise: Supervise,
    ) -> None:
        manifest = read_manifest(Path(options.base_dir))
        disk_dir = Path(options.state_dir) / "adapters"
        self.options = options
        self.held: dict[str, Connection[Inbound]] = {}  # request id -> its router: waits for a replica
        self.lending = Lending(
            Tiers(
                open_store(options.store_url),
                manifest,
                disk_dir=disk_dir,
                host_dir=default_host_dir(disk_dir, options.host_cache_bytes),
                dtype=_prepared_dtype(manifest),
                host_cache_bytes=options.host_cache_bytes,
                disk_cache_bytes=options.disk_cache_bytes,
            )
        )
        self.keeper = Keeper(self.lending.tiers)
        self._memory = MemoryMeter(time.monotonic)
        self._routers = routers
        self.supervisor = supervise(options, folder, folder / HOST_SOCKET, self)

    @property
    def num_held(self) -> int:
        return len(self.held)

    def welcome(self) -> Welcome:
        supervisor = self.supervisor
        return Welcome(
            pid=os.getpid(), parked_pid=supervisor.parked_pid, replicas=supervisor.replicas.infos()
        )

    def status(self) -> Status:
        supervisor = self.supervisor
        pids = {"host": os.getpid(), "parked": supervisor.parked_pid}
        return Status(
            pid=os.getpid(),
            parked_pid=supervisor.parked_pid,
            replicas=supervisor.replicas.infos(),
            pss_bytes=self._memory.pss_bytes(pids),
            host_tier=self.lending.tiers.host_bytes(),
            disk_tier=self.lending.tiers.disk_bytes(),
            num_held=self.num_held,
            starts=tuple(supervisor.replicas.starts),
            errors=tuple(supervisor.errors),
        )

    def release(self, router: Connection[Inbound]) -> None:
        """A router is gone, and so are its held requests and adapters."""
        self.keeper.release(router)
        self.held = {key: other for key, other in self.held.items() if other is not router}

    def replicas_changed(self) -> None:
        replicas = Replicas(replicas=self.supervisor.replicas.infos())
        for router in self._routers:
            router.send(replicas)

    def replica_ready(self) -> None:
        self.held.clear()

    def replica_gone(self, record: Record) -> None:
        self.lending.end(record)

    def likely(self, adapters: Sequence[AdapterRef]) -> None:
        for ref in adapters:
            self.keeper.prefetch(ref, "host")

    def start_refused(self, reason: str, retry_after_s: float) -> None:
        retry_after_s = math.ceil(retry_after_s * 10) / 10  # sooner would be too soon
        for request_id, router in self.held.items():
            router.send(WakeFailed(request_id=request_id, message=reason, retry_after_s=retry_after_s))
        self.held.clear()

    async def close(self) -> None:
        await self.supervisor.close()
        await self.keeper.close()
        await self.lending.tiers.close()


def _difference(ours: HostOptions, theirs: HostOptions) -> str:
    names = [name for name in ours.__struct_fields__ if getattr(ours, name) != getattr(theirs, name)]
    return ", ".join(names)


def _prepared_dtype(manifest: Manifest) -> PreparedDtype:
    """The base's own: a slot may be wider, but then the copy widens, and memory holds twice as many."""
    known: dict[str, PreparedDtype] = {"bfloat16": "bfloat16", "float16": "float16", "float32": "float32"}
    return known[manifest.dtype]


def main(supervise: Supervise = Supervisor) -> None:
    folder = runtime_dir(Path(sys.argv[1]))
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    with (folder / "host.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            sys.exit("another host process serves this state folder")
        asyncio.run(HostProcess(folder, supervise).run())


if __name__ == "__main__":
    main()
