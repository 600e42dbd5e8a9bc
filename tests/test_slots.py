"""Slots: who is resident, who has to go, and that no budget is ever passed."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunefleet.errors import InvalidState
from tunefleet.runtime.slots import Activation, Slot, SlotTable, rank_class_of


def table(max_slots: int = 4, max_bytes: int = 1000) -> SlotTable:
    """A slot costs as many bytes as its padded rank."""
    return SlotTable(max_slots, max_bytes, lambda rank_class: rank_class)


@pytest.mark.parametrize(
    ("rank", "rank_class"),
    [(1, 8), (7, 8), (8, 8), (9, 16), (16, 16), (17, 32), (33, 64), (64, 64), (65, 128)],
)
def test_a_rank_is_padded_to_a_power_of_two_of_at_least_eight(rank: int, rank_class: int) -> None:
    assert rank_class == rank_class_of(rank)


def test_each_rank_class_counts_its_own_indexes() -> None:
    slots = table()
    assert Activation(Slot(8, 0), ()) == slots.activate("a", 4)
    assert Activation(Slot(16, 0), ()) == slots.activate("b", 16)
    assert Activation(Slot(8, 1), ()) == slots.activate("c", 8)
    assert Slot(16, 0) == slots.lookup("b")
    assert slots.lookup("d") is None


def test_the_least_recently_used_adapter_goes_first() -> None:
    slots = table(max_slots=2)
    slots.activate("a", 8)
    slots.activate("b", 8)
    slots.pin("a")
    slots.unpin("a")
    assert Activation(Slot(8, 1), (Slot(8, 1),)) == slots.activate("c", 8)
    assert slots.digests == ("a", "c")


def test_several_small_adapters_make_room_for_a_wide_one() -> None:
    slots = table(max_bytes=32)
    for digest in "abc":
        slots.activate(digest, 8)
    assert Activation(Slot(16, 0), (Slot(8, 0),)) == slots.activate("wide", 16)
    assert Activation(Slot(32, 0), (Slot(8, 1), Slot(8, 2), Slot(16, 0))) == slots.activate("wider", 32)
    assert slots.digests == ("wider",)


def test_a_pinned_adapter_stays_and_the_newcomer_waits() -> None:
    slots = table(max_slots=1)
    slots.activate("a", 8)
    slots.pin("a")
    slots.pin("a")
    slots.unpin("a")
    assert slots.activate("b", 8) is None
    assert slots.digests == ("a",)
    slots.unpin("a")
    assert slots.activate("b", 8) is not None


def test_a_refusal_evicts_nobody() -> None:
    slots = table(max_bytes=24)
    slots.activate("small", 8)
    slots.activate("pinned", 16)
    slots.pin("pinned")
    assert slots.activate("wide", 16) is None
    assert slots.digests == ("small", "pinned")


def test_an_adapter_larger_than_the_budget_never_fits() -> None:
    slots = table(max_bytes=16)
    assert slots.fits_ever(16)
    assert not slots.fits_ever(17)
    assert slots.activate("wide", 17) is None


def test_misuse_is_an_invalid_state() -> None:
    slots = table()
    slots.activate("abc", 8)
    with pytest.raises(InvalidState, match="has a slot already"):
        slots.activate("abc", 8)
    with pytest.raises(InvalidState, match="not pinned"):
        slots.unpin("abc")
    slots.pin("abc")
    with pytest.raises(InvalidState, match="pinned by 1"):
        slots.deactivate("abc")
    slots.check()


class Model:
    """The same policy on plain lists: residents as (digest, rank class, pins), oldest first."""

    def __init__(self, max_slots: int, max_bytes: int) -> None:
        self.max_slots = max_slots
        self.max_bytes = max_bytes
        self.residents: list[tuple[str, int, int]] = []

    def fits(self, kept: list[tuple[str, int, int]], num_bytes: int) -> bool:
        used = sum(rank_class for _, rank_class, _ in kept)
        return len(kept) < self.max_slots and used + num_bytes <= self.max_bytes

    def activate(self, digest: str, rank_class: int) -> list[str] | None:
        kept = list(self.residents)
        evicted = []
        for resident in self.residents:
            if self.fits(kept, rank_class):
                break
            if not resident[2]:
                kept.remove(resident)
                evicted.append(resident[0])
        if not self.fits(kept, rank_class):
            return None
        self.residents = [*kept, (digest, rank_class, 0)]
        return evicted

    def change_pins(self, digest: str, change: int) -> None:
        index = next(i for i, resident in enumerate(self.residents) if resident[0] == digest)
        _, rank_class, pins = self.residents[index]
        changed = (digest, rank_class, pins + change)
        if change > 0:
            self.residents = [*self.residents[:index], *self.residents[index + 1 :], changed]
        else:
            self.residents[index] = changed


OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["use", "use", "pin", "unpin", "deactivate"]), st.integers(0, 7)), max_size=60
)


@settings(max_examples=150, deadline=None)
@given(OPERATIONS, st.integers(1, 5), st.integers(16, 150))
def test_any_history_gives_what_plain_lists_give(
    operations: list[tuple[str, int]], max_slots: int, max_bytes: int
) -> None:
    slots = table(max_slots, max_bytes)
    model = Model(max_slots, max_bytes)
    for operation, number in operations:
        digest, rank = f"{number}", (4, 8, 9, 16, 20, 33, 40, 64)[number]
        pins = {name: pins for name, _, pins in model.residents}
        places = {name: slots.lookup(name) for name in pins}
        if operation == "use" and digest not in pins:
            expected = model.activate(digest, rank_class_of(rank))
            activation = slots.activate(digest, rank)
            assert expected == (None if activation is None else _names(activation, places))
        elif operation == "pin" and digest in pins:
            model.change_pins(digest, 1)
            assert places[digest] == slots.pin(digest)
        elif operation == "unpin" and pins.get(digest):
            model.change_pins(digest, -1)
            slots.unpin(digest)
        elif operation == "deactivate" and pins.get(digest) == 0:
            model.residents = [resident for resident in model.residents if resident[0] != digest]
            assert places[digest] == slots.deactivate(digest)
        slots.check()
        assert [name for name, _, _ in model.residents] == list(slots.digests)
        assert [bool(pins) for _, _, pins in model.residents] == [
            slots.is_pinned(name) for name in slots.digests
        ]


def _names(activation: Activation, places: dict[str, Slot | None]) -> list[str]:
    by_slot = {slot: name for name, slot in places.items()}
    return [by_slot[slot] for slot in activation.evicted]
