"""Faults by which other servers gave somebody another's answer, or none, each as a test of this one.

The numbers are of issues in the trackers of vLLM, SGLang, LMCache and Dynamo.
"""

from __future__ import annotations

import random

import msgspec
import pytest

from engine_kit import Adapter, Driver, Stage, ask, digest_of, make_stage, random_prompt
from test_engine import ALL
from tunefleet.core import FinishReason, SamplingParams
from tunefleet.messages import Submit

SHAPES: list[dict[str, object]] = [
    {"r": 8, "lora_alpha": 16, "target_modules": ALL},
    {"r": 4, "lora_alpha": 8, "target_modules": ["k_proj", "v_proj"]},
    {"r": 24, "lora_alpha": 24, "target_modules": ALL},
]
TOKEN_BYTES = 384  # of keys and values in the tiny Llama
LONG = random_prompt(random.Random(0), 90)  # that many prompts begin with


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return make_stage(tmp_path_factory.mktemp("faults"), SHAPES, 12)


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter takes several steps to its slot, as a large one does."""
    monkeypatch.setattr("tunefleet.runtime.engine.SLICE_BYTES", 32_768)


def answer(driver: Driver, stage: Stage, work: Submit) -> int:
    """Runs a request to its end beside whatever runs, checks it; how much of its prompt was there already."""
    driver.submit(work)
    while driver.answers[work.request_id].finish_reason is None:
        driver.step()
    check(driver, stage, work)
    return driver.answers[work.request_id].cached_tokens


def check(driver: Driver, stage: Stage, *works: Submit) -> None:
    for work in works:
        got = driver.answers[work.request_id]
        assert got.finish_reason is FinishReason.LENGTH
        assert len(got.tokens) == work.sampling.max_tokens
        stage.oracle.check_answer(work, got.tokens)
        if work.adapter is not None and len(got.tokens) >= 16:
            assert not stage.oracle.agrees(None, list(work.prompt), got.tokens)


def test_vllm_47724_hot_loads_that_rotate_the_slots_leave_a_decoding_request_its_own_adapter(
    stage: Stage,
) -> None:
    """One decodes through every slot but its own changing hands, several times over."""
    driver = stage.driver(max_active_adapters=3, device_adapter_bytes=8 * 49_152)
    long = ask("long", stage.adapters[0], LONG[:20], 220)
    driver.submit(long)
    holders: set[frozenset[str]] = set()
    others = stage.adapters[1:] * 2
    for number, adapter in enumerate(others):
        answer(driver, stage, ask(f"hot-{number}", adapter, LONG[:12], 4, user_id=f"user-{number}"))
        holders.add(frozenset(driver.engine.slots.digests))
        assert driver.answers["long"].finish_reason is None
    driver.finish()
    check(driver, stage, long)
    assert frozenset().union(*holders) == {adapter.ref.digest for adapter in stage.adapters}
    assert all(stage.adapters[0].ref.digest in resident for resident in holders)


def test_vllm_47724_who_comes_back_into_another_slot_is_answered_from_that_one(stage: Stage) -> None:
    """Three take turns in two slots, so that each is now in this one, now in that, while another decodes."""
    driver = stage.driver(max_active_adapters=2, device_adapter_bytes=4 * 49_152)
    places: dict[str, set[int]] = {}
    works = [ask(f"{n}", stage.adapters[(0, 3, 6)[n % 3]], LONG[: 30 + n], 9 + n % 4) for n in range(24)]
    for work in works:
        driver.submit(work)
        while driver.answers[work.request_id].finish_reason is None and len(driver.engine.scheduler) > 1:
            driver.step()
            for digest in driver.engine.slots.digests:
                slot = driver.engine.slots.lookup(digest)
                assert slot is not None
                places.setdefault(digest, set()).add(slot.index)
    driver.finish()
    check(driver, stage, *works)
    assert any(len(indexes) > 1 for indexes in places.values())


def test_vllm_42125_weights_loaded_anew_under_the_same_name_reuse_nothing_of_the_old_ones(
    stage: Stage,
) -> None:
    driver = stage.driver()
    old, new = stage.adapters[:2]
    assert answer(driver, stage, ask("old", old, LONG)) == 0
    assert answer(driver, stage, ask("old again", old, LONG)) == len(LONG) - 1
    renamed = Adapter(new.folder, new.prepared, msgspec.structs.replace(new.ref, key=old.ref.key))
    assert answer(driver, stage, ask("new", renamed, LONG)) == 0
    assert answer(driver, stage, ask("new again", renamed, LONG)) == len(LONG) - 1
    assert answer(driver, stage, ask("rolled back", old, LONG)) == len(LONG) - 1


def test_vllm_42125_an_adapter_that_was_deleted_and_uploaded_again_starts_from_nothing(stage: Stage) -> None:
    driver = stage.driver()
    answer(driver, stage, ask("before", stage.adapters[0], LONG))
    assert driver.engine.evict(stage.adapters[0].ref.digest)
    assert answer(driver, stage, ask("after", stage.adapters[0], LONG)) == 0


def test_vllm_42125_a_deleted_user_starts_from_nothing_and_nobody_else_does(stage: Stage) -> None:
    """Of the base, where no adapter goes with them; also what they still asked when they were deleted."""
    driver = stage.driver()
    for user_id in ("alice", "bob"):
        answer(driver, stage, ask(f"{user_id} before", None, LONG, user_id=user_id))
    last = ask("alice last", None, (*LONG, 5, 6))
    driver.submit(last)
    driver.step()
    driver.engine.forget_user("acme", "alice")
    driver.finish()
    for user_id, expected in (("alice", 0), ("bob", len(LONG) - 1)):
        assert answer(driver, stage, ask(f"{user_id} after", None, LONG, user_id=user_id)) == expected


def test_vllm_3264_base_and_adapters_share_no_keys_and_values(stage: Stage) -> None:
    """One user, one prompt, everybody in turn, twice: the second time each finds its own."""
    driver = stage.driver()
    for turn, expected in enumerate((0, len(LONG) - 1)):
        for number, adapter in enumerate([None, *stage.adapters[:4]]):
            assert answer(driver, stage, ask(f"{turn}-{number}", adapter, LONG)) == expected


def test_promptpeek_users_and_tenants_share_no_keys_and_values(stage: Stage) -> None:
    """The same adapter, or the base, and the same prompt: not even the time to the first token may tell."""
    driver = stage.driver()
    people = [("acme", "alice"), ("acme", "bob"), ("other", "alice"), ("acme", None), ("other", None)]
    for turn, expected in enumerate((0, len(LONG) - 1)):
        for tenant, user_id in people:
            for number, adapter in enumerate((None, stage.adapters[0])):
                work = ask(
                    f"{turn}-{tenant}-{user_id}-{number}", adapter, LONG, user_id=user_id, tenant=tenant
                )
                assert answer(driver, stage, work) == expected


@pytest.mark.parametrize("seed", range(2))
def test_vllm_38606_39146_adapters_that_alternate_over_one_long_prefix_while_some_are_cancelled(
    stage: Stage, seed: int
) -> None:
    """A, B, the base and again, one every other step, each with the same 90 tokens; every third leaves."""
    generator = random.Random(seed)
    driver = stage.driver(max_num_seqs=6, max_active_adapters=2, max_batch_tokens=64)
    works = [
        ask(f"{n}", (*stage.adapters[:2], None)[n % 3], (*LONG, *random_prompt(generator, 6)), 20)
        for n in range(40)
    ]
    kept = []
    for work in works:
        driver.submit(work)
        for _ in range(generator.randrange(3)):
            driver.step()
        if generator.random() < 0.33:
            driver.engine.cancel(work.request_id)
            driver.engine.check()
            stage.oracle.check_answer(work, driver.answers[work.request_id].tokens)
        else:
            kept.append(work)
    driver.finish()
    check(driver, stage, *kept)
    assert sum(driver.answers[work.request_id].cached_tokens >= len(LONG) for work in kept) > 5


def test_sglang_36894_25864_an_adapter_is_free_to_go_exactly_when_its_last_answer_of_several_has_ended(
    stage: Stage,
) -> None:
    """As a request with ``n`` 4: one answer ends, one is cancelled twice, two go on."""
    driver = stage.driver(max_active_adapters=1)
    digest = stage.adapters[0].ref.digest
    works = [
        ask(f"{n}", stage.adapters[0], LONG[:30], max_tokens) for n, max_tokens in enumerate((4, 30, 20, 25))
    ]
    for work in works:
        driver.submit(work)
    while driver.answers["0"].finish_reason is None:
        driver.step()
    for _ in range(2):
        driver.engine.cancel("1")
        assert not driver.engine.evict(digest)
    while driver.answers["3"].finish_reason is None:
        assert driver.engine.slots.is_pinned(digest)
        assert not driver.engine.evict(digest)
        driver.step()
    check(driver, stage, works[0], works[2], works[3])
    assert driver.engine.evict(digest)
    assert not driver.engine.slots.holds(digest)
    for number in (1, 0):  # the only slot serves others, and then the same again
        answer(driver, stage, ask(f"later-{number}", stage.adapters[number], LONG[:30], 16))


@pytest.mark.parametrize("seed", range(2))
def test_sglang_23141_full_kv_with_mixed_lengths_several_adapters_the_base_and_cancels(
    stage: Stage, seed: int
) -> None:
    """KV for one longest sequence and little more: preemptions, and everybody still gets to the end."""
    generator = random.Random(seed)
    kv_cache_bytes = 520 * TOKEN_BYTES
    driver = stage.driver(
        max_num_seqs=5, max_active_adapters=3, max_batch_tokens=40, kv_cache_bytes=kv_cache_bytes
    )
    lengths = (1, 16, 100, 127, 128, 129, 200)
    works = [
        msgspec.structs.replace(
            ask(f"{n}", generator.choice([None, *stage.adapters[:5]]), random_prompt(generator, length), 32),
            sampling=SamplingParams(
                max_tokens=32, temperature=generator.choice([0.0, 0.9]), seed=n, ignore_eos=True
            ),
        )
        for n, length in enumerate(generator.choices(lengths, k=20))
    ]
    preempted: set[str] = set()
    for work in works:
        driver.submit(work)
        driver.step()
        if generator.random() < 0.25:
            driver.engine.cancel(generator.choice(works[: int(work.request_id) + 1]).request_id)
    while driver.engine.scheduler:
        driver.step()
        assert driver.engine.kv.used_bytes <= kv_cache_bytes
        preempted |= {s.request_id for s in driver.engine.scheduler.waiting if s.num_preemptions}
    for work in works:
        stage.oracle.check_answer(work, driver.answers[work.request_id].tokens)
    ended = [work for work in works if driver.answers[work.request_id].finish_reason is FinishReason.LENGTH]
    assert len(ended) > 10
    assert preempted


def test_lmcache_4991_what_a_failed_sequence_computed_is_never_found_again(stage: Stage) -> None:
    driver = stage.driver()
    work = ask("failed", stage.adapters[0], LONG)
    driver.submit(work)
    while not driver.answers["failed"].tokens:
        driver.step()
    sequence = driver.engine.scheduler.get("failed")
    assert sequence is not None
    driver.engine.scheduler.finish(sequence, FinishReason.ERROR)
    assert answer(driver, stage, ask("next", stage.adapters[0], LONG)) == 0


def test_dynamo_5184_one_adapter_that_many_wait_for_is_fetched_once(stage: Stage) -> None:
    engine = stage.engine()
    works = [ask(f"{n}", stage.adapters[0], LONG[:20], user_id=f"user-{n}") for n in range(8)]
    asked = []
    for work in works:
        engine.add(work)
        engine.step()
        asked += engine.missing_adapters()
    assert [ref.digest for ref in asked] == [digest_of(works[0])]


def test_areal_1197_a_new_version_leaves_the_answers_of_the_old_one_to_their_end(stage: Stage) -> None:
    driver = stage.driver(max_active_adapters=1)
    old = ask("old", stage.adapters[0], LONG[:20], 60)
    driver.submit(old)
    while not driver.answers["old"].tokens:
        driver.step()
    new = ask("new", stage.adapters[1], LONG[:20], 20)
    driver.submit(new)
    driver.finish()
    check(driver, stage, old, new)
