"""What the catalog answers with, and is told."""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec

from tunefleet.core import AdapterRef, Canary, Pin, PinTier


class AdapterName(NamedTuple):
    """What an adapter is called: one adapter per tenant, user, name and base."""

    tenant: str
    user_id: str
    name: str
    base: str


class NewVersion(msgspec.Struct, frozen=True, kw_only=True):
    """An upload whose objects are stored."""

    digest: str
    object_key: str
    config_sha256: str
    weights_sha256: str
    size_bytes: int
    rank: int
    target_modules: tuple[str, ...]
    warnings: tuple[str, ...]
    metadata: dict[str, object]


class VersionRecord(NewVersion, frozen=True, kw_only=True):
    """A version as the catalog knows it."""

    version: int
    live: bool
    created_at: str


class Added(NamedTuple):
    record: VersionRecord
    created: bool  # False: the newest version had this digest already


class LiveAdapter(NamedTuple):
    """The answer to a request's question."""

    ref: AdapterRef
    version: int
    fallback: str | None  # the user's own setting


class AdapterRecord(NamedTuple):
    """An adapter: its live version, and what else was decided about it."""

    record: VersionRecord
    canary: Canary | None
    pin: Pin | None  # None too when its time is over


class PinnedAdapter(NamedTuple):
    ref: AdapterRef
    tier: PinTier


class UserRecord(NamedTuple):
    user_id: str
    num_adapters: int
    created_at: str
    fallback: str | None
    limits: dict[str, object]
    metadata: dict[str, object]


class UploadRecord(msgspec.Struct, frozen=True, kw_only=True):
    """An upload that has begun: its objects may exist, its version doesn't yet."""

    upload_id: str
    object_key: str  # prefix of what it writes
    kind: Literal["push", "staged"]
    promote: bool
    metadata: dict[str, object]
    created_at: str
    expires_at: str


class DeletionRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What was taken out of the catalog, and how far its copies are gone."""

    deletion_id: str
    tenant: str
    user_id: str | None  # None once it is done
    name: str | None  # None: all of the user
    version: int | None
    status: Literal["pending", "done"]
    digests: tuple[str, ...]
    prefixes: tuple[str, ...]  # of object keys
    unnoted: tuple[str, ...]  # those prefixes whose objects may still be there
    removed: dict[str, int]  # place -> copies
    kept: tuple[str, ...]  # what stayed, where and why
    requested_at: str
    finished_at: str | None
