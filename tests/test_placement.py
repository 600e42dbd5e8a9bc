"""Placement: the adapter's own replica first, then the least loaded."""

from __future__ import annotations

import pytest

from tunefleet.core import ReplicaInfo, ReplicaState
from tunefleet.runtime.placement import choose

READY = ReplicaState.READY


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


def chosen(replicas: list[ReplicaInfo], digest: str | None) -> str | None:
    found = choose(replicas, digest)
    return found.replica_id if found else None


def test_a_replica_that_has_the_adapter_wins_over_an_idle_one() -> None:
    assert chosen([replica("idle"), replica("has-it", "a", "b", running=5)], "b") == "has-it"


def test_the_least_loaded_of_those_that_have_it_wins() -> None:
    replicas = [replica("x", "a", running=2, waiting=3), replica("y", "a", running=4), replica("z")]
    assert chosen(replicas, "a") == "y"


@pytest.mark.parametrize("digest", [None, "nobody-has-it"])
def test_without_the_adapter_anywhere_the_least_loaded_wins(digest: str | None) -> None:
    assert chosen([replica("x", "a", running=1), replica("y"), replica("z", waiting=2)], digest) == "y"


def test_equals_are_told_apart_by_their_id() -> None:
    assert chosen([replica("b"), replica("a")], None) == "a"


@pytest.mark.parametrize("state", [state for state in ReplicaState if state is not READY])
def test_only_ready_replicas_take_requests(state: ReplicaState) -> None:
    assert chosen([replica("x", "a", state=state)], "a") is None
    assert chosen([replica("x", "a", state=state), replica("busy", running=9)], "a") == "busy"


def test_no_replica_no_choice() -> None:
    assert chosen([], None) is None
