"""RMSNorm by torch's own operation instead of seven."""

from __future__ import annotations

import torch
from torch import nn


class RmsNorm(nn.Module):
    """``x / rms(x) * weight``, in the type of ``x``."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self._weight = _weight(norm)
        self._shape = list(self._weight.shape)
        self._eps = _eps(norm)
        self.in_features = self._shape[0]
        self.num_bytes = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.rms_norm(x, self._shape, self._weight, self._eps)


class OffsetRmsNorm(nn.Module):
    """Gemma's: ``x / rms(x) * (1 + weight)``, computed in fp32."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self._weight = 1.0 + _weight(norm).float()
        self._shape = list(self._weight.shape)
        self._eps = _eps(norm)
        self.in_features = self._shape[0]
        self.num_bytes = self._weight.nbytes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.rms_norm(x.float(), self._shape, self._weight, self._eps).to(x.dtype)


def is_rms_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RMSNorm") and hasattr(module, "weight")


def _weight(norm: nn.Module) -> torch.Tensor:
    weight = norm.weight
    assert isinstance(weight, nn.Parameter)
    return weight.detach()


def _eps(norm: nn.Module) -> float:
    """Llama's and Gemma's names for it."""
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)  # type: ignore[arg-type]
