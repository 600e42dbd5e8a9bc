"""What an inference answer says besides its text; the same in the library, over HTTP and in the clients."""

from __future__ import annotations

import msgspec

from tunefleet.core import ColdStart, FinishReason, LoggedError, ReplicaInfo, ReplicaStart, Usage

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


class TopLogprob(msgspec.Struct, frozen=True):
    """A token that was likely at one place of an answer; a model's own probability, before any cuts."""

    token: str  # its text; what is only a part of a character as \\xf0\\x9f
    logprob: float  # natural logarithm; -9999.0: impossible
    bytes: tuple[int, ...] | None  # None: a control token, which writes nothing


class Logprob(TopLogprob, frozen=True):
    """The token that was chosen. The bytes of all of them are the answer's text, up to a stop string."""

    top_logprobs: tuple[TopLogprob, ...] = ()  # as many as were asked for, likeliest first
    text_offset: int | None = None  # characters of the text before the token's; chats over HTTP don't tell


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    """One of the ``n`` answers to a request."""

    index: int
    text: str
    finish_reason: FinishReason
    logprobs: tuple[Logprob, ...] | None = None  # None: not asked for


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer: ``n`` choices, of which the first is what is read where one is expected."""

    choices: tuple[Choice, ...]  # by index
    usage: Usage  # of all choices; the prompt counts once
    served: Served

    @property
    def text(self) -> str:
        return self.choices[0].text

    @property
    def finish_reason(self) -> FinishReason:
        return self.choices[0].finish_reason

    @property
    def logprobs(self) -> tuple[Logprob, ...] | None:
        return self.choices[0].logprobs

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
    index: int = 0  # of the choice that goes on
    logprobs: tuple[Logprob, ...] | None = None  # of the tokens whose text begins here; None: not asked for
    finish_reason: FinishReason | None = None  # with the last piece of each choice
    usage: Usage | None = None
    served: Served | None = None


class TierUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Copies of adapters in one tier of a machine."""

    num_adapters: int
    used_bytes: int
    max_bytes: int


class FleetStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What runs where, on this router's machine."""

    version: str  # of tunefleet
    versions: dict[str, str]  # of what it runs on, by package
    base: str
    base_id: str
    max_model_len: int  # tokens
    at_zero: bool  # no replica has a process, nothing is on a device
    replicas: tuple[ReplicaInfo, ...]
    num_held: int  # requests that wait for a replica
    tiers: dict[str, TierUsage]  # device (of all replicas), host, disk
    host_pid: int
    parked_pid: int  # 0: there is no parked process now
    pss_bytes: dict[str, int]  # proportional memory of host and parked process
    starts: tuple[ReplicaStart, ...] = ()  # the latest ones, the last one last
    errors: tuple[LoggedError, ...] = ()  # the latest ones, the last one last


class Warm(msgspec.Struct, frozen=True, kw_only=True):
    """A replica is READY, and the adapter on its device."""

    seconds: float
    adapter_digest: str  # or "base"
