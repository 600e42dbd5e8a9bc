"""A decoder layer of the Llama family whose parts were fused, with little Python between them."""

from __future__ import annotations

import torch
from torch import nn

from tunefleet.runtime.attention import Predicate
from tunefleet.runtime.fused_attention import Angles, FusedAttention
from tunefleet.runtime.fused_mlp import FusedMlp
from tunefleet.runtime.norms import RmsNorm


class NotFused(Exception):
    """A part of the layer stayed as it was."""


class FusedLayer(nn.Module):
    """``x += attention(norm(x))``, then ``x += mlp(norm(x))``.

    Calls its parts' ``forward``, not the parts: looking for hooks costs more than some of them do.

    Raises:
        NotFused: the layer can't be called this way.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        parts = dict(layer.named_children())
        attention, mlp = parts["self_attn"], parts["mlp"]
        norms = parts["input_layernorm"], parts["post_attention_layernorm"]
        if not (isinstance(attention, FusedAttention) and isinstance(mlp, FusedMlp)):
            raise NotFused
        if not all(isinstance(norm, RmsNorm) for norm in norms):
            raise NotFused
        self.self_attn = attention
        self.mlp = mlp
        self.input_layernorm, self.post_attention_layernorm = norms
        self.in_features = attention.in_features
        self.head_dim = attention.head_dim
        self.num_bytes = 0  # besides its parts'
        self._attention = attention.forward
        self._mlp = mlp.forward
        self._norms = norms[0].forward, norms[1].forward

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Angles,
        attention_mask: Predicate | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        """``[1, T, hidden]`` to the same."""
        before_attention, before_mlp = self._norms
        attended, _ = self._attention(before_attention(hidden_states), position_embeddings, attention_mask)
        attended += hidden_states
        answer: torch.Tensor = self._mlp(before_mlp(attended))
        answer += attended
        return answer
