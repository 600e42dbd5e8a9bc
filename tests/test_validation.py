from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from adapter_factory import (
    make_adapter,
    make_manifest,
    raw_tensor,
    read_raw,
    write_config,
    write_weights,
)
from malformed.weights import BAD_WEIGHTS, A, B, Tensors, f32
from tunefleet.adapters_store.validation import CheckedAdapter, check_adapter
from tunefleet.core import LinearSpec
from tunefleet.errors import AdapterInvalid

MANIFEST = make_manifest()


def check(folder: Path, *, max_rank: int = 64) -> CheckedAdapter:
    return check_adapter(folder, MANIFEST, max_rank=max_rank)


def refusal_of(folder: Path, *, max_rank: int = 64) -> AdapterInvalid:
    with pytest.raises(AdapterInvalid) as refusal:
        check(folder, max_rank=max_rank)
    return refusal.value


def test_an_ordinary_adapter_is_described(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path, MANIFEST, r=4)
    checked = check(folder)
    files = [folder / "adapter_config.json", folder / "adapter_model.safetensors"]
    assert sum(file.stat().st_size for file in files) == checked.size_bytes
    assert (checked.rank, checked.target_modules) == (4, ("down_proj", "q_proj", "v_proj"))
    assert set(checked.modules) == {
        f"model.layers.{layer}.{name}"
        for layer in range(2)
        for name in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    }
    plan = checked.modules["model.layers.0.self_attn.v_proj"]
    assert (plan.rank, plan.scaling, plan.in_features, plan.out_features) == (4, 2.0, 16, 8)
    assert checked.warnings == ()


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("rank", [1, 64])
def test_each_dtype_at_the_smallest_and_largest_rank_is_served(tmp_path: Path, dtype: str, rank: int) -> None:
    checked = check(make_adapter(tmp_path, MANIFEST, r=rank, dtype=dtype))
    assert rank == checked.rank
    assert {dtype} == {plan.dtype for plan in checked.modules.values()}


def test_dtypes_may_be_mixed_and_ranks_may_differ(tmp_path: Path) -> None:
    make_adapter(tmp_path, MANIFEST, ranks={"q_proj": 2, "model.layers.1.mlp.down_proj": 7})
    tensors = read_raw(tmp_path)
    values = np.ones(tensors[A].shape, np.float32)
    write_weights(tmp_path, {**tensors, A: raw_tensor(values, "BF16")})
    checked = check(tmp_path)
    assert checked.rank == 7
    assert {path: plan.rank for path, plan in checked.modules.items() if "layers.1" in path} == {
        "model.layers.1.self_attn.q_proj": 2,
        "model.layers.1.self_attn.v_proj": 4,
        "model.layers.1.mlp.down_proj": 7,
    }


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("base_model.model."),
        lambda name: name.replace(".weight", ".default.weight"),
    ],
)
def test_names_without_prefix_or_with_the_adapters_name_mean_the_same(
    tmp_path: Path, rename: Callable[[str], str]
) -> None:
    expected = check(make_adapter(tmp_path, MANIFEST)).modules.keys()
    write_weights(tmp_path, {rename(name): tensor for name, tensor in read_raw(tmp_path).items()})
    assert expected == check(tmp_path).modules.keys()


@pytest.mark.parametrize(("change", "code", "param", "problem"), BAD_WEIGHTS.values(), ids=BAD_WEIGHTS.keys())
def test_bad_weights_are_refused_naming_the_tensor(
    tmp_path: Path, change: Callable[[Tensors], Tensors], code: str, param: str, problem: str
) -> None:
    make_adapter(tmp_path, MANIFEST)
    write_weights(tmp_path, change(read_raw(tmp_path)))
    with pytest.raises(AdapterInvalid, match=problem) as refusal:
        check(tmp_path)
    assert (refusal.value.code, refusal.value.param) == (code, param)
    assert param in refusal.value.message


@pytest.mark.parametrize("zero", ["lora_A", "lora_B", "lora_"])
def test_an_adapter_that_would_answer_like_the_base_is_refused(tmp_path: Path, zero: str) -> None:
    make_adapter(tmp_path, MANIFEST)
    tensors = {
        name: raw_tensor(np.zeros(tensor.shape, np.float32)) if zero in name else tensor
        for name, tensor in read_raw(tmp_path).items()
    }
    write_weights(tmp_path, tensors)
    assert refusal_of(tmp_path).code == "adapter_has_no_effect"


def with_only(folder: Path, a: np.ndarray, b: np.ndarray) -> Path:
    """One module's A and B; every other tensor is zero."""
    make_adapter(folder, MANIFEST)
    zeros = {
        name: raw_tensor(np.zeros(tensor.shape, np.float32)) for name, tensor in read_raw(folder).items()
    }
    write_weights(folder, {**zeros, A: raw_tensor(a), B: raw_tensor(b)})
    return folder


def test_a_and_b_that_meet_in_no_rank_have_no_effect(tmp_path: Path) -> None:
    a, b = np.zeros((4, 16), np.float32), np.zeros((16, 4), np.float32)
    a[1], b[:, 2] = 1, 1
    assert refusal_of(with_only(tmp_path, a, b)).code == "adapter_has_no_effect"
    b[3, 1] = 1e-3
    assert check(with_only(tmp_path, a, b)).rank == 4


@pytest.mark.parametrize(
    ("value", "dtype", "code"),
    [
        (1e-42, "float32", "adapter_has_no_effect"),  # devices flush denormals
        (1e-30, "float32", None),
        (1e-30, "bfloat16", None),
        (1e-30, "float16", "adapter_has_no_effect"),
        (2.0**-26, "float16", "adapter_has_no_effect"),  # folded by 2: half of float16's smallest number
        (2.1 * 2.0**-26, "float16", None),
        (4e4, "float16", "out_of_range"),
        (4e4, "bfloat16", None),
        (3e4, "float16", None),
    ],
)
def test_effect_and_range_are_those_of_the_dtype_that_is_served(
    tmp_path: Path, value: float, dtype: str, code: str | None
) -> None:
    a, b = np.full((4, 16), 1, np.float32), np.full((16, 4), value, np.float32)
    folder, manifest = with_only(tmp_path, a, b), make_manifest(dtype=dtype)
    if code is None:
        assert check_adapter(folder, manifest, max_rank=64).rank == 4
        return
    with pytest.raises(AdapterInvalid) as refusal:
        check_adapter(folder, manifest, max_rank=64)
    assert refusal.value.code == code


@pytest.mark.parametrize("alpha", [1e300, -1e300])
def test_a_scaling_beyond_float32_is_refused_even_beside_a_zero_b(tmp_path: Path, alpha: float) -> None:
    """Infinity times zero would be served as NaN."""
    make_adapter(tmp_path, MANIFEST, config={"alpha_pattern": {"layers.0.self_attn.q_proj": alpha}})
    write_weights(tmp_path, {**read_raw(tmp_path), B: f32(16, 4, value=0)})
    refusal = refusal_of(tmp_path)
    assert (refusal.code, refusal.param) == ("out_of_range", B)


def test_one_module_with_an_effect_is_enough(tmp_path: Path) -> None:
    make_adapter(tmp_path, MANIFEST)
    tensors = {
        name: tensor if name in (A, B) else raw_tensor(np.zeros(tensor.shape, np.float32))
        for name, tensor in read_raw(tmp_path).items()
    }
    write_weights(tmp_path, tensors)
    assert len(check(tmp_path).modules) == 6


def test_denormal_weights_are_served_while_the_adapter_has_an_effect(tmp_path: Path) -> None:
    make_adapter(tmp_path, MANIFEST)
    tensors = read_raw(tmp_path)
    write_weights(tmp_path, {**tensors, B: f32(16, 4, value=1e-42)})
    assert check(tmp_path).rank == 4


@pytest.mark.parametrize(
    ("alpha", "code"),
    [*((alpha, "out_of_range") for alpha in (1e38, 1e300, -1e38)), (1e-300, "adapter_has_no_effect")],
)
def test_an_alpha_far_out_of_range_is_refused(tmp_path: Path, alpha: float, code: str) -> None:
    assert refusal_of(make_adapter(tmp_path, MANIFEST, config={"lora_alpha": alpha})).code == code


def test_a_folded_b_that_overflows_is_refused_even_beside_a_zero_a(tmp_path: Path) -> None:
    make_adapter(tmp_path, MANIFEST, config={"alpha_pattern": {"layers.0.self_attn.q_proj": 1e39}})
    write_weights(tmp_path, {**read_raw(tmp_path), A: f32(4, 16, value=0)})
    refusal = refusal_of(tmp_path)
    assert (refusal.code, refusal.param) == ("out_of_range", B)


@pytest.mark.parametrize("config", [{"r": 65}, {"r": 2_000_000}, {"rank_pattern": {"q_proj": 2_000_000}}])
def test_a_rank_above_the_limit_is_refused_with_the_limit(tmp_path: Path, config: dict[str, object]) -> None:
    refusal = refusal_of(make_adapter(tmp_path, MANIFEST, config=config))
    assert refusal.code == "rank_too_large"
    assert "the limit here is 64" in refusal.message


def test_the_rank_limit_is_the_deployments(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path, MANIFEST, r=9)
    assert refusal_of(folder, max_rank=8).code == "rank_too_large"
    assert check(folder, max_rank=9).rank == 9


def test_fan_in_fan_out_must_fit_the_bases_layers(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path, MANIFEST, config={"fan_in_fan_out": True})
    refusal = refusal_of(folder)
    assert (refusal.code, refusal.param) == ("unsupported_feature", "fan_in_fan_out")
    linears = {
        path: LinearSpec(spec.in_features, spec.out_features, fan_in_fan_out=True)
        for path, spec in MANIFEST.linears.items()
    }
    assert check_adapter(folder, make_manifest(linears=linears), max_rank=64).rank == 4


def test_a_pickle_alone_is_refused_by_name(tmp_path: Path) -> None:
    write_config(tmp_path, {})
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x04.")
    refusal = refusal_of(tmp_path)
    assert (refusal.code, refusal.param) == ("pickle_refused", "adapter_model.bin")
    assert "safe_serialization" in refusal.message


@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, file: str) -> None:
    (make_adapter(tmp_path, MANIFEST) / file).unlink()
    refusal = refusal_of(tmp_path)
    assert (refusal.code, refusal.param) == ("missing_file", file)


def test_a_folder_in_a_files_place_is_refused(tmp_path: Path) -> None:
    (make_adapter(tmp_path, MANIFEST) / "adapter_model.safetensors").unlink()
    (tmp_path / "adapter_model.safetensors").mkdir()
    assert refusal_of(tmp_path).code == "missing_file"


ODD_BUT_HARMLESS: list[tuple[dict[str, object], str]] = [
    (
        {"base_model_name_or_path": "unsloth/x-4bit"},
        "base_model_name_or_path is 'unsloth/x-4bit'",
    ),
    ({"base_model_name_or_path": "unsloth/tiny-bnb-4bit"}, "a quantised copy of tiny"),
    ({"base_model_name_or_path": "/content/checkpoint-60"}, "a folder where it was trained"),
    ({"base_model_name_or_path": ""}, "is empty"),
    ({"base_model_name_or_path": None}, "is empty"),
    ({"base_model_name_or_path": "http://169.254.169.254/\n\0"}, r"is 'http://169.254.169.254/\n\x00'"),
    ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'"),
    ({"bias": "all"}, "bias is all"),
    ({"rank_pattern": {"nothing": 4}}, "rank_pattern: 'nothing' names no module"),
    ({"alpha_pattern": {"nothing": 4}}, "alpha_pattern: 'nothing' names no module"),
    ({"target_modules": ["q_proj", "v_proj", "down_proj", "k_proj"]}, "no tensors for 'k_proj'"),
    ({"target_modules": ["q_proj", "mlp.down_proj"]}, "doesn't name 'v_proj'"),
]


@pytest.mark.parametrize(
    ("config", "warning"), ODD_BUT_HARMLESS, ids=[warning for _, warning in ODD_BUT_HARMLESS]
)
def test_what_is_odd_but_harmless_warns(tmp_path: Path, config: dict[str, object], warning: str) -> None:
    (told,) = check(make_adapter(tmp_path, MANIFEST, config=config)).warnings
    assert warning in told


def test_a_config_of_every_selector_is_checked_in_no_time(tmp_path: Path) -> None:
    names = [f"m{number}" for number in range(6000)]
    folder = make_adapter(tmp_path, MANIFEST, config={"target_modules": names})
    assert len(json.dumps(names)) < 64 * 1024
    assert any("no tensors for" in warning for warning in check(folder).warnings)
