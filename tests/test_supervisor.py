"""A host process's replicas: how many start, when, what of those that fail, and how all of them end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from pathlib import Path

import msgspec
import pytest

from host_kit import DELAYS_S, Host, Router, hosting
from tunefleet.core import ReplicaState
from tunefleet.messages import Drain, Fork
from tunefleet.runtime import supervisor
from tunefleet.runtime.fake_replicas import FakeReplica

NEW, STARTING = ReplicaState.NEW, ReplicaState.STARTING
READY, DRAINING = ReplicaState.READY, ReplicaState.DRAINING
SOON_S = 0.3  # long after what would happen at once


async def stays(event: asyncio.Event) -> bool:
    """Whether it isn't set for a while."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(SOON_S):
            await event.wait()
    return not event.is_set()


async def woken(host: Host, router: Router, num_requests: int = 1) -> list[FakeReplica]:
    """The READY replicas for so many requests, which they have answered."""
    router.wake(*(f"{number}" for number in range(num_requests)))
    num_replicas = min(-(-num_requests // host.options.target_concurrency), host.options.max_replicas)
    await router.until_states(*[READY] * num_replicas)
    replicas = host.starter.replicas[-num_replicas:]
    for replica in replicas:
        replica.load(1)
        replica.load(0)
    return replicas


@pytest.mark.parametrize("max_replicas", [1, 3])
def test_a_burst_at_zero_starts_the_replicas_it_needs_once(tmp_path: Path, max_replicas: int) -> None:
    async def scenario() -> None:
        async with hosting(tmp_path, max_replicas=max_replicas) as host:
            router = await host.router()
            host.starter.gate.clear()
            router.wake(*(f"{number}" for number in range(100)))
            await router.until_states(*[STARTING] * max_replicas)
            assert (await router.status()).num_held == 100
            host.starter.gate.set()
            await router.until_states(*[READY] * max_replicas)
            assert (await router.status()).num_held == 0
            assert max_replicas == len(host.ids())

    asyncio.run(scenario())


def test_two_routers_that_wake_at_once_share_one_start(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with hosting(tmp_path, max_replicas=3) as host:
            one, two = await host.router(), await host.router()
            one.wake("a")
            two.wake("b")
            assert await one.until_states(READY) == await two.until_states(READY) == host.ids()

    asyncio.run(scenario())


def test_a_request_that_comes_while_the_last_replica_leaves_gets_another_one(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with hosting(tmp_path, idle_timeout_s=0.1) as host:
            router = await host.router()
            (leaving,) = await woken(host, router)
            leaving.load(1)
            leaving.hangs = True
            leaving.load(0)
            await leaving.drained.wait()
            await router.until_states(DRAINING)
            router.wake("late")
            assert await router.until_states(DRAINING, READY) == ["r1", "r2"]
            leaving.end(0)
            assert await router.until_states(READY) == ["r2"]
            assert router.failed == {}

    asyncio.run(scenario())


def test_a_long_stream_is_no_idle_time(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with hosting(tmp_path, idle_timeout_s=0.1, scale_down_delay_s=0.1) as host:
            router = await host.router()
            (replica,) = await woken(host, router)
            replica.load(1)
            assert await stays(replica.drained)
            replica.load(0)
            await replica.ended.wait()
            await router.until_states()

    asyncio.run(scenario())


def test_a_replica_waits_for_those_who_were_held_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        async with hosting(tmp_path, idle_timeout_s=0.0) as host:
            router = await host.router()
            router.wake("a")
            await router.until_states(READY)
            (replica,) = host.starter.replicas
            assert await stays(replica.drained)  # they are on their way
            replica.load(1)
            replica.load(0)
            await replica.ended.wait()
            monkeypatch.setattr(supervisor, "HANDOVER_S", 0.1)
            router.wake("b")
            await router.until(lambda: len(host.ids()) == 2)
            await host.starter.replicas[1].ended.wait()  # they have gone elsewhere

    asyncio.run(scenario())


def test_min_replicas_stay_and_are_replaced(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with hosting(tmp_path, min_replicas=1, idle_timeout_s=0.1, scale_down_delay_s=0.1) as host:
            router = await host.router()
            assert await router.until_states(READY) == ["r1"]
            assert await stays(host.starter.replicas[0].drained)
            host.starter.replicas[0].end(-signal.SIGKILL)
            await router.until(lambda: [replica.replica_id for replica in router.replicas] == ["r2"])
            await router.until_states(READY)
            assert "SIGKILL" in (await router.status()).last_error

    asyncio.run(scenario())


def test_a_replica_that_is_not_needed_leaves_while_others_are_busy(tmp_path: Path) -> None:
    async def scenario() -> None:
        options = {"max_replicas": 3, "target_concurrency": 1, "scale_down_delay_s": 0.5}
        async with hosting(tmp_path, **options) as host:
            router = await host.router()
            first, second, third = await woken(host, router, 3)
            second.load(1)
            await third.ended.wait()  # of those that are idle, the newest first
            await first.ended.wait()
            assert await router.until_states(READY) == ["r2"]
            assert await stays(second.drained)

    asyncio.run(scenario())


def test_starts_that_fail_are_tried_again_with_longer_and_longer_waits(tmp_path: Path) -> None:
    """Nobody asks: there must be one."""

    async def scenario() -> None:
        async with hosting(tmp_path, min_replicas=1) as host:
            host.starter.exit_codes += [1, 1, 1]
            loop = asyncio.get_running_loop()
            started = loop.time()
            router = await host.router()
            assert await router.until_states(READY) == ["r4"]
            assert sum(DELAYS_S) <= loop.time() - started
            assert host.ids() == ["r1", "r2", "r3", "r4"]
            errors = [error.message for error in (await router.status()).errors]
            assert errors == [f"replica r{number}: ended with exit code 1" for number in (1, 2, 3)]

    asyncio.run(scenario())


def test_those_who_are_held_hear_at_once_why_no_replica_starts(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with hosting(tmp_path) as host:
            router = await host.router()
            host.starter.refusals += ["the disk is gone"]
            router.wake("a", "b")
            await router.until(lambda: len(router.failed) == 2)
            assert router.failed["a"].message == "replica r1: the disk is gone"
            assert router.failed["a"].retry_after_s == DELAYS_S[0]
            router.wake("too soon")
            await router.until(lambda: "too soon" in router.failed)
            assert host.ids() == []
            await asyncio.sleep(DELAYS_S[0])  # as a client does that is told to
            router.wake("again")
            assert await router.until_states(READY) == ["r2"]
            assert "again" not in router.failed

    asyncio.run(scenario())


def test_a_start_that_fails_leaves_those_alone_who_wait_for_another_one(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with hosting(tmp_path, max_replicas=2, target_concurrency=1) as host:
            router = await host.router()
            host.starter.gate.clear()
            host.starter.exit_codes += [1]
            router.wake("a", "b")
            await router.until(lambda: [replica.replica_id for replica in router.replicas] == ["r2"])
            host.starter.gate.set()
            await router.until_states(READY)
            assert router.failed == {}

    asyncio.run(scenario())


def test_a_start_that_is_killed_is_tried_once_more_for_those_who_wait(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with hosting(tmp_path) as host:
            router = await host.router()
            host.starter.exit_codes += [-signal.SIGKILL]
            router.wake("a")
            assert await router.until_states(READY) == ["r2"]
            assert router.failed == {}
            host.starter.exit_codes += [-signal.SIGKILL] * 2
            host.starter.replicas[-1].end(1)
            router.wake("b")
            await router.until(lambda: "b" in router.failed)
            assert router.failed["b"].message == "replica r4: ended by SIGKILL"

    asyncio.run(scenario())


def test_a_replica_that_dies_again_and_again_is_not_started_in_a_hot_loop(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with hosting(tmp_path, min_replicas=1) as host:
            router = await host.router()
            for number in range(1, 11):
                await router.until(lambda: [replica.state for replica in router.replicas] == [READY])
                assert number == len(host.ids())
                host.starter.replicas[-1].end(1)
                await host.starter.replicas[-1].ended.wait()
                await router.status()
            router.wake("held, not refused")
            assert await stays(asyncio.Event())
            assert len(host.ids()) == 10
            assert (await router.status()).num_held == 1
            assert router.failed == {}

    asyncio.run(scenario())


def test_a_replica_goes_where_the_fewest_are(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with hosting(tmp_path, devices=("cuda:0", "cuda:1"), min_replicas=2, max_replicas=2) as host:
            router = await host.router()
            await router.until_states(READY, READY)
            host.starter.replicas[1].end(1)
            await router.until(lambda: [replica.replica_id for replica in router.replicas] == ["r1", "r3"])
            await router.until_states(READY, READY)
            assert [replica.device for replica in router.replicas] == ["cuda:0", "cuda:1"]

    asyncio.run(scenario())


def test_an_accelerator_takes_a_replica_once_the_last_one_has_left_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with hosting(tmp_path, devices=("cuda:0",), idle_timeout_s=0.1) as host:
            router = await host.router()
            (leaving,) = await woken(host, router)
            leaving.hangs = True
            await router.until_states(DRAINING)
            router.wake("late")
            await router.until_states(DRAINING, NEW)
            assert await stays(asyncio.Event())
            assert host.ids() == ["r1"]
            leaving.end(0)
            assert await router.until_states(READY) == ["r2"]

    asyncio.run(scenario())


def test_requests_that_are_given_up_and_routers_that_leave_keep_nothing_awake(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with hosting(tmp_path, idle_timeout_s=0.1) as host:
            one, two = await host.router(), await host.router()
            host.starter.gate.clear()
            one.wake("a")
            one.give_up("a")
            two.wake("b")
            two.leave()
            await one.until_states(STARTING)
            host.starter.gate.set()
            await one.until_states(READY)
            await one.until_states()
            assert len(host.ids()) == 1

    asyncio.run(scenario())


def test_the_parked_process_is_dropped_at_zero_and_comes_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with hosting(tmp_path, idle_timeout_s=0.1, standby_ttl_s=0.2) as host:
            router = await host.router()
            await woken(host, router)
            assert host.starter.num_closed == 0
            await router.until_states()
            async with asyncio.timeout(5):
                while (await router.status()).parked_pid:
                    await asyncio.sleep(0.01)
            assert host.starter.num_closed == 1
            await woken(host, router)
            assert (await router.status()).parked_pid != 0

    asyncio.run(scenario())


def test_a_replica_whose_parked_process_is_gone_still_comes_to_an_end(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with hosting(tmp_path, idle_timeout_s=0.1) as host:
            router = await host.router()
            (replica,) = await woken(host, router)
            replica.load(1)
            host.starter.lose()
            async with asyncio.timeout(5):
                while not (
                    await router.status()
                ).parked_pid:  # another one, which knows nothing of the replica
                    await asyncio.sleep(0.01)
            replica.load(0)
            await router.until_states()

    asyncio.run(scenario())


def test_a_start_that_hangs_or_a_drain_that_does_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        options = {"cold_start_timeout_s": 0.5, "idle_timeout_s": 0.1, "drain_timeout_s": 0.1}
        async with hosting(tmp_path, **options) as host:
            router = await host.router()
            host.starter.gate.clear()
            router.wake("a")
            await router.until(lambda: "a" in router.failed)
            assert router.failed["a"].message == "replica r1: it was not ready after 0.5 s"
            host.starter.gate.set()
            await asyncio.sleep(router.failed["a"].retry_after_s)
            (replica,) = await woken(host, router)
            replica.hangs = True
            await router.until_states(DRAINING)
            await router.until_states()
            assert not replica.ended.is_set()

    monkeypatch.setattr(supervisor, "LEAVE_S", 0.1)
    asyncio.run(scenario())


def test_a_replica_of_an_earlier_host_process_is_sent_away(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with hosting(tmp_path) as host:
            router = await host.router()
            host.starter.gate.clear()
            router.wake("a")
            await router.until_states(STARTING)
            ours = host.starter.replicas[0]
            fork = Fork(
                replica_id="r1",
                device="cpu",
                address="/elsewhere",
                host_socket=ours.fork.host_socket,
                options=host.options,
            )
            theirs = FakeReplica(fork, lambda exit_code: None)
            await theirs.connect()
            theirs.ready()
            await theirs.ended.wait()
            host.starter.gate.set()
            await router.until_states(READY)
            assert ours.fork.address == router.replicas[0].address

    asyncio.run(scenario())


def test_a_leaving_host_process_lets_its_replicas_finish_and_starts_none(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with hosting(tmp_path, max_replicas=2, drain_timeout_s=20.0) as host:
            router = await host.router()
            (replica,) = await woken(host, router)
            replica.load(1)
            host.process.leave()
            await router.until_states(DRAINING)
            assert replica.drains == [Drain(timeout_s=20.0)]
            router.wake("for the next one")
            late = await host.router()
            await late.until_states(DRAINING)
            assert (await router.status()).num_held == 1
            replica.load(0)
            await asyncio.wait_for(host.running, 5)
            assert len(host.ids()) == 1
            assert router.failed == {}

    asyncio.run(scenario())


def test_a_router_with_other_options_comes_again_to_the_host_process_after_a_leaving_one(
    tmp_path: Path,
) -> None:
    async def scenario() -> None:
        async with hosting(tmp_path) as host:
            router = await host.router()
            (replica,) = await woken(host, router)
            replica.load(1)
            other_options = msgspec.structs.replace(host.options, max_queue=5)
            other = await host.router(other_options)
            await other.until(lambda: other.refused)
            host.process.leave()
            await router.until_states(DRAINING)
            later = await host.router(other_options)
            await later.until(lambda: later.is_lost)
            assert later.refused is None

    asyncio.run(scenario())


def test_a_second_signal_ends_it_at_once_and_leaves_no_sockets(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with hosting(tmp_path) as host:
            router = await host.router()
            (replica,) = await woken(host, router)
            Path(replica.fork.address).touch()  # as one does that is killed
            replica.load(1)
            host.process.leave()
            await router.until_states(DRAINING)
            host.process.leave()
            await asyncio.wait_for(host.running, 5)
            assert replica.drains[-1] == Drain(timeout_s=0.0)
            assert replica.ended.is_set()
            assert list(host.sockets()) == []

    asyncio.run(scenario())


def test_sockets_of_a_killed_host_process_are_cleared_away(tmp_path: Path) -> None:
    async def scenario() -> None:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "r7-1234.sock").touch()
        async with hosting(tmp_path) as host:
            assert [path.name for path in host.sockets()] == ["host.sock"]

    asyncio.run(scenario())


def test_an_idle_host_process_leaves_at_the_first_signal(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with hosting(tmp_path) as host:
            router = await host.router()
            await woken(host, router)
            host.process.leave()
            await asyncio.wait_for(host.running, 5)
            assert host.starter.replicas[0].ended.is_set()

    asyncio.run(scenario())
