"""A replica: the engine as a process, between routers and the host process.

One thread: a step runs inside the event loop, so whatever arrived (a cancel, a request) is seen before the
next step.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn

from tunefleet.core import Manifest
from tunefleet.messages import (
    AdapterMapped,
    AdapterReady,
    AdapterUnavailable,
    Cancel,
    Drain,
    Evict,
    Evicted,
    FetchAdapter,
    ForgetUser,
    Fork,
    HostToReplica,
    Progress,
    Rejected,
    ReplicaHello,
    ReplicaLoad,
    ReplicaReady,
    RouterToReplica,
    Step,
    Submit,
    Trial,
)
from tunefleet.runtime import staging
from tunefleet.runtime.engine import Engine, EngineLimits
from tunefleet.runtime.watchdog import Watchdog
from tunefleet.runtime.wire import Connection

LOAD_INTERVAL_S = 0.05  # a busy replica tells its load at most this often
IMPROVE_S = 0.008  # between two steps, until the base's modules are as fast as they get

log = logging.getLogger("tunefleet.replica")


def main(model: nn.Module, manifest: Manifest, fork: Fork, started: float) -> NoReturn:
    """Runs in the forked child until drained or until the host process is gone; never returns."""
    exit_code = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the router's to answer
        logging.basicConfig(stream=sys.stderr, level=logging.INFO)
        asyncio.run(_serve(model, manifest, fork, started))
        exit_code = 0
    except Exception:  # the process boundary: say why, and let the host process see the exit code
        log.exception("replica %s failed", fork.replica_id)
    finally:
        os._exit(exit_code)  # not the parent's atexit handlers


async def _serve(model: nn.Module, manifest: Manifest, fork: Fork, started: float) -> None:
    torch.set_num_threads(fork.options.threads_per_replica)
    device = torch.device(fork.device)
    forked_s = time.time() - started
    begin = time.monotonic()
    engine = Engine(staging.open_on(model, device), manifest, _limits(fork), time.monotonic, device)
    stages = {"fork": forked_s, "engine": time.monotonic() - begin}
    await ReplicaProcess(engine, fork).run(stages)


def _limits(fork: Fork) -> EngineLimits:
    options = fork.options
    return EngineLimits(
        max_num_seqs=options.max_num_seqs,
        max_model_len=options.max_model_len,
        max_active_adapters=options.max_active_adapters,
        device_adapter_bytes=options.device_adapter_bytes,
        kv_cache_bytes=options.kv_cache_bytes,
        max_queue=options.max_queue,
    )


class ReplicaProcess:
    """Connects one engine to routers and host process."""

    def __init__(self, engine: Engine, fork: Fork) -> None:
        self._engine = engine
        self._fork = fork
        self._host: Connection[HostToReplica] | None = None
        self._routers: set[Connection[RouterToReplica]] = set()
        self._owners: dict[str, Connection[RouterToReplica]] = {}  # request id -> its router
        self._news = asyncio.Event()
        self._draining = False
        self._gone = False
        self._evicting: set[str] = set()
        self._load: ReplicaLoad | None = None
        self._load_sent_at = 0.0
        self._num_tokens = 0  # generated
        self._num_requests = 0
        self._has_answered = False
        self._watchdog = Watchdog(fork.options.step_timeout_s)

    async def run(self, stages: dict[str, float]) -> None:
        loop = asyncio.get_running_loop()
        _, host = await loop.create_unix_connection(
            lambda: Connection[HostToReplica](HostToReplica, self._on_host, self._on_host_gone),
            self._fork.host_socket,
        )
        self._host = host
        host.send(ReplicaHello(replica_id=self._fork.replica_id, pid=os.getpid()))
        server = await loop.create_unix_server(
            lambda: Connection[RouterToReplica](
                RouterToReplica, self._on_router, self._on_router_gone, self._routers.add
            ),
            self._fork.address,
        )
        host.send(ReplicaReady(address=self._fork.address, stages=stages))
        try:
            await self._step_until_done()
        finally:
            server.close()
            Path(self._fork.address).unlink(missing_ok=True)

    async def _step_until_done(self) -> None:
        while not self._gone and not (self._draining and not self._owners):
            self._news.clear()
            self._tell_load([])  # what came is no idleness, however long its first step takes
            with self._watchdog.step():
                progressed = self._engine.step(self._trial)
            self._deliver(progressed)
            self._fetch_missing()
            self._evict()
            self._tell_load(progressed)
            if self._has_work(progressed):
                await asyncio.sleep(0)  # one turn of the loop: everything that arrived is seen
            else:
                await self._news.wait()
        if self._host is not None:
            self._host.close()
        await asyncio.sleep(0)

    def _has_work(self, progressed: list[Progress]) -> bool:
        """Whether to step again at once. Improves the model too, once nobody waits for its first token."""
        is_busy = bool(progressed or self._engine.scheduler.running)
        self._has_answered = self._has_answered or bool(progressed)
        if self._has_answered or not self._engine.scheduler:
            is_busy = self._improve() or is_busy
        return is_busy

    def _improve(self) -> bool:
        """Some milliseconds of it; False when there is nothing left to do."""
        until = time.monotonic() + IMPROVE_S
        with self._watchdog.step():
            while self._engine.improve():
                if time.monotonic() >= until:
                    return True
        return False

    @contextmanager
    def _trial(self, request_id: str) -> Iterator[None]:
        """Routers can tell whose doing it was if this process ends inside; an exception is no such end."""
        self._tell_routers(Trial(request_id=request_id))
        try:
            yield
        finally:
            self._tell_routers(Trial(request_id=""))

    def _tell_routers(self, message: Trial) -> None:
        """It is in the kernel's hands on return, unless a router has left much unread."""
        for router in self._routers:
            router.send(message)

    def _deliver(self, progressed: list[Progress]) -> None:
        """Tokens of one step cross in one message per router."""
        items: dict[Connection[RouterToReplica], list[Progress]] = {}
        for progress in progressed:
            owner = self._owners.get(progress.request_id)
            if owner is not None:
                items.setdefault(owner, []).append(progress)
            if progress.finish_reason is not None:
                self._owners.pop(progress.request_id, None)
        for owner, batch in items.items():
            owner.send(Step(items=tuple(batch)))

    def _fetch_missing(self) -> None:
        for ref in self._engine.missing_adapters():
            self._tell_host(FetchAdapter(adapter=ref))

    def _evict(self) -> None:
        """Empties the slots that were asked for and that no sequence uses, and says so."""
        active = set(self._engine.slots.digests)
        for digest in [digest for digest in self._evicting if self._engine.evict(digest)]:
            self._evicting.discard(digest)
            self._tell_host(Evicted(digest=digest, was_active=digest in active))

    def _tell_load(self, progressed: list[Progress]) -> None:
        self._num_tokens += sum(len(progress.tokens) for progress in progressed)
        now = time.monotonic()
        if self._engine.scheduler and now - self._load_sent_at < LOAD_INTERVAL_S:
            return
        load = self._current_load()
        if load != self._load:
            self._load, self._load_sent_at = load, now
            self._tell_host(load)

    def _current_load(self) -> ReplicaLoad:
        engine = self._engine
        digests = engine.slots.digests
        return ReplicaLoad(
            num_running=len(engine.scheduler.running),
            num_waiting=len(engine.scheduler.waiting),
            num_steps=engine.num_steps,
            num_tokens=self._num_tokens,
            num_requests=self._num_requests,
            digests=digests,
            num_adapters_in_use=sum(map(engine.slots.is_pinned, digests)),
            num_slots=engine.slots.max_slots,
            adapter_bytes=engine.slots.used_pages * engine.banks.page_bytes,
            kv_tokens=engine.rows.used_tokens,
            max_kv_tokens=engine.rows.budget_tokens,
        )

    def _tell_host(self, message: ReplicaLoad | FetchAdapter | AdapterMapped | Evicted) -> None:
        assert self._host is not None
        self._host.send(message)

    def _on_router(self, router: Connection[RouterToReplica], message: RouterToReplica) -> None:
        self._news.set()
        if isinstance(message, Cancel):
            self._engine.cancel(message.request_id)
            self._owners.pop(message.request_id, None)
        elif isinstance(message, ForgetUser):
            self._engine.forget_user(message.tenant, message.user_id)
        elif isinstance(message, Submit):
            if self._draining:
                router.send(Rejected(request_id=message.request_id))
            elif message.request_id not in self._owners:
                self._owners[message.request_id] = router
                self._num_requests += 1
                self._engine.add(message)

    def _on_router_gone(self, router: Connection[RouterToReplica]) -> None:
        self._news.set()
        self._routers.discard(router)
        for request_id in [request_id for request_id, owner in self._owners.items() if owner is router]:
            self._engine.cancel(request_id)
            del self._owners[request_id]

    def _on_host(self, _: Connection[HostToReplica], message: HostToReplica) -> None:
        self._news.set()
        match message:
            case AdapterReady():
                path = Path(message.path)
                self._engine.adapter_loaded(message.digest, path, message.download_s, message.load_s)
                self._tell_host(AdapterMapped(digest=message.digest))
            case AdapterUnavailable():
                self._engine.adapter_failed(
                    message.digest, message.message, message.code, message.retry_after_s, key=message.key
                )
            case Evict():
                self._evicting.add(message.digest)
            case Drain():
                self._draining = True
                asyncio.get_running_loop().call_later(message.timeout_s, self._leave)

    def _on_host_gone(self, _: Connection[HostToReplica]) -> None:
        self._leave()

    def _leave(self) -> None:
        self._gone = True
        self._news.set()
