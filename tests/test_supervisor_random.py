"""Any history of requests, loads, ends and losses: never too many replicas, and zero in the end."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import host_kit
from host_kit import Host, Router, hosting
from tunefleet.core import ReplicaState
from tunefleet.runtime import backoff, supervisor
from tunefleet.runtime.fake_replicas import FakeReplica

LIVE = {ReplicaState.NEW, ReplicaState.STARTING, ReplicaState.READY}
NUM_STEPS = 150


class AnyHistory:
    """Does one thing after another to a host process; requests go where they are told."""

    def __init__(self, host: Host, router: Router, generator: random.Random) -> None:
        self.host = host
        self.router = router
        self.generator = generator
        self.waiting: set[str] = set()
        self.num_asked = 0

    async def step(self) -> None:
        steps: list[Callable[[], None]] = [
            *[self.wake] * 4,
            *[self.give_up] * 2,
            *[self.load] * 6,
            self.end_one,
            self.fail_next,
            self.lose_parked,
            self.hang,
            self.toggle_gate,
        ]
        self.generator.choice(steps)()
        if self.generator.random() < 0.1:
            await self.visit()
        if self.generator.random() < 0.3:
            await asyncio.sleep(self.generator.choice([0.0, 0.001, 0.02]))

    def wake(self) -> None:
        for _ in range(self.generator.choice([1, 1, 5])):
            self.num_asked += 1
            self.waiting.add(f"{self.num_asked}")
            self.router.wake(f"{self.num_asked}")

    def give_up(self) -> None:
        if self.waiting:
            request_id = self.generator.choice(sorted(self.waiting))
            self.waiting.discard(request_id)
            self.router.give_up(request_id)

    def load(self) -> None:
        for replica in self.ready():
            replica.load(self.generator.choice([0, 0, 1, 2, 4]))

    def end_one(self) -> None:
        alive = [replica for replica in self.host.starter.replicas if not replica.ended.is_set()]
        if alive:
            self.generator.choice(alive).end(self.generator.choice([0, 1, -signal.SIGKILL]))

    def fail_next(self) -> None:
        self.host.starter.exit_codes.append(self.generator.choice([1, -signal.SIGKILL]))

    def lose_parked(self) -> None:
        if self.host.starter.pid:
            self.host.starter.lose()

    def hang(self) -> None:
        for replica in self.ready()[:1]:
            replica.hangs = True

    def toggle_gate(self) -> None:
        gate = self.host.starter.gate
        if gate.is_set():
            gate.clear()
        else:
            gate.set()

    async def visit(self) -> None:
        """Another router comes, asks, and is gone without a word."""
        visitor = await self.host.router()
        visitor.wake("theirs")
        await asyncio.sleep(self.generator.choice([0.0, 0.01]))
        visitor.leave()

    def ready(self) -> list[FakeReplica]:
        ready = {item.replica_id for item in self.router.replicas if item.state is ReplicaState.READY}
        return [replica for replica in self.host.starter.replicas if replica.fork.replica_id in ready]

    async def rest(self) -> None:
        """Nobody wants anything any more: it comes to zero."""
        self.host.starter.gate.set()
        self.host.starter.exit_codes.clear()
        self.router.give_up(*self.waiting)
        async with asyncio.timeout(20):
            while (status := await self.router.status()).replicas or status.num_held:
                for replica in self.ready():
                    replica.load(0)
                await asyncio.sleep(0.01)


@pytest.mark.parametrize("seed", range(6))
def test_any_history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    generator = random.Random(seed)
    errors: list[dict[str, Any]] = []
    max_replicas = generator.randint(1, 4)

    async def scenario() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(context))
        options = {
            "max_replicas": max_replicas,
            "target_concurrency": 2,
            "idle_timeout_s": 0.02,
            "scale_down_delay_s": generator.choice([0.0, 0.02]),
            "standby_ttl_s": generator.choice([0.0, 0.02]),
            "drain_timeout_s": 0.02,
            "cold_start_timeout_s": generator.choice([0.05, 30.0]),
        }
        async with hosting(tmp_path, **options) as host:
            history = AnyHistory(host, await host.router(), generator)
            for _ in range(NUM_STEPS):
                await history.step()
                status = await history.router.status()
                assert sum(replica.state in LIVE for replica in status.replicas) <= max_replicas
            await history.rest()

    monkeypatch.setattr(host_kit, "DELAYS_S", (0.01, 0.02))
    monkeypatch.setattr(backoff, "DEATHS_WINDOW_S", 0.05)
    monkeypatch.setattr(supervisor, "LEAVE_S", 0.05)
    monkeypatch.setattr(supervisor, "HANDOVER_S", 0.02)
    monkeypatch.setattr(supervisor, "PARK_AGAIN_S", 0.05)
    asyncio.run(scenario())
    assert errors == []
