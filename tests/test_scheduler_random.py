"""Any history: requests, loads, cancels, deletions and steps in any order.

The KV is a double that carries out each batch's operations; before each forward every running sequence must
find the KV of exactly its own tokens, computed in its own scope, in its row.
"""

from __future__ import annotations

import random

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from scheduler_kit import EOS, RANKS, EngineDouble, new_scheduler, new_sequence, sampled_by
from tunefleet.core import FinishReason
from tunefleet.runtime.scheduler import Batch
from tunefleet.runtime.sequence import Sequence, SequenceState

MAX_MODEL_LEN = 300
TEXT = tuple(random.Random(0).choices(range(2, 50), k=MAX_MODEL_LEN))  # many prompts begin alike


class AnyHistory(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.added: dict[str, Sequence] = {}
        self.was_trial = False

    @initialize(
        max_slots=st.integers(1, 3),
        num_pages=st.sampled_from([8, 10, 13, 64]),
        max_num_seqs=st.integers(1, 5),
        max_batch_tokens=st.sampled_from([6, 40, 200, 200]),
        max_prefill_tokens=st.sampled_from([3, 30, 128]),
        budget_tokens=st.sampled_from([768, 800, 1300, 3000]),
        max_wait_steps=st.sampled_from([1, 4, 64, 64]),
        fill_steps=st.integers(0, 3),
    )
    def begin(self, fill_steps: int, **limits: int) -> None:
        self.limits = limits
        self.engine = EngineDouble(
            new_scheduler(max_model_len=MAX_MODEL_LEN, **limits), fill_steps=fill_steps
        )
        self.scheduler = self.engine.scheduler

    @rule(
        digest=st.sampled_from([None, *RANKS]),
        user_id=st.sampled_from(["alice", "bob", "carol"]),
        num_shared=st.one_of(st.integers(0, 20), st.integers(30, 250)),
        num_own=st.one_of(st.integers(1, 4), st.integers(1, 40)),
        max_tokens=st.one_of(st.integers(1, 6), st.integers(1, 60)),
        suspect=st.sampled_from([False, False, True]),
    )
    def add(
        self,
        digest: str | None,
        user_id: str,
        num_shared: int,
        num_own: int,
        max_tokens: int,
        *,
        suspect: bool,
    ) -> None:
        own = random.Random(num_own).choices(range(2, 50), k=num_own)
        request_id = f"{len(self.added)}"
        self.added[request_id] = new_sequence(
            request_id,
            digest,
            user_id=user_id,
            prompt=(*TEXT[:num_shared], *own),
            max_tokens=max_tokens,
            suspect=suspect,
        )
        self.scheduler.add(self.added[request_id])

    @rule(
        digest=st.sampled_from([None, None, *RANKS]),
        user_id=st.sampled_from(["alice", "bob", "carol"]),
        num_shared=st.sampled_from([100, 110, 120, 240]),
        num_sequences=st.integers(2, 5),
        num_suspects=st.sampled_from([0, 0, 1, 5]),
    )
    def add_crowd(
        self, digest: str | None, user_id: str, num_shared: int, num_sequences: int, num_suspects: int
    ) -> None:
        """All of them outgrow their rows."""
        for number in range(num_sequences):
            self.add(digest, user_id, num_shared, number + 1, 40, suspect=number < num_suspects)

    @rule(generator=st.randoms(use_true_random=False), is_next_turn=st.booleans())
    @precondition(lambda self: self.added)
    def ask_again(self, generator: random.Random, is_next_turn: bool) -> None:
        """The same prompt once more, or the next turn of the same chat."""
        earlier = generator.choice([*self.added.values()])
        tokens = [*earlier.tokens, 9] if is_next_turn else earlier.tokens[: earlier.num_prompt]
        if len(tokens) < MAX_MODEL_LEN:
            request_id = f"{len(self.added)}"
            self.added[request_id] = new_sequence(
                request_id, earlier.digest, user_id=earlier.user_id or "", prompt=tuple(tokens), max_tokens=9
            )
            self.scheduler.add(self.added[request_id])

    @rule(digest=st.sampled_from([*RANKS]))
    def load(self, digest: str) -> None:
        if not self.scheduler.slots.holds(digest):
            self.engine.loaded.add(digest)

    @rule()
    @precondition(lambda self: self.engine.filling)
    def fail_a_fill(self) -> None:
        """As the engine does: those who wait for it are ended."""
        digest = min(self.engine.filling)
        del self.engine.filling[digest]
        self.scheduler.activation_failed(digest)
        for sequence in [s for s in self.scheduler.waiting if s.digest == digest]:
            self.scheduler.finish(sequence, FinishReason.ERROR)

    @rule(generator=st.randoms(use_true_random=False), keep_prefix=st.booleans())
    @precondition(lambda self: self.scheduler)
    def cancel(self, generator: random.Random, keep_prefix: bool) -> None:
        alive = [*self.scheduler.waiting, *self.scheduler.running]
        self.scheduler.finish(generator.choice(alive), FinishReason.CANCELLED, keep_prefix=keep_prefix)

    @rule(digest=st.sampled_from([*RANKS]))
    def forget(self, digest: str) -> None:
        self.scheduler.forget(digest)

    @rule(user_id=st.sampled_from(["alice", "bob", "carol"]))
    def forget_user(self, user_id: str) -> None:
        self.scheduler.forget_user("default", user_id)

    @rule(generator=st.randoms(use_true_random=False), num_steps=st.integers(1, 12))
    def run(self, generator: random.Random, num_steps: int) -> None:
        for _ in range(num_steps):
            token = generator.choice([5, 6, 7, 8, 9, EOS])
            self.engine.join()
            if generator.random() < 0.1 and self.scheduler.running:
                self.scheduler.finish(generator.choice(self.scheduler.running), FinishReason.CANCELLED)
            self.step(token, ends_amid=generator.random() < 0.1)

    def step(self, token: int, *, ends_amid: bool = False) -> None:
        """One step of an engine; ``ends_amid``: its first sequence ends between forward and advance."""
        self.engine.join()
        self.scheduler.check()
        was_mostly_decoding = self.is_mostly_decoding()
        batch = self.engine.schedule()
        self.limits_hold(batch)
        if was_mostly_decoding and self.is_mostly_decoding():  # whoever was preempted meanwhile
            prompts = [entry.num_tokens for entry in batch.scheduled if entry.sequence.num_uncomputed > 1]
            assert sum(prompts) <= self.limits["max_prefill_tokens"]
        self.trials_hold(batch)
        if ends_amid and batch.scheduled:
            self.scheduler.finish(batch.scheduled[0].sequence, FinishReason.ERROR)
        self.scheduler.advance(batch, sampled_by(batch, token))

    def limits_hold(self, batch: Batch) -> None:
        num_tokens = sum(entry.num_tokens for entry in batch.scheduled)
        assert num_tokens <= self.limits["max_batch_tokens"]
        assert all(entry.num_tokens > 0 for entry in batch.scheduled)
        assert bool(batch.scheduled) == bool(self.scheduler.running)
        lone = [entry.num_tokens == 1 for entry in batch.scheduled]
        assert sorted(lone, reverse=True) == lone

    def is_mostly_decoding(self) -> bool:
        """Of those who aren't suspect, half at least."""
        decoding = [s.num_uncomputed == 1 for s in self.scheduler.running if not s.suspect]
        return any(decoding) and 2 * sum(decoding) >= len(decoding)

    def trials_hold(self, batch: Batch) -> None:
        """The oldest suspect runs alone, and between any two such steps all others do."""
        scheduled = [entry.sequence for entry in batch.scheduled]
        suspects = [sequence for sequence in self.scheduler.running if sequence.suspect]
        if batch.suspect is None:
            assert not any(sequence.suspect for sequence in scheduled)
            assert self.was_trial or not suspects
        else:
            assert scheduled == [batch.suspect] == [min(suspects, key=lambda s: s.arrival)]
            assert not self.was_trial or len(suspects) == len(self.scheduler.running)
        self.was_trial = batch.suspect is not None

    @invariant()
    def everything_agrees(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check()
            finished = [s for s in self.added.values() if s.state is SequenceState.FINISHED]
            assert len(self.added) == len(finished) + len(self.scheduler)
            assert all(sequence.finish_reason is not None for sequence in finished)

    def teardown(self) -> None:
        """With every adapter at hand, everyone ends in time, with exactly what was asked for."""
        if not hasattr(self, "scheduler"):
            return
        alive = [*self.scheduler.waiting, *self.scheduler.running]
        for _ in range(sum(4 * (len(s.tokens) + s.sampling.max_tokens) + 20 for s in alive)):
            if not self.scheduler:
                break
            self.engine.loaded |= {ref.digest for ref in self.scheduler.wanted_adapters()}
            self.step(5)
            self.scheduler.check()
        assert len(self.scheduler) == 0
        for sequence in self.added.values():
            if sequence.finish_reason is FinishReason.LENGTH:
                full = len(sequence.tokens) == MAX_MODEL_LEN
                assert sequence.num_generated == sequence.sampling.max_tokens or full


TestAnyHistory = AnyHistory.TestCase
TestAnyHistory.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
