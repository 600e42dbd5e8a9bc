"""A prepared file stays in place from the offer until the replica has mapped it, or is gone."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import NamedTuple

from test_tiers import Setup
from tunefleet.messages import AdapterReady, AdapterUnavailable, Evict, HostToReplica, ReplicaToHost
from tunefleet.runtime.lending import Lending
from tunefleet.runtime.replicas import Record
from tunefleet.runtime.wire import Connection, FrameReader


class Replica(NamedTuple):
    """A record whose connection ends in a list."""

    record: Record
    sent: bytearray

    def messages(self) -> list[HostToReplica]:
        return FrameReader[HostToReplica](HostToReplica).feed(bytes(self.sent))


class Wire(asyncio.Transport):
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += data

    def is_closing(self) -> bool:
        return False


def replica(replica_id: str) -> Replica:
    connection = Connection[ReplicaToHost](ReplicaToHost, lambda *_: None, lambda _: None)
    wire = Wire()
    connection.connection_made(wire)
    return Replica(Record(replica_id, "cpu", "", connection=connection), wire.written)


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
            assert bad.digest == refusal.digest
            assert refusal.retry_after_s > 0
            assert [AdapterReady] == [type(message) for message in other.messages()]

    asyncio.run(scenario())


def test_forgetting_tells_every_replica_and_drops_the_copies(tmp_path: Path) -> None:
    async def scenario() -> None:
        setup = Setup(tmp_path)
        ref = setup.store(0)
        async with setup.tiers() as tiers:
            lending, replicas = Lending(tiers), [replica("r1"), replica("r2")]
            await lending.lend(replicas[0].record, ref)
            await lending.forget(ref.digest, [each.record for each in replicas])
            assert all(Evict(digest=ref.digest) in each.messages() for each in replicas)
            assert tiers.host_bytes() == {}
            lending.mapped(replicas[0].record, ref.digest)

    asyncio.run(scenario())
