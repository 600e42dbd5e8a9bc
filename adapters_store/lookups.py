"""The question of every request: which adapter answers for this user? One SELECT by unique indexes."""

from __future__ import annotations

import hashlib
from typing import Any

from sqlalchemy import Connection, Row, Select, bindparam, select
from sqlalchemy.sql.selectable import FromClause

from tunefleet.adapters_store import adapter_names, adapter_rows
from tunefleet.adapters_store.records import AdapterName, LiveAdapter
from tunefleet.adapters_store.schema import adapters, users, versions

_VERSION_COLUMNS = ("version", "digest", "object_key", "weights_sha256", "size_bytes", "rank")
_canaries = versions.alias("canary")


def live(connection: Connection, adapter: AdapterName, session: str | None) -> LiveAdapter:
    """The live version; for the sessions that a canary gets, the canary's."""
    row = connection.execute(_LIVE if session is None else _LIVE_OR_CANARY, adapter._asdict()).one_or_none()
    if row is None or row.digest is None:
        fallback = row.fallback if row is not None else None
        raise adapter_names.not_found(adapter, row, fallback)
    if session is not None and row.canary_digest is not None:
        if share(row.adapter_id, session) < row.canary_percent:
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


def _canary(adapter: AdapterName, row: Row[Any]) -> LiveAdapter:
    columns = {name: getattr(row, f"canary_{name}") for name in _VERSION_COLUMNS if name != "version"}
    ref = adapter_rows.AdapterRef(
        digest=columns["digest"],
        tenant=adapter.tenant,
        key=columns["object_key"],
        weights_sha256=columns["weights_sha256"],
        size_bytes=columns["size_bytes"],
        rank=columns["rank"],
    )
    return LiveAdapter(ref, row.canary_version, row.fallback)


def _lookup(on_version: Any) -> Select[*tuple[Any, ...]]:
    """User, then adapter, then version, each by its unique index; columns of missing ones are NULL."""
    columns = [users.c.fallback, adapters.c.adapter_id, adapters.c.last_version]
    columns += [versions.c[name] for name in _VERSION_COLUMNS]
    return (
        select(*columns)
        .select_from(_joined(on_version))
        .where(users.c.tenant == bindparam("tenant"), users.c.user_id == bindparam("user_id"))
    )


def _joined(on_version: Any) -> FromClause:
    return users.outerjoin(
        adapters,
        (adapters.c.tenant == users.c.tenant)
        & (adapters.c.user_id == users.c.user_id)
        & (adapters.c.name == bindparam("name"))
        & (adapters.c.base == bindparam("base")),
    ).outerjoin(
        versions, (versions.c.adapter_id == adapters.c.adapter_id) & (versions.c.version == on_version)
    )


def _lookup_with_canary() -> Select[*tuple[Any, ...]]:
    columns = [_canaries.c[name].label(f"canary_{name}") for name in _VERSION_COLUMNS]
    joined = _joined(adapters.c.live_version).outerjoin(
        _canaries,
        (_canaries.c.adapter_id == adapters.c.adapter_id)
        & (_canaries.c.version == adapters.c.canary_version),
    )
    found = _LIVE.add_columns(adapters.c.canary_percent, *columns)
    return found.select_from(joined)


_LIVE = _lookup(adapters.c.live_version)
_NUMBERED = _lookup(bindparam("number"))
_LIVE_OR_CANARY = _lookup_with_canary()
