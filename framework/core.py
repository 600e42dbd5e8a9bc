"""Frozen values that every layer shares. Imports nothing of ours but errors."""

from __future__ import annotations

import enum
import re
from typing import Literal

import msgspec

from tunefleet.errors import RequestInvalid

DEFAULT_TENANT = "default"
DEFAULT_ADAPTER = "default"

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE)  # an adapter, as PEFT saves it
PinTier = Literal["disk", "host"]
MAX_METADATA_BYTES = 4096  # of what is kept with an upload, as JSON

_USER_ID = re.compile(r"[A-Za-z0-9._~@:+=|\-]{1,128}")
_TENANT = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_RESERVED_TENANTS = {"catalogs", "staging"}
_ADAPTER_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


def check_user_id(user_id: str) -> str:
    """Returns ``user_id`` unchanged, or raises RequestInvalid (code ``invalid_user_id``)."""
    if _USER_ID.fullmatch(user_id) and user_id not in {".", ".."}:
        return user_id
    raise RequestInvalid(
        "user_id must be 1 to 128 of A-Z a-z 0-9 . _ ~ @ : + = | - and not '.' or '..'",
        code="invalid_user_id",
        param="user_id",
    )


def check_adapter_name(name: str) -> str:
    """Returns ``name`` unchanged, or raises RequestInvalid (code ``invalid_adapter_name``)."""
    if _ADAPTER_NAME.fullmatch(name):
        return name
    raise RequestInvalid(
        "an adapter's name must match [a-z0-9][a-z0-9_-]{0,63}", code="invalid_adapter_name", param="name"
    )


def check_tenant(tenant: str) -> str:
    """Returns ``tenant`` unchanged, or raises RequestInvalid (code ``invalid_tenant``).

    A tenant's objects lie below its id in the store, beside what is nobody's.
    """
    if _TENANT.fullmatch(tenant) and tenant not in _RESERVED_TENANTS:
        return tenant
    raise RequestInvalid(
        "a tenant's id must match [a-z0-9][a-z0-9_-]{0,63} and not be "
        + " or ".join(repr(name) for name in sorted(_RESERVED_TENANTS)),
        code="invalid_tenant",
        param="tenant",
    )


class LinearSpec(msgspec.Struct, frozen=True):
    """One linear layer of the base that an adapter may target.

    ``fan_in_fan_out`` is True where the base stores the weight as [in, out] (GPT-2's Conv1D).
    """

    in_features: int
    out_features: int
    fan_in_fan_out: bool = False


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a base model without loading it; ``manifest.json`` of a prepared base."""

    base_id: str  # "<name>@<first 12 hex of weights_sha256>": the catalog's key for adapters of this base
    name: str  # what people call it, e.g. "SmolLM2-135M-Instruct"
    architecture: str  # transformers class, e.g. "LlamaForCausalLM"
    dtype: str  # of the prepared weights: float32, bfloat16 or float16
    weights_sha256: str  # of the source weights, independent of dtype
    hidden_size: int
    num_layers: int
    vocab_size: int
    max_model_len: int  # tokens
    eos_token_ids: tuple[int, ...]
    linears: dict[str, LinearSpec]  # module path, e.g. "model.layers.0.self_attn.q_proj"
    probe_max_diff: float  # largest logit difference to plain transformers, fp32
    kv_bytes_per_token: int = 0  # of keys and values in all layers; 0: prepared before this was noted


class AdapterRef(msgspec.Struct, frozen=True):
    """All that the machine's side needs to fetch one adapter; the digest is its identity."""

    digest: str  # 64 hex
    tenant: str
    key: str  # prefix of its two objects in the store
    weights_sha256: str
    size_bytes: int
    rank: int  # largest over its modules


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to choose tokens. ``temperature`` 0 is greedy; ``top_k`` 0, ``top_p`` 1 and ``min_p`` 0 are off.

    ``logprobs``: so many likeliest alternatives with each token; 0: only its own; None: nothing.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0  # least probability, as a part of the likeliest token's
    logprobs: int | None = None
    seed: int = 0  # the token at index i depends on (seed, i) and the logits only
    ignore_eos: bool = False


class FinishReason(enum.StrEnum):
    STOP = "stop"  # end-of-sequence token or a stop string
    LENGTH = "length"  # max_tokens, or the context is full
    ERROR = "error"
    CANCELLED = "cancelled"


class ColdStart(enum.StrEnum):
    NONE = "none"  # a READY replica had the adapter in a slot
    ADAPTER = "adapter"  # the adapter was not in a slot
    BASE = "base"  # no replica was READY


class ReplicaState(enum.StrEnum):
    """A replica's life; only runtime.host changes it."""

    NEW = "new"  # asked for, no process yet
    STARTING = "starting"  # the process exists and maps the base
    READY = "ready"  # takes requests
    DRAINING = "draining"  # finishes what it has, takes nothing new
    STOPPED = "stopped"  # the process is gone, on purpose
    FAILED = "failed"  # the process is gone, not on purpose


class ReplicaInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What routers and ``/v1/replicas`` see of one replica."""

    replica_id: str
    state: ReplicaState
    address: str  # opaque, for runtime.addresses alone; empty before READY
    device: str
    pid: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_steps: int = 0
    num_tokens: int = 0  # that it generated; whoever looks twice knows how fast it is
    num_requests: int = 0  # that came since it started
    digests: tuple[str, ...] = ()  # adapters in slots
    num_adapters: int = 0  # as many digests, for those who may not see them
    num_adapters_in_use: int = 0  # of them, by running sequences
    num_slots: int = 0
    adapter_bytes: int = 0  # of device memory that the adapters' slots take
    kv_tokens: int = 0  # that rows in use have room for
    max_kv_tokens: int = 0
    since: float = 0.0  # unix seconds when it came into its state
    started_at: float = 0.0  # unix seconds
    stages: dict[str, float] = {}  # seconds of each stage of its start


class ReplicaStart(msgspec.Struct, frozen=True, kw_only=True):
    """A start that ended in a READY replica, which may be gone by now."""

    replica_id: str
    device: str
    ready_at: float  # unix seconds
    stages: dict[str, float]  # seconds


class LoggedError(msgspec.Struct, frozen=True, kw_only=True):
    """Something of the machine that failed."""

    at: float  # unix seconds
    message: str


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


class Version(msgspec.Struct, frozen=True, kw_only=True):
    """One upload, as people see it."""

    user_id: str
    name: str
    version: int
    digest: str
    base: str
    size_bytes: int
    rank: int
    target_modules: tuple[str, ...]
    live: bool
    metadata: dict[str, object]
    warnings: tuple[str, ...]
    created_at: str  # RFC 3339, UTC


class Canary(msgspec.Struct, frozen=True):
    """A version that answers a share of an adapter's sessions."""

    version: int
    percent: float  # of sessions, above 0 to 100


class Pin(msgspec.Struct, frozen=True):
    """Exempt from eviction on every machine, down to ``tier``."""

    tier: PinTier
    until: str | None = None  # RFC 3339; None: until it is taken away


class Adapter(Version, frozen=True, kw_only=True):
    """The live version, and what else was decided about its adapter."""

    canary: Canary | None = None
    pin: Pin | None = None


class UploadFile(msgspec.Struct, frozen=True, kw_only=True):
    """How one file of an upload is sent: this request, with the file as its body."""

    url: str  # absolute, or a path of this server
    method: str
    headers: dict[str, str]


class UploadTicket(msgspec.Struct, frozen=True, kw_only=True):
    """An upload that was begun: put the files, then complete it."""

    upload_id: str
    files: dict[str, UploadFile]  # by name: adapter_config.json, adapter_model.safetensors
    expires_at: str  # RFC 3339, UTC


class Receipt(msgspec.Struct, frozen=True, kw_only=True):
    """What a deletion did, where. ``pending`` until every place has answered; it goes on by itself."""

    deletion_id: str
    status: Literal["pending", "done"]
    user_id: str | None  # None once it is done: nothing of the user is kept
    name: str | None  # None: all of the user
    version: int | None
    digests: tuple[str, ...]
    removed: dict[str, int]  # place -> copies: versions, uploads, objects, disk, host, device, streams
    kept: tuple[str, ...]  # what stayed, where and why
    requested_at: str
    finished_at: str | None = None


class User(msgspec.Struct, frozen=True, kw_only=True):
    """A user, as people see them."""

    user_id: str
    num_adapters: int
    created_at: str  # RFC 3339, UTC
    fallback: str | None = None  # none or base; None: the deployment's option
    limits: dict[str, object] = {}
    metadata: dict[str, object] = {}
