"""Zero to first token, by stage: by fork from the parked process, against a fresh process."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence

from tests.benchmarks.adapters import make_adapters
from tests.benchmarks.bench import Bench, greedy
from tests.benchmarks.figures import Figure, at_least, at_most, figure, percentile
from tests.benchmarks.machines import Shelf, leave

from tunefleet.core import AdapterRef
from tunefleet.messages import Submit, Timing
from tunefleet.runtime.machine import Machine

RANK = 8
IDLE_TIMEOUT_S = 0.2
FIRST_TOKEN = "first token"

Stages = dict[str, float]  # seconds


def measure(bench: Bench) -> Iterator[Figure]:
    """The base's weights in the page cache, each request's adapter on disk."""
    made = make_adapters(bench, [RANK], seed=8)
    num_fresh = max(1, bench.repeats // 2)
    shelves = [Shelf(bench, f"fresh-{n}", idle_timeout_s=IDLE_TIMEOUT_S) for n in range(num_fresh)]
    fresh = [asyncio.run(_fresh(bench, shelf, shelf.put(made, 1)[0])) for shelf in shelves]
    shelf = Shelf(bench, "waking", idle_timeout_s=IDLE_TIMEOUT_S)
    forked = asyncio.run(_forked(bench, shelf, shelf.put(made, bench.size(20, 1) + 1)))
    yield from _by_stage("fresh process", fresh)
    yield from _by_stage("by fork", forked)
    yield figure("fresh process to first token", "s", _of(fresh, FIRST_TOKEN))
    by_fork = figure("zero to first token, by fork: p50", "s", _of(forked, FIRST_TOKEN), bar=at_most(0.35))
    yield by_fork
    yield figure("zero to first token, by fork: p95", "s", [percentile(by_fork.values, 95)])
    speedup = figure("fresh process", "s", _of(fresh, FIRST_TOKEN)).median / by_fork.median
    yield figure("fresh process to fork", "x", [speedup], bar=at_least(10))


async def _fresh(bench: Bench, shelf: Shelf, ref: AdapterRef) -> Stages:
    """No host process, no parked process: all is imported and mapped on this request."""
    machine = Machine(shelf.options, bench.manifest, bench.base_dir)
    started = time.monotonic()
    await machine.start()
    joined = time.monotonic()
    stages = await _first_token(bench, machine, ref)
    await leave(machine)
    return {"host process": joined - started, **stages, FIRST_TOKEN: stages[FIRST_TOKEN] + joined - started}


async def _forked(bench: Bench, shelf: Shelf, refs: list[AdapterRef]) -> list[Stages]:
    found = []
    async with shelf.serving() as client:
        for ref in refs:
            while client.machine.replicas:
                await client.machine.changed()
            found.append(await _first_token(bench, client.machine, ref))
    return found[1:]


async def _first_token(bench: Bench, machine: Machine, ref: AdapterRef) -> Stages:
    """Seconds of each stage, and from the request to its token.

    The adapter is fetched beside other work: the rest, which no stage has measured, may be below zero.
    """
    lowest = bench.manifest.vocab_size // 4
    prompt = tuple(range(lowest, lowest + 64))
    started = time.monotonic()
    run = machine.submit(Submit(request_id=ref.digest, prompt=prompt, sampling=greedy(1), adapter=ref))
    stages: Stages = {}
    async for progress in run:
        if progress.timing is not None:
            seconds = time.monotonic() - started
            parts = {"wake": run.wake_s, **_request(progress.timing)}
            parts["the rest"] = seconds - sum(parts.values())
            stages = {**_start(machine, run.replica_id), **parts, FIRST_TOKEN: seconds}
    return stages


def _start(machine: Machine, replica_id: str) -> Stages:
    """A replica's own start; what isn't in its process is the parked one's start, if any, and connecting."""
    (replica,) = [replica for replica in machine.replicas if replica.replica_id == replica_id]
    fork, engine, whole = (replica.stages[name] for name in ("fork", "engine", "start"))
    return {"fork": fork, "engine": engine, "park, connect": whole - fork - engine}


def _request(timing: Timing) -> Stages:
    """As the replica measured it."""
    names = ("queue", "download", "load", "activate", "prefill")
    return {name: getattr(timing, f"{name}_s") for name in names}


def _by_stage(name: str, found: Sequence[Stages]) -> Iterator[Figure]:
    for stage in found[0]:
        values = _of(found, stage)
        if stage != FIRST_TOKEN:
            yield figure(f"{name}: {stage}", "s", values, note=f"p95 {percentile(values, 95):.3f}")


def _of(found: Sequence[Stages], stage: str) -> list[float]:
    return [stages[stage] for stages in found]
