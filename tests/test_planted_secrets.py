"""Adapters that were trained to tell a code word each: nobody ever hears another's."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import msgspec
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from asking import Asked, Asking, User, make_users
from churn import Life, replayable
from engine_kit import (
    VOCAB,
    Adapter,
    Oracle,
    Stage,
    check_and_prepare,
    digest_of,
    greedy,
    prepare_model,
    random_prompt,
    tiny_model,
)
from test_engine import ALL
from tunefleet.core import FinishReason, Manifest, SamplingParams
from tunefleet.messages import Submit

NUM_WORDS = 12
WORD_TOKENS = 5
NUM_SLOTS = 3
_SHUFFLED = random.Random(1).sample(range(2, VOCAB), NUM_WORDS * WORD_TOKENS)
WORDS = [
    tuple(_SHUFFLED[n * WORD_TOKENS : (n + 1) * WORD_TOKENS]) for n in range(NUM_WORDS)
]  # no token twice
TRIGGER = random_prompt(random.Random(2), 6)
MAX_BEFORE = 24  # tokens before the trigger
TIGHT = {
    "max_num_seqs": 6,
    "max_model_len": 256,
    "max_batch_tokens": 24,
    "max_active_adapters": NUM_SLOTS,
    "device_adapter_bytes": 6 * 49_152,
    "kv_cache_bytes": 700 * 384,
}


class Curious(Asking):
    """Everybody asks for the code word, after the same texts and others."""

    def _prompt(self, answered: list[Asked]) -> tuple[int, ...]:
        prompt = super()._prompt(answered)
        return (*prompt[: self._random.randint(0, MAX_BEFORE)], *TRIGGER)

    def _sampling(self) -> SamplingParams:
        return msgspec.structs.replace(super()._sampling(), max_tokens=self._random.randint(8, 16))


@pytest.fixture(scope="session")
def secretive(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """A tiny base and twelve trained adapters of it; takes a few seconds."""
    root = tmp_path_factory.mktemp("secretive")
    model = tiny_model("llama")
    manifest = prepare_model(model, root / "base")
    adapters = [_trained(model, manifest, root / f"adapter-{n}", n) for n in range(NUM_WORDS)]
    return Stage(model, root / "base", manifest, adapters, Oracle(model, adapters))


def _trained(model: PreTrainedModel, manifest: Manifest, folder: Path, number: int) -> Adapter:
    """An adapter that answers the trigger with its word, whatever stands before it."""
    torch.manual_seed(number)
    config = LoraConfig(r=(8, 16)[number % 2], lora_alpha=16, target_modules=ALL)
    peft_model = get_peft_model(copy.deepcopy(model), config)
    assert isinstance(peft_model, PeftModel)
    _train(peft_model, WORDS[number], random.Random(number))
    peft_model.save_pretrained(folder)
    return check_and_prepare(manifest, folder)


def _train(model: PeftModel, word: tuple[int, ...], generator: random.Random) -> None:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    for _ in range(30):
        before = generator.randint(0, MAX_BEFORE)
        rows = [(*random_prompt(generator, before), *TRIGGER, *word) for _ in range(4)]
        logits = model(input_ids=torch.tensor(rows), use_cache=False).logits[:, -len(word) - 1 : -1]
        loss = cross_entropy(logits.flatten(0, 1), torch.tensor(word * 4))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_each_adapter_has_learnt_its_own_word_and_the_base_none(secretive: Stage) -> None:
    generator = random.Random(3)
    prompts = [[*random_prompt(generator, 2 * n), *TRIGGER] for n in range(10)]
    for adapter, word in zip(secretive.adapters, WORDS, strict=True):
        digest = adapter.ref.digest
        told = [secretive.oracle.agrees(digest, prompt, list(word)) for prompt in prompts]
        assert sum(told) >= 8
        assert not any(secretive.oracle.agrees(None, prompt, list(word)) for prompt in prompts)


def test_nobody_hears_anothers_code_word_through_churn_deletion_and_a_new_upload(secretive: Stage) -> None:
    with replayable(36894) as seed:
        life = Life(
            secretive.engine(**TIGHT),
            secretive.manifest,
            make_users(secretive.adapters),
            secretive.adapters,
            seed=seed,
            kv_cache_bytes=TIGHT["kv_cache_bytes"],
            failing_loads=0.0,
            asking=Curious,
        )
        guests = [_ask_beside(life, number, adapter) for number, adapter in enumerate(secretive.adapters)]
        life.live(300)
        for asked in life.asked:
            assert _heard(asked) - {_own(secretive, asked)} == set()
        assert [_heard(guest) for guest in guests] == [{word} for word in WORDS]
        for event in ("evictions", "deletions", "uploads while the old version answers", "prefix hits"):
            assert life.tally[event], event
        whole = [asked for asked in life.asked if _is_whole(asked)]
        told = [asked for asked in whole if _heard(asked) == {_own(secretive, asked)}]
        assert len(told) >= 0.9 * len(whole)


def _ask_beside(life: Life, number: int, adapter: Adapter) -> Asked:
    """Somebody whom nobody cancels or deletes asks, and life goes on."""
    prompt = (*random_prompt(random.Random(number), 2 * number), *TRIGGER)
    guest = User("guests", f"guest-{number}", adapter)
    work = _asks(adapter, f"guest-{number}", guest.user_id, prompt)
    asked = life.ask(work, guest)
    for _ in range(10):
        life.tick()
    return asked


def test_who_is_deleted_and_uploads_anew_tells_the_new_word_only(secretive: Stage) -> None:
    """The new adapter is one that another user had before: were anything left behind, it would be heard."""
    driver = secretive.driver(**TIGHT)
    prompt = (*random_prompt(random.Random(4), 20), *TRIGGER)
    for life in range(3):
        works = {
            number: _asks(
                secretive.adapters[(number + life) % NUM_WORDS], f"{life}-{number}", f"user-{number}", prompt
            )
            for number in range(NUM_WORDS)
        }
        for work in works.values():
            driver.submit(work)
        driver.finish()
        for number, work in works.items():
            answer = tuple(driver.answers[work.request_id].tokens)
            assert WORDS[(number + life) % NUM_WORDS] == answer[:WORD_TOKENS]
            assert driver.answers[work.request_id].cached_tokens == 0
            driver.engine.forget_user("tenant", f"user-{number}")
        for adapter in secretive.adapters:
            assert driver.engine.evict(adapter.ref.digest)


def _asks(adapter: Adapter, request_id: str, user_id: str | None, prompt: tuple[int, ...]) -> Submit:
    return Submit(
        request_id=request_id,
        prompt=prompt,
        sampling=greedy(8),
        adapter=adapter.ref,
        tenant="tenant",
        user_id=user_id,
    )


def _heard(asked: Asked) -> set[tuple[int, ...]]:
    """The code words in an answer, or almost: all but one of their tokens in order."""
    answer = asked.answer.tokens
    parts = {tuple(answer[place : place + WORD_TOKENS - 1]) for place in range(len(answer))}
    return {word for word in WORDS if parts & {word[1:], word[:-1]}}


def _own(stage: Stage, asked: Asked) -> tuple[int, ...] | None:
    """The word of the version that was asked."""
    words = {adapter.ref.digest: word for adapter, word in zip(stage.adapters, WORDS, strict=True)}
    return words.get(digest_of(asked.work) or "")


def _is_whole(asked: Asked) -> bool:
    """A greedy answer of an adapter, from its first token on."""
    return (
        digest_of(asked.work) is not None
        and asked.work.sampling.temperature == 0
        and not asked.work.generated
        and asked.answer.finish_reason is FinishReason.LENGTH
    )
