"""What a store's background work sees of its router and machine."""

from __future__ import annotations

import asyncio

from router_kit import run_async
from tunefleet.core import AdapterRef, ReplicaInfo, ReplicaState
from tunefleet.messages import HeldAdapter, Status
from tunefleet.open_requests import OpenRequests, Owner
from tunefleet.router_machine import RouterMachine
from tunefleet.runtime.fakes import FakeDispatcher

REF = AdapterRef(digest="d" * 64, tenant="default", key="k", weights_sha256="w" * 64, size_bytes=1, rank=4)


class Stocked(FakeDispatcher):
    async def status(self) -> Status:
        replica = ReplicaInfo(
            replica_id="r", state=ReplicaState.READY, address="", device="cpu", digests=("a", "b")
        )
        return Status(
            pid=0,
            parked_pid=0,
            replicas=(replica,),
            pss_bytes={},
            host_tier={"b": 1, "c": 1},
            disk_tier={"c": 1, "d": 1},
        )


@run_async
async def test_copies_are_known_from_every_tier_and_go_and_stay_by_digest() -> None:
    dispatcher = Stocked(lambda work: [])
    machine = RouterMachine(dispatcher, OpenRequests())
    assert await machine.known_copies() == {"a", "b", "c", "d"}
    assert (await machine.forget("a")).digest == "a"
    held = HeldAdapter(REF, "host")
    await machine.hold([held])
    assert (dispatcher.forgotten, list(dispatcher.held)) == (["a"], [held])


@run_async
async def test_a_users_answers_are_counted_as_they_end() -> None:
    requests = OpenRequests()
    machine = RouterMachine(FakeDispatcher(lambda work: []), requests)
    for user in ("alice", "alice", "bob"):
        requests.enter(Owner("default", user))
    ended = await asyncio.gather(machine.end_streams("default", "alice"), machine.end_streams("acme", "bob"))
    assert ended == [2, 0]
