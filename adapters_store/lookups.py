"""The question of every request: which adapter answers for this user? One SELECT by unique indexes."""

from __future__ import annotations

import hashlib
from typing import Any

from sqlalchemy import ColumnElement, Connection, Join, Row, Select, bindparam, select

from tunefleet.adapters_store import adapter_names, adapter_rows
from tunefleet.adapters_store.records import AdapterName, LiveAdapter
from tunefleet.adapters_store.schema import adapters, users, versions
from tunefleet.core import AdapterRef

_VERSION_COLUMNS = ("version", "digest", "object_key", "weights_sha256", "size_bytes", "rank")
_canaries = versions.alias("canary")


def live(connection: Connection, adapter: AdapterName, session: str | None) -> LiveAdapter:
    """The live version; for the sessions that a canary gets, the canary's."""
    row = connection.execute(_LIVE if session is None else _LIVE_OR_CANARY, adapter._asdict()).one_or_none()
    if row is None or row.digest is None:
        fallback = row.fallback if row is not None else None
        raise adapter_names.not_found(adapter, row, fallback)
    if session is not None and row.canary_digest is not None and _is_for_canary(row, session):
        return _canary(adapter, row)
    return LiveAdapter(adapter_rows.ref(adapter.tenant, row), row.version, row.fallback)


def numbered(connection: Connection, adapter: AdapterName, version: int) -> LiveAdapter:
    row = connection.execute(_NUMBERED, {**adapter._asdict(), "number": version}).one_or_none()
    if row is None or row.digest is None:
        raise adapter_names.no_version(adapter, version, row.fallback if row is not None else None)
    return LiveAdapter(adapter_rows.ref(adapter.tenant, row), row.version, row.fallback)


def share(adapter_id: int, session: str) -> float:
    """A session's place among an adapter's sessions, from 0 to below 100: the same on every router."""
    digest = hashlib.sha256(f"{adapter_id}\n{session}".encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48 * 100


def _is_for_canary(row: Row[Any], session: str) -> bool:
    return bool(share(row.adapter_id, session) < row.canary_percent)


def _canary(adapter: AdapterName, row: Row[Any]) -> LiveAdapter:
    ref = AdapterRef(
        digest=row.canary_digest,
        tenant=adapter.tenant,
        key=row.canary_object_key,
        weights_sha256=row.canary_weights_sha256,
        size_bytes=row.canary_size_bytes,
        rank=row.canary_rank,
    )
    return LiveAdapter(ref, row.canary_version, row.fallback)


def _joined(on_version: ColumnElement[int]) -> Join:
    """User, then adapter, then version, each by its unique index; columns of missing ones are NULL."""
    return users.outerjoin(
        adapters,
        (adapters.c.tenant == users.c.tenant)
        & (adapters.c.user_id == users.c.user_id)
        & (adapters.c.name == bindparam("name"))
        & (adapters.c.base == bindparam("base")),
    ).outerjoin(
        versions, (versions.c.adapter_id == adapters.c.adapter_id) & (versions.c.version == on_version)
    )


def _joined_with_canary() -> Join:
    return _joined(adapters.c.live_version).outerjoin(
        _canaries,
        (_canaries.c.adapter_id == adapters.c.adapter_id)
        & (_canaries.c.version == adapters.c.canary_version),
    )


def _lookup(joined: Join, *more: ColumnElement[Any]) -> Select[*tuple[Any, ...]]:
    columns = [users.c.fallback, adapters.c.adapter_id, adapters.c.last_version]
    columns += [versions.c[name] for name in _VERSION_COLUMNS]
    return (
        select(*columns, *more)
        .select_from(joined)
        .where(users.c.tenant == bindparam("tenant"), users.c.user_id == bindparam("user_id"))
    )


_LIVE = _lookup(_joined(adapters.c.live_version))
_NUMBERED = _lookup(_joined(bindparam("number")))
_LIVE_OR_CANARY = _lookup(
    _joined_with_canary(),
    adapters.c.canary_percent,
    *(_canaries.c[name].label(f"canary_{name}") for name in _VERSION_COLUMNS),
)
