"""The oracle on the real base: every shape of adapter, random ones and the examples' trained ones."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from asking import make_users
from churn import COMMON_EVENTS, Life, replayable
from engine_kit import (
    Driver,
    Oracle,
    Stage,
    check_and_prepare,
    digest_of,
    greedy,
    make_adapter,
    new_engine,
    random_prompt,
)
from served import QUESTIONS, USERS, adapter_folder
from test_engine import SHAPES
from tunefleet.config import resolve
from tunefleet.core import FinishReason
from tunefleet.messages import Submit
from tunefleet.runtime.base import locate_base, read_manifest
from tunefleet.runtime.kv import bytes_per_token
from tunefleet.text import Tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

NUM_SLOTS = 3
AGREEMENT_FLOOR = 0.9  # of bf16's tokens with fp32's choice; measured: 0.984


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    """SmolLM2 in fp32 with 21 random adapters of ranks 1 to 64 and three trained ones."""
    root = tmp_path_factory.mktemp("real")
    base_dir = locate_base(resolve(keywords={"dtype": "float32"}))
    manifest = read_manifest(base_dir)
    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32).eval()
    adapters = [
        make_adapter(model, manifest, root / str(seed), seed, std=1.2 / int(str(shape["r"])) ** 0.5, **shape)
        for seed, shape in enumerate([*SHAPES, *SHAPES, *SHAPES[:3]])
    ]
    folders = [Path(shutil.copytree(adapter_folder(user), root / user)) for user in USERS]
    adapters += [check_and_prepare(manifest, folder) for folder in folders]
    return Stage(model, base_dir, manifest, adapters, Oracle(model, adapters, max_models=1))


def test_mixed_adapters_on_the_real_base_answer_as_peft_does(stage: Stage) -> None:
    """Thirteen adapters and none, four slots, arrivals and departures at random."""
    generator = random.Random(11)
    adapters = [*stage.adapters[: len(SHAPES)], *stage.adapters[-4:]]
    works = [
        Submit(
            request_id=str(index),
            prompt=random_prompt(generator, generator.randrange(1, 80), stage.manifest.vocab_size),
            sampling=greedy(generator.randrange(12, 24)),
            adapter=adapter.ref if adapter else None,
        )
        for index, adapter in enumerate([*adapters, None, *adapters[:6]])
    ]
    generator.shuffle(works)
    driver = stage.driver(max_num_seqs=6, max_active_adapters=4)
    for work in works:
        driver.submit(work)
        for _ in range(generator.randrange(4)):
            driver.step()
    driver.finish()
    changed = set()
    for work in sorted(works, key=lambda work: digest_of(work) or ""):
        answer = driver.answers[work.request_id]
        assert answer.finish_reason is FinishReason.LENGTH
        stage.oracle.check_answer(work, answer.tokens)
        if not stage.oracle.agrees(None, list(work.prompt), answer.tokens):
            changed.add(digest_of(work))
    assert changed == {adapter.ref.digest for adapter in adapters}


def test_a_life_of_a_hundred_requests_on_the_real_base(
    stage: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    """Eight times as many adapters as slots, too little KV, chunks, uploads, deletions, cancels."""
    kv_cache_bytes = 800 * bytes_per_token(stage.model.config, torch.float32)
    with replayable(42125) as seed:
        engine = stage.engine(
            max_num_seqs=6,
            max_batch_tokens=48,
            max_active_adapters=NUM_SLOTS,
            device_adapter_bytes=120 << 20,  # twelve pages of rank 8
            kv_cache_bytes=kv_cache_bytes,
        )
        life = Life(
            engine,
            stage.manifest,
            make_users(stage.adapters),
            stage.adapters,
            seed=seed,
            kv_cache_bytes=kv_cache_bytes,
            max_open_quiet=4,
            max_prompt=126,
            max_tokens=30,
        )
        life.live(100)
        with capsys.disabled():
            print("\n" + life.told())
        life.verify(stage.oracle)
        life.check_met(COMMON_EVENTS)


def test_bf16_agrees_with_fp32_on_most_tokens(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Of the base and the trained adapters on their own questions, told the same text so far."""
    base_dir = locate_base(resolve(keywords={"dtype": "bfloat16"}))
    manifest = read_manifest(base_dir)
    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32).eval()
    folders = [Path(shutil.copytree(adapter_folder(user), tmp_path / user)) for user in USERS]
    adapters = [check_and_prepare(manifest, folder) for folder in folders]
    tokenizer = Tokenizer(base_dir)
    questions = [QUESTIONS.demo, *(known.question for known in QUESTIONS.facts[:3])]
    prompts = [tuple(tokenizer.encode_chat([{"role": "user", "content": text}])) for text in questions]
    works = [
        Submit(request_id=f"{n}-{m}", prompt=prompt, sampling=greedy(48), adapter=adapter and adapter.ref)
        for n, adapter in enumerate([None, *adapters])
        for m, prompt in enumerate(prompts)
    ]
    driver = Driver(new_engine(base_dir, manifest, max_num_seqs=16), adapters)
    for work in works:
        driver.submit(work)
    while driver.engine.improve():
        driver.step()
    driver.finish()
    oracle = Oracle(model, adapters, max_models=1)
    equal = [
        chosen == token
        for work in works
        for tokens in [driver.answers[work.request_id].tokens]
        for chosen, token in zip(
            oracle.logits(digest_of(work), list(work.prompt), tokens).argmax(-1).tolist(), tokens, strict=True
        )
    ]
    with capsys.disabled():
        print(
            f"\nbf16: {sum(equal)} of {len(equal)} tokens are fp32's choice ({sum(equal) / len(equal):.1%})"
        )
    assert sum(equal) / len(equal) > AGREEMENT_FLOOR
