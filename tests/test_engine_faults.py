"""A model that raises: whoever is the reason ends, nobody else notices, and a broken replica ends itself."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch

from engine_kit import Driver, Stage, greedy, make_stage, random_prompt
from test_engine import ALL
from tunefleet.core import FinishReason
from tunefleet.messages import Submit
from tunefleet.runtime.engine import MAX_BARREN_STEPS, Engine, EngineLimits
from tunefleet.runtime.model import load_model

POISON = 77  # as the second token of a prompt
Fault = Callable[[torch.Tensor, torch.Tensor], bool]  # (token ids, positions), each [1, T]


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    shapes = [{"r": 8, "lora_alpha": 16, "target_modules": ALL}]
    return make_stage(tmp_path_factory.mktemp("faults"), shapes, 3)


class Choking(RuntimeError):
    """What the model raises."""


def faulty(stage: Stage, fault: Fault, **limits: int) -> Driver:
    """An engine whose model raises where ``fault`` says so."""

    def choke(_: object, __: object, kwargs: dict[str, torch.Tensor]) -> None:
        if fault(kwargs["input_ids"], kwargs["position_ids"]):
            raise Choking("out of something")

    model = load_model(stage.folder)
    model.register_forward_pre_hook(choke, with_kwargs=True)
    engine = Engine(
        model, stage.manifest, EngineLimits(**{"max_model_len": 256, **limits}), clock=lambda: 0.0
    )
    return Driver(engine, stage.adapters)


def make_works(stage: Stage, num_works: int) -> list[Submit]:
    """Of the base and several adapters, none with the poison."""
    generator = random.Random(1)
    refs = [None, *(adapter.ref for adapter in stage.adapters)]
    works = []
    for number in range(num_works):
        prompt = random_prompt(generator, generator.randint(2, 15))
        works.append(
            Submit(
                request_id=str(number),
                prompt=(2, 3, *prompt),
                sampling=greedy(20),
                adapter=refs[number % len(refs)],
            )
        )
    return works


def check(driver: Driver, stage: Stage, works: list[Submit]) -> None:
    for work in works:
        answer = driver.answers[work.request_id]
        assert answer.finish_reason is FinishReason.LENGTH
        assert len(answer.tokens) == work.sampling.max_tokens
        stage.oracle.check_answer(work, answer.tokens)


@pytest.mark.parametrize("place", [0, 3, 5])
def test_a_prompt_that_makes_the_model_raise_ends_alone(stage: Stage, place: int) -> None:
    """Wherever it is in the batch; with 19 tokens to go for the others."""
    driver = faulty(stage, lambda ids, positions: bool(((ids == POISON) & (positions == 1)).any()))
    works = make_works(stage, 6)
    poisoned = Submit(request_id="bad", prompt=(5, POISON, 6), sampling=greedy(20))
    for work in [*works[:place], poisoned, *works[place:]]:
        driver.submit(work)
    driver.finish()
    driver.step()
    assert driver.answers["bad"].error_code == "engine_error"
    assert driver.answers["bad"].tokens == []
    check(driver, stage, works)


def test_a_sequence_at_which_the_model_raises_in_the_middle_of_its_answer_ends_there(stage: Stage) -> None:
    """Its tokens up to there are right; the adapter that it shares with another goes on."""
    driver = faulty(stage, lambda _, positions: int(positions.max()) >= 60)
    works = make_works(stage, 7)
    long = Submit(
        request_id="bad",
        prompt=random_prompt(random.Random(2), 50),
        sampling=greedy(40),
        adapter=stage.adapters[0].ref,
    )
    for work in [*works[:3], long, *works[3:]]:
        driver.submit(work)
    driver.finish()
    driver.step()
    assert driver.answers["bad"].error_code == "engine_error"
    assert len(driver.answers["bad"].tokens) == 11  # the one at position 60 can't be computed on
    stage.oracle.check_answer(long, driver.answers["bad"].tokens)
    check(driver, stage, works)


def test_what_a_culprit_computed_is_found_by_nobody(stage: Stage) -> None:
    driver = faulty(stage, lambda _, positions: int(positions.max()) == 60)
    prompt = random_prompt(random.Random(3), 50)
    for request_id, max_tokens in (("bad", 40), ("good", 8)):
        driver.submit(Submit(request_id=request_id, prompt=prompt, sampling=greedy(max_tokens)))
        driver.finish()
    assert driver.answers["bad"].error_code == "engine_error"
    assert driver.answers["good"].finish_reason is FinishReason.LENGTH
    assert driver.answers["good"].cached_tokens == 0


def test_a_batch_too_large_for_the_device_runs_in_parts(stage: Stage) -> None:
    """As memory that is not enough for more than 24 tokens in one forward."""
    forwards: list[int] = []

    def too_large(ids: torch.Tensor, _: torch.Tensor) -> bool:
        forwards.append(ids.shape[1])
        return ids.shape[1] > 24

    driver = faulty(stage, too_large, max_num_seqs=16)
    works = make_works(stage, 16)
    for work in works:
        driver.submit(work)
    driver.finish()
    check(driver, stage, works)
    assert max(forwards) > 24


@pytest.mark.parametrize("num_works", [2, 9])
def test_a_model_that_always_raises_ends_the_replica_and_nobodys_request(
    stage: Stage, num_works: int
) -> None:
    """Their requests go on at another replica, so no answer may say that they failed."""
    driver = faulty(stage, lambda _, __: True)
    for work in make_works(stage, 4 * num_works)[::4]:  # those of the base: nothing is to be loaded
        driver.submit(work)
    with pytest.raises(Choking):
        driver.finish()
    assert {answer.finish_reason for answer in driver.answers.values()} == {None}


def test_a_model_that_raises_for_one_after_another_ends_the_replica_soon(stage: Stage) -> None:
    """Where only one sequence runs it can't be told whose fault it is; a few in a row say so."""
    driver = faulty(stage, lambda _, __: True, max_num_seqs=1)
    for work in make_works(stage, 9):
        driver.submit(work)
    with pytest.raises(Choking):
        driver.finish()
    failed = [answer for answer in driver.answers.values() if answer.finish_reason is FinishReason.ERROR]
    assert len(failed) == MAX_BARREN_STEPS - 1
