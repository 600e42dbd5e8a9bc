"""The host process's record of its replicas, and the one place that changes their state."""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Iterator

import msgspec

from tunefleet.core import ReplicaInfo, ReplicaStart, ReplicaState
from tunefleet.errors import InvalidState
from tunefleet.messages import HostToReplica, ReplicaLoad, ReplicaToHost
from tunefleet.runtime.wire import Connection

MAX_STARTS = 50  # that are remembered

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
    since: float = dataclasses.field(default_factory=time.time)  # unix seconds when it came into its state
    pid: int = 0
    connection: Connection[ReplicaToHost] | None = None
    load: ReplicaLoad = dataclasses.field(
        default_factory=lambda: ReplicaLoad(num_running=0, num_waiting=0, num_steps=0, digests=())
    )
    created_at: float = dataclasses.field(default_factory=time.monotonic)
    started_at: float = 0.0  # unix seconds
    stages: dict[str, float] = dataclasses.field(default_factory=dict)
    is_orphan: bool = False  # who started it is gone: nobody tells of its end

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
            num_adapters=len(self.load.digests),
            since=self.since,
            started_at=self.started_at,
            stages=self.stages,
            **msgspec.structs.asdict(self.load),
        )

    def start(self) -> ReplicaStart:
        """How it became READY, just now."""
        return ReplicaStart(
            replica_id=self.replica_id, device=self.device, ready_at=self.since, stages=self.stages
        )


class ReplicaSet:
    """Replicas that have a process, or will have one.

    Attributes:
        starts: the latest ones that ended well, the last one last.
    """

    def __init__(self) -> None:
        self._records: dict[str, Record] = {}
        self.starts: collections.deque[ReplicaStart] = collections.deque(maxlen=MAX_STARTS)

    def __len__(self) -> int:
        return len(self._records)

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
        record.state, record.since = state, time.time()
        if state is ReplicaState.READY:
            self.starts.append(record.start())
        if state in (ReplicaState.STOPPED, ReplicaState.FAILED):
            self._records.pop(record.replica_id, None)

    def in_state(self, *states: ReplicaState) -> list[Record]:
        return [record for record in self._records.values() if record.state in states]

    def infos(self) -> tuple[ReplicaInfo, ...]:
        return tuple(record.info() for record in self._records.values())
