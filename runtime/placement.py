"""Which replica takes a request. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from tunefleet.core import ReplicaInfo, ReplicaState


def choose(replicas: Iterable[ReplicaInfo], digest: str | None) -> ReplicaInfo | None:
    """A READY replica that has the adapter in a slot, else the least loaded one; None when none is READY."""
    ready = [replica for replica in replicas if replica.state is ReplicaState.READY]
    return min(ready, key=lambda replica: _cost(replica, digest), default=None)


def _cost(replica: ReplicaInfo, digest: str | None) -> tuple[bool, int, str]:
    misses = digest is not None and digest not in replica.digests
    return misses, replica.num_running + replica.num_waiting, replica.replica_id
