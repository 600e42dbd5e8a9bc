"""How a host process ends, on real processes: what runs is finished, and nothing of it is left."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from engine_kit import Oracle, prepare_model, tiny_model
from lone_router import options_for
from machine_kit import LONG, PROMPT, answer, ask, router
from tunefleet.config import Options, runtime_dir, state_dir
from tunefleet.core import Manifest, ReplicaState
from tunefleet.runtime.machine import Machine


class World(NamedTuple):
    base: Path
    manifest: Manifest
    oracle: Oracle


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    base = tmp_path_factory.mktemp("world") / "base"
    model = tiny_model("llama")
    return World(base, prepare_model(model, base), Oracle(model, []))


class Processes(NamedTuple):
    """Of one host process: itself, its parked process and its replica."""

    host: psutil.Process
    parked: psutil.Process
    replica: psutil.Process

    @classmethod
    async def of(cls, machine: Machine) -> Processes:
        status = await machine.status()
        pids = status.pid, status.parked_pid, status.replicas[0].pid
        return cls(*map(psutil.Process, pids))

    def ended(self) -> bool:
        _, left = psutil.wait_procs(self, timeout=30)
        return not left


def sockets(options: Options, base: Path) -> Iterable[str]:
    return sorted(path.name for path in runtime_dir(state_dir(options, base)).glob("*.sock"))


def test_a_drained_host_process_loses_nothing_and_a_killed_one_leaves_nothing(
    world: World, tmp_path: Path
) -> None:
    options = options_for(tmp_path)

    async def scenario() -> None:
        async with router(world, options) as machine:
            await machine.warmup()
            first = await Processes.of(machine)
            running, late = await drained(machine, first)
            world.oracle.check(None, list(PROMPT), running)
            assert running == late
            assert await asyncio.to_thread(first.ended)
            second = await Processes.of(machine)
            assert sockets(options, world.base) == ["host.sock", f"r1-{second.host.pid}.sock"]
            second.host.kill()
        assert await asyncio.to_thread(second.ended)

    asyncio.run(scenario())


@pytest.mark.slow
def test_a_second_signal_ends_a_host_process_at_once_and_its_requests_go_on(
    world: World, tmp_path: Path
) -> None:
    options = options_for(tmp_path)

    async def scenario() -> None:
        async with router(world, options) as machine:
            whole = await answer(machine, ask("whole", LONG))
            processes = await Processes.of(machine)
            assert whole == await cut_off(machine, processes)
            assert await asyncio.to_thread(processes.ended)
            last = await Processes.of(machine)
            last.replica.suspend()  # it hears nothing any more
        assert await asyncio.to_thread(last.ended)
        assert sockets(options, world.base) == []

    asyncio.run(scenario())


@pytest.mark.slow
def test_at_zero_the_parked_process_ends_too_and_the_next_request_starts_it_again(
    world: World, tmp_path: Path
) -> None:
    options = options_for(tmp_path, idle_timeout_s=0.2, standby_ttl_s=0.2)

    async def scenario() -> None:
        async with router(world, options) as machine:
            await machine.warmup()
            _, *woken = await Processes.of(machine)
            _, left = await asyncio.to_thread(psutil.wait_procs, woken, 30)
            assert left == []
            assert (await machine.status()).pss_bytes["host"] > 0
            world.oracle.check(None, list(PROMPT), await answer(machine, ask("again", LONG)))

    asyncio.run(scenario())


async def drained(machine: Machine, processes: Processes) -> tuple[list[int], list[int]]:
    """At the first signal the running answer is finished where it is, and who comes then is held."""
    run = machine.submit(ask("running", LONG))
    tokens: list[int] = []
    late: asyncio.Task[list[int]] | None = None
    async for progress in run:
        tokens += progress.tokens
        if len(tokens) >= 20 and late is None:
            processes.host.terminate()
            while machine.replicas[0].state is not ReplicaState.DRAINING:
                await machine.changed()
            late = asyncio.create_task(answer(machine, ask("late", LONG)))
    assert late is not None
    assert run.replica_id == "r1"
    return tokens, await late


async def cut_off(machine: Machine, processes: Processes) -> list[int]:
    """At the second signal it ends at once; the answer goes on at the next one's replica."""
    tokens: list[int] = []
    is_sent = False
    async for progress in machine.submit(ask("cut off", LONG)):
        tokens += progress.tokens
        if len(tokens) >= 20 and not is_sent:
            is_sent = True
            processes.host.terminate()
            while machine.replicas[0].state is not ReplicaState.DRAINING:
                await machine.changed()
            processes.host.terminate()
    return tokens
