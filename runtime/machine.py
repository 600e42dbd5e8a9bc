"""The router's side of this machine: joins or starts the host process, and streams from replicas.

Implements ``runtime.dispatch.Dispatcher``.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from tunefleet.config import Options, context_length, runtime_dir, state_dir
from tunefleet.core import AdapterRef, Manifest, PinTier, ReplicaInfo, ReplicaState
from tunefleet.errors import CapacityError, ConfigError, ReplicaError
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
    Submit,
    Wake,
    WakeFailed,
    Welcome,
)
from tunefleet.runtime.base import resolve_devices
from tunefleet.runtime.host import HOST_SOCKET
from tunefleet.runtime.launch import ensure_host
from tunefleet.runtime.placement import choose
from tunefleet.runtime.rows import least_budget_tokens
from tunefleet.runtime.streams import Channel, MachineRun
from tunefleet.runtime.wire import Connection

HOST_START_TIMEOUT_S = 30.0


def host_options(options: Options, manifest: Manifest, base_dir: Path) -> HostOptions:
    """What the host process needs to know of the options, with every "as many as" default filled in."""
    devices = resolve_devices(options)
    max_model_len = context_length(options, manifest)
    _check_kv(options, manifest, max_model_len)
    max_replicas = options.max_replicas or len(devices)
    cores = len(os.sched_getaffinity(0))
    return HostOptions(
        base_dir=str(base_dir),
        store_url=options.store_url,
        state_dir=str(state_dir(options, base_dir)),
        devices=devices,
        min_replicas=options.min_replicas,
        max_replicas=max_replicas,
        target_concurrency=options.target_concurrency or options.max_num_seqs,
        idle_timeout_s=options.idle_timeout_s,
        drain_timeout_s=options.drain_timeout_s,
        cold_start_timeout_s=options.cold_start_timeout_s,
        step_timeout_s=options.step_timeout_s,
        max_active_adapters=options.max_active_adapters or options.max_num_seqs,
        max_adapter_rank=options.max_adapter_rank,
        device_adapter_bytes=options.device_adapter_bytes,
        kv_cache_bytes=options.kv_cache_bytes,
        host_cache_bytes=options.host_cache_bytes,
        disk_cache_bytes=options.disk_cache_bytes,
        max_num_seqs=options.max_num_seqs,
        max_queue=options.max_queue,
        max_model_len=max_model_len,
        threads_per_replica=options.threads_per_replica or max(1, cores // max_replicas),
    )


def _check_kv(options: Options, manifest: Manifest, max_model_len: int) -> None:
    least = least_budget_tokens(max_model_len) * manifest.kv_bytes_per_token
    if options.kv_cache_bytes < least:
        raise ConfigError(
            f"kv_cache_bytes must be at least {least} for one sequence of {max_model_len} tokens of "
            f"{manifest.name}, not {options.kv_cache_bytes}: raise it, or lower max_model_len",
            param="kv_cache_bytes",
        )


class Machine:
    """Lives from ``start`` to ``close`` of its router; a lost host process is started again and joined."""

    def __init__(self, options: Options, manifest: Manifest, base_dir: Path) -> None:
        self._options = host_options(options, manifest, base_dir)
        self._state = Path(self._options.state_dir)
        self._folder = runtime_dir(self._state)
        self._log = self._state / "host.log"
        self._host: Connection[HostToRouter] | None = None
        self._welcome: asyncio.Future[Welcome] | None = None
        self._asked: dict[str, asyncio.Future[HostToRouter]] = {}  # what was asked -> its answer
        self._replicas: tuple[ReplicaInfo, ...] = ()
        self._changed = asyncio.Event()
        self._waking: dict[str, WakeFailed | None] = {}  # requests that wait for a replica
        self._channels: dict[str, asyncio.Future[Channel]] = {}
        self._held: tuple[HeldAdapter, ...] = ()  # told again to a host process that was lost
        self._closing = False
        self._joining: asyncio.Task[None] | None = None

    @property
    def replicas(self) -> tuple[ReplicaInfo, ...]:
        return self._replicas

    async def changed(self) -> None:
        """Returns at the host process's next news."""
        await self._changed.wait()

    async def start(self) -> None:
        """Joins the host process, starting it if there is none.

        Raises:
            ConfigError: one runs for the same store and base with other options.
        """
        try:
            await self._join()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        self._closing = True
        if self._joining is not None:
            self._joining.cancel()
        for future in self._channels.values():
            if future.done() and not future.cancelled() and future.exception() is None:
                future.result().close()
        if self._host is not None:
            self._host.close()
        await asyncio.sleep(0)

    def submit(self, work: Submit) -> MachineRun:
        return MachineRun(self, work)

    async def warmup(self) -> float:
        started = time.monotonic()
        await self.place(f"warmup-{uuid.uuid4().hex}", None)
        return time.monotonic() - started

    async def forget(self, digest: str) -> Forgotten:
        forgotten = await self._ask(Forget(digest=digest), f"forget {digest}")
        assert isinstance(forgotten, Forgotten)
        return forgotten

    async def forget_user(self, tenant: str, user_id: str) -> None:
        for replica in self._replicas:
            if replica.state is ReplicaState.READY:
                with contextlib.suppress(OSError):  # it is gone, and its memory with it
                    (await self.channel(replica)).forget_user(tenant, user_id)

    def hold(self, adapters: Sequence[HeldAdapter]) -> None:
        self._held = tuple(adapters)
        if self._host is not None:
            self._host.send(Hold(adapters=self._held))

    async def prefetch(self, ref: AdapterRef, tier: PinTier) -> None:
        await self._joined()
        if self._host is not None:
            self._host.send(Prefetch(adapter=ref, tier=tier))

    async def status(self) -> Status:
        status = await self._ask(StatusRequest(), "status")
        assert isinstance(status, Status)
        return status

    async def place(self, request_id: str, digest: str | None) -> ReplicaInfo:
        """A READY replica, waking one if there is none.

        Raises:
            CapacityError: none within ``cold_start_timeout_s``, or its start failed.
        """
        timeout_s = self._options.cold_start_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                self._waking[request_id] = None
                return await self._place(request_id, digest)
        except TimeoutError:
            raise CapacityError(
                f"no replica was ready within {timeout_s:g} s; try again, or raise cold_start_timeout_s",
                code="cold_start_timeout",
                retry_after_s=5.0,
            ) from None
        finally:
            self._waking.pop(request_id, None)

    async def channel(self, replica: ReplicaInfo) -> Channel:
        """The connection to a replica, one per replica however many ask."""
        future = self._channels.get(replica.address)
        if future is None:
            future = asyncio.ensure_future(self._open_channel(replica))
            self._channels[replica.address] = future
        return await asyncio.shield(future)

    async def _place(self, request_id: str, digest: str | None) -> ReplicaInfo:
        while True:
            await self._joined()
            replica = choose(self._replicas, digest)
            if replica is not None:
                return replica
            if self._host is not None:
                self._host.send(Wake(request_id=request_id))  # each time: one that was ready may be gone
            await self.changed()
            failed = self._waking[request_id]
            if failed is not None:
                raise CapacityError(
                    f"no replica could be started: {failed.message}",
                    code="replica_start_failed",
                    retry_after_s=failed.retry_after_s,
                )

    async def _ask(self, message: Message, question: str) -> HostToRouter:
        """The host process's answer; those who ask the same at once share it."""
        await self._joined()
        future = self._asked.get(question)
        if future is None:
            assert self._host is not None
            future = self._asked[question] = asyncio.get_running_loop().create_future()
            self._host.send(message)
        try:
            return await asyncio.wait_for(asyncio.shield(future), HOST_START_TIMEOUT_S)
        except (TimeoutError, EOFError) as error:
            raise ReplicaError(
                "the host process gave no answer; try again", code="host_unavailable"
            ) from error
        finally:
            if self._asked.get(question) is future:
                del self._asked[question]

    def _answered(self, question: str, message: HostToRouter) -> None:
        future = self._asked.pop(question, None)
        if future is not None and not future.done():
            future.set_result(message)

    def _notify(self) -> None:
        """Wakes everyone who waits for a change."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    # ---- host process

    async def _joined(self) -> None:
        """Waits for a host process that was lost; starts it again where that has failed before."""
        is_lost = self._host is not None and not self._host.is_open
        if is_lost and self._joining is None and not self._closing:
            self._joining = asyncio.get_running_loop().create_task(self._rejoin())
        if self._joining is not None:
            await asyncio.shield(self._joining)

    async def _join(self) -> None:
        deadline = time.monotonic() + HOST_START_TIMEOUT_S
        while True:
            try:
                welcome = await self._hello()
                break
            except (OSError, EOFError) as error:
                if time.monotonic() > deadline:
                    raise ReplicaError(
                        f"the host process doesn't come up; its log is {self._log}", code="host_unavailable"
                    ) from error
                await asyncio.to_thread(ensure_host, self._folder, self._state, self._log)
                await asyncio.sleep(0.02)
        self._replicas = welcome.replicas
        if self._held and self._host is not None:
            self._host.send(Hold(adapters=self._held))
        self._notify()

    async def _hello(self) -> Welcome:
        loop = asyncio.get_running_loop()
        self._welcome = loop.create_future()
        _, self._host = await loop.create_unix_connection(
            lambda: Connection[HostToRouter](HostToRouter, self._on_host, self._on_host_gone),
            str(self._folder / HOST_SOCKET),
        )
        self._host.send(Hello(options=self._options))
        return await self._welcome

    def _on_host(self, host: Connection[HostToRouter], message: HostToRouter) -> None:
        match message:
            case Welcome():
                if self._welcome is not None and not self._welcome.done():
                    self._welcome.set_result(message)
            case Refused():
                if self._welcome is not None and not self._welcome.done():
                    self._welcome.set_exception(ConfigError(message.message))
            case Replicas():
                self._replicas = message.replicas
            case WakeFailed():
                if message.request_id in self._waking:
                    self._waking[message.request_id] = message
            case Status():
                self._answered("status", message)
            case Forgotten():
                self._answered(f"forget {message.digest}", message)
        self._notify()

    def _on_host_gone(self, host: Connection[HostToRouter]) -> None:
        if self._welcome is not None and not self._welcome.done():
            self._welcome.set_exception(EOFError("the host process closed the connection"))
        elif host is self._host and not self._closing:
            for question in list(self._asked):
                self._asked.pop(question).set_exception(EOFError("the host process is gone"))
            self._replicas = ()
            self._joining = asyncio.get_running_loop().create_task(self._rejoin())
            self._notify()

    async def _rejoin(self) -> None:
        """A killed host process comes back; requests are held meanwhile."""
        try:
            await self._join()
        finally:
            self._joining = None
            self._notify()

    # ---- replicas

    async def _open_channel(self, replica: ReplicaInfo) -> Channel:
        channel = Channel(on_close=lambda: self._channels.pop(replica.address, None))
        try:
            await channel.open(replica.address)
        except OSError:
            self._channels.pop(replica.address, None)
            self.disregard(replica.replica_id)
            raise
        return channel

    def disregard(self, replica_id: str) -> None:
        """A replica takes nothing any more; don't choose it again before the host process says otherwise."""
        self._replicas = tuple(replica for replica in self._replicas if replica.replica_id != replica_id)
