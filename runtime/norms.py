"""RMSNorm by torch's own operation instead of seven."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import rms_norm


class RmsNorm(nn.Module):
    """``x / rms(x) * weight``, in the type of ``x``."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight = _weight(norm)
        self.in_features = self.weight.shape[0]
        self._eps = _eps(norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight.shape, self.weight, self._eps)


class OffsetRmsNorm(nn.Module):
    """Gemma's: ``x / rms(x) * (1 + weight)``, computed in fp32."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(1.0 + _weight(norm).float(), requires_grad=False)
        self.in_features = self.weight.shape[0]
        self._eps = _eps(norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x.float(), self.weight.shape, self.weight, self._eps).to(x.dtype)


def is_rms_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RMSNorm") and hasattr(module, "weight")


def _weight(norm: nn.Module) -> nn.Parameter:
    weight = norm.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _eps(norm: nn.Module) -> float:
    """Llama's and Gemma's names for it."""
    return float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)  # type: ignore[arg-type]
