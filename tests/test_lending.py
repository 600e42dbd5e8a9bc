"""A prepared file stays in place from the offer until the replica has mapped it, or is gone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tiers_kit import Setup
from tunefleet.core import AdapterRef
from tunefleet.messages import (
    AdapterReady,
    AdapterUnavailable,
    Evict,
    Evicted,
    Forgotten,
    HostToReplica,
    Message,
    ReplicaLoad,
    ReplicaToHost,
)
from tunefleet.runtime.lending import Lending
from tunefleet.runtime.replicas import Record
from tunefleet.runtime.wire import Connection, FrameReader, frame


class Replica(NamedTuple):
    """A record whose connection ends in a wire of the test's."""

    record: Record
    wire: Wire

    def messages(self) -> list[HostToReplica]:
        return FrameReader[HostToReplica](HostToReplica).feed(bytes(self.wire.written))

    def when(self, message: Message, then: Callable[[Record], None]) -> None:
        """Does something once that was sent to it."""
        self.wire.reactions[frame(message)] = lambda: then(self.record)


class Wire(asyncio.Transport):
    """A transport that keeps what is written, and may react to it in the loop's next turn."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.reactions: dict[bytes, Callable[[], None]] = {}

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data
        reaction = self.reactions.get(bytes(data))
        if reaction is not None:
            asyncio.get_running_loop().call_soon(reaction)

    def is_closing(self) -> bool:
        return False


def replica(replica_id: str) -> Replica:
    connection = Connection[ReplicaToHost](ReplicaToHost, lambda *_: None, lambda _: None)
    wire = Wire()
    connection.connection_made(wire)
    return Replica(Record(replica_id, "cpu", "", connection=connection), wire)


def gone(ref: AdapterRef, *, active: bool) -> Evicted:
    return Evicted(digest=ref.digest, was_active=active)


def test_an_offered_file_outlives_pressure_until_it_is_mapped(tmp_path: Path) -> None:
    async def scenario() -> None:
        setup = Setup(tmp_path)
        refs = [setup.store(seed) for seed in range(3)]
        size = len(setup.reference(0))
        async with setup.tiers(host_cache_bytes=2 * size + size // 2) as tiers:
            lending, taker = Lending(tiers), replica("r1")
            await lending.lend(taker.record, refs[0])
            [offer] = taker.messages()
            assert isinstance(offer, AdapterReady)
            for ref in refs[1:]:
                await tiers.fetch(ref)
            assert setup.reference(0) == Path(offer.path).read_bytes()
            lending.mapped(taker.record, refs[0].digest)
            for ref in refs[1:]:
                await tiers.fetch(ref)
            assert {ref.digest for ref in refs[1:]} == tiers.host_bytes().keys()

    asyncio.run(scenario())


def test_a_replica_that_is_gone_holds_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        setup = Setup(tmp_path)
        refs = [setup.store(seed) for seed in range(2)]
        size = len(setup.reference(0))
        async with setup.tiers(host_cache_bytes=size + size // 2) as tiers:
            lending, taker = Lending(tiers), replica("r1")
            await lending.lend(taker.record, refs[0])
            lending.end(taker.record)
            lending.mapped(taker.record, refs[0].digest)  # too late: no second unpin
            await tiers.fetch(refs[1])
            assert {refs[1].digest} == tiers.host_bytes().keys()

    asyncio.run(scenario())


def test_what_can_not_be_lent_is_told_to_its_replica_alone(tmp_path: Path) -> None:
    async def scenario() -> None:
        setup = Setup(tmp_path)
        good, bad = setup.store(0), setup.store(1)
        setup.objects.delete(f"{bad.key}/adapter_model.safetensors")
        async with setup.tiers() as tiers:
            lending, one, other = Lending(tiers), replica("r1"), replica("r2")
            await asyncio.gather(lending.lend(one.record, bad), lending.lend(other.record, good))
            [refusal] = one.messages()
            assert isinstance(refusal, AdapterUnavailable)
            assert (bad.digest, bad.key, "adapter_lost") == (refusal.digest, refusal.key, refusal.code)
            assert refusal.retry_after_s > 0
            assert [AdapterReady] == [type(message) for message in other.messages()]

    asyncio.run(scenario())


def test_forgetting_drops_the_copies_and_counts_those_in_slots(tmp_path: Path) -> None:
    async def scenario() -> None:
        setup = Setup(tmp_path)
        ref = setup.store(0)
        async with setup.tiers() as tiers:
            lending, one, other = Lending(tiers), replica("r1"), replica("r2")
            await lending.lend(one.record, ref)
            asked = Evict(digest=ref.digest)
            one.when(asked, lambda record: lending.evicted(record, gone(ref, active=True)))
            other.when(asked, lambda record: lending.evicted(record, gone(ref, active=False)))
            forgotten = await lending.forget(ref.digest, [one.record, other.record])
            assert Forgotten(digest=ref.digest, disk=1, host=1, device=1) == forgotten
            assert tiers.host_bytes() == {}
            lending.mapped(one.record, ref.digest)
            assert Forgotten(digest=ref.digest) == await lending.forget(ref.digest, [])

    asyncio.run(scenario())


def test_a_replica_that_still_uses_an_adapter_is_not_waited_for_long(tmp_path: Path) -> None:
    async def scenario() -> None:
        setup = Setup(tmp_path)
        ref = setup.store(0)
        async with setup.tiers() as tiers:
            lending, busy = Lending(tiers, forget_wait_s=0.02), replica("r1")
            for _ in range(2):
                forgotten = await lending.forget(ref.digest, [busy.record])
                assert Forgotten(digest=ref.digest, in_use=1) == forgotten
            assert [Evict(digest=ref.digest)] == busy.messages()  # it was asked once
            lending.evicted(busy.record, gone(ref, active=True))
            lending.evicted(busy.record, gone(ref, active=True))  # nobody waits any more

    asyncio.run(scenario())


def test_a_replica_that_ends_takes_its_slots_with_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        setup = Setup(tmp_path)
        ref = setup.store(0)
        async with setup.tiers() as tiers:
            lending, dying, unreachable = Lending(tiers), replica("r1"), replica("r2")
            unreachable.record.connection = None
            dying.record.load = ReplicaLoad(num_running=1, num_waiting=0, num_steps=9, digests=(ref.digest,))
            dying.when(Evict(digest=ref.digest), lending.end)
            forgotten = await lending.forget(ref.digest, [dying.record, unreachable.record])
            assert Forgotten(digest=ref.digest, device=1) == forgotten

    asyncio.run(scenario())
