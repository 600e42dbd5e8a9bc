"""Adapters come, go and change beside answers: each answer is its own adapter's, and no slot is lost."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import torch
from safetensors.torch import load_file

import engine_kit
from engine_kit import Adapter, Driver, Stage, make_stage, random_prompt
from test_engine import ALL
from tunefleet.core import FinishReason
from tunefleet.messages import Submit
from tunefleet.runtime.slots import Slot

SHAPES: list[dict[str, object]] = [
    {"r": 8, "lora_alpha": 16, "target_modules": ALL},
    {"r": 2, "lora_alpha": 4, "target_modules": ["k_proj", "v_proj"]},
    {"r": 64, "lora_alpha": 64, "target_modules": ALL},
    {"r": 16, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
]
PROMPT = random_prompt(random.Random(0), 40)
MOST_GROWTH = 4 << 20  # bytes: what a thousand loads may leave to the allocator; a tenth of what they copy


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return make_stage(tmp_path_factory.mktemp("swaps"), SHAPES, 8)


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter takes several steps to its slot, as a large one does."""
    monkeypatch.setattr("tunefleet.runtime.engine.SLICE_BYTES", 16_384)


def ask(
    request_id: str,
    adapter: Adapter | None,
    prompt: tuple[int, ...] = PROMPT,
    max_tokens: int = 20,
    user_id: str = "alice",
) -> Submit:
    return engine_kit.ask(request_id, adapter, prompt, max_tokens, user_id=user_id)


def check(stage: Stage, driver: Driver, *works: Submit) -> None:
    """Whole answers, each its own adapter's."""
    for work in works:
        answer = driver.answers[work.request_id]
        assert (answer.error_code, answer.finish_reason) == ("", FinishReason.LENGTH)
        assert len(answer.tokens) == work.sampling.max_tokens
        stage.oracle.check_answer(work, answer.tokens)


def check_nothing_in_use(driver: Driver) -> None:
    engine = driver.engine
    engine.check()
    assert len(engine.scheduler) == 0
    assert engine.rows.used_tokens == 0
    assert not any(engine.slots.is_pinned(digest) for digest in engine.slots.digests)


def test_a_hundred_at_once_for_one_cold_adapter_cost_one_fetch_and_one_slot(stage: Stage) -> None:
    driver = stage.driver(max_num_seqs=16)
    works = [ask(f"{n}", stage.adapters[0], PROMPT[: 3 + n % 30], 6, f"user-{n}") for n in range(100)]
    for work in works:
        driver.submit(work)
    assert driver.engine.missing_adapters() == [stage.adapters[0].ref]
    assert driver.engine.missing_adapters() == []
    driver.deliver(stage.adapters[0].ref.digest)
    driver.finish()
    check(stage, driver, *works)
    assert driver.engine.slots.digests == (stage.adapters[0].ref.digest,)


def test_one_adapter_more_than_slots_in_turn_serves_everybody(stage: Stage) -> None:
    """The worst order for any cache: who comes next has just gone."""
    driver = stage.driver(max_active_adapters=3)
    resident, works = set(), []
    for turn in range(5):
        for number in range(4):
            works.append(ask(f"{turn}-{number}", stage.adapters[number], PROMPT[:20], 8))
            driver.submit(works[-1])
            for _ in range(3):
                driver.step()
                assert len(driver.engine.slots.digests) <= 3
                resident.add(driver.engine.slots.digests)
    driver.finish()
    check(stage, driver, *works)
    check_nothing_in_use(driver)
    assert len(resident) > 4  # they did take turns


def test_after_a_rollback_the_next_answer_is_the_old_versions_and_the_running_one_the_new_ones(
    stage: Stage,
) -> None:
    """One slot's worth of room for each; the new version's answer began before and ends after."""
    old, new = stage.adapters[:2]
    driver = stage.driver()
    before = ask("before", old)
    driver.submit(before)
    driver.finish()
    running = ask("running", new, max_tokens=60)
    driver.submit(running)
    while not driver.answers["running"].tokens:
        driver.step()
    after = ask("after", old)
    driver.submit(after)
    driver.finish()
    check(stage, driver, before, running, after)
    assert driver.answers["before"].tokens == driver.answers["after"].tokens
    assert not stage.oracle.agrees(new.ref.digest, list(PROMPT), driver.answers["after"].tokens)


@pytest.mark.parametrize("when", ["adapter on its way", "copied to its slot", "prefill", "decode"])
def test_who_is_cancelled_frees_everything_at_once_and_nobody_else_notices(stage: Stage, when: str) -> None:
    driver = stage.driver(max_batch_tokens=12, max_active_adapters=2)
    beside = ask("beside", stage.adapters[1], max_tokens=80)
    driver.submit(beside)
    while not driver.answers["beside"].tokens:
        driver.step()
    driver.submit(ask("leaves", stage.adapters[0], random_prompt(random.Random(1), 100), 50))
    while not _has_come_to(driver, stage.adapters[0], when):
        driver.step()
    used = driver.engine.rows.used_tokens
    driver.engine.cancel("leaves")
    driver.engine.cancel("leaves")
    driver.engine.check()
    assert driver.engine.scheduler.get("leaves") is None
    assert not driver.engine.slots.is_pinned(stage.adapters[0].ref.digest)
    assert (driver.engine.rows.used_tokens < used) is (when in {"prefill", "decode"})
    others = [ask(f"{n}", stage.adapters[n], max_tokens=10) for n in (2, 0)]
    for work in others:
        driver.submit(work)
    driver.finish()
    check(stage, driver, beside, *others)
    check_nothing_in_use(driver)


def _has_come_to(driver: Driver, adapter: Adapter, when: str) -> bool:
    engine, digest = driver.engine, adapter.ref.digest
    sequence = engine.scheduler.get("leaves")
    assert sequence is not None
    return {
        "adapter on its way": not engine.slots.holds(digest),
        "copied to its slot": engine.slots.holds(digest) and engine.slots.lookup(digest) is None,
        "prefill": 0 < sequence.num_computed < sequence.num_prompt,
        "decode": bool(sequence.num_generated),
    }[when]


def test_a_load_that_fails_takes_no_slot_and_leaves_no_number_behind(stage: Stage, tmp_path: Path) -> None:
    """Of a file that is cut off; the only slot is then another one's, and that one's alone."""
    wide, narrow = stage.adapters[0], stage.adapters[1]
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(wide.prepared.read_bytes()[:-9])
    driver = stage.driver(max_active_adapters=1)
    engine, slot = driver.engine, Slot(8, 0)
    driver.submit(ask("fails", wide))
    engine.missing_adapters()
    engine.adapter_loaded(wide.ref.digest, broken, 0.0, 0.0)
    driver.step()
    assert driver.answers["fails"].error_code == "adapter_load_failed"
    assert (engine.slots.digests, engine.slots.used_pages) == ((), 0)
    assert not engine.banks.values(slot).any()
    work = ask("next", narrow)
    driver.submit(work)
    driver.finish()
    check(stage, driver, work)
    assert engine.evict(narrow.ref.digest)
    assert not engine.banks.values(slot).any()
    again = ask("again", wide)
    driver.submit(again)
    driver.finish()
    check(stage, driver, again)


def test_two_that_take_turns_at_each_step_over_one_prefix_stay_apart(stage: Stage) -> None:
    """A, B, A, B: an answer of one or two tokens each, so that the slot changes hands all the time."""
    driver = stage.driver(max_active_adapters=1, max_num_seqs=4)
    works = [
        ask(f"{n}", stage.adapters[n % 2], (*PROMPT, *random_prompt(random.Random(n), 3)), 1 + n % 2)
        for n in range(60)
    ]
    for work in works:
        driver.submit(work)
        driver.step()
    driver.finish()
    check(stage, driver, *works)
    assert max(driver.answers[work.request_id].cached_tokens for work in works) >= len(PROMPT)


def test_one_corrupt_adapter_of_a_hundred_answers_in_one_batch_ends_alone(
    stage: Stage, tmp_path: Path
) -> None:
    """Its numbers are none: the file is whole, and what it makes of the base is not finite."""
    content = bytearray(stage.adapters[2].prepared.read_bytes())
    content[-4096:] = b"\xff" * 4096
    corrupt = tmp_path / "corrupt.safetensors"
    corrupt.write_bytes(content)
    driver = stage.driver(max_num_seqs=100)
    sound = [None, *stage.adapters[:2], *stage.adapters[3:]]
    works = [ask(f"{n}", sound[n % len(sound)], PROMPT[: 2 + n % 20], 12, f"user-{n}") for n in range(99)]
    bad = ask("bad", stage.adapters[2], PROMPT[:9], 12, "eve")
    for work in [*works[:50], bad, *works[50:]]:
        driver.submit(work)
    for ref in driver.engine.missing_adapters():
        if ref == stage.adapters[2].ref:
            driver.engine.adapter_loaded(ref.digest, corrupt, 0.0, 0.0)
        else:
            driver.deliver(ref.digest)
    driver.finish()
    driver.step()
    assert driver.answers["bad"].error_code == "non_finite_logits"
    assert driver.answers["bad"].tokens == []
    check(stage, driver, *works)
    assert max(answer.shared_with for answer in driver.answers.values()) >= 50


def test_the_order_in_which_they_came_changes_nobodys_tokens(stage: Stage) -> None:
    works = [ask(f"{n}", [None, *stage.adapters][n % 9], PROMPT[: 4 + 3 * n], 16) for n in range(12)]
    answers = []
    for seed in range(4):
        driver = stage.driver(max_num_seqs=12, max_active_adapters=12)
        for work in random.Random(seed).sample(works, len(works)):
            driver.submit(work)
        driver.finish()
        check(stage, driver, *works)
        answers.append({work.request_id: driver.answers[work.request_id].tokens for work in works})
    assert answers == answers[:1] * 4


@pytest.mark.slow
def test_a_thousand_loads_leave_nothing_behind(stage: Stage) -> None:
    """Of more adapters than slots: mapped files, open files, memory and KV as before."""
    driver = stage.driver(max_active_adapters=2)
    before = None
    for number in range(1100):
        work = ask(f"{number}", stage.adapters[number % 8], PROMPT[:6], 2, f"user-{number % 50}")
        driver.submit(work)
        driver.finish()
        check(stage, driver, work)
        del driver.answers[work.request_id]
        if number == 99:
            before = _Held.now(driver)
    assert before is not None
    after = _Held.now(driver)
    check_nothing_in_use(driver)
    assert (after.files, after.mapped) == (before.files, before.mapped)
    assert after.kv_bytes <= before.kv_bytes
    assert after.memory - before.memory < MOST_GROWTH


class _Held(NamedTuple):
    """What this process holds."""

    files: int
    mapped: int
    memory: int
    kv_bytes: int

    @classmethod
    def now(cls, driver: Driver) -> _Held:
        maps = Path("/proc/self/maps").read_text()
        return cls(
            len(os.listdir("/proc/self/fd")),
            maps.count("prepared.safetensors"),
            psutil.Process().memory_info().rss,
            driver.engine.kv.used_bytes,
        )


def test_numbers_of_the_slots_are_those_of_the_files(stage: Stage) -> None:
    """After any number of swaps, bit for bit: what was copied is what was prepared."""
    driver = stage.driver(max_active_adapters=3)
    generator = random.Random(5)
    for number in range(40):
        adapter = generator.choice(stage.adapters)
        driver.submit(ask(f"{number}", adapter, PROMPT[:5], 2))
        driver.finish()
        slot = driver.engine.slots.lookup(adapter.ref.digest)
        assert slot is not None
        assert torch.equal(_numbers_of(adapter), driver.engine.banks.values(slot))


def _numbers_of(adapter: Adapter) -> torch.Tensor:
    return load_file(adapter.prepared)["slot"]
