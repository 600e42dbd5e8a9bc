"""Deletions and holds: what stays, what goes, and that one user's deletion is nobody else's trouble."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tiers_kit import WEIGHTS, Setup, flipped
from tunefleet.adapters_store.flights import Fetched
from tunefleet.errors import AdapterLoadFailed
from tunefleet.messages import HeldAdapter

pytestmark = pytest.mark.anyio


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path)


async def test_forgetting_drops_every_copy(setup: Setup) -> None:
    one, two = setup.store(1), setup.store(2)
    async with setup.tiers() as tiers:
        fetched = await tiers.fetch(one)
        await tiers.fetch(two)
        await tiers.forget(one.digest)
        await tiers.forget(one.digest)
        assert not fetched.path.exists()
        assert set(tiers.host_bytes()) == set(tiers.disk_bytes()) == {two.digest}
        assert (await tiers.fetch(one)).path.exists()


async def test_forgetting_what_is_on_its_way_drops_it_when_it_is_there(setup: Setup) -> None:
    ref = setup.store(1)
    setup.objects.may_answer.clear()
    async with setup.tiers() as tiers:
        fetch = asyncio.ensure_future(tiers.fetch(ref))
        await asyncio.to_thread(setup.objects.was_asked.wait)
        forget = asyncio.ensure_future(tiers.forget(ref.digest))
        await asyncio.sleep(0)
        setup.objects.may_answer.set()
        await forget
        with pytest.raises(AdapterLoadFailed) as refusal:
            await fetch
        assert (refusal.value.code, refusal.value.retry_after_s) == ("adapter_deleted", None)
        assert (tiers.host_bytes(), tiers.disk_bytes()) == ({}, {})
        assert (await tiers.fetch(ref)).path.exists()


async def test_what_is_on_its_way_is_forgotten_without_waiting_for_a_store_that_hangs(setup: Setup) -> None:
    ref = setup.store(1)
    setup.objects.hold(ref)
    async with setup.tiers(forget_wait_s=0.01) as tiers:
        fetch = asyncio.ensure_future(tiers.fetch(ref))
        await asyncio.to_thread(setup.objects.was_asked.wait)
        assert await tiers.forget(ref.digest) == (0, 0)
        with pytest.raises(AdapterLoadFailed):
            await fetch
        again = setup.store(1, upload_id="again")
        assert (await tiers.fetch(again)).path.read_bytes() == setup.reference(1)
        setup.objects.let_go(ref)
        await asyncio.wait(list(tiers._tasks.values()))
        assert (await tiers.fetch(again)).path.read_bytes() == setup.reference(1)


async def test_what_comes_from_another_uploads_objects_is_not_forgotten_with_the_deleted_ones(
    setup: Setup,
) -> None:
    ref = setup.store(1, upload_id="again")
    setup.objects.hold(ref)
    async with setup.tiers() as tiers:
        fetch = asyncio.ensure_future(tiers.fetch(ref))
        await asyncio.to_thread(setup.objects.was_asked.wait)
        assert await tiers.forget(ref.digest, ["the deleted upload's"]) == (0, 0)
        setup.objects.let_go(ref)
        assert (await fetch).path.read_bytes() == setup.reference(1)


async def test_forgetting_says_how_many_copies_there_were(setup: Setup) -> None:
    one, two = setup.store(1), setup.store(2)
    async with setup.tiers() as tiers:
        await tiers.fetch(one)
        await tiers.prefetch(two, "disk")
        assert await tiers.forget(one.digest) == (1, 1)
        assert await tiers.forget(two.digest) == (1, 0)
        assert await tiers.forget(two.digest) == (0, 0)


async def test_one_users_lost_objects_fail_nobody_else_with_the_same_bytes(setup: Setup) -> None:
    lost, sound = setup.store(1, upload_id="lost"), setup.store(1, upload_id="sound")
    setup.objects.lose(lost)
    for refs in ([lost, sound], [sound, lost]):
        async with setup.tiers() as tiers:
            wanted = [ref for ref in refs for _ in range(10)]
            answers = await asyncio.gather(*(tiers.fetch(ref) for ref in wanted), return_exceptions=True)
            for ref, answer in zip(wanted, answers, strict=True):
                if ref is sound:
                    assert not isinstance(answer, BaseException)
                else:
                    assert not isinstance(answer, AdapterLoadFailed) or answer.code == "adapter_lost"
            await tiers.forget(sound.digest)


async def test_one_users_corrupt_objects_fail_nobody_else_with_the_same_bytes(setup: Setup) -> None:
    bad, sound = setup.store(1, upload_id="bad"), setup.store(1, upload_id="sound")
    setup.objects.change(f"{bad.key}/{WEIGHTS}", flipped)
    async with setup.tiers() as tiers:
        answers = await asyncio.gather(tiers.fetch(bad), tiers.fetch(sound), return_exceptions=True)
        assert [AdapterLoadFailed, Fetched] == [type(answer) for answer in answers]
        assert len(setup.quarantined()) == 1
        assert (await tiers.fetch(bad)).path.read_bytes() == setup.reference(1)  # it is there: the same bytes


async def test_a_deletion_fails_nobody_else_who_waits_for_the_same_bytes(setup: Setup) -> None:
    deleted, sound = setup.store(1, upload_id="deleted"), setup.store(1, upload_id="sound")
    setup.objects.hold(deleted)
    async with setup.tiers() as tiers:
        mine, theirs = (asyncio.ensure_future(tiers.fetch(ref)) for ref in (deleted, sound))
        await asyncio.to_thread(setup.objects.was_asked.wait)
        forget = asyncio.ensure_future(tiers.forget(deleted.digest))
        assert (await theirs).path.read_bytes() == setup.reference(1)
        with pytest.raises(AdapterLoadFailed) as refusal:
            await mine
        assert refusal.value.code == "adapter_deleted"
        setup.objects.let_go(deleted)
        await forget


async def test_what_is_forgotten_before_it_has_begun_is_not_fetched(setup: Setup) -> None:
    ref = setup.store(1)
    async with setup.tiers() as tiers:
        fetch = asyncio.ensure_future(tiers.fetch(ref))
        await asyncio.sleep(0)
        assert await tiers.forget(ref.digest) == (0, 0)
        with pytest.raises(AdapterLoadFailed):
            await fetch
        assert setup.objects.num_downloads == 0


async def test_what_is_held_is_not_evicted_down_to_its_tier(setup: Setup) -> None:
    refs = [setup.store(seed) for seed in range(5)]
    size = len(setup.reference(0))
    async with setup.tiers(4 * size, 4 * refs[0].size_bytes + 50) as tiers:
        tiers.hold("router", [HeldAdapter(refs[0], "host"), HeldAdapter(refs[1], "disk")])
        for ref in (*refs, *refs[2:]):
            await tiers.fetch(ref)
        assert refs[0].digest in tiers.host_bytes()
        assert {refs[0].digest, refs[1].digest} <= tiers.disk_bytes().keys()
        assert refs[1].digest not in tiers.host_bytes()
        tiers.hold("router", [])
        for ref in refs[1:]:
            await tiers.fetch(ref)
        assert refs[0].digest not in tiers.host_bytes()


async def test_a_deleted_adapter_is_held_no_more(setup: Setup) -> None:
    ref = setup.store(1)
    async with setup.tiers() as tiers:
        tiers.hold("router", [HeldAdapter(ref, "host")])
        assert tiers.missing_held() == [HeldAdapter(ref, "host")]
        await tiers.forget(ref.digest)
        assert tiers.missing_held() == []
