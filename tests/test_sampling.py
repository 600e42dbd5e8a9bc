"""Sampling: what may be chosen, how often, and that nothing but seed, index and logits matters."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from tunefleet.core import SamplingParams
from tunefleet.runtime.sampling import Sampled, sample, uniform

VOCAB = 40
PARAMS = [
    SamplingParams(max_tokens=1, temperature=1.0),
    SamplingParams(max_tokens=1, temperature=0.3),
    SamplingParams(max_tokens=1, temperature=2.0, top_k=5),
    SamplingParams(max_tokens=1, temperature=1.0, top_p=0.7),
    SamplingParams(max_tokens=1, temperature=1.5, top_p=0.9, top_k=7),
    SamplingParams(max_tokens=1, temperature=0.8, top_k=1),
    SamplingParams(max_tokens=1, temperature=1.0, top_p=0.01),
    SamplingParams(max_tokens=1, temperature=1.0, top_k=1_000_000),
]


def reference(logits: torch.Tensor, params: SamplingParams) -> dict[int, float]:
    """One row's probabilities: temperature, then top_k, then the fewest tokens that reach top_p."""
    scaled = (logits.double() / params.temperature).tolist()
    order = sorted(range(len(scaled)), key=lambda token: -scaled[token])[: params.top_k or len(scaled)]
    probs = torch.softmax(torch.tensor([scaled[token] for token in order], dtype=torch.float64), 0).tolist()
    kept: dict[int, float] = {}
    for token, prob in zip(order, probs, strict=True):
        if sum(kept.values()) >= params.top_p:
            break
        kept[token] = prob
    total = sum(kept.values())
    return {token: prob / total for token, prob in kept.items()}


def random_logits(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 2


def with_seed(params: SamplingParams, seed: int) -> SamplingParams:
    return SamplingParams(
        max_tokens=1, temperature=params.temperature, top_p=params.top_p, top_k=params.top_k, seed=seed
    )


@pytest.mark.parametrize("params", PARAMS, ids=lambda p: f"t{p.temperature}-p{p.top_p}-k{p.top_k}")
def test_tokens_come_as_often_as_the_reference_says_and_no_others(params: SamplingParams) -> None:
    """4000 draws: five standard deviations of a frequency are at most 0.04; seeds are fixed."""
    num_draws = 4000
    logits = random_logits(1)
    expected = reference(logits[0], params)
    draws = sample(
        logits.expand(num_draws, -1), [with_seed(params, s) for s in range(num_draws)], [0] * num_draws
    )
    counts = Counter(draws.tokens)
    assert set(counts) <= set(expected)
    assert all(abs(counts[token] / num_draws - prob) < 0.04 for token, prob in expected.items())


def test_the_index_of_a_token_draws_anew() -> None:
    """One seed over 4000 indexes follows the distribution too."""
    num_draws = 4000
    logits = random_logits(1)
    expected = reference(logits[0], PARAMS[0])
    counts = Counter(
        sample(logits.expand(num_draws, -1), [PARAMS[0]] * num_draws, list(range(num_draws))).tokens
    )
    assert all(abs(counts[token] / num_draws - prob) < 0.04 for token, prob in expected.items())


def test_a_token_depends_on_nothing_else_in_the_batch() -> None:
    generator = random.Random(3)
    logits = random_logits(24, seed=1)
    params = [with_seed(PARAMS[row % len(PARAMS)], row) for row in range(22)]
    params += [SamplingParams(max_tokens=1), SamplingParams(max_tokens=1)]
    indexes = [generator.randrange(100) for _ in params]
    alone = [sample(logits[[row]], [params[row]], [indexes[row]]).tokens[0] for row in range(24)]
    for _ in range(10):
        rows = generator.sample(range(24), generator.randrange(1, 25))
        together = sample(logits[rows], [params[row] for row in rows], [indexes[row] for row in rows])
        assert [alone[row] for row in rows] == together.tokens


def test_mixed_rows_each_keep_to_their_own_reference() -> None:
    logits = random_logits(len(PARAMS), seed=2)
    allowed = [set(reference(row, params)) for row, params in zip(logits, PARAMS, strict=True)]
    for seed in range(200):
        tokens = sample(logits, [with_seed(params, seed) for params in PARAMS], [seed] * len(PARAMS)).tokens
        assert all(token in tokens_allowed for token, tokens_allowed in zip(tokens, allowed, strict=True))


def test_greedy_takes_the_first_of_equal_tokens() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    assert Sampled([1, 0], [True, True]) == sample(logits, [SamplingParams(max_tokens=1)] * 2, [0, 0])


def test_equal_tokens_beyond_top_k_are_never_chosen() -> None:
    logits = torch.zeros(500, 6)
    params = [SamplingParams(max_tokens=1, temperature=1.0, top_k=2, seed=seed) for seed in range(500)]
    assert {0, 1} == set(sample(logits, params, [0] * 500).tokens)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_numbers_is_told_and_hurts_nobody(bad: float, temperature: float) -> None:
    logits = random_logits(3)
    params = [SamplingParams(max_tokens=1, temperature=temperature, seed=seed) for seed in range(3)]
    expected = sample(logits, params, [0, 0, 0]).tokens
    logits[1, 5] = bad
    result = sample(logits, params, [0, 0, 0])
    assert result.finite == [True, False, True]
    assert (expected[0], expected[2]) == (result.tokens[0], result.tokens[2])
    assert sample(torch.full((1, 4), bad), params[:1], [0]).finite == [False]


def test_forbidden_tokens_of_minus_infinity_are_no_fault() -> None:
    logits = torch.full((300, VOCAB), float("-inf"))
    logits[:, 7] = 1.0
    logits[:, 9] = 1.0
    params = [SamplingParams(max_tokens=1, temperature=1.0, seed=seed) for seed in range(300)]
    result = sample(logits, params, [0] * 300)
    assert {7, 9} == set(result.tokens)
    assert all(result.finite)


@pytest.mark.parametrize(("temperature", "top_p"), [(1e-9, 1.0), (1e-50, 1.0), (1.0, 1e-50), (1e-50, 1e-50)])
def test_a_temperature_or_top_p_near_zero_is_greedy(temperature: float, top_p: float) -> None:
    logits = random_logits(5) * 20
    params = [
        SamplingParams(max_tokens=1, temperature=temperature, top_p=top_p, seed=seed) for seed in range(5)
    ]
    assert Sampled(logits.argmax(-1).tolist(), [True] * 5) == sample(logits, params, [0] * 5)


def test_bf16_logits_are_sampled_in_fp32() -> None:
    logits = random_logits(8).bfloat16()
    params = [with_seed(PARAMS[3], seed) for seed in range(8)]
    assert sample(logits.float(), params, [4] * 8) == sample(logits, params, [4] * 8)


def test_uniform_is_splitmix64_of_seed_then_index() -> None:
    """SplitMix64's published first output for state 0; as an index it brings the second state back to 0."""
    first = 0xE220A8397B1DCDAF
    assert (first >> 11) / (1 << 53) == uniform(0, first)
    assert uniform(1, 2) != uniform(2, 1)
    assert uniform((1 << 64) - 1, 0) == uniform(-1, 0)


def test_uniform_stays_below_one_and_spreads_evenly() -> None:
    numbers = [uniform(seed, index) for seed in range(100) for index in range(100)]
    assert all(0 <= number < 1 for number in numbers)
    assert len(numbers) == len(set(numbers))
    tenths = Counter(int(number * 10) for number in numbers)
    assert all(850 < tenths[tenth] < 1150 for tenth in range(10))
