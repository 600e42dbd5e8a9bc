"""As many replicas as the load needs: starts, drains and buries them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Protocol

from tunefleet.core import AdapterRef, ReplicaState
from tunefleet.errors import TunefleetError
from tunefleet.messages import (
    Drain,
    Fork,
    Forked,
    HostOptions,
    Reaped,
    ReplicaHello,
    ReplicaLoad,
    ReplicaReady,
    ReplicaToHost,
)
from tunefleet.runtime.backoff import Backoff
from tunefleet.runtime.error_log import ErrorLog
from tunefleet.runtime.parking import PLATFORM_STARTER
from tunefleet.runtime.replicas import Record, ReplicaSet
from tunefleet.runtime.scaler import Load
from tunefleet.runtime.sizing import Sizing
from tunefleet.runtime.starter import Standby, StarterFactory
from tunefleet.runtime.wire import Connection

STARTING = (ReplicaState.NEW, ReplicaState.STARTING)
LIVE = (*STARTING, ReplicaState.READY)
HANDOVER_S = 1.0  # for what was held to show up on the replica it waited for
LEAVE_S = 3.0  # for a replica to end once it has nothing left to do
PARK_AGAIN_S = 30.0  # a parked process that ends sooner than this is started again when it is needed


class Watcher(Protocol):
    """What the supervisor tells, and asks; the host process."""

    @property
    def num_held(self) -> int:
        """Requests that wait for a replica."""
        ...

    def replicas_changed(self) -> None: ...

    def replica_ready(self) -> None:
        """Those who are held go there now."""
        ...

    def replica_gone(self, record: Record) -> None: ...

    def likely(self, adapters: Sequence[AdapterRef]) -> None:
        """A replica will be needed soon, and these with it."""
        ...

    def start_refused(self, reason: str, retry_after_s: float) -> None:
        """No replica for those who are held, and why."""
        ...


class Supervisor:
    """Owns all replicas and what starts them, from the host process's first router to its end.

    Args:
        starter: makes what makes replicas' processes.
    """

    def __init__(
        self,
        options: HostOptions,
        folder: Path,
        host_socket: Path,
        watcher: Watcher,
        *,
        starter: StarterFactory = PLATFORM_STARTER,
        backoff: Backoff | None = None,
    ) -> None:
        self.replicas = ReplicaSet()
        self.errors = ErrorLog()
        self.sizing = Sizing(options)
        self._options = options
        self._folder = folder
        self._host_socket = host_socket
        self._watcher = watcher
        made = starter(
            Path(options.base_dir),
            on_forked=self._on_forked,
            on_reaped=self._on_reaped,
            on_lost=self._on_parked_lost,
        )
        self._starter = Standby(made, options.standby_ttl_s)
        self._parked_lost_at = -PARK_AGAIN_S
        self._backoff = backoff or Backoff()
        self._handover_until = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_started = 0
        self._ending = False
        self._departed = asyncio.Event()  # set when the next replica is gone, and replaced
        self._spawn(self._park())

    @property
    def parked_pid(self) -> int:
        """0 while there is none ready."""
        return self._starter.pid

    # ---- how many

    def scale(self) -> None:
        """Starts or drains replicas until there are as many as the scaler wants."""
        if self._ending:
            return
        now = time.monotonic()
        live = self.replicas.in_state(*LIVE)
        wait_s = self._backoff.wait_s(now)
        if wait_s and self._backoff.is_failing and not self.replicas.in_state(*STARTING):
            self._watcher.start_refused(self.errors.last, wait_s)
        load = Load(self._num_requests(live, now), len(live))
        wanted, ask_again_at, look_again_at, likely = self.sizing.decide(load, now)
        if likely:
            self._watcher.likely(likely)
        if now < self._handover_until:
            ask_again_at = self._handover_until
        if wanted > len(live) and wait_s:
            ask_again_at = now + wait_s
        else:
            self._start(wanted - len(live))
        self._drain_least_loaded(len(live) - wanted)
        self._starter.set_at_zero(not len(self.replicas))
        times = [time for time in (ask_again_at, look_again_at) if time is not None]
        self._ask_again(min(times, default=None), now)

    def _num_requests(self, live: Iterable[Record], now: float) -> int:
        """Those that are on their way from here to a replica count as one: nothing is idle meanwhile."""
        num_requests = sum(record.num_requests for record in live) + self._watcher.num_held
        return max(num_requests, int(now < self._handover_until))

    def _ask_again(self, at: float | None, now: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if at is not None:
            self._timer = asyncio.get_running_loop().call_later(max(at - now, 0.01), self.scale)

    def _drain_least_loaded(self, count: int) -> None:
        """The idle ones first, and of equals the newest."""
        ready = self.replicas.in_state(ReplicaState.READY)
        ready.reverse()
        for record in sorted(ready, key=lambda record: record.num_requests)[: max(0, count)]:
            self._drain(record)

    # ---- a replica begins

    def _start(self, count: int) -> None:
        for _ in range(count):
            self._num_started += 1
            replica_id = f"r{self._num_started}"
            record = Record(replica_id, self._free_device(), self._address(replica_id))
            self.replicas.add(record)
            self._watcher.replicas_changed()
            self._spawn(self._fork(record))
            loop = asyncio.get_running_loop()
            loop.call_later(self._options.cold_start_timeout_s, self._give_up_start, record)

    def _free_device(self) -> str:
        """The one with the fewest replicas, those that still leave it counted."""
        used = Counter(record.device for record in self.replicas)
        return min(self._options.devices, key=lambda device: used[device])

    def _address(self, replica_id: str) -> str:
        return str(self._folder / f"{replica_id}-{os.getpid()}.sock")

    async def _fork(self, record: Record) -> None:
        message = Fork(
            replica_id=record.replica_id,
            device=record.device,
            address=record.address,
            host_socket=str(self._host_socket),
            options=self._options,
        )
        try:
            await self._starter.ensure()
            await self._device_left(record.device)
            if self.replicas.get(record.replica_id) is record:  # not given up meanwhile
                await self._starter.fork(message)
        except TunefleetError as error:
            self._gone(record, error.message)

    async def _device_left(self, device: str) -> None:
        """An accelerator has no room for a replica beside one that has yet to leave it."""
        while device != "cpu" and any(
            record.device == device for record in self.replicas.in_state(ReplicaState.DRAINING)
        ):
            await self._departed.wait()

    def _on_forked(self, message: Forked) -> None:
        if self._has_process(message.replica_id, message.pid) is None:
            _kill(message.pid)  # it was given up
        if message.instead_of_fork:
            self.errors.note(f"replica {message.replica_id} was not forked: {message.instead_of_fork}")

    def attach(self, connection: Connection[ReplicaToHost], message: ReplicaHello) -> None:
        """A replica's process has connected."""
        record = self.replicas.get(message.replica_id)
        if record is None or record.connection is not None:
            connection.close()  # it was given up: it leaves when its host connection closes
        else:
            self._has_process(message.replica_id, message.pid)
            record.connection = connection

    def _has_process(self, replica_id: str, pid: int) -> Record | None:
        """Heard from what started it or from the replica itself, whichever is first."""
        record = self.replicas.get(replica_id)
        if record is not None:
            record.pid = pid
            if record.state is ReplicaState.NEW:
                record.started_at = time.time()
                self._become(record, ReplicaState.STARTING)
        return record

    def ready(self, record: Record, message: ReplicaReady) -> None:
        if message.address != record.address:
            self._hang_up(record)  # an earlier host process's replica, with the number of one of ours
            return
        record.stages = {**message.stages, "start": time.monotonic() - record.created_at}
        self._backoff.started()
        if self._watcher.num_held:
            self._handover_until = time.monotonic() + HANDOVER_S
        self._become(record, ReplicaState.READY)
        self._watcher.replica_ready()
        self.scale()

    def _give_up_start(self, record: Record) -> None:
        """A replica that hangs before it is READY holds a device and those who wait for it."""
        if record.state in STARTING:
            _kill(record.pid)
            self._gone(record, f"it was not ready after {self._options.cold_start_timeout_s:g} s")

    # ---- a replica works

    def loaded(self, record: Record, message: ReplicaLoad) -> None:
        """A replica's load has changed."""
        self.sizing.arrived(message.num_requests - record.load.num_requests)
        record.load = message
        if record.num_requests:
            self._handover_until = 0.0
        self._watcher.replicas_changed()
        self.scale()

    # ---- a replica ends

    def _drain(self, record: Record) -> None:
        self._become(record, ReplicaState.DRAINING)
        timeout_s = self._options.drain_timeout_s
        record.send(Drain(timeout_s=timeout_s))
        asyncio.get_running_loop().call_later(timeout_s + LEAVE_S, self._give_up_drain, record)

    def _give_up_drain(self, record: Record) -> None:
        if record.state is ReplicaState.DRAINING:
            _kill(record.pid)
            self._gone(record, "it did not leave in time")

    def disconnected(self, record: Record) -> None:
        record.connection = None
        if record.state is ReplicaState.READY or record.is_orphan:
            self._gone(record, "its connection closed")  # else it says more, and is gone, once it is reaped

    def _on_reaped(self, message: Reaped) -> None:
        Path(self._address(message.replica_id)).unlink(missing_ok=True)  # it may have had no time to
        record = self.replicas.get(message.replica_id)
        if record is not None:
            killed = message.exit_code == -signal.SIGKILL
            blame = self._backoff.start_killed if killed else self._backoff.start_failed
            self._gone(record, _cause(message), blame)
        elif message.exit_code != 0:  # its connection closed first; this says why
            self.errors.note(f"replica {message.replica_id}: {_cause(message)}")
            self._watcher.replicas_changed()

    def _gone(self, record: Record, cause: str, blame: Callable[[float], None] | None = None) -> None:
        """A replica's process is gone, or never came to be.

        Args:
            blame: as what it counts if it wasn't READY yet; by default as a start that failed.
        """
        if self.replicas.get(record.replica_id) is not record:
            return
        self._hang_up(record)
        Path(record.address).unlink(missing_ok=True)
        if record.state is ReplicaState.DRAINING:
            self._become(record, ReplicaState.STOPPED)
        else:
            self.errors.note(f"replica {record.replica_id}: {cause}")
            was_starting = record.state in STARTING
            self._become(record, ReplicaState.FAILED)
            (blame or self._backoff.start_failed if was_starting else self._backoff.died)(time.monotonic())
        self._watcher.replica_gone(record)
        departed, self._departed = self._departed, asyncio.Event()
        departed.set()
        self.scale()

    def _hang_up(self, record: Record) -> None:
        """Whoever is there leaves at that."""
        connection, record.connection = record.connection, None
        if connection is not None:
            connection.close()

    def _become(self, record: Record, state: ReplicaState) -> None:
        self.replicas.become(record, state)
        self._watcher.replicas_changed()

    # ---- all replicas end

    async def drain(self) -> None:
        """Starts nothing more; returns when the replicas have finished what they have, or were given up."""
        self._end_starts()
        for record in self.replicas.in_state(ReplicaState.READY):
            self._drain(record)
        await self._all_gone()

    async def close(self) -> None:
        """Ends replicas and what starts them, now."""
        self.sizing.save()
        self._end_starts()
        for record in self.replicas:
            record.send(Drain(timeout_s=0.0))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._all_gone(), LEAVE_S)
        for record in self.replicas:
            _kill(record.pid)
            self._hang_up(record)
            Path(record.address).unlink(missing_ok=True)
        await self._starter.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _all_gone(self) -> None:
        while len(self.replicas):
            await self._departed.wait()

    def _end_starts(self) -> None:
        """No more of them, and those that aren't READY have nobody's request yet."""
        self._ending = True
        if self._timer is not None:
            self._timer.cancel()
        for record in self.replicas.in_state(*STARTING):
            _kill(record.pid)
            self._gone(record, "the host process is leaving")

    # ---- the parked process

    def _on_parked_lost(self) -> None:
        self.errors.note("the parked process is gone")
        for record in self.replicas:
            record.is_orphan = True
            if record.state is ReplicaState.NEW or record.connection is None:  # whose end nobody would tell
                self._gone(record, "the parked process ended", self._backoff.died)
        now = time.monotonic()
        is_first, self._parked_lost_at = now - self._parked_lost_at > PARK_AGAIN_S, now
        if is_first and not self._ending:
            self._spawn(self._park())

    async def _park(self) -> None:
        """Has a parked process ready before the first request asks for it."""
        with contextlib.suppress(TunefleetError):  # told to whoever asks for a replica
            await self._starter.ensure()

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _kill(pid: int) -> None:
    if pid:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _cause(end: Reaped) -> str:
    if end.reason:
        return end.reason
    if end.exit_code < 0:
        return f"ended by {signal.Signals(-end.exit_code).name}"
    return f"ended with exit code {end.exit_code}"
