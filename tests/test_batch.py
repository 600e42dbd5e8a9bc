"""One person's numbers never reach another's rows, however rows change hands."""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from engine_kit import (
    Adapter,
    Driver,
    Oracle,
    greedy,
    make_adapter,
    new_engine,
    prepare_model,
    random_prompt,
    tiny_model,
)
from tunefleet.core import FinishReason, Manifest
from tunefleet.messages import Submit
from tunefleet.runtime.engine import Engine
from tunefleet.runtime.slots import Slot


class Tiny(NamedTuple):
    """A tiny Llama, and two adapters: one for the good, one to be poisoned."""

    folder: Path
    manifest: Manifest
    good: Adapter
    bad: Adapter
    oracle: Oracle


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    root = tmp_path_factory.mktemp("tiny")
    model = tiny_model("llama")
    manifest = prepare_model(model, root / "base")
    good, bad = (
        make_adapter(
            model, manifest, root / f"{r}", r, r=r, lora_alpha=8, target_modules=["q_proj", "k_proj"]
        )
        for r in (4, 12)
    )
    return Tiny(root / "base", manifest, good, bad, Oracle(model, [good, bad]))


def new_driver(tiny: Tiny, **limits: int) -> Driver:
    return Driver(new_engine(tiny.folder, tiny.manifest, **limits), [tiny.good, tiny.bad], load_steps=1)


def work(request_id: str, adapter: Adapter, prompt: tuple[int, ...], max_tokens: int = 30) -> Submit:
    return Submit(request_id=request_id, prompt=prompt, sampling=greedy(max_tokens), adapter=adapter.ref)


def poison(engine: Engine, adapter: Adapter) -> None:
    """From now on the adapter's K is no number."""
    slot = engine.slots.lookup(adapter.ref.digest)
    assert slot is not None
    engine.banks.a(("model.layers.0.self_attn.k_proj",), slot.rank_class)[slot.index] = float("nan")


def check_good(tiny: Tiny, driver: Driver, request_id: str, prompt: tuple[int, ...]) -> None:
    answer = driver.answers[request_id]
    assert FinishReason.LENGTH is answer.finish_reason
    tiny.oracle.check(tiny.good.ref.digest, list(prompt), answer.tokens)


def test_several_poisoned_sequences_end_in_one_step_and_the_others_go_on(tiny: Tiny) -> None:
    """The good one's row moves into the first one's hole while the second one still has to end."""
    driver = new_driver(tiny)
    prompt = random_prompt(random.Random(5), 12)
    for request_id in ("bad-1", "bad-2"):
        driver.submit(work(request_id, tiny.bad, prompt))
    driver.submit(work("good", tiny.good, prompt))
    for _ in range(4):
        driver.step()
    poison(driver.engine, tiny.bad)
    driver.finish()
    assert [driver.answers[f"bad-{n}"].error_code for n in (1, 2)] == ["non_finite_logits"] * 2
    check_good(tiny, driver, "good", prompt)


def test_a_row_whose_holder_left_while_it_prefilled_carries_nothing_over(tiny: Tiny) -> None:
    """Chunks that sample nothing show no fault; the next holder of the row meets none of their numbers.

    Two good sequences of unequal length, so that the shorter one's row is masked beyond its own tokens.
    """
    driver = new_driver(tiny, max_batch_tokens=16, max_model_len=512)
    generator = random.Random(6)
    driver.submit(work("warm", tiny.bad, (5,), max_tokens=1))
    driver.finish()
    poison(driver.engine, tiny.bad)
    driver.submit(work("bad", tiny.bad, random_prompt(generator, 250)))
    for _ in range(9):
        driver.step()
    driver.engine.cancel("bad")
    long, short = random_prompt(generator, 180), random_prompt(generator, 130)
    driver.submit(work("short", tiny.good, short))
    driver.submit(work("long", tiny.good, long))
    driver.finish()
    check_good(tiny, driver, "short", short)
    check_good(tiny, driver, "long", long)


def test_a_row_moved_out_by_a_poisoned_sequence_is_clean_for_the_next(tiny: Tiny) -> None:
    """The poisoned one moves within its class while it prefills; a good one takes over its first row."""
    driver = new_driver(tiny, max_batch_tokens=16, max_model_len=512)
    generator = random.Random(7)
    driver.submit(work("warm", tiny.bad, (5,), max_tokens=1))
    driver.finish()
    poison(driver.engine, tiny.bad)
    first = random_prompt(generator, 140)
    driver.submit(work("first", tiny.good, first, max_tokens=2))
    while not driver.answers["first"].tokens:
        driver.step()
    driver.submit(work("bad", tiny.bad, random_prompt(generator, 250)))
    while driver.answers["first"].finish_reason is None:
        driver.step()
    long, short = random_prompt(generator, 200), random_prompt(generator, 130)
    driver.submit(work("short", tiny.good, short))
    driver.submit(work("long", tiny.good, long))
    driver.finish()
    assert driver.answers["bad"].error_code == "non_finite_logits"
    check_good(tiny, driver, "short", short)
    check_good(tiny, driver, "long", long)


def test_chunks_of_a_single_token_are_computed_like_any_other(tiny: Tiny) -> None:
    """Prompts whose last chunk is one token, and a budget that leaves one token for a prefill."""
    driver = new_driver(tiny, max_batch_tokens=4)
    generator = random.Random(8)
    prompts = {f"{length}": random_prompt(generator, length) for length in (1, 4, 5, 9, 2)}
    for request_id, prompt in prompts.items():
        driver.submit(work(request_id, tiny.good, prompt, max_tokens=12))
        driver.step()
    driver.finish()
    for request_id, prompt in prompts.items():
        check_good(tiny, driver, request_id, prompt)


def test_sequences_that_grow_through_several_length_classes_keep_their_answers(tiny: Tiny) -> None:
    driver = new_driver(tiny, max_model_len=512)
    generator = random.Random(9)
    prompts = {f"{number}": random_prompt(generator, 100 + 9 * number) for number in range(4)}
    for request_id, prompt in prompts.items():
        driver.submit(work(request_id, tiny.good, prompt, max_tokens=40 + 45 * int(request_id)))
        driver.step()
    driver.finish()
    for request_id, prompt in prompts.items():
        check_good(tiny, driver, request_id, prompt)


def test_an_evicted_adapters_weights_are_gone_from_the_device(tiny: Tiny) -> None:
    """The newcomer's slot is one of another rank class, so nothing overwrites the old one's."""
    driver = new_driver(tiny, max_active_adapters=1)
    driver.submit(work("a", tiny.bad, (5, 6), max_tokens=2))
    driver.finish()
    wide = driver.engine.banks.values(Slot(16, 0))
    first, second = wide.chunk(2)
    assert second.any()
    driver.submit(work("b", tiny.good, (5, 6), max_tokens=2))
    driver.finish()
    assert torch.equal(first, driver.engine.banks.values(Slot(8, 0)))
    assert first.any()
    assert not second.any()


def test_a_resumed_sequence_with_tokens_out_of_range_is_refused(tiny: Tiny) -> None:
    driver = new_driver(tiny)
    driver.submit(Submit(request_id="a", prompt=(5,), sampling=greedy(5), generated=(10**6,)))
    driver.step()
    assert driver.answers["a"].error_code == "invalid_request"
