"""The host process: ``python -m tunefleet.runtime.host STATE_DIR``; one per machine and state folder.

Owns the devices, the parked process, the replicas and the adapter tiers. The first router starts it, others
join, and it leaves after the last one. It runs no model code and imports no torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import sys
import time
from collections.abc import Coroutine
from pathlib import Path

from tunefleet.adapters_store.objects import open_store
from tunefleet.adapters_store.prepare import PreparedDtype
from tunefleet.adapters_store.tiers import Tiers
from tunefleet.config import runtime_dir
from tunefleet.core import AdapterRef, Manifest, ReplicaState
from tunefleet.errors import TunefleetError
from tunefleet.messages import (
    AdapterReady,
    AdapterUnavailable,
    Drain,
    Evict,
    FetchAdapter,
    Forget,
    Fork,
    Forked,
    Hello,
    HostOptions,
    Reaped,
    Refused,
    ReplicaHello,
    ReplicaLoad,
    ReplicaReady,
    Replicas,
    ReplicaToHost,
    RouterToHost,
    Status,
    StatusRequest,
    Wake,
    WakeFailed,
    Welcome,
)
from tunefleet.runtime.base import read_manifest
from tunefleet.runtime.memory import pss_bytes
from tunefleet.runtime.parking import Parking
from tunefleet.runtime.replicas import Record, ReplicaSet
from tunefleet.runtime.scaler import Load, wanted_replicas
from tunefleet.runtime.wire import Connection

HOST_SOCKET = "host.sock"
LINGER_S = 2.0  # after the last router left, so that a restart of it finds a warm machine
BACKOFF_S = (0.5, 1.0, 2.0, 5.0, 10.0)  # after start failures in a row

log = logging.getLogger("tunefleet.host")

Inbound = RouterToHost | ReplicaToHost


class HostProcess:
    """Lives from its first router's Hello until a while after its last router left."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._options: HostOptions | None = None
        self._routers: set[Connection[Inbound]] = set()
        self._held: dict[str, Connection[Inbound]] = {}  # request id -> its router: waits for a replica
        self._replicas = ReplicaSet()
        self._parking: Parking | None = None
        self._tiers: Tiers | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle_timer: asyncio.TimerHandle | None = None
        self._linger_timer: asyncio.TimerHandle | None = None
        self._done = asyncio.Event()
        self._num_started = 0
        self._num_failures = 0
        self._retry_at = 0.0
        self._last_error = ""

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._done.set)
        path = self._folder / HOST_SOCKET
        path.unlink(missing_ok=True)
        server = await loop.create_unix_server(
            lambda: Connection[Inbound](Inbound, self._on_message, self._on_close), path
        )
        self._linger()
        await self._done.wait()
        server.close()
        path.unlink(missing_ok=True)
        await self._stop_everything()

    # ---- messages

    def _on_message(self, connection: Connection[Inbound], message: Inbound) -> None:
        match message:
            case Hello():
                self._welcome(connection, message)
            case Wake():
                self._held[message.request_id] = connection
                self._scale()
            case StatusRequest():
                self._spawn(self._send_status(connection))
            case Forget():
                self._spawn(self._forget(message.digest))
            case ReplicaHello():
                self._attach(connection, message)
            case _:
                record = self._replicas.of(connection)
                if record is not None:
                    self._on_replica(record, message)

    def _on_replica(self, record: Record, message: ReplicaToHost) -> None:
        match message:
            case ReplicaReady():
                record.stages = {**message.stages, "start": time.monotonic() - record.created_at}
                record.busy_at = time.monotonic()
                self._num_failures = 0
                self._become(record, ReplicaState.READY)
                self._held.clear()
            case ReplicaLoad():
                was_busy, record.load = record.num_requests > 0, message
                if was_busy or record.num_requests:
                    record.busy_at = time.monotonic()
                self._tell_routers()
                self._scale()
            case FetchAdapter():
                self._spawn(self._fetch(record, message.adapter))

    def _on_close(self, connection: Connection[Inbound]) -> None:
        record = self._replicas.of(connection)
        if record is not None:
            record.connection = None
            if record.state is not ReplicaState.DRAINING or not self._parked_pid:  # else: until it is reaped
                self._gone(record, "its connection closed")
        if connection in self._routers:
            self._routers.discard(connection)
            self._held = {key: router for key, router in self._held.items() if router is not connection}
            self._linger()

    # ---- routers

    def _welcome(self, router: Connection[Inbound], hello: Hello) -> None:
        if self._options is None:
            try:
                self._configure(hello.options)
            except TunefleetError as error:
                router.send(Refused(message=error.message))
                return
        assert self._options is not None
        difference = _difference(self._options, hello.options)
        if difference:
            router.send(
                Refused(
                    message=f"the host process of this store and base runs with another {difference}; "
                    "stop it first, or set another cache_dir"
                )
            )
            return
        self._routers.add(router)
        if self._linger_timer is not None:
            self._linger_timer.cancel()
        router.send(Welcome(pid=os.getpid(), parked_pid=self._parked_pid, replicas=self._replicas.infos()))
        self._scale()

    def _configure(self, options: HostOptions) -> None:
        manifest = read_manifest(Path(options.base_dir))
        dtype = _slot_dtype(options, manifest)
        self._tiers = Tiers(
            open_store(options.store_url),
            manifest,
            disk_dir=Path(options.state_dir) / "adapters",
            host_dir=_host_tier_dir(self._folder),
            dtype=dtype,
            host_cache_bytes=options.host_cache_bytes,
            disk_cache_bytes=options.disk_cache_bytes,
        )
        self._parking = Parking(
            Path(options.base_dir),
            on_forked=self._on_forked,
            on_reaped=self._on_reaped,
            on_lost=self._on_parked_lost,
        )
        self._options = options
        self._spawn(self._park())

    def _linger(self) -> None:
        """Leaves after the last router, unless another comes soon."""
        if not self._routers:
            self._linger_timer = asyncio.get_running_loop().call_later(LINGER_S, self._leave_if_alone)

    def _leave_if_alone(self) -> None:
        if not self._routers:
            self._done.set()

    def _tell_routers(self) -> None:
        replicas = Replicas(replicas=self._replicas.infos())
        for router in self._routers:
            router.send(replicas)

    async def _send_status(self, router: Connection[Inbound]) -> None:
        pids = {"host": os.getpid(), "parked": self._parked_pid}
        router.send(
            Status(
                pid=os.getpid(),
                parked_pid=self._parked_pid,
                replicas=self._replicas.infos(),
                pss_bytes={name: pss_bytes(pid) for name, pid in pids.items() if pid},
                host_tier=self._tiers.host_bytes() if self._tiers else {},
                last_error=self._last_error,
            )
        )

    @property
    def _parked_pid(self) -> int:
        return self._parking.pid if self._parking else 0

    # ---- adapters

    async def _fetch(self, record: Record, ref: AdapterRef) -> None:
        assert self._tiers is not None
        try:
            fetched = await self._tiers.fetch(ref)
        except TunefleetError as error:
            retry_after_s = getattr(error, "retry_after_s", None) or 1.0
            record.send(
                AdapterUnavailable(
                    digest=ref.digest, message=error.message, code=error.code, retry_after_s=retry_after_s
                )
            )
        else:
            record.send(
                AdapterReady(
                    digest=ref.digest,
                    path=str(fetched.path),
                    download_s=fetched.download_s,
                    load_s=fetched.load_s,
                )
            )

    async def _forget(self, digest: str) -> None:
        for record in self._replicas:
            record.send(Evict(digest=digest))
        if self._tiers is not None:
            await self._tiers.forget(digest)

    # ---- replicas

    def _scale(self) -> None:
        """Starts or drains replicas until there are as many as the scaler wants."""
        options = self._options
        if options is None or self._done.is_set():
            return
        live = self._replicas.in_state(ReplicaState.NEW, ReplicaState.STARTING, ReplicaState.READY)
        now = time.monotonic()
        load = Load(
            num_requests=sum(record.num_requests for record in live) + len(self._held),
            num_replicas=len(live),
            idle_s=min((now - record.busy_at for record in live), default=0.0),
        )
        wanted = wanted_replicas(
            load,
            min_replicas=options.min_replicas,
            max_replicas=options.max_replicas,
            idle_timeout_s=options.idle_timeout_s,
            target_concurrency=options.target_concurrency,
        )
        for _ in range(wanted - len(live)):
            self._start_replica(now)
        ready = [record for record in live if record.state is ReplicaState.READY and not record.num_requests]
        for record in ready[: max(0, len(live) - wanted)]:
            self._drain(record)
        self._arm_idle_timer(now)

    def _start_replica(self, now: float) -> None:
        if now < self._retry_at:
            self._refuse_held(self._retry_at - now)
            return
        assert self._options is not None
        self._num_started += 1
        replica_id = f"r{self._num_started}"
        device = self._options.devices[(self._num_started - 1) % len(self._options.devices)]
        record = Record(replica_id, device, str(self._folder / f"{replica_id}-{os.getpid()}.sock"))
        self._replicas.add(record)
        self._spawn(self._fork(record))

    async def _fork(self, record: Record) -> None:
        assert self._options is not None
        assert self._parking is not None
        message = Fork(
            replica_id=record.replica_id,
            device=record.device,
            address=record.address,
            host_socket=str(self._folder / HOST_SOCKET),
            options=self._options,
        )
        try:
            await self._parking.fork(message)
        except TunefleetError as error:
            self._gone(record, error.message)

    def _on_forked(self, message: Forked) -> None:
        self._has_process(message.replica_id, message.pid)

    def _has_process(self, replica_id: str, pid: int) -> Record | None:
        """Heard from the parked process or from the replica itself, whichever is first."""
        record = self._replicas.get(replica_id)
        if record is not None and record.state is ReplicaState.NEW:
            record.pid, record.started_at = pid, time.time()
            self._become(record, ReplicaState.STARTING)
        return record

    def _attach(self, connection: Connection[Inbound], message: ReplicaHello) -> None:
        record = self._has_process(message.replica_id, message.pid)
        if record is None:
            connection.close()  # it was given up: it leaves when its host connection closes
        else:
            record.connection = connection  # type: ignore[assignment]

    def _drain(self, record: Record) -> None:
        assert self._options is not None
        self._become(record, ReplicaState.DRAINING)
        record.send(Drain(timeout_s=self._options.drain_timeout_s))

    def _on_reaped(self, message: Reaped) -> None:
        record = self._replicas.get(message.replica_id)
        if record is not None:
            self._gone(record, _cause(message.exit_code))
        elif message.exit_code != 0:  # its connection closed first; this says why
            self._last_error = f"replica {message.replica_id}: {_cause(message.exit_code)}"
            self._tell_routers()

    def _gone(self, record: Record, cause: str) -> None:
        """A replica's process is gone, or never came to be."""
        if self._replicas.get(record.replica_id) is not record:
            return
        was_starting = record.state in (ReplicaState.NEW, ReplicaState.STARTING)
        if record.state is ReplicaState.DRAINING:
            self._become(record, ReplicaState.STOPPED)
        else:
            self._last_error = f"replica {record.replica_id}: {cause}"
            log.error("%s", self._last_error)
            self._become(record, ReplicaState.FAILED)
        if was_starting:
            delay = BACKOFF_S[min(self._num_failures, len(BACKOFF_S) - 1)]
            self._num_failures += 1
            self._retry_at = time.monotonic() + delay
            self._refuse_held(delay)
        self._scale()

    def _refuse_held(self, retry_after_s: float) -> None:
        for request_id, router in self._held.items():
            router.send(
                WakeFailed(
                    request_id=request_id, message=self._last_error, retry_after_s=round(retry_after_s, 1)
                )
            )
        self._held.clear()

    def _become(self, record: Record, state: ReplicaState) -> None:
        self._replicas.become(record, state)
        self._tell_routers()

    def _on_parked_lost(self) -> None:
        log.error("the parked process is gone; starting another")
        for record in self._replicas:
            if record.state is ReplicaState.NEW or record.connection is None:
                self._gone(record, "the parked process ended")
        if not self._done.is_set():
            self._spawn(self._park())

    async def _park(self) -> None:
        """Has a parked process ready before the first request asks for it."""
        assert self._parking is not None
        with contextlib.suppress(TunefleetError):  # told to whoever asks for a replica
            await self._parking.ensure()

    def _arm_idle_timer(self, now: float) -> None:
        """Scales again when the first idle replica's time is up."""
        assert self._options is not None
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        idle = [
            record.busy_at
            for record in self._replicas.in_state(ReplicaState.READY)
            if not record.num_requests
        ]
        live = self._replicas.in_state(ReplicaState.NEW, ReplicaState.STARTING, ReplicaState.READY)
        if idle and len(live) > self._options.min_replicas:
            delay = max(idle) + self._options.idle_timeout_s - now
            self._idle_timer = asyncio.get_running_loop().call_later(max(delay, 0.01), self._scale)

    async def _stop_everything(self) -> None:
        for record in self._replicas:
            record.send(Drain(timeout_s=0.0))
        if self._parking is not None:
            await self._parking.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _difference(ours: HostOptions, theirs: HostOptions) -> str:
    names = [name for name in ours.__struct_fields__ if getattr(ours, name) != getattr(theirs, name)]
    return ", ".join(names)


def _slot_dtype(options: HostOptions, manifest: Manifest) -> PreparedDtype:
    """As ``runtime.engine.slot_dtype``, without torch."""
    known: dict[str, PreparedDtype] = {"bfloat16": "bfloat16", "float16": "float16", "float32": "float32"}
    return "float32" if options.devices[0] == "cpu" else known[manifest.dtype]


def _cause(exit_code: int) -> str:
    if exit_code < 0:
        return f"ended by {signal.Signals(-exit_code).name}"
    return f"ended with exit code {exit_code}"


def _host_tier_dir(folder: Path) -> Path:
    """A folder in memory, where there is one; it must outlive replicas, not the machine."""
    shm = Path("/dev/shm")
    return shm / f"tunefleet-{os.getuid()}-{folder.name}" if os.access(shm, os.W_OK) else folder / "adapters"


def main() -> None:
    folder = runtime_dir(Path(sys.argv[1]))
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    with (folder / "host.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            sys.exit("another host process serves this state folder")
        asyncio.run(HostProcess(folder).run())


if __name__ == "__main__":
    main()
