"""Choosing tokens: by the logits and (seed, token index) only, so that a sequence can go on elsewhere.

Temperature comes first, then the cuts, in the order of transformers: ``top_k`` keeps so many tokens,
``top_p`` the fewest of those that reach so much of their probability, ``min_p`` those of them that have at
least so much of the likeliest token's. What is left keeps its proportions.

A row costs what its request asks for: a greedy one a maximum, one without cuts a softmax and a running sum,
one with cuts the 64 likeliest tokens too, or more if they keep more. Only what keeps thousands is sorted. No
operation mixes rows or depends on how many there are: a row's token is the same alone and in any batch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from tunefleet.core import SamplingParams
from tunefleet.messages import TokenLogprob

MIN_TEMPERATURE = 1e-6  # below it logits / temperature leaves fp32; the choice is the best token long before
MIN_LOGPROB = -9999.0  # of a token that can't be, as OpenAI says it: JSON has no infinity
_BLOCK = 512  # tokens; a maximum without its place is three times as fast on a CPU as one with it
_WIDTHS = (64, 512, 4096)  # likeliest tokens to look among, before all are sorted
_MASK = (1 << 64) - 1


class Sampled(NamedTuple):
    """Per row; ``finite`` is False where the row's logits are not numbers and its token means nothing."""

    tokens: list[int]
    finite: list[bool]
    logprobs: list[TokenLogprob | None]  # None where they were not asked for, or mean nothing


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
    best = _best(logits)
    finite = torch.isfinite(best.values).tolist()
    tokens = best.tokens
    drawing = [row for row, param in enumerate(params) if param.temperature > 0 and finite[row]]
    for rows, draw in (
        ([row for row in drawing if not _has_cuts(params[row])], _draw_from_all),
        ([row for row in drawing if _has_cuts(params[row])], _draw_from_likeliest),
    ):
        if rows:
            at = torch.tensor(rows, device=logits.device)
            asked = _Asked.of([params[row] for row in rows], [indexes[row] for row in rows], logits.device)
            probs = torch.softmax(logits[at].float().div_(asked.temperature), dim=-1)
            tokens[at] = draw(probs, asked)
    return Sampled(tokens.tolist(), finite, _logprobs(logits, params, tokens, finite))


class _Best(NamedTuple):
    values: torch.Tensor  # [rows]; NaN where any of the row is
    tokens: torch.Tensor  # [rows]; the first of equals


def _best(logits: torch.Tensor) -> _Best:
    """``logits.max(dim=-1)`` in two levels: the best block of each row, then the best token in it."""
    vocab = logits.shape[-1]
    if vocab < 2 * _BLOCK:
        return _Best(*logits.max(dim=-1))
    blocks = logits.unfold(-1, _BLOCK, _BLOCK).amax(dim=-1)
    if vocab % _BLOCK:  # the last block reaches back into the one before, which wins among equals
        blocks = torch.cat([blocks, logits[:, -_BLOCK:].amax(dim=-1, keepdim=True)], dim=1)
    values, block = blocks.max(dim=-1, keepdim=True)
    ids = (block * _BLOCK).clamp(max=vocab - _BLOCK) + torch.arange(_BLOCK, device=logits.device)
    place = logits.gather(1, ids).argmax(dim=-1, keepdim=True)
    return _Best(values.squeeze(1), ids.gather(1, place).squeeze(1))


class _Asked(NamedTuple):
    """What each drawing row asks for; columns ``[rows, 1]``."""

    temperature: torch.Tensor
    top_k: torch.Tensor  # infinite: off
    top_p: torch.Tensor  # infinite: off
    min_p: torch.Tensor
    uniform: torch.Tensor  # the row's random number

    @classmethod
    def of(cls, params: list[SamplingParams], indexes: list[int], device: torch.device) -> _Asked:
        def column(values: list[float]) -> torch.Tensor:
            return torch.tensor(values, device=device, dtype=torch.float32).unsqueeze(1)

        return cls(
            column([max(param.temperature, MIN_TEMPERATURE) for param in params]),
            column([param.top_k or float("inf") for param in params]),
            column([param.top_p if param.top_p < 1 else float("inf") for param in params]),
            column([param.min_p for param in params]),
            column([uniform(param.seed, index) for param, index in zip(params, indexes, strict=True)]),
        )

    def rows(self, rows: torch.Tensor) -> _Asked:
        return _Asked(*(column[rows] for column in self))


def _has_cuts(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


def _draw_from_all(probs: torch.Tensor, asked: _Asked) -> torch.Tensor:
    """Inverse transform sampling over the ids in their own order: nothing is sorted."""
    cumulative = probs.cumsum_(dim=-1)
    return _invert(cumulative, cumulative[:, -1:].contiguous(), asked.uniform)


def _draw_from_likeliest(probs: torch.Tensor, asked: _Asked) -> torch.Tensor:
    """Inverse transform sampling over what the cuts keep, the likeliest first."""
    tokens = torch.zeros(len(probs), dtype=torch.long, device=probs.device)
    rows = torch.arange(len(probs), device=probs.device)
    for width in (*_WIDTHS, probs.shape[-1]):
        drawn, known = _draw_among(probs[rows], asked.rows(rows), width)
        tokens[rows[known]] = drawn[known]
        rows = rows[~known]
        if not len(rows):
            break
    return tokens


class _Drawn(NamedTuple):
    tokens: torch.Tensor  # [rows]
    known: torch.Tensor  # [rows]: all that the cuts keep was seen; else the token means nothing


def _draw_among(probs: torch.Tensor, asked: _Asked, width: int) -> _Drawn:
    """Draws from what the cuts keep, if that is among the ``width`` likeliest tokens."""
    vocab = probs.shape[-1]
    likeliest, ids = _largest(probs, width)
    width = likeliest.shape[-1]
    place = torch.arange(width, device=probs.device)
    cumulative = likeliest.cumsum(dim=-1)
    last_of_top_k = (asked.top_k.clamp(max=width) - 1).long()
    mass = cumulative.gather(1, last_of_top_k).where(asked.top_k <= width, 1.0)
    kept = (
        (place < asked.top_k)
        & (cumulative - likeliest < asked.top_p * mass)
        & (likeliest >= asked.min_p * likeliest[:, :1])
    )
    num_kept = kept.sum(dim=-1, keepdim=True).clamp(min=1)  # top_p * mass may be 0 in fp32
    # Equals of the last one may lie beyond it, with lower ids than those that are here.
    num_sure = (likeliest > likeliest[:, -1:]).sum(dim=-1, keepdim=True) if width < vocab else width
    known = (num_kept <= num_sure) & ((asked.top_k <= width) | (asked.top_k >= vocab))
    chosen = _invert(cumulative, cumulative.gather(1, num_kept - 1), asked.uniform)
    return _Drawn(ids.gather(1, chosen.unsqueeze(1)).squeeze(1), known.squeeze(1))


def _invert(cumulative: torch.Tensor, mass: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The first place of each row whose running sum is above ``uniform * mass``.

    Rounding must not step past the last token that is possible: the one that brings the sum to ``mass``.
    """
    last = torch.searchsorted(cumulative, mass)
    return torch.minimum(torch.searchsorted(cumulative, uniform * mass, right=True), last).squeeze(1)


def _largest(values: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The ``width`` largest of each row and their ids, largest first, the lower id first among equals.

    Equals of the smallest one may be missing: which of them are there is topk's choice.
    """
    if width >= values.shape[-1]:
        return tuple(values.sort(dim=-1, descending=True, stable=True))  # type: ignore[return-value]  # two
    largest, ids = values.topk(width, dim=-1, sorted=False)
    ids, by_id = ids.sort(dim=-1)
    largest, order = largest.gather(1, by_id).sort(dim=-1, descending=True, stable=True)
    return largest, ids.gather(1, order)


def _logprobs(
    logits: torch.Tensor, params: list[SamplingParams], tokens: torch.Tensor, finite: list[bool]
) -> list[TokenLogprob | None]:
    """Of the logits as they are: before temperature and asked."""
    found: list[TokenLogprob | None] = [None] * len(params)
    asking = {row: param.logprobs for row, param in enumerate(params) if param.logprobs is not None}
    asking = {row: num_top for row, num_top in asking.items() if finite[row]}
    if not asking:
        return found
    rows = torch.tensor(list(asking), device=logits.device)
    logprobs = torch.log_softmax(logits[rows], dim=-1, dtype=torch.float32)
    own = logprobs.gather(1, tokens[rows].unsqueeze(1)).squeeze(1).clamp(min=MIN_LOGPROB).tolist()
    likeliest, ids = _largest(logprobs, _WIDTHS[0] if any(asking.values()) else 1)
    tops = zip(ids.tolist(), likeliest.clamp(min=MIN_LOGPROB).tolist(), strict=True)
    for (row, num_top), logprob, top in zip(asking.items(), own, tops, strict=True):
        found[row] = TokenLogprob(logprob, tuple(zip(*top, strict=True))[:num_top])
    return found


def _splitmix(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
