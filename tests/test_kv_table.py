"""Rows and prefixes in one budget: what has to go, in which order, and what is never tried in vain."""

from __future__ import annotations

from scheduler_kit import new_sequence
from tunefleet.runtime.kv_table import MIN_SAVED, KvTable
from tunefleet.runtime.prefixes import PrefixTable
from tunefleet.runtime.rows import Drop, Load, Move, Resize, Row, RowTable, Save
from tunefleet.runtime.sequence import Sequence


def new_table(budget_tokens: int, max_tokens: int = 128) -> KvTable:
    return KvTable(RowTable(max_tokens, budget_tokens), PrefixTable())


def opened(table: KvTable, request_id: str, num_tokens: int, first: int = 0) -> Sequence:
    """All of its tokens computed; two of the same ``first`` begin alike."""
    sequence = new_sequence(request_id, prompt=tuple(range(first, first + num_tokens)))
    table.open(sequence)
    table.extend(sequence, num_tokens)
    sequence.num_computed = num_tokens
    table.take_ops()
    return sequence


def test_a_prefix_is_saved_before_another_row_moves_into_its_place() -> None:
    table = new_table(10_000)
    first, second = opened(table, "x", 40), opened(table, "y", 40, first=100)
    table.close(first, keep_prefix=True)
    assert [Save(Row(128, 0), 0, 40), Move(Row(128, 1), Row(128, 0), 40)] == table.take_ops()
    assert Row(128, 0) == table.rows.row_of(second.request_id)


def test_a_hit_is_loaded_into_the_row_that_it_opens() -> None:
    table = new_table(10_000)
    table.close(opened(table, "x", 40), keep_prefix=True)
    table.take_ops()
    later = new_sequence("y", prompt=tuple(range(60)))
    assert table.open(later) == 40
    assert [Load(0, Row(128, 0), 40)] == table.take_ops()
    assert table.rows.num_tokens("y") == 40


def test_what_is_too_short_is_not_saved() -> None:
    table = new_table(10_000)
    table.close(opened(table, "x", MIN_SAVED - 1), keep_prefix=True)
    table.close(opened(table, "y", MIN_SAVED), keep_prefix=False)
    assert len(table.prefixes) == 0


def test_an_entry_takes_the_place_of_older_ones_but_of_no_row() -> None:
    table = new_table(128 + 100)
    table.close(opened(table, "x", 60), keep_prefix=True)
    table.take_ops()
    table.close(opened(table, "y", 70, first=100), keep_prefix=True)
    assert [Drop(0), Save(Row(128, 0), 1, 70)] == table.take_ops()
    table.close(opened(table, "z", 101, first=200), keep_prefix=True)
    assert table.take_ops() == []
    assert 1 in table.prefixes
    table.check()


def test_rows_that_nobody_uses_make_room_for_an_entry() -> None:
    table = new_table(4 * 128)
    sequences = [opened(table, f"{n}", 100, first=n) for n in range(3)]
    for sequence in sequences[:2]:
        table.close(sequence, keep_prefix=False)
    assert table.rows.capacity(128) == 4
    table.close(sequences[2], keep_prefix=True)
    expected = [
        Move(Row(128, 2), Row(128, 0), 100),
        Resize(128, 1),
        Save(Row(128, 0), 0, 100),
    ]
    assert expected == table.take_ops()
    table.check()


def test_a_row_is_refused_only_if_all_prefixes_gone_would_not_do_and_then_none_goes() -> None:
    table = new_table(2 * 128)
    table.close(opened(table, "y", 100, first=100), keep_prefix=True)
    held = opened(table, "x", 60)
    assert table.can_open(new_sequence("z"))
    assert not table.can_open(new_sequence("z"), beside=1)
    assert len(table.prefixes) == 1
    table.open(new_sequence("z"))
    assert [Drop(0), Resize(128, 2)] == table.take_ops()
    table.close(held, keep_prefix=False)
    table.check()


def test_a_row_that_grows_drops_prefixes_and_is_refused_if_that_does_not_help() -> None:
    table = new_table(128 + 256, max_tokens=256)
    table.close(opened(table, "x", 100), keep_prefix=True)
    grows = opened(table, "y", 127, first=300)
    assert table.extend(grows, 129)
    assert [Drop(0), Resize(256, 1), Move(Row(128, 0), Row(256, 0), 127)] == table.take_ops()
    stays = opened(table, "z", 127, first=600)
    assert not table.extend(stays, 129)
    assert table.take_ops() == []
