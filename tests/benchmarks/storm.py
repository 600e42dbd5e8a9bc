"""Swap storm: do people whose adapters are in slots feel that 20 others a second are put into slots?

Both ways 16 people read long answers while 20 short requests a second come in; in calm runs the short ones'
adapters are in slots as well, in storm runs none of them is.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tests.benchmarks.adapters import make_adapters
from tests.benchmarks.bench import Bench
from tests.benchmarks.figures import Figure, at_most, figure, percentile, ratios
from tests.benchmarks.machines import MachineClient, Shelf
from tests.benchmarks.traces import Trace

from tunefleet.core import AdapterRef

RANK = 8
PER_SECOND = 20
MAX_ROUNDS = 3


class _Run(NamedTuple):
    gaps: list[float]  # seconds between the tokens of those who read
    num_activations: int
    seconds: float


def measure(bench: Bench) -> Iterator[Figure]:
    num_readers = bench.size(16, 1)
    made = make_adapters(bench, [RANK] * bench.size(32, 2), seed=3)
    shelf = Shelf(bench, "storm", max_num_seqs=2 * num_readers + 2, max_active_adapters=2 * num_readers)
    refs = shelf.put(made, bench.size(200, 6))
    calm, storm = asyncio.run(_rounds(bench, shelf, refs, num_readers))
    calm_p99 = [percentile(run.gaps, 99) for run in calm]
    storm_p99 = [percentile(run.gaps, 99) for run in storm]
    yield figure("inter-token p99, calm", "ms", (1000 * gap for gap in calm_p99))
    yield figure("inter-token p99, storm", "ms", (1000 * gap for gap in storm_p99))
    yield figure("activations, calm", "per s", (run.num_activations / run.seconds for run in calm))
    yield figure("activations, storm", "per s", (run.num_activations / run.seconds for run in storm))
    yield ratios("inter-token p99, storm to calm", storm_p99, calm_p99, at_most(1.25))


async def _rounds(
    bench: Bench, shelf: Shelf, refs: Sequence[AdapterRef], num_readers: int
) -> tuple[list[_Run], list[_Run]]:
    readers, others = refs[:num_readers], refs[num_readers:]
    few = others[: max(1, num_readers - 1)]
    calm: list[_Run] = []
    storm: list[_Run] = []
    async with shelf.serving() as client:
        await client.settle()
        await client.bring_to_host(refs)
        await _run(bench, client, readers, few)  # not counted
        for _ in range(min(bench.repeats, MAX_ROUNDS)):
            await client.touch(few)
            calm.append(await _run(bench, client, readers, few))
            storm.append(await _run(bench, client, readers, others))
    return calm, storm


async def _run(
    bench: Bench, client: MachineClient, readers: Sequence[AdapterRef], others: Sequence[AdapterRef]
) -> _Run:
    reading = [_Reader(client, ref, bench.size(32, 4), bench.size(1500, 400)) for ref in readers]
    try:
        await asyncio.gather(*(reader.has_begun.wait() for reader in reading))
        start, count = time.perf_counter(), int(PER_SECOND * bench.seconds(10, 0.3))
        works = (client.work(ref, 8, 1) for ref in itertools.islice(itertools.cycle(others), count))
        traces = await client.open_loop(works, itertools.repeat(1 / PER_SECOND))
        end = time.perf_counter()
    finally:
        for reader in reading:
            reader.task.cancel()
        await asyncio.gather(*(reader.task for reader in reading), return_exceptions=True)
    gaps = [gap for reader in reading for gap in reader.trace.gaps(start, end)]
    cold = sum(trace.timing is not None and trace.timing.adapter_cold for trace in traces)
    return _Run(gaps, cold, end - start)


class _Reader:
    """A request that streams until it is cancelled."""

    def __init__(self, client: MachineClient, ref: AdapterRef, num_prompt_tokens: int, most: int) -> None:
        self.trace = Trace(num_prompt_tokens, time.perf_counter())
        self.has_begun = asyncio.Event()
        self.task = asyncio.create_task(self._read(client, ref, num_prompt_tokens, most))

    async def _read(self, client: MachineClient, ref: AdapterRef, num_prompt_tokens: int, most: int) -> None:
        try:
            async for progress in client.machine.submit(client.work(ref, num_prompt_tokens, most)):
                self.trace.take(progress, time.perf_counter())
                self.has_begun.set()
        finally:
            self.has_begun.set()
