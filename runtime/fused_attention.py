"""Attention blocks of the Llama family: one product for q, k and v, one rotation for q and k."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tunefleet.runtime import attention
from tunefleet.runtime.packed import PackedLinear

Norm = Callable[[torch.Tensor], torch.Tensor]


class FusedAttention(nn.Module):
    """What transformers' block does, up to the engine's seam and after it.

    Args:
        block: one with ``q_proj``, ``k_proj``, ``v_proj`` and ``o_proj`` (wrapped), maybe ``q_norm`` and
            ``k_norm`` over a head, and rotary embeddings over whole heads.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.layer_idx = block.layer_idx
        self.config = block.config
        self.head_dim: int = block.head_dim  # type: ignore[assignment]
        self.scaling: float = block.scaling  # type: ignore[assignment]
        self.softcap: float | None = getattr(block, "attn_logit_softcapping", None)
        self.q_norm: Norm | None = getattr(block, "q_norm", None)
        self.k_norm: Norm | None = getattr(block, "k_norm", None)
        self.qkv = PackedLinear([block.q_proj, block.k_proj, block.v_proj])  # type: ignore[list-item]
        self.out = PackedLinear([block.o_proj])  # type: ignore[list-item]
        self.in_features = self.qkv.in_features
        self._num_heads = [width // self.head_dim for width in self.qkv.widths]

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: attention.Predicate | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        """``[1, T, hidden]`` to the same, as decoder layers call it."""
        _, num_tokens, _ = hidden_states.shape
        num_q, num_k, num_v = self._num_heads
        heads = self.qkv(hidden_states).view(num_tokens, num_q + num_k + num_v, self.head_dim)
        turned = rotated(self._normed(heads), *position_embeddings)
        answer, _ = attention.attend(
            self,
            turned[:, :num_q].transpose(0, 1).unsqueeze(0),
            turned[:, num_q:].transpose(0, 1).unsqueeze(0),
            heads[:, num_q + num_k :].transpose(0, 1).unsqueeze(0),
            attention_mask,
            scaling=self.scaling,
            softcap=self.softcap,
        )
        return self.out(answer.reshape(1, num_tokens, -1)), None

    def _normed(self, heads: torch.Tensor) -> torch.Tensor:
        """The heads of q and k, ``[T, heads, d]``, normalised where the model does that."""
        num_q, num_k, _ = self._num_heads
        if self.q_norm is None or self.k_norm is None:
            return heads[:, : num_q + num_k]
        return torch.cat([self.q_norm(heads[:, :num_q]), self.k_norm(heads[:, num_q : num_q + num_k])], dim=1)


def rotated(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding: ``x * cos + rotate_half(x) * sin``, without making ``rotate_half(x)``.

    Args:
        heads: ``[T, heads, d]``.
        cos, sin: ``[1, T, d]``, as transformers' rotary modules give them.
    """
    half = heads.shape[-1] // 2
    cos, sin = cos[0].unsqueeze(1), sin[0].unsqueeze(1)
    turned = heads * cos
    turned[..., :half].addcmul_(heads[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(heads[..., :half], sin[..., half:])
    return turned
