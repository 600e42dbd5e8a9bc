"""The scheduler: who joins, who runs, and that everyone ends who can."""

from __future__ import annotations

import random
import subprocess
import sys

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tunefleet.core import AdapterRef, FinishReason, SamplingParams
from tunefleet.messages import Submit
from tunefleet.runtime.rows import Move, Row, RowTable
from tunefleet.runtime.scheduler import Batch, Scheduler
from tunefleet.runtime.sequence import Sequence, SequenceState
from tunefleet.runtime.slots import SlotTable

EOS = 1
RANKS = {"a": 4, "b": 8, "c": 16, "d": 33, "e": 64}


def new_scheduler(
    *,
    max_slots: int = 4,
    max_bytes: int = 1000,
    max_num_seqs: int = 4,
    max_batch_tokens: int = 64,
    max_model_len: int = 300,
) -> Scheduler:
    """A slot costs as many bytes as its padded rank."""
    return Scheduler(
        SlotTable(max_slots, max_bytes, lambda rank_class: rank_class),
        RowTable(max_model_len),
        max_num_seqs=max_num_seqs,
        max_batch_tokens=max_batch_tokens,
        max_model_len=max_model_len,
        eos_token_ids=frozenset({EOS}),
    )


def new_sequence(
    request_id: str,
    digest: str | None = None,
    *,
    num_prompt: int = 3,
    max_tokens: int = 5,
    ignore_eos: bool = False,
    generated: tuple[int, ...] = (),
) -> Sequence:
    adapter = None if digest is None else AdapterRef(digest, "default", "", "", 1, RANKS[digest])
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos)
    prompt = (7,) * num_prompt
    return Sequence.of(
        Submit(request_id=request_id, prompt=prompt, sampling=sampling, adapter=adapter, generated=generated)
    )


def admit_all(scheduler: Scheduler, loaded: set[str]) -> list[str]:
    """Admits as the engine does: a loaded file is used up by filling a slot. Returns who joined."""
    joined = []
    while (admission := scheduler.admit(loaded)) is not None:
        joined.append(admission.sequence.request_id)
        if admission.activation is not None:
            loaded.remove(admission.sequence.digest or "")
    return joined


def sampled_by(batch: Batch, token: int = 5) -> dict[str, int]:
    return {entry.sequence.request_id: token for entry in batch.scheduled if entry.samples}


def shape(batch: Batch) -> list[tuple[str, int, bool]]:
    return [(entry.sequence.request_id, entry.num_tokens, entry.samples) for entry in batch.scheduled]


def run_step(scheduler: Scheduler, token: int = 5) -> list[str]:
    """Returns who is finished now."""
    batch = scheduler.schedule()
    finished = scheduler.advance(batch, sampled_by(batch, token))
    scheduler.check()
    return [sequence.request_id for sequence in finished]


def test_the_scheduler_imports_no_torch() -> None:
    code = "import sys, tunefleet.runtime.scheduler; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_prompt_runs_whole_then_one_token_a_step() -> None:
    scheduler = new_scheduler()
    scheduler.add(new_sequence("x", num_prompt=10, max_tokens=2))
    admit_all(scheduler, set())
    first = scheduler.schedule()
    assert shape(first) == [("x", 10, True)]
    assert scheduler.advance(first, {"x": 5}) == []
    second = scheduler.schedule()
    assert shape(second) == [("x", 1, True)]
    assert [sequence.request_id for sequence in scheduler.advance(second, {"x": 6})] == ["x"]
    assert scheduler.schedule().scheduled == []
    assert len(scheduler) == 0


def test_decodes_come_first_and_a_long_prompt_gets_what_is_left() -> None:
    scheduler = new_scheduler(max_batch_tokens=8)
    scheduler.add(new_sequence("long", num_prompt=15))
    scheduler.add(new_sequence("short", num_prompt=1))
    admit_all(scheduler, set())
    assert _advance(scheduler) == [("short", 1, True), ("long", 7, False)]
    assert _advance(scheduler) == [("short", 1, True), ("long", 7, False)]
    assert _advance(scheduler) == [("long", 1, True), ("short", 1, True)]
    assert _advance(scheduler) == [("long", 1, True), ("short", 1, True)]


def _advance(scheduler: Scheduler) -> list[tuple[str, int, bool]]:
    batch = scheduler.schedule()
    seen = shape(batch)
    scheduler.advance(batch, sampled_by(batch))
    return seen


def test_more_sequences_than_places_wait_in_order() -> None:
    scheduler = new_scheduler(max_num_seqs=2)
    for request_id in "wxyz":
        scheduler.add(new_sequence(request_id, max_tokens=1))
    assert admit_all(scheduler, set()) == ["w", "x"]
    assert run_step(scheduler) == ["w", "x"]
    assert admit_all(scheduler, set()) == ["y", "z"]


def test_who_waits_for_an_adapter_holds_nobody_back() -> None:
    scheduler = new_scheduler()
    scheduler.add(new_sequence("x", "a"))
    scheduler.add(new_sequence("y"))
    scheduler.add(new_sequence("z", "b"))
    assert admit_all(scheduler, {"b"}) == ["y", "z"]
    assert admit_all(scheduler, {"a"}) == ["x"]
    scheduler.check()


def test_a_second_sequence_of_an_adapter_needs_no_second_slot() -> None:
    scheduler = new_scheduler(max_slots=1)
    scheduler.add(new_sequence("x", "a", max_tokens=1))
    scheduler.add(new_sequence("y", "a", max_tokens=2))
    assert admit_all(scheduler, {"a"}) == ["x", "y"]
    assert run_step(scheduler) == ["x"]
    assert scheduler.slots.is_pinned("a")
    assert run_step(scheduler) == ["y"]
    assert not scheduler.slots.is_pinned("a")
    assert scheduler.slots.digests == ("a",)


def test_a_sequence_joins_as_soon_as_a_slot_is_free() -> None:
    scheduler = new_scheduler(max_slots=1)
    scheduler.add(new_sequence("x", "a", max_tokens=1))
    scheduler.add(new_sequence("y", "b", max_tokens=1))
    loaded = {"a", "b"}
    assert admit_all(scheduler, loaded) == ["x"]
    assert run_step(scheduler) == ["x"]
    assert admit_all(scheduler, loaded) == ["y"]
    assert scheduler.slots.digests == ("b",)


def test_each_scheduled_sequence_names_its_own_slot() -> None:
    scheduler = new_scheduler()
    scheduler.add(new_sequence("x", "a"))
    scheduler.add(new_sequence("y"))
    scheduler.add(new_sequence("z", "c"))
    admit_all(scheduler, {"a", "c"})
    slots = {entry.sequence.request_id: entry.slot for entry in scheduler.schedule().scheduled}
    assert {"x": scheduler.slots.lookup("a"), "y": None, "z": scheduler.slots.lookup("c")} == slots


def test_an_end_token_stops_unless_it_is_to_be_ignored() -> None:
    scheduler = new_scheduler()
    ends, goes_on = new_sequence("x"), new_sequence("y", ignore_eos=True)
    scheduler.add(ends)
    scheduler.add(goes_on)
    admit_all(scheduler, set())
    assert run_step(scheduler, EOS) == ["x"]
    assert FinishReason.STOP is ends.finish_reason
    assert SequenceState.RUNNING is goes_on.state


def test_an_answer_ends_at_max_tokens_or_where_the_context_is_full() -> None:
    scheduler = new_scheduler(max_model_len=8)
    limited = new_sequence("limited", num_prompt=3, max_tokens=2)
    full = new_sequence("full", num_prompt=5, max_tokens=100)
    for sequence in (limited, full):
        scheduler.add(sequence)
    admit_all(scheduler, set())
    while scheduler:
        run_step(scheduler)
    assert (limited.finish_reason, limited.num_generated) == (FinishReason.LENGTH, 2)
    assert (full.finish_reason, len(full.tokens)) == (FinishReason.LENGTH, 8)


def test_a_resumed_sequence_counts_what_it_brings() -> None:
    scheduler = new_scheduler()
    resumed = new_sequence("x", num_prompt=3, max_tokens=5, generated=(5, 5, 5))
    scheduler.add(resumed)
    admit_all(scheduler, set())
    assert _advance(scheduler) == [("x", 6, True)]
    assert run_step(scheduler) == ["x"]
    assert resumed.num_generated == 5


def test_finishing_frees_row_and_pin_whatever_the_state_and_only_once() -> None:
    scheduler = new_scheduler(max_num_seqs=1)
    running, waiting = new_sequence("x", "a"), new_sequence("y", "a")
    scheduler.add(running)
    scheduler.add(waiting)
    admit_all(scheduler, {"a"})
    for sequence in (running, waiting, running):
        scheduler.finish(sequence, FinishReason.CANCELLED)
        scheduler.check()
    assert len(scheduler) == 0
    assert not scheduler.slots.is_pinned("a")
    assert scheduler.get("x") is None


def test_a_sequence_that_ends_while_the_step_runs_takes_no_token() -> None:
    scheduler = new_scheduler()
    sequence = new_sequence("x")
    scheduler.add(sequence)
    admit_all(scheduler, set())
    batch = scheduler.schedule()
    scheduler.finish(sequence, FinishReason.ERROR)
    assert scheduler.advance(batch, {"x": 5}) == []
    assert sequence.num_generated == 0
    assert FinishReason.ERROR is sequence.finish_reason


class AnyHistory(RuleBasedStateMachine):
    """Requests, loads, cancels and steps in any order; KV is a dict that the batches' moves change."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: set[str] = set()
        self.content: dict[Row, list[tuple[str, int]]] = {}
        self.added: dict[str, Sequence] = {}

    @initialize(
        max_slots=st.integers(1, 3),
        max_bytes=st.sampled_from([64, 100, 1000]),
        max_num_seqs=st.integers(1, 5),
        max_batch_tokens=st.sampled_from([1, 3, 16, 200]),
    )
    def begin(self, max_slots: int, max_bytes: int, max_num_seqs: int, max_batch_tokens: int) -> None:
        self.max_batch_tokens = max_batch_tokens
        self.scheduler = new_scheduler(
            max_slots=max_slots,
            max_bytes=max_bytes,
            max_num_seqs=max_num_seqs,
            max_batch_tokens=max_batch_tokens,
        )

    @rule(
        digest=st.sampled_from([None, *RANKS]),
        num_prompt=st.one_of(st.integers(1, 8), st.integers(120, 260)),
        max_tokens=st.integers(1, 20),
    )
    def add(self, digest: str | None, num_prompt: int, max_tokens: int) -> None:
        request_id = f"{len(self.added)}"
        self.added[request_id] = new_sequence(
            request_id, digest, num_prompt=num_prompt, max_tokens=max_tokens
        )
        self.scheduler.add(self.added[request_id])

    @rule(digest=st.sampled_from([*RANKS]))
    def load(self, digest: str) -> None:
        self.loaded.add(digest)

    @rule(generator=st.randoms(use_true_random=False))
    @precondition(lambda self: self.scheduler)
    def cancel(self, generator: random.Random) -> None:
        alive = [*self.scheduler.waiting, *self.scheduler.running]
        self.scheduler.finish(generator.choice(alive), FinishReason.CANCELLED)

    @rule(generator=st.randoms(use_true_random=False), num_steps=st.integers(1, 6))
    def run(self, generator: random.Random, num_steps: int) -> None:
        for _ in range(num_steps):
            self.step(generator.choice([5, 5, 5, 5, EOS]), ends_amid=generator.random() < 0.1)

    def step(self, token: int, *, ends_amid: bool = False) -> None:
        """One step of an engine; ``ends_amid``: its first sequence ends between forward and advance."""
        waiting = [*self.scheduler.waiting]
        admit_all(self.scheduler, self.loaded)
        assert [s for s in waiting if s.state is SequenceState.WAITING] == [*self.scheduler.waiting]
        batch = self.scheduler.schedule()
        self.budget_holds(batch)
        self.move(batch.moves)
        for sequence, num_tokens, slot in batch.scheduled:
            assert slot == (None if sequence.digest is None else self.scheduler.slots.lookup(sequence.digest))
            row = self.scheduler.rows.row_of(sequence.request_id)
            held = self.content.get(row, [])[: sequence.num_computed]
            assert [(sequence.request_id, position) for position in range(sequence.num_computed)] == held
            end = sequence.num_computed + num_tokens
            self.content[row] = held + [(sequence.request_id, p) for p in range(sequence.num_computed, end)]
        if ends_amid and batch.scheduled:
            self.scheduler.finish(batch.scheduled[0].sequence, FinishReason.ERROR)
        self.scheduler.advance(batch, sampled_by(batch, token))

    def budget_holds(self, batch: Batch) -> None:
        assert sum(entry.num_tokens for entry in batch.scheduled) <= self.max_batch_tokens
        assert all(entry.num_tokens > 0 for entry in batch.scheduled)
        left_out = len(self.scheduler.running) - len(batch.scheduled)
        full = sum(entry.num_tokens for entry in batch.scheduled) == self.max_batch_tokens
        assert full or not left_out

    def move(self, moves: list[Move]) -> None:
        for source, target, num_tokens in moves:
            self.content[target] = self.content.get(source, [])[:num_tokens]

    @invariant()
    def everything_agrees(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check()
            finished = [s for s in self.added.values() if s.state is SequenceState.FINISHED]
            assert len(self.added) == len(finished) + len(self.scheduler)
            assert all(sequence.finish_reason is not None for sequence in finished)

    def teardown(self) -> None:
        """With every adapter at hand, each step brings at least one token, so everyone ends in time."""
        if not hasattr(self, "scheduler"):
            return
        alive = [*self.scheduler.waiting, *self.scheduler.running]
        num_steps = sum(s.num_uncomputed + s.sampling.max_tokens for s in alive)
        for _ in range(num_steps):
            if not self.scheduler:
                break
            self.loaded |= set(RANKS)
            self.step(5)
            self.scheduler.check()
        assert len(self.scheduler) == 0
        for sequence in self.added.values():
            if sequence.finish_reason is FinishReason.LENGTH:
                assert sequence.num_generated == sequence.sampling.max_tokens or len(sequence.tokens) == 300


TestAnyHistory = AnyHistory.TestCase
TestAnyHistory.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
