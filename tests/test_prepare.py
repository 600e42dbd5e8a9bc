from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from adapter_factory import make_adapter, make_manifest, read_raw
from tunefleet.adapters_store.prepare import prepare_adapter, prepared_bytes, round_to_bfloat16
from tunefleet.adapters_store.validation import check_adapter
from tunefleet.errors import AdapterInvalid

MANIFEST = make_manifest()
Dtype = Literal["float32", "bfloat16"]


@pytest.mark.parametrize("stored", ["F32", "F16", "BF16"])
def test_a_prepared_file_holds_a_and_the_folded_transposed_b(tmp_path: Path, stored: str) -> None:
    folder = make_adapter(
        tmp_path / "adapter",
        MANIFEST,
        dtype=stored,
        ranks={"q_proj": 2},
        config={"alpha_pattern": {"v_proj": 3}},
    )
    checked = check_adapter(folder, MANIFEST, max_rank=64)
    out = tmp_path / "out.safetensors"
    prepare_adapter(folder, checked, out, dtype="float32")
    with (
        safe_open(folder / "adapter_model.safetensors", framework="pt") as uploaded,
        safe_open(out, "np") as prepared,
    ):
        assert prepared.metadata() == {"digest": checked.digest, "rank": "4"}
        assert len(prepared.keys()) == 2 * len(checked.modules)
        for path, plan in checked.modules.items():
            lora_a = uploaded.get_tensor(plan.lora_a).float().numpy()
            lora_b = uploaded.get_tensor(plan.lora_b).float().numpy()
            np.testing.assert_array_equal(lora_a, prepared.get_tensor(f"{path}.A"))
            np.testing.assert_array_equal(
                (lora_b * np.float32(plan.scaling)).T, prepared.get_tensor(f"{path}.B")
            )
    assert {plan.scaling for plan in checked.modules.values()} == {2.0, 4.0, 0.75}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_what_torch_rounds_to(tmp_path: Path, dtype: Dtype) -> None:
    import torch

    folder = make_adapter(tmp_path / "adapter", MANIFEST)
    checked = check_adapter(folder, MANIFEST, max_rank=64)
    prepare_adapter(folder, checked, tmp_path / "exact", dtype="float32")
    prepare_adapter(folder, checked, tmp_path / "rounded", dtype=dtype)
    with safe_open(tmp_path / "exact", "pt") as exact, safe_open(tmp_path / "rounded", "pt") as rounded:
        for name in exact.keys():  # noqa: SIM118 (safe_open is no dict)
            assert torch.equal(exact.get_tensor(name).to(getattr(torch, dtype)), rounded.get_tensor(name))


@given(st.lists(st.floats(width=32, allow_nan=False, min_value=-(2.0**100), max_value=2.0**100), min_size=1))
@settings(max_examples=200, deadline=None)
def test_rounding_to_bfloat16_is_to_nearest_even(numbers: list[float]) -> None:
    import torch

    values = np.array(numbers, np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()
    np.testing.assert_array_equal(expected, round_to_bfloat16(values))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_size_is_known_beforehand_and_data_starts_on_a_cache_line(tmp_path: Path, dtype: Dtype) -> None:
    folder = make_adapter(tmp_path / "adapter", MANIFEST)
    checked = check_adapter(folder, MANIFEST, max_rank=64)
    out = tmp_path / "out"
    prepare_adapter(folder, checked, out, dtype=dtype)
    assert prepared_bytes(checked, dtype) == out.stat().st_size
    assert (8 + int.from_bytes(out.read_bytes()[:8], "little")) % 64 == 0


def test_what_float16_cannot_hold_is_refused_not_made_infinite(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", MANIFEST, config={"lora_alpha": 1e7}, scale=1e-2)
    checked = check_adapter(folder, MANIFEST, max_rank=64)
    with pytest.raises(AdapterInvalid, match="float16"):
        prepare_adapter(folder, checked, tmp_path / "out", dtype="float16")


def test_an_existing_file_is_replaced_and_nothing_else_stays(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", MANIFEST)
    checked = check_adapter(folder, MANIFEST, max_rank=64)
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "prepared"
    out.write_bytes(b"old")
    prepare_adapter(folder, checked, out, dtype="bfloat16")
    assert [out] == list(out.parent.iterdir())
    assert out.stat().st_size == prepared_bytes(checked, "bfloat16")


def test_a_failure_leaves_neither_file_nor_temporary(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", MANIFEST)
    checked = check_adapter(folder, MANIFEST, max_rank=64)
    make_adapter(folder, MANIFEST, targets=("k_proj",))  # the folder changed behind our back
    (tmp_path / "out").mkdir()
    with pytest.raises(KeyError):
        prepare_adapter(folder, checked, tmp_path / "out" / "prepared", dtype="float32")
    assert list((tmp_path / "out").iterdir()) == []
    assert read_raw(folder)
