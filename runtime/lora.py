"""Many adapters in one forward: stacked LoRA tensors, and layers that apply them to their own tokens only.

Punica (arXiv 2310.18547) and S-LoRA (arXiv 2311.03285) describe the idea: the base runs once for the whole
batch, each token adds ``B (A x)`` of its own adapter. Here the adapters of one rank class are stacked, so
that a decode step is two batched products per layer, and each active adapter is read once.
"""

from __future__ import annotations

import contextvars
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import linear

from tunefleet.core import LinearSpec
from tunefleet.runtime.slots import Slot


class Bank:
    """The slots of one rank class: per layer ``A [slots, rank, in]`` and ``B [slots, rank, out]``, scaled.

    An empty slot holds zeros. Layers get tensors when an adapter first targets them; slots double as needed.
    """

    def __init__(
        self, rank: int, linears: Mapping[str, LinearSpec], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.rank = rank
        self.targets: dict[int, frozenset[str]] = {}  # slot -> layers it touches
        self._linears = linears
        self._dtype = dtype
        self._device = device
        self._num_slots = 0
        self._stacks: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def stack(self, path: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self._stacks[path]

    def fill(self, slot: int, weights: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Copies one adapter in; ``weights``: per layer ``A [r, in]``, ``B [r, out]`` with ``r <= rank``."""
        self.empty(slot)
        self._reserve(slot + 1)
        self.targets[slot] = frozenset(weights)
        for path, (a, b) in weights.items():
            stack_a, stack_b = self._layer(path)
            stack_a[slot, : a.shape[0]] = a
            stack_b[slot, : b.shape[0]] = b

    def empty(self, slot: int) -> None:
        """Back to zeros: a slot that is used again, or half filled, never shows what was in it."""
        for path in self.targets.pop(slot, frozenset()):
            for stack in self._stacks[path]:
                stack[slot].zero_()

    def _reserve(self, num_slots: int) -> None:
        if num_slots <= self._num_slots:
            return
        self._num_slots = max(num_slots, 2 * self._num_slots)
        for path, (a, b) in self._stacks.items():
            self._stacks[path] = (_grown(a, self._num_slots), _grown(b, self._num_slots))

    def _layer(self, path: str) -> tuple[torch.Tensor, torch.Tensor]:
        if path not in self._stacks:
            spec = self._linears[path]
            self._stacks[path] = (self._zeros(spec.in_features), self._zeros(spec.out_features))
        return self._stacks[path]

    def _zeros(self, features: int) -> torch.Tensor:
        return torch.zeros(self._num_slots, self.rank, features, dtype=self._dtype, device=self._device)


class Banks:
    """All rank classes of one device."""

    def __init__(self, linears: Mapping[str, LinearSpec], dtype: torch.dtype, device: torch.device) -> None:
        self._linears = linears
        self._dtype = dtype
        self._device = device
        self._banks: dict[int, Bank] = {}

    def slot_bytes(self, rank: int) -> int:
        """Bytes of one slot that targets every layer."""
        features = sum(spec.in_features + spec.out_features for spec in self._linears.values())
        return features * rank * self._dtype.itemsize

    def of(self, rank: int) -> Bank:
        if rank not in self._banks:
            self._banks[rank] = Bank(rank, self._linears, self._dtype, self._device)
        return self._banks[rank]

    def fill(self, slot: Slot, weights: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.of(slot.rank_class).fill(slot.index, weights)

    def empty(self, slot: Slot) -> None:
        self.of(slot.rank_class).empty(slot.index)


class Singles(NamedTuple):
    """Tokens of one rank class in one batched product: ``width`` places for each slot of a compact range.

    Slots without a token in the step, and unused places, compute on a copy of some token and are dropped.
    """

    bank: Bank
    targets: frozenset[str]
    first_slot: int
    num_slots: int
    width: int
    gather: torch.Tensor  # [num_slots * width] place in the batch of each place's token
    used: torch.Tensor | None  # [n] which places count; None: all, in order
    scatter: torch.Tensor  # [n] place in the batch of each that counts


class Segment(NamedTuple):
    """A run of tokens of one adapter: a prefill chunk."""

    bank: Bank
    targets: frozenset[str]
    slot: int
    first: int
    num_tokens: int


class LoraPlan(NamedTuple):
    """Which tokens of a step use which slots; tokens in neither list are the base's alone."""

    singles: tuple[Singles, ...]
    segments: tuple[Segment, ...]

    def add(self, path: str, x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds each token's own ``B (A x)`` to ``y``, in place.

        Args:
            path: the layer.
            x: ``[T, in]``.
            y: ``[T, out]``, the base's answer.
        """
        for group in self.singles:
            if path in group.targets:
                _add_singles(group, path, x, y)
        for segment in self.segments:
            if path in segment.targets:
                a, b = segment.bank.stack(path)
                rows = slice(segment.first, segment.first + segment.num_tokens)
                y[rows] += (linear(x[rows].to(a.dtype), a[segment.slot]) @ b[segment.slot]).to(y.dtype)


def _add_singles(group: Singles, path: str, x: torch.Tensor, y: torch.Tensor) -> None:
    a, b = group.bank.stack(path)
    slots = slice(group.first_slot, group.first_slot + group.num_slots)
    tokens = x[group.gather].to(a.dtype).view(group.num_slots, group.width, -1)
    delta = torch.bmm(torch.bmm(tokens, a[slots].transpose(1, 2)), b[slots])
    delta = delta.view(group.num_slots * group.width, -1)
    if group.used is not None:
        delta = delta[group.used]
    y.index_add_(0, group.scatter, delta.to(y.dtype))


_plan: contextvars.ContextVar[LoraPlan | None] = contextvars.ContextVar("tunefleet_lora_plan", default=None)


@contextmanager
def lora_plan(plan: LoraPlan | None) -> Iterator[None]:
    """The adapters of the next forward."""
    token = _plan.set(plan)
    try:
        yield
    finally:
        _plan.reset(token)


class LoraLayer(nn.Module):
    """A linear layer of the base, frozen, that adds the step's adapters."""

    def __init__(self, base: nn.Module, path: str) -> None:
        super().__init__()
        self.base = base
        self.path = path

    def __getattr__(self, name: str) -> Any:
        """Models peek at their layers (``weight.dtype`` and the like): show the base's."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base"), name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(x)
        plan = _plan.get()
        if plan is not None:
            plan.add(self.path, x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1]))
        return y


def wrap_linears(model: nn.Module, linears: Mapping[str, LinearSpec]) -> None:
    """Puts a LoraLayer around each linear layer that an adapter may target."""
    for path in linears:
        parent, _, name = path.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, name, LoraLayer(getattr(owner, name), path))


def plan_adapters(tokens: list[tuple[Slot, int, int]], banks: Banks, device: torch.device) -> LoraPlan | None:
    """Groups a step's tokens by rank class and slot.

    Args:
        tokens: ``(slot, first, num_tokens)`` of each sequence with an adapter.
    """
    singles: dict[int, list[tuple[int, int]]] = {}
    segments = []
    for slot, first, num_tokens in tokens:
        if num_tokens == 1:
            singles.setdefault(slot.rank_class, []).append((slot.index, first))
        else:
            bank = banks.of(slot.rank_class)
            segments.append(Segment(bank, bank.targets[slot.index], slot.index, first, num_tokens))
    groups = [group for rank, pairs in singles.items() for group in _group(banks.of(rank), pairs, device)]
    return LoraPlan(tuple(groups), tuple(segments)) if groups or segments else None


def _group(bank: Bank, pairs: list[tuple[int, int]], device: torch.device) -> Iterator[Singles]:
    """Batched products over compact ranges of slots; a gap in the slots starts a new range."""
    by_slot: dict[int, list[int]] = {}
    for slot, place in pairs:
        by_slot.setdefault(slot, []).append(place)
    for slots in _compact_ranges(sorted(by_slot)):
        width = max(len(by_slot.get(slot, ())) for slot in slots)
        some = by_slot[slots[0]][0]
        places = [by_slot.get(slot, []) for slot in slots]
        gather = [place for row in places for place in [*row, *[some] * (width - len(row))]]
        used = [n * width + i for n, row in enumerate(places) for i in range(len(row))]
        scatter = [place for row in places for place in row]
        yield Singles(
            bank=bank,
            targets=frozenset().union(*(bank.targets[slot] for slot in slots if slot in by_slot)),
            first_slot=slots[0],
            num_slots=len(slots),
            width=width,
            gather=torch.tensor(gather, device=device),
            used=None if len(used) == len(gather) else torch.tensor(used, device=device),
            scatter=torch.tensor(scatter, device=device),
        )


def _compact_ranges(slots: list[int], max_gap: int = 2) -> Iterator[range]:
    """Ranges that cover ``slots``, skipping over at most ``max_gap`` unused ones in a row."""
    first = last = slots[0]
    for slot in slots[1:]:
        if slot - last > max_gap + 1:
            yield range(first, last + 1)
            first = slot
        last = slot
    yield range(first, last + 1)


def _grown(stack: torch.Tensor, num_slots: int) -> torch.Tensor:
    larger = torch.zeros(num_slots, *stack.shape[1:], dtype=stack.dtype, device=stack.device)
    larger[: stack.shape[0]] = stack
    return larger
