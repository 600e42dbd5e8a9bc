"""Blocking work beside an event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

import anyio
import anyio.to_thread

T = TypeVar("T")


class Runner:
    """Runs blocking work in threads, at most so many at once."""

    def __init__(self, num_threads: int) -> None:
        self._limiter = anyio.CapacityLimiter(num_threads)

    async def __call__(self, work: Callable[[], T]) -> T:
        return await anyio.to_thread.run_sync(work, limiter=self._limiter)

    async def to_the_end(self, work: Callable[[], T]) -> T:
        """As a call, but a cancelled caller waits too: when this returns or raises, the work is over."""
        running = asyncio.ensure_future(self(work))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            await asyncio.wait([running])
            if not running.cancelled():
                running.exception()  # seen: nobody is left to tell
            raise
