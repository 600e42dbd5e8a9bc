"""Many adapters in one forward: layers that add each token's own adapter to the base's answer.

Punica (arXiv 2310.18547) and S-LoRA (arXiv 2311.03285) describe the idea: the base runs once for the whole
batch, each token adds ``B (A x)`` of its own adapter.
"""

from __future__ import annotations

import contextvars
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from tunefleet.core import LinearSpec
from tunefleet.runtime.banks import Banks
from tunefleet.runtime.lora_products import TorchLora
from tunefleet.runtime.slots import Slot


class LoraKernel(Protocol):
    """The products of one step's adapters on one kind of device.

    Made once per step from ``(slot, first, num_tokens)`` of each sequence with an adapter and the banks they
    are in. ``TorchLora`` runs anywhere; a kernel that gathers and multiplies at once (SGMV) needs no more.
    """

    def add(self, paths: tuple[str, ...], x: torch.Tensor, y: torch.Tensor) -> None:
        """As LoraPlan.add."""


class LoraPlan(NamedTuple):
    """Which tokens of a step use which slots; the others are the base's alone, and stay bit for bit."""

    kernel: LoraKernel
    targets: frozenset[str]  # layers that some adapter of the step changes

    def add(self, paths: tuple[str, ...], x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds each token's own ``B (A x)`` to ``y``, in place.

        Args:
            paths: layers that read the same input.
            x: ``[T, in]``.
            y: ``[T, sum of out]``, the base's answers: those of each path, one after another.
        """
        if not self.targets.isdisjoint(paths):
            self.kernel.add(paths, x, y)


def plan_adapters(
    tokens: Sequence[tuple[Slot, int, int]], banks: Banks, device: torch.device
) -> LoraPlan | None:
    """Which adapters a step's tokens use; None if none do.

    Args:
        tokens: ``(slot, first, num_tokens)`` of each sequence with an adapter.

    Raises:
        InvalidState: a slot that isn't filled.
    """
    if not tokens:
        return None
    targets = frozenset[str]().union(*(banks.targets(slot) for slot, _, _ in tokens))
    return LoraPlan(TorchLora(tokens, banks, device), targets)


_plan: contextvars.ContextVar[LoraPlan | None] = contextvars.ContextVar("tunefleet_lora_plan", default=None)


def current_plan() -> LoraPlan | None:
    """The adapters of the forward that runs now."""
    return _plan.get()


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
        self._paths = (path,)

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
            plan.add(self._paths, x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1]))
        return y


def wrap_linears(model: nn.Module, linears: Mapping[str, LinearSpec]) -> None:
    """Puts a LoraLayer around each linear layer that an adapter may target."""
    for path in linears:
        parent, _, name = path.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, name, LoraLayer(getattr(owner, name), path))
