from __future__ import annotations

import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

import adapter_factory as factory
import hazards
from malformed.generated import SAFETENSORS
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


@hazards.examples(500)
def test_what_is_accepted_is_what_the_safetensors_library_reads(tmp_path: Path, num_examples: int) -> None:
    path = tmp_path / "adapter_model.safetensors"
    num_accepted = 0

    def check(raw: bytes) -> None:
        nonlocal num_accepted
        path.write_bytes(raw)
        try:
            tensors = read_tensors(path)
        except AdapterInvalid:
            return
        with tensors, safe_open(path, framework="pt") as library:
            assert tensors.entries.keys() == set(library.keys())
            assert tensors.metadata == (library.metadata() or {})
            for name, entry in tensors.entries.items():
                expected = library.get_tensor(name)
                assert list(expected.shape) == list(entry.shape)
                np.testing.assert_array_equal(expected.float().numpy(), tensors.array(name))
        num_accepted += 1

    hazards.generate("A", num_examples, check, SAFETENSORS)
    assert num_accepted > num_examples / 20


# The costs of a header of strangers, which the safetensors library doesn't bound.
HEADER = b'{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
EXPENSIVE = {
    "1M names": b"{" + b",".join(b'"%d":%s' % (number, HEADER) for number in range(1_000_000)) + b"}",
    "150,000 keys in 1 MiB": b"{" + b",".join(b'"%d":1' % number for number in range(95_000)) + b"}",
    "20,001 tensors": b"{" + b",".join(b'"%d":1' % number for number in range(20_001)) + b"}",
    "350,000 lists in 1 MiB": b'{"a":[' + b"[]," * 349_000 + b"[]]}",
    "350,000 texts in 1 MiB": b'{"a":[' + b'"",' * 349_000 + b'""]}',
    "1 MB of quotes": b"{" + b'"' * 1_000_000 + b"}",
    "1 MB of braces": b"{" * 1_000_000,
    "a name of 100 kB": b'{"' + b"n" * 100_000 + b'":' + HEADER + b"}",
    "a name of 1 MB": b'{"' + b"n" * 1_000_000 + b'":' + HEADER + b"}",
    "10,000 dimensions": b'{"t":{"dtype":"F32","shape":[' + b"1," * 9999 + b'1],"data_offsets":[0,4]}}',
    "500,000 dimensions": b'{"t":{"dtype":"F32","shape":[' + b"1," * 499_999 + b'1],"data_offsets":[0,4]}}',
    "deep JSON": b'{"t":' + b"[" * 1_000_000,
}


@pytest.mark.parametrize("header", EXPENSIVE.values(), ids=EXPENSIVE)
def test_an_expensive_header_is_refused_for_a_few_megabytes_and_milliseconds(
    tmp_path: Path, header: bytes
) -> None:
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    started = time.process_time()
    with pytest.raises(AdapterInvalid):
        read_tensors(path)
    seconds = time.process_time() - started
    tracemalloc.start()
    with pytest.raises(AdapterInvalid):
        read_tensors(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 0.2
    assert peak < 12 * 1024 * 1024
