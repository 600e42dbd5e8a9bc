"""Sampling: what may be chosen, how often, and that nothing but seed, index and logits matters."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tunefleet.core import SamplingParams
from tunefleet.messages import TokenLogprob
from tunefleet.runtime.sampling import MIN_LOGPROB, Sampled, sample, uniform

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
    SamplingParams(max_tokens=1, temperature=1.0, min_p=0.1),
    SamplingParams(max_tokens=1, temperature=2.0, min_p=0.5),
    SamplingParams(max_tokens=1, temperature=1.0, min_p=1.0),
    SamplingParams(max_tokens=1, temperature=1.3, top_k=12, top_p=0.8, min_p=0.2),
]
LARGE = 5000  # tokens: not all of them are looked at


def reference(logits: torch.Tensor, params: SamplingParams) -> dict[int, float]:
    """One row's probabilities by a full sort: temperature, top_k, the fewest that reach top_p, min_p."""
    scaled = (logits.double() / params.temperature).tolist()
    order = sorted(range(len(scaled)), key=lambda token: -scaled[token])[: params.top_k or len(scaled)]
    probs = torch.softmax(torch.tensor([scaled[token] for token in order], dtype=torch.float64), 0).tolist()
    kept: dict[int, float] = {}
    for token, prob in zip(order, probs, strict=True):
        if (params.top_p < 1 and sum(kept.values()) >= params.top_p) or prob < params.min_p * probs[0]:
            break
        kept[token] = prob
    total = sum(kept.values())
    return {token: prob / total for token, prob in kept.items()}


def random_logits(rows: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def with_seed(params: SamplingParams, seed: int) -> SamplingParams:
    return msgspec.structs.replace(params, seed=seed)


def inverted(kept: dict[int, float], number: float) -> set[int]:
    """The token at ``number`` of the running sum; both neighbours where fp32 can't tell them apart."""
    ends = dict(zip(kept, itertools.accumulate(kept.values()), strict=True))
    starts = {token: ends[token] - kept[token] for token in kept}
    return {token for token in kept if starts[token] - 1e-5 <= number <= ends[token] + 1e-5}


@pytest.mark.parametrize("params", PARAMS, ids=lambda p: f"t{p.temperature}-p{p.top_p}-k{p.top_k}-m{p.min_p}")
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


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_a_row_of_a_large_vocabulary_is_the_same_alone_and_in_any_batch(data: st.DataObject) -> None:
    rows = data.draw(st.integers(2, 20))
    logits = random_logits(rows, data.draw(st.integers(0, 1000)), LARGE) * data.draw(
        st.sampled_from([0.1, 1, 3])
    )
    if data.draw(st.booleans()):
        logits = logits.bfloat16()
    params = [
        SamplingParams(
            max_tokens=1,
            temperature=data.draw(st.sampled_from([0.0, 0.7, 1.0, 2.0])),
            top_k=data.draw(st.sampled_from([0, 1, 50, 300, 4500])),
            top_p=data.draw(st.sampled_from([0.3, 0.95, 0.9999, 1.0])),
            min_p=data.draw(st.sampled_from([0.0, 0.05])),
            logprobs=data.draw(st.sampled_from([None, 0, 3, 20])),
            seed=data.draw(st.integers(0, 2**63 - 1)),
        )
        for _ in range(rows)
    ]
    indexes = [data.draw(st.integers(0, 4000)) for _ in range(rows)]
    together = sample(logits, params, indexes)
    for row in range(rows):
        alone = sample(logits[[row]], [params[row]], [indexes[row]])
        assert tuple([column[row]] for column in together) == alone


@pytest.mark.parametrize("scale", [0.2, 1.0, 4.0])
@pytest.mark.parametrize("equals", [False, True])
def test_what_is_not_sorted_is_chosen_as_a_full_sort_would(scale: float, equals: bool) -> None:
    """Flat rows need all tokens, steep ones a few; rounded ones are full of equals, in and out of reach."""
    logits = random_logits(len(PARAMS), seed=5, vocab=LARGE) * scale
    if equals:
        logits = (logits * 2).round() / 2
    kept = [reference(row, params) for row, params in zip(logits, PARAMS, strict=True)]
    free = [params.top_k == 0 and params.top_p == 1 and params.min_p == 0 for params in PARAMS]
    kept = [dict(sorted(row.items())) if is_free else row for row, is_free in zip(kept, free, strict=True)]
    for seed in range(40):
        tokens = sample(logits, [with_seed(params, seed) for params in PARAMS], [seed] * len(PARAMS)).tokens
        for token, row in zip(tokens, kept, strict=True):
            assert token in inverted(row, uniform(seed, seed))


def test_mixed_rows_each_keep_to_their_own_reference() -> None:
    logits = random_logits(len(PARAMS), seed=2)
    allowed = [set(reference(row, params)) for row, params in zip(logits, PARAMS, strict=True)]
    for seed in range(200):
        tokens = sample(logits, [with_seed(params, seed) for params in PARAMS], [seed] * len(PARAMS)).tokens
        assert all(token in tokens_allowed for token, tokens_allowed in zip(tokens, allowed, strict=True))


def test_greedy_takes_the_first_of_equal_tokens() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    assert Sampled([1, 0], [True, True], [None, None]) == sample(
        logits, [SamplingParams(max_tokens=1)] * 2, [0, 0]
    )


@pytest.mark.parametrize("vocab", [1, 511, 1024, 1025, 1535, 49152])
def test_greedy_is_the_first_best_token_of_any_vocabulary(vocab: int) -> None:
    logits = random_logits(40, seed=vocab, vocab=vocab).bfloat16()  # a large one has equals at the top
    logits[0] = 0.0
    logits[1, -1] = 100.0
    expected = [row.index(max(row)) for row in logits.tolist()]
    assert expected == sample(logits, [SamplingParams(max_tokens=1)] * 40, [0] * 40).tokens


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


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 511, 512, 1030, 1099])
def test_one_bad_number_anywhere_is_told(bad: float, at: int) -> None:
    """NaN beats every maximum, whatever else is in the row."""
    logits = random_logits(3, vocab=1100).bfloat16()
    logits[1, at] = bad
    logits[1, 3 if at != 3 else 4] = 1e30
    params = [SamplingParams(max_tokens=1, temperature=t, top_p=0.9, logprobs=2) for t in (0.0, 1.0, 1.0)]
    result = sample(logits, params, [0, 0, 0])
    assert result.finite == [True, False, True]
    assert result.logprobs[1] is None
    assert sample(torch.full((1, 4), float("-inf")), params[:1], [0]).finite == [False]


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
    assert Sampled(logits.argmax(-1).tolist(), [True] * 5, [None] * 5) == sample(logits, params, [0] * 5)


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_logprobs_are_those_of_the_logits_as_they_are(temperature: float) -> None:
    logits = random_logits(4, seed=9)
    asked = [None, 0, 3, 20]
    params = [
        SamplingParams(max_tokens=1, temperature=temperature, top_k=5, seed=row, logprobs=num_top)
        for row, num_top in enumerate(asked)
    ]
    tokens, _, logprobs = sample(logits, params, [0] * 4)
    assert logprobs[0] is None
    for row, num_top in enumerate(asked):
        found, expected = logprobs[row], torch.log_softmax(logits[row].double(), 0)
        if num_top is None or found is None:
            continue
        assert abs(found.logprob - float(expected[tokens[row]])) < 1e-5
        assert [token for token, _ in found.top] == expected.argsort(descending=True)[:num_top].tolist()
        assert all(abs(logprob - float(expected[token])) < 1e-5 for token, logprob in found.top)


def test_the_greedy_token_leads_its_alternatives_even_among_equals() -> None:
    logits = torch.zeros(1, 1000)
    logits[0, 300:340] = 1.0
    found = sample(logits, [SamplingParams(max_tokens=1, logprobs=1)], [0])
    assert found.tokens == [300]
    assert found.logprobs[0] is not None
    assert [token for token, _ in found.logprobs[0].top] == [300]


def test_the_logprob_of_a_token_that_cannot_be_is_a_number() -> None:
    logits = torch.tensor([[0.0, float("-inf")]])
    found = sample(logits, [SamplingParams(max_tokens=1, logprobs=2)], [0])
    assert found.logprobs == [TokenLogprob(0.0, ((0, 0.0), (1, MIN_LOGPROB)))]


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
