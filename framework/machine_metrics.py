"""Metrics of a router's machine, out of what its host process tells when it is asked."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from tunefleet.answers import FleetStatus
from tunefleet.core import ReplicaInfo, ReplicaStart, ReplicaState

PREFIX = "tunefleet"
LIVING = (ReplicaState.NEW, ReplicaState.STARTING, ReplicaState.READY, ReplicaState.DRAINING)
_START_S = (0.01, 0.025, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 20.0, 60.0)


class MachineMetrics(Collector):
    """Gauges of one machine: all its routers tell the same ones, so take their maximum, not their sum."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._status: FleetStatus | None = None
        self._seen: tuple[ReplicaStart, ...] = ()
        self._cold_start_s = Histogram(
            f"{PREFIX}_replica_cold_start_seconds",
            "Of a replica's start, by stage; start is all of it.",
            ["stage"],
            buckets=_START_S,
            registry=registry,
        )
        registry.register(self)

    def note(self, status: FleetStatus | None) -> None:
        """What the gauges tell from now on; None: the host process doesn't answer."""
        self._status = status
        if status is None:
            return
        for start in status.starts:
            if start not in self._seen:
                for stage, seconds in start.stages.items():
                    self._cold_start_s.labels(stage).observe(seconds)
        self._seen = status.starts

    def collect(self) -> Iterator[GaugeMetricFamily]:
        status = self._status
        yield _gauge("host_up", "Whether the machine's host process answers.", float(status is not None))
        if status is None:
            return
        yield _gauge("requests_held", "Requests that wait for a replica, of all routers.", status.num_held)
        yield _labelled("replicas", "Replicas by state.", "state", _states(status.replicas))
        yield _labelled("adapter_slots", "Slots of all replicas.", "state", _slots(status.replicas))
        tiers = status.tiers.items()
        yield _labelled(
            "adapter_bytes", "What adapters take.", "tier", {name: tier.used_bytes for name, tier in tiers}
        )
        yield _labelled(
            "adapter_max_bytes", "What they may take.", "tier", {name: tier.max_bytes for name, tier in tiers}
        )
        yield _labelled(
            "adapters", "Adapters that are there.", "tier", {name: tier.num_adapters for name, tier in tiers}
        )
        yield _gauge("kv_cache_usage_perc", "Used part of the KV budget, 0 to 1.", _kv_usage(status.replicas))
        yield _labelled(
            "standby_pss_bytes", "Proportional memory of what stays at zero.", "process", status.pss_bytes
        )


def _states(replicas: Iterable[ReplicaInfo]) -> dict[str, float]:
    found = collections.Counter(replica.state for replica in replicas)
    return {state.value: found[state] for state in LIVING}


def _slots(replicas: Iterable[ReplicaInfo]) -> dict[str, float]:
    slots = {"in_use": 0.0, "idle": 0.0, "free": 0.0}
    for replica in replicas:
        slots["in_use"] += replica.num_adapters_in_use
        slots["idle"] += replica.num_adapters - replica.num_adapters_in_use
        slots["free"] += replica.num_slots - replica.num_adapters
    return slots


def _kv_usage(replicas: Iterable[ReplicaInfo]) -> float:
    used, budget = 0, 0
    for replica in replicas:
        used += replica.kv_tokens
        budget += replica.max_kv_tokens
    return used / budget if budget else 0.0


def _gauge(name: str, doc: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"{PREFIX}_{name}", doc, value=value)


def _labelled(name: str, doc: str, label: str, values: Mapping[str, float]) -> GaugeMetricFamily:
    family = GaugeMetricFamily(f"{PREFIX}_{name}", doc, labels=[label])
    for of, value in values.items():
        family.add_metric([of], value)
    return family
