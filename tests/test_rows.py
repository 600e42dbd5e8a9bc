"""Rows: whatever opens, grows and closes, each sequence finds its own KV, within the budget."""

from __future__ import annotations

import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from scheduler_kit import KvDouble
from tunefleet.errors import InvalidState
from tunefleet.runtime.prefixes import Scope
from tunefleet.runtime.rows import KvOp, Move, Resize, Row, RowTable, least_budget_tokens


@pytest.mark.parametrize(
    ("max_tokens", "lengths"),
    [(1, (128,)), (128, (128,)), (129, (128, 256)), (2048, (128, 256, 512, 1024, 2048))],
)
def test_length_classes_double_up_to_the_longest_sequence(max_tokens: int, lengths: tuple[int, ...]) -> None:
    assert lengths == RowTable(max_tokens, 10_000).lengths


def test_a_sequence_gets_the_smallest_row_that_holds_it() -> None:
    rows = RowTable(512, 10_000)
    for request_id, num_tokens in [("a", 128), ("b", 129), ("c", 1)]:
        rows.open(request_id, num_tokens)
    assert [Row(128, 0), Row(256, 0), Row(128, 1)] == [rows.row_of(request_id) for request_id in "abc"]


def test_growing_within_a_row_moves_nothing() -> None:
    rows = RowTable(512, 10_000)
    rows.open("a", 5)
    assert rows.extend("a", 5) == []
    assert rows.extend("a", 128) == []
    assert rows.num_tokens("a") == 128


def test_outgrowing_a_row_moves_up_and_closes_the_hole() -> None:
    rows = RowTable(512, 10_000)
    for request_id in "abc":
        rows.open(request_id, 100)
        rows.extend(request_id, 100)
    expected = [
        Resize(256, 1),
        Move(Row(128, 0), Row(256, 0), 100),
        Move(Row(128, 2), Row(128, 0), 100),
    ]
    assert expected == rows.extend("a", 129)
    assert Row(128, 0) == rows.row_of("c")
    assert rows.num_rows(128) == 2


def test_a_long_first_chunk_goes_straight_to_its_class() -> None:
    rows = RowTable(2048, 10_000)
    rows.open("a", 10)
    assert [Resize(1024, 1), Move(Row(128, 0), Row(1024, 0), 0)] == rows.extend("a", 1000)


def test_what_was_loaded_moves_along() -> None:
    rows = RowTable(256, 10_000)
    rows.open("a", 100, num_loaded=90)
    assert [Resize(256, 1), Move(Row(128, 0), Row(256, 0), 90)] == rows.extend("a", 200)


def test_closing_the_last_row_moves_nothing() -> None:
    rows = RowTable(128, 10_000)
    rows.open("a", 10)
    rows.open("b", 10)
    assert rows.close("b") == []
    assert rows.close("a") == []
    assert rows.num_rows(128) == 0


def test_a_class_grows_by_doubling() -> None:
    rows = RowTable(128, 10_000)
    ops = [rows.open(f"{number}", 1) for number in range(6)]
    assert [[Resize(128, 1)], [Resize(128, 2)], [Resize(128, 4)], [], [Resize(128, 8)], []] == ops


def test_where_doubling_does_not_fit_a_class_grows_by_what_is_needed() -> None:
    rows = RowTable(128, 3 * 128 + 50)
    for request_id in "ab":
        rows.open(request_id, 1)
    assert [Resize(128, 3)] == rows.open("c", 1)
    assert not rows.can_open(1)
    with pytest.raises(InvalidState, match="no room for a row of 128"):
        rows.open("d", 1)


def test_what_lies_beside_the_rows_counts() -> None:
    rows = RowTable(128, 1000)
    assert rows.can_open(1, beside=872)
    assert not rows.can_open(1, beside=873)
    rows.open("a", 1)
    rows.open("b", 1)
    assert [Resize(128, 3)] == rows.open("c", 1, beside=500)


def test_memory_that_nobody_uses_never_keeps_a_row_from_being_opened() -> None:
    rows = RowTable(256, 4 * 256)
    for request_id in "abcde":
        rows.open(request_id, 1)
    assert rows.capacity(128) == 8
    for request_id in "bcde":
        rows.close(request_id)
    assert [Resize(128, 1), Resize(256, 1)] == rows.open("long", 200)
    rows.check()


def test_a_sequence_that_moves_up_needs_both_rows_at_once() -> None:
    rows = RowTable(256, 5 * 128)
    for request_id in "abc":
        rows.open(request_id, 128)
    assert rows.can_extend("a", 128, beside=1000)
    assert rows.can_extend("a", 129)
    assert not rows.can_extend("a", 129, beside=1)


def test_a_class_shrinks_when_a_quarter_is_used_and_not_back_and_forth() -> None:
    rows = RowTable(128, 10_000)
    for number in range(8):
        rows.open(f"{number}", 1)
    for number in range(5):
        rows.close(f"{number}")
    assert rows.shrink() == []
    rows.close("5")
    assert [Resize(128, 4)] == rows.shrink()
    assert rows.shrink() == []
    assert rows.open("a", 1) == []
    assert rows.open("b", 1) == []
    for request_id in ("a", "b", "6", "7"):
        rows.close(request_id)
    assert [Resize(128, 1)] == rows.shrink()
    assert rows.shrink() == []


@pytest.mark.parametrize("max_tokens", [100, 200, 2048])
def test_a_budget_in_which_a_lone_sequence_can_not_grow_is_refused(max_tokens: int) -> None:
    budget = least_budget_tokens(max_tokens)
    rows = RowTable(max_tokens, budget)
    rows.open("a", 1)
    for num_tokens in range(1, max_tokens + 1):
        assert rows.can_extend("a", num_tokens)
        rows.extend("a", num_tokens)
        rows.check()
    with pytest.raises(ValueError, match=f"give it {budget} or lower max_model_len"):
        RowTable(max_tokens, budget - 1)


def test_a_sequence_has_one_row() -> None:
    rows = RowTable(128, 1000)
    rows.open("a", 1)
    with pytest.raises(InvalidState, match="has a row already"):
        rows.open("a", 1)


class OwnContent(RuleBasedStateMachine):
    """Plays the KV tensors: what each row holds is changed by operations alone.

    As in the engine, operations pile up while sequences close and grow, and are carried out before a step
    writes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kv = KvDouble()
        self.lengths: dict[str, int] = {}  # tokens that each sequence has written
        self.pending: list[KvOp] = []
        self.num_opened = 0

    @initialize(budget_tokens=st.sampled_from([1536, 2000, 5000, 100_000]))
    def begin(self, budget_tokens: int) -> None:
        self.rows = RowTable(600, budget_tokens)

    @rule(num_tokens=st.one_of(st.integers(1, 140), st.integers(1, 600)))
    def open(self, num_tokens: int) -> None:
        if self.rows.can_open(num_tokens):
            request_id = f"{self.num_opened}"
            self.num_opened += 1
            self.pending += self.rows.open(request_id, num_tokens)
            self.lengths[request_id] = 0

    @rule(choice=st.randoms(use_true_random=False))
    @precondition(lambda self: self.lengths)
    def close(self, choice: random.Random) -> None:
        request_id = choice.choice(sorted(self.lengths))
        del self.lengths[request_id]
        self.pending += self.rows.close(request_id)

    @rule()
    def shrink(self) -> None:
        self.pending += self.rows.shrink()

    @rule(growths=st.lists(st.sampled_from([0, 0, 1, 1, 1, 7, 60, 130, 300]), min_size=1, max_size=12))
    def step(self, growths: list[int]) -> None:
        """Each sequence grows by an amount of its own; 0: it isn't scheduled."""
        grown = {}
        for request_id, growth in zip(sorted(self.lengths), growths, strict=False):
            length = min(self.lengths[request_id] + growth, 600)
            if length > self.lengths[request_id] and self.rows.can_extend(request_id, length):
                grown[request_id] = length
                self.pending += self.rows.extend(request_id, length)
        self.kv.apply(self.pending, self.rows.budget_tokens)
        self.pending = []
        for request_id, length in grown.items():
            start = self.lengths[request_id]
            self.kv.write(self.rows.row_of(request_id), start, written(request_id, start, length))
            self.lengths[request_id] = length
        self.everyone_finds_their_own()

    def everyone_finds_their_own(self) -> None:
        """All sequences, those that the step left out as well."""
        for request_id, length in self.lengths.items():
            held = self.kv.rows.get(self.rows.row_of(request_id), [])
            assert written(request_id, 0, length) == held[:length]

    @invariant()
    def rows_are_compact(self) -> None:
        if hasattr(self, "rows"):
            self.rows.check()
            for request_id, length in self.lengths.items():
                assert length == self.rows.num_tokens(request_id)

    def teardown(self) -> None:
        if hasattr(self, "rows"):
            self.step([1] * max(1, len(self.lengths)))


def written(request_id: str, start: int, end: int) -> list[tuple[Scope, int]]:
    return [(Scope("default", request_id, None), position) for position in range(start, end)]


TestOwnContent = OwnContent.TestCase
TestOwnContent.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
