"""A checked adapter as the engine maps it: cast, scale folded, in slot layout.

A prepared file is safetensors with one flat tensor ``slot``: all of a slot (``slot_layout``) of the adapter's
rank class, so that an activation is one copy. B is transposed and multiplied by the scaling in float32 before
the cast: the engine adds ``(x @ A.T) @ B``. Its metadata are ``digest``, ``rank`` (the largest), ``targets``
(JSON: the modules' paths) and ``layout`` (the layout's version).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from tunefleet.adapters_store.slot_layout import LAYOUT_VERSION, SlotLayout, rank_class_of
from tunefleet.adapters_store.tensors import Float32Array, TensorFile, read_tensors
from tunefleet.adapters_store.validation import CheckedAdapter, ModulePlan
from tunefleet.core import WEIGHTS_FILE
from tunefleet.errors import AdapterInvalid

PreparedDtype = Literal["float32", "bfloat16", "float16"]

SLOT_TENSOR = "slot"

_ANY_DIGEST = "0" * 64

_ALIGNMENT = 64  # of the data's start: mapped tensors begin on a cache line
_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def prepared_bytes(checked: CheckedAdapter, layout: SlotLayout, dtype: PreparedDtype) -> int:
    """Size of the file that ``prepare_adapter`` writes."""
    head = _head(checked.digest, checked.rank, list(checked.modules), layout, dtype)
    return len(head) + _slot_bytes(checked.rank, layout, dtype)


def max_prepared_bytes(rank: int, layout: SlotLayout, dtype: PreparedDtype) -> int:
    """The same for any adapter of that rank: the size if it targets every layer."""
    head = _head(_ANY_DIGEST, rank, list(layout.linears), layout, dtype)
    return len(head) + _slot_bytes(rank, layout, dtype)


def prepare_adapter(
    folder: Path, checked: CheckedAdapter, out: Path, *, layout: SlotLayout, dtype: PreparedDtype
) -> None:
    """Writes the prepared file of the adapter in ``folder`` to ``out``, whole or not at all.

    ``checked`` must be what ``check_adapter`` said about this folder. Not synced: the file is a cache's.

    Raises:
        AdapterInvalid: values that float16 can't hold.
    """
    with tempfile.NamedTemporaryFile(dir=out.parent, prefix=".prepare-", delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(_head(checked.digest, checked.rank, list(checked.modules), layout, dtype))
            with read_tensors(folder / WEIGHTS_FILE) as tensors:
                for piece in _slot_pieces(tensors, checked, layout, dtype):
                    file.write(piece)
            file.flush()
            os.replace(temporary, out)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def round_to_bfloat16(values: Float32Array) -> npt.NDArray[np.uint16]:
    """The bits of finite float32 values rounded to the nearest bfloat16, ties to even."""
    bits = values.view(np.uint32)
    rounded: npt.NDArray[np.uint32] = (
        bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    ) >> np.uint32(16)
    return rounded.astype(np.uint16)


def _slot_bytes(rank: int, layout: SlotLayout, dtype: PreparedDtype) -> int:
    return rank_class_of(rank) * layout.features * _ITEM_BYTES[dtype]


def _head(digest: str, rank: int, targets: list[str], layout: SlotLayout, dtype: PreparedDtype) -> bytes:
    """The header's length and the header."""
    header = {
        "__metadata__": {
            "digest": digest,
            "rank": str(rank),
            "targets": json.dumps(targets),
            "layout": LAYOUT_VERSION,
        },
        SLOT_TENSOR: {
            "dtype": _NAMES[dtype],
            "shape": [rank_class_of(rank) * layout.features],
            "data_offsets": [0, _slot_bytes(rank, layout, dtype)],
        },
    }
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-(len(raw) + 8) % _ALIGNMENT)
    return len(raw).to_bytes(8, "little") + raw


def _slot_pieces(
    tensors: TensorFile, checked: CheckedAdapter, layout: SlotLayout, dtype: PreparedDtype
) -> Iterator[bytes | memoryview]:
    """The slot's bytes in order, a matrix at a time, each followed by the zeros that pad its rank."""
    rank_class = rank_class_of(checked.rank)
    for path, kind, features in layout.matrices:
        plan = checked.modules.get(path)
        if plan is not None:
            yield _matrix(tensors, plan, kind, dtype)
        num_rows = rank_class - (plan.rank if plan else 0)
        yield bytes(num_rows * features * _ITEM_BYTES[dtype])


def _matrix(
    tensors: TensorFile, plan: ModulePlan, kind: Literal["A", "B"], dtype: PreparedDtype
) -> bytes | memoryview:
    if kind == "A" and tensors.entries[plan.lora_a].dtype == _NAMES[dtype]:
        return tensors.stored(plan.lora_a)
    return _stored(_values(tensors, plan, kind), dtype).data


def _values(tensors: TensorFile, plan: ModulePlan, kind: Literal["A", "B"]) -> Float32Array:
    """``[rank, features]``."""
    if kind == "A":
        return tensors.array(plan.lora_a)
    return np.ascontiguousarray((tensors.array(plan.lora_b) * np.float32(plan.scaling)).T)


def _stored(values: Float32Array, dtype: PreparedDtype) -> npt.NDArray[np.generic]:
    if dtype == "bfloat16":
        return round_to_bfloat16(values)
    if dtype == "float32":
        return values
    if float(np.abs(values).max()) > float(np.finfo(np.float16).max):
        raise AdapterInvalid(
            "the adapter's scaled weights don't fit into float16: serve with bfloat16 or float32",
            code="out_of_range",
            param=WEIGHTS_FILE,
        )
    return values.astype(np.float16)
