"""What the router adds to a request: everything but the engine's own time.

Clients in a process of their own stream from the HTTP API; behind it, instead of a machine, a dispatcher that
gives a token per step as a replica with 32 sequences would. *Added* is the time from a request's first byte
to its arrival at the dispatcher, and from the dispatcher's first token to the client.
"""

from __future__ import annotations

import asyncio
import collections
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import uvicorn
from tests.benchmarks.adapters import make_adapters
from tests.benchmarks.bench import Bench
from tests.benchmarks.figures import Figure, at_most, counted, figure, percentile

from tunefleet.adapters_store.store import AdapterStore
from tunefleet.config import resolve
from tunefleet.fleet import Fleet, FleetParts
from tunefleet.messages import Progress, Submit
from tunefleet.runtime.fakes import FakeDispatcher, FakeRun
from tunefleet.text import Tokenizer

STEP_S = 0.05
NUM_TOKENS = 8
MAX_TOKENS = 64
MAX_ROUNDS = 3
BARS = {50: at_most(2), 99: at_most(10)}  # milliseconds by percentile, at 32 streams

Streamed = dict[str, list[tuple[float, float]]]  # by user: when each request was sent and first answered

_numbers = itertools.count()


class Load(NamedTuple):
    """So many people, each of whom asks the next question when the last one is answered."""

    num_users: int
    num_requests: int  # of each
    num_tokens: int  # of each answer
    spread_s: float = 0.0  # time over which they begin; 0: they all ask at the same moment, again and again


def measure(bench: Bench) -> Iterator[Figure]:
    (made,) = make_adapters(bench, [4], seed=10)
    yield from _added(bench, made)
    yield from _most(bench, made)


def _added(bench: Bench, made: Path) -> Iterator[Figure]:
    """With more streams answers are longer, so that not more requests come in a second."""
    sizes = [(1, 50, NUM_TOKENS), (32, 25, NUM_TOKENS), (256, 4, MAX_TOKENS)]
    if bench.quick:
        sizes = [(num_users, 3, NUM_TOKENS) for num_users in (1, 2, 4)]
    loads = [Load(*size, spread_s=size[2] * STEP_S) for size in sizes]
    dispatcher = PacedDispatcher(bench, STEP_S)
    fleet = asyncio.run(_fleet(bench, dispatcher, made, max(load.num_users for load in loads)))
    with _serving(fleet) as url:
        _round(url, dispatcher, loads[1]._replace(num_requests=2))  # not counted
        for load in [*loads, loads[1]._replace(spread_s=0.0)]:
            runs = [_round(url, dispatcher, load) for _ in range(min(bench.repeats, MAX_ROUNDS))]
            how = "" if load.spread_s else " in step"
            name = f"added to a request, {counted(load.num_users, 'stream')}{how}"
            for percent, bar in BARS.items():
                found = (1000 * percentile(added, percent) for added in runs)
                yield figure(f"{name}: p{percent}", "ms", found, bar=bar if load is loads[1] else None)


def _most(bench: Bench, made: Path) -> Iterator[Figure]:
    """The router has a core for itself, and those who ask have another, where there are two."""
    load = Load(bench.size(32, 2), bench.size(60, 3), 1)
    cores = sorted(os.sched_getaffinity(0))
    dispatcher = PacedDispatcher(bench, 0.0)
    with _serving(asyncio.run(_fleet(bench, dispatcher, made, load.num_users)), cores[0]) as url:
        rates = [_rate(_stream(url, load, cores[-1])) for _ in range(min(bench.repeats, MAX_ROUNDS) + 1)]
    note = f"{counted(load.num_users, 'stream')} of one-token answers"
    yield figure("requests of one router on one core", "requests/s", rates[1:], note=note)


class PacedRun(FakeRun):
    """Notes when it was asked for and when its first token left."""

    def __init__(self, dispatcher: PacedDispatcher, work: Submit) -> None:
        super().__init__(dispatcher, work)
        self.submitted_at = time.monotonic()
        self.emitted_at = 0.0

    async def __aiter__(self) -> AsyncIterator[Progress]:
        async for progress in super().__aiter__():
            self.emitted_at = self.emitted_at or time.monotonic()
            yield progress


class PacedDispatcher(FakeDispatcher):
    """A token per step for everybody, all at the same time; at once, where a step takes no time.

    Attributes:
        num_tokens: of each answer from now on.
    """

    def __init__(self, bench: Bench, step_s: float) -> None:
        answer = Tokenizer(bench.base_dir).encode("w5 " * MAX_TOKENS)
        super().__init__(lambda work: answer[: self.num_tokens])
        self.num_tokens = 1
        self._step_s = step_s
        self.runs: dict[str, list[PacedRun]] = collections.defaultdict(list)  # by user

    async def step(self) -> None:
        await asyncio.sleep(self._step_s - time.monotonic() % self._step_s if self._step_s else 0)

    def submit(self, work: Submit) -> PacedRun:
        run = PacedRun(self, work)
        assert work.user_id is not None
        self.runs[work.user_id].append(run)
        return run


def _round(url: str, dispatcher: PacedDispatcher, load: Load) -> list[float]:
    """Seconds that were added to each request."""
    dispatcher.num_tokens = load.num_tokens
    dispatcher.runs.clear()
    return [
        run.submitted_at - sent + received - run.emitted_at
        for user_id, times in _stream(url, load).items()
        for (sent, received), run in zip(times, dispatcher.runs[user_id], strict=True)
    ]


def _rate(streamed: Streamed) -> float:
    """Requests per second, from the first to the end of the last."""
    times = [pair for pairs in streamed.values() for pair in pairs]
    return len(times) / (max(received for _, received in times) - min(sent for sent, _ in times))


def _stream(url: str, load: Load, core: int | None = None) -> Streamed:
    command = [sys.executable, str(Path(__file__).with_name("stream_client.py"))]
    command += [url, str(load.num_users), str(load.num_requests), str(load.spread_s)]
    command += [str(core)] if core is not None else []
    done = subprocess.run(command, check=True, capture_output=True, timeout=120)
    streamed: Streamed = json.loads(done.stdout)
    return streamed


async def _fleet(bench: Bench, dispatcher: PacedDispatcher, made: Path, num_users: int) -> Fleet:
    """With an adapter per user."""
    folder = bench.new_folder(f"router-{next(_numbers)}")
    keywords = {
        "cache_dir": str(folder / "cache"),
        "store_url": (folder / "store").as_uri(),
        "access_log": False,
    }
    options = resolve(keywords=keywords, environ={})
    store = AdapterStore.open(options, bench.manifest)
    for index in range(num_users):
        await store.push(f"user-{index}", made)
    await store.close()
    parts = FleetParts(
        manifest=bench.manifest,
        tokenizer=Tokenizer(bench.base_dir),
        store=AdapterStore.open(options, bench.manifest),
        dispatcher=dispatcher,
    )
    return Fleet.from_parts(parts, **keywords)


@contextmanager
def _serving(fleet: Fleet, core: int | None = None) -> Iterator[str]:
    """The HTTP API on a free port, on a thread, which a core may be named for; its URL."""
    from tunefleet.auth import anyone
    from tunefleet.http.app import create_app

    app = create_app(fleet, anyone, with_lifespan=True)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", lifespan="on"))

    def run() -> None:
        if core is not None:
            os.sched_setaffinity(0, {core})  # of this thread, and of those that it starts
        server.run()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
