"""What tests of machines ask: a short prompt of the tiny base, answered whole."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Protocol

from engine_kit import greedy
from tunefleet.config import Options
from tunefleet.core import AdapterRef, Manifest
from tunefleet.messages import Submit
from tunefleet.runtime.dispatch import Run
from tunefleet.runtime.machine import Machine

PROMPT = (5, 6, 7, 8)
LONG = 200  # tokens: an answer that is still running when the test acts


class Prepared(Protocol):
    """What a machine needs of a test's world."""

    @property
    def base(self) -> Path: ...

    @property
    def manifest(self) -> Manifest: ...


@contextlib.asynccontextmanager
async def router(world: Prepared, options: Options) -> AsyncIterator[Machine]:
    """One more router of the machine that these options name."""
    machine = Machine(options, world.manifest, world.base)
    await machine.start()
    try:
        yield machine
    finally:
        await machine.close()


def ask(request_id: str, num_tokens: int = 20, adapter: AdapterRef | None = None) -> Submit:
    return Submit(request_id=request_id, prompt=PROMPT, sampling=greedy(num_tokens), adapter=adapter)


async def answer(machine: Machine, work: Submit) -> list[int]:
    return await said(machine.submit(work))


async def said(run: Run) -> list[int]:
    """All its tokens."""
    return [token async for progress in run for token in progress.tokens]
