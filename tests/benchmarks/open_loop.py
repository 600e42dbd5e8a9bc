"""Twice as many people as slots, who come when they come: how long until the first token?

Poisson arrivals at half of what the machine answers when all is in slots. The same arrivals, once of as many
people as there are slots, once of twice as many, who find a slot every other time.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator, Sequence

from tests.benchmarks.adapters import make_adapters
from tests.benchmarks.bench import Bench
from tests.benchmarks.figures import Figure, at_most, figure, percentile, ratios
from tests.benchmarks.machines import MachineClient, Shelf, share_cold
from tests.benchmarks.traces import Trace

from tunefleet.core import AdapterRef
from tunefleet.messages import Submit

RANK = 8
MAX_ROUNDS = 3


def measure(bench: Bench) -> Iterator[Figure]:
    num_slots = bench.size(32, 2)
    made = make_adapters(bench, [RANK] * num_slots, seed=4)
    shelf = Shelf(bench, "open-loop", max_num_seqs=num_slots)
    refs = shelf.put(made, 2 * num_slots)
    capacity, crowded, resident = asyncio.run(_rounds(bench, shelf, refs, num_slots))
    yield figure("capacity, all in slots", "requests/s", [capacity])
    for percent in (50, 99):
        for name, runs in (("resident", resident), ("twice the slots", crowded)):
            found = (1000 * _ttft(traces, percent) for traces in runs)
            yield figure(f"TTFT p{percent}, {name}", "ms", found)
    yield figure("twice the slots: requests without slot", "%", (share_cold(traces) for traces in crowded))
    waits, references = ([_ttft(traces, 50) for traces in runs] for runs in (crowded, resident))
    yield ratios("median TTFT, twice the slots to resident", waits, references, at_most(3))


async def _rounds(
    bench: Bench, shelf: Shelf, refs: Sequence[AdapterRef], num_slots: int
) -> tuple[float, list[list[Trace]], list[list[Trace]]]:
    resident: list[list[Trace]] = []
    crowded: list[list[Trace]] = []
    async with shelf.serving() as client:
        await client.settle()
        await client.bring_to_host(refs)
        await _capacity(bench, client, refs[:num_slots])  # not counted
        capacity = await _capacity(bench, client, refs[:num_slots])
        for seed in range(min(bench.repeats, MAX_ROUNDS)):
            await client.touch(refs[:num_slots])
            resident.append(await _arrivals(bench, client, refs[:num_slots], capacity / 2, seed))
            crowded.append(await _arrivals(bench, client, refs, capacity / 2, seed))
    return capacity, crowded, resident


async def _capacity(bench: Bench, client: MachineClient, refs: Sequence[AdapterRef]) -> float:
    """Requests/s when there is always one that waits."""
    works = [_work(bench, client, ref) for _ in range(2) for ref in refs]
    started = time.perf_counter()
    await client.closed_loop(works, len(refs))
    return len(works) / (time.perf_counter() - started)


async def _arrivals(
    bench: Bench, client: MachineClient, refs: Sequence[AdapterRef], rate: float, seed: int
) -> list[Trace]:
    generator = random.Random(seed)
    count = max(bench.size(20, 4), int(rate * bench.seconds(20, 0.5)))
    waits = [generator.expovariate(rate) for _ in range(count)]
    return await client.open_loop((_work(bench, client, generator.choice(refs)) for _ in waits), waits)


def _work(bench: Bench, client: MachineClient, ref: AdapterRef) -> Submit:
    return client.work(ref, bench.size(64, 4), bench.size(32, 4))


def _ttft(traces: Sequence[Trace], percent: float) -> float:
    return percentile((trace.ttft for trace in traces), percent)
