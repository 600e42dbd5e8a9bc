"""Stacked LoRA: each token gets its own adapter's addition, whatever shares the step."""

from __future__ import annotations

import random
from typing import NamedTuple

import pytest
import torch

from tunefleet.core import LinearSpec
from tunefleet.runtime.lora import (
    Banks,
    LoraLayer,
    LoraPlan,
    _compact_ranges,
    lora_plan,
    plan_adapters,
    wrap_linears,
)
from tunefleet.runtime.slots import Slot, rank_class_of

LINEARS = {"q": LinearSpec(12, 10), "down": LinearSpec(20, 12), "up": LinearSpec(12, 20)}
CPU = torch.device("cpu")
Weights = dict[str, tuple[torch.Tensor, torch.Tensor]]


class Filled(NamedTuple):
    slot: Slot
    weights: Weights


def random_weights(generator: torch.Generator, rank: int, paths: list[str]) -> Weights:
    """Per layer ``A [r, in]`` and ``B [r, out]``; ranks differ per layer, up to ``rank``."""
    weights = {}
    for number, path in enumerate(paths):
        r = max(1, rank - number)
        spec = LINEARS[path]
        weights[path] = (
            torch.randn(r, spec.in_features, generator=generator),
            torch.randn(r, spec.out_features, generator=generator),
        )
    return weights


def fill_randomly(banks: Banks, seed: int) -> list[Filled]:
    """Adapters of three rank classes in scattered slots, with layers of their own choice."""
    generator, choice = torch.Generator().manual_seed(seed), random.Random(seed)
    filled = []
    for rank_class in (8, 16, 64):
        for index in choice.sample(range(14), choice.randrange(1, 7)):
            rank = choice.randrange(1 if rank_class == 8 else rank_class // 2 + 1, rank_class + 1)
            paths = choice.sample(sorted(LINEARS), choice.randrange(1, 4))
            weights = random_weights(generator, rank, paths)
            slot = Slot(rank_class_of(rank), index)
            banks.fill(slot, weights)
            filled.append(Filled(slot, weights))
    return filled


def naive(path: str, x: torch.Tensor, y: torch.Tensor, owners: list[Weights | None]) -> torch.Tensor:
    """Token by token, in fp64."""
    answer = y.double().clone()
    for token, weights in enumerate(owners):
        if weights is not None and path in weights:
            a, b = weights[path]
            answer[token] += b.double().T @ (a.double() @ x[token].double())
    return answer


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(
    ("slots_dtype", "dtype", "tolerance"),
    [
        (torch.float32, torch.float32, 1e-5),
        (torch.float32, torch.bfloat16, 2e-2),
        (torch.bfloat16, torch.bfloat16, 4e-2),
    ],
)
def test_any_mix_of_slots_ranks_and_segments_equals_a_loop_over_tokens(
    seed: int, slots_dtype: torch.dtype, dtype: torch.dtype, tolerance: float
) -> None:
    banks = Banks(LINEARS, slots_dtype, CPU)
    filled = fill_randomly(banks, seed)
    choice = random.Random(seed)
    tokens: list[tuple[Slot, int, int]] = []
    owners: list[Weights | None] = []
    for _ in range(choice.randrange(1, 25)):
        adapter = choice.choice([*filled, None, None])
        num_tokens = choice.choice([1, 1, 1, 1, 2, 9])
        if adapter is not None:
            tokens.append((adapter.slot, len(owners), num_tokens))
        owners += [adapter.weights if adapter else None] * num_tokens
    plan = plan_adapters(tokens, banks, CPU) or LoraPlan((), ())
    generator = torch.Generator().manual_seed(seed)
    for path, spec in LINEARS.items():
        x = torch.randn(len(owners), spec.in_features, generator=generator).to(dtype)
        y = torch.randn(len(owners), spec.out_features, generator=generator).to(dtype)
        expected = naive(path, x, y, owners)
        plan.add(path, x, y)
        worst = (expected - y.double()).abs().max() / expected.abs().max()
        assert float(worst) < tolerance


def test_several_sequences_of_one_adapter_and_gaps_between_slots() -> None:
    """Slots 0, 3 and 9 with two, one and three tokens, out of order: ranges of unequal width."""
    banks = Banks(LINEARS, torch.float32, CPU)
    weights = {
        index: random_weights(torch.Generator().manual_seed(index), 8, ["q"]) for index in (0, 1, 3, 9)
    }
    for index, item in weights.items():
        banks.fill(Slot(8, index), item)
    order = [9, 0, 3, 9, 0, 9]
    plan = plan_adapters([(Slot(8, index), place, 1) for place, index in enumerate(order)], banks, CPU)
    assert plan is not None
    x, y = torch.randn(6, 12), torch.zeros(6, 10)
    expected = naive("q", x, y, [weights[index] for index in order])
    plan.add("q", x, y)
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)


def test_a_token_without_adapter_is_left_bit_for_bit() -> None:
    banks = Banks(LINEARS, torch.float32, CPU)
    banks.fill(Slot(8, 0), random_weights(torch.Generator().manual_seed(0), 8, ["q"]))
    plan = plan_adapters([(Slot(8, 0), 1, 1), (Slot(8, 0), 3, 2)], banks, CPU)
    assert plan is not None
    y = torch.randn(6, 10)
    before = y.clone()
    plan.add("q", torch.randn(6, 12), y)
    assert [bool((y[t] == before[t]).all()) for t in range(6)] == [True, False, True, False, False, True]


def test_without_adapters_there_is_no_plan() -> None:
    assert plan_adapters([], Banks(LINEARS, torch.float32, CPU), CPU) is None


def test_numbers_that_are_none_stay_with_their_own_adapters_tokens() -> None:
    """Also where the poisoned slot lies in the middle of a range and has no token in the step."""
    banks = Banks(LINEARS, torch.float32, CPU)
    for index in range(3):
        banks.fill(Slot(8, index), random_weights(torch.Generator().manual_seed(index), 8, ["q"]))
    for stack in banks.of(8).stack("q"):
        stack[1] = float("nan")
    for tokens, finite in (
        ([(Slot(8, 0), 0, 1), (Slot(8, 2), 1, 1)], [True, True]),
        ([(Slot(8, 0), 0, 1), (Slot(8, 1), 1, 1)], [True, False]),
    ):
        plan = plan_adapters(tokens, banks, CPU)
        assert plan is not None
        y = torch.zeros(2, 10)
        plan.add("q", torch.randn(2, 12), y)
        assert finite == torch.isfinite(y).all(dim=1).tolist()


def test_a_slot_that_is_filled_again_holds_nothing_of_what_it_held() -> None:
    """Wide and everywhere first, then narrow and in one layer."""
    banks = Banks(LINEARS, torch.float32, CPU)
    slot = Slot(8, 0)
    banks.fill(slot, random_weights(torch.Generator().manual_seed(0), 8, ["q", "up", "down"]))
    narrow = random_weights(torch.Generator().manual_seed(1), 2, ["q"])
    banks.fill(slot, narrow)
    a, b = banks.of(8).stack("q")
    assert torch.equal(a[0, :2], narrow["q"][0])
    assert torch.equal(b[0, :2], narrow["q"][1])
    assert not any(stack[0, 2:].any() for stack in (a, b))
    assert not any(stack[0].any() for path in ("up", "down") for stack in banks.of(8).stack(path))
    assert frozenset({"q"}) == banks.of(8).targets[0]


def test_an_emptied_slot_is_zeros_and_emptying_it_twice_is_fine() -> None:
    banks = Banks(LINEARS, torch.float32, CPU)
    for index in range(2):
        banks.fill(Slot(8, index), random_weights(torch.Generator().manual_seed(index), 8, ["q"]))
    kept = banks.of(8).stack("q")[0][1].clone()
    banks.empty(Slot(8, 0))
    banks.empty(Slot(8, 0))
    assert not any(stack[0].any() for stack in banks.of(8).stack("q"))
    assert torch.equal(kept, banks.of(8).stack("q")[0][1])


def test_growing_banks_keep_what_is_in_their_slots() -> None:
    banks = Banks(LINEARS, torch.float32, CPU)
    weights = [random_weights(torch.Generator().manual_seed(index), 8, ["q"]) for index in range(9)]
    for index, item in enumerate(weights):
        banks.fill(Slot(8, index), item)
    a, b = banks.of(8).stack("q")
    assert all(torch.equal(a[index], item["q"][0]) for index, item in enumerate(weights))
    assert all(torch.equal(b[index], item["q"][1]) for index, item in enumerate(weights))
    assert not a[9:].any()


def test_a_layer_first_targeted_late_has_a_place_for_every_slot() -> None:
    banks = Banks(LINEARS, torch.float32, CPU)
    banks.fill(Slot(8, 5), random_weights(torch.Generator().manual_seed(0), 8, ["q"]))
    banks.fill(Slot(8, 0), random_weights(torch.Generator().manual_seed(1), 8, ["up"]))
    assert banks.of(8).stack("up")[0].shape[0] == banks.of(8).stack("q")[0].shape[0]


def test_a_slots_bytes_are_those_of_an_adapter_on_every_layer() -> None:
    features = sum(spec.in_features + spec.out_features for spec in LINEARS.values())
    assert features * 16 * 4 == Banks(LINEARS, torch.float32, CPU).slot_bytes(16)
    assert features * 16 * 2 == Banks(LINEARS, torch.bfloat16, CPU).slot_bytes(16)


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
    assert ranges == list(_compact_ranges(slots))


def test_a_wrapped_layer_adds_the_plans_adapters_and_else_is_its_base() -> None:
    model = torch.nn.Module()
    model.q = torch.nn.Linear(12, 10)
    base = model.q
    wrap_linears(model, {"q": LINEARS["q"]})
    assert isinstance(model.q, LoraLayer)
    banks = Banks(LINEARS, torch.float32, CPU)
    weights = random_weights(torch.Generator().manual_seed(0), 4, ["q"])
    banks.fill(Slot(8, 0), weights)
    x = torch.randn(1, 3, 12)
    with torch.inference_mode():
        plain = base(x)
        assert torch.equal(plain, model.q(x))
        with lora_plan(plan_adapters([(Slot(8, 0), 0, 1), (Slot(8, 0), 2, 1)], banks, CPU)):
            mixed = model.q(x)
        assert torch.equal(plain, model.q(x))
    expected = naive("q", x[0], plain[0], [weights, None, weights])
    torch.testing.assert_close(mixed[0].double(), expected, atol=1e-5, rtol=1e-5)
