"""KV tensors: what is written stays through growth and moves, and nothing of an earlier holder does."""

from __future__ import annotations

import torch

from tunefleet.runtime.kv import KvRows
from tunefleet.runtime.rows import Drop, Load, Move, Resize, Row, Save

HEADS = {0: (2, 4), 1: (1, 6)}  # layer -> KV heads and head size, which may differ


def new_kv(*rows: Row, layers: tuple[int, ...] = (0, 1)) -> KvRows:
    """Every place of each given row holds a number of its row and layer; keys positive, values negative."""
    kv = KvRows(torch.device("cpu"))
    for length in {row.length for row in rows}:
        num_rows = 1 + max(row.index for row in rows if row.length == length)
        kv.apply([Resize(length, num_rows)])
    for row in rows:
        for layer in layers:
            k, v = tensors(kv, layer, row.length)
            k[row.index] = mark(row, layer)
            v[row.index] = -mark(row, layer)
    return kv


def tensors(kv: KvRows, layer: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    heads, size = HEADS[layer]
    like = torch.zeros(heads, 1, size)
    return kv.layer(layer, length, like, like)


def mark(row: Row, layer: int) -> float:
    return row.length + 10 * row.index + layer + 1.0


def holds(kv: KvRows, row: Row, num_tokens: int, of: Row) -> bool:
    """``row`` holds the first ``num_tokens`` of what ``of`` was filled with, and zeros after them."""
    for layer in HEADS:
        k, v = tensors(kv, layer, row.length)
        for tensor, value in ((k, mark(of, layer)), (v, -mark(of, layer))):
            if not (tensor[row.index, :, :num_tokens] == value).all():
                return False
            if tensor[row.index, :, num_tokens:].any():
                return False
    return True


def test_tensors_are_made_by_need_and_start_as_zeros() -> None:
    kv = KvRows(torch.device("cpu"))
    kv.apply([Resize(128, 3)])
    assert kv.used_bytes == 0
    k, v = tensors(kv, 0, 128)
    assert (3, 2, 128, 4) == k.shape == v.shape
    assert not k.any()
    assert not v.any()
    assert kv.used_bytes == 2 * 3 * 2 * 128 * 4 * 4


def test_a_resized_class_keeps_the_rows_that_stay() -> None:
    rows = [Row(128, 0), Row(128, 1), Row(128, 2)]
    kv = new_kv(*rows)
    kv.apply([Resize(128, 8)])
    assert tensors(kv, 0, 128)[0].shape[0] == 8
    assert all(holds(kv, row, 128, row) for row in rows)
    assert not tensors(kv, 0, 128)[0][3:].any()
    kv.apply([Resize(128, 2)])
    assert tensors(kv, 1, 128)[1].shape[0] == 2
    assert all(holds(kv, row, 128, row) for row in rows[:2])
    kv.apply([Resize(128, 0)])
    assert kv.used_bytes == 0


def test_a_layer_that_writes_late_has_as_many_rows_as_the_others() -> None:
    kv = new_kv(Row(128, 0), layers=(0,))
    kv.apply([Resize(128, 4)])
    assert tensors(kv, 1, 128)[0].shape[0] == 4


def test_what_a_row_held_comes_back_elsewhere_after_it_is_gone() -> None:
    kv = new_kv(Row(128, 0), Row(256, 0))
    kv.apply([Save(Row(128, 0), 7, 100)])
    kv.clear(Row(128, 0))
    kv.apply([Load(7, Row(256, 0), 60)])
    assert holds(kv, Row(256, 0), 60, Row(128, 0))
    assert holds(kv, Row(128, 0), 0, Row(128, 0))


def test_a_saved_row_costs_its_tokens_until_it_is_dropped() -> None:
    kv = new_kv(Row(128, 0))
    before = kv.used_bytes
    kv.apply([Save(Row(128, 0), 7, 10)])
    assert kv.used_bytes - before == 10 * 2 * (2 * 4 + 1 * 6) * 4
    kv.apply([Drop(7)])
    assert before == kv.used_bytes


def test_a_move_takes_the_tokens_of_every_layer_to_another_class() -> None:
    kv = new_kv(Row(128, 0), Row(128, 1))
    kv.apply([Resize(256, 1)])
    kv.apply([Move(Row(128, 0), Row(256, 0), 100)])
    assert holds(kv, Row(256, 0), 100, Row(128, 0))
    assert holds(kv, Row(128, 1), 128, Row(128, 1))


def test_nothing_of_a_rows_earlier_holder_survives_a_move() -> None:
    """NaN above all: masked places take part in products."""
    kv = new_kv(Row(128, 0), Row(128, 1))
    for layer in HEADS:
        for tensor in tensors(kv, layer, 128):
            tensor[0] = float("nan")
    kv.apply([Move(Row(128, 1), Row(128, 0), 5)])
    assert holds(kv, Row(128, 0), 5, Row(128, 1))


def test_moves_are_carried_out_in_their_order() -> None:
    """The second move's source is the first one's target; the third fills the first's source."""
    kv = new_kv(Row(128, 0), Row(128, 1))
    kv.apply([Resize(256, 2)])
    kv.apply(
        [
            Move(Row(128, 0), Row(256, 0), 50),
            Move(Row(256, 0), Row(256, 1), 40),
            Move(Row(128, 1), Row(128, 0), 30),
        ]
    )
    assert holds(kv, Row(256, 1), 40, Row(128, 0))
    assert holds(kv, Row(128, 0), 30, Row(128, 1))


def test_clearing_a_row_touches_no_other() -> None:
    rows = [Row(128, 0), Row(128, 1), Row(128, 2), Row(256, 1)]
    kv = new_kv(*rows)
    kv.clear(Row(128, 1))
    assert holds(kv, Row(128, 1), 0, Row(128, 1))
    assert all(holds(kv, row, row.length, row) for row in rows if row != Row(128, 1))


def test_clearing_a_row_of_which_nothing_is_written_yet_does_nothing() -> None:
    kv = new_kv(Row(128, 0))
    kv.clear(Row(512, 0))
    assert holds(kv, Row(128, 0), 128, Row(128, 0))
