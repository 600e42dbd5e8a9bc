"""The engine in 16 bits: close to the reference in 32, adapters or none, before and after rewrites."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest
import torch

from engine_kit import Adapter, Driver, Oracle, greedy, make_adapter, new_engine, random_prompt, tiny_model
from tunefleet.adapters_store.prepare import prepare_adapter
from tunefleet.adapters_store.slot_layout import SlotLayout
from tunefleet.adapters_store.validation import check_adapter
from tunefleet.core import Manifest
from tunefleet.messages import Submit
from tunefleet.runtime.model import save_model
from tunefleet.runtime.prepare import describe, write_manifest

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
NUM_TOKENS = 24
MOST_REGRET = {"bfloat16": 0.1, "float16": 0.02}  # of the logits' spread: what a chosen token may be behind


def prepared_as(dtype: str, folder: Path) -> Manifest:
    model = tiny_model("llama")
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    narrow = copy.deepcopy(model).to(getattr(torch, dtype))
    for name, buffer in buffers.items():  # RoPE's frequencies stay as they are, as when a base is prepared
        owner, _, attribute = name.rpartition(".")
        narrow.get_submodule(owner)._buffers[attribute] = buffer
    folder.mkdir()
    manifest = describe(narrow, name="tiny", weights_sha256="0" * 64, dtype=dtype)
    narrow.config.save_pretrained(folder)
    save_model(narrow, folder)
    write_manifest(manifest, folder)
    return manifest


def prepared_adapter(adapter: Adapter, manifest: Manifest, dtype: str) -> Adapter:
    checked = check_adapter(adapter.folder, manifest, max_rank=64)
    path = adapter.folder / f"{dtype}.safetensors"
    layout = SlotLayout(manifest.linears)
    prepare_adapter(adapter.folder, checked, path, layout=layout, dtype=dtype)  # type: ignore[arg-type]
    return Adapter(adapter.folder, path, adapter.ref)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("is_improved", [False, True])
def test_sixteen_bits_choose_what_the_reference_nearly_would(
    dtype: str, is_improved: bool, tmp_path: Path
) -> None:
    manifest = prepared_as(dtype, tmp_path / "base")
    model = tiny_model("llama")
    wide = [
        make_adapter(
            model, manifest, tmp_path / f"a{seed}", seed, r=rank, lora_alpha=16, target_modules=TARGETS
        )
        for seed, rank in enumerate((4, 16))
    ]
    adapters = [prepared_adapter(adapter, manifest, dtype) for adapter in wide]
    engine = new_engine(tmp_path / "base", manifest)
    while is_improved and engine.improve():
        pass
    driver, generator = Driver(engine, adapters), random.Random(3)
    works = [
        Submit(
            request_id=str(index),
            prompt=random_prompt(generator, 10 + index),
            sampling=greedy(NUM_TOKENS),
            adapter=adapter.ref if adapter else None,
        )
        for index, adapter in enumerate([*adapters, None] * 2)
    ]
    for work in works:
        driver.submit(work)
    driver.finish()
    oracle = Oracle(model, adapters)
    for work in works:
        answer = driver.answers[work.request_id].tokens
        assert len(answer) == NUM_TOKENS
        logits = oracle.logits(work.adapter.digest if work.adapter else None, list(work.prompt), answer)
        chosen = logits.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
        regret = (logits.max(dim=-1).values - chosen) / logits.std(dim=-1)
        assert float(regret.max()) < MOST_REGRET[dtype]
