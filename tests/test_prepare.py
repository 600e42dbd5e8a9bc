from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from adapter_factory import make_adapter, make_manifest, read_raw
from tunefleet.adapters_store.prepare import (
    PreparedDtype,
    max_prepared_bytes,
    prepare_adapter,
    prepared_bytes,
    round_to_bfloat16,
)
from tunefleet.adapters_store.slot_layout import SlotLayout
from tunefleet.adapters_store.validation import CheckedAdapter, check_adapter
from tunefleet.errors import AdapterInvalid

MANIFEST = make_manifest()
LAYOUT = SlotLayout(MANIFEST.linears)
Dtype = Literal["float32", "bfloat16"]


class Prepared(NamedTuple):
    metadata: dict[str, str]
    slot: np.ndarray  # flat


def prepare(folder: Path, checked: CheckedAdapter) -> Prepared:
    out = folder / "prepared"
    prepare_adapter(folder, checked, out, layout=LAYOUT, dtype="float32")
    with safe_open(out, "np") as file:
        assert list(file.keys()) == ["slot"]
        return Prepared(file.metadata(), file.get_tensor("slot"))


def expected_slot(folder: Path, checked: CheckedAdapter, rank_class: int) -> np.ndarray:
    """All A's of a parent module, then all its B's, padded with zeros."""
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as uploaded:

        def padded(path: str, matrix: str) -> np.ndarray:
            spec, plan = MANIFEST.linears[path], checked.modules.get(path)
            slot = np.zeros(
                (rank_class, spec.in_features if matrix == "A" else spec.out_features), np.float32
            )
            if plan is not None:
                a, b = (uploaded.get_tensor(name).float().numpy() for name in (plan.lora_a, plan.lora_b))
                slot[: plan.rank] = a if matrix == "A" else (b * np.float32(plan.scaling)).T
            return slot.ravel()

        parents = dict.fromkeys(path.rpartition(".")[0] for path in MANIFEST.linears)
        return np.concatenate(
            [
                padded(path, matrix)
                for parent in parents
                for matrix in "AB"
                for path in MANIFEST.linears
                if path.rpartition(".")[0] == parent
            ]
        )


@pytest.mark.parametrize("stored", ["F32", "F16", "BF16"])
@pytest.mark.parametrize(("r", "rank_class"), [(4, 8), (8, 8), (9, 16), (40, 64)])
def test_a_prepared_file_is_a_slot_of_a_and_the_folded_transposed_b(
    tmp_path: Path, stored: str, r: int, rank_class: int
) -> None:
    config = {"alpha_pattern": {"v_proj": 3}}
    folder = make_adapter(
        tmp_path / "adapter", MANIFEST, r=r, dtype=stored, ranks={"q_proj": 2}, config=config
    )
    checked = check_adapter(folder, MANIFEST, max_rank=64)
    prepared = prepare(folder, checked)
    assert prepared.metadata == {
        "digest": checked.digest,
        "rank": str(r),
        "targets": json.dumps(list(checked.modules)),
        "layout": "1",
    }
    np.testing.assert_array_equal(expected_slot(folder, checked, rank_class), prepared.slot)
    assert {plan.scaling for plan in checked.modules.values()} == {2.0, float(r), 3 / r}


def test_a_prepared_file_can_be_mapped_for_its_base(tmp_path: Path) -> None:
    from tunefleet.runtime.banks import map_prepared

    folder = make_adapter(tmp_path / "adapter", MANIFEST, r=12)
    checked = check_adapter(folder, MANIFEST, max_rank=64)
    for dtype in get_args(PreparedDtype):
        prepare_adapter(folder, checked, tmp_path / "out", layout=LAYOUT, dtype=dtype)
        prepared = map_prepared(tmp_path / "out", MANIFEST.linears)
        assert (prepared.digest, prepared.rank_class) == (checked.digest, 16)
        assert prepared.targets == checked.modules.keys()
        assert prepared.num_bytes == 16 * LAYOUT.features * prepared.values.itemsize


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_what_torch_rounds_to(tmp_path: Path, dtype: Dtype) -> None:
    import torch

    folder = make_adapter(tmp_path / "adapter", MANIFEST)
    checked = check_adapter(folder, MANIFEST, max_rank=64)
    prepare_adapter(folder, checked, tmp_path / "exact", layout=LAYOUT, dtype="float32")
    prepare_adapter(folder, checked, tmp_path / "rounded", layout=LAYOUT, dtype=dtype)
    with safe_open(tmp_path / "exact", "pt") as exact, safe_open(tmp_path / "rounded", "pt") as rounded:
        expected = exact.get_tensor("slot").to(getattr(torch, dtype))
        assert torch.equal(expected, rounded.get_tensor("slot"))


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
    prepare_adapter(folder, checked, out, layout=LAYOUT, dtype=dtype)
    assert prepared_bytes(checked, LAYOUT, dtype) == out.stat().st_size
    assert (8 + int.from_bytes(out.read_bytes()[:8], "little")) % 64 == 0


@pytest.mark.parametrize("r", [1, 8, 9, 64])
def test_no_file_of_a_rank_is_larger_than_one_that_targets_every_layer(tmp_path: Path, r: int) -> None:
    every = tuple(path.rpartition(".")[2] for path in MANIFEST.linears)
    most = max_prepared_bytes(r, LAYOUT, "bfloat16")
    for name, targets in (("some", ("q_proj",)), ("every", every)):
        folder = make_adapter(tmp_path / name, MANIFEST, r=r, targets=targets)
        checked = check_adapter(folder, MANIFEST, max_rank=64)
        size = prepared_bytes(checked, LAYOUT, "bfloat16")
        assert size <= most
        assert (size == most) is (targets == every)


def test_what_float16_cannot_hold_is_refused_not_made_infinite(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", MANIFEST, config={"lora_alpha": 1e7}, scale=1e-2)
    checked = check_adapter(folder, MANIFEST, max_rank=64)
    with pytest.raises(AdapterInvalid, match="float16"):
        prepare_adapter(folder, checked, tmp_path / "out", layout=LAYOUT, dtype="float16")


def test_an_existing_file_is_replaced_and_nothing_else_stays(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", MANIFEST)
    checked = check_adapter(folder, MANIFEST, max_rank=64)
    (tmp_path / "out").mkdir()
    out = tmp_path / "out" / "prepared"
    out.write_bytes(b"old")
    prepare_adapter(folder, checked, out, layout=LAYOUT, dtype="bfloat16")
    assert [out] == list(out.parent.iterdir())
    assert out.stat().st_size == prepared_bytes(checked, LAYOUT, "bfloat16")


def test_a_failure_leaves_neither_file_nor_temporary(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "adapter", MANIFEST)
    checked = check_adapter(folder, MANIFEST, max_rank=64)
    make_adapter(folder, MANIFEST, targets=("k_proj",))  # the folder changed behind our back
    (tmp_path / "out").mkdir()
    with pytest.raises(KeyError):
        prepare_adapter(folder, checked, tmp_path / "out" / "prepared", layout=LAYOUT, dtype="float32")
    assert list((tmp_path / "out").iterdir()) == []
    assert read_raw(folder)
