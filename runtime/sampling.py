"""Choosing tokens: by the logits and (seed, token index) only, so that a sequence can go on elsewhere."""

from __future__ import annotations

from typing import NamedTuple

import torch

from tunefleet.core import SamplingParams

MIN_TEMPERATURE = 1e-6  # below it logits / temperature leaves fp32; the choice is the best token long before
_MASK = (1 << 64) - 1


class Sampled(NamedTuple):
    """Per row; ``finite`` is False where the row's logits are not numbers and its token means nothing."""

    tokens: list[int]
    finite: list[bool]


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) from (seed, token index): SplitMix64 (Steele, Lea, Flood 2014) on both."""
    state = _splitmix(_splitmix(seed & _MASK) ^ index)
    return (state >> 11) / (1 << 53)


def sample(logits: torch.Tensor, params: list[SamplingParams], indexes: list[int]) -> Sampled:
    """One token per row.

    Args:
        logits: ``[rows, vocab]``.
        indexes: the index of each row's token in its answer.
    """
    best = logits.max(dim=-1)
    finite = torch.isfinite(best.values)
    tokens = best.indices
    drawing = [row for row, param in enumerate(params) if param.temperature > 0]
    if drawing:
        rows = torch.tensor(drawing, device=logits.device)
        tokens = tokens.clone()
        tokens[rows] = _draw(
            logits[rows].float(), [params[r] for r in drawing], [indexes[r] for r in drawing]
        )
    return Sampled(tokens.tolist(), finite.tolist())


def _draw(logits: torch.Tensor, params: list[SamplingParams], indexes: list[int]) -> torch.Tensor:
    """Inverse transform sampling on the probabilities, largest first, cut by top_k and then top_p."""
    device = logits.device
    vocab = logits.shape[-1]

    def column(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, device=device, dtype=torch.float32).unsqueeze(1)

    temperature = column([max(param.temperature, MIN_TEMPERATURE) for param in params])
    ordered, order = torch.sort(logits / temperature, dim=-1, descending=True, stable=True)
    top_k = column([param.top_k or vocab for param in params])
    ordered = ordered.masked_fill(torch.arange(vocab, device=device) >= top_k, float("-inf"))
    probs = torch.softmax(ordered, dim=-1)
    before = probs.cumsum(dim=-1) - probs
    probs = probs.masked_fill(before >= column([param.top_p for param in params]), 0.0)
    cumulative = probs.cumsum(dim=-1)
    threshold = (
        column([uniform(p.seed, i) for p, i in zip(params, indexes, strict=True)]) * cumulative[:, -1:]
    )
    chosen = (cumulative <= threshold).sum(dim=-1, keepdim=True)
    # Rounding must not step past the last possible token; where none is (NaN, top_p near 0), the first is it.
    last = ((probs > 0).sum(dim=-1, keepdim=True) - 1).clamp(min=0)
    return order.gather(1, torch.minimum(chosen, last)).squeeze(1)


def _splitmix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
