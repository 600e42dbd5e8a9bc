from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import adapter_factory as factory
from malformed.safetensors import MALFORMED, REFUSED_DTYPES, one
from tunefleet.adapters_store.tensors import read_tensors
from tunefleet.errors import AdapterInvalid


@pytest.mark.parametrize(("raw", "problem"), MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_file_is_refused_with_its_reason(tmp_path: Path, raw: bytes, problem: str) -> None:
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(raw)
    with pytest.raises(AdapterInvalid, match=problem) as refusal:
        read_tensors(path)
    assert refusal.value.code in {"invalid_safetensors", "unsupported_dtype"}
    assert refusal.value.param


@pytest.mark.parametrize("dtype", REFUSED_DTYPES)
def test_a_dtype_that_is_not_served_is_named(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(one(dtype=dtype))
    with pytest.raises(AdapterInvalid, match=f"t has dtype '{dtype}'") as refusal:
        read_tensors(path)
    assert (refusal.value.code, refusal.value.param) == ("unsupported_dtype", "t")


def test_a_folder_a_missing_file_and_a_fifo_are_refused(tmp_path: Path) -> None:
    import os

    os.mkfifo(tmp_path / "fifo")
    for path, problem in (
        (tmp_path, "regular"),
        (tmp_path / "none", "opened"),
        (tmp_path / "fifo", "regular"),
    ):
        with pytest.raises(AdapterInvalid, match=problem):
            read_tensors(path)


def test_a_file_cut_while_it_is_open_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(one())
    with read_tensors(path) as tensors:
        path.write_bytes(b"")
        with pytest.raises(AdapterInvalid, match="ended while it was read"):
            tensors.array("t")


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_values_of_each_dtype_are_read_exactly(tmp_path: Path, dtype: str) -> None:
    values = np.array([[0.0, -1.5, 2.0**-14], [65504.0, -0.0, 2.0**-24]], np.float32)
    factory.write_weights(tmp_path, {"t": factory.raw_tensor(values, dtype)})
    with read_tensors(tmp_path / "adapter_model.safetensors") as tensors:
        read = tensors.array("t")
    expected = values if dtype != "BF16" else (values.view(np.uint32) >> 16 << 16).view(np.float32)
    assert read.dtype == np.float32
    np.testing.assert_array_equal(expected, read)
    np.testing.assert_array_equal(np.signbit(expected), np.signbit(read))


def test_chunks_cover_a_tensor_in_little_memory(tmp_path: Path) -> None:
    values = np.arange(12_000_000, dtype=np.float32).reshape(3000, 4000)  # 48 MB
    factory.write_weights(tmp_path, {"t": factory.raw_tensor(values)})
    total = 0
    tracemalloc.start()
    with read_tensors(tmp_path / "adapter_model.safetensors") as tensors:
        for first, block in tensors.rows("t"):
            assert first * 4000 == block[0, 0]
            total += block.size
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == values.size
    assert peak < 20 * 1024 * 1024


BASE = factory.file_bytes(
    {
        "a": factory.raw_tensor(np.ones((2, 3), np.float32)),
        "b": factory.raw_tensor(np.full((4,), 2, np.float32), "BF16"),
        "c": factory.raw_tensor(np.full((1, 2), 3, np.float32), "F16"),
    }
)
REPLACEMENT = st.sampled_from(
    [b"", b"0", b"-", b"9", b'"', b"{", b"}", b"[", b",", b":", b"e", b".", b" ", b"\xff", b"F32", b"a"]
)


@st.composite
def mutations(draw: st.DrawFn) -> bytes:
    raw = bytearray(BASE)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(raw)))
        raw[start : start + draw(st.integers(0, 3))] = draw(REPLACEMENT | st.binary(max_size=3))
    if draw(st.booleans()) and len(raw) > 16:  # a length that fits again, so that the JSON is reached
        end = raw.rfind(b"}") + 1
        raw[:8] = max(end - 8, 0).to_bytes(8, "little")
    return bytes(raw)


@given(mutations() | st.binary(max_size=64))
@settings(max_examples=400, deadline=None)
def test_what_is_accepted_is_read_equal_by_the_safetensors_library(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(raw)
    try:
        tensors = read_tensors(path)
    except AdapterInvalid:
        return
    with tensors, safe_open(path, framework="np") as reference:
        assert tensors.entries.keys() == set(reference.keys())
        for name, tensor in tensors.entries.items():
            assert list(tensor.shape) == reference.get_slice(name).get_shape()
            if tensor.dtype != "BF16":  # numpy has none
                np.testing.assert_array_equal(
                    reference.get_tensor(name).astype(np.float32), tensors.array(name)
                )
