"""The whole protocol between routers, host process, parked process and replicas.

Each message is a small frozen struct, sent as length-prefixed msgpack (``runtime.wire``). One union per
direction. Nothing here is ever pickled.
"""

from __future__ import annotations

import msgspec

from tunefleet.core import (
    DEFAULT_TENANT,
    AdapterRef,
    FinishReason,
    LoggedError,
    PinTier,
    ReplicaInfo,
    ReplicaStart,
    SamplingParams,
)


class Message(msgspec.Struct, frozen=True, tag=True, kw_only=True, omit_defaults=True):
    """Root of all messages."""


class HostOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What defines a machine's host process: routers that join must bring the same."""

    base_dir: str  # prepared base
    store_url: str
    state_dir: str  # log and disk tier; the host process's lock is of this folder
    devices: tuple[str, ...]
    min_replicas: int
    max_replicas: int
    target_concurrency: int
    idle_timeout_s: float
    scale_down_delay_s: float
    predictive: bool
    standby_ttl_s: float
    drain_timeout_s: float
    cold_start_timeout_s: float
    step_timeout_s: float
    max_active_adapters: int
    max_adapter_rank: int
    device_adapter_bytes: int
    kv_cache_bytes: int
    host_cache_bytes: int
    disk_cache_bytes: int
    max_num_seqs: int
    max_queue: int
    max_model_len: int
    threads_per_replica: int


# router -> host process
class Hello(Message, frozen=True):
    options: HostOptions


class Wake(Message, frozen=True):
    """A request waits: have a replica READY. Answered by Replicas (watch) or WakeFailed."""

    request_id: str


class Unheld(Message, frozen=True):
    """A request waits no more: it has a replica, or was given up."""

    request_id: str


class Forget(Message, frozen=True):
    """Drop every copy of an adapter on this machine (it was deleted). Answered by Forgotten."""

    digest: str
    keys: tuple[str, ...] = ()  # of its objects: what comes from others' goes on; none: whatever there is


class HeldAdapter(msgspec.Struct, frozen=True):
    """An adapter that is exempt from eviction down to ``tier``, and brought there before it is asked for."""

    adapter: AdapterRef
    tier: PinTier  # "disk": the files as uploaded; "host": the prepared file too


class Hold(Message, frozen=True):
    """All that this router holds, instead of what it held before; ends with its connection."""

    adapters: tuple[HeldAdapter, ...]


class Prefetch(Message, frozen=True):
    """Bring an adapter up to a tier. Not answered: what can't be fetched is only logged."""

    adapter: AdapterRef
    tier: PinTier


class StatusRequest(Message, frozen=True):
    pass


# host process -> router
class Welcome(Message, frozen=True):
    pid: int
    parked_pid: int
    replicas: tuple[ReplicaInfo, ...]


class Refused(Message, frozen=True):
    """The host process can't serve this router: other options, or a start that failed."""

    message: str


class Replicas(Message, frozen=True):
    """The current replicas, pushed on every change."""

    replicas: tuple[ReplicaInfo, ...]


class WakeFailed(Message, frozen=True):
    request_id: str
    message: str
    retry_after_s: float


class Forgotten(Message, frozen=True):
    """The copies in host and disk tier are gone, and those in slots that no sequence uses: how many."""

    digest: str
    disk: int = 0
    host: int = 0
    device: int = 0
    in_use: int = 0  # replicas that still run a sequence with it, and drop it right after
    keys: tuple[str, ...] = ()  # as asked


class Status(Message, frozen=True):
    pid: int
    parked_pid: int
    replicas: tuple[ReplicaInfo, ...]
    pss_bytes: dict[str, int]  # proportional memory of host and parked process
    host_tier: dict[str, int]  # digest -> bytes
    disk_tier: dict[str, int] = {}  # digest -> bytes
    num_held: int = 0  # requests that wait for a replica
    starts: tuple[ReplicaStart, ...] = ()  # the latest ones, the last one last
    errors: tuple[LoggedError, ...] = ()  # the latest ones, the last one last

    @property
    def last_error(self) -> str:
        return self.errors[-1].message if self.errors else ""


# router -> replica
class Submit(Message, frozen=True):
    """One sequence to run. ``generated`` holds tokens that an earlier replica made, sent on already.

    ``suspect``: a replica ended in a step that it was in. It is computed alone until it has a new token, and
    a Trial says when.
    """

    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    adapter: AdapterRef | None = None
    generated: tuple[int, ...] = ()
    tenant: str = DEFAULT_TENANT
    user_id: str | None = None  # None: the tenant itself asks the base
    suspect: bool = False


class Cancel(Message, frozen=True):
    request_id: str


class ForgetUser(Message, frozen=True):
    """The user is deleted: drop what finished sequences left of them."""

    tenant: str
    user_id: str


# replica -> router
class Timing(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Seconds per stage, from one monotonic clock, sent with a sequence's first token."""

    queue_s: float = 0.0
    download_s: float = 0.0
    load_s: float = 0.0
    activate_s: float = 0.0
    prefill_s: float = 0.0
    adapter_cold: bool = False  # the adapter was not in a slot when the request came
    cached_tokens: int = 0  # of the prompt, whose keys and values were there from an earlier request


class TokenLogprob(msgspec.Struct, frozen=True, omit_defaults=True):
    """Natural logarithms of probabilities at one place of the answer, before temperature and cuts."""

    logprob: float  # of the token that was chosen
    top: tuple[tuple[int, float], ...] = ()  # the likeliest token ids with theirs, likeliest first


class Progress(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one step did for one sequence."""

    request_id: str
    tokens: tuple[int, ...] = ()
    finish_reason: FinishReason | None = None
    timing: Timing | None = None
    batch_size: int = 0  # sequences in that step
    num_adapters: int = 0  # distinct adapters in that step
    error: str = ""
    error_code: str = ""
    retry_after_s: float = 0.0
    logprobs: tuple[TokenLogprob, ...] = ()  # one per token, where they were asked for


class Step(Message, frozen=True):
    """All news of one step for one router."""

    items: tuple[Progress, ...]


class Rejected(Message, frozen=True):
    """The replica takes nothing new (it drains): place the request elsewhere."""

    request_id: str


class Trial(Message, frozen=True):
    """From now on only this suspect is computed; "": that is over. If the replica ends in between, it did it.

    Every router of the replica hears of it, before anything is computed.
    """

    request_id: str


# replica -> host process
class ReplicaHello(Message, frozen=True):
    replica_id: str
    pid: int


class ReplicaReady(Message, frozen=True):
    address: str
    stages: dict[str, float]


class ReplicaLoad(Message, frozen=True):
    """What a replica says of itself; the same fields of ReplicaInfo say what they are."""

    num_running: int
    num_waiting: int
    num_steps: int
    digests: tuple[str, ...]
    num_tokens: int = 0
    num_requests: int = 0  # that came since it started
    num_adapters_in_use: int = 0
    num_slots: int = 0
    adapter_bytes: int = 0
    kv_tokens: int = 0
    max_kv_tokens: int = 0


class FetchAdapter(Message, frozen=True):
    adapter: AdapterRef


class AdapterMapped(Message, frozen=True):
    """The file of AdapterReady is mapped, or was not wanted any more."""

    digest: str


class Evicted(Message, frozen=True):
    """The adapter of an Evict is in no slot any more; ``was_active``: it had been in one."""

    digest: str
    was_active: bool


# host process -> replica
class Drain(Message, frozen=True):
    timeout_s: float


class AdapterReady(Message, frozen=True):
    """The prepared file of an adapter, there until AdapterMapped."""

    digest: str
    path: str
    download_s: float
    load_s: float


class AdapterUnavailable(Message, frozen=True):
    """The adapter can't be had from the store's objects under ``key``; another user's may be sound."""

    digest: str
    key: str
    message: str
    code: str
    retry_after_s: float  # 0: there is no use in asking again


class Evict(Message, frozen=True):
    """Empty the adapter's slot as soon as no sequence uses it. Answered by Evicted."""

    digest: str


# host process <-> parked process
class Fork(Message, frozen=True):
    """Become, in a child, this replica."""

    replica_id: str
    device: str
    address: str  # Unix socket to serve on
    host_socket: str
    options: HostOptions


class Forked(Message, frozen=True):
    replica_id: str
    pid: int
    instead_of_fork: str = ""  # why it is a fresh process, where it should have been forked


class ForkRefused(Message, frozen=True):
    """Forking is not safe, or the system refuses it; the parked process stays."""

    replica_id: str
    reason: str


class Reaped(Message, frozen=True):
    replica_id: str
    pid: int
    exit_code: int  # negative: the signal that ended it
    reason: str = ""  # what it said itself, where it could


class Parked(Message, frozen=True):
    """The parked process is ready to fork."""

    pid: int
    stages: dict[str, float]


class ParkFailed(Message, frozen=True):
    """It can't get ready, and leaves."""

    message: str


RouterToHost = Hello | Wake | Unheld | Forget | Hold | Prefetch | StatusRequest
HostToRouter = Welcome | Refused | Replicas | WakeFailed | Forgotten | Status
RouterToReplica = Submit | Cancel | ForgetUser
ReplicaToRouter = Step | Rejected | Trial
ReplicaToHost = ReplicaHello | ReplicaReady | ReplicaLoad | FetchAdapter | AdapterMapped | Evicted
HostToReplica = Drain | AdapterReady | AdapterUnavailable | Evict
HostToParked = Fork
ParkedToHost = Parked | ParkFailed | Forked | ForkRefused | Reaped
