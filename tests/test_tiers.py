from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import safe_open

from adapter_factory import make_manifest
from faults import no_file_above
from tiers_kit import CONFIG, WEIGHTS, Setup, flipped, refusal_of
from tunefleet.adapters_store.failures import CORRUPT_S, RETRY_AFTER_S
from tunefleet.adapters_store.flights import Fetched
from tunefleet.adapters_store.tiers import SLOW_RETRY_S
from tunefleet.core import AdapterRef
from tunefleet.errors import AdapterLoadFailed, InvalidState, StoreError

pytestmark = pytest.mark.anyio


@pytest.fixture
def setup(tmp_path: Path) -> Setup:
    return Setup(tmp_path)


async def test_a_fetched_file_is_the_prepared_adapter(setup: Setup) -> None:
    ref = setup.store(1)
    async with setup.tiers() as tiers:
        fetched = await tiers.fetch(ref)
        assert fetched.path.read_bytes() == setup.reference(1)
        with safe_open(fetched.path, "np") as prepared:
            assert prepared.metadata()["digest"] == ref.digest
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


async def test_nobody_waits_forever_for_a_store_that_hangs(setup: Setup) -> None:
    there, hanging, other = (setup.store(seed) for seed in range(3))
    setup.objects.hold(hanging)
    async with setup.tiers(fetch_wait_s=0.05) as tiers:
        await tiers.fetch(there)
        answers = await asyncio.gather(
            *(tiers.fetch(ref) for ref in (hanging, hanging, there, other)), return_exceptions=True
        )
        assert [AdapterLoadFailed, AdapterLoadFailed, Fetched, Fetched] == [type(each) for each in answers]
        refusal = await refusal_of(tiers, hanging)
        assert (refusal.code, refusal.retry_after_s) == ("adapter_slow", SLOW_RETRY_S)
        setup.objects.let_go(hanging)
        await asyncio.wait(list(tiers._tasks.values()))
        assert (await tiers.fetch(hanging)).path.read_bytes() == setup.reference(1)
        assert setup.objects.num_downloads == 3


async def test_a_wrong_copy_is_downloaded_once_a_minute_however_many_ask(
    setup: Setup, caplog: pytest.LogCaptureFixture
) -> None:
    ref = setup.store(1)
    right = setup.objects.open(f"{ref.key}/{WEIGHTS}").stream.read()
    setup.objects.replace(f"{ref.key}/{WEIGHTS}", flipped(right))
    setup.objects.num_downloads = 0
    async with setup.tiers() as tiers:
        for second in range(int(CORRUPT_S)):
            setup.clock.now_s = float(second)
            for _ in range(10):
                refusal = await refusal_of(tiers, ref)
                assert (refusal.code, refusal.retry_after_s) == ("adapter_corrupt", CORRUPT_S - second)
        assert setup.objects.num_downloads == 1
        assert [ref.key in record.message for record in caplog.records] == [True]
        [kept] = setup.quarantined()
        assert (kept / WEIGHTS).read_bytes() == flipped(right)
        setup.objects.replace(f"{ref.key}/{WEIGHTS}", right)
        setup.clock.now_s = CORRUPT_S
        assert (await tiers.fetch(ref)).path.read_bytes() == setup.reference(1)


async def test_a_poisoned_disk_copy_whose_original_is_bad_too_is_not_tried_for_ever(setup: Setup) -> None:
    ref = setup.store(1)
    async with setup.tiers() as tiers:
        await tiers.fetch(ref)
    setup.disk_file(ref).write_bytes(b"poison")
    setup.objects.change(f"{ref.key}/{WEIGHTS}", flipped)
    async with setup.tiers() as tiers:
        assert (await refusal_of(tiers, ref)).code == "adapter_corrupt"
        assert [path.name.endswith(ref.digest) for path in setup.quarantined()] == [True]
    async with setup.tiers() as tiers:  # what is in quarantine is no copy of the tier
        assert tiers.disk_bytes() == {}
        assert len(setup.quarantined()) == 1


async def test_a_disk_copy_whose_folder_somebody_removed_is_fetched_again(setup: Setup) -> None:
    ref = setup.store(1)
    async with setup.tiers() as tiers:
        await tiers.prefetch(ref, "disk")
        shutil.rmtree(setup.disk_file(ref).parent)
        assert (await tiers.fetch(ref)).path.read_bytes() == setup.reference(1)


async def test_a_prefetch_to_the_disk_stays_there_and_is_verified(setup: Setup) -> None:
    ref, bad = setup.store(1), setup.store(2)
    setup.objects.change(f"{bad.key}/{WEIGHTS}", flipped)
    async with setup.tiers() as tiers:
        await tiers.prefetch(ref, "disk")
        with pytest.raises(AdapterLoadFailed):
            await tiers.prefetch(bad, "disk")
        assert (tiers.host_bytes(), tiers.disk_bytes().keys()) == ({}, {ref.digest})


async def test_a_fetch_goes_on_where_a_prefetch_to_the_disk_ends(setup: Setup) -> None:
    ref = setup.store(1)
    async with setup.tiers() as tiers:
        _, fetched = await asyncio.gather(tiers.prefetch(ref, "disk"), tiers.fetch(ref))
        assert fetched.path.read_bytes() == setup.reference(1)
        assert setup.objects.num_downloads == 1


async def test_an_unexpected_failure_is_told_to_those_who_wait_and_logged(
    setup: Setup, caplog: pytest.LogCaptureFixture
) -> None:
    ref = setup.store(1)
    setup.objects.failure = ValueError("a bug")  # type: ignore[assignment]
    async with setup.tiers() as tiers:
        assert (await refusal_of(tiers, ref)).code == "adapter_unavailable"
        assert caplog.records[0].exc_info is not None


async def test_a_full_cache_disk_hurts_only_what_is_not_cached(setup: Setup) -> None:
    there, wanted = setup.store(1), setup.store(2)
    async with setup.tiers() as tiers:
        await tiers.fetch(there)
        with no_file_above(100):
            refusal = await refusal_of(tiers, wanted)
            assert (refusal.code, refusal.retry_after_s) == ("adapter_no_room", RETRY_AFTER_S)
            assert (await tiers.fetch(there)).download_s == 0.0
        setup.clock.now_s += RETRY_AFTER_S
        assert (await tiers.fetch(wanted)).path.read_bytes() == setup.reference(2)


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
