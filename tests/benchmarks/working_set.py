"""1,000 people's adapters against 32 that fit: each request is another person's, and finds no slot.

A machine as it serves (host process, real tiers, one replica), 32 clients, 64 tokens in and 64 out. From disk
means the disk tier's files, read, hashed, checked and prepared for each request, as the host tier holds too
few of them. Adapters have digests of their own; see ``adapters.shelve``.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.benchmarks.adapters import make_adapters
from tests.benchmarks.bench import Bench
from tests.benchmarks.figures import Bar, Figure, at_least, figure, ratios
from tests.benchmarks.machines import MachineClient, Shelf, share_cold
from tests.benchmarks.traces import Trace, tokens_per_s

from tunefleet.core import AdapterRef

RANK = 8
NUM_WAVES = 3  # requests per client
MAX_ROUNDS = 3


def measure(bench: Bench) -> Iterator[Figure]:
    num_slots = bench.size(32, 2)
    made = make_adapters(bench, [RANK] * num_slots, seed=2)
    small_cache = bench.size(256, 1) * 2**20  # a few dozen prepared adapters of 1,000
    yield from _from("host", bench, made, at_least(0.95), max_num_seqs=num_slots)
    yield from _from(
        "disk", bench, made, at_least(0.85), max_num_seqs=num_slots, host_cache_bytes=small_cache
    )


def _from(tier: str, bench: Bench, made: Sequence[Path], bar: Bar, **options: object) -> Iterator[Figure]:
    shelf = Shelf(bench, f"working-set-{tier}", **options)
    refs = shelf.put(made, bench.size(1000, 8 * len(made)))
    crowded, resident = asyncio.run(_rounds(bench, shelf, refs, len(made), is_in_host=tier == "host"))
    rates = [tokens_per_s(traces) for traces in crowded]
    references = [tokens_per_s(traces) for traces in resident]
    name = f"{len(refs):,} adapters from {tier}"
    yield figure(f"{len(made)} adapters that fit, in turn with {tier}", "tokens/s", references)
    yield figure(name, "tokens/s", rates)
    yield ratios(f"{name}, to {len(made)} that fit", rates, references, bar)
    yield figure(f"{name}: requests without slot", "%", (share_cold(traces) for traces in crowded))


async def _rounds(
    bench: Bench, shelf: Shelf, refs: Sequence[AdapterRef], num_slots: int, *, is_in_host: bool
) -> tuple[list[list[Trace]], list[list[Trace]]]:
    """Runs over all adapters, and runs over as many as fit, in turn."""
    fitting, others = refs[:num_slots], list(refs[num_slots:])
    random.Random(0).shuffle(others)
    turn = itertools.cycle(others)
    crowded: list[list[Trace]] = []
    resident: list[list[Trace]] = []
    async with shelf.serving() as client:
        await client.settle()
        if is_in_host:
            await client.bring_to_host(refs)
        for some in (fitting, others[-num_slots:]):
            await _run(bench, client, some, num_slots, num_waves=1)  # not counted
        for _ in range(min(bench.repeats, MAX_ROUNDS)):
            await client.touch(fitting)
            resident.append(await _run(bench, client, fitting, num_slots))
            next_ones = list(itertools.islice(turn, NUM_WAVES * num_slots))
            crowded.append(await _run(bench, client, next_ones, num_slots))
    return crowded, resident


async def _run(
    bench: Bench,
    client: MachineClient,
    refs: Sequence[AdapterRef],
    concurrency: int,
    num_waves: int = NUM_WAVES,
) -> list[Trace]:
    num_tokens = bench.size(64, 4)
    turn = itertools.islice(itertools.cycle(refs), num_waves * concurrency)
    return await client.closed_loop((client.work(ref, num_tokens, num_tokens) for ref in turn), concurrency)
