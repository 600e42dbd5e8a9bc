"""What makes replicas' processes, as the supervisor sees it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from tunefleet.messages import Fork, Forked, Reaped


class Starter(Protocol):
    """Makes replicas' processes and hears of their ends; ``parking.Parking`` forks them."""

    @property
    def pid(self) -> int:
        """Of the process that is kept for it; 0 while there is none."""
        ...

    async def ensure(self) -> None:
        """Returns when it is ready to start a replica.

        Raises:
            ReplicaError: it can't get ready.
        """
        ...

    async def fork(self, message: Fork) -> None:
        """Asks for a replica; raises as ``ensure`` does."""
        ...

    async def close(self) -> None:
        """Ends what is kept, not the replicas; ``ensure`` brings it back."""
        ...


class StarterFactory(Protocol):
    def __call__(
        self,
        base_dir: Path,
        *,
        on_forked: Callable[[Forked], None],
        on_reaped: Callable[[Reaped], None],
        on_lost: Callable[[], None],
    ) -> Starter:
        """A starter that calls ``on_forked`` and ``on_reaped`` for each process that begins or ends.

        And ``on_lost`` when what is kept ended unasked: nobody tells of the ends of its replicas any more.
        """
        ...


class Standby:
    """A starter that is closed after ``ttl_s`` at zero and comes back when asked; 0: it stays."""

    def __init__(self, starter: Starter, ttl_s: float) -> None:
        self._starter = starter
        self._ttl_s = ttl_s
        self._timer: asyncio.TimerHandle | None = None
        self._dropping: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        return self._starter.pid

    def set_at_zero(self, at_zero: bool) -> None:
        """Whether there is no replica, nor one asked for."""
        if not at_zero:
            self._stop_timer()
        elif self._timer is None and self._ttl_s:
            self._timer = asyncio.get_running_loop().call_later(self._ttl_s, self._drop)

    async def ensure(self) -> None:
        await self._dropped()
        await self._starter.ensure()

    async def fork(self, message: Fork) -> None:
        await self._dropped()
        await self._starter.fork(message)

    async def close(self) -> None:
        self._stop_timer()
        await self._dropped()
        await self._starter.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _drop(self) -> None:
        self._dropping = asyncio.get_running_loop().create_task(self._starter.close())

    async def _dropped(self) -> None:
        """Nothing is asked of a starter that is closing."""
        if self._dropping is not None:
            await asyncio.shield(self._dropping)
