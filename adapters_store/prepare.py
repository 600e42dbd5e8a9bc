"""A checked adapter as the engine maps it: cast, scale folded, in slot layout.

A prepared file is safetensors: per module ``<path>.A`` ``[rank, in]`` and ``<path>.B`` ``[rank, out]``, all
of one dtype, B transposed and multiplied by the scaling in float32 before the cast, so the engine adds ``(x @
A.T) @ B``. Its metadata are ``digest`` and ``rank`` (the largest).
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from tunefleet.adapters_store.tensors import Float32Array, TensorFile, read_tensors
from tunefleet.adapters_store.validation import CheckedAdapter
from tunefleet.core import WEIGHTS_FILE
from tunefleet.errors import AdapterInvalid

PreparedDtype = Literal["float32", "bfloat16", "float16"]

_ALIGNMENT = 64  # of the data's start: mapped tensors begin on a cache line
_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class _Layout(NamedTuple):
    head: bytes  # length and header
    size_bytes: int  # of the whole file


def prepared_bytes(checked: CheckedAdapter, dtype: PreparedDtype) -> int:
    """Size of the file that ``prepare_adapter`` writes."""
    return _layout(checked, dtype).size_bytes


def prepare_adapter(folder: Path, checked: CheckedAdapter, out: Path, *, dtype: PreparedDtype) -> None:
    """Writes the prepared file of the adapter in ``folder`` to ``out``, whole or not at all.

    ``checked`` must be what ``check_adapter`` said about this folder. Not synced: the file is a cache's.

    Raises:
        AdapterInvalid: values that float16 can't hold.
    """
    with tempfile.NamedTemporaryFile(dir=out.parent, prefix=".prepare-", delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(_layout(checked, dtype).head)
            with read_tensors(folder / WEIGHTS_FILE) as tensors:
                for values in _slot_values(tensors, checked):
                    file.write(_stored(values, dtype).data)
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


def _layout(checked: CheckedAdapter, dtype: PreparedDtype) -> _Layout:
    header: dict[str, object] = {"__metadata__": {"digest": checked.digest, "rank": str(checked.rank)}}
    position = 0
    for path, plan in checked.modules.items():
        for matrix, features in (("A", plan.in_features), ("B", plan.out_features)):
            end = position + plan.rank * features * _ITEM_BYTES[dtype]
            header[f"{path}.{matrix}"] = {
                "dtype": _NAMES[dtype],
                "shape": [plan.rank, features],
                "data_offsets": [position, end],
            }
            position = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-(len(raw) + 8) % _ALIGNMENT)
    return _Layout(len(raw).to_bytes(8, "little") + raw, 8 + len(raw) + position)


def _slot_values(tensors: TensorFile, checked: CheckedAdapter) -> Iterator[Float32Array]:
    """A and B of each module, in the order of the layout."""
    for plan in checked.modules.values():
        yield tensors.array(plan.lora_a)
        yield np.ascontiguousarray((tensors.array(plan.lora_b) * np.float32(plan.scaling)).T)


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
