"""Does a replacement compute what the module computes that it replaces? With adapters and without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import nn

from tunefleet.core import LinearSpec
from tunefleet.runtime.attention import DecodeGroup, PrefillSegment, StepContext, step_context
from tunefleet.runtime.fused_attention import FusedAttention
from tunefleet.runtime.fused_layer import FusedLayer
from tunefleet.runtime.kv import KvRows
from tunefleet.runtime.lora import LoraPlan, lora_plan
from tunefleet.runtime.packed import PackedHead
from tunefleet.runtime.rows import SMALLEST_ROW, Resize, Row

PROMPTS = (7, 4)  # tokens of the sequences that a checked module sees


class RewriteCheck:
    """Compares modules on the same random tokens."""

    def __init__(self, linears: Mapping[str, LinearSpec], dtype: torch.dtype, device: torch.device) -> None:
        self._plans = (None, cast(LoraPlan, _EveryToken(linears)))
        self._dtype = dtype
        self._device = device

    def difference(self, module: nn.Module, replacement: nn.Module) -> float:
        """The length of the difference between their answers, as a part of the answer's; NaN where one is."""
        parts = []
        for plan in self._plans[:1] if isinstance(replacement, PackedHead) else self._plans:
            with lora_plan(plan):
                expected, actual = (self._answer(each, replacement) for each in (module, replacement))
            parts.append((expected - actual).norm() / expected.norm())
        return float(torch.stack(parts).max())  # keeps a NaN, which Python's max loses

    def _answer(self, module: nn.Module, replacement: nn.Module) -> torch.Tensor:
        in_features = cast(int, replacement.in_features)
        if isinstance(replacement, (FusedAttention, FusedLayer)):
            return self._with_context(module, in_features, replacement.head_dim)
        answer: torch.Tensor = module(self._random(sum(PROMPTS), in_features))
        return answer.float()

    def _with_context(self, block: nn.Module, hidden_size: int, head_dim: int) -> torch.Tensor:
        """Prompts of two sequences, then one token of each: ``[tokens, hidden]``."""
        kv = KvRows(self._device)
        kv.apply([Resize(SMALLEST_ROW, len(PROMPTS))])
        prompts = [
            PrefillSegment(Row(SMALLEST_ROW, row), sum(PROMPTS[:row]), 0, num_tokens)
            for row, num_tokens in enumerate(PROMPTS)
        ]
        decoding = [(row, row, position) for row, position in enumerate(PROMPTS)]
        group = DecodeGroup(SMALLEST_ROW, len(PROMPTS), decoding, self._device)
        answers = []
        for context in (StepContext(kv, [], prompts), StepContext(kv, [group], [])):
            num_tokens = len(PROMPTS) if context.decodes else sum(PROMPTS)
            angles = self._random(1, num_tokens, head_dim // 2).repeat(1, 1, 2)
            with step_context(context):
                answer = block(
                    hidden_states=self._random(1, num_tokens, hidden_size),
                    position_embeddings=(angles.cos(), angles.sin()),
                    attention_mask=None,
                )
            answers.append((answer if isinstance(answer, torch.Tensor) else answer[0])[0].float())
        return torch.cat(answers)

    def _random(self, *shape: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(sum(shape))
        return torch.randn(shape, generator=generator).to(self._device, self._dtype)


class _EveryToken:
    """Stands in for a step's plan: every token has the same adapter, of rank 1."""

    def __init__(self, linears: Mapping[str, LinearSpec]) -> None:
        self._linears = linears

    def add(self, paths: tuple[str, ...], x: torch.Tensor, y: torch.Tensor) -> None:
        """Adds to ``y`` ``[T, out]`` what differs by layer, so that none may be mistaken for another."""
        waves = [
            (torch.arange(self._linears[path].out_features) + sum(path.encode())).sin() for path in paths
        ]
        y += x[:, :1] * torch.cat(waves).to(y.device, y.dtype)
