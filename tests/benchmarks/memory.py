"""What things weigh: a slot by rank, a token in the KV rows, and the processes, at zero and under load."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator

import torch
from tests.benchmarks.adapters import GIB, make_adapters
from tests.benchmarks.bench import Bench
from tests.benchmarks.engines import EngineClient
from tests.benchmarks.figures import Figure, figure
from tests.benchmarks.machines import MachineClient, Shelf
from transformers import AutoConfig

from tunefleet.runtime.kv import bytes_per_token
from tunefleet.runtime.memory import pss_bytes

RANK = 8
RANK_CLASSES = (8, 16, 32, 64)
MB = 1_000_000


def measure(bench: Bench) -> Iterator[Figure]:
    client = EngineClient(bench, {})
    page_bytes = client.engine.banks.page_bytes
    for rank in RANK_CLASSES:
        yield figure(f"slot of rank {rank}", "MB", [page_bytes * rank / RANK_CLASSES[0] / MB])
    yield from _kv(bench, client)
    yield from asyncio.run(_processes(bench))


def _kv(bench: Bench, client: EngineClient) -> Iterator[Figure]:
    """What keys and values need, and what rows and prefixes take while sequences run."""
    dtype = getattr(torch, bench.manifest.dtype)
    needed = bytes_per_token(AutoConfig.from_pretrained(bench.base_dir), dtype)
    yield figure("token's keys and values", "bytes", [needed])
    length, num_tokens = bench.size(64, 8), bench.size(64, 8)
    prompts = bench.prompts(random.Random(0), bench.size(32, 2), length)
    traces = [client.ask(prompt, num_tokens) for prompt in prompts]
    client.step_while(lambda: not all(len(trace.times) > num_tokens // 2 for trace in traces))
    in_flight = sum(trace.num_prompt_tokens + len(trace.times) for trace in traces)
    taken = client.engine.kv.used_bytes / in_flight
    client.finish()
    yield figure(f"KV memory per token in flight, {len(prompts)} sequences", "bytes", [taken])


async def _processes(bench: Bench) -> list[Figure]:
    """Proportional set sizes: what is shared is split among those who share it."""
    num_users = bench.size(32, 2)
    made = make_adapters(bench, [RANK] * num_users, seed=7)
    shelf = Shelf(
        bench, "memory", idle_timeout_s=0.2, max_num_seqs=num_users, host_cache_bytes=bench.size(GIB, 2**24)
    )
    refs = shelf.put(made, num_users)
    async with shelf.serving() as client:
        num_tokens = bench.size(64, 4)
        works = [client.work(ref, num_tokens, num_tokens) for ref in refs]
        await client.closed_loop(works, num_users)
        busy = sum(pss_bytes(replica.pid) for replica in client.machine.replicas)
        figures = [figure(f"replica after {num_users} requests", "MB", [busy / MB])] if busy else []
        return [*figures, *await _at_zero(client)]


async def _at_zero(client: MachineClient) -> list[Figure]:
    while client.machine.replicas:
        await client.machine.changed()
    status = await client.machine.status()
    return [figure(f"at zero: {name} process", "MB", [size / MB]) for name, size in status.pss_bytes.items()]
