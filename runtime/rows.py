"""Which sequence's KV is in which row. Pure accounting: no torch, no clock, no I/O.

Rows come in length classes (128, 256, 512 ...). A class keeps its rows compact (0 to n-1), so that one
attention call reads one contiguous block; a sequence that outgrows its row moves to the next class.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

SMALLEST_ROW = 128


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    length: int  # tokens it can hold: its length class
    index: int


class Move(NamedTuple):
    """Copy ``num_tokens`` of KV from one row to another, in the order given."""

    source: Row
    target: Row
    num_tokens: int


@dataclasses.dataclass
class _Held:
    row: Row
    num_tokens: int  # KV written so far


class RowTable:
    """KV rows of all sequences of one engine.

    Args:
        max_tokens: longest sequence; the last length class.
    """

    def __init__(self, max_tokens: int) -> None:
        self.lengths = tuple(_length_classes(max_tokens))
        self._held: dict[str, _Held] = {}
        self._order: dict[int, list[str]] = {length: [] for length in self.lengths}  # row index -> request id

    def row_of(self, request_id: str) -> Row:
        return self._held[request_id].row

    def num_rows(self, length: int) -> int:
        return len(self._order[length])

    def num_tokens(self, request_id: str) -> int:
        return self._held[request_id].num_tokens

    def open(self, request_id: str, num_tokens: int) -> Row:
        """A row for a new sequence that will hold at least ``num_tokens``."""
        assert request_id not in self._held, "a sequence has one row"
        row = self._append(request_id, self._class_for(num_tokens))
        self._held[request_id] = _Held(row, 0)
        return row

    def extend(self, request_id: str, num_tokens: int) -> list[Move]:
        """Makes room for ``num_tokens`` in all; the moves that brings about."""
        held = self._held[request_id]
        if num_tokens <= held.row.length:
            held_moves: list[Move] = []
        else:
            target = self._append(request_id, self._class_for(num_tokens))
            held_moves = [Move(held.row, target, held.num_tokens), *self._vacate(held.row)]
            held.row = target
        held.num_tokens = num_tokens
        return held_moves

    def close(self, request_id: str) -> list[Move]:
        """Frees the row; the moves that keep its class compact."""
        return self._vacate(self._held.pop(request_id).row)

    def check(self) -> None:
        """Asserts that rows are compact and each is held once."""
        for length, order in self._order.items():
            rows = sorted(held.row.index for held in self._held.values() if held.row.length == length)
            assert rows == list(range(len(order))), f"rows of {length} are not compact"
            for index, request_id in enumerate(order):
                assert self._held[request_id].row == Row(length, index), "a row belongs to another sequence"
        for held in self._held.values():
            assert held.num_tokens <= held.row.length, "a sequence is longer than its row"

    def _class_for(self, num_tokens: int) -> int:
        return next(length for length in self.lengths if length >= num_tokens)

    def _append(self, request_id: str, length: int) -> Row:
        self._order[length].append(request_id)
        return Row(length, len(self._order[length]) - 1)

    def _vacate(self, row: Row) -> list[Move]:
        """Takes a row away; the last row of its class moves into the hole."""
        order = self._order[row.length]
        last = order.pop()
        if row.index == len(order):
            return []
        order[row.index] = last
        held = self._held[last]
        source, held.row = held.row, row
        return [Move(source, row, held.num_tokens)]


def _length_classes(max_tokens: int) -> list[int]:
    lengths = [SMALLEST_ROW]
    while lengths[-1] < max_tokens:
        lengths.append(lengths[-1] * 2)
    return lengths
