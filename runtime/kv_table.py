"""All KV of one engine: rows of running sequences and what finished ones left, in one budget.

Pure accounting: what is decided here piles up as KvOps until the next step carries them out, in order.
"""

from __future__ import annotations

from collections.abc import Callable

from tunefleet.runtime.prefixes import Match, PrefixTable
from tunefleet.runtime.rows import Drop, KvOp, Load, RowTable, Save
from tunefleet.runtime.sequence import Sequence

MIN_SAVED = 32  # tokens; a shorter prefix isn't worth an entry


class KvTable:
    """Rows come first: the prefixes that were used least recently make room for them."""

    def __init__(self, rows: RowTable, prefixes: PrefixTable) -> None:
        self.rows = rows
        self.prefixes = prefixes
        self._ops: list[KvOp] = []

    def row_tokens(self, sequence: Sequence) -> int:
        """Tokens that its row takes of the budget once it runs: all it has, and the next one."""
        return self.rows.class_for(len(sequence.tokens) + 1)

    def can_open(self, sequence: Sequence, *, beside: int = 0) -> bool:
        """Whether there is room for its row, and for ``beside`` more tokens, when all prefixes go."""
        return self.rows.can_open(len(sequence.tokens) + 1, beside=beside)

    def open(self, sequence: Sequence) -> int:
        """Opens its row; how many of its tokens have KV already, from a prefix."""
        match = self.prefixes.lookup(sequence.scope, sequence.tokens)
        if match is not None:
            self.prefixes.touch(match.entry)  # so that it is the last to make room
        num_tokens = len(sequence.tokens) + 1
        self._drop_until(lambda: self.rows.can_open(num_tokens, beside=self.prefixes.num_tokens))
        if match is None or match.entry not in self.prefixes:
            self._open_row(sequence, 0)
            return 0
        return self._open_with(sequence, match)

    def extend(self, sequence: Sequence, num_tokens: int) -> bool:
        """Room for ``num_tokens`` in all; False if there is none even without prefixes."""
        request_id = sequence.request_id
        if not self.rows.can_extend(request_id, num_tokens):
            return False
        self._drop_until(
            lambda: self.rows.can_extend(request_id, num_tokens, beside=self.prefixes.num_tokens)
        )
        self._ops += self.rows.extend(request_id, num_tokens, beside=self.prefixes.num_tokens)
        return True

    def close(self, sequence: Sequence, *, keep_prefix: bool) -> None:
        """Frees its row; what it computed stays as a prefix, if that is asked for and there is room."""
        if keep_prefix and sequence.num_computed >= MIN_SAVED:
            self._save(sequence, sequence.tokens[: sequence.num_computed])
        self._ops += self.rows.close(sequence.request_id)

    def forget(self, digest: str) -> None:
        self._ops += map(Drop, self.prefixes.forget(digest))

    def forget_user(self, tenant: str, user_id: str | None) -> None:
        self._ops += map(Drop, self.prefixes.forget_user(tenant, user_id))

    def take_ops(self) -> list[KvOp]:
        """What has to be done before the next forward."""
        ops, self._ops = [*self._ops, *self.rows.shrink()], []
        return ops

    def check(self) -> None:
        """Asserts that both tables hold and keep the budget together."""
        self.rows.check()
        self.prefixes.check()
        used = self.rows.capacity_tokens + self.prefixes.num_tokens
        assert used <= self.rows.budget_tokens, "rows and prefixes are over the budget"

    def _open_row(self, sequence: Sequence, num_loaded: int) -> None:
        self._ops += self.rows.open(
            sequence.request_id,
            len(sequence.tokens) + 1,
            num_loaded=num_loaded,
            beside=self.prefixes.num_tokens,
        )

    def _open_with(self, sequence: Sequence, match: Match) -> int:
        self._open_row(sequence, match.num_tokens)
        self._ops.append(Load(match.entry, self.rows.row_of(sequence.request_id), match.num_tokens))
        return match.num_tokens

    def _save(self, sequence: Sequence, tokens: list[int]) -> None:
        if self.rows.capacity_tokens + len(tokens) > self.rows.budget_tokens:
            self._ops += self.rows.trim()
        room = self.rows.budget_tokens - self.rows.capacity_tokens - len(tokens)
        if room < 0 or self.prefixes.covers(sequence.scope, tokens):
            return
        self._ops += map(Drop, self.prefixes.drop_superseded(sequence.scope, tokens))
        self._drop_until(lambda: self.prefixes.num_tokens <= room)
        entry = self.prefixes.save(sequence.scope, tokens)
        self._ops.append(Save(self.rows.row_of(sequence.request_id), entry, len(tokens)))

    def _drop_until(self, fits: Callable[[], bool]) -> None:
        while not fits():
            self._ops.append(Drop(self.prefixes.drop_oldest()))
