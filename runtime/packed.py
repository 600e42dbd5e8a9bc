"""Linear layers as one product where they share an input, with weights in the layout that is read fastest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from tunefleet.runtime.lora import LoraLayer, current_plan

PACKED_DTYPES = {torch.bfloat16, torch.float32}  # where it was measured to pay, on CPUs with AVX512
TYPICAL_TOKENS = 32  # the layout is chosen for products of about this many rows; others are right too


class NotPacked(Exception):
    """This torch, device or type has no layout that is faster."""


class Product:
    """``x W^T + b``, with ``W`` packed where that pays.

    Args:
        weight: ``[out, in]``.
        bias: ``[out]``.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        packed = packed_weight(weight)
        self.in_features = weight.shape[1]
        self.is_packed = packed is not None
        self.num_bytes = weight.nbytes + (bias.nbytes if bias is not None else 0)
        self._weight = weight if packed is None else packed
        self._bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not self.is_packed:
            return linear(x, self._weight, self._bias)
        y: torch.Tensor = torch.ops.mkldnn._linear_pointwise.default(
            x, self._weight, self._bias, "none", [], ""
        )
        return y


class Projection:
    """One linear layer, or several with one input, as one product that adds the step's adapters.

    The outputs of siblings are columns, one after another. Holds copies of the weights (``num_bytes``) in
    place of the ones that it was made from. Not a module: its callers are, and a module's call has a price.

    Args:
        layers: what ``runtime.lora.wrap_linears`` made of the model's own.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.paths = tuple(_wrapped(layer).path for layer in layers)
        bases = [_wrapped(layer).base for layer in layers]
        weights = [_weight(base) for base in bases]
        self.widths = [weight.shape[0] for weight in weights]
        self._product = Product(
            torch.cat(weights) if len(weights) > 1 else weights[0], _joined_biases(bases, self.widths)
        )
        self.in_features = self._product.in_features
        self.is_packed = self._product.is_packed
        self.num_bytes = self._product.num_bytes if len(layers) > 1 or self.is_packed else 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``[..., in]`` to ``[..., sum(out)]``."""
        y = self._product(x)
        plan = current_plan()
        if plan is not None:
            plan.add(self.paths, x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1]))
        return y


class PackedLinear(nn.Module):
    """A linear layer that is part of nothing larger that could be replaced.

    Raises:
        NotPacked: there is nothing to gain.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self._projection = Projection([layer])
        if not self._projection.is_packed:
            raise NotPacked
        self.in_features = self._projection.in_features
        self.num_bytes = self._projection.num_bytes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._projection(x)


class PackedHead(nn.Module):
    """The layer that makes logits; no adapter targets it.

    Raises:
        NotPacked: there is nothing to gain.
    """

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        bias = head.bias
        self._product = Product(_weight(head), bias.detach() if isinstance(bias, torch.Tensor) else None)
        if not self._product.is_packed:
            raise NotPacked
        self.in_features = self._product.in_features
        self.num_bytes = self._product.num_bytes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._product(x)


def packed_weight(weight: torch.Tensor) -> torch.Tensor | None:
    """A copy of ``[out, in]`` in oneDNN's own layout; None where this torch or device has none that pays.

    These ops are private to torch: any way in which they may be missing, or refuse, means None.
    """
    if weight.device.type != "cpu" or weight.dtype not in PACKED_DTYPES:
        return None
    try:
        packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), TYPICAL_TOKENS)
        x = weight.new_zeros(1, weight.shape[1])
        torch.ops.mkldnn._linear_pointwise.default(x, packed, None, "none", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return None
    return packed


def is_linear(module: nn.Module) -> bool:
    """Whether it is a wrapped layer that can be part of a product."""
    return isinstance(module, LoraLayer) and isinstance(module.base, (nn.Linear, Conv1D))


def _wrapped(layer: nn.Module) -> LoraLayer:
    assert isinstance(layer, LoraLayer)
    return layer


def _weight(base: nn.Module) -> torch.Tensor:
    """``[out, in]``."""
    assert isinstance(base, (nn.Linear, Conv1D))
    weight: torch.Tensor = base.weight.detach()
    return weight.t() if isinstance(base, Conv1D) else weight


def _joined_biases(bases: list[nn.Module], widths: list[int]) -> torch.Tensor | None:
    """Zeros for layers that have none beside layers that do."""
    biases = [base.bias for base in bases]
    like = next((bias for bias in biases if isinstance(bias, torch.Tensor)), None)
    if like is None:
        return None
    pairs = zip(biases, widths, strict=True)
    return torch.cat(
        [bias.detach() if isinstance(bias, torch.Tensor) else like.new_zeros(width) for bias, width in pairs]
    )
