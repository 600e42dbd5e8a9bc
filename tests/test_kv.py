"""KV tensors: what is written stays through growth and moves, and nothing of an earlier holder does."""

from __future__ import annotations

import torch

from tunefleet.runtime.kv import KvRows
from tunefleet.runtime.rows import Move, Row

HEADS = {0: (2, 4), 1: (1, 6)}  # layer -> KV heads and head size, which may differ


def new_kv(*rows: Row, layers: tuple[int, ...] = (0, 1)) -> KvRows:
    """Every place of each given row holds a number of its row and layer; keys positive, values negative."""
    kv = KvRows(torch.device("cpu"))
    for row in rows:
        kv.reserve(row.length, row.index + 1)
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
    kv.reserve(128, 3)
    assert kv.used_bytes == 0
    k, v = tensors(kv, 0, 128)
    assert (3, 2, 128, 4) == k.shape == v.shape
    assert not k.any()
    assert not v.any()
    assert kv.used_bytes == 2 * 3 * 2 * 128 * 4 * 4


def test_growth_keeps_what_is_there_and_doubles() -> None:
    rows = [Row(128, 0), Row(128, 1), Row(128, 2)]
    kv = new_kv(*rows)
    kv.reserve(128, 4)
    kv.reserve(128, 2)
    kv.reserve(128, 5)
    assert tensors(kv, 0, 128)[0].shape[0] == 8
    assert tensors(kv, 1, 128)[1].shape[0] == 8
    assert all(holds(kv, row, 128, row) for row in rows)
    assert not tensors(kv, 0, 128)[0][3:].any()


def test_a_layer_that_writes_late_has_as_many_rows_as_the_others() -> None:
    kv = new_kv(Row(128, 0), layers=(0,))
    kv.reserve(128, 4)
    assert tensors(kv, 1, 128)[0].shape[0] == 4


def test_a_move_takes_the_tokens_of_every_layer_to_another_class() -> None:
    kv = new_kv(Row(128, 0), Row(128, 1))
    kv.move([Move(Row(128, 0), Row(256, 0), 100)])
    assert holds(kv, Row(256, 0), 100, Row(128, 0))
    assert holds(kv, Row(128, 1), 128, Row(128, 1))


def test_a_move_makes_room_for_its_target() -> None:
    kv = new_kv(Row(128, 0), Row(256, 0))
    kv.move([Move(Row(128, 0), Row(256, 4), 7)])
    assert holds(kv, Row(256, 4), 7, Row(128, 0))
    assert holds(kv, Row(256, 0), 256, Row(256, 0))


def test_nothing_of_a_rows_earlier_holder_survives_a_move() -> None:
    """NaN above all: masked places take part in products."""
    kv = new_kv(Row(128, 0), Row(128, 1))
    for layer in HEADS:
        for tensor in tensors(kv, layer, 128):
            tensor[0] = float("nan")
    kv.move([Move(Row(128, 1), Row(128, 0), 5)])
    assert holds(kv, Row(128, 0), 5, Row(128, 1))


def test_moves_are_carried_out_in_their_order() -> None:
    """The second move's source is the first one's target; the third fills the first's source."""
    kv = new_kv(Row(128, 0), Row(128, 1))
    kv.move(
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


def test_clearing_a_row_that_no_tensor_reaches_yet_does_nothing() -> None:
    kv = new_kv(Row(128, 0))
    kv.clear(Row(128, 9))
    kv.clear(Row(512, 0))
    assert holds(kv, Row(128, 0), 128, Row(128, 0))
