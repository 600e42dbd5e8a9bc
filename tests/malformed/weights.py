"""Changes of an ordinary adapter's tensors, each with the refusal: code, tensor, and what it says."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from adapter_factory import RawTensor, raw_tensor

Q0 = "base_model.model.model.layers.0.self_attn.q_proj"
A, B = f"{Q0}.lora_A.weight", f"{Q0}.lora_B.weight"

Tensors = dict[str, RawTensor]


def f32(*shape: int, value: float = 0.1) -> RawTensor:
    return raw_tensor(np.full(shape, value, np.float32))


def without(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if name not in names}


def plus(name: str, tensor: RawTensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: tensor}


def value_at(name: str, index: int, value: float, dtype: str = "F32") -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        values = np.full(tensors[name].shape, 0.1, np.float32)
        values.flat[index] = value
        return {**tensors, name: raw_tensor(values, dtype)}

    return change


DENSE = f32(64, 16)
BAD_WEIGHTS = {
    "NaN": (value_at(A, 20, np.nan), "not_finite", A, "nan in row 1"),
    "infinity": (value_at(B, 63, np.inf), "not_finite", B, "inf in row 15"),
    "minus infinity": (value_at(B, 0, -np.inf), "not_finite", B, "-inf in row 0"),
    "NaN in bf16": (value_at(A, 5, np.nan, "BF16"), "not_finite", A, "nan in row 0"),
    "infinity in fp16": (value_at(A, 5, np.inf, "F16"), "not_finite", A, "inf in row 0"),
    "far too large": (value_at(B, 5, 1e30), "out_of_range", B, "scaling"),
    "A missing": (without(A), "missing_tensor", B, "no lora_A"),
    "B missing": (without(B), "missing_tensor", A, "no lora_B"),
    "no tensors": (lambda _: {}, "adapter_has_no_effect", "adapter_model.safetensors", "no tensors"),
    "another layer": (
        plus("base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight", f32(4, 16)),
        "unknown_module",
        "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight",
        "no linear layer of tiny",
    ),
    "a path with dots": (
        plus("base_model.model.../../etc/passwd.lora_A.weight", f32(4, 16)),
        "unknown_module",
        "base_model.model.../../etc/passwd.lora_A.weight",
        "no linear layer",
    ),
    "PEFT's prefix twice": (
        plus(f"base_model.model.{A}", f32(4, 16)),
        "unknown_module",
        f"base_model.model.{A}",
        "no linear layer",
    ),
    "same module twice": (
        plus(A.removeprefix("base_model.model."), f32(4, 16)),
        "duplicate_tensor",
        A.removeprefix("base_model.model."),
        "second time",
    ),
    "another adapter's name": (
        plus(A.replace(".weight", ".other.weight"), f32(4, 16)),
        "unknown_module",
        A.replace(".weight", ".other.weight"),
        "is not <module>.lora_A.weight",
    ),
    "another matrix": (
        plus(A.replace("lora_A", "lora_C"), f32(4, 16)),
        "unknown_module",
        A.replace("lora_A", "lora_C"),
        "is not <module>.lora_A.weight",
    ),
    "embedding": (
        plus("base_model.model.model.embed_tokens.lora_embedding_A", f32(4, 64)),
        "unknown_module",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "embeddings are not served",
    ),
    "output head": (
        plus("base_model.model.lm_head.lora_A.weight", f32(4, 16)),
        "unknown_module",
        "base_model.model.lm_head.lora_A.weight",
        "output head",
    ),
    "whole output head": (
        plus("base_model.model.lm_head.weight", DENSE),
        "unknown_module",
        "base_model.model.lm_head.weight",
        "output head",
    ),
    "DoRA": (
        plus(f"{Q0}.lora_magnitude_vector", f32(16)),
        "unknown_module",
        f"{Q0}.lora_magnitude_vector",
        "DoRA",
    ),
    "bias on B": (plus(f"{Q0}.lora_B.bias", f32(16)), "unknown_module", f"{Q0}.lora_B.bias", "lora_B"),
    "base's bias": (
        plus(f"{Q0}.base_layer.bias", f32(16)),
        "unknown_module",
        f"{Q0}.base_layer.bias",
        "bias='none'",
    ),
    "base's weight": (
        plus(f"{Q0}.base_layer.weight", f32(16, 16)),
        "unknown_module",
        f"{Q0}.base_layer.weight",
        "can't be replaced",
    ),
    "another module's bias": (
        plus("base_model.model.model.layers.0.self_attn.k_proj.bias", f32(8)),
        "unknown_module",
        "base_model.model.model.layers.0.self_attn.k_proj.bias",
        "bias='none'",
    ),
    "AdaLoRA": (plus(f"{Q0}.lora_E", f32(4, 1)), "unknown_module", f"{Q0}.lora_E", "AdaLoRA"),
    "trained tokens": (
        plus("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", f32(1, 16)),
        "unknown_module",
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta",
        "not served",
    ),
    "A too wide": (plus(A, f32(4, 17)), "shape_mismatch", A, r"\[4, 16\]"),
    "B too long": (plus(B, f32(17, 4)), "shape_mismatch", B, r"\[16, 4\]"),
    "A transposed": (plus(A, f32(16, 4)), "shape_mismatch", A, r"\[16, 4\]"),
    "B transposed": (plus(B, f32(4, 16)), "shape_mismatch", B, r"\[4, 16\]"),
    "rank not the config's": (plus(A, f32(8, 16)), "shape_mismatch", A, r"\[8, 16\]"),
    "A flat": (plus(A, f32(64)), "shape_mismatch", A, r"\[64\]"),
    "A of three dimensions": (plus(A, f32(1, 4, 16)), "shape_mismatch", A, r"\[1, 4, 16\]"),
}
