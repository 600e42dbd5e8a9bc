"""What a starter of replicas tells, and what it is asked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import psutil

from adapter_factory import make_manifest
from lone_router import options_for
from tunefleet.messages import Fork, Forked, Reaped
from tunefleet.runtime.machine import host_options

TESTS = str(Path(__file__).parent)  # for PYTHONPATH: modules here that starters run
MANIFEST = make_manifest(max_model_len=256)


class Heard:
    """All that a starter has told; hand its methods to one."""

    def __init__(self) -> None:
        self.forked: list[Forked] = []
        self.reaped: list[Reaped] = []
        self.num_lost = 0
        self._news = asyncio.Event()

    def on_forked(self, message: Forked) -> None:
        self.forked.append(message)
        self._news.set()

    def on_reaped(self, message: Reaped) -> None:
        self.reaped.append(message)
        self._news.set()

    def on_lost(self) -> None:
        self.num_lost += 1
        self._news.set()

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(60):
            while not condition():
                self._news.clear()
                await self._news.wait()


def fork_message(root: Path, base: Path = Path("none"), replica_id: str = "r1") -> Fork:
    """What a host process asks of its starter; the replica finds nobody at these sockets."""
    return Fork(
        replica_id=replica_id,
        device="cpu",
        address=str(root / f"{replica_id}.sock"),
        host_socket=str(root / "host.sock"),
        options=host_options(options_for(root), MANIFEST, base),
    )


def children() -> set[int]:
    """Processes that are ours to reap."""
    return {child.pid for child in psutil.Process().children()}


def is_gone(pid: int) -> bool:
    """Ended, if not reaped by whoever inherited it."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
