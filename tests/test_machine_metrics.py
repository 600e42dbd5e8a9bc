"""Gauges of a machine say what its status says."""

from __future__ import annotations

import msgspec
from prometheus_client import CollectorRegistry, generate_latest

from adapter_factory import make_manifest
from tunefleet.config import resolve
from tunefleet.core import ReplicaInfo, ReplicaStart, ReplicaState
from tunefleet.fleet_status import fleet_status
from tunefleet.machine_metrics import MachineMetrics
from tunefleet.messages import Status

REPLICA = ReplicaInfo(
    replica_id="r1",
    state=ReplicaState.READY,
    address="/s",
    device="cpu",
    digests=("a", "b", "c"),
    num_adapters=3,
    num_adapters_in_use=1,
    num_slots=8,
    adapter_bytes=300,
    kv_tokens=256,
    max_kv_tokens=1024,
)
START = ReplicaStart(replica_id="r1", device="cpu", ready_at=5.0, stages={"fork": 0.02, "start": 0.2})
BUSY = Status(
    pid=1,
    parked_pid=2,
    replicas=(REPLICA, msgspec.structs.replace(REPLICA, replica_id="r2", state=ReplicaState.DRAINING)),
    pss_bytes={"host": 10, "parked": 20},
    host_tier={"a": 4, "b": 5},
    disk_tier={"a": 1},
    num_held=7,
    starts=(START,),
)
ZERO = Status(pid=1, parked_pid=2, replicas=(), pss_bytes={"host": 10}, host_tier={})
OPTIONS = resolve(keywords={"device_adapter_bytes": 2**20, "store_url": "file:///s"}, environ={})


class Told:
    """What is told after some statuses."""

    def __init__(self, *statuses: Status | None) -> None:
        self.registry = CollectorRegistry()
        metrics = MachineMetrics(self.registry)
        for status in statuses:
            metrics.note(status and fleet_status(status, make_manifest(), OPTIONS))

    def __call__(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"tunefleet_{name}", labels)


def test_replicas_slots_and_tiers_are_counted() -> None:
    told = Told(BUSY)
    states = {state: told("replicas", state=state) for state in ("new", "starting", "ready", "draining")}
    assert states == {"new": 0, "starting": 0, "ready": 1, "draining": 1}
    slots = {state: told("adapter_slots", state=state) for state in ("in_use", "idle", "free")}
    assert slots == {"in_use": 2, "idle": 4, "free": 10}
    assert (told("adapter_bytes", tier="device"), told("adapter_max_bytes", tier="device")) == (600, 2**21)
    assert (told("adapter_bytes", tier="host"), told("adapters", tier="host")) == (9, 2)
    assert (told("adapter_bytes", tier="disk"), told("adapters", tier="disk")) == (1, 1)
    assert (told("kv_cache_usage_perc"), told("requests_held"), told("host_up")) == (0.25, 7, 1)
    assert (told("standby_pss_bytes", process="host"), told("standby_pss_bytes", process="parked")) == (
        10,
        20,
    )


def test_at_zero_there_is_nothing_on_a_device() -> None:
    told = Told(BUSY, ZERO)
    assert (told("replicas", state="ready"), told("adapter_slots", state="free")) == (0, 0)
    assert (told("adapter_bytes", tier="device"), told("kv_cache_usage_perc")) == (0, 0)


def test_a_host_process_that_does_not_answer_leaves_no_stale_gauge() -> None:
    told = Told(BUSY, None)
    assert told("host_up") == 0
    assert told("replicas", state="ready") is None
    assert Told()("host_up") == 0


def test_each_start_is_counted_once_by_stage() -> None:
    again = msgspec.structs.replace(START, ready_at=9.0)
    told = Told(BUSY, BUSY, None, msgspec.structs.replace(BUSY, starts=(START, again)))
    assert told("replica_cold_start_seconds_count", stage="fork") == 2
    assert told("replica_cold_start_seconds_sum", stage="start") == 0.4


def test_the_text_shows_no_digest() -> None:
    told = Told(BUSY)
    assert b'tier="host"' in generate_latest(told.registry)
    assert b'"a"' not in generate_latest(told.registry)
