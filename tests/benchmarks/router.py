"""What the router adds to a request: everything but the engine's own time.

Clients in a process of their own stream from the HTTP API; behind it, instead of a machine, a dispatcher that
gives a token per step as a replica with 32 sequences would. Added is the time from a request's first byte to
its arrival at the dispatcher, and from the dispatcher's first token to the client.
"""

from __future__ import annotations

import asyncio
import collections
import json
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn
from tests.benchmarks.adapters import make_adapters
from tests.benchmarks.bench import Bench
from tests.benchmarks.figures import Figure, at_most, figure, percentile

from tunefleet.adapters_store.store import AdapterStore
from tunefleet.config import resolve
from tunefleet.fleet import Fleet, FleetParts
from tunefleet.messages import Progress, Submit
from tunefleet.runtime.fakes import FakeDispatcher, FakeRun
from tunefleet.text import Tokenizer

STEP_S = 0.05
NUM_TOKENS = 8
MAX_ROUNDS = 3


def measure(bench: Bench) -> Iterator[Figure]:
    num_users = bench.size(32, 2)
    dispatcher = PacedDispatcher(bench)
    fleet = asyncio.run(_fleet(bench, dispatcher, num_users))
    with _serving(fleet) as url:
        _stream(url, num_users, 2)  # not counted
        runs = []
        for _ in range(min(bench.repeats, MAX_ROUNDS)):
            dispatcher.runs.clear()
            runs.append(_added(_stream(url, num_users, bench.size(25, 3)), dispatcher))
    name = f"added to a request, {num_users} streams"
    for percent, limit in ((50, 2), (99, 10)):
        found = (1000 * percentile(added, percent) for added in runs)
        yield figure(f"{name}: p{percent}", "ms", found, bar=at_most(limit))


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
    """A token per step for everybody, all at the same time."""

    def __init__(self, bench: Bench) -> None:
        answer = Tokenizer(bench.base_dir).encode("w5 " * NUM_TOKENS)[:NUM_TOKENS]
        super().__init__(lambda work: answer)
        self.runs: dict[str, list[PacedRun]] = collections.defaultdict(list)  # by user

    async def step(self) -> None:
        await asyncio.sleep(STEP_S - time.monotonic() % STEP_S)

    def submit(self, work: Submit) -> PacedRun:
        run = PacedRun(self, work)
        assert work.user_id is not None
        self.runs[work.user_id].append(run)
        return run


def _added(streamed: dict[str, list[tuple[float, float]]], dispatcher: PacedDispatcher) -> list[float]:
    """Seconds per request."""
    return [
        run.submitted_at - sent + received - run.emitted_at
        for user_id, times in streamed.items()
        for (sent, received), run in zip(times, dispatcher.runs[user_id], strict=True)
    ]


def _stream(url: str, num_users: int, count: int) -> dict[str, list[tuple[float, float]]]:
    command = [sys.executable, str(Path(__file__).with_name("stream_client.py"))]
    done = subprocess.run(
        [*command, url, str(num_users), str(count)], check=True, capture_output=True, timeout=120
    )
    streamed: dict[str, list[tuple[float, float]]] = json.loads(done.stdout)
    return streamed


async def _fleet(bench: Bench, dispatcher: PacedDispatcher, num_users: int) -> Fleet:
    """With an adapter per user."""
    folder = bench.new_folder("router")
    keywords = {
        "cache_dir": str(folder / "cache"),
        "store_url": (folder / "store").as_uri(),
        "access_log": False,
    }
    options = resolve(keywords=keywords, environ={})
    (made,) = make_adapters(bench, [4], seed=10)
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
def _serving(fleet: Fleet) -> Iterator[str]:
    """The HTTP API on a free port, on a thread; its URL."""
    from tunefleet.auth import anyone
    from tunefleet.http.app import create_app

    app = create_app(fleet, anyone, with_lifespan=True)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", lifespan="on"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
