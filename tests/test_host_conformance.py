"""The host process of this machine and the one in memory keep the same contract."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal

from engine_kit import make_adapter, prepare_model, tiny_model
from host_conformance import CHECKS, Check, HostUnderTest
from lone_router import options_for
from tunefleet.adapters_store.store import AdapterStore
from tunefleet.config import Options
from tunefleet.core import AdapterRef, Manifest, ReplicaInfo
from tunefleet.errors import ReplicaError
from tunefleet.runtime.host_link import HostLink
from tunefleet.runtime.local_link import LocalLink
from tunefleet.runtime.machine import host_options
from tunefleet.runtime.memory_link import MemoryHost

IDLE_S = 0.1


class InMemory:
    """Of replicas that are nothing but an address."""

    adapter = AdapterRef("d" * 64, "default", "default/d", "d" * 64, 1000, 8)

    def __init__(self) -> None:
        self._host = MemoryHost(self._start)

    def link(self) -> HostLink:
        return self._host.link()

    def broken_link(self) -> HostLink:
        return MemoryHost(self._fail).link()

    async def lose(self, replica: ReplicaInfo) -> None:
        self._host.lose(replica.replica_id)

    async def restart(self) -> None:
        self._host.restart()

    async def _start(self, replica_id: str) -> str:
        asyncio.get_running_loop().call_later(IDLE_S, self._host.lose, replica_id)
        return f"memory:{replica_id}"

    async def _fail(self, replica_id: str) -> str:
        raise ReplicaError("there is no device")


class OnThisMachine:
    """Of real processes; links of its own keep it up between cases."""

    def __init__(self, options: Options, manifest: Manifest, base: Path, adapter: AdapterRef) -> None:
        self.adapter = adapter
        self._sound = host_options(options, manifest, base)
        self._broken = host_options(options, manifest, _broken_copy(base))
        self._keepers = LocalLink(self._sound), LocalLink(self._broken)

    def link(self) -> HostLink:
        return LocalLink(self._sound)

    def broken_link(self) -> HostLink:
        return LocalLink(self._broken)

    async def lose(self, replica: ReplicaInfo) -> None:
        os.kill(replica.pid, signal.SIGKILL)

    async def restart(self) -> None:
        os.kill((await self._keepers[0].status()).pid, signal.SIGKILL)

    async def start(self) -> None:
        """Both host processes, the sound and the broken one, at the same time."""
        await asyncio.gather(*(keeper.join() for keeper in self._keepers))

    async def stop(self) -> None:
        for keeper in self._keepers:
            await keeper.leave()


def _broken_copy(base: Path) -> Path:
    """A prepared base whose weights end too early."""
    folder = base.with_name("broken")
    folder.mkdir(exist_ok=True)
    for file in base.iterdir():
        content = file.read_bytes()
        (folder / file.name).write_bytes(content[:-100] if file.suffix == ".safetensors" else content)
    return folder


@contextlib.asynccontextmanager
async def running(root: Path) -> AsyncIterator[OnThisMachine]:
    model = tiny_model("llama")
    manifest = prepare_model(model, root / "base")
    adapter = make_adapter(model, manifest, root / "adapter", 3, r=8, target_modules=["q_proj"])
    options = options_for(root, idle_timeout_s=IDLE_S)
    store = AdapterStore.open(options, manifest)
    try:
        await store.push("ana", adapter.folder)
        ref = (await store.resolve("ana")).ref
    finally:
        await store.close()
    host = OnThisMachine(options, manifest, root / "base", ref)
    await host.start()
    try:
        yield host
    finally:
        await host.stop()


@pytest.fixture(scope="module")
def portal() -> Iterator[BlockingPortal]:
    with start_blocking_portal() as portal:
        yield portal


@pytest.fixture(scope="module")
def local(portal: BlockingPortal, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HostUnderTest]:
    with portal.wrap_async_context_manager(running(tmp_path_factory.mktemp("conformance"))) as host:
        yield host


@pytest.mark.parametrize("check", CHECKS, ids=[check.__name__.removeprefix("check_") for check in CHECKS])
def test_in_memory(check: Check) -> None:
    asyncio.run(check(InMemory()))


@pytest.mark.parametrize("check", CHECKS, ids=[check.__name__.removeprefix("check_") for check in CHECKS])
def test_on_this_machine(check: Check, portal: BlockingPortal, local: HostUnderTest) -> None:
    portal.call(check, local)
