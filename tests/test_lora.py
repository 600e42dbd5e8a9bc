"""Each token gets its own adapter's addition, whatever shares the step with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_kit import (
    CPU,
    LAYOUT,
    LINEARS,
    Weights,
    added_by,
    fill,
    new_banks,
    prepared_of,
    random_weights,
)
from tunefleet.adapters_store.slot_layout import rank_class_of
from tunefleet.errors import InvalidState
from tunefleet.runtime.banks import Banks
from tunefleet.runtime.lora import (
    LoraLayer,
    LoraPlan,
    current_plan,
    lora_plan,
    plan_adapters,
    wrap_linears,
)
from tunefleet.runtime.lora_products import SHORT_TOKENS, TorchLora, compact_ranges, max_gap_of
from tunefleet.runtime.slots import Slot

NUM_PAGES = 48
TOGETHER = [  # paths that a layer adds at once
    *[(path,) for path in LINEARS],
    ("0.attn.q", "0.attn.k", "0.attn.v"),
    ("0.attn.v", "0.attn.q", "0.attn.k"),  # not in the layout's order
    ("0.attn.q", "0.attn.v"),  # not side by side
    ("0.attn.o", "0.mlp.up"),  # of two parents
]


class Resident(NamedTuple):
    slot: Slot
    weights: Weights


class Share(NamedTuple):
    """What one sequence has in a step."""

    adapter: int | None
    num_tokens: int


def resident(slot: Slot, seed: int, ranks: dict[str, int]) -> Resident:
    return Resident(slot, random_weights(seed, ranks))


@st.composite
def residents(draw: st.DrawFn) -> list[Resident]:
    """Adapters of mixed ranks on layers of their own choice, in scattered slots."""
    taken: set[int] = set()
    found = []
    for seed in range(draw(st.integers(1, 8))):
        ranks = draw(st.dictionaries(st.sampled_from(sorted(LINEARS)), st.integers(1, 64), min_size=1))
        rank_class = rank_class_of(max(ranks.values()))
        slot = Slot(rank_class, draw(st.integers(0, NUM_PAGES * 8 // rank_class - 1)))
        if taken.isdisjoint(slot.pages):
            taken.update(slot.pages)
            found.append(resident(slot, seed, ranks))
    return found


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[Resident], list[Share]]:
    adapters = draw(residents())
    adapter = st.one_of(st.none(), st.integers(0, len(adapters) - 1))
    num_tokens = st.sampled_from([1, 1, 1, 2, 9, SHORT_TOKENS, SHORT_TOKENS + 1])
    shares = draw(st.lists(st.builds(Share, adapter, num_tokens), min_size=1, max_size=16))
    crowd = [Share(draw(adapter), 1)] * draw(st.sampled_from([0, 0, 60]))
    return adapters, draw(st.permutations([*shares, *crowd]))


def filled(adapters: Sequence[Resident], dtype: torch.dtype = torch.float32) -> Banks:
    banks = new_banks(NUM_PAGES, dtype)
    for slot, weights in adapters:
        fill(banks, slot, prepared_of(weights))
    return banks


def plan_of(banks: Banks, adapters: Sequence[Resident], shares: Sequence[Share]) -> LoraPlan | None:
    tokens, first = [], 0
    for adapter, num_tokens in shares:
        if adapter is not None:
            tokens.append((adapters[adapter].slot, first, num_tokens))
        first += num_tokens
    return plan_adapters(tokens, banks, CPU)


def assert_each_token_has_its_own(
    adapters: Sequence[Resident],
    shares: Sequence[Share],
    paths: tuple[str, ...],
    dtype: torch.dtype = torch.float32,
    arena: torch.dtype = torch.float32,
    tolerance: float = 1e-5,
) -> None:
    plan = plan_of(filled(adapters, arena), adapters, shares)
    owners = [adapter for adapter, num_tokens in shares for _ in range(num_tokens)]
    generator = torch.Generator().manual_seed(len(owners))
    x = torch.randn(len(owners), LINEARS[paths[0]].in_features, generator=generator).to(dtype)
    y = torch.randn(len(owners), sum(LINEARS[p].out_features for p in paths), generator=generator).to(dtype)
    before = y.clone()
    if plan is not None:
        plan.add(paths, x, y)
    for token, owner in enumerate(owners):
        weights = None if owner is None else adapters[owner].weights
        if owner is None:
            assert torch.equal(before[token], y[token])
        expected = before[token].double() + added_by(weights, paths, x[token])
        worst = (expected - y[token].double()).abs().max() / expected.abs().max()
        assert float(worst) < tolerance


@given(steps(), st.sampled_from(TOGETHER))
@settings(max_examples=150, deadline=None)
def test_any_mix_of_slots_ranks_and_segments_equals_a_loop_over_tokens(
    step: tuple[list[Resident], list[Share]], paths: tuple[str, ...]
) -> None:
    """The other slots, those in the middle of a range too, hold NaN."""
    assert_each_token_has_its_own(*step, paths)


@given(steps(), st.sampled_from(TOGETHER), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=50, deadline=None)
def test_half_precision_is_that_of_the_base(
    step: tuple[list[Resident], list[Share]], paths: tuple[str, ...], arena: torch.dtype
) -> None:
    assert_each_token_has_its_own(*step, paths, torch.bfloat16, arena, tolerance=5e-2)


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 0, 3, 1, 3], [2] * 20, [0] * 9 + [1, 2, 3] * 40])
@pytest.mark.parametrize("slots", [[0, 1, 2, 3], [40, 3, 9, 0]])
def test_decodes_of_several_sequences_per_adapter_in_any_order(order: list[int], slots: list[int]) -> None:
    adapters = [resident(Slot(8, slot), slot, {"0.attn.q": 8, "0.attn.v": 3}) for slot in slots]
    shares = [Share(adapter, 1) for adapter in order]
    assert_each_token_has_its_own(adapters, shares, ("0.attn.q", "0.attn.k", "0.attn.v"))


def test_one_slot_with_far_more_decodes_than_the_others_doesnt_widen_theirs() -> None:
    adapters = [resident(Slot(8, slot), slot, {"0.attn.q": 8}) for slot in range(20)]
    shares = [Share(adapter, 1) for adapter in [*range(20), *[7] * 20]]
    tokens = [(adapters[share.adapter or 0].slot, row, 1) for row, share in enumerate(shares)]
    kernel = TorchLora(tokens, filled(adapters), CPU)
    assert [(group.slots, group.width) for group in kernel.ranges] == [((0, 20), 1), ((7, 1), 21)]
    assert_each_token_has_its_own(adapters, shares, ("0.attn.q",))


def test_a_token_without_adapter_is_left_bit_for_bit() -> None:
    adapters = [resident(Slot(8, 0), 0, {"0.attn.q": 8})]
    plan = plan_of(filled(adapters), adapters, [Share(None, 1), Share(0, 1), Share(None, 1), Share(0, 2)])
    assert plan is not None
    y = torch.randn(5, 12)
    before = y.clone()
    plan.add(("0.attn.q",), torch.randn(5, 12), y)
    assert [bool((y[t] == before[t]).all()) for t in range(5)] == [True, False, True, False, False]


def test_without_adapters_there_is_no_plan() -> None:
    assert plan_adapters([], new_banks(1), CPU) is None


def test_a_layer_that_no_adapter_of_the_step_targets_costs_nothing() -> None:
    calls: list[tuple[str, ...]] = []

    class Counting:
        def add(self, paths: tuple[str, ...], x: torch.Tensor, y: torch.Tensor) -> None:
            calls.append(paths)

    plan = LoraPlan(Counting(), frozenset({"q", "v"}))
    for paths in (("k",), ("q",), ("o", "k"), ("q", "k", "v")):
        plan.add(paths, torch.zeros(1, 1), torch.zeros(1, 1))
    assert calls == [("q",), ("q", "k", "v")]


def test_a_slot_that_is_not_wholly_filled_is_in_no_plan() -> None:
    banks = new_banks(2)
    banks.filling(Slot(8, 0), prepared_of(random_weights(0, {"0.attn.q": 8}))).copy(100)
    with pytest.raises(InvalidState, match="not filled"):
        plan_adapters([(Slot(8, 0), 0, 1)], banks, CPU)


@pytest.mark.parametrize("num_tokens", [1, 5, SHORT_TOKENS + 1])
def test_numbers_that_are_none_stay_with_their_own_adapters_tokens(num_tokens: int) -> None:
    adapters = [resident(Slot(8, index), index, {"0.attn.q": 8}) for index in range(3)]
    banks = filled(adapters)
    banks.values(Slot(8, 1)).fill_(float("nan"))
    plan = plan_of(banks, adapters, [Share(index, num_tokens) for index in range(3)])
    assert plan is not None
    y = torch.zeros(3 * num_tokens, 12)
    plan.add(("0.attn.q",), torch.randn(3 * num_tokens, 12), y)
    assert torch.isfinite(y).all(dim=1).view(3, -1).tolist() == [
        [True] * num_tokens,
        [False] * num_tokens,
        [True] * num_tokens,
    ]


def test_a_tokens_own_numbers_that_are_none_stay_with_it() -> None:
    adapters = [resident(Slot(8, index), index, {"0.attn.q": 8}) for index in (0, 2)]
    plan = plan_of(filled(adapters), adapters, [Share(0, 1), Share(1, 1), Share(1, 1)])
    assert plan is not None
    x, y = torch.randn(3, 12), torch.zeros(3, 12)
    x[0] = float("nan")
    plan.add(("0.attn.q",), x, y)
    assert torch.isfinite(y).all(dim=1).tolist() == [False, True, True]


@pytest.mark.parametrize(
    ("slots", "ranges"),
    [
        ([4], [range(4, 5)]),
        ([0, 1, 2], [range(0, 3)]),
        ([0, 3], [range(0, 4)]),  # two unused ones between
        ([0, 4], [range(0, 1), range(4, 5)]),
        ([1, 2, 5, 9, 10, 20], [range(1, 6), range(9, 11), range(20, 21)]),
    ],
)
def test_ranges_cover_the_slots_and_skip_wide_gaps(slots: list[int], ranges: list[range]) -> None:
    assert ranges == list(compact_ranges(slots, max_gap=2))


def test_the_larger_the_slots_the_smaller_the_gaps_that_are_read() -> None:
    gaps = [max_gap_of(LAYOUT, rank, torch.float32, CPU) for rank in (8, 16, 64)]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > max_gap_of(LAYOUT, 1 << 20, torch.float32, CPU) == 0
    assert gaps[0] < max_gap_of(LAYOUT, 8, torch.float32, torch.device("cuda"))


def test_a_wrapped_layer_adds_the_plans_adapters_and_else_is_its_base() -> None:
    model = torch.nn.Module()
    model.q = torch.nn.Linear(12, 12)
    base = model.q
    wrap_linears(model, {"q": LINEARS["0.attn.q"]})
    assert isinstance(model.q, LoraLayer)
    model.q = LoraLayer(base, "0.attn.q")
    adapters = [resident(Slot(8, 0), 0, {"0.attn.q": 4})]
    plan = plan_of(filled(adapters), adapters, [Share(0, 1), Share(None, 1), Share(0, 1)])
    x = torch.randn(1, 3, 12)
    with torch.inference_mode():
        plain = base(x)
        assert torch.equal(plain, model.q(x))
        assert current_plan() is None
        with lora_plan(plan):
            assert current_plan() is plan
            mixed = model.q(x)
        assert torch.equal(plain, model.q(x))
    for token, weights in enumerate([adapters[0].weights, None, adapters[0].weights]):
        expected = plain[0, token].double() + added_by(weights, ["0.attn.q"], x[0, token])
        torch.testing.assert_close(mixed[0, token].double(), expected, atol=1e-5, rtol=1e-5)
