"""Real processes: a host process, a parked process, replicas and routers, over a tiny base."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import psutil
import pytest
from anyio.from_thread import start_blocking_portal

from engine_kit import Adapter, Oracle, make_adapter, prepare_model, tiny_model
from lone_router import options_for
from machine_kit import LONG, PROMPT, answer, ask, router, said
from tunefleet.adapters_store.store import AdapterStore
from tunefleet.config import Options
from tunefleet.core import AdapterRef, FinishReason, Manifest
from tunefleet.errors import AdapterLoadFailed, CapacityError, ConfigError
from tunefleet.messages import Forgotten, HeldAdapter, Progress, Status
from tunefleet.runtime.machine import Machine


class World(NamedTuple):
    """A prepared tiny base and two adapters, ready to be stored."""

    base: Path
    manifest: Manifest
    adapter: Adapter
    other: Adapter
    oracle: Oracle


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    model = tiny_model("llama")
    manifest = prepare_model(model, root / "base")
    adapters = [
        make_adapter(
            model, manifest, root / f"a{seed}", seed, r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]
        )
        for seed in (3, 4)
    ]
    return World(root / "base", manifest, *adapters, Oracle(model, adapters))


class Machines(NamedTuple):
    """Folders of two machines that are up for the whole module; their parked processes start together."""

    shared: Path  # tests leave its host and parked process alone
    mortal: Path  # tests may kill them


@pytest.fixture(scope="module", autouse=True)
def machines(world: World, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machines]:
    folders = Machines(tmp_path_factory.mktemp("shared"), tmp_path_factory.mktemp("mortal"))
    with start_blocking_portal() as portal, contextlib.ExitStack() as stack:
        for root in folders:
            stack.enter_context(portal.wrap_async_context_manager(router(world, options_for(root))))
        yield folders


@pytest.fixture
def shared(machines: Machines) -> Path:
    return machines.shared


@pytest.fixture
def mortal(machines: Machines) -> Path:
    return machines.mortal


@pytest.fixture(scope="module")
def brief(tmp_path_factory: pytest.TempPathFactory) -> Options:
    """Of a machine of three replicas that is up while a test has a router, and a moment longer."""
    root = tmp_path_factory.mktemp("brief")
    return options_for(root, max_replicas=3, idle_timeout_s=0.3)


async def store_adapter(world: World, options: Options, user_id: str = "ana") -> AdapterRef:
    """Ana has one adapter, everybody else the other."""
    store = AdapterStore.open(options, world.manifest)
    try:
        await store.push(user_id, (world.adapter if user_id == "ana" else world.other).folder)
        return (await store.resolve(user_id)).ref
    finally:
        await store.close()


async def answer_in_the_end(machine: Machine) -> list[int]:
    """As a client does that is told to come again."""
    async with asyncio.timeout(30):
        while True:
            try:
                return await answer(machine, ask("again"))
            except CapacityError as error:
                await asyncio.sleep(error.retry_after_s)


async def until_there(machine: Machine, tiers: dict[str, str]) -> Status:
    """Asks until these digests are in their tiers."""
    async with asyncio.timeout(30):
        while True:
            status = await machine.status()
            found = {"disk": status.disk_tier, "host": status.host_tier}
            if all(digest in found[tier] for digest, tier in tiers.items()):
                return status
            await asyncio.sleep(0.01)


async def until(machine: Machine, condition: str) -> None:
    """Waits for the host process's news until it has ``zero`` or ``ready`` replicas, or they are ``idle``."""
    async with asyncio.timeout(60):
        while True:
            replicas = machine.replicas
            idle = bool(replicas) and not any(
                replica.num_running + replica.num_waiting for replica in replicas
            )
            if {"zero": not replicas, "ready": bool(replicas), "idle": idle}[condition]:
                return
            await machine.changed()


def test_a_replica_starts_on_the_first_request_stops_when_idle_and_starts_again(
    world: World, brief: Options
) -> None:
    async def scenario() -> None:
        async with router(world, brief) as machine:
            assert machine.replicas == ()
            first = machine.submit(ask("a"))
            tokens = [token async for progress in first for token in progress.tokens]
            assert first.cold_base
            assert first.wake_s > 0
            world.oracle.check(None, list(PROMPT), tokens)
            pid = machine.replicas[0].pid
            await until(machine, "zero")
            assert not psutil.pid_exists(pid)
            again = machine.submit(ask("b"))
            assert tokens == [token async for progress in again for token in progress.tokens]
            assert again.cold_base
            status = await machine.status()
            assert status.pss_bytes.keys() == {"host", "parked"}
            assert status.replicas[0].pid != pid

    asyncio.run(scenario())


def test_a_burst_at_zero_starts_the_replicas_that_it_needs_once_and_spreads(
    world: World, brief: Options
) -> None:
    async def scenario() -> None:
        async with router(world, brief) as machine:
            await until(machine, "zero")
            started: set[int] = set()

            async def note() -> None:
                while True:
                    await machine.changed()
                    started.update(replica.pid for replica in machine.replicas if replica.pid)

            noting = asyncio.create_task(note())
            runs = [machine.submit(ask(f"{number}", 100)) for number in range(96)]
            answers = await asyncio.gather(*(said(run) for run in runs))
            noting.cancel()
            assert len(started) == 3
            assert min(Counter(run.replica_id for run in runs).values()) >= 16
            assert len({tuple(tokens) for tokens in answers}) == 1
            world.oracle.check(None, list(PROMPT), answers[0])

    asyncio.run(scenario())


def test_nothing_is_left_when_the_last_router_has_gone(world: World, brief: Options) -> None:
    async def scenario() -> set[int]:
        async with router(world, brief) as machine:
            await machine.warmup()
            status = await machine.status()
            return {status.pid, status.parked_pid, status.replicas[0].pid}

    pids = asyncio.run(scenario())
    alive = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    _, left = psutil.wait_procs(alive, timeout=30)
    assert left == []


def test_an_adapter_comes_from_the_store_and_changes_the_answer(world: World, shared: Path) -> None:
    async def scenario() -> None:
        options = options_for(shared)
        ref = await store_adapter(world, options)
        async with router(world, options) as machine:
            base, mine, again = await asyncio.gather(
                answer(machine, ask("a")),
                answer(machine, ask("b", adapter=ref)),
                answer(machine, ask("c", adapter=ref)),
            )
            world.oracle.check(None, list(PROMPT), base)
            world.oracle.check(ref.digest, list(PROMPT), mine)
            assert mine == again != base
            status = await machine.status()
            assert ref.digest in status.host_tier
            assert ref.size_bytes == status.disk_tier[ref.digest]

    asyncio.run(scenario())


def test_a_forgotten_adapter_is_nowhere_once_nobody_uses_it_and_may_come_back(
    world: World, shared: Path
) -> None:
    async def scenario() -> None:
        options = options_for(shared)
        ref = await store_adapter(world, options)
        async with router(world, options) as machine:
            run = machine.submit(ask("running", 60, ref))
            tokens: list[int] = []
            async for progress in run:
                tokens += progress.tokens
                if len(tokens) == 20:
                    forgetting = asyncio.create_task(machine.forget(ref.digest))
            assert Forgotten(digest=ref.digest, disk=1, host=1, device=1) == await forgetting
            world.oracle.check(ref.digest, list(PROMPT), tokens)
            status = await machine.status()
            assert ref.digest not in status.host_tier.keys() | status.disk_tier.keys()
            assert Forgotten(digest=ref.digest) == await machine.forget(ref.digest)
            assert tokens == await answer(machine, ask("again", 60, ref))

    asyncio.run(scenario())


def test_one_users_lost_objects_fail_nobody_else_with_the_same_adapter(world: World, shared: Path) -> None:
    async def scenario() -> None:
        options = options_for(shared)
        ref = await store_adapter(world, options)
        lost = msgspec.structs.replace(ref, key=f"{ref.key}0")
        async with router(world, options) as machine:
            await machine.forget(ref.digest)
            answers = await asyncio.gather(
                *(answer(machine, ask(f"{number}", adapter=each)) for number, each in enumerate((lost, ref))),
                return_exceptions=True,
            )
            assert isinstance(answers[1], list)
            world.oracle.check(ref.digest, list(PROMPT), answers[1])
            if isinstance(answers[0], BaseException):  # it may have been there by then: the same bytes
                assert isinstance(answers[0], AdapterLoadFailed)
                assert answers[0].code == "adapter_lost"

    asyncio.run(scenario())


def test_a_held_or_prefetched_adapter_is_there_before_it_is_asked_for(world: World, shared: Path) -> None:
    async def scenario() -> None:
        options = options_for(shared)
        mine, theirs = await store_adapter(world, options), await store_adapter(world, options, "ben")
        async with router(world, options) as machine:
            for ref in (mine, theirs):
                await machine.forget(ref.digest)
            machine.hold([HeldAdapter(mine, "host")])
            await machine.prefetch(theirs, "disk")
            status = await until_there(machine, {mine.digest: "host", theirs.digest: "disk"})
            assert theirs.digest not in status.host_tier

    asyncio.run(scenario())


def test_a_wrong_byte_in_the_store_hurts_only_its_own_user(world: World, shared: Path) -> None:
    async def scenario() -> None:
        options = options_for(shared)
        ref = await store_adapter(world, options, "eve")
        weights = shared / "store" / "objects" / ref.key / "adapter_model.safetensors"
        weights.chmod(0o600)
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
        async with router(world, options) as machine:
            good = asyncio.create_task(answer(machine, ask("good", LONG)))
            await machine.forget(ref.digest)
            with pytest.raises(AdapterLoadFailed, match="not what was uploaded"):
                await answer(machine, ask("bad", adapter=ref))
            world.oracle.check(None, list(PROMPT), await good)

    asyncio.run(scenario())


def test_routers_share_one_host_process_and_one_replica(world: World, shared: Path) -> None:
    async def scenario() -> None:
        options = options_for(shared)
        async with router(world, options) as one, router(world, options) as two:
            tokens = await asyncio.gather(*(answer(machine, ask(f"{id(machine)}")) for machine in (one, two)))
            assert tokens[0] == tokens[1]
            statuses = await asyncio.gather(one.status(), two.status())
            assert statuses[0].pid == statuses[1].pid
            assert len(statuses[0].replicas) == 1
            with pytest.raises(ConfigError, match="idle_timeout_s"):
                async with router(world, options_for(shared, idle_timeout_s=61.0)):
                    pass

    asyncio.run(scenario())


def test_a_closed_stream_frees_its_sequence_and_leaves_others_whole(world: World, shared: Path) -> None:
    async def scenario() -> None:
        async with router(world, options_for(shared)) as machine:
            other = asyncio.create_task(answer(machine, ask("other", 100)))
            run = machine.submit(ask("closed", LONG))
            async for _ in run:
                break
            await run.aclose()
            world.oracle.check(None, list(PROMPT), await other)
            await until(machine, "idle")
            assert len(machine.replicas) == 1

    asyncio.run(scenario())


def test_a_killed_replica_loses_no_token(world: World, shared: Path) -> None:
    async def scenario() -> None:
        options = options_for(shared)
        ref = await store_adapter(world, options)
        async with router(world, options) as machine:
            whole = await answer(machine, ask("whole", LONG, ref))
            run = machine.submit(ask("killed", LONG, ref))
            tokens: list[int] = []
            killed = ""
            reasons: list[FinishReason | None] = []
            async for progress in run:
                assert isinstance(progress, Progress)
                tokens += progress.tokens
                reasons.append(progress.finish_reason)
                if len(tokens) == 20:
                    killed = run.replica_id
                    os.kill(machine.replicas[0].pid, signal.SIGKILL)
            assert run.replica_id != killed != ""
            assert reasons[-1] is FinishReason.LENGTH
            assert tokens == whole
            async with asyncio.timeout(30):
                while "SIGKILL" not in (await machine.status()).last_error:
                    await machine.changed()

    asyncio.run(scenario())


def test_a_killed_host_process_comes_back_and_requests_are_held_meanwhile(world: World, mortal: Path) -> None:
    async def scenario() -> None:
        options = options_for(mortal)
        ref = await store_adapter(world, options)
        async with router(world, options) as machine:
            machine.hold([HeldAdapter(ref, "host")])
            whole = await answer(machine, ask("whole", LONG))
            pid = (await machine.status()).pid
            run = machine.submit(ask("held", LONG))
            tokens = []
            async for progress in run:
                tokens += progress.tokens
                if len(tokens) == 20:
                    os.kill(pid, signal.SIGKILL)
            assert tokens == whole
            assert (await until_there(machine, {ref.digest: "host"})).pid != pid  # held again

    asyncio.run(scenario())


def test_a_killed_parked_process_comes_back(world: World, mortal: Path) -> None:
    async def scenario() -> None:
        async with router(world, options_for(mortal)) as machine:
            before = await answer(machine, ask("a"))
            status = await machine.status()
            os.kill(status.parked_pid, signal.SIGKILL)
            os.kill(status.replicas[0].pid, signal.SIGKILL)
            assert await answer(machine, ask("b")) == before
            assert (await machine.status()).parked_pid not in (0, status.parked_pid)

    asyncio.run(scenario())


def test_a_start_that_hangs_is_given_up_and_the_next_one_serves(world: World, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with router(world, options_for(tmp_path, cold_start_timeout_s=1.0)) as machine:
            async with asyncio.timeout(30):
                while not (parked_pid := (await machine.status()).parked_pid):
                    await asyncio.sleep(0.01)
            os.kill(parked_pid, signal.SIGSTOP)
            try:
                with pytest.raises(CapacityError):
                    await answer(machine, ask("held"))
                async with asyncio.timeout(30):
                    while "not ready after 1 s" not in (await machine.status()).last_error:
                        await asyncio.sleep(0.01)
            finally:
                os.kill(parked_pid, signal.SIGCONT)
            world.oracle.check(None, list(PROMPT), await answer_in_the_end(machine))

    asyncio.run(scenario())


def test_a_killed_router_takes_nothing_with_it(world: World, shared: Path) -> None:
    """A second router in a process of its own is killed while both stream."""

    async def scenario() -> None:
        options = options_for(shared)
        async with router(world, options) as machine:
            await machine.warmup()
            program = Path(__file__).with_name("lone_router.py")
            command = [sys.executable, str(program), str(shared), str(world.base)]
            with subprocess.Popen(command, stdout=subprocess.PIPE) as theirs:
                assert theirs.stdout is not None
                await asyncio.to_thread(theirs.stdout.readline)
                run = asyncio.create_task(answer(machine, ask("ours", LONG)))
                theirs.kill()
            world.oracle.check(None, list(PROMPT), await run)
            await until(machine, "idle")
            assert len((await machine.status()).replicas) == 1

    asyncio.run(scenario())


def test_a_base_that_can_not_be_loaded_is_an_error_with_its_reason(world: World, tmp_path: Path) -> None:
    async def scenario() -> None:
        broken = tmp_path / "broken"
        broken.mkdir()
        for file in world.base.iterdir():
            content = file.read_bytes()
            (broken / file.name).write_bytes(content[:-100] if file.suffix == ".safetensors" else content)
        machine = Machine(options_for(tmp_path), world.manifest, broken)
        await machine.start()
        try:
            with pytest.raises(CapacityError, match=r"could be started.*base prepare") as caught:
                await answer(machine, ask("a"))
            assert caught.value.retry_after_s > 0
        finally:
            await machine.close()

    asyncio.run(scenario())


def test_a_kv_budget_below_one_sequence_is_refused_at_the_start(world: World, tmp_path: Path) -> None:
    manifest = msgspec.structs.replace(world.manifest, kv_bytes_per_token=10_000)
    options = options_for(tmp_path, kv_cache_bytes=1 << 20)
    with pytest.raises(ConfigError, match="at least 3840000 for one sequence of 256 tokens") as refusal:
        Machine(options, manifest, world.base)
    assert refusal.value.param == "kv_cache_bytes"
