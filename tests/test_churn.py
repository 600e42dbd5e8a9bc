"""Everybody's tokens are their own adapter's through random lives of an engine under pressure.

Eight times as many adapters as slots, too little KV, prompts in chunks, uploads, deletions, cancels, loads
that come late or fail. ``TUNEFLEET_CHURN_SEED=n`` lives one life again.
"""

from __future__ import annotations

import random

import pytest

from asking import User, make_users
from churn import COMMON_EVENTS, EVENTS, Life, replayable
from engine_kit import Stage, greedy, make_stage, random_prompt
from test_engine import SHAPES
from tunefleet.core import SamplingParams
from tunefleet.messages import Submit

NUM_SLOTS = 4
SURE = ("chunked prompts", "preemptions", "prefix hits", "evictions", "deletions", "rewrites", "mixed steps")
TIGHT = {
    "max_num_seqs": 8,
    "max_model_len": 256,
    "max_batch_tokens": 48,
    "max_active_adapters": NUM_SLOTS,
    "device_adapter_bytes": 12 * 49_152,  # pages of rank 8: the adapter of rank 64 takes eight
    "kv_cache_bytes": 2000 * 384,  # tokens
}


@pytest.fixture(scope="module")
def town(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return make_stage(tmp_path_factory.mktemp("town"), SHAPES, 8 * NUM_SLOTS)


@pytest.fixture(autouse=True)
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """An adapter takes several steps to its slot, as a large one does."""
    monkeypatch.setattr("tunefleet.runtime.engine.SLICE_BYTES", 32_768)


def new_life(town: Stage, seed: int, *, failing_loads: float = 0.02) -> Life:
    return Life(
        town.engine(**TIGHT),
        town.manifest,
        make_users(town.adapters),
        town.adapters,
        seed=seed,
        kv_cache_bytes=TIGHT["kv_cache_bytes"],
        failing_loads=failing_loads,
    )


def test_everybodys_tokens_are_their_own_adapters_whatever_happens(town: Stage) -> None:
    with replayable(4) as seed:
        life = new_life(town, seed)
        life.live(150)
        life.verify(town.oracle)
        life.check_met(COMMON_EVENTS)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_long_life_meets_everything_that_can_happen(
    town: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    with replayable(47724) as seed:
        life = new_life(town, seed)
        life.live(2000)
        with capsys.disabled():
            print("\n" + life.told())
        life.verify(town.oracle)
        life.check_met(EVENTS)
        assert life.tally["prefix hits"] > 100


def test_a_life_lived_again_is_the_same(town: Stage) -> None:
    lives = [new_life(town, 5), new_life(town, 5)]
    for life in lives:
        life.live(50)
    first, second = lives
    assert first.tally == second.tally
    assert [asked.tokens for asked in first.asked] == [asked.tokens for asked in second.asked]


def test_a_sampled_request_alone_in_a_new_engine_gives_the_same_tokens(town: Stage) -> None:
    life = new_life(town, 6)
    life.live(80)
    sampled = [
        asked for asked in life.asked if asked.work.sampling.temperature and len(asked.answer.tokens) > 4
    ]
    assert len(sampled) >= 8
    for asked in sampled[:8]:
        driver = town.driver(**TIGHT)
        alone = driver.submit(asked.work)
        driver.finish()
        assert asked.answer.tokens == alone.tokens[: len(asked.answer.tokens)]


def test_tokens_under_churn_are_those_of_two_quiet_phases(town: Stage) -> None:
    """The practice of those who found the wrong adapter answering in vLLM (issue 47724)."""
    life = new_life(town, 8, failing_loads=0.0)
    guests = [User("guests", f"guest-{n}", adapter) for n, adapter in enumerate([*town.adapters[:9], None])]
    first, second, churned = (_phase(life, guests, churning=churning) for churning in (False, False, True))
    assert first == second
    assert first == churned
    assert life.tally["evictions"] > 2 * len(guests)
    life.verify(town.oracle)


def _phase(life: Life, guests: list[User], *, churning: bool) -> list[list[int]]:
    """The same requests each time; the answers."""
    generator = random.Random(7)
    asked = []
    for user in guests * 2:
        asked.append(life.ask(_work(user, generator, f"guest-{len(life.asked)}"), user))
        for _ in range(12 * churning):
            life.tick()
    life.finish()
    return [each.answer.tokens for each in asked]


def _work(user: User, generator: random.Random, request_id: str) -> Submit:
    draws = generator.random() < 0.3
    sampling = SamplingParams(max_tokens=24, temperature=0.8, seed=generator.getrandbits(32), ignore_eos=True)
    return Submit(
        request_id=request_id,
        prompt=random_prompt(generator, generator.randint(4, 120)),
        sampling=sampling if draws else greedy(24),
        adapter=user.adapter.ref if user.adapter else None,
        tenant=user.tenant,
        user_id=user.user_id,
    )
