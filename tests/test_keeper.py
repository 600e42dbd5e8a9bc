from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tiers_kit import Setup
from tunefleet.adapters_store.failures import RETRY_AFTER_S
from tunefleet.adapters_store.keeper import NUM_PREFETCHES, Keeper
from tunefleet.adapters_store.tiers import Tiers
from tunefleet.errors import StoreError
from tunefleet.messages import HeldAdapter

pytestmark = pytest.mark.anyio


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path)


@asynccontextmanager
async def keeping(setup: Setup, retry_s: float = 60.0) -> AsyncIterator[tuple[Tiers, Keeper]]:
    async with setup.tiers() as tiers:
        keeper = Keeper(tiers, retry_s=retry_s)
        try:
            yield tiers, keeper
        finally:
            for gate in setup.objects.gates.values():
                gate.set()
            await keeper.close()


async def test_what_is_held_is_brought_to_its_tier(setup: Setup) -> None:
    one, two = setup.store(1), setup.store(2)
    async with keeping(setup) as (tiers, keeper):
        keeper.hold("router", [HeldAdapter(one, "host"), HeldAdapter(two, "disk")])
        await keeper.settled()
        assert {one.digest} == tiers.host_bytes().keys()
        assert {one.digest, two.digest} == tiers.disk_bytes().keys()
        keeper.hold("router", [HeldAdapter(two, "host")])
        await keeper.settled()
        assert {one.digest, two.digest} == tiers.host_bytes().keys()
        assert setup.objects.num_downloads == 2


async def test_a_few_at_a_time_and_never_before_those_who_wait(setup: Setup) -> None:
    held, asked = [setup.store(seed) for seed in range(6)], setup.store(7)
    for ref in held:
        setup.objects.hold(ref)
    async with keeping(setup) as (tiers, keeper):
        keeper.hold("router", [HeldAdapter(ref, "disk") for ref in held])
        fetched = await tiers.fetch(asked)
        assert fetched.path.read_bytes() == setup.reference(7)
        assert len(tiers._flights) == NUM_PREFETCHES
        for ref in held:
            setup.objects.let_go(ref)
        await keeper.settled()
        assert len(tiers.disk_bytes()) == 7


async def test_what_is_not_held_any_more_is_not_fetched(setup: Setup) -> None:
    refs = [setup.store(seed) for seed in range(6)]
    setup.objects.may_answer.clear()
    async with keeping(setup) as (tiers, keeper):
        keeper.hold("router", [HeldAdapter(ref, "disk") for ref in refs])
        await asyncio.to_thread(setup.objects.was_asked.wait)
        keeper.release("router")
        setup.objects.may_answer.set()
        await keeper.settled()
        assert len(tiers.disk_bytes()) == NUM_PREFETCHES


async def test_a_prefetch_is_brought_up_once_and_a_failed_one_only_logged(
    setup: Setup, caplog: pytest.LogCaptureFixture
) -> None:
    there, lost = setup.store(1), setup.store(2)
    setup.objects.lose(lost)
    async with keeping(setup, retry_s=0.0) as (tiers, keeper):
        keeper.prefetch(lost, "host")
        keeper.prefetch(there, "host")
        await keeper.settled()
        assert {there.digest} == tiers.host_bytes().keys()
        assert "is not in the store" in caplog.text
        await asyncio.sleep(0)
        await keeper.settled()
        assert setup.objects.num_downloads == 1


async def test_what_is_held_is_tried_again_until_the_store_is_back(
    setup: Setup, caplog: pytest.LogCaptureFixture
) -> None:
    ref = setup.store(1)
    setup.objects.failure = StoreError("out of order")
    async with keeping(setup, retry_s=0.0) as (tiers, keeper):
        keeper.hold("router", [HeldAdapter(ref, "host")])
        for _ in range(3):
            await keeper.settled()
            await asyncio.sleep(0.001)
        assert len(caplog.records) == 1
        setup.objects.failure = None
        setup.clock.now_s += RETRY_AFTER_S
        async with asyncio.timeout(5):
            while ref.digest not in tiers.host_bytes():
                await keeper.settled()
                await asyncio.sleep(0)


async def test_where_ones_objects_are_lost_anothers_are_held(setup: Setup) -> None:
    lost, sound = setup.store(1, upload_id="lost"), setup.store(1, upload_id="sound")
    setup.objects.lose(lost)
    async with keeping(setup) as (tiers, keeper):
        keeper.hold("router", [HeldAdapter(lost, "host"), HeldAdapter(sound, "host")])
        await keeper.settled()
        assert {sound.digest} == tiers.host_bytes().keys()
