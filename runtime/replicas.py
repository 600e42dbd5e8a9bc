"""The host process's record of its replicas, and the one place that changes their state."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

from tunefleet.core import ReplicaInfo, ReplicaState
from tunefleet.errors import InvalidState
from tunefleet.messages import HostToReplica, ReplicaLoad, ReplicaToHost
from tunefleet.runtime.wire import Connection

_NEXT = {
    ReplicaState.NEW: {ReplicaState.STARTING, ReplicaState.FAILED},
    ReplicaState.STARTING: {ReplicaState.READY, ReplicaState.FAILED},
    ReplicaState.READY: {ReplicaState.DRAINING, ReplicaState.FAILED},
    ReplicaState.DRAINING: {ReplicaState.STOPPED, ReplicaState.FAILED},
}


@dataclasses.dataclass
class Record:
    """One replica, from the decision to start it until its process is gone."""

    replica_id: str
    device: str
    address: str
    state: ReplicaState = ReplicaState.NEW
    pid: int = 0
    connection: Connection[ReplicaToHost] | None = None
    load: ReplicaLoad = dataclasses.field(
        default_factory=lambda: ReplicaLoad(num_running=0, num_waiting=0, num_steps=0, digests=())
    )
    busy_at: float = 0.0  # monotonic seconds when it last had work
    created_at: float = dataclasses.field(default_factory=time.monotonic)
    started_at: float = 0.0  # unix seconds
    stages: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def num_requests(self) -> int:
        return self.load.num_running + self.load.num_waiting

    def send(self, message: HostToReplica) -> None:
        if self.connection is not None:
            self.connection.send(message)

    def info(self) -> ReplicaInfo:
        ready = self.state is ReplicaState.READY
        return ReplicaInfo(
            replica_id=self.replica_id,
            state=self.state,
            address=self.address if ready else "",
            device=self.device,
            pid=self.pid,
            num_running=self.load.num_running,
            num_waiting=self.load.num_waiting,
            num_steps=self.load.num_steps,
            digests=self.load.digests,
            started_at=self.started_at,
            stages=self.stages,
        )


class ReplicaSet:
    """Replicas that have a process, or will have one."""

    def __init__(self) -> None:
        self._records: dict[str, Record] = {}

    def __iter__(self) -> Iterator[Record]:
        return iter(list(self._records.values()))

    def get(self, replica_id: str) -> Record | None:
        return self._records.get(replica_id)

    def of(self, connection: object) -> Record | None:
        return next((record for record in self._records.values() if record.connection is connection), None)

    def add(self, record: Record) -> None:
        self._records[record.replica_id] = record

    def become(self, record: Record, state: ReplicaState) -> None:
        """Changes a replica's state; one that is gone leaves the set."""
        if state not in _NEXT.get(record.state, set()):
            raise InvalidState(
                f"replica {record.replica_id} can't go from {record.state.value} to {state.value}"
            )
        record.state = state
        if state in (ReplicaState.STOPPED, ReplicaState.FAILED):
            self._records.pop(record.replica_id, None)

    def in_state(self, *states: ReplicaState) -> list[Record]:
        return [record for record in self._records.values() if record.state in states]

    def infos(self) -> tuple[ReplicaInfo, ...]:
        return tuple(record.info() for record in self._records.values())
