"""Zero to first token: by fork from the parked process, against a fresh process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

from tests.benchmarks.adapters import make_adapters
from tests.benchmarks.bench import Bench, greedy
from tests.benchmarks.figures import Figure, at_least, at_most, figure
from tests.benchmarks.machines import Shelf, leave

from tunefleet.core import AdapterRef
from tunefleet.messages import Submit
from tunefleet.runtime.machine import Machine

RANK = 8
IDLE_TIMEOUT_S = 0.2


def measure(bench: Bench) -> Iterator[Figure]:
    """The base's weights in the page cache, each request's adapter on disk."""
    made = make_adapters(bench, [RANK], seed=8)
    num_fresh = max(1, bench.repeats // 2)
    shelves = [Shelf(bench, f"fresh-{n}", idle_timeout_s=IDLE_TIMEOUT_S) for n in range(num_fresh)]
    fresh = [asyncio.run(_fresh(bench, shelf, shelf.put(made, 1)[0])) for shelf in shelves]
    shelf = Shelf(bench, "waking", idle_timeout_s=IDLE_TIMEOUT_S)
    forked = asyncio.run(_forked(bench, shelf, shelf.put(made, bench.repeats + 1)))
    yield figure("fresh process to first token", "s", fresh)
    yield figure("zero to first token, by fork", "s", forked, bar=at_most(0.35))
    speedup = figure("fresh process", "s", fresh).median / figure("by fork", "s", forked).median
    yield figure("fresh process to fork", "x", [speedup], bar=at_least(10))


async def _fresh(bench: Bench, shelf: Shelf, ref: AdapterRef) -> float:
    """No host process, no parked process: all is imported and mapped on this request."""
    machine = Machine(shelf.options, bench.manifest, bench.base_dir)
    started = time.monotonic()
    await machine.start()
    await _first_token(bench, machine, ref)
    seconds = time.monotonic() - started
    await leave(machine)
    return seconds


async def _forked(bench: Bench, shelf: Shelf, refs: list[AdapterRef]) -> list[float]:
    seconds = []
    async with shelf.serving() as client:
        for ref in refs:
            while client.machine.replicas:
                await client.machine.changed()
            started = time.monotonic()
            await _first_token(bench, client.machine, ref)
            seconds.append(time.monotonic() - started)
    return seconds[1:]


async def _first_token(bench: Bench, machine: Machine, ref: AdapterRef) -> None:
    lowest = bench.manifest.vocab_size // 4
    prompt = tuple(range(lowest, lowest + 64))
    work = Submit(request_id=ref.digest, prompt=prompt, sampling=greedy(1), adapter=ref)
    async for _ in machine.submit(work):
        pass
