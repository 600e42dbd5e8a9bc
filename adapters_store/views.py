"""The catalog's records as people see them."""

from __future__ import annotations

import msgspec

from tunefleet.adapters_store.records import (
    AdapterName,
    AdapterRecord,
    DeletionRecord,
    UserRecord,
    VersionRecord,
)
from tunefleet.core import Adapter, Receipt, User, Version


def version(adapter: AdapterName, record: VersionRecord) -> Version:
    return Version(
        user_id=adapter.user_id,
        name=adapter.name,
        version=record.version,
        digest=record.digest,
        base=adapter.base,
        size_bytes=record.size_bytes,
        rank=record.rank,
        target_modules=record.target_modules,
        live=record.live,
        metadata=record.metadata,
        warnings=record.warnings,
        created_at=record.created_at,
    )


def adapter(name: AdapterName, found: AdapterRecord) -> Adapter:
    live = msgspec.structs.asdict(version(name, found.record))
    return Adapter(canary=found.canary, pin=found.pin, **live)


def user(record: UserRecord) -> User:
    return User(**record._asdict())


def receipt(record: DeletionRecord) -> Receipt:
    return Receipt(
        deletion_id=record.deletion_id,
        status=record.status,
        user_id=record.user_id,
        name=record.name,
        version=record.version,
        digests=record.digests,
        removed=record.removed,
        kept=record.kept,
        requested_at=record.requested_at,
        finished_at=record.finished_at,
    )
