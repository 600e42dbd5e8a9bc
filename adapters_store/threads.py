"""Blocking work beside an event loop."""

from __future__ import annotations

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
