"""Attention blocks of the Llama family: one product for q, k and v, one rotation for q and k."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from tunefleet.runtime import attention
from tunefleet.runtime.packed import Projection

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
Angles = tuple[torch.Tensor, torch.Tensor]  # cos and sin, [1, T, head_dim]


class FusedAttention(nn.Module):
    """What transformers' block does, up to the engine's seam and after it.

    Args:
        block: one with ``PROJECTIONS`` (wrapped), rotary embeddings over whole heads, and maybe ``q_norm``
            and ``k_norm`` over a head.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        parts = dict(block.named_children())
        q, k, v, o = (parts[name] for name in PROJECTIONS)
        self.layer_idx = block.layer_idx
        self.head_dim: int = block.head_dim  # type: ignore[assignment]
        self._scaling: float = block.scaling  # type: ignore[assignment]
        self._softcap: float | None = getattr(block, "attn_logit_softcapping", None)
        self._norms = _forwards(parts, "q_norm", "k_norm")
        self._qkv = Projection([q, k, v])
        self._out = Projection([o])
        self._num_heads = [width // self.head_dim for width in self._qkv.widths]
        self.in_features = self._qkv.in_features
        self.num_bytes = self._qkv.num_bytes + self._out.num_bytes

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Angles,
        attention_mask: attention.Predicate | None = None,
        **kwargs: object,
    ) -> tuple[torch.Tensor, None]:
        """``[1, T, hidden]`` to the same, as decoder layers call it."""
        num_q, num_k, num_v = self._num_heads
        num_tokens = hidden_states.shape[1]
        heads = self._qkv(hidden_states).view(num_tokens, num_q + num_k + num_v, self.head_dim)
        turned = rotated(self._normed(heads), position_embeddings)
        answer, _ = attention.attend(
            self,
            turned[:, :num_q].transpose(0, 1).unsqueeze(0),
            turned[:, num_q:].transpose(0, 1).unsqueeze(0),
            heads[:, num_q + num_k :].transpose(0, 1).unsqueeze(0),
            attention_mask,
            scaling=self._scaling,
            softcap=self._softcap,
        )
        return self._out(answer.reshape(1, num_tokens, -1)), None

    def _normed(self, heads: torch.Tensor) -> torch.Tensor:
        """The heads of q and k, ``[T, heads, d]``, normalised where the model does that."""
        num_q, num_k, _ = self._num_heads
        if not self._norms:
            return heads[:, : num_q + num_k]
        q_norm, k_norm = self._norms
        return torch.cat([q_norm(heads[:, :num_q]), k_norm(heads[:, num_q : num_q + num_k])], dim=1)


def rotated(heads: torch.Tensor, angles: Angles) -> torch.Tensor:
    """Rotary embedding of ``[T, heads, d]``: ``x * cos + rotate_half(x) * sin``, without ``rotate_half``."""
    cos, sin = angles[0][0].unsqueeze(1), angles[1][0].unsqueeze(1)
    half = heads.shape[-1] // 2
    turned = heads * cos
    turned[..., :half].addcmul_(heads[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(heads[..., :half], sin[..., half:])
    return turned


def _forwards(parts: dict[str, nn.Module], *names: str) -> list[Callable[[torch.Tensor], torch.Tensor]]:
    return [parts[name].forward for name in names if name in parts]
