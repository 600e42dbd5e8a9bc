"""LoRA products in plain torch: few calls over strided views of the arena, each adapter read once a step.

A decode step's time is that of reading its adapters, and of the calls. So decodes of one rank class run as
batched products over ranges of slots, right where they lie: no gathered copies of weights. Layers that share
their input share one product with all their A's. A prefill chunk is its own dense product.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch.nn.functional import linear

from tunefleet.adapters_store.slot_layout import SlotLayout, Span
from tunefleet.runtime.banks import Banks
from tunefleet.runtime.slots import Slot

SHORT_TOKENS = 32
"""Up to so many tokens a prefill chunk runs as decodes do: that takes fewer calls (measured, on a CPU)."""

RANGE_ROWS = 25
"""Padding of a batched product that costs as much as one more product (measured, on a CPU)."""

CALL_BYTES = {"cpu": 400_000, "cuda": 20_000_000}
"""What a device reads in the time that one more range's calls take, per layer (20 us; 2 TB/s: 10 us)."""


class Range(NamedTuple):
    """Tokens of one rank class in one batched product: ``width`` places for each slot of a range.

    Slots without a token in the step, and unused places, compute on a copy of some token and are dropped.
    """

    rank_class: int
    targets: frozenset[str]
    slots: tuple[int, int]  # the first, and how many
    width: int
    gather: torch.Tensor  # [slots * width] row of each place's token
    used: torch.Tensor | None  # [n] which places count; None: all, in order
    scatter: torch.Tensor  # [n] row of each that counts


class Segment(NamedTuple):
    """Tokens of one adapter in one dense product: a prefill chunk."""

    slot: Slot
    targets: frozenset[str]
    rows: slice  # of the batch


class TorchLora:
    """The LoraKernel of every device that torch runs on; lives for one step.

    Args:
        tokens: ``(slot, first, num_tokens)`` of each sequence with an adapter.
    """

    def __init__(self, tokens: Sequence[tuple[Slot, int, int]], banks: Banks, device: torch.device) -> None:
        self._banks = banks
        self._device = device
        self.ranges: list[Range] = []
        self.segments: list[Segment] = []
        decodes: dict[int, dict[int, list[int]]] = {}  # rank class -> slot index -> rows
        for slot, first, num_tokens in tokens:
            rows = range(first, first + num_tokens)
            if num_tokens <= SHORT_TOKENS:
                decodes.setdefault(slot.rank_class, {}).setdefault(slot.index, []).extend(rows)
            else:
                self.segments.append(Segment(slot, banks.targets(slot), slice(rows.start, rows.stop)))
        for rank_class, by_slot in decodes.items():
            self._group(rank_class, by_slot)

    def add(self, paths: tuple[str, ...], x: torch.Tensor, y: torch.Tensor) -> None:
        columns = self._banks.layout.columns(paths)
        for group in self.ranges:
            wanted = tuple(path for path in paths if path in group.targets)
            if wanted:
                delta = self._range_delta(group, wanted, columns, x, y)
                y.index_add_(0, group.scatter, delta)
        for segment in self.segments:
            wanted = tuple(path for path in paths if path in segment.targets)
            if wanted:
                self._run_segment(segment, wanted, columns, x, y)

    def _range_delta(
        self,
        group: Range,
        paths: tuple[str, ...],
        columns: Mapping[str, Span],
        x: torch.Tensor,
        y: torch.Tensor,
    ) -> torch.Tensor:
        """``[n, sum of out]``, in y's type: what to add to each row of ``group.scatter``."""
        banks, rank = self._banks, group.rank_class
        tokens = x.index_select(0, group.gather).to(banks.dtype).view(-1, group.width, x.shape[1])
        new = y.new_empty if len(paths) == len(columns) else y.new_zeros
        delta = new(tokens.shape[0], group.width, y.shape[1])
        for run in banks.layout.runs(paths):
            inner = torch.bmm(tokens, banks.a(run, rank).narrow(0, *group.slots).transpose(1, 2))
            for place, path in enumerate(run):
                own, b = inner.narrow(2, place * rank, rank), banks.b(path, rank).narrow(0, *group.slots)
                delta.narrow(2, *columns[path]).copy_(torch.bmm(own, b))
        flat = delta.view(-1, y.shape[1])
        return flat if group.used is None else flat.index_select(0, group.used)

    def _run_segment(
        self,
        segment: Segment,
        paths: tuple[str, ...],
        columns: Mapping[str, Span],
        x: torch.Tensor,
        y: torch.Tensor,
    ) -> None:
        """Runs in y's type, which adds in place."""
        banks, (rank, index) = self._banks, (segment.slot.rank_class, segment.slot.index)
        tokens, answers = x[segment.rows].to(y.dtype), y[segment.rows]
        for run in banks.layout.runs(paths):
            inner = linear(tokens, banks.a(run, rank)[index].to(y.dtype))
            for place, path in enumerate(run):
                own, b = inner.narrow(1, place * rank, rank), banks.b(path, rank)[index].to(y.dtype)
                answers.narrow(1, *columns[path]).addmm_(own, b)

    def _group(self, rank_class: int, rows: Mapping[int, list[int]]) -> None:
        """Ranges over the slots of a class; those with far more tokens than the others have their own."""
        max_gap = max_gap_of(self._banks.layout, rank_class, self._banks.dtype, self._device)
        while rows:
            width = _cheapest_width([len(own) for own in rows.values()])
            batched = {index: own for index, own in rows.items() if len(own) <= width}
            for slots in compact_ranges(sorted(batched), max_gap):
                self.ranges.append(self._range(rank_class, slots, batched))
            rows = {index: own for index, own in rows.items() if len(own) > width}

    def _range(self, rank_class: int, slots: range, rows: Mapping[int, list[int]]) -> Range:
        own = [rows.get(index, []) for index in slots]
        targets = [
            self._banks.targets(Slot(rank_class, index))
            for index, places in zip(slots, own, strict=True)
            if places
        ]
        width = max(map(len, own))
        scatter = [row for places in own for row in places]
        gather = [row for places in own for row in [*places, *scatter[:1] * (width - len(places))]]
        used = [n * width + i for n, places in enumerate(own) for i in range(len(places))]
        return Range(
            rank_class=rank_class,
            targets=frozenset[str]().union(*targets),
            slots=(slots.start, len(slots)),
            width=width,
            gather=self._index(gather),
            used=None if len(used) == len(gather) else self._index(used),
            scatter=self._index(scatter),
        )

    def _index(self, rows: list[int]) -> torch.Tensor:
        return torch.tensor(rows, device=self._device)


def _cheapest_width(counts: list[int]) -> int:
    """How many tokens per slot a class's batched products have; slots with more get products of their own."""

    def cost(width: int) -> int:
        batched = [count for count in counts if count <= width]
        return RANGE_ROWS * (len(counts) - len(batched)) + len(batched) * width - sum(batched)

    return min(sorted(set(counts)), key=cost)


def max_gap_of(layout: SlotLayout, rank_class: int, dtype: torch.dtype, device: torch.device) -> int:
    """How many unused slots in a row are cheaper to read than one more range's calls."""
    layer_bytes = rank_class * layout.features * dtype.itemsize / len(layout.linears)
    return int(CALL_BYTES.get(device.type, CALL_BYTES["cuda"]) / layer_bytes)


def compact_ranges(indexes: Sequence[int], max_gap: int) -> Iterator[range]:
    """Ranges that cover ascending ``indexes``, over at most ``max_gap`` others in a row."""
    first = last = indexes[0]
    for index in indexes[1:]:
        if index - last > max_gap + 1:
            yield range(first, last + 1)
            first = index
        last = index
    yield range(first, last + 1)
