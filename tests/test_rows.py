"""Rows: whatever opens, grows and closes, each sequence finds its own KV."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from tunefleet.runtime.rows import Move, Row, RowTable


@pytest.mark.parametrize(
    ("max_tokens", "lengths"),
    [(1, (128,)), (128, (128,)), (129, (128, 256)), (2048, (128, 256, 512, 1024, 2048))],
)
def test_length_classes_double_up_to_the_longest_sequence(max_tokens: int, lengths: tuple[int, ...]) -> None:
    assert lengths == RowTable(max_tokens).lengths


def test_a_sequence_gets_the_smallest_row_that_holds_it() -> None:
    rows = RowTable(512)
    assert Row(128, 0) == rows.open("a", 128)
    assert Row(256, 0) == rows.open("b", 129)
    assert Row(128, 1) == rows.open("c", 1)


def test_growing_within_a_row_moves_nothing() -> None:
    rows = RowTable(512)
    rows.open("a", 5)
    assert rows.extend("a", 5) == []
    assert rows.extend("a", 128) == []
    assert rows.num_tokens("a") == 128


def test_outgrowing_a_row_moves_up_and_closes_the_hole() -> None:
    rows = RowTable(512)
    for request_id in "abc":
        rows.open(request_id, 100)
        rows.extend(request_id, 100)
    moves = rows.extend("a", 129)
    assert [Move(Row(128, 0), Row(256, 0), 100), Move(Row(128, 2), Row(128, 0), 100)] == moves
    assert Row(128, 0) == rows.row_of("c")
    assert rows.num_rows(128) == 2


def test_a_long_first_chunk_goes_straight_to_its_class() -> None:
    rows = RowTable(2048)
    rows.open("a", 10)
    assert [Move(Row(128, 0), Row(1024, 0), 0)] == rows.extend("a", 1000)


def test_closing_the_last_row_moves_nothing() -> None:
    rows = RowTable(128)
    rows.open("a", 10)
    rows.open("b", 10)
    assert rows.close("b") == []
    assert rows.close("a") == []
    assert rows.num_rows(128) == 0


class OwnContent(RuleBasedStateMachine):
    """Plays the KV tensors: a dict of row -> what is written there, changed by moves alone.

    As in the engine, moves pile up while sequences close and grow, and are carried out before a step writes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows = RowTable(600)
        self.content: dict[Row, list[tuple[str, int]]] = {}
        self.lengths: dict[str, int] = {}  # tokens that each sequence has written
        self.pending: list[Move] = []
        self.num_opened = 0

    @rule(num_tokens=st.integers(1, 600))
    def open(self, num_tokens: int) -> None:
        request_id = f"{self.num_opened}"
        self.num_opened += 1
        self.rows.open(request_id, num_tokens)
        self.lengths[request_id] = 0

    @rule(choice=st.randoms(use_true_random=False))
    def close(self, choice: object) -> None:
        if self.lengths:
            request_id = choice.choice(sorted(self.lengths))  # type: ignore[attr-defined]
            del self.lengths[request_id]
            self.pending += self.rows.close(request_id)

    @rule(growths=st.lists(st.sampled_from([0, 0, 1, 1, 1, 7, 60, 130, 300]), min_size=1, max_size=12))
    def step(self, growths: list[int]) -> None:
        """Each sequence grows by an amount of its own; 0: it isn't scheduled."""
        grown = {}
        for request_id, growth in zip(sorted(self.lengths), growths, strict=False):
            length = min(self.lengths[request_id] + growth, 600)
            if length > self.lengths[request_id]:
                grown[request_id] = length
                self.pending += self.rows.extend(request_id, length)
        for source, target, num_tokens in self.pending:
            held = self.content.get(source, [])[:num_tokens]
            self.content[target] = held + self.content.get(target, [])[len(held) :]
        self.pending = []
        for request_id, length in grown.items():
            row = self.rows.row_of(request_id)
            before = self.content.get(row, [])[: self.lengths[request_id]]
            written = [(request_id, position) for position in range(self.lengths[request_id], length)]
            self.content[row] = before + written
            self.lengths[request_id] = length
        self.everyone_finds_their_own()

    def everyone_finds_their_own(self) -> None:
        """All sequences, those that the step left out as well."""
        for request_id, length in self.lengths.items():
            expected = [(request_id, position) for position in range(length)]
            assert expected == self.content.get(self.rows.row_of(request_id), [])[:length]

    @invariant()
    def rows_are_compact(self) -> None:
        self.rows.check()
        for request_id, length in self.lengths.items():
            assert length == self.rows.num_tokens(request_id)

    def teardown(self) -> None:
        self.step([1] * max(1, len(self.lengths)))


TestOwnContent = OwnContent.TestCase
TestOwnContent.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)
