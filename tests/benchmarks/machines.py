"""A machine as it serves: host process, forked replica and real tiers, asked over its sockets."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from pathlib import Path

from tests.benchmarks.adapters import GIB, shelve
from tests.benchmarks.bench import Bench, greedy
from tests.benchmarks.traces import Trace

from tunefleet.config import Options, resolve, state_dir
from tunefleet.core import AdapterRef
from tunefleet.messages import Submit
from tunefleet.runtime.machine import Machine

SETTLE_S = 15

_ids = itertools.count()


class Shelf:
    """The folders of a machine that isn't up yet, and the adapters on its disk."""

    def __init__(self, bench: Bench, name: str, **options: object) -> None:
        folder = bench.new_folder(name)
        keywords: dict[str, object] = {
            "cache_dir": str(folder / "cache"),
            "store_url": (folder / "store").as_uri(),
            "devices": "cpu",
            "idle_timeout_s": 3600.0,
            "threads_per_replica": bench.size(0, 1),
            "host_cache_bytes": 8 * GIB,
            "disk_cache_bytes": 16 * GIB,
        }
        self.options: Options = resolve(keywords={**keywords, **options}, environ={})
        self._bench = bench

    def put(self, made: Sequence[Path], count: int) -> list[AdapterRef]:
        return shelve(made, state_dir(self.options, self._bench.base_dir) / "adapters", count)

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[MachineClient]:
        machine = Machine(self.options, self._bench.manifest, self._bench.base_dir)
        await machine.start()
        try:
            await machine.warmup()
            yield MachineClient(self._bench, machine)
        finally:
            await leave(machine)


class MachineClient:
    """Asks one machine; each request brings a prompt of its own."""

    def __init__(self, bench: Bench, machine: Machine) -> None:
        self.machine = machine
        self._bench = bench
        self._generator = random.Random(0)

    def work(self, adapter: AdapterRef | None, num_prompt_tokens: int, num_tokens: int) -> Submit:
        number = next(_ids)
        return Submit(
            request_id=f"bench-{number}",
            prompt=self._bench.prompts(self._generator, 1, num_prompt_tokens)[0],
            sampling=greedy(num_tokens),
            adapter=adapter,
            user_id=f"user-{adapter.digest if adapter else number}",
        )

    async def ask(self, work: Submit, trace: Trace | None = None) -> Trace:
        """The whole answer; ``trace`` is filled as it comes."""
        trace = trace or Trace(len(work.prompt), time.perf_counter())
        async for progress in self.machine.submit(work):
            trace.take(progress, time.perf_counter())
        return trace

    async def closed_loop(self, works: Iterable[Submit], concurrency: int) -> list[Trace]:
        """So many clients, each of which asks the next request when its last one is answered."""
        queue = iter(works)
        return [
            trace
            for traces in await asyncio.gather(*(self._client(queue) for _ in range(concurrency)))
            for trace in traces
        ]

    async def open_loop(self, works: Iterable[Submit], waits: Iterable[float]) -> list[Trace]:
        """Requests that come when they come: ``waits`` are the seconds before each."""
        tasks = []
        due = time.perf_counter()
        for work, wait in zip(works, waits, strict=False):
            due += wait
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(self.ask(work, Trace(len(work.prompt), due))))
        return await asyncio.gather(*tasks)

    async def settle(self) -> None:
        """Lets the replica finish what it does for its speed after a first token, while it is idle."""
        await self.ask(self.work(None, 8, 8))
        await asyncio.sleep(self._bench.seconds(SETTLE_S, 0))

    async def bring_to_host(self, refs: Sequence[AdapterRef]) -> None:
        """Returns when all are in the host tier."""
        for ref in refs:
            await self.machine.prefetch(ref, "host")
        wanted = {ref.digest for ref in refs}
        async with asyncio.timeout(600):  # what doesn't fit is only logged by the host process
            while not wanted <= (await self.machine.status()).host_tier.keys():
                await asyncio.sleep(0.1)

    async def touch(self, refs: Sequence[AdapterRef]) -> None:
        """One token from each: afterwards all of them that fit are in slots."""
        await self.closed_loop((self.work(ref, 4, 1) for ref in refs), len(refs))

    async def _client(self, works: Iterator[Submit]) -> list[Trace]:
        return [await self.ask(work) for work in works]


async def leave(machine: Machine) -> None:
    """Closes it, and returns when its host process is gone: the next one has the cores alone."""
    pid = (await machine.status()).pid
    await machine.close()
    while _is_alive(pid):
        await asyncio.sleep(0.05)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def share_cold(traces: Sequence[Trace]) -> float:
    """Percent of requests whose adapter was in no slot when they came."""
    cold = [trace.timing is not None and trace.timing.adapter_cold for trace in traces]
    return 100 * sum(cold) / len(cold)
