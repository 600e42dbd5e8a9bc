"""What is learned of the hours of the day, and what it saves in a simulation."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from traffic import Answer, Arrival, Reactive, Report, Simulation, poisson
from tunefleet.runtime.arrivals import FORGET_S, HOUR_S, NUM_HOURS, Arrivals, Forecast, Hour
from tunefleet.runtime.scaler import Limits, Load, ScalerState, decide

DAY_S = NUM_HOURS * HOUR_S
LIMITS = Limits(
    min_replicas=0, max_replicas=2, target_concurrency=8, idle_timeout_s=60.0, scale_down_delay_s=60.0
)
WEEK_S = 7 * DAY_S
LEAD_S = 5.0
START_S = 2.0


class Predictive:
    """As the supervisor does it with ``predictive``: what is likely raises the least number of replicas."""

    def __init__(self) -> None:
        self._arrivals = Arrivals(0.0)
        self._state = ScalerState()

    def arrived(self, now: float) -> None:
        self._arrivals.arrived(now)

    def decide(self, load: Load, now: float) -> Answer:
        self._arrivals.advance(now)
        forecast = self._arrivals.forecast(now, idle_timeout_s=LIMITS.idle_timeout_s, lead_s=LEAD_S)
        limits = LIMITS._replace(min_replicas=max(LIMITS.min_replicas, forecast.least))
        self._state, wanted, ask_again_at = decide(self._state, load, now, limits)
        times = [time for time in (ask_again_at, forecast.ask_again_at) if time is not None]
        return Answer(wanted, min(times) if now < WEEK_S else ask_again_at)


def office_hours(generator: random.Random) -> list[Arrival]:
    """A request every 40 s or so from nine to five, hardly any else."""
    return poisson(
        generator,
        lambda now: 1 / 40 if 9 <= now % DAY_S / HOUR_S < 17 else 1 / 7200,
        most=1 / 40,
        until=WEEK_S,
        service_s=1.0,
    )


def run(policy: Reactive | Predictive, arrivals: list[Arrival]) -> Report:
    return Simulation(policy, target_concurrency=LIMITS.target_concurrency, start_s=START_S).run(arrivals)


def test_waking_ahead_of_office_hours_saves_most_cold_starts(capsys: pytest.CaptureFixture[str]) -> None:
    arrivals = office_hours(random.Random(0))
    reactive, predictive = run(Reactive(LIMITS), arrivals), run(Predictive(), arrivals)
    with capsys.disabled():
        for name, report in (("reactive", reactive), ("predictive", predictive)):
            hours = report.replica_s / HOUR_S
            print(f"\n{name}: {report.cold_share:.1%} met a cold start, {hours:.1f} replica hours", end="")
    assert reactive.num_requests == predictive.num_requests > 4000
    assert reactive.cold_share > 0.2
    assert predictive.cold_share < reactive.cold_share / 3  # the first day is for learning
    assert predictive.replica_s < reactive.replica_s * 1.4


def test_where_requests_are_rare_nothing_is_kept_awake() -> None:
    generator = random.Random(1)
    arrivals = poisson(generator, lambda _: 1 / 1800, most=1 / 1800, until=WEEK_S, service_s=1.0)
    reactive, predictive = run(Reactive(LIMITS), arrivals), run(Predictive(), arrivals)
    assert predictive.replica_s == pytest.approx(reactive.replica_s, rel=0.01)


def test_an_hour_is_believed_once_half_of_it_was_seen() -> None:
    arrivals = Arrivals(0.0)
    arrivals.arrived(HOUR_S / 4, 100)
    assert Hour(100, HOUR_S / 4) == arrivals.hours[0]
    assert arrivals.hours[0].rate == 0
    arrivals.advance(HOUR_S / 2)
    assert arrivals.hours[0].rate == 100 / (HOUR_S / 2)


def test_a_replica_is_there_before_the_hour_begins_and_until_it_ends() -> None:
    hours = [Hour()] * NUM_HOURS
    hours[9] = Hour(num_arrivals=360, seen_s=HOUR_S)  # one in 10 s
    arrivals = Arrivals(0.0, tuple(hours))
    nine, ten = 9 * HOUR_S, 10 * HOUR_S

    def ask(now: float) -> Forecast:
        return arrivals.forecast(now, idle_timeout_s=10.0, lead_s=LEAD_S)

    assert Forecast(0, nine) == ask(nine - HOUR_S - 1.0)._replace(ask_again_at=nine)
    assert Forecast(0, nine - LEAD_S) == ask(nine - 100.0)
    assert Forecast(1, nine) == ask(nine - LEAD_S)
    assert Forecast(1, ten) == ask(nine)
    assert Forecast(0, 11 * HOUR_S) == ask(ten)


def test_what_changed_is_learned_anew_within_a_week() -> None:
    arrivals = Arrivals(0.0)
    likely = []
    for day in range(16):
        if day < 7:
            arrivals.arrived(day * DAY_S + HOUR_S / 2, 720)
        now = (day + 1) * DAY_S
        arrivals.advance(now)
        likely.append(arrivals.forecast(now, idle_timeout_s=10.0, lead_s=0.0).least == 1)
    last = max(day for day in range(16) if likely[day])
    assert all(likely[: last + 1])
    assert 7 < last < 14


def test_weeks_without_anybody_are_forgotten() -> None:
    arrivals = Arrivals(0.0)
    arrivals.arrived(10.0, 1000)
    arrivals.advance(11.0 + FORGET_S)
    assert set(arrivals.hours) == {Hour()}


@given(st.lists(st.floats(min_value=0.001, max_value=2 * DAY_S), max_size=30), st.floats(0, DAY_S))
def test_time_that_passed_is_seen_once_whatever_the_steps(steps: list[float], start: float) -> None:
    arrivals, at_once = Arrivals(start), Arrivals(start)
    now = start
    for step in steps:
        now += step
        arrivals.advance(now)
    if now - start <= FORGET_S:
        at_once.advance(now)
        for one, other in zip(arrivals.hours, at_once.hours, strict=True):
            assert math.isclose(one.seen_s, other.seen_s, rel_tol=1e-6, abs_tol=1e-3)
