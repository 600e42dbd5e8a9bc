from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tunefleet.adapters_store.byte_budget import ByteBudget
from tunefleet.errors import InvalidState


def nobody(_digest: str) -> bool:
    return False


def filled(*sizes: int, max_bytes: int = 100) -> ByteBudget:
    budget = ByteBudget(max_bytes)
    for number, size in enumerate(sizes):
        budget.add(f"d{number}", size)
    return budget


def test_nobody_goes_while_there_is_room() -> None:
    assert filled(40, 40).victims(20, nobody) == []


def test_the_least_recently_used_go_first_and_no_more_than_needed() -> None:
    budget = filled(40, 40, 20)
    budget.touch("d0")
    assert budget.victims(41, nobody) == ["d1", "d2"]


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
        victims = self.budget.victims(size, self.busy.__contains__)
        if victims is None:
            held = sum(self.budget.sizes()[busy] for busy in self.busy)
            assert held + size > self.budget.max_bytes
            return
        assert not self.busy & set(victims)
        for victim in victims:
            self.budget.remove(victim)
        self.budget.add(digest, size)

    @rule(digest=st.sampled_from("abcdefg"))
    def mark(self, digest: str) -> None:
        if digest in self.budget:
            self.busy ^= {digest}

    @invariant()
    def books_are_right(self) -> None:
        self.budget.check()
        assert self.busy <= self.budget.sizes().keys()


BudgetMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
TestBudget = BudgetMachine.TestCase
