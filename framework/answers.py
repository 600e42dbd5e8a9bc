"""What an inference answer says besides its text; the same in the library, over HTTP and in the clients."""

from __future__ import annotations

import msgspec

from tunefleet.core import ColdStart, FinishReason, ReplicaInfo, Usage

BASE_DIGEST = "base"  # the digest of an answer that no adapter took part in


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """Who answered and what it took; the ``tunefleet`` object of answers and last chunks."""

    request_id: str
    user_id: str | None  # whom it is metered on
    adapter_digest: str  # or "base"
    adapter_version: int  # 0: the base
    cold_start: ColdStart
    timing: dict[str, float]  # stage -> seconds: queue, wake, download, load, activate, prefill, first_token
    batch_size: int = 0  # most sequences that it shared a step with, itself included
    num_adapters: int = 0  # most adapters in such a step


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer."""

    text: str
    finish_reason: FinishReason
    usage: Usage
    served: Served

    @property
    def request_id(self) -> str:
        return self.served.request_id

    @property
    def adapter_digest(self) -> str:
        return self.served.adapter_digest

    @property
    def version(self) -> int:
        return self.served.adapter_version

    @property
    def cold_start(self) -> ColdStart:
        return self.served.cold_start

    @property
    def timing(self) -> dict[str, float]:
        return self.served.timing


class Chunk(msgspec.Struct, frozen=True, kw_only=True):
    """A piece of a streamed answer. The last one has all but text, and its text may be empty."""

    text: str
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    served: Served | None = None


class FleetStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What runs where."""

    version: str  # of tunefleet
    base: str
    base_id: str
    max_model_len: int  # tokens
    replicas: tuple[ReplicaInfo, ...]
    host_pid: int
    parked_pid: int
    pss_bytes: dict[str, int]  # proportional memory of host and parked process
    host_tier: dict[str, int]  # digest -> bytes
    last_error: str = ""


class Warm(msgspec.Struct, frozen=True, kw_only=True):
    """A replica is READY, and the adapter on its device."""

    seconds: float
    adapter_digest: str  # or "base"
