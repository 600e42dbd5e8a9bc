"""What every implementation of ``runtime.host_link.HostLink`` must do, whoever places its host processes.

Write a ``HostUnderTest`` for yours and call ``check_...`` with it, as ``test_host_conformance`` does; each
case begins and ends at zero replicas.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Protocol

import pytest

from tunefleet.core import AdapterRef, ReplicaInfo, ReplicaState
from tunefleet.errors import CapacityError
from tunefleet.messages import Forgotten, HeldAdapter
from tunefleet.runtime.host_link import HostLink

TIMEOUT_S = 60
READY = ReplicaState.READY


class HostUnderTest(Protocol):
    """A host process for up to one replica, which stops once nobody asked for it for a moment."""

    adapter: AdapterRef  # there to be held

    def link(self) -> HostLink:
        """One more router's, not joined yet."""
        ...

    def broken_link(self) -> HostLink:
        """To another host process, whose replicas can't start."""
        ...

    async def lose(self, replica: ReplicaInfo) -> None:
        """Kills a replica."""
        ...

    async def restart(self) -> None:
        """Kills the host process."""
        ...


class Router:
    """A link and all that its watcher was told."""

    def __init__(self, link: HostLink) -> None:
        self.link = link
        self.told: list[tuple[ReplicaInfo, ...]] = []
        self._news = asyncio.Event()
        link.watch(self._on_change)

    @property
    def replicas(self) -> tuple[ReplicaInfo, ...]:
        return self.told[-1]

    def lives(self) -> dict[str, list[ReplicaState]]:
        """The states of each replica, as they followed each other."""
        lives: dict[str, list[ReplicaState]] = {}
        for replica in (replica for replicas in self.told for replica in replicas):
            life = lives.setdefault(replica.replica_id, [])
            if life[-1:] != [replica.state]:
                life.append(replica.state)
        return lives

    async def until(self, condition: Callable[[tuple[ReplicaInfo, ...]], bool]) -> None:
        while not condition(self.replicas):
            await self._news.wait()

    async def zero(self) -> None:
        await self.until(lambda replicas: not replicas)

    async def until_held(self, digest: str) -> None:
        while digest not in (await self.link.status()).host_tier:
            await asyncio.sleep(0.01)  # the tiers tell nobody

    def _on_change(self, replicas: tuple[ReplicaInfo, ...]) -> None:
        self.told.append(replicas)
        news, self._news = self._news, asyncio.Event()
        news.set()


@contextlib.asynccontextmanager
async def joined(link: HostLink) -> AsyncIterator[Router]:
    router = Router(link)
    await link.join()
    try:
        async with asyncio.timeout(TIMEOUT_S):
            yield router
    finally:
        await link.leave()


@contextlib.asynccontextmanager
async def two(host: HostUnderTest) -> AsyncIterator[tuple[Router, Router]]:
    """Two routers at zero."""
    async with joined(host.link()) as one, joined(host.link()) as other:
        await one.zero()
        await other.zero()
        yield one, other
        await one.zero()


def ready(router: Router) -> list[ReplicaInfo]:
    return [replica for replica in router.replicas if replica.state is READY]


async def check_placing_at_zero_gives_one_replica_that_is_ready(host: HostUnderTest) -> None:
    async with two(host) as (router, _):
        await router.link.place("a")
        assert len(ready(router)) == 1
        assert ready(router)[0].address
        assert len(router.lives()) == 1


async def check_routers_that_place_at_once_start_one_replica(host: HostUnderTest) -> None:
    async with two(host) as (one, other):
        await asyncio.gather(
            *(router.link.place(f"{n}{id(router)}") for router in (one, other) for n in range(5))
        )
        assert one.lives().keys() == other.lives().keys()
        assert len(one.lives()) == 1


async def check_every_watcher_is_told_each_state_in_order_and_the_last_one(host: HostUnderTest) -> None:
    async with two(host) as (one, other):
        await one.link.place("a")
        async with joined(host.link()) as late:
            assert one.replicas == late.replicas
            for router in (one, other, late):
                await router.zero()
        (life,) = one.lives().values()
        assert READY in life
        assert life == [state for state in ReplicaState if state in life]
        assert {ReplicaState.STOPPED, ReplicaState.FAILED}.isdisjoint(life)
        assert one.lives() == other.lives()


async def check_a_lost_replica_is_told_gone_and_another_one_is_placed(host: HostUnderTest) -> None:
    async with two(host) as (one, other):
        await one.link.place("a")
        lost = ready(one)[0]
        await host.lose(lost)
        for router in (one, other):
            await router.until(lambda replicas: lost.replica_id not in {each.replica_id for each in replicas})
        await one.link.place("b")
        assert ready(one)[0].replica_id != lost.replica_id


async def check_a_request_that_is_given_up_keeps_nothing_awake(host: HostUnderTest) -> None:
    async with two(host) as (router, _):
        waiting = asyncio.ensure_future(router.link.place("a"))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.wait([waiting])
        assert waiting.cancelled()
        await router.link.status()  # behind all of that
        await router.zero()
        assert len(router.lives()) <= 1


async def check_a_start_that_fails_says_why_and_when_to_come_again(host: HostUnderTest) -> None:
    async with joined(host.broken_link()) as router:
        with pytest.raises(CapacityError) as refused:
            await router.link.place("a")
        assert refused.value.code == "replica_start_failed"
        assert refused.value.retry_after_s > 0
        reason = (await router.link.status()).last_error
        assert reason
        assert reason in refused.value.message
        assert router.replicas == ()


async def check_a_router_that_leaves_leaves_the_others_alone(host: HostUnderTest) -> None:
    async with joined(host.link()) as router:
        await router.zero()
        async with joined(host.link()) as leaving:
            waiting = asyncio.ensure_future(router.link.place("a"))
            await leaving.link.leave()
        await waiting
        assert len(ready(router)) == 1
        assert (await router.link.status()).replicas
        await router.zero()


async def check_held_adapters_are_there_until_they_are_forgotten(host: HostUnderTest) -> None:
    async with two(host) as (router, _):
        digest = host.adapter.digest
        router.link.hold([HeldAdapter(host.adapter, "host")])
        await router.until_held(digest)
        router.link.hold([])
        assert await router.link.forget(digest) == Forgotten(digest=digest, disk=1, host=1)
        assert await router.link.forget(digest) == Forgotten(digest=digest)
        await router.link.prefetch(host.adapter, "host")
        await router.until_held(digest)
        await router.link.forget(digest)


async def check_a_host_process_that_is_lost_is_joined_again_and_told_what_is_held(
    host: HostUnderTest,
) -> None:
    async with two(host) as (one, other):
        one.link.hold([HeldAdapter(host.adapter, "host")])
        await one.until_held(host.adapter.digest)
        await one.link.place("a")
        before, num_told = ready(one)[0], len(one.told)
        await host.restart()
        await other.link.place("b")  # of which the one that is gone never hears
        assert len(ready(other)) == 1
        assert ready(other)[0] != before
        await one.until_held(host.adapter.digest)
        assert () in one.told[num_told:]
        for router in (one, other):
            await router.zero()


Check = Callable[[HostUnderTest], Coroutine[object, object, None]]

CHECKS: list[Check] = [check for name, check in list(globals().items()) if name.startswith("check_")]
