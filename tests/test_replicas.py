"""A replica's states: which may follow which, and who is in the set."""

from __future__ import annotations

import itertools

import pytest

from tunefleet.core import ReplicaStart, ReplicaState
from tunefleet.errors import InvalidState
from tunefleet.messages import Drain, ReplicaLoad
from tunefleet.runtime.replicas import Record, ReplicaSet

NEW, STARTING, READY = ReplicaState.NEW, ReplicaState.STARTING, ReplicaState.READY
DRAINING, STOPPED, FAILED = ReplicaState.DRAINING, ReplicaState.STOPPED, ReplicaState.FAILED
ALLOWED = {
    (NEW, STARTING),
    (NEW, FAILED),
    (STARTING, READY),
    (STARTING, FAILED),
    (READY, DRAINING),
    (READY, FAILED),
    (DRAINING, STOPPED),
    (DRAINING, FAILED),
}


def new_set(*records: Record) -> ReplicaSet:
    replicas = ReplicaSet()
    for record in records:
        replicas.add(record)
    return replicas


@pytest.mark.parametrize(("before", "after"), list(itertools.product(ReplicaState, repeat=2)))
def test_a_state_is_followed_only_by_those_that_make_sense(before: ReplicaState, after: ReplicaState) -> None:
    record = Record("r", "cpu", "/s", state=before)
    replicas = new_set(record)
    if (before, after) in ALLOWED:
        replicas.become(record, after)
        assert after is record.state
    else:
        with pytest.raises(InvalidState, match=f"from {before.value} to {after.value}"):
            replicas.become(record, after)
        assert before is record.state


@pytest.mark.parametrize("end", [STOPPED, FAILED])
def test_a_replica_that_is_gone_leaves_the_set(end: ReplicaState) -> None:
    record = Record("r", "cpu", "/s", state=DRAINING)
    replicas = new_set(record, Record("other", "cpu", "/s"))
    replicas.become(record, end)
    assert [item.replica_id for item in replicas] == ["other"]
    assert replicas.get("r") is None


def test_replicas_may_leave_while_they_are_looked_at() -> None:
    replicas = new_set(*(Record(f"{number}", "cpu", "/s") for number in range(4)))
    for record in replicas:
        replicas.become(record, FAILED)
    assert replicas.infos() == ()


def test_records_are_found_by_state_and_connection() -> None:
    first = Record("a", "cpu", "/a", state=READY)
    second = Record("b", "cpu", "/b", state=STARTING)
    replicas = new_set(first, second)
    first.connection = object()  # type: ignore[assignment]
    assert [first] == replicas.in_state(READY)
    assert [first, second] == replicas.in_state(READY, STARTING)
    assert first is replicas.of(first.connection)
    assert replicas.of(object()) is None


@pytest.mark.parametrize(("state", "address"), [(STARTING, ""), (READY, "/s"), (DRAINING, "")])
def test_only_a_ready_replica_shows_its_address(state: ReplicaState, address: str) -> None:
    record = Record("r", "cpu", "/s", state=state, pid=5, stages={"fork": 0.1})
    record.load = ReplicaLoad(num_running=2, num_waiting=3, num_steps=4, digests=("d",))
    info = record.info()
    assert address == info.address
    assert (
        info.num_running,
        info.num_waiting,
        info.num_steps,
        info.digests,
        info.pid,
    ) == (2, 3, 4, ("d",), 5)
    assert record.num_requests == 5


def test_sending_before_a_replica_has_connected_does_nothing() -> None:
    record = Record("r", "cpu", "/s")
    record.send(Drain(timeout_s=1.0))
    assert record.connection is None


def test_a_replica_knows_since_when_it_is_in_its_state_and_starts_are_remembered() -> None:
    record = Record("r", "cpu", "/s")
    born = record.since
    replicas = new_set(record)
    replicas.become(record, STARTING)
    record.stages = {"start": 0.3}
    assert list(replicas.starts) == []
    replicas.become(record, READY)
    assert born <= record.since == record.info().since
    replicas.become(record, FAILED)
    expected = ReplicaStart(
        replica_id="r", device="cpu", ready_at=replicas.starts[0].ready_at, stages={"start": 0.3}
    )
    assert [expected] == list(replicas.starts)
    assert born <= expected.ready_at <= record.since
