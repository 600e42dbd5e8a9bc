"""Who runs in the next step. Pure: no torch, no clock, no I/O.

Continuous batching: each step gives every running sequence its next tokens (one when decoding, a chunk of the
prompt when prefilling), and sequences join and leave between any two steps. Who waits is never refused: it
joins once its adapter has a slot and there is a place in the batch and a row for it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Collection
from typing import NamedTuple

from tunefleet.core import AdapterRef, FinishReason
from tunefleet.runtime.admission import WaitingLine
from tunefleet.runtime.fairness import Owner, ServiceCounters
from tunefleet.runtime.kv_table import KvTable
from tunefleet.runtime.prefixes import PrefixTable
from tunefleet.runtime.rows import KvOp, RowTable
from tunefleet.runtime.sequence import Sequence, SequenceState
from tunefleet.runtime.slots import Activation, Slot, SlotTable

MAX_PREFILL_TOKENS = 128  # a step beside decodes: more would be felt by who is being answered
MAX_WAIT_STEPS = 64
MIN_PROGRESS = 16  # tokens between two preemptions for the sake of others' shares


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
    """One step's work: the KV operations in their order, then one forward of what is scheduled.

    Those with one token come first, by row length and row; then chunks of prompts.
    """

    scheduled: list[Scheduled]
    kv_ops: list[KvOp]


class Scheduler:
    """Waiting and running sequences of one engine; owns their rows, prefixes and pins.

    Args:
        max_num_seqs: sequences in one batch.
        max_batch_tokens: tokens in one step; longer prompts are prefilled in chunks.
        max_model_len: tokens of prompt and answer.
        max_prefill_tokens: tokens of prompts in a step in which others decode.
        max_wait_steps: steps for which others may go ahead of who is next in the fair order.
    """

    def __init__(
        self,
        slots: SlotTable,
        rows: RowTable,
        prefixes: PrefixTable,
        *,
        max_num_seqs: int,
        max_batch_tokens: int,
        max_model_len: int,
        eos_token_ids: frozenset[int],
        max_prefill_tokens: int = MAX_PREFILL_TOKENS,
        max_wait_steps: int = MAX_WAIT_STEPS,
    ) -> None:
        self.slots = slots
        self.rows = rows
        self.prefixes = prefixes
        self.running: list[Sequence] = []  # in the order in which they joined
        self._kv = KvTable(rows, prefixes)
        self._counters = ServiceCounters()
        self._line = WaitingLine(slots, self._counters, max_wait_steps)
        self._sequences: dict[str, Sequence] = {}
        self._num_added = 0
        self._num_running: Counter[Owner] = Counter()
        self._max_num_seqs = max_num_seqs
        self._max_batch_tokens = max_batch_tokens
        self._max_model_len = max_model_len
        self._max_prefill_tokens = max_prefill_tokens
        self._eos = eos_token_ids

    def __len__(self) -> int:
        return len(self._sequences)

    @property
    def waiting(self) -> list[Sequence]:
        """By arrival."""
        return self._line.sequences

    def get(self, request_id: str) -> Sequence | None:
        return self._sequences.get(request_id)

    def add(self, sequence: Sequence) -> None:
        sequence.arrival = self._num_added
        self._num_added += 1
        self._sequences[sequence.request_id] = sequence
        self._counters.enter(sequence.owner)
        self._line.add(sequence)

    def wanted_adapters(self) -> list[AdapterRef]:
        """Of waiting sequences without a slot, in the order in which they would join; not more than slots."""
        wanted: dict[str, AdapterRef] = {}
        for sequence in self._line.order():
            if len(wanted) == self.slots.max_slots:
                break
            if sequence.adapter is not None and not self.slots.holds(sequence.adapter.digest):
                wanted.setdefault(sequence.adapter.digest, sequence.adapter)
        return list(wanted.values())

    def next_activation(self, loaded: Collection[str]) -> Activation | None:
        """Takes a slot for the next waiting adapter; to be used once ``activated`` says that it is filled.

        A slot that was filled for somebody who still waits is evicted only for who waited too long; then
        nobody else takes one.

        Args:
            loaded: digests whose prepared file is at hand, so that a slot could be filled now.
        """
        self._line.files_at_hand(loaded)
        kept = {sequence.digest for sequence in self.waiting if sequence.digest is not None}
        for sequence in self._line.order():
            ref = sequence.adapter
            if ref is None or ref.digest not in loaded or self.slots.holds(ref.digest):
                continue
            is_aged = sequence is self._line.aged
            activation = self.slots.activate(
                ref.digest, ref.rank, cost=ref.size_bytes, kept=() if is_aged else kept
            )
            if activation is not None or is_aged:
                return activation
        return None

    def activated(self, digest: str) -> None:
        """Its slot is filled."""
        self.slots.ready(digest)
        self._line.slots_changed()

    def activation_failed(self, digest: str) -> None:
        """Its slot could not be filled, and is free again."""
        self.slots.deactivate(digest)
        self._line.slots_changed()

    def join(self) -> Sequence | None:
        """Lets the next sequence in that can run now; the caller repeats until None."""
        if self._is_full and not self._overserved():
            return None
        sequence = next(filter(self._may_join, self._line.order()), None)
        if sequence is not None:
            if self._is_full:
                self._preempt(self._victim_for(sequence.owner), keep_prefix=True)
            self._join(sequence)
        return sequence

    def schedule(self) -> Batch:
        """The next step's batch: decodes first, then prefill chunks within the token budget."""
        self._line.step(self._overserved())
        planned = self._plan()
        for sequence in sorted(planned, key=lambda sequence: sequence.arrival):
            if sequence.state is SequenceState.RUNNING:  # else it was preempted for an older one
                self._extend(sequence, sequence.num_computed + planned[sequence])
        scheduled = [
            Scheduled(sequence, num_tokens, self._slot_of(sequence))
            for sequence, num_tokens in planned.items()
            if sequence.state is SequenceState.RUNNING
        ]
        for entry in scheduled:
            self._charge(entry)
        return Batch(sorted(scheduled, key=self._batch_order), self._kv.take_ops())

    def advance(self, batch: Batch, sampled: dict[str, int]) -> list[Sequence]:
        """Takes in a step's sampled tokens; returns the sequences that are finished now."""
        finished = []
        for sequence, num_tokens, _ in batch.scheduled:
            if sequence.state is not SequenceState.RUNNING:
                continue  # ended while the step ran
            sequence.num_computed += num_tokens
            if sequence.request_id in sampled:
                sequence.tokens.append(sampled[sequence.request_id])
                reason = self._finish_reason(sequence)
                if reason is not None:
                    self.finish(sequence, reason)
                    finished.append(sequence)
        return finished

    def finish(self, sequence: Sequence, reason: FinishReason, *, keep_prefix: bool = True) -> None:
        """Ends a sequence in any state: its row and pin are free at once.

        Args:
            keep_prefix: whether its KV may serve later ones; that of an ERROR never does.
        """
        if sequence.state is SequenceState.FINISHED:
            return
        if sequence.state is SequenceState.RUNNING:
            self._leave(sequence, keep_prefix=keep_prefix and reason is not FinishReason.ERROR)
        else:
            self._line.remove(sequence)
        sequence.state = SequenceState.FINISHED
        sequence.finish_reason = reason
        self._counters.leave(sequence.owner)
        del self._sequences[sequence.request_id]

    def forget(self, digest: str) -> None:
        """An adapter was deleted: nothing of its KV outlives its sequences."""
        self._kv.forget(digest)
        for sequence in self._sequences.values():
            sequence.keeps_prefix &= sequence.digest != digest

    def forget_user(self, tenant: str, user_id: str | None) -> None:
        """A user was deleted: nothing of their KV outlives their sequences."""
        self._kv.forget_user(tenant, user_id)
        for sequence in self._sequences.values():
            sequence.keeps_prefix &= sequence.owner != (tenant, user_id)

    def check(self) -> None:
        """Asserts that rows, prefixes, pins, counters and lists agree."""
        self.slots.check()
        self._kv.check()
        self._counters.check()
        assert len(self.running) <= self._max_num_seqs
        assert {*self.running, *self.waiting} == {*self._sequences.values()}
        assert len(self.running) + len(self.waiting) == len(self._sequences)
        assert all(sequence.state is SequenceState.RUNNING for sequence in self.running)
        assert all(s.state is SequenceState.WAITING and not s.num_computed for s in self.waiting)
        assert Counter(sequence.owner for sequence in self.running) == self._num_running
        assert self._counters.num_active == len({sequence.owner for sequence in self._sequences.values()})
        in_use = {sequence.digest for sequence in self.running} - {None}
        assert in_use <= {*self.slots.digests}, "a running sequence's adapter has no slot"
        for digest in self.slots.digests:
            assert (digest in in_use) == self.slots.is_pinned(digest), "a pin without a sequence, or none"
        assert sum(self.rows.num_rows(length) for length in self.rows.lengths) == len(self.running)
        for sequence in self.running:
            assert sequence.num_computed <= self.rows.row_of(sequence.request_id).length

    @property
    def _is_full(self) -> bool:
        return len(self.running) >= self._max_num_seqs

    @property
    def _share(self) -> int:
        """Places for each owner that has sequences."""
        return max(1, self._max_num_seqs // max(1, self._counters.num_active))

    def _overserved(self) -> set[Owner]:
        """Owners that run more than their share."""
        share = self._share
        return {owner for owner, num_running in self._num_running.items() if num_running > share}

    def _victim_for(self, owner: Owner) -> Sequence | None:
        """Who gives its place to an owner that runs less than its share: the biggest owner's youngest."""
        if self._num_running[owner] >= self._share:
            return None
        overserved = self._overserved()
        return max(
            (
                sequence
                for sequence in self.running
                if sequence.owner in overserved and _made_progress(sequence)
            ),
            key=lambda sequence: (self._num_running[sequence.owner], sequence.arrival),
            default=None,
        )

    def _may_join(self, sequence: Sequence) -> bool:
        """Whether it has all that it needs, and leaves what the one that waited too long needs."""
        if sequence.digest is not None and self.slots.lookup(sequence.digest) is None:
            return False
        victim = self._victim_for(sequence.owner) if self._is_full else None
        if self._is_full and victim is None:
            return False
        freed = self.rows.row_of(victim.request_id).length if victim else 0
        aged = self._line.aged
        if aged is None or aged is sequence:
            return self._kv.can_open(sequence, beside=-freed)
        takes_last_place = victim is None and len(self.running) + 1 >= self._max_num_seqs
        if takes_last_place or self._takes_slot(sequence, aged):
            return False
        return self._kv.can_open(sequence, beside=self._kv.row_tokens(aged) - freed)

    def _takes_slot(self, sequence: Sequence, aged: Sequence) -> bool:
        """Whether its pin could keep a slot from the one that waited too long."""
        if aged.digest is None or self.slots.holds(aged.digest):
            return False
        return sequence.digest is not None

    def _join(self, sequence: Sequence) -> None:
        self._line.join(sequence)
        self.running.append(sequence)
        self._num_running[sequence.owner] += 1
        sequence.state = SequenceState.RUNNING
        if sequence.digest is not None:
            self.slots.pin(sequence.digest)
        sequence.num_computed = self._kv.open(sequence)
        sequence.num_charged = max(sequence.num_charged, sequence.num_computed)
        if not sequence.num_preemptions:
            sequence.cached_tokens = min(sequence.num_computed, sequence.num_prompt)

    def _leave(self, sequence: Sequence, *, keep_prefix: bool) -> None:
        """Out of the batch: gives back place, row and pin."""
        self._kv.close(sequence, keep_prefix=keep_prefix and sequence.keeps_prefix)
        self.running.remove(sequence)
        self._num_running[sequence.owner] -= 1
        if not self._num_running[sequence.owner]:
            del self._num_running[sequence.owner]
        if sequence.digest is not None:
            self.slots.unpin(sequence.digest)

    def _preempt(self, sequence: Sequence | None, *, keep_prefix: bool) -> None:
        """Back to waiting; unless its prefix is kept, all is computed again."""
        assert sequence is not None
        self._leave(sequence, keep_prefix=keep_prefix)
        sequence.state = SequenceState.WAITING
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        sequence.preempted_at = len(sequence.tokens)
        self._line.add(sequence)

    def _extend(self, sequence: Sequence, num_tokens: int) -> None:
        """Room in its row; the youngest are preempted for it, in the end itself: the oldest goes on."""
        while not self._kv.extend(sequence, num_tokens):
            victim = max(self.running, key=lambda running: running.arrival)
            self._preempt(victim, keep_prefix=False)
            if victim is sequence:
                return

    def _plan(self) -> dict[Sequence, int]:
        """How many tokens each gets: one for each that decodes, then prompts, least served owners first."""
        fair = sorted(self.running, key=lambda s: (self._counters[s.owner], s.arrival))
        decodes = [sequence for sequence in fair if sequence.num_uncomputed == 1][: self._max_batch_tokens]
        budget = self._max_batch_tokens - len(decodes)
        if decodes:
            budget = min(budget, self._max_prefill_tokens)
        planned = dict.fromkeys(decodes, 1)
        for sequence in fair:
            if budget and sequence.num_uncomputed > 1:
                planned[sequence] = min(sequence.num_uncomputed, budget)
                budget -= planned[sequence]
        return planned

    def _charge(self, entry: Scheduled) -> None:
        """What is computed again after a preemption is not charged again."""
        sequence = entry.sequence
        end = sequence.num_computed + entry.num_tokens
        num_new = max(0, end - sequence.num_charged)
        sequence.num_charged = max(end, sequence.num_charged)
        num_decode = min(num_new, max(0, end - sequence.num_prompt - sequence.num_resumed))
        self._counters.charge(sequence.owner, num_prefill=num_new - num_decode, num_decode=num_decode)

    def _batch_order(self, entry: Scheduled) -> tuple[bool, int, int]:
        row = self.rows.row_of(entry.sequence.request_id)
        return entry.num_tokens > 1, row.length, row.index

    def _slot_of(self, sequence: Sequence) -> Slot | None:
        if sequence.digest is None:
            return None
        slot = self.slots.lookup(sequence.digest)
        assert slot is not None, "a running sequence's adapter has a slot"
        return slot

    def _finish_reason(self, sequence: Sequence) -> FinishReason | None:
        if sequence.tokens[-1] in self._eos and not sequence.sampling.ignore_eos:
            return FinishReason.STOP
        if (
            sequence.num_generated >= sequence.sampling.max_tokens
            or len(sequence.tokens) >= self._max_model_len
        ):
            return FinishReason.LENGTH
        return None


def _made_progress(sequence: Sequence) -> bool:
    """Since it was preempted last."""
    return not sequence.num_preemptions or len(sequence.tokens) - sequence.preempted_at >= MIN_PROGRESS
