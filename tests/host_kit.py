"""A host process in this process, with replicas that are none, and routers that only speak its protocol."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path

import msgspec

from tunefleet.core import Manifest, ReplicaInfo, ReplicaState
from tunefleet.messages import (
    Hello,
    HostOptions,
    HostToRouter,
    Message,
    Refused,
    Replicas,
    Status,
    StatusRequest,
    Unheld,
    Wake,
    WakeFailed,
    Welcome,
)
from tunefleet.runtime.backoff import Backoff
from tunefleet.runtime.base import MANIFEST_FILE
from tunefleet.runtime.fake_replicas import FakeStarter
from tunefleet.runtime.host import HOST_SOCKET, HostProcess
from tunefleet.runtime.supervisor import Supervisor
from tunefleet.runtime.wire import Connection

DELAYS_S = (0.3, 0.35, 0.4)  # between starts that fail
MANIFEST = Manifest(
    base_id="tiny@0",
    name="tiny",
    architecture="none",
    dtype="float32",
    weights_sha256="0",
    hidden_size=8,
    num_layers=1,
    vocab_size=8,
    max_model_len=64,
    eos_token_ids=(0,),
    linears={},
    probe_max_diff=0.0,
)


def host_options(root: Path, **given: object) -> HostOptions:
    """Of a host process with everything below ``root``; nothing of it is idle for long."""
    (root / "base").mkdir(exist_ok=True)
    (root / "base" / MANIFEST_FILE).write_bytes(msgspec.json.encode(MANIFEST))
    options: dict[str, object] = {
        **dict.fromkeys(HostOptions.__struct_fields__, 1 << 20),
        "base_dir": str(root / "base"),
        "store_url": (root / "store").as_uri(),
        "state_dir": str(root / "state"),
        "devices": ("cpu",),
        "min_replicas": 0,
        "max_replicas": 1,
        "target_concurrency": 32,
        "idle_timeout_s": 60.0,
        "scale_down_delay_s": 60.0,
        "predictive": False,
        "standby_ttl_s": 0.0,
        "drain_timeout_s": 30.0,
        "cold_start_timeout_s": 30.0,
        "step_timeout_s": 30.0,
        **given,
    }
    return msgspec.convert(options, HostOptions)


class Router:
    """As a router speaks to its host process.

    Attributes:
        replicas: as it was last told.
        failed: WakeFailed messages by request.
        refused: why it was not taken in.
    """

    def __init__(self) -> None:
        self.replicas: tuple[ReplicaInfo, ...] = ()
        self.failed: dict[str, WakeFailed] = {}
        self.refused: str | None = None
        self.is_lost = False
        self._status: Status | None = None
        self._news = asyncio.Event()
        self._host: Connection[HostToRouter] | None = None

    async def join(self, folder: Path, options: HostOptions) -> None:
        _, self._host = await asyncio.get_running_loop().create_unix_connection(
            lambda: Connection[HostToRouter](HostToRouter, self._on_message, self._on_close),
            str(folder / HOST_SOCKET),
        )
        self.send(Hello(options=options))

    def send(self, message: Message) -> None:
        assert self._host is not None
        self._host.send(message)

    def wake(self, *request_ids: str) -> None:
        for request_id in request_ids:
            self.send(Wake(request_id=request_id))

    def give_up(self, *request_ids: str) -> None:
        for request_id in request_ids:
            self.send(Unheld(request_id=request_id))

    def leave(self) -> None:
        assert self._host is not None
        self._host.close()

    async def status(self) -> Status:
        """Everything sent before is done by then."""
        self._status = None
        self.send(StatusRequest())
        await self.until(lambda: self._status is not None)
        assert self._status is not None
        return self._status

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                await self._news.wait()
                self._news.clear()

    async def until_states(self, *states: ReplicaState) -> list[str]:
        """Waits for replicas in exactly these states, and names them."""
        await self.until(lambda: sorted(states) == sorted(replica.state for replica in self.replicas))
        return [replica.replica_id for replica in self.replicas]

    def _on_message(self, _: Connection[HostToRouter], message: HostToRouter) -> None:
        match message:
            case Welcome() | Replicas():
                self.replicas = message.replicas
            case WakeFailed():
                self.failed[message.request_id] = message
            case Refused():
                self.refused = message.message
            case Status():
                self._status = message
        self._news.set()

    def _on_close(self, _: Connection[HostToRouter]) -> None:
        self.is_lost = True
        self._news.set()


class Host:
    """A host process that runs, and what it starts replicas with."""

    def __init__(self, folder: Path, options: HostOptions) -> None:
        self.folder = folder
        self.options = options
        self.starter = FakeStarter()
        supervise = functools.partial(Supervisor, starter=self.starter.attach, backoff=Backoff(DELAYS_S))
        self.process = HostProcess(folder, supervise)
        self.running = asyncio.create_task(self.process.run())
        self._routers: list[Router] = []

    async def router(self, options: HostOptions | None = None) -> Router:
        """One that has said hello."""
        router = Router()
        self._routers.append(router)
        await router.join(self.folder, options or self.options)
        return router

    async def end(self) -> None:
        """At once."""
        self.process.leave()
        self.process.leave()
        async with asyncio.timeout(5):
            await self.running
        for router in self._routers:
            router.leave()
        await asyncio.sleep(0)

    def ids(self) -> list[str]:
        """Of all that were started."""
        return [replica.fork.replica_id for replica in self.starter.replicas]

    def sockets(self) -> Iterable[Path]:
        return self.folder.glob("*.sock")


@contextlib.asynccontextmanager
async def hosting(root: Path, **given: object) -> AsyncIterator[Host]:
    """A host process until the end of the block, which it must not outlive for long."""
    folder = root / "run"
    folder.mkdir(exist_ok=True)
    host = Host(folder, host_options(root, **given))
    async with asyncio.timeout(5):
        while not (folder / HOST_SOCKET).exists():
            await asyncio.sleep(0)
    try:
        yield host
    finally:
        await host.end()
