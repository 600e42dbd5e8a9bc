"""The scheduler: who runs, on whose KV and slot, and what becomes of it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from scheduler_kit import EOS, EngineDouble, new_scheduler, new_sequence, sampled_by, shape
from tunefleet.core import FinishReason
from tunefleet.runtime.rows import Drop, Load, Row, Save
from tunefleet.runtime.sequence import SequenceState
from tunefleet.runtime.slots import Activation, Slot


def new_engine(loaded: str = "", *, fill_steps: int = 0, **limits: int) -> EngineDouble:
    engine = EngineDouble(new_scheduler(**limits), fill_steps=fill_steps)
    engine.loaded |= set(loaded)
    return engine


def advance(engine: EngineDouble) -> list[tuple[str, int, bool]]:
    batch = engine.schedule()
    seen = shape(batch)
    engine.scheduler.advance(batch, sampled_by(batch))
    engine.scheduler.check()
    return seen


@pytest.mark.parametrize("module", ["scheduler", "slots", "rows", "prefixes", "fairness"])
def test_accounting_imports_no_torch(module: str) -> None:
    code = f"import sys, tunefleet.runtime.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- who runs in a step


def test_a_prompt_runs_whole_then_one_token_a_step() -> None:
    engine = new_engine()
    engine.add(new_sequence("x", num_prompt=10, max_tokens=2))
    engine.join()
    assert advance(engine) == [("x", 10, True)]
    assert advance(engine) == [("x", 1, True)]
    assert engine.schedule().scheduled == []
    assert len(engine.scheduler) == 0


def test_decodes_come_first_and_a_long_prompt_gets_what_is_left() -> None:
    engine = new_engine(max_batch_tokens=8)
    engine.add(new_sequence("long", num_prompt=15), new_sequence("short", num_prompt=1))
    engine.join()
    assert advance(engine) == [("short", 1, True), ("long", 7, False)]
    assert advance(engine) == [("short", 1, True), ("long", 7, False)]
    assert advance(engine) == [("long", 1, True), ("short", 1, True)]


def test_single_tokens_are_sorted_by_row() -> None:
    engine = new_engine(max_batch_tokens=400)
    engine.add(new_sequence("wide", num_prompt=200), new_sequence("x"), new_sequence("y"))
    engine.join()
    advance(engine)
    rows = [engine.scheduler.rows.row_of(s.request_id) for s, _, _ in engine.schedule().scheduled]
    assert [Row(128, 0), Row(128, 1), Row(256, 0)] == rows


def test_beside_decodes_a_prompt_gets_no_more_than_would_be_felt() -> None:
    engine = new_engine(max_batch_tokens=100, max_prefill_tokens=20)
    engine.add(new_sequence("long", num_prompt=150, max_tokens=9))
    engine.join()
    assert advance(engine) == [("long", 100, False)]
    engine.add(new_sequence("short", num_prompt=1, max_tokens=3))
    engine.join()
    assert advance(engine) == [("short", 1, True), ("long", 20, False)]
    assert advance(engine) == [("short", 1, True), ("long", 20, False)]
    assert advance(engine) == [("short", 1, True), ("long", 10, True)]


def test_where_most_wait_for_their_first_token_prompts_get_the_whole_step() -> None:
    engine = new_engine(max_batch_tokens=100, max_prefill_tokens=20)
    engine.add(new_sequence("short", num_prompt=1, max_tokens=9))
    engine.join()
    advance(engine)
    engine.add(new_sequence("one", num_prompt=60), new_sequence("two", user_id="bob", num_prompt=60))
    engine.join()
    assert sorted(advance(engine)) == [("one", 60, True), ("short", 1, True), ("two", 39, False)]
    assert sorted(advance(engine)) == [("one", 1, True), ("short", 1, True), ("two", 20, False)]


def test_of_several_prompts_that_of_the_least_served_user_goes_first() -> None:
    engine = new_engine(max_batch_tokens=50)
    engine.add(new_sequence("a1", num_prompt=100), new_sequence("a2", num_prompt=30))
    engine.add(new_sequence("b", user_id="bob", num_prompt=80))
    engine.join()
    steps = [advance(engine) for _ in range(4)]
    assert steps == [
        [("b", 50, False)],
        [("a1", 20, False), ("b", 30, True)],
        [("b", 1, True), ("a1", 49, False)],
        [("b", 1, True), ("a1", 31, True), ("a2", 18, False)],
    ]


# --- joining and slots


def test_more_sequences_than_places_wait_in_order() -> None:
    engine = new_engine(max_num_seqs=2)
    engine.add(*(new_sequence(request_id, max_tokens=1) for request_id in "wxyz"))
    assert engine.step() == ["w", "x"]
    assert engine.join() == ["y", "z"]


def test_who_waits_for_an_adapter_holds_nobody_back() -> None:
    engine = new_engine("b")
    engine.add(new_sequence("x", "a"), new_sequence("y"), new_sequence("z", "b"))
    assert sorted(engine.join()) == ["y", "z"]
    engine.loaded.add("a")
    assert engine.join() == ["x"]


def test_a_second_sequence_of_an_adapter_needs_no_second_slot() -> None:
    engine = new_engine("a", max_slots=1)
    engine.add(new_sequence("x", "a", max_tokens=1), new_sequence("y", "a", max_tokens=2))
    assert engine.step() == ["x"]
    assert engine.joined == ["x", "y"]
    assert engine.scheduler.slots.is_pinned("a")
    assert engine.step() == ["y"]
    assert not engine.scheduler.slots.is_pinned("a")
    assert engine.scheduler.slots.digests == ("a",)


def test_full_slots_refuse_nobody_who_waits_joins_as_soon_as_one_is_free() -> None:
    engine = new_engine("ab", max_slots=1)
    engine.add(new_sequence("x", "a", max_tokens=2), new_sequence("y", "b", max_tokens=1))
    assert engine.step() == []
    assert engine.scheduler.next_activation({"b"}) is None
    assert engine.step() == ["x"]
    assert engine.step() == ["y"]
    assert engine.scheduler.slots.digests == ("b",)


def test_a_slot_is_used_only_after_its_fill() -> None:
    engine = new_engine("a", fill_steps=3)
    engine.add(new_sequence("x", "a"), new_sequence("y"))
    assert [engine.join() for _ in range(3)] == [["y"], [], ["x"]]


def test_a_fill_that_fails_gives_the_slot_back() -> None:
    scheduler = new_scheduler(max_slots=1)
    scheduler.add(new_sequence("x", "a"))
    assert Activation("a", Slot(8, 0), {}) == scheduler.next_activation({"a"})
    scheduler.activation_failed("a")
    assert scheduler.join() is None
    assert [ref.digest for ref in scheduler.wanted_adapters()] == ["a"]
    assert Activation("a", Slot(8, 0), {}) == scheduler.next_activation({"a"})


def test_wanted_adapters_are_named_once_and_no_more_than_slots() -> None:
    engine = new_engine("a", max_slots=3)
    engine.add(*(new_sequence(f"{number}", digest) for number, digest in enumerate("aabbcde")))
    assert list("abc") == [ref.digest for ref in engine.scheduler.wanted_adapters()]
    engine.join()
    assert list("bcd") == [ref.digest for ref in engine.scheduler.wanted_adapters()]


def test_a_slot_filled_for_who_still_waits_is_not_evicted_for_the_next() -> None:
    engine = new_engine("ab", max_slots=1, max_num_seqs=1)
    engine.add(new_sequence("x", max_tokens=20))
    engine.step()
    engine.add(new_sequence("y", "a"), new_sequence("z", "b"))
    engine.run(40)
    assert (engine.joined, engine.num_evicted) == (["x", "y", "z"], 1)


def test_each_scheduled_sequence_names_its_own_slot() -> None:
    engine = new_engine("ac")
    engine.add(new_sequence("x", "a"), new_sequence("y"), new_sequence("z", "c"))
    engine.join()
    slots = {entry.sequence.request_id: entry.slot for entry in engine.schedule().scheduled}
    assert {"x": Slot(8, 0), "y": None, "z": Slot(16, 1)} == slots


def test_an_activation_never_changes_the_slot_of_a_running_sequence() -> None:
    """The pattern of vLLM #47724: adapters come and go while a request is answered."""
    engine = new_engine("a", max_slots=3, num_pages=8, max_num_seqs=3)
    engine.add(new_sequence("resident", "a", max_tokens=80, ignore_eos=True))
    engine.step()
    own = engine.slots()["resident"]
    for number in range(70):
        digest = f"churn{number}"
        engine.loaded.add(digest)
        engine.add(new_sequence(digest, digest, user_id="bob", max_tokens=2, rank=(8, 16, 32)[number % 3]))
        engine.join()
        batch = engine.schedule()
        assert own == next(e.slot for e in batch.scheduled if e.sequence.request_id == "resident")
        assert all(not set(own.pages) & set(slot.pages) for slot in others(engine, "resident"))
        engine.scheduler.advance(batch, sampled_by(batch))
        engine.scheduler.check()
    assert engine.num_evicted > 20


def others(engine: EngineDouble, request_id: str) -> list[Slot]:
    return [slot for key, slot in engine.slots().items() if key != request_id]


# --- ends


def test_an_end_token_stops_unless_it_is_to_be_ignored() -> None:
    engine = new_engine()
    ends, goes_on = new_sequence("x"), new_sequence("y", ignore_eos=True)
    engine.add(ends, goes_on)
    assert engine.step(EOS) == ["x"]
    assert FinishReason.STOP is ends.finish_reason
    assert SequenceState.RUNNING is goes_on.state


def test_an_answer_ends_at_max_tokens_or_where_the_context_is_full() -> None:
    engine = new_engine(max_model_len=8)
    limited = new_sequence("limited", num_prompt=3, max_tokens=2)
    full = new_sequence("full", num_prompt=5, max_tokens=100)
    engine.add(limited, full)
    engine.run(10)
    assert (limited.finish_reason, limited.num_generated) == (FinishReason.LENGTH, 2)
    assert (full.finish_reason, len(full.tokens)) == (FinishReason.LENGTH, 8)


def test_a_resumed_sequence_counts_what_it_brings() -> None:
    engine = new_engine()
    resumed = new_sequence("x", num_prompt=3, max_tokens=5, generated=(5, 5, 5))
    engine.add(resumed)
    engine.join()
    assert advance(engine) == [("x", 6, True)]
    assert engine.step() == ["x"]
    assert resumed.num_generated == 5


def test_finishing_frees_row_and_pin_whatever_the_state_and_only_once() -> None:
    engine = new_engine("a", max_num_seqs=1)
    running, waiting = new_sequence("x", "a"), new_sequence("y", "a")
    engine.add(running, waiting)
    engine.join()
    for sequence in (running, waiting, running):
        engine.cancel(sequence)
    assert len(engine.scheduler) == 0
    assert not engine.scheduler.slots.is_pinned("a")
    assert engine.scheduler.get("x") is None


def test_a_sequence_that_ends_while_the_step_runs_takes_no_token() -> None:
    engine = new_engine()
    sequence = new_sequence("x")
    engine.add(sequence)
    engine.join()
    batch = engine.schedule()
    engine.scheduler.finish(sequence, FinishReason.ERROR)
    assert engine.scheduler.advance(batch, {"x": 5}) == []
    assert sequence.num_generated == 0
    assert FinishReason.ERROR is sequence.finish_reason


# --- prefixes

TURN = tuple(range(100, 150))


def test_the_second_turn_of_a_chat_computes_only_what_is_new() -> None:
    engine = new_engine("a")
    engine.add(new_sequence("first", "a", prompt=TURN, max_tokens=3))
    engine.run(5)
    second = new_sequence("second", "a", prompt=(*TURN, 5, 5, 5, 60, 61), max_tokens=3)
    engine.add(second)
    engine.join()
    batch = engine.schedule()
    assert [Save(Row(128, 0), 0, 52), Load(0, Row(128, 0), 52)] == batch.kv_ops
    assert shape(batch) == [("second", 3, True)]
    assert second.cached_tokens == 52


def test_a_new_version_of_the_same_name_never_reuses_the_old_ones_prefix() -> None:
    """The pattern of vLLM #42125: an adapter is its digest, whatever it is called."""
    engine = new_engine("ab")
    engine.add(new_sequence("old", "a", prompt=TURN))
    engine.run(9)
    for request_id, digest, user_id in [("new", "b", "alice"), ("base", None, "alice"), ("bob", "a", "bob")]:
        other = new_sequence(request_id, digest, user_id=user_id, prompt=(*TURN, 6))
        engine.add(other)
        engine.step()
        assert other.cached_tokens == 0


def test_only_the_prompt_counts_as_cached_and_only_when_it_first_joins() -> None:
    engine = new_engine()
    engine.add(new_sequence("x", prompt=TURN, max_tokens=10))
    engine.run(12)
    resumed = new_sequence("y", prompt=TURN, generated=(5,) * 8, max_tokens=20)
    engine.add(resumed)
    engine.join()
    assert (resumed.num_computed, resumed.cached_tokens) == (57, 50)


def test_a_short_sequence_or_one_that_failed_leaves_no_prefix() -> None:
    engine = new_engine()
    short, failed, unwanted = (
        new_sequence("short", prompt=TURN[:30], max_tokens=2),
        new_sequence("failed", prompt=TURN),
        new_sequence("unwanted", prompt=TURN),
    )
    engine.add(short, failed, unwanted)
    engine.step()
    engine.scheduler.finish(failed, FinishReason.ERROR)
    engine.scheduler.finish(unwanted, FinishReason.STOP, keep_prefix=False)
    engine.run(5)
    assert len(engine.scheduler.prefixes) == 0


def test_a_cancelled_sequence_leaves_what_it_computed() -> None:
    engine = new_engine(max_batch_tokens=40)
    sequence = new_sequence("x", prompt=TURN)
    engine.add(sequence)
    engine.step()
    engine.cancel(sequence)
    assert [Save(Row(128, 0), 0, 40)] == engine.schedule().kv_ops


def test_a_deleted_adapter_leaves_nothing_not_even_what_still_runs() -> None:
    engine = new_engine("ab")
    engine.add(new_sequence("gone", "a", prompt=TURN, max_tokens=1))
    engine.step()
    engine.add(new_sequence("runs", "a", prompt=TURN[::-1]), new_sequence("stays", "b", prompt=TURN))
    engine.step()
    engine.scheduler.forget("a")
    assert Drop(0) in engine.schedule().kv_ops
    engine.run(9)
    assert len(engine.scheduler.prefixes) == 1
    assert engine.scheduler.prefixes.forget("b") == [1]


def test_a_deleted_user_leaves_nothing_either() -> None:
    engine = new_engine()
    engine.add(new_sequence("x", prompt=TURN), new_sequence("y", user_id="bob", prompt=TURN))
    engine.step()
    engine.scheduler.forget_user("default", "alice")
    engine.run(9)
    assert len(engine.scheduler.prefixes) == 1
    engine.scheduler.forget_user("default", "bob")
    assert Drop(0) in engine.schedule().kv_ops
    assert engine.kv.entries == {}


def test_prefixes_make_room_for_rows_what_is_about_to_be_used_last() -> None:
    engine = new_engine(budget_tokens=256, max_model_len=120)
    for number in range(3):
        engine.add(new_sequence(f"{number}", prompt=(number, *TURN), max_tokens=1))
        engine.step()
    assert len(engine.scheduler.prefixes) == 2
    engine.add(new_sequence("x", prompt=(2, *TURN, 9)), new_sequence("y", prompt=(1, *TURN, 9)))
    assert engine.join() == ["x", "y"]
    assert [Drop(2), Drop(1)] == [op for op in engine.schedule().kv_ops if isinstance(op, Drop)][-2:]
    assert {s.request_id: s.cached_tokens for s in engine.scheduler.running} == {"x": 51, "y": 0}


# --- KV runs short


def test_when_the_budget_is_full_the_youngest_is_computed_again_later() -> None:
    engine = new_engine(budget_tokens=512, max_model_len=256, max_batch_tokens=300)
    sequences = [new_sequence(f"{n}", num_prompt=120, max_tokens=60, ignore_eos=True) for n in range(3)]
    engine.add(*sequences)
    engine.run(400)
    assert [sequence.num_generated for sequence in sequences] == [60, 60, 60]
    assert sequences[0].num_preemptions == 0
    assert sequences[2].num_preemptions > 0


def test_who_is_preempted_keeps_tokens_and_place_but_neither_row_nor_pin() -> None:
    engine = new_engine("ab", budget_tokens=384, max_model_len=256, max_batch_tokens=300)
    old, young = (new_sequence(f"{d}", d, num_prompt=127, max_tokens=9, ignore_eos=True) for d in "ab")
    engine.add(old, young, new_sequence("later"))
    for _ in range(3):
        engine.step()
    assert (young.state, young.num_computed, young.num_preemptions) == (SequenceState.WAITING, 0, 1)
    assert young.num_generated > 0
    assert not engine.scheduler.slots.is_pinned("b")
    assert [sequence.request_id for sequence in engine.scheduler.waiting] == ["b", "later"]
    engine.run(100)


@pytest.mark.parametrize("budget_tokens", [768, 900, 1100])
def test_however_small_the_budget_everyone_gets_through(budget_tokens: int) -> None:
    engine = new_engine(budget_tokens=budget_tokens, max_num_seqs=8, max_batch_tokens=200)
    sequences = [
        new_sequence(f"{n}", user_id=f"user{n % 3}", num_prompt=100 + 9 * n, max_tokens=100, ignore_eos=True)
        for n in range(12)
    ]
    engine.add(*sequences)
    engine.run(4000)
    assert [sequence.num_generated for sequence in sequences] == [100] * 12
    assert sum(sequence.num_preemptions for sequence in sequences) > 0
