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
MIN_WHOLE_ROWS = 4
Predicate = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class DecodeGroup:
    """Sequences of one length class that add one token each; they hold rows of one compact class.

    Args:
        num_rows: rows of the class, decoding in this step or not.
        decoding: ``(place in the batch, row, position)`` of each.
    """

    def __init__(
        self, length: int, num_rows: int, decoding: list[tuple[int, int, int]], device: torch.device
    ) -> None:
        self.length = length
        self.num_rows = num_rows
        self.num_keys = max(position for _, _, position in decoding) + 1
        places = [place for place, _, _ in decoding]
        positions = [0] * num_rows
        for _, row, position in decoding:
            positions[row] = position
        in_order = [row for _, row, _ in decoding] == list(range(num_rows))
        self.span: slice | None = None  # of the batch: all rows of the class, one after another
        if in_order and places == list(range(places[0], places[0] + num_rows)):
            self.span = slice(places[0], places[0] + num_rows)
        self.positions = torch.tensor(positions, device=device).unsqueeze(
            1
        )  # [num_rows, 1]; 0: doesn't decode
        self._rows = torch.tensor([row for _, row, _ in decoding], device=device)
        self._places = torch.tensor(places, device=device)
        self._targets: dict[int, torch.Tensor] = {}

    def take(self, flat: torch.Tensor) -> torch.Tensor:
        """Of ``[heads, T, d]`` what decodes here: ``[decoding, heads, d]``."""
        by_token = flat.transpose(0, 1)
        return by_token[self._places if self.span is None else self.span]

    def to_rows(self, taken: torch.Tensor) -> torch.Tensor:
        """``[num_rows, ...]``, with zeros where a row doesn't decode."""
        if self.span is not None:
            return taken
        return taken.new_zeros(self.num_rows, *taken.shape[1:]).index_copy_(0, self._rows, taken)

    def put(self, out: torch.Tensor, of_rows: torch.Tensor) -> None:
        """Writes ``[num_rows, ...]`` to the batch's places in ``out`` ``[T, ...]``."""
        if self.span is not None:
            out[self.span] = of_rows
        else:
            out.index_copy_(0, self._places, of_rows[self._rows])

    def write(self, rows: torch.Tensor, taken: torch.Tensor) -> None:
        """Writes each new key or value to its row and position of ``[rows, kv_heads, length, d]``."""
        flat = rows.view(-1, rows.shape[-1])
        flat.index_copy_(0, self._target(rows.shape[1]), taken.reshape(-1, rows.shape[-1]))

    def _target(self, kv_heads: int) -> torch.Tensor:
        if kv_heads not in self._targets:
            heads = torch.arange(kv_heads, device=self._rows.device)
            first = (self._rows.unsqueeze(1) * kv_heads + heads) * self.length
            self._targets[kv_heads] = (first + self.positions[self._rows]).flatten()
        return self._targets[kv_heads]


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
        self._masks: dict[tuple[int, int, int, torch.dtype], torch.Tensor] = {}
        self._predicates: list[Predicate] = []  # keeps them alive, so that an id stays one predicate's

    def mask(
        self, predicate: Predicate, place: int, queries: torch.Tensor, num_keys: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """Who may look at whom, ``[..., queries, num_keys]``: bool, or what is added to scores.

        Made once per step, mask kind and type.

        Args:
            place: index of the group or segment in this step.
            queries: absolute positions, ``[..., queries, 1]``.
        """
        key = (id(predicate), place, num_keys, dtype)
        if key not in self._masks:
            self._predicates.append(predicate)
            keys = torch.arange(num_keys, device=queries.device)
            zero = torch.zeros((), dtype=torch.long, device=queries.device)
            mask = predicate(zero, zero, queries, keys)
            if dtype != torch.bool:
                hidden = torch.tensor(float("-inf"), dtype=dtype, device=queries.device)
                mask = torch.where(mask, torch.zeros((), dtype=dtype, device=queries.device), hidden)
            self._masks[key] = mask
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
    scores = _Scores(scaling if scaling is not None else q.shape[-1] ** -0.5, softcap, s_aux)
    out = torch.empty(q.shape[1], q.shape[0], v.shape[-1], dtype=q.dtype, device=q.device)
    for place in range(len(context.decodes)):
        _decode(context, place, layer, (q, k, v), predicate, scores, out)
    for place, segment in enumerate(context.prefills):
        flat = slice(segment.first, segment.first + segment.num_tokens)
        chunk = (q[:, flat], k[:, flat], v[:, flat])
        out[flat] = _prefill(context, place, layer, chunk, predicate, scores)
    return out.unsqueeze(0), None


class _Scores(NamedTuple):
    """How scores become weights in this layer."""

    scale: float
    softcap: float | None
    sinks: torch.Tensor | None

    @property
    def is_plain(self) -> bool:
        """Whether torch's own attention computes it."""
        return self.softcap is None and self.sinks is None

    def reads_whole_rows(self, group: DecodeGroup, q: torch.Tensor) -> bool:
        """Whether ``whole_rows`` is the faster way: twice as fast on a CPU, but not for a row alone."""
        narrow = q.device.type == "cpu" and q.dtype == torch.bfloat16
        return self.is_plain and narrow and group.num_rows >= MIN_WHOLE_ROWS

    def whole_rows(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """One query token per row, on dense keys and values; oneDNN would copy a slice of them.

        Args:
            q: ``[n, heads, d]``.
            k, v: ``[n, kv_heads, length, d]``, contiguous.
            mask: ``[n, length]``, added to the scores.

        Returns:
            ``[n, heads, d]``.
        """
        n, kv_heads, length, _ = k.shape
        queries = (q * self.scale).reshape(n * kv_heads, -1, q.shape[-1])
        logits = torch.bmm(queries, k.flatten(0, 1).transpose(1, 2))
        logits.view(n, -1, length).add_(mask.unsqueeze(1))
        return torch.bmm(torch.softmax(logits, dim=-1), v.flatten(0, 1)).view(n, -1, v.shape[-1])

    def mask_dtype(self, q: torch.Tensor) -> torch.dtype:
        return q.dtype if self.is_plain else torch.bool

    def attention(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """``q`` [b, kv_heads, group, t, d]; ``k``, ``v`` [b, kv_heads, keys, d]; mask [b|1, 1, t, keys]."""
        b, kv_heads, group, t, d = q.shape
        if self.is_plain:
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


_Flat = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # q, k, v: [heads, T, d]


def _decode(
    context: StepContext,
    place: int,
    layer: int,
    flat: _Flat,
    predicate: Predicate,
    scores: _Scores,
    out: torch.Tensor,
) -> None:
    """One token each for a length class, into ``out`` ``[T, heads, d]``."""
    group = context.decodes[place]
    q, k, v = flat
    all_k, all_v = context.kv.layer(layer, group.length, k, v)
    group.write(all_k, group.take(k))
    group.write(all_v, group.take(v))
    n, heads, kv_heads = group.num_rows, q.shape[0], k.shape[0]
    is_whole = scores.reads_whole_rows(group, q)
    keys = group.length if is_whole else group.num_keys
    mask = context.mask(predicate, place, group.positions, keys, scores.mask_dtype(q))  # [n, keys]
    queries = group.to_rows(group.take(q))
    if is_whole:
        answer = scores.whole_rows(queries, all_k[:n], all_v[:n], mask)
    else:
        answer = scores.attention(
            queries.reshape(n, kv_heads, heads // kv_heads, 1, -1),
            all_k[:n, :, :keys],
            all_v[:n, :, :keys],
            mask.view(n, 1, 1, keys),
        )
    group.put(out, answer.reshape(n, heads, -1))


def _prefill(
    context: StepContext, place: int, layer: int, chunk: _Flat, predicate: Predicate, scores: _Scores
) -> torch.Tensor:
    """A chunk of one sequence on all its keys so far: ``[tokens, heads, d]``."""
    segment = context.prefills[place]
    q, k, v = chunk
    all_k, all_v = context.kv.layer(layer, segment.row.length, k, v)
    end = segment.start + segment.num_tokens
    row_k, row_v = all_k[segment.row.index], all_v[segment.row.index]
    row_k[:, segment.start : end] = k
    row_v[:, segment.start : end] = v
    positions = torch.arange(segment.start, end, device=q.device).unsqueeze(1)
    mask_place = len(context.decodes) + place
    mask = context.mask(predicate, mask_place, positions, end, scores.mask_dtype(q))  # [tokens, keys]
    heads, kv_heads = q.shape[0], k.shape[0]
    answer = scores.attention(
        q.reshape(1, kv_heads, heads // kv_heads, segment.num_tokens, -1),
        row_k[None, :, :end],
        row_v[None, :, :end],
        mask.view(1, 1, segment.num_tokens, end),
    )
    return answer.reshape(heads, segment.num_tokens, -1).transpose(0, 1)


def _causal(_: torch.Tensor, __: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    return keys <= queries
