"""The probe lets right engines pass and refuses what would answer wrongly."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2LMHeadModel,
    GptOssConfig,
    JambaConfig,
    Lfm2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3NextConfig,
)

from base_kit import spread_model
from engine_kit import CONFIGS, prepare_model, tiny_model
from tunefleet.errors import BaseModelError
from tunefleet.runtime.model import WEIGHTS_FILE
from tunefleet.runtime.prepare import describe
from tunefleet.runtime.probe import DECODE_TOKENS, MAX_DIFF, probe, probe_prompts

SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "tie_word_embeddings": False,
}
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1}
GPT_OSS = GptOssConfig(
    **SMALL,
    head_dim=8,
    num_local_experts=2,
    num_experts_per_tok=1,
    sliding_window=8,
    rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
)
WRONG: dict[str, PreTrainedConfig] = {
    "lfm2": Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]),
    "qwen3_next": Qwen3NextConfig(
        **SMALL,
        **EXPERTS,
        head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=2,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        layer_types=["linear_attention", "full_attention"],
    ),
    "jamba": JambaConfig(**SMALL, use_mamba_kernels=False),
}


def run_probe(model: PreTrainedModel, folder: Path, reference: PreTrainedModel | None = None) -> float:
    return probe(reference or model, prepare_model(model, folder), folder)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_architectures_that_the_engine_computes_right_pass(name: str, tmp_path: Path) -> None:
    assert 0 < run_probe(tiny_model(name), tmp_path / "base") < MAX_DIFF / 10


def test_attention_sinks_and_experts_pass(tmp_path: Path) -> None:
    assert run_probe(spread_model(GPT_OSS), tmp_path / "base") < MAX_DIFF / 10


@pytest.mark.parametrize("name", sorted(WRONG))
def test_layers_whose_state_is_outside_attention_are_refused(name: str, tmp_path: Path) -> None:
    """Convolutions, linear attention, recurrences: they run without an error."""
    model = spread_model(WRONG[name])
    with pytest.raises(BaseModelError, match=f"^{type(model).__name__} can't be served: .*differ"):
        run_probe(model, tmp_path / "base")


def test_rope_frequencies_that_came_out_wrong_are_caught(tmp_path: Path) -> None:
    model = tiny_model("llama")
    manifest = prepare_model(model, tmp_path / "base")
    tensors = load_file(tmp_path / "base" / WEIGHTS_FILE)
    tensors["model.rotary_emb.inv_freq"] *= 1.01
    save_file(tensors, tmp_path / "base" / WEIGHTS_FILE)
    with pytest.raises(BaseModelError, match="differ"):
        probe(model, manifest, tmp_path / "base")


def test_a_weight_that_came_out_wrong_is_caught(tmp_path: Path) -> None:
    model = tiny_model("llama")
    manifest = prepare_model(model, tmp_path / "base")
    tensors = load_file(tmp_path / "base" / WEIGHTS_FILE)
    tensors["model.layers.2.self_attn.o_proj.weight"][0] = 0
    save_file(tensors, tmp_path / "base" / WEIGHTS_FILE)
    with pytest.raises(BaseModelError, match="differ"):
        probe(model, manifest, tmp_path / "base")


class OffByOne(GPT2LMHeadModel):
    """Its positions begin at 1."""

    def forward(self, input_ids: torch.Tensor, **kwargs: object) -> object:
        positions = torch.arange(1, input_ids.shape[1] + 1).unsqueeze(0)
        return super().forward(input_ids=input_ids, position_ids=positions, **kwargs)


def test_positions_that_are_off_by_one_are_caught(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    shifted = OffByOne(model.config).eval()
    shifted.load_state_dict(model.state_dict())
    with pytest.raises(BaseModelError, match="differ"):
        run_probe(model, tmp_path / "base", reference=shifted)


class NoNumbers(GPT2LMHeadModel):
    """Answers long inputs with NaN, short ones well."""

    def forward(self, input_ids: torch.Tensor, **kwargs: object) -> object:
        output = super().forward(input_ids=input_ids, **kwargs)
        if input_ids.shape[1] > 60:
            output.logits = output.logits * float("nan")
        return output


def test_a_comparison_that_gives_no_number_is_a_refusal(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    broken = NoNumbers(model.config).eval()
    broken.load_state_dict(model.state_dict())
    with pytest.raises(BaseModelError, match="differ"):
        run_probe(model, tmp_path / "base", reference=broken)


def test_a_model_whose_logits_are_no_numbers_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(BaseModelError, match="not finite"):
        run_probe(model, tmp_path / "base")


@pytest.mark.parametrize(
    ("max_position_embeddings", "window", "lengths"),
    [(512, None, [17, 27, 52]), (512, 8, [17, 27, 52]), (512, 200, [68, 103, 205]), (20, None, [2, 4, 7])],
)
def test_prompts_run_past_the_window_and_fit_the_context(
    max_position_embeddings: int, window: int | None, lengths: list[int]
) -> None:
    config = {**SMALL, "max_position_embeddings": max_position_embeddings}
    model = spread_model(LlamaConfig(**config, sliding_window=window))
    manifest = describe(model, name="x", weights_sha256="0" * 64, dtype="float32")
    prompts = probe_prompts(model, manifest)
    assert lengths == [len(prompt) for prompt in prompts]
    assert prompts == probe_prompts(model, manifest)
    assert all(0 <= token < 128 for prompt in prompts for token in prompt)
    assert max(lengths) + DECODE_TOKENS < max_position_embeddings


def test_a_base_with_a_tiny_context_passes(tmp_path: Path) -> None:
    model = spread_model(LlamaConfig(**{**SMALL, "max_position_embeddings": 20}))
    assert run_probe(model, tmp_path / "base") < MAX_DIFF / 10


def test_the_error_of_an_architecture_that_can_not_run_is_a_refusal_too(tmp_path: Path) -> None:
    model = tiny_model("llama")
    manifest = prepare_model(model, tmp_path / "base")
    linears = {"model.missing": manifest.linears["model.layers.0.mlp.up_proj"]}
    unfit = msgspec.structs.replace(manifest, linears=linears)
    with pytest.raises(BaseModelError, match="LlamaForCausalLM can't be served by the engine"):
        probe(model, unfit, tmp_path / "base")
