"""The router's side of this machine: places runs on replicas, and streams from them.

Implements ``runtime.dispatch.Dispatcher``.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

from tunefleet.config import Options, context_length, state_dir
from tunefleet.core import AdapterRef, Manifest, PinTier, ReplicaInfo, ReplicaState
from tunefleet.errors import ConfigError
from tunefleet.messages import Forgotten, HeldAdapter, HostOptions, Status, Submit
from tunefleet.runtime.base import resolve_devices
from tunefleet.runtime.environ import num_cores
from tunefleet.runtime.host_link import HostLink
from tunefleet.runtime.local_link import LocalLink
from tunefleet.runtime.placing import Placing
from tunefleet.runtime.rows import least_budget_tokens
from tunefleet.runtime.streams import Channel, MachineRun


def host_options(options: Options, manifest: Manifest, base_dir: Path) -> HostOptions:
    """What the host process needs to know of the options, with every "as many as" default filled in."""
    devices = resolve_devices(options)
    max_model_len = context_length(options, manifest)
    _check_kv(options, manifest, max_model_len)
    max_replicas = options.max_replicas or len(devices)
    return HostOptions(
        base_dir=str(base_dir),
        store_url=options.store_url,
        state_dir=str(state_dir(options, base_dir)),
        devices=devices,
        min_replicas=options.min_replicas,
        max_replicas=max_replicas,
        target_concurrency=options.target_concurrency or options.max_num_seqs,
        idle_timeout_s=options.idle_timeout_s,
        scale_down_delay_s=options.scale_down_delay_s,
        predictive=options.predictive,
        standby_ttl_s=options.standby_ttl_s,
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
        threads_per_replica=options.threads_per_replica or max(1, num_cores() // max_replicas),
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
    """Lives from ``start`` to ``close`` of its router.

    Args:
        link: to the host process; by default this machine's own, which is started when there is none.
    """

    def __init__(
        self, options: Options, manifest: Manifest, base_dir: Path, link: HostLink | None = None
    ) -> None:
        known = host_options(options, manifest, base_dir)
        self._link = link or LocalLink(known)
        self._placing = Placing(self._link, known)
        self._channels: dict[str, asyncio.Future[Channel]] = {}  # by address

    @property
    def replicas(self) -> tuple[ReplicaInfo, ...]:
        return self._placing.replicas

    @property
    def num_held(self) -> int:
        """This router's requests that wait for a replica."""
        return self._placing.num_held

    async def changed(self) -> None:
        """Returns at the host process's next news."""
        await self._placing.changed()

    async def start(self) -> None:
        """Joins the host process, starting it if there is none.

        Raises:
            ConfigError: one runs for the same store and base with other options.
        """
        await self._link.join()

    async def close(self) -> None:
        for future in self._channels.values():
            if future.done() and not future.cancelled() and future.exception() is None:
                future.result().close()
        await self._link.leave()

    def submit(self, work: Submit) -> MachineRun:
        return MachineRun(self._placing, self, work)

    async def warmup(self) -> float:
        started = time.monotonic()
        self._placing.release(await self._placing.place(f"warmup-{uuid.uuid4().hex}", None))
        return time.monotonic() - started

    async def forget(self, digest: str, keys: Sequence[str] = ()) -> Forgotten:
        return await self._link.forget(digest, keys)

    async def forget_user(self, tenant: str, user_id: str) -> None:
        for replica in self.replicas:
            if replica.state is ReplicaState.READY:
                with contextlib.suppress(OSError):  # it is gone, and its memory with it
                    (await self.channel(replica)).forget_user(tenant, user_id)

    def hold(self, adapters: Sequence[HeldAdapter]) -> None:
        self._link.hold(adapters)

    async def prefetch(self, ref: AdapterRef, tier: PinTier) -> None:
        await self._link.prefetch(ref, tier)

    async def status(self) -> Status:
        return await self._link.status()

    async def channel(self, replica: ReplicaInfo) -> Channel:
        """The connection to a replica, one per replica however many ask.

        Raises:
            OSError: it can't be reached, and is not chosen before the host process has news.
        """
        future = self._channels.get(replica.address)
        if future is None:
            future = asyncio.ensure_future(self._open_channel(replica))
            self._channels[replica.address] = future
        return await asyncio.shield(future)

    async def _open_channel(self, replica: ReplicaInfo) -> Channel:
        def gone() -> None:
            self._channels.pop(replica.address, None)
            self._placing.disregard(replica.address)

        channel = Channel(on_close=gone)
        try:
            await channel.open(replica.address)
        except OSError:
            gone()
            raise
        return channel
