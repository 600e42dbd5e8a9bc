"""A strict reader of safetensors files that strangers wrote.

Format: https://github.com/huggingface/safetensors (8 bytes of header length, JSON header, data). The library
accepts duplicate names, zero-size tensors, shapes of 10,000 dimensions and headers of 100 MB; none of that is
an adapter. Bytes are read, not mapped: a file that somebody truncates meanwhile is an error here, not a
SIGBUS.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from tunefleet.adapters_store.strict_json import JsonInvalid, JsonValue, parse_object, shown
from tunefleet.errors import AdapterInvalid

MAX_HEADER_BYTES = 1024 * 1024
MAX_TENSORS = 20_000
MAX_NAME_CHARS = 512
MAX_DIMS = 8
MAX_CONTAINERS = 1 + 1 + 3 * MAX_TENSORS  # the header, its metadata; per tensor an entry and its two lists
CHUNK_BYTES = 4 * 1024 * 1024

ITEM_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_FLOATS = {"F32": "<f4", "F16": "<f2"}
_NAME = re.compile(r"[\x21-\x7e]+")

Float32Array = npt.NDArray[np.float32]


class TensorEntry(NamedTuple):
    """One tensor of the header; ``start`` and ``end`` are bytes from the start of the file."""

    name: str
    dtype: str  # F32, F16 or BF16
    shape: tuple[int, ...]
    start: int
    end: int


class TensorFile:
    """An open safetensors file whose header has been checked. Whoever opens it closes it (``with``)."""

    def __init__(self, fd: int, entries: dict[str, TensorEntry], metadata: dict[str, str]) -> None:
        self._fd = fd
        self.entries = entries
        self.metadata = metadata

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def array(self, name: str) -> Float32Array:
        """The whole tensor as float32; costs its size in memory."""
        entry = self.entries[name]
        return self._read(entry, entry.start, math.prod(entry.shape)).reshape(entry.shape)

    def stored(self, name: str) -> bytes:
        """The whole tensor as it lies in the file."""
        entry = self.entries[name]
        return _pread(self._fd, entry.start, entry.end - entry.start)

    def rows(self, name: str) -> Iterator[tuple[int, Float32Array]]:
        """``(index of the first row, [rows, last dimension])``, of about ``CHUNK_BYTES`` each."""
        entry = self.entries[name]
        num_rows, row_items = math.prod(entry.shape[:-1]), entry.shape[-1] if entry.shape else 1
        step = max(1, CHUNK_BYTES // 4 // row_items)
        for first in range(0, num_rows, step):
            count = min(step, num_rows - first)
            start = entry.start + first * row_items * ITEM_BYTES[entry.dtype]
            yield first, self._read(entry, start, count * row_items).reshape(count, row_items)

    def _read(self, entry: TensorEntry, start: int, num_items: int) -> Float32Array:
        raw = _pread(self._fd, start, num_items * ITEM_BYTES[entry.dtype])
        if entry.dtype == "BF16":
            bits: npt.NDArray[np.uint32] = np.frombuffer(raw, dtype="<u2").astype(np.uint32) << np.uint32(16)
            return bits.view(np.float32)
        values: Float32Array = np.frombuffer(raw, dtype=_FLOATS[entry.dtype]).astype(np.float32)
        return values


def read_tensors(path: Path) -> TensorFile:
    """Opens and checks a safetensors file.

    Raises:
        AdapterInvalid: code ``invalid_safetensors`` (or ``unsupported_dtype``), ``param`` naming the tensor.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _invalid(f"the file can't be opened ({error.strerror})") from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise _invalid("it is not a regular file")
        header, data_start = _read_header(fd, status.st_size)
        metadata = _metadata(header.pop("__metadata__", {}))
        entries = _entries(header, data_start)
        _check_layout(entries, data_start, status.st_size)
        return TensorFile(fd, {entry.name: entry for entry in entries}, metadata)
    except BaseException:
        os.close(fd)
        raise


def _read_header(fd: int, file_bytes: int) -> tuple[dict[str, JsonValue], int]:
    """The parsed header and where the data starts."""
    if file_bytes < 10:
        raise _invalid(f"it has {file_bytes} bytes, too few for a safetensors file")
    length = int.from_bytes(_pread(fd, 0, 8), "little")
    if length > MAX_HEADER_BYTES:
        raise _invalid(f"its header would be {length} bytes, the limit is {MAX_HEADER_BYTES}")
    if length < 2 or 8 + length > file_bytes:
        raise _invalid(
            f"its header of {length} bytes doesn't fit into the file's {file_bytes}: is it cut off?"
        )
    raw = _pread(fd, 8, length)
    if not raw.startswith(b"{"):
        raise _invalid("its header doesn't start with '{'")
    try:
        header = parse_object(raw, max_depth=4, max_keys=MAX_TENSORS + 1, max_containers=MAX_CONTAINERS)
        return header, 8 + length
    except JsonInvalid as error:
        raise _invalid(f"its header is refused: {error}") from error


def _metadata(value: JsonValue) -> dict[str, str]:
    if not isinstance(value, dict):
        raise _invalid("__metadata__ is not an object", "__metadata__")
    texts = {key: text for key, text in value.items() if isinstance(text, str)}
    if len(texts) != len(value):
        raise _invalid("__metadata__ holds something that is not text", "__metadata__")
    return texts


def _entries(header: dict[str, JsonValue], data_start: int) -> list[TensorEntry]:
    if len(header) > MAX_TENSORS:
        raise _invalid(f"it holds {len(header)} tensors, the limit is {MAX_TENSORS}")
    return [_entry(name, value, data_start) for name, value in header.items()]


def _entry(name: str, value: JsonValue, data_start: int) -> TensorEntry:
    if len(name) > MAX_NAME_CHARS or not _NAME.fullmatch(name):
        raise _invalid(
            f"the tensor name {shown(name)} is not 1 to {MAX_NAME_CHARS} printable ASCII characters",
            name[:MAX_NAME_CHARS] or "adapter_model.safetensors",
        )
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise _invalid(f"{name} must have exactly dtype, shape and data_offsets", name)
    dtype, shape, offsets = value["dtype"], _sizes(value["shape"]), _sizes(value["data_offsets"])
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        text = shown(dtype) if isinstance(dtype, str) else "not text"
        raise AdapterInvalid(
            f"{name} has dtype {text}; adapters are served from F32, F16 and BF16: save it as one of these",
            code="unsupported_dtype",
            param=name,
        )
    if shape is None or len(shape) > MAX_DIMS or not all(1 <= size < 2**31 for size in shape):
        raise _invalid(f"{name} has a shape that is not a list of at most {MAX_DIMS} positive sizes", name)
    if offsets is None or len(offsets) != 2 or not 0 <= offsets[0] <= offsets[1]:
        raise _invalid(f"{name} has data_offsets that are not two ascending numbers", name)
    expected = math.prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != expected:
        raise _invalid(
            f"{name} needs {expected} bytes, its data_offsets span {offsets[1] - offsets[0]}", name
        )
    return TensorEntry(name, dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])


def _sizes(value: JsonValue) -> list[int] | None:
    """A list of true integers (a bool is none), else None."""
    if not isinstance(value, list):
        return None
    sizes = [item for item in value if isinstance(item, int) and not isinstance(item, bool)]
    return sizes if len(sizes) == len(value) else None


def _check_layout(entries: list[TensorEntry], data_start: int, file_bytes: int) -> None:
    """Tensors cover the data exactly: no overlap, no hole, nothing behind the last."""
    position = data_start
    for entry in sorted(entries, key=lambda entry: entry.start):
        if entry.start != position:
            problem = "overlaps the tensor before it" if entry.start < position else "leaves a hole before it"
            raise _invalid(f"{entry.name} {problem}", entry.name)
        position = entry.end
    if position != file_bytes:
        problem = "is cut off" if position > file_bytes else "has bytes behind the last tensor"
        raise _invalid(f"the file {problem}: the header says {position} bytes, it has {file_bytes}")


def _pread(fd: int, start: int, length: int) -> bytes:
    pieces: list[bytes] = []
    while length:
        piece = os.pread(fd, length, start)
        if not piece:
            raise _invalid("the file ended while it was read")
        pieces.append(piece)
        start += len(piece)
        length -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _invalid(problem: str, param: str = "adapter_model.safetensors") -> AdapterInvalid:
    return AdapterInvalid(f"adapter_model.safetensors: {problem}", code="invalid_safetensors", param=param)
