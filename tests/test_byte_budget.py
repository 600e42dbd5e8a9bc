from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tunefleet.adapters_store.byte_budget import FETCH_COST_BYTES, ByteBudget
from tunefleet.errors import InvalidState

MB = 10**6


def nobody(_digest: str) -> bool:
    return False


def filled(*sizes: int, max_bytes: int = 100) -> ByteBudget:
    budget = ByteBudget(max_bytes)
    for number, size in enumerate(sizes):
        budget.add(f"d{number}", size)
    return budget


def make_room(budget: ByteBudget, size: int) -> list[str]:
    victims = budget.victims(size, nobody)
    assert victims is not None
    for victim in victims:
        budget.evict(victim)
    return victims


def test_nobody_goes_while_there_is_room() -> None:
    assert filled(40, 40).victims(20, nobody) == []


def test_of_one_size_the_least_recently_used_go_first_and_no_more_than_needed() -> None:
    budget = filled(20, 20, 20, 20, 20)
    budget.touch("d0")
    assert budget.victims(21, nobody) == ["d1", "d2"]
    assert list(budget.sizes()) == ["d1", "d2", "d3", "d4", "d0"]


def test_choosing_victims_changes_nothing() -> None:
    budget = filled(20, 20, 20)
    before = budget.sizes()
    for size in (50, 80, 101):
        budget.victims(size, nobody)
        budget.check()
    assert before == budget.sizes()


def test_small_copies_stay_and_one_large_one_goes() -> None:
    budget = filled(2 * MB, 2 * MB, 50 * MB, 2 * MB, max_bytes=60 * MB)
    budget.touch("d2")
    assert make_room(budget, 5 * MB) == ["d2"]


def test_a_small_copy_that_nobody_uses_any_more_goes_in_the_end() -> None:
    budget = filled(2 * MB, max_bytes=42 * MB)
    gone: list[str] = []
    for number in range(40):
        gone += make_room(budget, 10 * MB)
        budget.add(f"new{number}", 10 * MB)
    assert "d0" in gone


def test_a_small_copy_that_is_used_stays_whatever_passes_by() -> None:
    budget = filled(2 * MB, max_bytes=42 * MB)
    for number in range(40):
        make_room(budget, 10 * MB)
        budget.add(f"new{number}", 10 * MB)
        budget.touch("d0")
    assert "d0" in budget


def test_a_large_copy_that_is_used_stays_among_small_ones_that_are_not() -> None:
    budget = filled(50 * MB, max_bytes=500 * MB)
    for number in range(300):
        make_room(budget, FETCH_COST_BYTES)
        budget.add(f"new{number}", FETCH_COST_BYTES)
        budget.touch("d0")
    assert "d0" in budget


def test_a_removed_copy_does_not_age_the_others() -> None:
    budget = filled(20, 20, max_bytes=40)
    budget.remove("d0")
    budget.add("d2", 20)
    assert budget.victims(20, nobody) == ["d1"]


def test_the_busy_stay() -> None:
    budget = filled(40, 40, 20)
    assert budget.victims(30, lambda digest: digest == "d0") == ["d1"]
    assert budget.victims(70, lambda digest: digest == "d0") is None


def test_what_is_larger_than_everything_never_fits() -> None:
    assert filled().victims(101, nobody) is None
    assert filled().victims(100, nobody) == []


def test_adding_twice_or_too_much_is_misuse() -> None:
    budget = filled(40)
    for digest, size in (("d0", 1), ("new", 61)):
        with pytest.raises(InvalidState):
            budget.add(digest, size)


def test_the_queue_does_not_grow_with_use() -> None:
    budget = filled(20, 20)
    for _ in range(1000):
        budget.touch("d0")
    assert len(budget._queue) <= 20
    budget.check()


class BudgetMachine(RuleBasedStateMachine):
    """Whatever happens, the books are right, within the budget, and busy copies are there."""

    def __init__(self) -> None:
        super().__init__()
        self.budget = ByteBudget(50)
        self.busy: set[str] = set()

    @rule(digest=st.sampled_from("abcdefg"), size=st.integers(0, 60))
    def use(self, digest: str, size: int) -> None:
        if digest in self.budget:
            self.budget.touch(digest)
            return
        order = [copy for copy in self.budget.sizes() if copy not in self.busy]
        victims = self.budget.victims(size, self.busy.__contains__)
        if victims is None:
            held = sum(self.budget.sizes()[busy] for busy in self.busy)
            assert held + size > self.budget.max_bytes
            return
        assert victims == order[: len(victims)]
        for victim in victims:
            self.budget.evict(victim)
        self.budget.add(digest, size)

    @rule(digest=st.sampled_from("abcdefg"))
    def mark(self, digest: str) -> None:
        if digest in self.budget:
            self.busy ^= {digest}

    @rule(digest=st.sampled_from("abcdefg"))
    def remove(self, digest: str) -> None:
        if digest in self.budget and digest not in self.busy:
            self.budget.remove(digest)

    @invariant()
    def books_are_right(self) -> None:
        self.budget.check()
        assert self.busy <= self.budget.sizes().keys()


BudgetMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
TestBudget = BudgetMachine.TestCase
