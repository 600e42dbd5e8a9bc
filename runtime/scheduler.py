"""Who runs in the next step. Pure: no torch, no clock, no I/O.

Continuous batching: each step gives every running sequence its next tokens (one when decoding, a chunk of the
prompt when prefilling), and sequences join and leave between any two steps. Who waits is never refused: it
joins once its adapter has a slot and there is a place in the batch and a row for it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import NamedTuple

from tunefleet.adapters_store.slot_layout import rank_class_of
from tunefleet.core import AdapterRef, FinishReason
from tunefleet.runtime.admission import WaitingLine
from tunefleet.runtime.fairness import ServiceCounters
from tunefleet.runtime.kv_table import KvTable
from tunefleet.runtime.places import Places
from tunefleet.runtime.prefixes import PrefixTable
from tunefleet.runtime.rows import KvOp, RowTable
from tunefleet.runtime.sequence import Sequence, SequenceState
from tunefleet.runtime.slots import Activation, Slot, SlotTable
from tunefleet.runtime.trials import Trials

MAX_PREFILL_TOKENS = 128  # a step in which most decode: more would be felt by who is being answered
MAX_WAIT_STEPS = 64


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
    suspect: Sequence | None = None  # on trial: nobody else is scheduled


class Scheduler:
    """Waiting and running sequences of one engine; owns their rows, prefixes and pins.

    Args:
        max_num_seqs: sequences in one batch.
        max_batch_tokens: tokens in one step; longer prompts are prefilled in chunks.
        max_model_len: tokens of prompt and answer.
        max_prefill_tokens: tokens of prompts in a step in which others decode, or that keeps them waiting.
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
        self._kv = KvTable(rows, prefixes)
        self._counters = ServiceCounters()
        self._places = Places(max_num_seqs, self._counters)
        self._line = WaitingLine(slots, self._places, self._counters, max_wait_steps)
        self._trials = Trials()
        self._sequences: dict[str, Sequence] = {}
        self._num_added = 0
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

    @property
    def running(self) -> list[Sequence]:
        """In the order in which they joined."""
        return self._places.running

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
        if not loaded:
            return None
        kept = {sequence.digest for sequence in self.waiting if sequence.digest is not None}
        refused: set[int] = set()  # rank classes
        for sequence in self._line.order():
            ref, is_aged = sequence.adapter, sequence is self._line.aged
            if ref is None or ref.digest not in loaded or self.slots.holds(ref.digest):
                continue
            if rank_class_of(ref.rank) in refused and not is_aged:
                continue
            activation = self.slots.activate(
                ref.digest, ref.rank, cost=ref.size_bytes, kept=() if is_aged else kept
            )
            if activation is not None or is_aged:
                return activation
            refused.add(rank_class_of(ref.rank))
        return None

    def activated(self, digest: str) -> None:
        """Its slot is filled."""
        self.slots.ready(digest)
        self._line.changed()

    def activation_failed(self, digest: str) -> None:
        """Its slot could not be filled, and is free again."""
        self.slots.deactivate(digest)
        self._line.changed()

    def join(self) -> Sequence | None:
        """Lets the next sequence in that can run now; the caller repeats until None."""
        if not self._places.num_free and not self._places.overserved():
            return None
        sequence = next(filter(self._may_join, self._line.order()), None)
        if sequence is not None:
            victim = self._victim_for(sequence)
            if victim is not None:
                self._preempt(victim, keep_prefix=True)
            self._join(sequence)
        return sequence

    def schedule(self) -> Batch:
        """The next step's batch: decodes first, then prefill chunks within the token budget.

        Suspects run alone, in every second step while others run.
        """
        self._line.step()
        scheduled: list[Scheduled] = []
        while self.running and not scheduled:  # again, if all that were planned gave way to older ones
            planned = self._plan(self._trials.turn(self.running))
            assert planned, "who runs has something to compute"
            scheduled = self._in_rows(planned)
        for entry in scheduled:
            self._charge_decode(entry)
        suspect = self._trials.begin(entry.sequence for entry in scheduled)
        return Batch(sorted(scheduled, key=self._batch_order), self._kv.take_ops(), suspect)

    def advance(self, batch: Batch, sampled: dict[str, int]) -> list[Sequence]:
        """Takes in a step's sampled tokens; returns the sequences that are finished now."""
        finished = []
        for sequence, num_tokens, _ in batch.scheduled:
            if sequence.state is not SequenceState.RUNNING:
                continue  # ended while the step ran
            sequence.num_computed += num_tokens
            if sequence.request_id in sampled:
                sequence.tokens.append(sampled[sequence.request_id])
                sequence.suspect = False
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
        self._line.changed()  # everyone's share may be larger now
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
        self._places.check()
        assert {*self.running, *self.waiting} == {*self._sequences.values()}
        assert len(self.running) + len(self.waiting) == len(self._sequences)
        assert all(sequence.state is SequenceState.RUNNING for sequence in self.running)
        assert all(s.state is SequenceState.WAITING and not s.num_computed for s in self.waiting)
        assert self._counters.num_active == len({sequence.owner for sequence in self._sequences.values()})
        assert all(s.num_generated == s.num_resumed for s in self._sequences.values() if s.suspect)
        in_use = {sequence.digest for sequence in self.running} - {None}
        assert in_use <= {*self.slots.digests}, "a running sequence's adapter has no slot"
        for digest in self.slots.digests:
            assert (digest in in_use) == self.slots.is_pinned(digest), "a pin without a sequence, or none"
        assert sum(self.rows.num_rows(length) for length in self.rows.lengths) == len(self.running)
        for sequence in self.running:
            assert sequence.num_computed <= self.rows.row_of(sequence.request_id).length

    def _may_join(self, sequence: Sequence) -> bool:
        """Whether it has all that it needs, and leaves what the one that waited too long needs."""
        if sequence.digest is not None and self.slots.lookup(sequence.digest) is None:
            return False
        victim = self._victim_for(sequence)
        if victim is None and not self._places.num_free:
            return False
        freed = self.rows.row_of(victim.request_id).length if victim else 0
        aged = self._line.aged
        if aged is None or aged is sequence:
            return self._kv.can_open(sequence, beside=-freed)
        if (victim is None and self._places.num_free == 1) or self._takes_slot(sequence, aged):
            return False
        return self._kv.can_open(sequence, beside=self._kv.row_tokens(aged) - freed)

    def _victim_for(self, sequence: Sequence) -> Sequence | None:
        """Who would have to give its place."""
        return None if self._places.num_free else self._places.victim_for(sequence.owner)

    def _takes_slot(self, sequence: Sequence, aged: Sequence) -> bool:
        """Whether its pin could keep a slot from the one that waited too long."""
        if aged.adapter is None or self.slots.holds(aged.adapter.digest):
            return False
        return sequence.digest is not None and sequence.digest in self.slots.in_the_way(aged.adapter.rank)

    def _join(self, sequence: Sequence) -> None:
        self._line.join(sequence)
        self._places.take(sequence)
        sequence.state = SequenceState.RUNNING
        if sequence.digest is not None:
            self.slots.pin(sequence.digest)
        sequence.num_computed = self._kv.open(sequence)
        if not sequence.num_preemptions:
            sequence.cached_tokens = min(sequence.num_computed, sequence.num_prompt)
        self._charge_prompt(sequence)

    def _leave(self, sequence: Sequence, *, keep_prefix: bool) -> None:
        """Out of the batch: gives back place, row and pin."""
        self._kv.close(sequence, keep_prefix=keep_prefix and sequence.keeps_prefix)
        self._places.give_back(sequence)
        if sequence.digest is not None:
            self.slots.unpin(sequence.digest)

    def _preempt(self, sequence: Sequence, *, keep_prefix: bool) -> None:
        """Back to waiting; unless its prefix is kept, all is computed again."""
        self._leave(sequence, keep_prefix=keep_prefix)
        sequence.state = SequenceState.WAITING
        sequence.num_computed = 0
        sequence.num_preemptions += 1
        sequence.preempted_at = len(sequence.tokens)
        self._line.add(sequence)

    def _in_rows(self, planned: dict[Sequence, int]) -> list[Scheduled]:
        """Those for whose tokens there is room, the oldest first."""
        for sequence in sorted(planned, key=lambda sequence: sequence.arrival):
            if sequence.state is SequenceState.RUNNING:  # else it was preempted for an older one
                self._extend(sequence, sequence.num_computed + planned[sequence])
        return [
            Scheduled(sequence, num_tokens, self._slot_of(sequence))
            for sequence, num_tokens in planned.items()
            if sequence.state is SequenceState.RUNNING
        ]

    def _extend(self, sequence: Sequence, num_tokens: int) -> None:
        """Room in its row; the youngest are preempted for it, in the end itself: the oldest goes on."""
        while not self._kv.extend(sequence, num_tokens):
            victim = self._places.youngest()
            self._preempt(victim, keep_prefix=False)
            if victim is sequence:
                return

    def _plan(self, turn: list[Sequence]) -> dict[Sequence, int]:
        """How many tokens each gets: one for each that decodes, then prompts, least served owners first."""
        fair = sorted(turn, key=lambda s: (self._counters[s.owner], s.arrival))
        decodes = [sequence for sequence in fair if sequence.num_uncomputed == 1][: self._max_batch_tokens]
        budget = self._max_batch_tokens - len(decodes)
        if self._is_mostly_decoding():
            budget = min(budget, self._max_prefill_tokens)
        planned = dict.fromkeys(decodes, 1)
        for sequence in fair:
            if budget and sequence.num_uncomputed > 1:
                planned[sequence] = min(sequence.num_uncomputed, budget)
                budget -= planned[sequence]
        return planned

    def _is_mostly_decoding(self) -> bool:
        """Fewer wait for their first token than would feel a long step."""
        turn = [sequence for sequence in self.running if not sequence.suspect]
        num_decoding = sum(sequence.num_uncomputed == 1 for sequence in turn)
        return 0 < len(turn) <= 2 * num_decoding

    def _charge_prompt(self, sequence: Sequence) -> None:
        """All of it when it joins, so that others' turn comes before the owner's next one.

        What was cached, or is computed again after a preemption, is free.
        """
        charged = max(sequence.num_charged, sequence.num_computed)
        sequence.num_charged = len(sequence.tokens)
        self._counters.charge(sequence.owner, num_prefill=max(0, sequence.num_charged - charged))

    def _charge_decode(self, entry: Scheduled) -> None:
        sequence = entry.sequence
        num_new = max(0, sequence.num_computed + entry.num_tokens - sequence.num_charged)
        sequence.num_charged += num_new
        self._counters.charge(sequence.owner, num_decode=num_new)

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
