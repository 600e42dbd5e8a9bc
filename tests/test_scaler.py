"""The scaler: enough replicas at once, fewer only when fewer were enough for long enough."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from traffic import TRAFFIC, Arrival, Moment, Reactive, Report, Simulation
from tunefleet.runtime.scaler import Limits, Load, ScalerState, decide

LIMITS = Limits(
    min_replicas=0, max_replicas=4, target_concurrency=8, idle_timeout_s=10.0, scale_down_delay_s=10.0
)
limits = st.builds(
    lambda least, more, **given: Limits(min_replicas=least, max_replicas=max(1, least + more), **given),
    least=st.integers(0, 3),
    more=st.integers(0, 5),
    target_concurrency=st.integers(1, 8),
    idle_timeout_s=st.sampled_from([0.0, 0.5, 3.0, 10.0, 30.0]),
    scale_down_delay_s=st.sampled_from([0.0, 0.5, 3.0, 10.0, 30.0]),
)


def wanted_over(observations: Iterable[tuple[float, int]], limits: Limits) -> list[int]:
    """What is wanted at each of the moments, by somebody who does as the scaler says."""
    state, num_replicas, answers = ScalerState(), 0, []
    for at, num_requests in observations:
        state, num_replicas, _ = decide(state, Load(num_requests, num_replicas), at, limits)
        answers.append(num_replicas)
    return answers


@pytest.mark.parametrize(
    ("observations", "wanted"),
    [
        ([(0, 0)], [0]),
        ([(0, 1), (1, 8), (2, 9)], [1, 1, 2]),
        ([(0, 100)], [4]),  # no more than max_replicas
        ([(0, 25), (1, 1), (10.9, 1), (11, 1)], [4, 4, 4, 1]),  # one stays busy, the others don't wait for it
        ([(0, 25), (1, 1), (5, 17), (6, 1), (11, 1), (15.9, 1), (16, 1)], [4, 4, 4, 4, 3, 3, 1]),
        ([(0, 1), (5, 0), (14.9, 0), (15, 0)], [1, 1, 1, 0]),
        ([(0, 25), (5, 0), (15, 0)], [4, 4, 0]),
        ([(0, 1), (100, 1), (200, 0), (209, 0), (210, 0)], [1, 1, 1, 1, 0]),  # a long stream is no idle time
    ],
)
def test_replicas_follow_the_load(observations: list[tuple[float, int]], wanted: list[int]) -> None:
    assert wanted == wanted_over(observations, LIMITS)


def test_idle_ones_go_after_the_delay_and_the_last_one_after_the_idle_timeout() -> None:
    limits = LIMITS._replace(idle_timeout_s=60.0)
    assert wanted_over([(0, 100), (5, 0), (15, 0), (64.9, 0), (65, 0)], limits) == [4, 4, 1, 1, 0]


def test_zero_may_come_before_the_delay() -> None:
    limits = LIMITS._replace(idle_timeout_s=1.0)
    assert wanted_over([(0, 100), (5, 0), (6, 0), (6.5, 1)], limits) == [4, 4, 0, 1]


def test_min_replicas_never_scale() -> None:
    limits = LIMITS._replace(min_replicas=1, max_replicas=1)
    decision = decide(ScalerState(), Load(0, 0), 0.0, limits)
    assert decision[1:] == (1, None)
    assert decide(decision.state, Load(0, 1), 1e6, limits)[1:] == (1, None)


def test_a_replica_that_is_gone_is_replaced_only_for_requests_there_are() -> None:
    state = decide(ScalerState(), Load(9, 2), 0.0, LIMITS).state
    assert decide(state, Load(9, 1), 1.0, LIMITS).wanted == 2
    state = decide(state, Load(1, 2), 1.0, LIMITS).state
    assert decide(state, Load(1, 1), 2.0, LIMITS).wanted == 1


def fewest(history: Sequence[tuple[float, int]], now: float, limits: Limits) -> int:
    """As many as must stay at ``now``, from the whole history: an oracle that shares no code."""
    ends = [at for at, _ in history[1:]] + [math.inf]
    loads = [
        (math.ceil(num_requests / limits.target_concurrency), end)
        for (_, num_requests), end in zip(history, ends, strict=True)
    ]
    idle_since = max([end for needed, end in loads if needed], default=-math.inf)
    if idle_since + limits.idle_timeout_s <= now:
        return limits.min_replicas
    needed = max(needed for needed, end in loads if end + limits.scale_down_delay_s > now)
    return min(max(needed, limits.min_replicas, 1), limits.max_replicas)


steps = st.lists(
    st.tuples(st.sampled_from([0.0, 0.1, 0.5, 1.0, 3.0, 9.0, 10.0, 31.0]), st.integers(0, 40)), max_size=30
)


@given(limits=limits, steps=steps)
@settings(deadline=None)
def test_decisions_are_those_of_the_whole_history(limits: Limits, steps: list[tuple[float, int]]) -> None:
    now, num_replicas, state = 0.0, 0, ScalerState()
    history: list[tuple[float, int]] = []
    for wait, num_requests in steps:
        now += wait
        history.append((now, num_requests))
        needed = min(math.ceil(num_requests / limits.target_concurrency), limits.max_replicas)
        least = max(needed, limits.min_replicas)
        expected = max(least, min(num_replicas, fewest(history, now, limits)))
        state, num_replicas, ask_again_at = decide(state, Load(num_requests, num_replicas), now, limits)
        assert expected == num_replicas
        assert (ask_again_at is not None) == (num_replicas > least)
        assert ask_again_at is None or ask_again_at > now
        assert len(state.peaks) <= limits.max_replicas


@given(
    limits=limits,
    kind=st.sampled_from(sorted(TRAFFIC)),
    seed=st.integers(0, 10_000),
    start_s=st.sampled_from([0.0, 0.15, 6.0]),
)
@settings(max_examples=200, deadline=None)
def test_simulated_traffic_is_served_without_flapping(
    limits: Limits, kind: str, seed: int, start_s: float
) -> None:
    arrivals = TRAFFIC[kind](random.Random(seed))
    report = simulate(arrivals, limits, start_s)
    assert len(arrivals) == len(report.waits)  # all were served
    check_bounds(report.moments, limits)
    check_enough(report.moments, limits)
    check_no_flapping(report.moments, limits)
    check_end(report.moments, limits, start_s)


def simulate(arrivals: Sequence[Arrival], limits: Limits, start_s: float = 0.15) -> Report:
    simulation = Simulation(Reactive(limits), target_concurrency=limits.target_concurrency, start_s=start_s)
    return simulation.run(arrivals)


def check_bounds(moments: Sequence[Moment], limits: Limits) -> None:
    assert max(moment.num_after for moment in moments) <= limits.max_replicas
    assert min(moment.num_after for moment in moments) >= limits.min_replicas


def check_enough(moments: Sequence[Moment], limits: Limits) -> None:
    for moment in moments:
        assert moment.num_after >= needed(moment, limits)


def check_no_flapping(moments: Sequence[Moment], limits: Limits) -> None:
    """What is stopped would not have been used in all the delay before; zero has a delay of its own."""
    for index, moment in enumerate(moments):
        if moment.num_after >= moment.num_before:
            continue
        delay_s = limits.scale_down_delay_s
        if moment.wanted == limits.min_replicas and not moment.num_requests:
            delay_s = min(delay_s, limits.idle_timeout_s)
        if not moment.wanted:
            delay_s = limits.idle_timeout_s
        for earlier, later in itertools.pairwise(moments[: index + 1]):
            if later.at + delay_s > moment.at:  # it lasted until then
                assert needed(earlier, limits) <= moment.wanted


def needed(moment: Moment, limits: Limits) -> int:
    return min(math.ceil(moment.num_requests / limits.target_concurrency), limits.max_replicas)


def check_end(moments: Sequence[Moment], limits: Limits, start_s: float) -> None:
    """It comes to rest at the minimum, and no later than it must."""
    assert moments[-1].num_after == limits.min_replicas
    last_busy = max(index for index, moment in enumerate(moments) if moment.num_requests)
    last_drop = max((moment.at for moment in moments if moment.num_after < moment.num_before), default=0.0)
    rest_s = max(limits.idle_timeout_s, limits.scale_down_delay_s, start_s)
    assert last_drop <= moments[last_busy + 1].at + rest_s


@pytest.mark.parametrize(("max_replicas", "num_starts"), [(1, 1), (3, 3), (9, 4)])
def test_a_burst_at_zero_starts_as_many_as_it_needs_once(max_replicas: int, num_starts: int) -> None:
    limits = LIMITS._replace(max_replicas=max_replicas, target_concurrency=32)
    report = simulate([Arrival(0.0, 1.0)] * 100, limits)
    assert (num_starts, 100) == (report.num_starts, report.num_cold)


def test_a_simulation_tells_what_a_policy_costs() -> None:
    report = simulate([Arrival(1.0, 2.0), Arrival(2.0, 1.0), Arrival(40.0, 1.0)], LIMITS, start_s=0.5)
    assert (report.num_requests, report.num_cold, report.cold_share) == (3, 2, 2 / 3)
    assert report.waits == (0.5, 0.0, 0.5)
    assert math.isclose(2.5 + 10 + 1.5 + 10, report.replica_s)


def test_the_same_seed_is_the_same_traffic() -> None:
    for kind in TRAFFIC.values():
        assert kind(random.Random(5)) == kind(random.Random(5)) != kind(random.Random(6))
