"""A machine's status in a fleet's words."""

from __future__ import annotations

import platform
from importlib import metadata

import pytest

from adapter_factory import make_manifest
from tunefleet import __version__
from tunefleet.answers import FleetStatus, TierUsage
from tunefleet.config import resolve
from tunefleet.core import ReplicaInfo, ReplicaState
from tunefleet.fleet_status import fleet_status
from tunefleet.messages import Status

OPTIONS = resolve(keywords={"device_adapter_bytes": 2**20, "store_url": "file:///s"}, environ={})


def told(*states: ReplicaState) -> FleetStatus:
    replicas = tuple(
        ReplicaInfo(
            replica_id=f"r{number}", state=state, address="", device="cpu", num_adapters=2, adapter_bytes=10
        )
        for number, state in enumerate(states)
    )
    machine = Status(pid=1, parked_pid=0, replicas=replicas, pss_bytes={}, host_tier={})
    return fleet_status(machine, make_manifest(), OPTIONS)


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        ((), True),
        ((ReplicaState.NEW,), True),
        ((ReplicaState.STARTING,), False),
        ((ReplicaState.NEW, ReplicaState.READY), False),
        ((ReplicaState.DRAINING,), False),
    ],
)
def test_zero_is_when_no_replica_has_a_process(states: tuple[ReplicaState, ...], expected: bool) -> None:
    assert told(*states).at_zero == expected


def test_the_device_tier_is_that_of_all_replicas() -> None:
    tiers = told(ReplicaState.READY, ReplicaState.READY).tiers
    assert tiers["device"] == TierUsage(num_adapters=4, used_bytes=20, max_bytes=2**21)


def test_versions_are_of_what_is_installed() -> None:
    status = told()
    assert status.version == __version__
    assert status.versions["python"] == platform.python_version()
    assert status.versions["torch"] == metadata.version("torch")
