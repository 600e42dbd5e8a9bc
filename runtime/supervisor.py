"""As many replicas as the load needs: starts, drains and buries them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Protocol

from tunefleet.core import ReplicaState
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
from tunefleet.runtime.parking import Parking
from tunefleet.runtime.replicas import Record, ReplicaSet
from tunefleet.runtime.scaler import Load, wanted_replicas
from tunefleet.runtime.wire import Connection

BACKOFF_S = (0.5, 1.0, 2.0, 5.0, 10.0)  # after start failures in a row
STARTING = (ReplicaState.NEW, ReplicaState.STARTING)
LIVE = (ReplicaState.NEW, ReplicaState.STARTING, ReplicaState.READY)

log = logging.getLogger("tunefleet.host")


class Watcher(Protocol):
    """What the supervisor tells, and asks; the host process."""

    @property
    def num_held(self) -> int:
        """Requests that wait for a replica."""
        ...

    def replicas_changed(self) -> None: ...

    def replica_ready(self) -> None: ...

    def replica_gone(self, record: Record) -> None: ...

    def start_refused(self, reason: str, retry_after_s: float) -> None:
        """No replica for those who are held, and why."""
        ...


class Supervisor:
    """Owns the parked process and all replicas of a host process, from its first router to its end."""

    def __init__(self, options: HostOptions, folder: Path, host_socket: Path, watcher: Watcher) -> None:
        self.replicas = ReplicaSet()
        self.last_error = ""
        self._options = options
        self._folder = folder
        self._host_socket = host_socket
        self._watcher = watcher
        self._parking = Parking(
            Path(options.base_dir),
            on_forked=self._on_forked,
            on_reaped=self._on_reaped,
            on_lost=self._on_parked_lost,
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle_timer: asyncio.TimerHandle | None = None
        self._num_started = 0
        self._num_failures = 0
        self._retry_at = 0.0
        self._closing = False
        self._spawn(self._park())

    @property
    def parked_pid(self) -> int:
        """0 while there is none ready."""
        return self._parking.pid

    def scale(self) -> None:
        """Starts or drains replicas until there are as many as the scaler wants."""
        if self._closing:
            return
        live = self.replicas.in_state(*LIVE)
        now = time.monotonic()
        wanted = wanted_replicas(
            Load(
                num_requests=sum(record.num_requests for record in live) + self._watcher.num_held,
                num_replicas=len(live),
                idle_s=min((now - record.busy_at for record in live), default=0.0),
            ),
            min_replicas=self._options.min_replicas,
            max_replicas=self._options.max_replicas,
            idle_timeout_s=self._options.idle_timeout_s,
            target_concurrency=self._options.target_concurrency,
        )
        for _ in range(wanted - len(live)):
            self._start(now)
        idle = [record for record in live if record.state is ReplicaState.READY and not record.num_requests]
        for record in idle[: max(0, len(live) - wanted)]:
            self._drain(record)
        self._arm_idle_timer(now)

    def attach(self, connection: Connection[ReplicaToHost], message: ReplicaHello) -> None:
        """A replica's process has connected."""
        record = self._has_process(message.replica_id, message.pid)
        if record is None:
            connection.close()  # it was given up: it leaves when its host connection closes
        else:
            record.connection = connection

    def ready(self, record: Record, message: ReplicaReady) -> None:
        record.stages = {**message.stages, "start": time.monotonic() - record.created_at}
        record.busy_at = time.monotonic()
        self._num_failures = 0
        self._become(record, ReplicaState.READY)
        self._watcher.replica_ready()

    def loaded(self, record: Record, message: ReplicaLoad) -> None:
        """A replica's load has changed."""
        was_busy, record.load = record.num_requests > 0, message
        if was_busy or record.num_requests:
            record.busy_at = time.monotonic()
        self._watcher.replicas_changed()
        self.scale()

    def disconnected(self, record: Record) -> None:
        record.connection = None
        if record.state is not ReplicaState.DRAINING or not self.parked_pid:  # else: until it is reaped
            self._gone(record, "its connection closed")

    async def close(self) -> None:
        """Ends replicas and parked process."""
        self._closing = True
        for record in self.replicas:
            record.send(Drain(timeout_s=0.0))
        await self._parking.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, now: float) -> None:
        if now < self._retry_at:
            self._watcher.start_refused(self.last_error, self._retry_at - now)
            return
        self._num_started += 1
        replica_id = f"r{self._num_started}"
        device = self._options.devices[(self._num_started - 1) % len(self._options.devices)]
        record = Record(replica_id, device, str(self._folder / f"{replica_id}-{os.getpid()}.sock"))
        self.replicas.add(record)
        self._spawn(self._fork(record))
        loop = asyncio.get_running_loop()
        loop.call_later(self._options.cold_start_timeout_s, self._give_up_start, record)

    async def _fork(self, record: Record) -> None:
        message = Fork(
            replica_id=record.replica_id,
            device=record.device,
            address=record.address,
            host_socket=str(self._host_socket),
            options=self._options,
        )
        try:
            await self._parking.fork(message)
        except TunefleetError as error:
            self._gone(record, error.message)

    def _give_up_start(self, record: Record) -> None:
        """A replica that hangs before it is READY holds a device and those who wait for it."""
        if self._closing or record.state not in STARTING:
            return
        if record.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(record.pid, signal.SIGKILL)
        self._gone(record, f"it was not ready after {self._options.cold_start_timeout_s:g} s")

    def _on_forked(self, message: Forked) -> None:
        self._has_process(message.replica_id, message.pid)

    def _has_process(self, replica_id: str, pid: int) -> Record | None:
        """Heard from the parked process or from the replica itself, whichever is first."""
        record = self.replicas.get(replica_id)
        if record is not None and record.state is ReplicaState.NEW:
            record.pid, record.started_at = pid, time.time()
            self._become(record, ReplicaState.STARTING)
        return record

    def _drain(self, record: Record) -> None:
        self._become(record, ReplicaState.DRAINING)
        record.send(Drain(timeout_s=self._options.drain_timeout_s))

    def _on_reaped(self, message: Reaped) -> None:
        record = self.replicas.get(message.replica_id)
        if record is not None:
            self._gone(record, _cause(message.exit_code))
        elif message.exit_code != 0:  # its connection closed first; this says why
            self.last_error = f"replica {message.replica_id}: {_cause(message.exit_code)}"
            self._watcher.replicas_changed()

    def _gone(self, record: Record, cause: str, *, forker_lost: bool = False) -> None:
        """A replica's process is gone, or never came to be.

        Args:
            forker_lost: it isn't to blame for that: those who are held wait for the next one.
        """
        if self.replicas.get(record.replica_id) is not record:
            return
        was_starting = record.state in STARTING
        if record.state is ReplicaState.DRAINING:
            self._become(record, ReplicaState.STOPPED)
        else:
            self.last_error = f"replica {record.replica_id}: {cause}"
            log.error("%s", self.last_error)
            self._become(record, ReplicaState.FAILED)
        self._watcher.replica_gone(record)
        if was_starting and not forker_lost:
            delay = BACKOFF_S[min(self._num_failures, len(BACKOFF_S) - 1)]
            self._num_failures += 1
            self._retry_at = time.monotonic() + delay
            self._watcher.start_refused(self.last_error, delay)
        self.scale()

    def _become(self, record: Record, state: ReplicaState) -> None:
        self.replicas.become(record, state)
        self._watcher.replicas_changed()

    def _on_parked_lost(self) -> None:
        log.error("the parked process is gone; starting another")
        for record in self.replicas:
            if record.state is ReplicaState.NEW or record.connection is None:  # whose end nobody would tell
                self._gone(record, "the parked process ended", forker_lost=True)
        if not self._closing:
            self._spawn(self._park())

    async def _park(self) -> None:
        """Has a parked process ready before the first request asks for it."""
        with contextlib.suppress(TunefleetError):  # told to whoever asks for a replica
            await self._parking.ensure()

    def _arm_idle_timer(self, now: float) -> None:
        """Scales again when the time of the last replica that fell idle is up."""
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None
        ready = self.replicas.in_state(ReplicaState.READY)
        idle = [record.busy_at for record in ready if not record.num_requests]
        if idle and len(self.replicas.in_state(*LIVE)) > self._options.min_replicas:
            delay = max(idle) + self._options.idle_timeout_s - now
            self._idle_timer = asyncio.get_running_loop().call_later(max(delay, 0.01), self.scale)

    def _spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _cause(exit_code: int) -> str:
    if exit_code < 0:
        return f"ended by {signal.Signals(-exit_code).name}"
    return f"ended with exit code {exit_code}"
