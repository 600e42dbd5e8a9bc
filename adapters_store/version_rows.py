"""Versions in the catalog: the n-th upload of an adapter, immutable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Row, Select, select

from tunefleet.adapters_store import adapter_names
from tunefleet.adapters_store.records import AdapterName, VersionRecord
from tunefleet.adapters_store.schema import adapters, uploads, versions

MAX_PER_QUERY = 500  # values in one IN (...)


def record(row: Row[Any], live_version: int | None) -> VersionRecord:
    return VersionRecord(
        digest=row.digest,
        object_key=row.object_key,
        config_sha256=row.config_sha256,
        weights_sha256=row.weights_sha256,
        size_bytes=row.size_bytes,
        rank=row.rank,
        target_modules=tuple(row.target_modules),
        warnings=tuple(row.warnings),
        metadata=row.metadata,
        version=row.version,
        live=row.version == live_version,
        created_at=row.created_at,
    )


def named(connection: Connection, adapter: AdapterName, version: int) -> VersionRecord:
    row = connection.execute(_records(adapter).where(versions.c.version == version)).one_or_none()
    if row is None:
        raise adapter_names.no_version(adapter, version)
    return record(row, row.live_version)


def page(
    connection: Connection, adapter: AdapterName, *, after: int | None, limit: int
) -> list[VersionRecord]:
    query = _records(adapter).order_by(versions.c.version.desc()).limit(limit)
    if after is not None:
        query = query.where(versions.c.version < after)
    return [record(row, row.live_version) for row in connection.execute(query)]


def find(connection: Connection, adapter_id: int, version: int) -> Row[Any] | None:
    query = select(versions).where(versions.c.adapter_id == adapter_id, versions.c.version == version)
    return connection.execute(query).one_or_none()


def newest(connection: Connection, adapter_id: int) -> Row[Any] | None:
    query = (
        select(versions)
        .where(versions.c.adapter_id == adapter_id)
        .order_by(versions.c.version.desc())
        .limit(1)
    )
    return connection.execute(query).one_or_none()


def known_digests(connection: Connection, digests: Sequence[str]) -> set[str]:
    """Those of ``digests`` that a version has, whoever's it is."""
    found: set[str] = set()
    for chunk in _chunks(digests):
        query = select(versions.c.digest).where(versions.c.digest.in_(chunk))
        found.update(connection.execute(query).scalars())
    return found


def referenced(connection: Connection, prefixes: Sequence[str], *, now: str) -> set[str]:
    """Those prefixes of object keys that a version, or an upload that isn't over, refers to."""
    found: set[str] = set()
    for chunk in _chunks(prefixes):
        stored = select(versions.c.object_key).where(versions.c.object_key.in_(chunk))
        coming = select(uploads.c.object_key).where(
            uploads.c.object_key.in_(chunk), uploads.c.expires_at > now
        )
        found.update(connection.execute(coming).scalars())  # first: a commit between the two moves it to
        found.update(connection.execute(stored).scalars())  # the versions
    return found


def _records(adapter: AdapterName) -> Select[*tuple[Any, ...]]:
    """Versions of one adapter with what is live."""
    joined = adapters.join(versions, versions.c.adapter_id == adapters.c.adapter_id)
    query = select(versions, adapters.c.live_version).select_from(joined)
    return query.where(adapter_names.is_named(adapter))


def _chunks(values: Sequence[str]) -> list[Sequence[str]]:
    return [values[start : start + MAX_PER_QUERY] for start in range(0, len(values), MAX_PER_QUERY)]
