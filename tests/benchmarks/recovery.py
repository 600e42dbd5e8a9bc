"""kill -9 of a replica in mid-stream: how long its streams stand still before they go on elsewhere."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator

from tests.benchmarks.adapters import make_adapters
from tests.benchmarks.bench import Bench
from tests.benchmarks.figures import Figure, figure, percentile
from tests.benchmarks.machines import MachineClient, Shelf

from tunefleet.core import AdapterRef, ReplicaState
from tunefleet.runtime.machine import Machine
from tunefleet.runtime.streams import MachineRun

RANK = 8
NUM_STREAMS = 8
NUM_PROMPT_TOKENS = 64
NUM_TOKENS = 100  # never reached: a stream is closed once it goes on
TOKENS_BEFORE = 8  # of each stream, when the replica is killed


def measure(bench: Bench) -> Iterator[Figure]:
    """All streams are of one adapter, and so on one replica."""
    made = make_adapters(bench, [RANK], seed=11)
    for num_replicas, case in ((1, "the only replica"), (2, "one of two replicas")):
        shelf = Shelf(bench, f"recovery-{num_replicas}", min_replicas=num_replicas, max_replicas=num_replicas)
        (ref,) = shelf.put(made, 1)
        kills = asyncio.run(_kills(bench, shelf, ref, num_replicas))
        name = f"{case} killed, {NUM_STREAMS} streams: next token"
        yield figure(f"{name}, p50", "s", (percentile(gaps, 50) for gaps in kills))
        yield figure(f"{name}, last", "s", (max(gaps) for gaps in kills))


class Stream:
    """Follows one answer from a replica to the next one."""

    def __init__(self, run: MachineRun) -> None:
        self.run = run
        self.is_running = asyncio.Event()
        self.resumed_at = 0.0

    async def follow(self) -> None:
        """Until the first token of another replica than its first; what was on its way doesn't count."""
        num_tokens = 0
        first_replica = ""
        async for progress in self.run:
            first_replica = first_replica or self.run.replica_id
            num_tokens += len(progress.tokens)
            if num_tokens >= TOKENS_BEFORE:
                self.is_running.set()
            if self.run.replica_id != first_replica and progress.tokens:
                self.resumed_at = time.monotonic()
                break
        assert self.resumed_at, "the stream ended before its replica was killed"
        await self.run.aclose()


async def _kills(bench: Bench, shelf: Shelf, ref: AdapterRef, num_replicas: int) -> list[list[float]]:
    """Seconds per stream, for each kill."""
    async with shelf.serving() as client:
        kills = []
        for _ in range(bench.repeats):
            await _until_ready(client.machine, num_replicas)
            await client.touch([ref])
            kills.append(await _kill(client, ref))
    return kills


async def _kill(client: MachineClient, ref: AdapterRef) -> list[float]:
    machine = client.machine
    works = [client.work(ref, NUM_PROMPT_TOKENS, NUM_TOKENS) for _ in range(NUM_STREAMS)]
    streams = [Stream(machine.submit(work)) for work in works]
    async with asyncio.TaskGroup() as following:
        for stream in streams:
            following.create_task(stream.follow())
        await asyncio.gather(*(stream.is_running.wait() for stream in streams))
        (victim,) = {stream.run.replica_id for stream in streams}
        (pid,) = [replica.pid for replica in machine.replicas if replica.replica_id == victim]
        os.kill(pid, signal.SIGKILL)
        killed_at = time.monotonic()
    return [stream.resumed_at - killed_at for stream in streams]


async def _until_ready(machine: Machine, num_replicas: int) -> None:
    while sum(replica.state is ReplicaState.READY for replica in machine.replicas) < num_replicas:
        await machine.changed()
