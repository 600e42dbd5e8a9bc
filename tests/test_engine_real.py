"""The oracle on the real base: every shape of adapter, random ones and the examples' trained ones."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine_kit import Driver, Oracle, check_and_prepare, greedy, make_adapter, new_engine, random_prompt
from served import USERS, adapter_folder
from test_engine import SHAPES
from tunefleet.config import resolve
from tunefleet.core import FinishReason
from tunefleet.messages import Submit
from tunefleet.runtime.base import locate_base, read_manifest


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_mixed_adapters_on_the_real_base_answer_as_peft_does(tmp_path: Path) -> None:
    """Twelve adapters of ranks 1 to 64 and none, four slots, arrivals and departures at random."""
    base_dir = locate_base(resolve(keywords={"dtype": "float32"}))
    manifest = read_manifest(base_dir)
    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32).eval()
    adapters = [
        make_adapter(
            model, manifest, tmp_path / str(seed), seed, std=1.2 / int(str(shape["r"])) ** 0.5, **shape
        )
        for seed, shape in enumerate(SHAPES)
    ]
    folders = [Path(shutil.copytree(adapter_folder(user), tmp_path / user)) for user in USERS]
    adapters += [check_and_prepare(manifest, folder) for folder in folders]
    oracle = Oracle(model, adapters, max_models=1)
    generator = random.Random(11)
    works = [
        Submit(
            request_id=str(index),
            prompt=random_prompt(generator, generator.randrange(1, 80), manifest.vocab_size),
            sampling=greedy(generator.randrange(12, 24)),
            adapter=adapter.ref if adapter else None,
        )
        for index, adapter in enumerate([*adapters, None, *adapters])
    ]
    generator.shuffle(works)
    driver = Driver(new_engine(base_dir, manifest, max_num_seqs=6, max_active_adapters=4), adapters)
    for work in works:
        driver.submit(work)
        for _ in range(generator.randrange(4)):
            driver.step()
    driver.finish()
    changed = set()
    for work in sorted(works, key=lambda work: work.adapter.digest if work.adapter else ""):
        digest = work.adapter.digest if work.adapter else None
        answer = driver.answers[work.request_id]
        assert answer.finish_reason is FinishReason.LENGTH
        oracle.check(digest, list(work.prompt), answer.tokens)
        if not oracle.agrees(None, list(work.prompt), answer.tokens):
            changed.add(digest)
    assert {adapter.ref.digest for adapter in adapters} == changed
