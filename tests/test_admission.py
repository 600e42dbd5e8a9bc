"""Admission: shares between users, grouping by adapter, and the bounds that keep anyone from starving."""

from __future__ import annotations

import itertools

import pytest

from scheduler_kit import EngineDouble, new_scheduler, new_sequence
from tunefleet.runtime.places import MIN_PROGRESS
from tunefleet.runtime.rows import Save


def new_engine(*, fill_steps: int = 0, **limits: int) -> EngineDouble:
    return EngineDouble(new_scheduler(**limits), fill_steps=fill_steps)


# --- shares


def test_one_users_two_hundred_requests_hold_up_anothers_one_for_a_step() -> None:
    engine = new_engine(max_num_seqs=8)
    engine.add(*(new_sequence(f"{n}", max_tokens=50, ignore_eos=True) for n in range(200)))
    for _ in range(20):
        engine.step()
    engine.add(new_sequence("bob", user_id="bob", max_tokens=50, ignore_eos=True))
    assert engine.run_until("bob", 2) <= 1
    engine.run(2000)


def test_with_short_answers_nobody_needs_to_be_preempted_for_that() -> None:
    engine = new_engine(max_num_seqs=8)
    engine.add(*(new_sequence(f"{n}", max_tokens=2) for n in range(200)))
    engine.step()
    engine.step()
    engine.add(new_sequence("bob", user_id="bob"))
    assert engine.run_until("bob", 3) <= 2
    assert all(sequence.num_preemptions == 0 for sequence in engine.scheduler.running)


def test_places_are_shared_out_evenly_and_nobody_is_preempted_twice_without_progress() -> None:
    engine = new_engine(max_num_seqs=8)
    sequences = {
        user_id: [
            new_sequence(f"{user_id}{n}", user_id=user_id, max_tokens=120, ignore_eos=True) for n in range(10)
        ]
        for user_id in ("alice", "bob", "carol", "dave")
    }
    for user_id, own in sequences.items():
        engine.add(*own)
        engine.step()
        running = [sequence.user_id for sequence in engine.scheduler.running]
        assert running.count(user_id) == {"alice": 8, "bob": 4, "carol": 2, "dave": 2}[user_id]
    before = [sequence.num_preemptions for own in sequences.values() for sequence in own]
    for _ in range(MIN_PROGRESS - 2):
        engine.step()
    assert before == [sequence.num_preemptions for own in sequences.values() for sequence in own]
    assert [sum(s in engine.scheduler.running for s in own) for own in sequences.values()] == [2, 2, 2, 2]
    engine.run(2000)
    assert all(sequence.num_generated == 120 for own in sequences.values() for sequence in own)
    assert sum(sequence.num_preemptions for own in sequences.values() for sequence in own) < 40


def test_who_gave_its_place_to_another_computes_nothing_again() -> None:
    engine = new_engine(max_num_seqs=2)
    first, second = (new_sequence(name, num_prompt=40, max_tokens=30) for name in ("first", "second"))
    engine.add(first, second)
    for _ in range(20):
        engine.step()
    engine.add(new_sequence("bob", user_id="bob", max_tokens=2))
    engine.join()
    assert [sequence.request_id for sequence in engine.scheduler.waiting] == ["second"]
    num_tokens = len(second.tokens)
    assert [Save] == [type(op) for op in engine.schedule().kv_ops if isinstance(op, Save)]
    engine.run_until("second", 1)
    while second in engine.scheduler.waiting:
        engine.step()
    assert (second.num_preemptions, second.cached_tokens) == (1, 0)
    assert second.num_computed >= num_tokens - 1
    engine.run(40)


def test_a_preempted_sequence_has_some_progress_before_it_is_preempted_again() -> None:
    engine = new_engine(max_num_seqs=2)
    engine.add(*(new_sequence(f"{n}", max_tokens=200, ignore_eos=True) for n in range(2)))
    engine.step()
    victim = engine.scheduler.get("1")
    assert victim is not None
    seen = []
    for number in range(150):
        engine.add(new_sequence(f"bob{number}", user_id="bob", max_tokens=1))
        num_preemptions = victim.num_preemptions
        engine.step()
        if victim.num_preemptions > num_preemptions:
            seen.append(len(victim.tokens))
    assert all(later - earlier >= MIN_PROGRESS for earlier, later in itertools.pairwise(seen))
    engine.run(2000)


def test_a_lone_user_may_use_every_place() -> None:
    engine = new_engine(max_num_seqs=8)
    engine.add(*(new_sequence(f"{n}") for n in range(20)))
    assert len(engine.join()) == 8


def test_more_users_than_places_take_turns() -> None:
    engine = new_engine(max_num_seqs=2)
    for number in range(10):
        engine.add(
            *(new_sequence(f"{u}-{number}", user_id=u, max_tokens=3) for u in ("a", "b", "c", "d", "e"))
        )
    engine.run(500)
    for num_turns in range(1, 10):
        users = [request_id[0] for request_id in engine.joined[: 5 * num_turns]]
        assert all(abs(users.count(user_id) - num_turns) <= 1 for user_id in "abcde")


# --- grouping, and its bound


def crowd(engine: EngineDouble, number: int, digest: str) -> None:
    """Another request of an adapter whose user is never done."""
    engine.add(new_sequence(f"{digest}{number}", digest, user_id=digest, max_tokens=4))


def test_resident_users_go_first_while_others_are_filled() -> None:
    engine = new_engine(max_slots=2, max_num_seqs=1, fill_steps=2)
    engine.loaded |= {"a"}
    engine.add(new_sequence("a0", "a", user_id="a", max_tokens=1))
    engine.run(5)
    engine.loaded |= {"b"}
    engine.add(new_sequence("b0", "b", user_id="b"), new_sequence("a1", "a", user_id="a"))
    assert engine.join() == ["a1"]


@pytest.mark.parametrize("max_wait_steps", [4, 16, 64])
def test_who_is_passed_over_is_next_after_the_bound(max_wait_steps: int) -> None:
    """One slot, and a resident user who always has another request: it never is free by itself."""
    engine = new_engine(max_slots=1, max_num_seqs=2, max_wait_steps=max_wait_steps, fill_steps=2)
    engine.loaded |= {"a"}
    for number in range(3):
        crowd(engine, number, "a")
    engine.step()
    engine.loaded |= {"b"}
    engine.add(new_sequence("waits", "b", user_id="bob"))
    for number in range(3, 400):
        crowd(engine, number, "a")
        if "waits" in engine.joined:
            break
        engine.step()
    num_drain = 4 + 2  # steps until those that run are done, and its slot is filled
    assert number - 3 <= max_wait_steps + num_drain + 4


def test_nobody_takes_the_place_of_who_waited_too_long_while_its_slot_is_filled() -> None:
    engine = new_engine(max_slots=1, max_num_seqs=1, max_wait_steps=4, fill_steps=5)
    engine.loaded |= {"a"}
    crowd(engine, 0, "a")
    engine.step()
    engine.loaded |= {"b"}
    engine.add(new_sequence("waits", "b", user_id="bob"))
    for number in range(1, 40):
        crowd(engine, number, "a")
        engine.step()
        if engine.scheduler.slots.holds("b"):
            break
    num_joined = len(engine.joined)
    for number in range(40, 60):
        engine.add(new_sequence(f"base{number}", user_id="carol", max_tokens=1))
        engine.step()
        if "waits" in engine.joined:
            break
    assert engine.joined[num_joined] == "waits"


def test_who_waits_for_a_download_does_not_grow_older() -> None:
    engine = new_engine(max_slots=1, max_num_seqs=2, max_wait_steps=4)
    engine.loaded |= {"a"}
    engine.add(new_sequence("never", "b", user_id="bob"))
    for number in range(60):
        crowd(engine, number, "a")
        engine.step()
    assert len(engine.joined) > 20


def test_a_wide_adapter_gets_its_pages_though_narrow_ones_keep_coming() -> None:
    engine = new_engine(max_slots=8, num_pages=8, max_num_seqs=8, max_wait_steps=8)
    for number in range(8):
        engine.loaded.add(f"n{number}")
        crowd(engine, 0, f"n{number}")
    engine.step()
    engine.loaded.add("wide")
    engine.add(new_sequence("waits", "wide", user_id="bob", rank=64))
    for number in range(1, 200):
        for narrow in range(8):
            engine.loaded |= {f"n{narrow}"} - {*engine.scheduler.slots.digests}
            crowd(engine, number, f"n{narrow}")
        if "waits" in engine.joined:
            break
        engine.step()
    assert number < 8 + 4 + 8


def test_who_uses_other_slots_goes_on_joining_while_a_wide_one_waits_for_its_place() -> None:
    engine = new_engine(max_slots=8, num_pages=16, max_num_seqs=4, max_wait_steps=4)
    engine.loaded |= {"long", "far"}
    engine.add(new_sequence("long", "long", user_id="long", max_tokens=60, ignore_eos=True, rank=64))
    engine.add(new_sequence("first", "far", user_id="far", max_tokens=60, ignore_eos=True, rank=64))
    engine.step()
    engine.loaded.add("wide")
    engine.add(new_sequence("waits", "wide", user_id="bob", rank=64))
    for number in range(30):
        crowd(engine, number, "far")
        engine.step()
    assert "waits" not in engine.joined
    assert len(engine.joined) > 6
    engine.run(200)


def test_a_long_prompt_gets_its_row_though_short_ones_keep_coming() -> None:
    engine = new_engine(budget_tokens=1024, max_model_len=512, max_num_seqs=8, max_wait_steps=8)
    engine.add(*(new_sequence(f"{n}", user_id="alice", max_tokens=4) for n in range(8)))
    engine.step()
    engine.add(new_sequence("long", user_id="bob", num_prompt=400, max_tokens=2))
    for number in range(200):
        engine.add(*(new_sequence(f"{number}-{n}", user_id=f"u{n}", max_tokens=4) for n in range(8)))
        if "long" in engine.joined:
            break
        engine.step()
    assert number < 8 + 4 + 8


def test_newcomers_that_never_end_starve_nobody() -> None:
    """Each newcomer is another user, lifted to the least counter: in the fair order all come first."""
    engine = new_engine(max_num_seqs=1, max_wait_steps=4)
    engine.add(new_sequence("bob0", user_id="bob", max_tokens=50))
    for number in range(10):
        engine.add(new_sequence(f"first{number}", user_id=f"first{number}", max_tokens=2))
    engine.step()
    engine.add(new_sequence("bob1", user_id="bob", max_tokens=1))
    for number in range(400):
        engine.add(new_sequence(f"{number}", user_id=f"user{number}", max_tokens=1))
        if "bob1" in engine.joined:
            break
        engine.step()
    assert number < 52 + 16 * 4 + 10
