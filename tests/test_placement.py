"""Placement: the adapter's own replica first, its home else, the less loaded of two for the base."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunefleet.core import ReplicaInfo, ReplicaState
from tunefleet.runtime.placement import Room, by_weight, choose, less_loaded_of_two

READY = ReplicaState.READY
MAX_NUM_SEQS = 8
MARGIN = 2  # a quarter of it
DIGESTS = ("a", "b", "c")
NOBODY = Room(MAX_NUM_SEQS, {})


def replica(
    replica_id: str, *digests: str, running: int = 0, waiting: int = 0, state: ReplicaState = READY
) -> ReplicaInfo:
    return ReplicaInfo(
        replica_id=replica_id,
        state=state,
        address="",
        device="cpu",
        num_running=running,
        num_waiting=waiting,
        digests=digests,
    )


def chosen(
    replicas: Iterable[ReplicaInfo],
    digest: str | None,
    room: Room = NOBODY,
    rng: random.Random | None = None,
    *,
    hold: bool = True,
) -> str | None:
    found = choose(replicas, digest, room, rng or random.Random(0), hold=hold)
    return found.replica_id if found else None


def names(replicas: Iterable[ReplicaInfo]) -> list[str]:
    return [replica.replica_id for replica in replicas]


def ready(num: int) -> list[ReplicaInfo]:
    return [replica(f"r{number}") for number in range(num)]


@st.composite
def fleets(draw: st.DrawFn, states: tuple[ReplicaState, ...] = tuple(ReplicaState)) -> list[ReplicaInfo]:
    """Up to six replicas in any state, with any adapters and loads up to far beyond full."""
    return [
        replica(
            f"r{number}",
            *draw(st.sets(st.sampled_from(DIGESTS))),
            running=draw(st.integers(0, MAX_NUM_SEQS)),
            waiting=draw(st.integers(0, 2 * MAX_NUM_SEQS)),
            state=draw(st.sampled_from(states)),
        )
        for number in range(draw(st.integers(0, 6)))
    ]


digests = st.sampled_from([*DIGESTS, None])
randoms = st.integers().map(random.Random)


def test_a_replica_that_has_the_adapter_wins_over_an_idle_one() -> None:
    assert chosen([replica("idle"), replica("has-it", "a", "b", running=5)], "b") == "has-it"


def test_the_less_loaded_of_two_that_have_it_wins() -> None:
    replicas = [replica("x", "a", running=2, waiting=3), replica("y", "a", running=4), replica("z")]
    assert chosen(replicas, "a") == "y"


def test_own_requests_count_before_the_replica_tells_of_them() -> None:
    replicas = [replica("x", running=1), replica("y", running=2)]
    assert chosen(replicas, None) == "x"
    assert chosen(replicas, None, Room(MAX_NUM_SEQS, {"x": 3})) == "y"
    assert chosen(replicas, None, Room(MAX_NUM_SEQS, {"y": 1})) == "x"  # in what it tells already


@pytest.mark.parametrize("digest", ["a", None])
def test_a_full_replica_is_left_alone_while_another_has_room(digest: str | None) -> None:
    for held in ((), ("a",)):
        full = [replica(f"full{number}", *held, running=MAX_NUM_SEQS) for number in range(9)]
        for seed in range(20):
            assert chosen([*full, replica("room", *held)], digest, rng=random.Random(seed)) == "room"


@pytest.mark.parametrize("state", [state for state in ReplicaState if state is not READY])
def test_only_ready_replicas_take_requests(state: ReplicaState) -> None:
    assert chosen([replica("x", "a", state=state)], "a") is None
    assert chosen([replica("x", "a", state=state), replica("busy", running=7)], "a") == "busy"


@pytest.mark.parametrize("state", [ReplicaState.NEW, ReplicaState.STARTING])
def test_a_request_that_would_only_queue_is_held_for_a_replica_that_starts(state: ReplicaState) -> None:
    replicas = [replica("full", "a", running=MAX_NUM_SEQS), replica("starts", state=state)]
    assert chosen(replicas, "a") is None
    assert chosen(replicas, "a", hold=False) == "full"
    assert chosen(replicas[:1], "a") == "full"


def test_no_replica_no_choice() -> None:
    assert chosen([], None) is None
    assert chosen([], None, hold=False) is None


def test_a_hot_adapter_spreads_once_all_that_have_it_are_full() -> None:
    full = replica("has-it", "a", running=MAX_NUM_SEQS)
    assert chosen([full, replica("cooler", running=MAX_NUM_SEQS - MARGIN)], "a") == "cooler"
    assert chosen([full, replica("warm", running=MAX_NUM_SEQS - MARGIN + 1)], "a") == "has-it"
    also = replica("also", "a", running=MAX_NUM_SEQS - 1)
    assert chosen([full, also, replica("cooler")], "a") == "also"


def test_the_weights_are_the_same_in_every_process() -> None:
    assert names(by_weight(ready(5), "d" * 64)) == ["r1", "r4", "r2", "r0", "r3"]


@given(fleets(), digests, randoms)
def test_a_choice_is_ready_and_there_is_one_unless_something_starts(
    replicas: list[ReplicaInfo], digest: str | None, rng: random.Random
) -> None:
    found = choose(replicas, digest, NOBODY, rng)
    takers = [each for each in replicas if each.state is READY]
    starts = any(each.state in {ReplicaState.NEW, ReplicaState.STARTING} for each in replicas)
    if found is None:
        assert starts or not takers
        assert all(NOBODY.is_full(each) for each in takers)
    else:
        assert found in takers


@given(fleets((READY,)), st.sampled_from(DIGESTS), randoms)
def test_who_has_the_adapter_wins_unless_another_is_worth_bringing_it_to(
    replicas: list[ReplicaInfo], digest: str, rng: random.Random
) -> None:
    found = choose(replicas, digest, NOBODY, rng)
    holders = [each for each in replicas if digest in each.digests]
    if found is not None and holders and digest not in found.digests:
        least = min(NOBODY.load(each) for each in holders)
        assert least >= MAX_NUM_SEQS
        assert NOBODY.load(found) <= least - MARGIN


@given(fleets((READY,)), st.sampled_from(DIGESTS), randoms)
def test_a_hot_adapter_always_spreads_where_that_helps(
    replicas: list[ReplicaInfo], digest: str, rng: random.Random
) -> None:
    holders = [each for each in replicas if digest in each.digests]
    others = [each for each in replicas if digest not in each.digests]
    is_hot = bool(holders) and all(NOBODY.is_full(each) for each in holders)
    least = min((NOBODY.load(each) for each in holders), default=0)
    if is_hot and any(NOBODY.load(each) <= least - MARGIN for each in others):
        assert choose(replicas, digest, NOBODY, rng) in others


@given(st.integers(2, 8), st.integers(0, 7), st.integers(), randoms)
def test_a_replica_that_goes_moves_only_its_own_adapters(
    num: int, gone: int, salt: int, rng: random.Random
) -> None:
    replicas = ready(num)
    left = [each for each in replicas if each.replica_id != f"r{gone % num}"]
    for number in range(50):
        digest = f"{salt}-{number}"
        before, after = chosen(replicas, digest, rng=rng), chosen(left, digest, rng=rng)
        assert before == after or before == f"r{gone % num}"


@given(st.integers(1, 8), st.integers())
def test_a_replica_that_comes_takes_adapters_from_others_but_moves_none_between_them(
    num: int, salt: int
) -> None:
    for number in range(50):
        digest = f"{salt}-{number}"
        before, after = chosen(ready(num), digest), chosen(ready(num + 1), digest)
        assert after in {before, f"r{num}"}


@given(st.integers(2, 8), st.integers())
def test_homes_are_shared_evenly(num: int, salt: int) -> None:
    """Each count is binomial: six standard deviations from the mean are out of the question."""
    share = 100
    homes = Counter(chosen(ready(num), f"{salt}-{number}") for number in range(share * num))
    assert max(abs(homes[f"r{number}"] - share) for number in range(num)) <= 6 * share**0.5


@given(st.integers(2, 10), randoms)
def test_two_choices_keep_the_base_even(num: int, rng: random.Random) -> None:
    """A thousand requests that stay: by chance alone the fullest would have some 25 above the mean."""
    in_flight: Counter[str] = Counter()
    room = Room(10**6, in_flight)
    for _ in range(1000):
        in_flight[less_loaded_of_two(ready(num), room, rng).replica_id] += 1
    assert max(in_flight.values()) - 1000 / num <= 4


@given(st.integers(2, 5), randoms)
def test_a_burst_at_zero_fills_each_replica_and_no_more(num: int, rng: random.Random) -> None:
    """Replicas get READY one after the other; what is held meanwhile spreads over all of them."""
    in_flight: Counter[str] = Counter()
    room = Room(MAX_NUM_SEQS, in_flight)
    held = MAX_NUM_SEQS * num
    for num_ready in range(1, num + 1):
        starting = [replica(f"s{number}", state=ReplicaState.STARTING) for number in range(num - num_ready)]
        while held and (found := choose([*ready(num_ready), *starting], "a", room, rng)):
            in_flight[found.replica_id] += 1
            held -= 1
    assert [MAX_NUM_SEQS] * num == list(in_flight.values())
