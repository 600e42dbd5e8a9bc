"""KV tensors of all sequences, outside transformers' Cache: one pair per layer and length class."""

from __future__ import annotations

import torch

from tunefleet.runtime.rows import Move, Row


class KvRows:
    """Keys and values in rows; ``runtime.rows.RowTable`` says which row is whose.

    Tensors are made when a layer first writes, since heads and head sizes may differ per layer, and double
    when a class needs more rows: memory follows the sequences in flight.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._layers: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}  # (layer, length) -> K, V
        self._capacity: dict[int, int] = {}  # length -> rows

    @property
    def used_bytes(self) -> int:
        return sum(k.nbytes + v.nbytes for k, v in self._layers.values())

    def reserve(self, length: int, num_rows: int) -> None:
        """Makes sure that class ``length`` has ``num_rows`` rows in every layer written so far."""
        capacity = self._capacity.get(length, 0)
        if num_rows <= capacity:
            return
        capacity = max(num_rows, 2 * capacity)
        self._capacity[length] = capacity
        for (layer, layer_length), (k, v) in list(self._layers.items()):
            if layer_length == length:
                self._layers[layer, length] = (_grown(k, capacity), _grown(v, capacity))

    def layer(
        self, layer: int, length: int, like_k: torch.Tensor, like_v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V, ``[rows, kv_heads, length, head_dim]``; ``like`` are ``[kv_heads, tokens, head_dim]``."""
        found = self._layers.get((layer, length))
        if found is None:
            rows = self._capacity[length]
            found = (self._empty(rows, length, like_k), self._empty(rows, length, like_v))
            self._layers[layer, length] = found
        return found

    def move(self, moves: list[Move]) -> None:
        """Copies rows, in the order given; nothing of a target's earlier holder stays."""
        for source, target, num_tokens in moves:
            self.reserve(target.length, target.index + 1)
            for layer in {layer for layer, length in self._layers if length == source.length}:
                k, v = self._layers[layer, source.length]
                to_k, to_v = self.layer(layer, target.length, k[0], v[0])
                for to, tensor in ((to_k, k), (to_v, v)):
                    to[target.index, :, :num_tokens] = tensor[source.index, :, :num_tokens]
                    to[target.index, :, num_tokens:] = 0

    def clear(self, row: Row) -> None:
        """Zeros a row that has a new holder: masked places take part in products, so no NaN may stay."""
        for (_, length), pair in self._layers.items():
            if length == row.length:
                for tensor in pair:
                    tensor[
                        row.index : row.index + 1
                    ].zero_()  # empty where the layer doesn't reach that far yet

    def _empty(self, rows: int, length: int, like: torch.Tensor) -> torch.Tensor:
        # Zeros, not garbage: masked places still take part in products, and 0 x NaN would be NaN.
        return torch.zeros(rows, like.shape[0], length, like.shape[2], dtype=like.dtype, device=self._device)


def _grown(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    larger = torch.zeros(rows, *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device)
    larger[: tensor.shape[0]] = tensor
    return larger
