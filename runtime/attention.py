"""The engine's seam in transformers: its public attention and mask interfaces.

Every model whose attention goes through ``AttentionInterface`` calls :func:`attend` with flat tokens of many
sequences; keys and values go to and come from ``KvRows``. The mask interface hands each layer kind's own
predicate through (causal, sliding window, chunked ...), evaluated here at absolute positions.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from tunefleet.runtime.kv import KvRows
from tunefleet.runtime.rows import Row

NAME = "tunefleet"
Predicate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class DecodeGroup(NamedTuple):
    """Sequences of one length class that add one token each; they hold rows of one compact class."""

    length: int
    num_rows: int  # rows of the class, decoding in this step or not
    num_keys: int  # longest sequence among them, this token included
    flat: torch.Tensor  # [n] places of their tokens in the batch
    rows: torch.Tensor  # [n]
    positions: torch.Tensor  # [n]
    all_positions: torch.Tensor  # [num_rows, 1]; 0 for rows that don't decode now


class PrefillSegment(NamedTuple):
    """A chunk of one sequence's tokens."""

    row: Row
    first: int  # place of its first token in the batch
    start: int  # absolute position of its first token
    num_tokens: int


class StepContext:
    """What attention needs to know of one step; lives for one forward."""

    def __init__(self, kv: KvRows, decodes: list[DecodeGroup], prefills: list[PrefillSegment]) -> None:
        self.kv = kv
        self.decodes = decodes
        self.prefills = prefills
        self._masks: dict[tuple[int, int], torch.Tensor] = {}
        self._predicates: list[Predicate] = []  # keeps them alive, so that an id stays one predicate's

    def mask(self, predicate: Predicate, place: int, queries: torch.Tensor, num_keys: int) -> torch.Tensor:
        """Who may look at whom, bool ``[..., queries, num_keys]``; once per step and mask kind.

        Args:
            place: index of the group or segment in this step.
            queries: absolute positions, ``[..., queries, 1]``.
        """
        key = (id(predicate), place)
        if key not in self._masks:
            self._predicates.append(predicate)
            keys = torch.arange(num_keys, device=queries.device)
            zero = torch.zeros((), dtype=torch.long, device=queries.device)
            self._masks[key] = predicate(zero, zero, queries, keys)
        return self._masks[key]


_step: contextvars.ContextVar[StepContext] = contextvars.ContextVar("tunefleet_step")


@contextmanager
def step_context(context: StepContext) -> Iterator[None]:
    """The step whose tokens the next forward computes."""
    token = _step.set(context)
    try:
        yield
    finally:
        _step.reset(token)


def register() -> None:
    """Adds ``attn_implementation="tunefleet"`` to transformers; more than once does no harm."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, hand_through_predicate)


def hand_through_predicate(
    *args: object, mask_function: Predicate | None = None, **kwargs: object
) -> Predicate:
    """Instead of a T x T mask of flat indexes, the rule itself."""
    return mask_function or _causal


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Predicate | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer for all sequences of the step.

    Args:
        query: ``[1, heads, T, head_dim]``, after RoPE.
        key, value: ``[1, kv_heads, T, head_dim]``.
        attention_mask: the layer's predicate ``(batch, head, query position, key position) -> may look``.
        softcap: Gemma 2's cap on scores.
        s_aux: gpt-oss's sink logits, ``[heads]``.

    Returns:
        ``[1, T, heads, head_dim]`` and no weights.
    """
    context = _step.get()
    layer: int = module.layer_idx  # type: ignore[assignment]
    predicate = attention_mask or _causal
    q, k, v = query[0], key[0], value[0]
    scale = scaling if scaling is not None else q.shape[-1] ** -0.5
    scores = _Scores(scale, softcap, s_aux)
    out = torch.empty(q.shape[1], q.shape[0], v.shape[-1], dtype=q.dtype, device=q.device)
    for place, group in enumerate(context.decodes):
        out[group.flat] = _decode(context, place, group, layer, q, k, v, predicate, scores)
    for place, segment in enumerate(context.prefills, start=len(context.decodes)):
        flat = slice(segment.first, segment.first + segment.num_tokens)
        out[flat] = _prefill(
            context, place, segment, layer, q[:, flat], k[:, flat], v[:, flat], predicate, scores
        )
    return out.unsqueeze(0), None


class _Scores(NamedTuple):
    """How scores become weights in this layer."""

    scale: float
    softcap: float | None
    sinks: torch.Tensor | None

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """``q`` [b, kv_heads, group, t, d]; ``k``, ``v`` [b, kv_heads, keys, d]; mask [b|1, 1, t, keys]."""
        b, kv_heads, group, t, d = q.shape
        if self.softcap is None and self.sinks is None:
            # The query heads of one KV head fold into the query length: K and V are read once, not repeated.
            folded = q.reshape(b, kv_heads, group * t, d)
            wide = mask if t == 1 else mask.repeat(1, 1, group, 1)
            wide = wide.expand(-1, -1, group * t, -1)
            return scaled_dot_product_attention(folded, k, v, attn_mask=wide, scale=self.scale).view(
                b, kv_heads, group, t, v.shape[-1]
            )
        logits = torch.matmul(q, k.unsqueeze(2).transpose(-1, -2)) * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        logits = logits.masked_fill(~mask.unsqueeze(2), torch.finfo(logits.dtype).min)
        if self.sinks is not None:
            sinks = self.sinks.view(1, kv_heads, group, 1, 1).expand(b, -1, -1, t, -1).to(logits.dtype)
            weights = torch.softmax(torch.cat([logits, sinks], dim=-1), dim=-1, dtype=torch.float32)[..., :-1]
        else:
            weights = torch.softmax(logits, dim=-1, dtype=torch.float32)
        return torch.matmul(weights.to(v.dtype), v.unsqueeze(2))


def _decode(
    context: StepContext,
    place: int,
    group: DecodeGroup,
    layer: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    predicate: Predicate,
    scores: _Scores,
) -> torch.Tensor:
    """One token each for a length class: ``[n, heads, head_dim]``."""
    all_k, all_v = context.kv.layer(layer, group.length, k, v)
    all_k[group.rows, :, group.positions] = k[:, group.flat].transpose(0, 1)
    all_v[group.rows, :, group.positions] = v[:, group.flat].transpose(0, 1)
    heads, kv_heads = q.shape[0], k.shape[0]
    queries = torch.zeros(group.num_rows, heads, q.shape[-1], dtype=q.dtype, device=q.device)
    queries[group.rows] = q[:, group.flat].transpose(0, 1)
    queries = queries.view(group.num_rows, kv_heads, heads // kv_heads, 1, -1)
    mask = context.mask(predicate, place, group.all_positions, group.num_keys)  # [rows, keys]
    answer = scores.attention(
        queries,
        all_k[: group.num_rows, :, : group.num_keys],
        all_v[: group.num_rows, :, : group.num_keys],
        mask.view(group.num_rows, 1, 1, group.num_keys),
    )
    return answer.reshape(group.num_rows, heads, -1)[group.rows]


def _prefill(
    context: StepContext,
    place: int,
    segment: PrefillSegment,
    layer: int,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    predicate: Predicate,
    scores: _Scores,
) -> torch.Tensor:
    """A chunk of one sequence on all its keys so far: ``[tokens, heads, head_dim]``."""
    all_k, all_v = context.kv.layer(layer, segment.row.length, k, v)
    end = segment.start + segment.num_tokens
    row_k, row_v = all_k[segment.row.index], all_v[segment.row.index]
    row_k[:, segment.start : end] = k
    row_v[:, segment.start : end] = v
    positions = torch.arange(segment.start, end, device=q.device).unsqueeze(1)
    mask = context.mask(predicate, place, positions, end)  # [tokens, keys]
    heads, kv_heads = q.shape[0], k.shape[0]
    answer = scores.attention(
        q.view(1, kv_heads, heads // kv_heads, segment.num_tokens, -1),
        row_k[None, :, :end],
        row_v[None, :, :end],
        mask.view(1, 1, segment.num_tokens, end),
    )
    return answer.reshape(heads, segment.num_tokens, -1).transpose(0, 1)


def _causal(_: torch.Tensor, __: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return keys <= queries
