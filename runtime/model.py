"""A prepared base model in memory: built on meta, weights and buffers mapped from its file."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tunefleet.errors import BaseModelError
from tunefleet.runtime import attention
from tunefleet.runtime.base import read_manifest

WEIGHTS_FILE = "model.safetensors"
ALIASES_FILE = "aliases.json"  # tensors that are another one under a second name (tied embeddings)


def load_model(base_dir: Path) -> nn.Module:
    """The base with the engine's attention, on CPU, its memory shared with every process that maps the file.

    Starts no thread, so that the parked process may fork after it.

    Raises:
        BaseModelError: the folder is not a whole prepared base.
    """
    attention.register()
    config = AutoConfig.from_pretrained(base_dir)
    manifest = read_manifest(base_dir)
    with torch.device("meta"):
        model: nn.Module = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=getattr(torch, manifest.dtype), attn_implementation=attention.NAME
        )
    try:
        _assign(model, base_dir)
    except (OSError, json.JSONDecodeError, SafetensorError) as error:
        raise BaseModelError(
            f"the prepared base in {base_dir} is damaged ({error}); run `tunefleet base prepare --force`"
        ) from error
    model.requires_grad_(requires_grad=False)
    return model.eval()


def save_model(model: nn.Module, out: Path) -> None:
    """Writes parameters and all buffers, also those that transformers doesn't save but computes."""
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[int, tuple[int, ...]], str] = {}
    for name, tensor in _named_tensors(model):
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if key in seen:
            aliases[name] = seen[key]
        else:
            seen[key] = name
            tensors[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
    save_file(tensors, out / WEIGHTS_FILE, metadata={"format": "pt"})
    (out / ALIASES_FILE).write_text(json.dumps(aliases, indent=1))


def _named_tensors(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    parameters = model.named_parameters(remove_duplicate=False)
    buffers = model.named_buffers(remove_duplicate=False)
    return [*parameters, *buffers]


def _assign(model: nn.Module, base_dir: Path) -> None:
    aliases: dict[str, str] = json.loads((base_dir / ALIASES_FILE).read_text())
    with safe_open(base_dir / WEIGHTS_FILE, framework="pt", device="cpu") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    tensors.update({name: tensors[target] for name, target in aliases.items()})
    parameters: dict[int, nn.Parameter] = {}
    for name, old in _named_tensors(model):
        if name not in tensors:
            raise BaseModelError(f"the prepared base lacks {name}; run `tunefleet base prepare --force`")
        tensor = tensors[name]
        owner_path, _, attribute = name.rpartition(".")
        owner = model.get_submodule(owner_path)
        if isinstance(old, nn.Parameter):
            tied = parameters.setdefault(id(tensor), nn.Parameter(tensor, requires_grad=False))
            owner._parameters[attribute] = tied
        else:
            owner._buffers[attribute] = tensor.to(old.dtype)  # what transformers makes it for this dtype
