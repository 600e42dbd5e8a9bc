"""What tests of LoRA share: a small base's layers, random adapters, and slots that hold them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from tunefleet.adapters_store.slot_layout import SlotLayout, rank_class_of
from tunefleet.core import LinearSpec
from tunefleet.runtime.banks import Banks, Prepared, map_prepared
from tunefleet.runtime.slots import Slot

CPU = torch.device("cpu")
LINEARS = {
    "0.attn.q": LinearSpec(12, 12),
    "0.attn.k": LinearSpec(12, 4),
    "0.attn.v": LinearSpec(12, 4),
    "0.attn.o": LinearSpec(12, 12),
    "0.mlp.up": LinearSpec(12, 20),
    "0.mlp.down": LinearSpec(20, 12),
    "1.attn.q": LinearSpec(12, 12),
}
LAYOUT = SlotLayout(LINEARS)


class Pair(NamedTuple):
    """One layer's matrices: ``A [r, in]`` and ``B [r, out]``, scaled."""

    a: torch.Tensor
    b: torch.Tensor


Weights = Mapping[str, Pair]


def random_weights(seed: int, ranks: Mapping[str, int]) -> Weights:
    """Of the layers that have a rank."""
    generator = torch.Generator().manual_seed(seed)
    return {
        path: Pair(
            torch.randn(rank, LINEARS[path].in_features, generator=generator),
            torch.randn(rank, LINEARS[path].out_features, generator=generator),
        )
        for path, rank in ranks.items()
    }


def prepared_of(weights: Weights, dtype: torch.dtype = torch.float32) -> Prepared:
    """As a prepared file holds them."""
    rank_class = rank_class_of(max(pair.a.shape[0] for pair in weights.values()))
    pieces = []
    for path, kind, features in LAYOUT.matrices:
        matrix = torch.zeros(rank_class, features)
        if path in weights:
            own = weights[path].a if kind == "A" else weights[path].b
            matrix[: len(own)] = own
        pieces.append(matrix.flatten())
    return Prepared("d" * 64, rank_class, torch.cat(pieces).to(dtype), frozenset(weights))


def new_banks(num_pages: int, dtype: torch.dtype = torch.float32) -> Banks:
    """Full of NaN, as memory may be that others used before."""
    banks = Banks(LINEARS, dtype, CPU, num_pages * 8 * LAYOUT.features * dtype.itemsize)
    banks.values(Slot(8 * num_pages, 0)).fill_(float("nan"))
    return banks


def fill(banks: Banks, slot: Slot, prepared: Prepared) -> None:
    assert banks.filling(slot, prepared).copy(prepared.num_bytes)


def matrices_in(path: Path, linears: Mapping[str, LinearSpec]) -> Weights:
    """The targets' matrices in a prepared file, padded to its rank class."""
    prepared = map_prepared(path, linears)
    layout, rank = SlotLayout(linears), prepared.rank_class

    def matrix(start: int, features: int) -> torch.Tensor:
        return prepared.values[start * rank : (start + features) * rank].view(rank, features)

    return {
        target: Pair(
            matrix(layout.place(target).a_start, linears[target].in_features),
            matrix(layout.place(target).b_start, linears[target].out_features),
        )
        for target in prepared.targets
    }


def added_by(weights: Weights | None, paths: Iterable[str], x: torch.Tensor) -> torch.Tensor:
    """What one adapter adds to one token's answers, of each path one after another; in fp64."""
    parts = []
    for path in paths:
        part = torch.zeros(LINEARS[path].out_features, dtype=torch.float64)
        if weights and path in weights:
            a, b = weights[path]
            part = b.double().T @ (a.double() @ x.double())
        parts.append(part)
    return torch.cat(parts)
