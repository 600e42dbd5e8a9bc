from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from adapter_factory import make_manifest
from tiers_kit import CONFIG, WEIGHTS, Setup, flipped, refusal_of
from tunefleet.adapters_store.failures import CORRUPT_S, RETRY_AFTER_S
from tunefleet.core import AdapterRef
from tunefleet.errors import AdapterLoadFailed, InvalidState, StoreError

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path)


async def test_a_fetched_file_is_the_prepared_adapter(setup: Setup) -> None:
    ref = setup.store(1)
    async with setup.tiers() as tiers:
        fetched = await tiers.fetch(ref)
        assert fetched.path.read_bytes() == setup.reference(1)
        with safe_open(fetched.path, "np") as prepared:
            assert prepared.metadata() == {"digest": ref.digest, "rank": "4"}
        assert tiers.host_bytes() == {ref.digest: fetched.path.stat().st_size}
        assert tiers.disk_bytes() == {ref.digest: ref.size_bytes}


async def test_what_is_there_costs_nothing(setup: Setup) -> None:
    ref = setup.store(1)
    async with setup.tiers() as tiers:
        first = await tiers.fetch(ref)
        assert (first.path, 0.0, 0.0) == await tiers.fetch(ref)
        assert setup.objects.num_downloads == 1


async def test_a_crowd_downloads_once(setup: Setup) -> None:
    ref = setup.store(1)
    async with setup.tiers() as tiers:
        fetched = await asyncio.gather(*(tiers.fetch(ref) for _ in range(100)))
        assert len(set(fetched)) == 1
        assert setup.objects.num_downloads == 1


async def test_different_adapters_load_beside_each_other(setup: Setup) -> None:
    refs = [setup.store(seed) for seed in range(6)]
    async with setup.tiers() as tiers:
        fetched = await asyncio.gather(*(tiers.fetch(ref) for ref in refs))
        assert [file.path.read_bytes() for file in fetched] == [setup.reference(seed) for seed in range(6)]


async def test_a_cancelled_caller_takes_nobody_elses_flight_down(setup: Setup) -> None:
    ref = setup.store(1)
    setup.objects.may_answer.clear()
    async with setup.tiers() as tiers:
        impatient, patient = (asyncio.ensure_future(tiers.fetch(ref)) for _ in range(2))
        await asyncio.sleep(0)
        impatient.cancel()
        setup.objects.may_answer.set()
        assert (await patient).path.exists()
        with pytest.raises(asyncio.CancelledError):
            await impatient
        assert setup.objects.num_downloads == 1


async def test_the_least_recently_used_is_evicted_within_the_budgets(setup: Setup) -> None:
    refs = [setup.store(seed) for seed in range(4)]
    size = len(setup.reference(0))
    async with setup.tiers(host_cache_bytes=2 * size, disk_cache_bytes=3 * refs[0].size_bytes + 20) as tiers:
        for ref in (refs[0], refs[1], refs[0], refs[2]):
            await tiers.fetch(ref)
            tiers.check()
        assert list(tiers.host_bytes()) == [refs[0].digest, refs[2].digest]
        assert len(tiers.disk_bytes()) == 3
        await tiers.fetch(refs[1])  # from the disk
        assert setup.objects.num_downloads == 3
        await tiers.fetch(refs[3])
        assert len(tiers.disk_bytes()) == 3


async def test_a_pinned_digest_stays_and_says_when_there_is_no_room(setup: Setup) -> None:
    one, two, three = (setup.store(seed) for seed in range(3))
    size = len(setup.reference(0))
    async with setup.tiers(host_cache_bytes=2 * size) as tiers:
        pinned = await tiers.fetch(one)
        tiers.pin(one.digest)
        for ref in (two, three):
            await tiers.fetch(ref)
        assert set(tiers.host_bytes()) == {one.digest, three.digest}
        tiers.pin(three.digest)
        refusal = await refusal_of(tiers, two)
        assert (refusal.code, refusal.retry_after_s) == ("adapter_no_room", RETRY_AFTER_S)
        assert pinned.path.read_bytes() == setup.reference(0)
        tiers.unpin(one.digest)
        setup.clock.now_s += RETRY_AFTER_S
        await tiers.fetch(two)
        assert set(tiers.host_bytes()) == {two.digest, three.digest}
        tiers.unpin(three.digest)


async def test_pins_count_and_misuse_is_told(setup: Setup) -> None:
    ref = setup.store(1)
    async with setup.tiers() as tiers:
        with pytest.raises(InvalidState):
            tiers.pin(ref.digest)
        with pytest.raises(InvalidState):
            tiers.unpin(ref.digest)
        await tiers.fetch(ref)
        for _ in range(2):
            tiers.pin(ref.digest)
        for _ in range(2):
            tiers.unpin(ref.digest)
        with pytest.raises(InvalidState):
            tiers.unpin(ref.digest)


async def test_what_can_never_fit_is_refused_for_good(setup: Setup) -> None:
    ref = setup.store(1)
    for budgets, option in (({"host_cache_bytes": 100}, "host"), ({"disk_cache_bytes": 100}, "disk")):
        async with setup.tiers(**budgets) as tiers:
            refusal = await refusal_of(tiers, ref)
            assert (refusal.code, refusal.retry_after_s) == ("adapter_too_large", None)
            assert f"{option}_cache_bytes" in refusal.message


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
@pytest.mark.parametrize(
    "change",
    [
        flipped,
        lambda content: content[:-1],
        lambda content: b"",
        lambda content: content + b"x",
        lambda content: content * 9,
    ],
)
async def test_a_wrong_byte_in_the_store_is_never_served(
    setup: Setup, file: str, change: Callable[[bytes], bytes]
) -> None:
    ref = setup.store(1)
    setup.objects.change(f"{ref.key}/{file}", change)
    async with setup.tiers() as tiers:
        refusal = await refusal_of(tiers, ref)
        assert (refusal.code, refusal.retry_after_s) == ("adapter_corrupt", CORRUPT_S)
        assert (tiers.host_bytes(), tiers.disk_bytes()) == ({}, {})


async def test_a_store_that_gives_another_adapter_is_found_out(setup: Setup) -> None:
    one, two = setup.store(1), setup.store(2)
    for file in (CONFIG, WEIGHTS):
        stored = setup.objects.open(f"{two.key}/{file}").stream.read()
        setup.objects.change(f"{one.key}/{file}", lambda _content, stored=stored: stored)  # type: ignore[misc]
    async with setup.tiers() as tiers:
        assert (await refusal_of(tiers, one)).code == "adapter_corrupt"


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
async def test_a_poisoned_disk_copy_is_replaced_from_the_store(setup: Setup, file: str) -> None:
    ref = setup.store(1)
    async with setup.tiers() as tiers:
        await tiers.fetch(ref)
    for spoil in (lambda path: path.write_bytes(flipped(path.read_bytes())), lambda path: path.unlink()):
        spoil(setup.disk_file(ref, file))
        async with setup.tiers() as tiers:
            fetched = await tiers.fetch(ref)
            assert fetched.path.read_bytes() == setup.reference(1)
            assert setup.disk_file(ref, file).exists()
    assert setup.objects.num_downloads == 3


async def test_a_host_file_that_somebody_cleared_is_made_again(setup: Setup) -> None:
    ref = setup.store(1)
    async with setup.tiers() as tiers:
        (await tiers.fetch(ref)).path.unlink()
        assert (await tiers.fetch(ref)).path.read_bytes() == setup.reference(1)
        assert setup.objects.num_downloads == 1


async def test_the_disk_tier_survives_a_restart_and_the_host_tier_starts_empty(setup: Setup) -> None:
    refs = [setup.store(seed) for seed in range(2)]
    async with setup.tiers() as tiers:
        for ref in refs:
            await tiers.fetch(ref)
    (setup.folder / "host").mkdir(exist_ok=True)
    leftovers = [
        setup.folder / "host" / "leftover",
        setup.folder / "disk" / ".incoming" / "half",
        setup.folder / "disk" / ".gone-1",
    ]
    for path in leftovers:
        path.write_bytes(b"of a crash")
    async with setup.tiers() as tiers:
        assert not any(path.exists() for path in leftovers)
        assert tiers.host_bytes() == {}
        assert set(tiers.disk_bytes()) == {ref.digest for ref in refs}
        await tiers.fetch(refs[0])
        assert setup.objects.num_downloads == 2


async def test_a_smaller_budget_after_a_restart_keeps_the_last_used(setup: Setup) -> None:
    refs = [setup.store(seed) for seed in range(3)]
    async with setup.tiers() as tiers:
        for age, ref in enumerate((refs[1], refs[0], refs[2])):
            await tiers.fetch(ref)
            os.utime(setup.folder / "disk" / ref.digest, (age, age))
    async with setup.tiers(disk_cache_bytes=2 * refs[0].size_bytes + 20) as tiers:
        assert list(tiers.disk_bytes()) == [refs[0].digest, refs[2].digest]


async def test_a_failure_is_remembered_for_a_moment_only(setup: Setup) -> None:
    ref = setup.store(1)
    setup.objects.failure = StoreError("out of order")
    async with setup.tiers() as tiers:
        refusal = await refusal_of(tiers, ref)
        assert (refusal.code, refusal.retry_after_s) == ("adapter_unavailable", RETRY_AFTER_S)
        assert "out of order" in refusal.message
        setup.objects.failure = None
        await refusal_of(tiers, ref)
        assert setup.objects.num_downloads == 0  # it failed at the config, and nobody asked again
        setup.clock.now_s += RETRY_AFTER_S
        assert (await tiers.fetch(ref)).path.exists()


async def test_a_failed_crowd_asks_the_store_once(setup: Setup) -> None:
    ref = setup.store(1)
    setup.objects.change(f"{ref.key}/{WEIGHTS}", flipped)
    async with setup.tiers() as tiers:
        answers = await asyncio.gather(*(tiers.fetch(ref) for _ in range(20)), return_exceptions=True)
        assert {type(answer) for answer in answers} == {AdapterLoadFailed}
        assert setup.objects.num_downloads == 1


async def test_one_bad_adapter_of_many_hurts_nobody_else(setup: Setup) -> None:
    refs = [setup.store(seed) for seed in range(8)]
    setup.objects.change(f"{refs[3].key}/{WEIGHTS}", flipped)
    async with setup.tiers() as tiers:
        answers = await asyncio.gather(*(tiers.fetch(ref) for ref in refs), return_exceptions=True)
        failed = [number for number, answer in enumerate(answers) if isinstance(answer, BaseException)]
        assert failed == [3]


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
        await asyncio.sleep(0)
        forget = asyncio.ensure_future(tiers.forget(ref.digest))
        await asyncio.sleep(0)
        setup.objects.may_answer.set()
        await forget
        with pytest.raises(AdapterLoadFailed) as refusal:
            await fetch
        assert (refusal.value.code, refusal.value.retry_after_s) == ("adapter_deleted", None)
        assert (tiers.host_bytes(), tiers.disk_bytes()) == ({}, {})
        assert (await tiers.fetch(ref)).path.exists()


async def test_an_adapter_for_another_base_is_refused_for_good(setup: Setup) -> None:
    ref = setup.store(1)
    async with setup.tiers() as tiers:
        tiers._manifest = make_manifest(linears={})
        refusal = await refusal_of(tiers, ref)
        assert (refusal.code, refusal.retry_after_s) == ("adapter_invalid", None)


async def test_a_rank_above_the_catalogs_is_refused(setup: Setup) -> None:
    ref = setup.store(1)
    async with setup.tiers() as tiers:
        smaller = AdapterRef(ref.digest, "t", ref.key, ref.weights_sha256, ref.size_bytes, 3)
        assert (await refusal_of(tiers, smaller)).code == "adapter_invalid"


async def test_a_digest_that_is_none_reaches_no_path(setup: Setup) -> None:
    async with setup.tiers() as tiers:
        with pytest.raises(InvalidState):
            await tiers.fetch(AdapterRef("../../etc", "t", "t/k", "", 1, 1))


async def test_closing_waits_for_flights_and_empties_the_host_tier(setup: Setup) -> None:
    ref = setup.store(1)
    async with setup.tiers() as tiers:
        fetch = asyncio.ensure_future(tiers.fetch(ref))
        await asyncio.sleep(0)
    assert not (setup.folder / "host").exists()
    assert setup.disk_file(ref).exists()
    await asyncio.wait([fetch])


ACTIONS = st.tuples(st.sampled_from(["fetch", "crowd", "pin", "unpin", "forget", "spoil"]), st.integers(0, 3))


@given(st.lists(ACTIONS, max_size=15))
@settings(max_examples=25, deadline=None)
def test_whatever_happens_books_are_right_and_only_right_bytes_are_served(
    actions: list[tuple[str, int]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(act(Setup(Path(folder)), actions))


async def act(setup: Setup, actions: list[tuple[str, int]]) -> None:
    refs = [setup.store(seed) for seed in range(4)]
    expected = [setup.reference(seed) for seed in range(4)]
    pinned: list[int] = []
    async with setup.tiers(2 * len(expected[0]), 3 * refs[0].size_bytes + 20) as tiers:
        for action, number in actions:
            setup.clock.now_s += RETRY_AFTER_S
            ref = refs[number]
            if action == "fetch" or action == "crowd":
                wanted = refs if action == "crowd" else [ref]
                answers = await asyncio.gather(
                    *(tiers.fetch(each) for each in wanted), return_exceptions=True
                )
                for answer in answers:
                    assert not isinstance(answer, BaseException) or isinstance(answer, AdapterLoadFailed)
                if action == "fetch" and not isinstance(answers[0], BaseException):
                    assert answers[0].path.read_bytes() == expected[number]
            elif action == "pin" and ref.digest in tiers.host_bytes():
                tiers.pin(ref.digest)
                pinned.append(number)
            elif action == "unpin" and pinned:
                tiers.unpin(refs[pinned.pop()].digest)
            elif action == "forget" and number not in pinned:
                await tiers.forget(ref.digest)
            elif action == "spoil" and setup.disk_file(ref).exists():
                setup.disk_file(ref).write_bytes(flipped(setup.disk_file(ref).read_bytes()))
            tiers.check()
            assert {refs[each].digest for each in pinned} <= tiers.host_bytes().keys()
