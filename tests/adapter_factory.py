"""Builds adapters for tests: PEFT-format folders from numpy alone, and small manifests that they fit.

The file is put together by hand, so that tests can also build what no library would write.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tunefleet.core import ADAPTER_FILES, LinearSpec, Manifest

HIDDEN = 16
INTERMEDIATE = 24
NUM_LAYERS = 2
TARGETS = ("q_proj", "v_proj", "down_proj")

_SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN, HIDDEN // 2),
    "self_attn.v_proj": (HIDDEN, HIDDEN // 2),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (HIDDEN, INTERMEDIATE),
    "mlp.up_proj": (HIDDEN, INTERMEDIATE),
    "mlp.down_proj": (INTERMEDIATE, HIDDEN),
}


class RawTensor(NamedTuple):
    """A tensor as it stands in the file."""

    dtype: str
    shape: tuple[int, ...]
    content: bytes


def make_manifest(**changes: object) -> Manifest:
    """A base of two Llama layers."""
    fields: dict[str, object] = {
        "base_id": "tiny@0123456789ab",
        "name": "tiny",
        "architecture": "LlamaForCausalLM",
        "dtype": "float32",
        "weights_sha256": "0123456789ab" + "0" * 52,
        "hidden_size": HIDDEN,
        "num_layers": NUM_LAYERS,
        "vocab_size": 64,
        "max_model_len": 128,
        "eos_token_ids": (2,),
        "linears": {
            f"model.layers.{layer}.{name}": LinearSpec(*shape)
            for layer in range(NUM_LAYERS)
            for name, shape in _SHAPES.items()
        },
        "probe_max_diff": 0.0,
    }
    return Manifest(**{**fields, **changes})  # type: ignore[arg-type]


def make_adapter(
    folder: Path,
    manifest: Manifest,
    *,
    r: int = 4,
    targets: tuple[str, ...] = TARGETS,
    ranks: Mapping[str, int] | None = None,
    dtype: str = "F32",
    seed: int = 0,
    scale: float = 0.05,
    config: Mapping[str, object] | None = None,
) -> Path:
    """Writes a servable adapter and returns ``folder``.

    Args:
        ranks: rank by module path or short name, where it isn't ``r``; becomes ``rank_pattern``.
        config: fields of adapter_config.json to add or replace.
    """
    ranks = ranks or {}
    tensors: dict[str, RawTensor] = {}
    generator = np.random.default_rng(seed)
    for path, spec in manifest.linears.items():
        short = path.rpartition(".")[2]
        if short not in targets:
            continue
        rank = ranks.get(path, ranks.get(short, r))
        for matrix, shape in (("A", (rank, spec.in_features)), ("B", (spec.out_features, rank))):
            values = (generator.standard_normal(shape) * scale).astype(np.float32)
            tensors[f"base_model.model.{path}.lora_{matrix}.weight"] = raw_tensor(values, dtype)
    fields = {"r": r, "lora_alpha": 2 * r, "rank_pattern": dict(ranks), **(config or {})}
    write_config(folder, fields, targets)
    write_weights(folder, tensors)
    return folder


def write_config(folder: Path, changes: Mapping[str, object], targets: tuple[str, ...] = TARGETS) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    fields = {"peft_type": "LORA", "base_model_name_or_path": "tiny", "target_modules": list(targets)}
    (folder / "adapter_config.json").write_text(json.dumps({**fields, **changes}))


def write_weights(folder: Path, tensors: Mapping[str, RawTensor]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(file_bytes(tensors))


def raw_tensor(values: np.ndarray, dtype: str = "F32") -> RawTensor:
    """Float32 values in one of the served dtypes; BF16 cuts off the low bits."""
    if dtype == "BF16":
        content = (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    else:
        content = values.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()
    return RawTensor(dtype, values.shape, content)


def file_bytes(tensors: Mapping[str, RawTensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """A safetensors file, tensors in the order given."""
    header: dict[str, object] = {"__metadata__": dict(metadata or {"format": "pt"})}
    position = 0
    for name, tensor in tensors.items():
        end = position + len(tensor.content)
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    return with_header(header, b"".join(tensor.content for tensor in tensors.values()))


def with_header(header: object, content: bytes) -> bytes:
    """Any header (JSON text as bytes, or what becomes it) before any content."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    raw += b" " * (math.ceil(len(raw) / 8) * 8 - len(raw))
    return len(raw).to_bytes(8, "little") + raw + content


def adapter_files(folder: Path) -> dict[str, bytes]:
    """The two files of a folder, by name."""
    return {name: (folder / name).read_bytes() for name in ADAPTER_FILES}


def read_raw(folder: Path) -> dict[str, RawTensor]:
    """The tensors of a folder that this module wrote, to change and write again."""
    raw = (folder / "adapter_model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    content = raw[8 + length :]
    return {
        name: RawTensor(entry["dtype"], tuple(entry["shape"]), content[slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }
