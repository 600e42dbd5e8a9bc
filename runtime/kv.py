"""KV tensors of all sequences, outside transformers' Cache: one pair per layer and length class."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import PreTrainedConfig

from tunefleet.runtime.rows import Drop, KvOp, Load, Move, Resize, Row, Save

Pair = tuple[torch.Tensor, torch.Tensor]  # keys and values


def bytes_per_token(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """What one token's keys and values take in all layers; an upper bound where layers differ."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    num_bytes: int = 2 * text.num_hidden_layers * heads * head_dim * dtype.itemsize
    return num_bytes


class KvRows:
    """Keys and values in rows, and copies of what finished sequences left.

    ``runtime.rows.RowTable`` and ``runtime.prefixes.PrefixTable`` say which is whose; nothing here decides.
    Tensors are made when a layer first writes, since heads and head sizes may differ per layer. Places of a
    row behind its tokens hold zeros or what its own sequence wrote there: masked places take part in
    products, and 0 x NaN would be NaN.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._layers: dict[tuple[int, int], Pair] = {}  # (layer, length) -> [rows, kv_heads, length, d]
        self._num_rows: dict[int, int] = {}  # length -> rows
        self._entries: dict[int, dict[int, Pair]] = {}  # entry -> layer -> [kv_heads, tokens, d]

    @property
    def used_bytes(self) -> int:
        pairs = [
            *self._layers.values(),
            *(pair for entry in self._entries.values() for pair in entry.values()),
        ]
        return sum(k.nbytes + v.nbytes for k, v in pairs)

    def apply(self, ops: Iterable[KvOp]) -> None:
        """Does what the tables decided, in their order."""
        for op in ops:
            match op:
                case Move():
                    self._move(op)
                case Save():
                    self._save(op)
                case Load():
                    self._load(op)
                case Drop():
                    self._entries.pop(op.entry, None)
                case Resize():
                    self._resize(op)

    def layer(self, layer: int, length: int, like_k: torch.Tensor, like_v: torch.Tensor) -> Pair:
        """K and V, ``[rows, kv_heads, length, head_dim]``; ``like`` are ``[kv_heads, tokens, head_dim]``."""
        found = self._layers.get((layer, length))
        if found is None:
            found = (self._zeros(length, like_k), self._zeros(length, like_v))
            self._layers[layer, length] = found
        return found

    def clear(self, row: Row) -> None:
        """Zeros a row that has a new holder."""
        for _, pair in self._layers_of(row.length):
            for tensor in pair:
                tensor[row.index].zero_()

    def _move(self, op: Move) -> None:
        for layer, pair in self._layers_of(op.source.length):
            targets = self.layer(layer, op.target.length, pair[0][0], pair[1][0])
            for target, source in zip(targets, pair, strict=True):
                _put(target[op.target.index], source[op.source.index], op.num_tokens)

    def _save(self, op: Save) -> None:
        self._entries[op.entry] = {
            layer: (k[op.row.index, :, : op.num_tokens].clone(), v[op.row.index, :, : op.num_tokens].clone())
            for layer, (k, v) in self._layers_of(op.row.length)
        }

    def _load(self, op: Load) -> None:
        for layer, (k, v) in self._entries[op.entry].items():
            to_k, to_v = self.layer(layer, op.row.length, k, v)
            _put(to_k[op.row.index], k, op.num_tokens)
            _put(to_v[op.row.index], v, op.num_tokens)

    def _resize(self, op: Resize) -> None:
        self._num_rows[op.length] = op.num_rows
        for layer, (k, v) in self._layers_of(op.length):
            if op.num_rows:
                self._layers[layer, op.length] = (_resized(k, op.num_rows), _resized(v, op.num_rows))
            else:
                del self._layers[layer, op.length]

    def _layers_of(self, length: int) -> list[tuple[int, Pair]]:
        return [(layer, pair) for (layer, of_length), pair in self._layers.items() if of_length == length]

    def _zeros(self, length: int, like: torch.Tensor) -> torch.Tensor:
        shape = (self._num_rows[length], like.shape[0], length, like.shape[2])
        return torch.zeros(shape, dtype=like.dtype, device=self._device)


def _put(row: torch.Tensor, source: torch.Tensor, num_tokens: int) -> None:
    """Both ``[kv_heads, length, d]``; nothing of the row's earlier holder stays."""
    row[:, :num_tokens] = source[:, :num_tokens]
    row[:, num_tokens:] = 0


def _resized(tensor: torch.Tensor, num_rows: int) -> torch.Tensor:
    kept = min(num_rows, tensor.shape[0])
    resized = torch.zeros(num_rows, *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device)
    resized[:kept] = tensor[:kept]
    return resized
