"""Slots: who is resident, who has to go, and that no budget is ever passed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunefleet.errors import InvalidState
from tunefleet.runtime.slots import Activation, Slot, SlotTable


def fill(slots: SlotTable, digest: str, rank: int = 8, *, cost: float = 1.0) -> Activation | None:
    activation = slots.activate(digest, rank, cost=cost)
    if activation is not None:
        slots.ready(digest)
    return activation


def use(slots: SlotTable, digest: str) -> None:
    slots.pin(digest)
    slots.unpin(digest)


def test_rank_classes_are_views_of_one_arena() -> None:
    slots = SlotTable(8, 16)
    assert Activation("a", Slot(8, 0), {}) == fill(slots, "a", 4)
    assert Activation("b", Slot(16, 1), {}) == fill(slots, "b", 16)
    assert Activation("c", Slot(8, 1), {}) == fill(slots, "c", 8)
    assert Activation("d", Slot(64, 1), {}) == fill(slots, "d", 33)
    assert Activation("e", Slot(32, 1), {}) == fill(slots, "e", 32)
    assert [range(1), range(2, 4), range(1, 2), range(8, 16), range(4, 8)] == [
        slot.pages for slot in map(slots.lookup, "abcde") if slot
    ]
    assert slots.used_pages == 16
    assert slots.lookup("f") is None


def test_a_freed_slot_is_used_again_before_higher_ones() -> None:
    slots = SlotTable(8, 8)
    for digest in "abc":
        fill(slots, digest)
    assert Slot(8, 1) == slots.deactivate("b")
    assert Activation("d", Slot(8, 1), {}) == fill(slots, "d")


def test_a_slot_is_used_only_once_it_is_filled() -> None:
    slots = SlotTable(2, 8)
    slots.activate("a", 8)
    assert slots.holds("a")
    assert slots.lookup("a") is None
    assert slots.digests == ()
    with pytest.raises(InvalidState, match="not ready"):
        slots.pin("a")
    slots.ready("a")
    assert Slot(8, 0) == slots.lookup("a") == slots.pin("a")


def test_who_is_being_filled_is_not_evicted() -> None:
    slots = SlotTable(1, 8)
    slots.activate("a", 8)
    assert slots.activate("b", 8) is None
    slots.ready("a")
    assert Activation("b", Slot(8, 0), {"a": Slot(8, 0)}) == slots.activate("b", 8)


def test_a_fill_that_fails_frees_the_slot() -> None:
    slots = SlotTable(1, 8)
    slots.activate("a", 8)
    assert Slot(8, 0) == slots.deactivate("a")
    assert not slots.holds("a")


def test_of_equals_the_least_recently_used_goes_first() -> None:
    slots = SlotTable(2, 8)
    fill(slots, "a")
    fill(slots, "b")
    use(slots, "b")
    use(slots, "a")
    assert Activation("c", Slot(8, 1), {"b": Slot(8, 1)}) == fill(slots, "c")


def test_who_is_used_often_stays_before_who_was_used_last() -> None:
    slots = SlotTable(2, 8)
    fill(slots, "often")
    for _ in range(5):
        use(slots, "often")
    fill(slots, "last")
    use(slots, "last")
    assert Activation("new", Slot(8, 1), {"last": Slot(8, 1)}) == fill(slots, "new")


def test_who_was_used_often_long_ago_goes_in_the_end() -> None:
    slots = SlotTable(2, 8)
    fill(slots, "often")
    for _ in range(5):
        use(slots, "often")
    for number in range(20):
        fill(slots, f"{number}")
        use(slots, f"{number}")
        if not slots.holds("often"):
            break
    assert 3 <= number <= 10


def test_what_costs_more_to_load_stays_longer() -> None:
    slots = SlotTable(2, 8)
    fill(slots, "dear", cost=10.0)
    fill(slots, "cheap", cost=1.0)
    use(slots, "cheap")
    assert Activation("new", Slot(8, 1), {"cheap": Slot(8, 1)}) == fill(slots, "new")


def test_what_takes_more_room_goes_before_what_takes_less() -> None:
    slots = SlotTable(2, 16)
    fill(slots, "wide", 64)
    fill(slots, "narrow", 8)
    assert Activation("new", Slot(8, 0), {"wide": Slot(64, 0)}) == fill(slots, "new")


def test_several_small_adapters_make_room_for_a_wide_one_where_they_are_worth_least() -> None:
    slots = SlotTable(8, 4)
    for digest in "abcd":
        fill(slots, digest)
    use(slots, "a")
    assert Activation("wide", Slot(16, 1), {"c": Slot(8, 2), "d": Slot(8, 3)}) == fill(slots, "wide", 16)
    assert Activation("wider", Slot(32, 0), {"a": Slot(8, 0), "b": Slot(8, 1), "wide": Slot(16, 1)}) == fill(
        slots, "wider", 32
    )


def test_a_pinned_adapter_stays_and_the_newcomer_waits() -> None:
    slots = SlotTable(1, 8)
    fill(slots, "a")
    slots.pin("a")
    slots.pin("a")
    slots.unpin("a")
    assert slots.activate("b", 8) is None
    assert slots.digests == ("a",)
    slots.unpin("a")
    assert slots.activate("b", 8) is not None


def test_a_refusal_evicts_nobody() -> None:
    slots = SlotTable(8, 4)
    for digest in "abcd":
        fill(slots, digest)
    slots.pin("a")
    slots.pin("d")
    assert slots.activate("wide", 16) is None
    assert slots.digests == ("a", "b", "c", "d")
    slots.check()


def test_who_is_kept_is_not_evicted() -> None:
    slots = SlotTable(2, 8)
    fill(slots, "a")
    fill(slots, "b")
    assert slots.activate("c", 8, kept={"a", "b"}) is None
    assert Activation("c", Slot(8, 1), {"b": Slot(8, 1)}) == slots.activate("c", 8, kept={"a"})


def test_who_is_in_the_way_is_who_is_used_least_where_a_place_could_be() -> None:
    slots = SlotTable(8, 4)
    for digest in "abcd":
        fill(slots, digest)
        slots.pin(digest)
    slots.pin("a")
    slots.unpin("d")
    assert slots.in_the_way(8) == ["d"]
    assert slots.in_the_way(16) == ["c", "d"]
    assert slots.in_the_way(32) == ["a", "b", "c", "d"]


def test_where_there_is_room_but_one_adapter_too_many_the_least_used_is_in_the_way() -> None:
    slots = SlotTable(2, 64)
    for digest in "aab":
        if not slots.holds(digest):
            fill(slots, digest)
        slots.pin(digest)
    assert slots.in_the_way(64) == ["b"]


def test_an_adapter_larger_than_the_arena_never_fits() -> None:
    slots = SlotTable(8, 3)
    assert slots.fits_ever(16)
    assert not slots.fits_ever(17)
    assert slots.activate("wide", 17) is None


def test_misuse_is_an_invalid_state() -> None:
    slots = SlotTable(8, 8)
    fill(slots, "abc")
    with pytest.raises(InvalidState, match="has a slot already"):
        slots.activate("abc", 8)
    with pytest.raises(InvalidState, match="ready already"):
        slots.ready("abc")
    with pytest.raises(InvalidState, match="not pinned"):
        slots.unpin("abc")
    slots.pin("abc")
    with pytest.raises(InvalidState, match="pinned by 1"):
        slots.deactivate("abc")
    slots.check()


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["activate", "activate", "ready", "pin", "unpin", "deactivate"]), st.integers(0, 7)
    ),
    max_size=80,
)
LOOSE, FILLING = 0, -1  # otherwise the number of pins


@settings(max_examples=200, deadline=None)
@given(OPERATIONS, st.integers(1, 5), st.integers(1, 20))
def test_in_any_history_budgets_hold_and_nobody_in_use_loses_a_slot(
    operations: list[tuple[str, int]], max_slots: int, num_pages: int
) -> None:
    slots = SlotTable(max_slots, num_pages)
    model: dict[str, int] = {}
    places: dict[str, Slot] = {}
    for operation, number in operations:
        digest, rank = f"{number}", (4, 8, 9, 16, 20, 33, 40, 64)[number]
        state = model.get(digest)
        if operation == "activate" and state is None:
            activation = slots.activate(digest, rank, cost=number + 1)
            if activation is None:
                assert must_wait(rank, max_slots, num_pages, model, places)
            else:
                for evicted in activation.evicted:
                    assert model.pop(evicted) == LOOSE
                    del places[evicted]
                model[digest], places[digest] = FILLING, activation.slot
        elif operation == "ready" and state == FILLING:
            slots.ready(digest)
            model[digest] = LOOSE
        elif operation == "pin" and state is not None and state >= 0:
            assert places[digest] == slots.pin(digest)
            model[digest] += 1
        elif operation == "unpin" and state is not None and state > 0:
            slots.unpin(digest)
            model[digest] -= 1
        elif operation == "deactivate" and state in (FILLING, LOOSE):
            assert places.pop(digest) == slots.deactivate(digest)
            del model[digest]
        slots.check()
        ready = {name: place for name, place in places.items() if model[name] != FILLING}
        assert ready == {name: slots.lookup(name) for name in slots.digests}
        assert {name for name in model if model[name] > 0} == set(filter(slots.is_pinned, model))


def must_wait(
    rank: int, max_slots: int, num_pages: int, model: dict[str, int], places: dict[str, Slot]
) -> bool:
    """Whether no place is free of adapters in use, or no adapter may go."""
    in_use = [places[name] for name, state in model.items() if state != LOOSE]
    taken = {page for slot in in_use for page in slot.pages}
    size = max(1, (1 << (rank - 1).bit_length()) // 8)
    places_left = [
        start for start in range(0, num_pages - size + 1, size) if not taken & set(range(start, start + size))
    ]
    return not places_left or len(in_use) >= max_slots
