"""The arena: bounded, filled in pieces, and showing nobody what others left in it."""

from __future__ import annotations

import itertools
import json
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lora_kit import CPU, LAYOUT, LINEARS, fill, new_banks, prepared_of, random_weights
from tunefleet.core import LinearSpec
from tunefleet.errors import AdapterLoadFailed, InvalidState
from tunefleet.runtime.banks import Banks, Prepared, copy_staged, map_prepared
from tunefleet.runtime.slots import Slot

EVERYWHERE = dict.fromkeys(LINEARS, 8)
ONE_LAYER = {"0.attn.v": 5}


def adapter(seed: int = 0, rank: int = 8) -> Prepared:
    return prepared_of(random_weights(seed, dict.fromkeys(LINEARS, rank)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_bytes", "num_pages"), [(0, 0), (-1, 0), (1, 1), (5, 5)])
def test_the_arena_has_the_pages_that_fit_the_budget(
    dtype: torch.dtype, num_bytes: int, num_pages: int
) -> None:
    """The number of bytes is that of so many pages; -1: one byte too few for the first."""
    page_bytes = 8 * LAYOUT.features * dtype.itemsize
    budget = page_bytes - 1 if num_bytes < 0 else num_bytes * page_bytes
    banks = Banks(LINEARS, dtype, CPU, budget)
    assert (num_pages, page_bytes) == (banks.num_pages, banks.page_bytes)
    assert num_pages // 2 == len(banks.a(("0.attn.q",), 16))
    assert num_pages * page_bytes == banks.a(("0.attn.q",), 8).untyped_storage().nbytes() <= budget


def test_pages_that_nobody_used_cost_no_memory() -> None:
    linears = {"q": LinearSpec(1024, 1024)}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    banks = Banks(linears, torch.float32, CPU, 1 << 31)
    banks.clear(Slot(8, banks.num_pages - 1))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


def test_a_class_sees_its_slots_matrices() -> None:
    banks = new_banks(8)
    weights = random_weights(0, dict.fromkeys(LINEARS, 16))
    fill(banks, Slot(16, 2), prepared_of(weights))
    for path, pair in weights.items():
        assert torch.equal(pair.a, banks.a((path,), 16)[2])
        assert torch.equal(pair.b, banks.b(path, 16)[2])
    together = banks.a(("0.attn.q", "0.attn.k", "0.attn.v"), 16)[2]
    assert torch.equal(torch.cat([weights[f"0.attn.{name}"].a for name in "qkv"]), together)


@given(st.integers(1, 3000), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
@settings(max_examples=30, deadline=None)
def test_a_filling_in_pieces_equals_one_in_whole(max_bytes: int, dtype: torch.dtype) -> None:
    prepared = prepared_of(random_weights(0, EVERYWHERE), dtype)
    banks = new_banks(4)
    filling = banks.filling(Slot(8, 1), prepared)
    copied = [prepared.num_bytes - filling.num_bytes_left]
    is_done = False
    while not is_done:
        with pytest.raises(InvalidState, match="not filled"):
            banks.targets(Slot(8, 1))
        is_done = filling.copy(max_bytes)
        copied.append(prepared.num_bytes - filling.num_bytes_left)
    steps = [later - earlier for earlier, later in itertools.pairwise(copied)]
    assert max(steps) <= max(max_bytes, dtype.itemsize)
    assert prepared.num_bytes == sum(steps)
    assert torch.equal(prepared.values.float(), banks.values(Slot(8, 1)))
    assert prepared.targets == banks.targets(Slot(8, 1))
    assert [bool(banks.values(Slot(8, i)).isnan().all()) for i in range(4)] == [True, False, True, True]


@pytest.mark.parametrize("staging_bytes", [4, 64, 10**6])
def test_what_goes_through_a_staging_buffer_arrives_whole(staging_bytes: int) -> None:
    values = torch.randn(1003).to(torch.bfloat16)
    target = torch.zeros(1003)
    copy_staged(target, values, torch.empty(staging_bytes, dtype=torch.uint8))
    assert torch.equal(values.float(), target)


def test_a_slot_that_is_filled_again_holds_nothing_of_what_it_held() -> None:
    banks = new_banks(2)
    fill(banks, Slot(8, 0), prepared_of(random_weights(0, EVERYWHERE)))
    narrow = prepared_of(random_weights(1, ONE_LAYER))
    fill(banks, Slot(8, 0), narrow)
    assert torch.equal(narrow.values, banks.values(Slot(8, 0)))
    assert frozenset(ONE_LAYER) == banks.targets(Slot(8, 0))


def test_a_cleared_slot_is_zeros_counts_no_more_and_leaves_its_neighbours() -> None:
    banks = new_banks(4)
    for index in range(3):
        fill(banks, Slot(8, index), adapter(index))
    banks.clear(Slot(8, 1))
    banks.clear(Slot(8, 1))
    assert not banks.values(Slot(8, 1)).any()
    with pytest.raises(InvalidState, match="not filled"):
        banks.targets(Slot(8, 1))
    for index in (0, 2):
        assert torch.equal(adapter(index).values, banks.values(Slot(8, index)))
        assert frozenset(LINEARS) == banks.targets(Slot(8, index))


@pytest.mark.parametrize(
    ("slot", "lost"),
    [(Slot(8, 2), {Slot(16, 1)}), (Slot(16, 0), {Slot(8, 0), Slot(8, 1)}), (Slot(32, 1), set())],
)
def test_what_shares_a_page_with_a_new_filling_counts_no_more(slot: Slot, lost: set[Slot]) -> None:
    banks = new_banks(8)
    residents = [Slot(8, 0), Slot(8, 1), Slot(16, 1)]
    for resident in residents:
        fill(banks, resident, adapter(rank=resident.rank_class))
    banks.filling(slot, adapter(rank=slot.rank_class))
    for resident in residents:
        if resident in lost:
            with pytest.raises(InvalidState):
                banks.targets(resident)
        else:
            assert frozenset(LINEARS) == banks.targets(resident)


@pytest.mark.parametrize(
    "end",
    [
        lambda banks: banks.filling(Slot(16, 0), adapter(1, rank=16)),
        lambda banks: banks.filling(Slot(8, 1), adapter(1)),
        lambda banks: banks.clear(Slot(8, 1)),
    ],
    ids=["another class", "same slot", "cleared"],
)
def test_an_abandoned_filling_writes_no_more(end: Callable[[Banks], object]) -> None:
    banks = new_banks(2)
    filling = banks.filling(Slot(8, 1), adapter())
    filling.copy(100)
    end(banks)
    before = banks.values(Slot(8, 1)).clone()
    with pytest.raises(InvalidState, match="over"):
        filling.copy(10**6)
    torch.testing.assert_close(banks.values(Slot(8, 1)), before, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(InvalidState, match="not filled"):
        banks.targets(Slot(8, 1))


def test_a_filling_that_is_done_copies_no_more() -> None:
    banks = new_banks(1)
    filling = banks.filling(Slot(8, 0), adapter())
    assert filling.copy(10**6)
    with pytest.raises(InvalidState, match="over"):
        filling.copy(1)
    assert frozenset(LINEARS) == banks.targets(Slot(8, 0))


def test_slots_of_another_class_or_beyond_the_arena_are_refused() -> None:
    banks = new_banks(2)
    with pytest.raises(InvalidState, match="class 8"):
        banks.filling(Slot(16, 0), adapter())
    with pytest.raises(InvalidState, match="beyond"):
        banks.filling(Slot(8, 2), adapter())


GOOD = {"digest": "d" * 64, "rank": "8", "targets": json.dumps(["0.attn.q"]), "layout": "1"}
VALUES = torch.zeros(8 * LAYOUT.features, dtype=torch.bfloat16)


def test_a_prepared_file_is_mapped_with_what_it_says_of_itself(tmp_path: Path) -> None:
    save_file({"slot": VALUES + 1}, tmp_path / "file", metadata={**GOOD, "rank": "5"})
    prepared = map_prepared(tmp_path / "file", LINEARS)
    assert ("d" * 64, 8, {"0.attn.q"}) == (prepared.digest, prepared.rank_class, prepared.targets)
    assert torch.equal(VALUES + 1, prepared.values)
    assert VALUES.nbytes == prepared.num_bytes


@pytest.mark.parametrize(
    ("changes", "tensors", "problem"),
    [
        ({"layout": "0"}, {"slot": VALUES}, "version 0"),
        ({"rank": "16"}, {"slot": VALUES}, "shape"),
        ({"rank": "many"}, {"slot": VALUES}, "can't be read"),
        ({"targets": json.dumps(["0.attn.q", "lm_head"])}, {"slot": VALUES}, "lm_head"),
        ({"targets": "[]"}, {"slot": VALUES}, "nothing"),
        ({"targets": "[[]]"}, {"slot": VALUES}, "can't be read"),
        ({"targets": "{"}, {"slot": VALUES}, "can't be read"),
        ({}, {"slot": VALUES[1:]}, "shape"),
        ({}, {"slot": VALUES.view(8, -1)}, "shape"),
        ({}, {"slot": VALUES.to(torch.int16)}, "torch.int16"),
        ({}, {"other": VALUES}, "can't be read"),
    ],
)
def test_a_file_that_is_not_for_this_base_is_refused(
    tmp_path: Path, changes: dict[str, str], tensors: dict[str, torch.Tensor], problem: str
) -> None:
    save_file(tensors, tmp_path / "file", metadata={**GOOD, **changes})
    with pytest.raises(AdapterLoadFailed, match=problem):
        map_prepared(tmp_path / "file", LINEARS)


@pytest.mark.parametrize("change", [lambda raw: raw[:-1], lambda raw: b"", lambda raw: raw[:40]])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    save_file({"slot": VALUES}, tmp_path / "file", metadata=GOOD)
    (tmp_path / "file").write_bytes(change((tmp_path / "file").read_bytes()))
    with pytest.raises(AdapterLoadFailed, match="can't be read"):
        map_prepared(tmp_path / "file", LINEARS)


def test_a_file_that_is_not_there_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        map_prepared(tmp_path / "none", LINEARS)
