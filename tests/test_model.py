"""A prepared base in memory: all of it, mapped, tied where it was tied."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from base_kit import spread_model
from engine_kit import CONFIGS, prepare_model, tiny_model
from tunefleet.errors import BaseModelError
from tunefleet.runtime.base import MANIFEST_FILE
from tunefleet.runtime.model import ALIASES_FILE, WEIGHTS_FILE, load_model

TIED = LlamaConfig(
    vocab_size=128,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    max_position_embeddings=64,
    bos_token_id=0,
    eos_token_id=1,
    tie_word_embeddings=True,
)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_every_parameter_and_buffer_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    """Buffers above all: RoPE's are computed, never saved by transformers."""
    model = tiny_model(name)
    prepare_model(model, tmp_path / "base")
    loaded = load_model(tmp_path / "base")
    for kind in ("named_parameters", "named_buffers"):
        expected, found = dict(getattr(model, kind)()), dict(getattr(loaded, kind)())
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[path], found[path]) for path in expected)
    assert bool(list(loaded.named_buffers())) == (name != "gpt2")


def test_a_loaded_model_is_ready_to_serve(tmp_path: Path) -> None:
    prepare_model(tiny_model("llama"), tmp_path / "base")
    model = load_model(tmp_path / "base")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {"cpu"} == {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]}
    assert model.config._attn_implementation == "tunefleet"


def test_loading_starts_no_thread(tmp_path: Path) -> None:
    """The parked process forks after it."""
    prepare_model(tiny_model("llama"), tmp_path / "base")
    before = len(os.listdir("/proc/self/task"))
    load_model(tmp_path / "base")
    assert before == len(os.listdir("/proc/self/task"))


def test_tied_weights_are_one_tensor_in_file_and_memory(tmp_path: Path) -> None:
    model = spread_model(TIED)
    prepare_model(model, tmp_path / "base")
    names = load_file(tmp_path / "base" / WEIGHTS_FILE)
    assert len({"lm_head.weight", "model.embed_tokens.weight"} & names.keys()) == 1
    loaded = load_model(tmp_path / "base")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, loaded.lm_head.weight)


def test_weights_are_mapped_from_their_file(tmp_path: Path) -> None:
    prepare_model(tiny_model("llama"), tmp_path / "base")
    model = load_model(tmp_path / "base")
    address = model.get_parameter("model.layers.0.mlp.up_proj.weight").data_ptr()
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    ranges = [(*(int(end, 16) for end in fields[0].split("-")), fields[-1]) for fields in maps]
    assert str(tmp_path / "base" / WEIGHTS_FILE) in {
        path for first, last, path in ranges if first <= address < last
    }


def test_a_tensor_that_is_missing_is_told_by_name(tmp_path: Path) -> None:
    prepare_model(tiny_model("llama"), tmp_path / "base")
    tensors = load_file(tmp_path / "base" / WEIGHTS_FILE)
    del tensors["model.rotary_emb.inv_freq"]
    save_file(tensors, tmp_path / "base" / WEIGHTS_FILE)
    with pytest.raises(BaseModelError, match=r"lacks model\.rotary_emb\.inv_freq"):
        load_model(tmp_path / "base")


@pytest.mark.parametrize("name", [WEIGHTS_FILE, ALIASES_FILE, MANIFEST_FILE])
def test_a_file_that_is_missing_or_cut_off_is_told(name: str, tmp_path: Path) -> None:
    prepare_model(tiny_model("llama"), tmp_path / "base")
    whole = (tmp_path / "base" / name).read_bytes()
    (tmp_path / "base" / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BaseModelError):
        load_model(tmp_path / "base")
    (tmp_path / "base" / name).unlink()
    with pytest.raises(BaseModelError):
        load_model(tmp_path / "base")
