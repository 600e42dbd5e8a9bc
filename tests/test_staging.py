"""A model's way to a device: every byte, in every shape, once; and a device that is as late as it may be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig

from base_kit import spread_model
from engine_kit import prepare_model
from tunefleet.runtime.model import load_model
from tunefleet.runtime.staging import Arrival, Buffer, Staging, move, open_on

CPU = torch.device("cpu")
BUFFER_BYTES = [1, 7, 64, 1 << 20]


class Late:
    """A copy that happens when somebody waits for it."""

    def __init__(self, filled: torch.Tensor, place: torch.Tensor) -> None:
        self._filled = filled
        self._place = place

    def synchronize(self) -> None:
        self._place.copy_(self._filled)


class LateBuffer(Buffer):
    """Its device reads at the last moment: what is in the buffer then is what arrives."""

    def _read(self, filled: torch.Tensor, place: torch.Tensor) -> Arrival | None:
        return Late(filled, place)


class Odd(nn.Module):
    """A tensor of every kind that a model may have."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(13, 7), requires_grad=False)
        self.tied = self.matrix
        self.short = nn.Parameter(torch.randn(5).to(torch.bfloat16), requires_grad=False)
        self.scalar = nn.Parameter(torch.tensor(2.5, dtype=torch.float64))
        self.empty = nn.Parameter(torch.empty(0, 3), requires_grad=False)
        self.turned = nn.Parameter(torch.randn(4, 6).t(), requires_grad=False)
        both = torch.randn(2, 9)
        self.first = nn.Parameter(both[0], requires_grad=False)
        self.second = nn.Parameter(both[1, 1::2], requires_grad=False)
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("number", torch.tensor(1 << 40), persistent=False)
        self.register_buffer("repeated", torch.arange(3).expand(4, 3))
        self.inner = nn.Module()
        self.inner.register_buffer("mask", self.mask)


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    parameters = model.named_parameters(remove_duplicate=False)
    return {**dict(parameters), **dict(model.named_buffers(remove_duplicate=False))}


def layouts(model: nn.Module) -> dict[str, object]:
    return {
        name: (tensor.dtype, tensor.size(), tensor.stride(), tensor.storage_offset(), tensor.requires_grad)
        for name, tensor in tensors(model).items()
    }


@pytest.mark.parametrize("num_bytes", BUFFER_BYTES)
@pytest.mark.parametrize("kind", [Buffer, LateBuffer])
def test_every_tensor_arrives_as_it_was(kind: type[Buffer], num_bytes: int) -> None:
    torch.manual_seed(0)
    model = Odd()
    before = {name: tensor.clone() for name, tensor in tensors(model).items()}
    addresses = {name: tensor.data_ptr() for name, tensor in tensors(model).items() if tensor.numel()}
    expected = layouts(model)
    move(model, Staging(CPU, [kind(CPU, num_bytes), kind(CPU, num_bytes)]))
    assert expected == layouts(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors(model).items())
    assert not any(tensors(model)[name].data_ptr() == address for name, address in addresses.items())


def test_what_was_one_tensor_or_one_memory_still_is() -> None:
    model = Odd()
    move(model, Staging(CPU, [Buffer(CPU, 16), Buffer(CPU, 16)]))
    assert model.tied is model.matrix
    assert model.inner.mask is model.mask
    assert model.first.untyped_storage().data_ptr() == model.second.untyped_storage().data_ptr()
    assert isinstance(model.matrix, nn.Parameter)


@given(
    sizes=st.lists(st.integers(0, 200), max_size=6),
    buffers=st.lists(st.integers(1, 64), min_size=1, max_size=3),
)
def test_no_buffer_is_filled_before_its_device_has_read_it(sizes: list[int], buffers: list[int]) -> None:
    staging = Staging(CPU, [LateBuffer(CPU, num_bytes) for num_bytes in buffers])
    sources = [torch.randint(256, (size,), dtype=torch.uint8) for size in sizes]
    targets = [staging.copy(source.untyped_storage()) for source in sources]
    staging.wait()
    assert [source.tolist() for source in sources] == [target.tolist() for target in targets]


def test_on_a_cpu_the_mapped_pages_are_used_as_they_are() -> None:
    model = Odd()
    before = {name: tensor.data_ptr() for name, tensor in tensors(model).items()}
    assert open_on(model, CPU) is model
    assert before == {name: tensor.data_ptr() for name, tensor in tensors(model).items()}


def test_a_mapped_base_answers_the_same_without_its_file(tmp_path: Path) -> None:
    """No tensor is left behind in the file: it is overwritten, and nothing changes."""
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=True,
    )
    prepare_model(spread_model(config), tmp_path / "base")
    model = load_model(tmp_path / "base")
    expected = {name: tensor.clone() for name, tensor in tensors(model).items()}
    move(model, Staging(CPU, [Buffer(CPU, 1000), Buffer(CPU, 1000)]))
    file = tmp_path / "base" / "model.safetensors"
    with file.open("r+b") as content:
        content.write(bytes(file.stat().st_size))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(torch.equal(expected[name], tensor) for name, tensor in tensors(model).items())
