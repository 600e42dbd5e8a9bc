"""Which sequence's KV is in which row. Pure accounting: no torch, no clock, no I/O.

Rows come in length classes (128, 256, 512 ...). A class keeps its rows compact (0 to n-1), so that one
attention call reads one contiguous block; a sequence that outgrows its row moves to the next class. What a
class has room for, used or not, counts against a budget of tokens, which saved prefixes share.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from tunefleet.errors import InvalidState

SMALLEST_ROW = 128


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    length: int  # tokens it can hold: its length class
    index: int


class Move(NamedTuple):
    """Copy ``num_tokens`` of KV from one row to another."""

    source: Row
    target: Row
    num_tokens: int


class Save(NamedTuple):
    """Copy a row's first ``num_tokens`` into a new prefix entry."""

    row: Row
    entry: int
    num_tokens: int


class Load(NamedTuple):
    """Copy an entry's first ``num_tokens`` into a row."""

    entry: int
    row: Row
    num_tokens: int


class Drop(NamedTuple):
    """Let go of a prefix entry."""

    entry: int


class Resize(NamedTuple):
    """Make a class ``num_rows`` large; rows above are not in use, the others keep what they hold."""

    length: int
    num_rows: int


KvOp = Move | Save | Load | Drop | Resize  # carried out in the order given, before the step's forward


@dataclasses.dataclass
class _Held:
    row: Row
    num_tokens: int  # KV that is there when the step ends


class RowTable:
    """KV rows of all sequences of one engine.

    ``beside`` is what saved prefixes take of the budget. A class grows by doubling, or by just what is needed
    where that is all the budget has; capacity that nobody uses never keeps a row from being opened.

    Args:
        max_tokens: longest sequence; the last length class holds it.
        budget_tokens: rows times their lengths, and saved prefixes, at any time.

    Raises:
        ValueError: a sequence alone couldn't reach ``max_tokens`` within the budget.
    """

    def __init__(self, max_tokens: int, budget_tokens: int) -> None:
        least = least_budget_tokens(max_tokens)
        if budget_tokens < least:
            raise ValueError(
                f"a KV budget of {budget_tokens} tokens can't hold a sequence of {max_tokens} as it grows: "
                f"give it {least} or lower max_model_len"
            )
        self.lengths = tuple(_length_classes(max_tokens))
        self.budget_tokens = budget_tokens
        self._held: dict[str, _Held] = {}
        self._order: dict[int, list[str]] = {length: [] for length in self.lengths}  # row index -> request id
        self._capacity: dict[int, int] = dict.fromkeys(self.lengths, 0)  # length -> rows there is memory for

    @property
    def used_tokens(self) -> int:
        """Rows that sequences hold, times their lengths."""
        return sum(length * len(order) for length, order in self._order.items())

    @property
    def capacity_tokens(self) -> int:
        """Rows that there is memory for, times their lengths."""
        return sum(length * num_rows for length, num_rows in self._capacity.items())

    def row_of(self, request_id: str) -> Row:
        return self._held[request_id].row

    def num_rows(self, length: int) -> int:
        return len(self._order[length])

    def capacity(self, length: int) -> int:
        return self._capacity[length]

    def num_tokens(self, request_id: str) -> int:
        return self._held[request_id].num_tokens

    def class_for(self, num_tokens: int) -> int:
        """The length of the smallest row that holds ``num_tokens``."""
        return next(length for length in self.lengths if length >= num_tokens)

    def can_open(self, num_tokens: int, *, beside: int = 0) -> bool:
        return self.used_tokens + self.class_for(num_tokens) + beside <= self.budget_tokens

    def open(self, request_id: str, num_tokens: int, *, num_loaded: int = 0, beside: int = 0) -> list[KvOp]:
        """A row for a new sequence that will hold at least ``num_tokens``, ``num_loaded`` of them at once."""
        if request_id in self._held:
            raise InvalidState(f"{request_id} has a row already")
        length = self.class_for(num_tokens)
        ops = self._make_room(length, beside)
        self._held[request_id] = _Held(self._append(request_id, length), num_loaded)
        return ops

    def can_extend(self, request_id: str, num_tokens: int, *, beside: int = 0) -> bool:
        """While KV moves up, the old row and the new one exist at once."""
        fits = num_tokens <= self._held[request_id].row.length
        return fits or self.can_open(num_tokens, beside=beside)

    def extend(self, request_id: str, num_tokens: int, *, beside: int = 0) -> list[KvOp]:
        """Makes room for ``num_tokens`` in all."""
        held = self._held[request_id]
        ops: list[KvOp] = []
        if num_tokens > held.row.length:
            length = self.class_for(num_tokens)
            ops += self._make_room(length, beside)
            source, held.row = held.row, self._append(request_id, length)
            ops += [Move(source, held.row, held.num_tokens), *self._vacate(source)]
        held.num_tokens = num_tokens
        return ops

    def close(self, request_id: str) -> list[KvOp]:
        """Frees the row; the moves that keep its class compact."""
        return self._vacate(self._held.pop(request_id).row)

    def shrink(self) -> list[KvOp]:
        """Halves at least what is used by a quarter or less. A class that was used keeps one row."""
        return [
            self._resize(length, max(1, 2 * len(order)))
            for length, order in self._order.items()
            if self._capacity[length] > 1 and len(order) <= self._capacity[length] // 4
        ]

    def trim(self) -> list[KvOp]:
        """Gives back all capacity that nobody uses."""
        return [
            self._resize(length, len(order))
            for length, order in self._order.items()
            if self._capacity[length] > len(order)
        ]

    def check(self) -> None:
        """Asserts that rows are compact, each is held once, and that the budget holds."""
        for length, order in self._order.items():
            rows = sorted(held.row.index for held in self._held.values() if held.row.length == length)
            assert rows == list(range(len(order))), f"rows of {length} are not compact"
            assert len(order) <= self._capacity[length], f"more rows of {length} than there is memory for"
            for index, request_id in enumerate(order):
                assert self._held[request_id].row == Row(length, index), "a row belongs to another sequence"
        for held in self._held.values():
            assert held.num_tokens <= held.row.length, "a sequence is longer than its row"
        assert self.capacity_tokens <= self.budget_tokens, "over the budget"

    def _make_room(self, length: int, beside: int) -> list[KvOp]:
        """Memory for one more row of a class."""
        needed = len(self._order[length]) + 1
        if needed <= self._capacity[length]:
            return []
        ops: list[KvOp] = []
        if self._growth(length, needed) + beside > self.budget_tokens:
            ops += self.trim()
        doubled = max(needed, 2 * self._capacity[length])
        num_rows = doubled if self._growth(length, doubled) + beside <= self.budget_tokens else needed
        if self._growth(length, num_rows) + beside > self.budget_tokens:
            raise InvalidState(f"no room for a row of {length}: ask can_open or can_extend first")
        return [*ops, self._resize(length, num_rows)]

    def _growth(self, length: int, num_rows: int) -> int:
        """Capacity in tokens if a class had ``num_rows``."""
        return self.capacity_tokens + length * (num_rows - self._capacity[length])

    def _resize(self, length: int, num_rows: int) -> Resize:
        self._capacity[length] = num_rows
        return Resize(length, num_rows)

    def _append(self, request_id: str, length: int) -> Row:
        self._order[length].append(request_id)
        return Row(length, len(self._order[length]) - 1)

    def _vacate(self, row: Row) -> list[KvOp]:
        """Takes a row away; the last row of its class moves into the hole."""
        order = self._order[row.length]
        last = order.pop()
        if row.index == len(order):
            return []
        order[row.index] = last
        held = self._held[last]
        source, held.row = held.row, row
        return [Move(source, row, held.num_tokens)]


def least_budget_tokens(max_tokens: int) -> int:
    """What one sequence needs to reach ``max_tokens``: its last row, and the one that it moves from."""
    return sum(_length_classes(max_tokens)[-2:])


def _length_classes(max_tokens: int) -> list[int]:
    lengths = [SMALLEST_ROW]
    while lengths[-1] < max_tokens:
        lengths.append(lengths[-1] * 2)
    return lengths
