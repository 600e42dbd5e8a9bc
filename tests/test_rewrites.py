"""Faster modules: the same logits with adapters and without, for every architecture; else the old ones."""

from __future__ import annotations

import logging
import random
from pathlib import Path

import pytest
import torch

from engine_kit import (
    CONFIGS,
    Adapter,
    Driver,
    greedy,
    make_adapter,
    new_engine,
    prepare_model,
    random_prompt,
    tiny_model,
)
from tunefleet.core import Manifest
from tunefleet.messages import Submit
from tunefleet.runtime import packed, rewrites
from tunefleet.runtime.engine import Engine
from tunefleet.runtime.fused_attention import FusedAttention
from tunefleet.runtime.fused_layer import FusedLayer
from tunefleet.runtime.fused_mlp import FusedMlp
from tunefleet.runtime.lora import wrap_linears
from tunefleet.runtime.model import load_model
from tunefleet.runtime.rewrites import Rewrites

CPU = torch.device("cpu")
FUSED = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3")


def rewritten(folder: Path, manifest: Manifest) -> tuple[torch.nn.Module, Rewrites]:
    model = load_model(folder)
    wrap_linears(model, manifest.linears)
    rewrites = Rewrites(model, manifest, CPU)
    while rewrites.apply_next():
        pass
    return model, rewrites


def logits_of(engine: Engine, adapters: list[Adapter]) -> list[torch.Tensor]:
    """Of each step that samples: prompts longer than any window, with and without adapters, then decoding."""
    driver = Driver(engine, adapters)
    generator = random.Random(0)
    for index, adapter in enumerate([None, adapters[0], adapters[1], adapters[0]]):
        prompt = random_prompt(generator, 5 + 7 * index)
        ref = adapter.ref if adapter else None
        driver.submit(Submit(request_id=str(index), prompt=prompt, sampling=greedy(6), adapter=ref))
    steps = []
    while engine.scheduler:
        driver.step()
        assert engine.last_logits is None or engine.last_logits.isfinite().all()
        steps.append(engine.last_logits if engine.last_logits is not None else torch.empty(0))
    return steps


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_the_same_with_and_without_rewrites(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    manifest = prepare_model(model, tmp_path / "base")
    shape = {"target_modules": "all-linear", "fan_in_fan_out": name == "gpt2"}
    adapters = [
        make_adapter(model, manifest, tmp_path / str(seed), seed, r=4 * (seed + 1), **shape)
        for seed in range(2)
    ]
    plain, faster = (new_engine(tmp_path / "base", manifest) for _ in range(2))
    while faster.improve():
        pass
    expected, actual = logits_of(plain, adapters), logits_of(faster, adapters)
    assert len(expected) == len(actual)
    for before, after in zip(expected, actual, strict=True):
        torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FUSED)
def test_attention_and_mlp_of_every_layer_are_fused_and_norms_are_torchs(name: str, tmp_path: Path) -> None:
    manifest = prepare_model(tiny_model(name), tmp_path / "base")
    model, rewrites = rewritten(tmp_path / "base", manifest)
    kinds = [type(module) for module in model.modules()]
    assert manifest.num_layers == kinds.count(FusedAttention) == kinds.count(FusedMlp)
    assert (0 if name.startswith("gemma") else manifest.num_layers) == kinds.count(FusedLayer)
    assert not any(kind.__module__.startswith("transformers") and "Norm" in kind.__name__ for kind in kinds)
    assert len(set(rewrites.applied)) == len(rewrites.applied)


def test_bytes_are_those_of_the_copies(tmp_path: Path) -> None:
    model = tiny_model("llama")
    manifest = prepare_model(model, tmp_path / "base")
    _, rewrites = rewritten(tmp_path / "base", manifest)
    copied = sum(spec.in_features * spec.out_features for spec in manifest.linears.values())
    copied += model.lm_head.weight.numel()
    assert 4 * copied == rewrites.num_bytes


def test_without_torchs_private_ops_products_are_merged_but_not_packed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "PACKED_DTYPES", frozenset())
    manifest = prepare_model(tiny_model("llama"), tmp_path / "base")
    model, rewrites = rewritten(tmp_path / "base", manifest)
    assert FusedAttention in {type(module) for module in model.modules()}
    assert "lm_head" not in rewrites.applied


def test_a_replacement_that_computes_something_else_is_dropped_and_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Wrong(FusedMlp):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 1.01

    monkeypatch.setattr(rewrites, "FusedMlp", Wrong)
    manifest = prepare_model(tiny_model("llama"), tmp_path / "base")
    with caplog.at_level(logging.INFO, logger="tunefleet.engine"):
        model, made = rewritten(tmp_path / "base", manifest)
    assert not any(isinstance(module, FusedMlp) for module in model.modules())
    dropped = [record for record in caplog.records if "Wrong differs by" in record.message]
    assert manifest.num_layers == len(dropped)
    assert "model.layers.0.mlp.gate_proj" in made.applied  # its parts still are


def test_a_merged_product_that_forgets_adapters_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed, "current_plan", lambda: None)
    manifest = prepare_model(tiny_model("qwen2"), tmp_path / "base")
    model, made = rewritten(tmp_path / "base", manifest)
    assert {"lm_head"} == {path for path in made.applied if "norm" not in path}
    assert not any(isinstance(module, (FusedAttention, FusedMlp)) for module in model.modules())
