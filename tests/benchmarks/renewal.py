"""A new version: from the acknowledged upload to its first token, replica READY, S3 on loopback."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.benchmarks.adapters import make_adapters
from tests.benchmarks.bench import Bench
from tests.benchmarks.figures import Figure, at_most, figure
from tests.benchmarks.machines import Shelf
from tests.benchmarks.store import s3

from tunefleet.adapters_store.store import AdapterStore

RANK = 8  # 5 MB in bf16


def measure(bench: Bench) -> Iterator[Figure]:
    made = make_adapters(bench, [RANK] * (bench.repeats + 1), seed=9)
    with s3() as server:
        shelf = Shelf(
            bench,
            "renewal",
            store_url=server.url(server.make_bucket()),
            database_url=f"sqlite:///{bench.folder}/renewal.db",
        )
        seconds = asyncio.run(_renewals(bench, shelf, made))
    yield figure("upload acknowledged to first token", "s", seconds[1:], bar=at_most(0.5))


async def _renewals(bench: Bench, shelf: Shelf, made: Sequence[Path]) -> list[float]:
    store = AdapterStore.open(shelf.options, bench.manifest)
    seconds = []
    try:
        async with shelf.serving() as client:
            for folder in made:
                await store.push("alice", folder)
                started = time.perf_counter()
                resolved = await store.resolve("alice")
                await client.ask(client.work(resolved.ref, bench.size(64, 4), 1))
                seconds.append(time.perf_counter() - started)
    finally:
        await store.close()
    return seconds
