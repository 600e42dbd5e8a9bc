"""Who runs in the next step. Pure: no torch, no clock, no I/O.

Continuous batching: each step gives every running sequence its next tokens (one when decoding, a chunk of the
prompt when prefilling), and sequences join and leave between any two steps.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Collection
from typing import NamedTuple

from tunefleet.core import FinishReason
from tunefleet.runtime.rows import Move, RowTable
from tunefleet.runtime.sequence import Sequence, SequenceState
from tunefleet.runtime.slots import Activation, Slot, SlotTable


class Scheduled(NamedTuple):
    """``num_tokens`` of a sequence, from its ``num_computed`` on, run in this step."""

    sequence: Sequence
    num_tokens: int
    slot: Slot | None  # of its adapter, looked up for this very step

    @property
    def samples(self) -> bool:
        """Whether the step reaches the sequence's end, so that a token is sampled."""
        return self.num_tokens == self.sequence.num_uncomputed


@dataclasses.dataclass
class Batch:
    """One step's work."""

    scheduled: list[Scheduled]
    moves: list[Move]


class Admission(NamedTuple):
    """A sequence that joins; ``activation`` fills its slot first, if it had none."""

    sequence: Sequence
    activation: Activation | None


class Scheduler:
    """Waiting and running sequences of one engine; owns their rows and pins.

    Args:
        max_num_seqs: sequences in one batch.
        max_batch_tokens: tokens in one step; longer prompts are prefilled in chunks.
        max_model_len: tokens of prompt and answer.
    """

    def __init__(
        self,
        slots: SlotTable,
        rows: RowTable,
        *,
        max_num_seqs: int,
        max_batch_tokens: int,
        max_model_len: int,
        eos_token_ids: frozenset[int],
    ) -> None:
        self.slots = slots
        self.rows = rows
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._sequences: dict[str, Sequence] = {}
        self._max_num_seqs = max_num_seqs
        self._max_batch_tokens = max_batch_tokens
        self._max_model_len = max_model_len
        self._eos = eos_token_ids
        self._pending_moves: list[Move] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def get(self, request_id: str) -> Sequence | None:
        return self._sequences.get(request_id)

    def add(self, sequence: Sequence) -> None:
        self._sequences[sequence.request_id] = sequence
        self.waiting.append(sequence)

    def admit(self, loaded: Collection[str]) -> Admission | None:
        """Lets the first waiting sequence join whose adapter can be resident; the caller repeats until None.

        Args:
            loaded: digests whose prepared file is at hand, so that a slot could be filled now.
        """
        if len(self.running) >= self._max_num_seqs:
            return None
        for sequence in self.waiting:
            digest = sequence.digest
            if digest is None or self.slots.lookup(digest) is not None:
                return self._join(sequence, None)
            if digest in loaded and sequence.adapter is not None:
                activation = self.slots.activate(digest, sequence.adapter.rank)
                if activation is not None:
                    return self._join(sequence, activation)
        return None

    def schedule(self) -> Batch:
        """The next step's batch: decodes first, then prefill chunks within the token budget."""
        scheduled: list[Scheduled] = []
        budget = self._max_batch_tokens
        for sequence in sorted(self.running, key=lambda sequence: sequence.num_uncomputed > 1):
            num_tokens = min(sequence.num_uncomputed, budget)
            if num_tokens > 0:
                budget -= num_tokens
                scheduled.append(Scheduled(sequence, num_tokens, self._slot_of(sequence)))
                self._pending_moves += self.rows.extend(
                    sequence.request_id, sequence.num_computed + num_tokens
                )
        moves, self._pending_moves = self._pending_moves, []
        return Batch(scheduled, moves)

    def advance(self, batch: Batch, sampled: dict[str, int]) -> list[Sequence]:
        """Takes in a step's sampled tokens; returns the sequences that are finished now."""
        finished = []
        for sequence, num_tokens, _ in batch.scheduled:
            if sequence.state is SequenceState.FINISHED:
                continue  # ended while the step ran
            sequence.num_computed += num_tokens
            if sequence.request_id in sampled:
                sequence.tokens.append(sampled[sequence.request_id])
                reason = self._finish_reason(sequence)
                if reason is not None:
                    self.finish(sequence, reason)
                    finished.append(sequence)
        return finished

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Ends a sequence in any state: its row and pin are free at once."""
        if sequence.state is SequenceState.FINISHED:
            return
        if sequence.state is SequenceState.RUNNING:
            self.running.remove(sequence)
            self._pending_moves += self.rows.close(sequence.request_id)
            if sequence.digest is not None:
                self.slots.unpin(sequence.digest)
        else:
            self.waiting.remove(sequence)
        sequence.state = SequenceState.FINISHED
        sequence.finish_reason = reason
        del self._sequences[sequence.request_id]

    def check(self) -> None:
        """Asserts that rows, pins and lists agree."""
        self.slots.check()
        self.rows.check()
        assert len(self.running) <= self._max_num_seqs
        assert len(self.running) + len(self.waiting) == len(self._sequences)
        for sequence in self.running:
            assert sequence.state is SequenceState.RUNNING
            assert sequence.digest is None or self.slots.is_pinned(sequence.digest), (
                "a slot in use is not pinned"
            )
        for digest in self.slots.digests:
            users = any(sequence.digest == digest for sequence in self.running)
            assert users == self.slots.is_pinned(digest), "a pin without a sequence"
        assert sum(self.rows.num_rows(length) for length in self.rows.lengths) == len(self.running)

    def _slot_of(self, sequence: Sequence) -> Slot | None:
        if sequence.digest is None:
            return None
        slot = self.slots.lookup(sequence.digest)
        assert slot is not None, "a running sequence's adapter has a slot"
        return slot

    def _join(self, sequence: Sequence, activation: Activation | None) -> Admission:
        self.waiting.remove(sequence)
        self.running.append(sequence)
        sequence.state = SequenceState.RUNNING
        if sequence.digest is not None:
            self.slots.pin(sequence.digest)
        self.rows.open(sequence.request_id, len(sequence.tokens) + 1)
        return Admission(sequence, activation)

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
        if sequence.tokens[-1] in self._eos and not sequence.sampling.ignore_eos:
            return FinishReason.STOP
        if (
            sequence.num_generated >= sequence.sampling.max_tokens
            or len(sequence.tokens) >= self._max_model_len
        ):
            return FinishReason.LENGTH
        return None
