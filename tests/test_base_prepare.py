"""Preparing a base: what is in the folder, and that it is there whole or not at all."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoTokenizer,
    BloomConfig,
    FalconConfig,
    Lfm2Config,
    LlamaConfig,
    MptConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
)

from base_kit import VOCAB, save_tokenizer, spread_model, write_base
from engine_kit import CONFIGS, tiny_model
from tunefleet.core import LinearSpec
from tunefleet.errors import BaseModelError
from tunefleet.runtime.base import MANIFEST_FILE, read_manifest
from tunefleet.runtime.model import load_model
from tunefleet.runtime.prepare import describe, prepare
from tunefleet.runtime.probe import MAX_DIFF

SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
ROPE = {"rope_theta": 10_000.0}
REFUSED: dict[str, tuple[PreTrainedConfig, str]] = {
    "dynamic": (
        LlamaConfig(**SMALL, rope_parameters={**ROPE, "rope_type": "dynamic", "factor": 2.0}),
        "LlamaForCausalLM with RoPE 'dynamic' can't be served",
    ),
    "longrope": (
        Phi3Config(
            **SMALL,
            original_max_position_embeddings=64,
            rope_parameters={
                **ROPE,
                "rope_type": "longrope",
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 64,
            },
        ),
        "Phi3ForCausalLM with RoPE 'longrope' can't be served",
    ),
    "conv": (
        Lfm2Config(**{**SMALL, "num_hidden_layers": 2}, layer_types=["conv", "full_attention"]),
        "Lfm2ForCausalLM can't be served",
    ),
    "bloom": (
        BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=1, n_head=4),
        "BloomForCausalLM can't be served",
    ),
    "mpt": (
        MptConfig(vocab_size=VOCAB, d_model=32, n_heads=4, n_layers=1, max_seq_len=256),
        "MptForCausalLM can't be served",
    ),
    "falcon": (
        FalconConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=4),
        "FalconForCausalLM can't be served",
    ),
}


def run_prepare(source: Path, folder: Path, dtype: str = "float32") -> None:
    prepare(str(source), folder, name="tiny", dtype=dtype, cache_dir=folder.parent / "cache")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tiny_model("llama"), tmp_path_factory.mktemp("source") / "tiny")


def test_a_prepared_base_tells_what_it_is(source: Path, tmp_path: Path) -> None:
    run_prepare(source, tmp_path / "base")
    manifest = read_manifest(tmp_path / "base")
    sha256 = hashlib.sha256((source / "model.safetensors").read_bytes()).hexdigest()
    assert (f"tiny@{sha256[:12]}", "tiny", sha256) == (
        manifest.base_id,
        manifest.name,
        manifest.weights_sha256,
    )
    assert (manifest.architecture, manifest.dtype) == ("LlamaForCausalLM", "float32")
    assert (
        manifest.hidden_size,
        manifest.num_layers,
        manifest.vocab_size,
        manifest.max_model_len,
    ) == (32, 3, VOCAB, 512)
    assert manifest.eos_token_ids == (1,)
    assert len(manifest.linears) == 3 * 7
    assert LinearSpec(32, 16) == manifest.linears["model.layers.2.self_attn.k_proj"]
    assert LinearSpec(64, 32) == manifest.linears["model.layers.0.mlp.down_proj"]
    assert 0 < manifest.probe_max_diff < MAX_DIFF


def test_a_prepared_base_brings_its_tokenizer(source: Path, tmp_path: Path) -> None:
    run_prepare(source, tmp_path / "base")
    assert AutoTokenizer.from_pretrained(tmp_path / "base").encode("w7 w9") == [7, 9]
    assert (tmp_path / "base" / "generation_config.json").exists()


def test_bf16_rounds_the_weights_and_not_the_rope_frequencies(source: Path, tmp_path: Path) -> None:
    run_prepare(source, tmp_path / "exact")
    run_prepare(source, tmp_path / "rounded", "bfloat16")
    exact, rounded = load_model(tmp_path / "exact"), load_model(tmp_path / "rounded")
    exact_parameters = dict(exact.named_parameters())
    for name, parameter in rounded.named_parameters():
        assert torch.equal(exact_parameters[name].bfloat16(), parameter)
    assert [name for name, _ in exact.named_buffers()] == [name for name, _ in rounded.named_buffers()]
    for name, buffer in rounded.named_buffers():
        assert buffer.dtype is torch.float32
        assert torch.equal(exact.get_buffer(name), buffer)
    manifests = [read_manifest(tmp_path / name) for name in ("exact", "rounded")]
    assert [manifest.dtype for manifest in manifests] == ["float32", "bfloat16"]
    assert manifests[0].base_id == manifests[1].base_id
    assert manifests[0].probe_max_diff == manifests[1].probe_max_diff


def test_a_bf16_base_computes_what_transformers_computes_in_bf16(source: Path, tmp_path: Path) -> None:
    """Far positions, where rounded RoPE frequencies would show at once."""
    from transformers import AutoModelForCausalLM

    run_prepare(source, tmp_path / "base", "bfloat16")
    ours = load_model(tmp_path / "base")
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    positions = torch.tensor([[501]])
    hidden = torch.zeros(1, 1, 32, dtype=torch.bfloat16)
    for mine, other in zip(
        ours.model.rotary_emb(hidden, positions), theirs.model.rotary_emb(hidden, positions), strict=True
    ):
        assert torch.equal(other, mine)


def test_a_base_that_is_prepared_again_is_replaced_whole(source: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "left-over").write_text("of a version before")
    run_prepare(source, base)
    assert not (base / "left-over").exists()
    assert (base / MANIFEST_FILE).exists()
    assert [base] == list(tmp_path.iterdir())


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_base_that_can_not_be_served_is_refused_by_name_and_leaves_nothing(
    name: str, tmp_path: Path
) -> None:
    config, message = REFUSED[name]
    source = write_base(spread_model(config), tmp_path / "source")
    (tmp_path / "bases").mkdir()
    with pytest.raises(BaseModelError, match=message):
        run_prepare(source, tmp_path / "bases" / "base")
    assert list((tmp_path / "bases").iterdir()) == []


def test_a_refusal_keeps_what_was_prepared_before(source: Path, tmp_path: Path) -> None:
    run_prepare(source, tmp_path / "bases" / "base")
    before = (tmp_path / "bases" / "base" / MANIFEST_FILE).read_bytes()
    bad = write_base(spread_model(REFUSED["dynamic"][0]), tmp_path / "bad")
    with pytest.raises(BaseModelError):
        run_prepare(bad, tmp_path / "bases" / "base")
    assert before == (tmp_path / "bases" / "base" / MANIFEST_FILE).read_bytes()


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "source")
    with pytest.raises(BaseModelError, match="can't be loaded"):
        run_prepare(tmp_path / "source", tmp_path / "base")


def test_a_base_without_tokenizer_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "source")
    (tmp_path / "bases").mkdir()
    with pytest.raises(BaseModelError, match="tokenizer"):
        run_prepare(tmp_path / "source", tmp_path / "bases" / "base")
    assert list((tmp_path / "bases").iterdir()) == []


def with_eos(model: PreTrainedModel, of_config: object, of_generation: object) -> PreTrainedModel:
    model.config.eos_token_id = of_config
    model.generation_config.eos_token_id = of_generation
    return model


@pytest.mark.parametrize(
    ("of_config", "of_generation", "expected"),
    [(5, None, (5,)), (5, [9, 7], (5, 7, 9)), ([5, 6], 6, (5, 6)), (None, None, ())],
)
def test_end_tokens_come_from_both_configurations(
    of_config: object, of_generation: object, expected: tuple[int, ...]
) -> None:
    model = with_eos(tiny_model("llama"), of_config, of_generation)
    assert expected == describe(model, name="x", weights_sha256="0" * 64, dtype="float32").eos_token_ids


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_the_head_is_no_layer_that_adapters_may_target(name: str) -> None:
    manifest = describe(tiny_model(name), name="x", weights_sha256="0" * 64, dtype="float32")
    assert "lm_head" not in manifest.linears
    assert {name == "gpt2"} == {spec.fan_in_fan_out for spec in manifest.linears.values()}


def test_conv1d_layers_are_told_as_in_and_out(tmp_path: Path) -> None:
    linears = describe(tiny_model("gpt2"), name="x", weights_sha256="0" * 64, dtype="float32").linears
    assert LinearSpec(32, 96, fan_in_fan_out=True) == linears["transformer.h.0.attn.c_attn"]
    assert LinearSpec(128, 32, fan_in_fan_out=True) == linears["transformer.h.0.mlp.c_proj"]
