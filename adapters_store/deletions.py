"""Deletions: one transaction takes all out of the catalog, and notes what must go elsewhere.

The row stays as the receipt. Its items are prefixes of object keys to remove; every router says for its
machine that copies are dropped and streams ended. When all have, the user's id goes from the row too.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import Connection, Row, Select, or_, select

from tunefleet.adapters_store import (
    adapter_names,
    adapter_rows,
    live_history,
    routers,
    upload_intents,
    user_rows,
)
from tunefleet.adapters_store.deletion_records import records
from tunefleet.adapters_store.records import AdapterName, DeletionRecord
from tunefleet.adapters_store.schema import (
    adapters,
    deletion_acks,
    deletion_items,
    deletions,
    upload_keys,
    users,
    versions,
)
from tunefleet.adapters_store.times import timestamp
from tunefleet.errors import AdapterConflict, AdapterNotFound


class _Item(NamedTuple):
    prefix: str
    digest: str | None


def delete_version(connection: Connection, adapter: AdapterName, version: int, *, now: str) -> DeletionRecord:
    row = adapter_rows.lock(connection, adapter)
    _check_idle(adapter, row, version)
    own = (versions.c.adapter_id == row.adapter_id) & (versions.c.version == version)
    gone = connection.execute(select(versions.c.object_key, versions.c.digest).where(own)).one_or_none()
    if gone is None:
        raise adapter_names.no_version(adapter, version)
    live_history.forget(connection, row.adapter_id, version)
    connection.execute(versions.delete().where(own))
    whose = {
        "tenant": adapter.tenant,
        "user_id": adapter.user_id,
        "name": adapter.name,
        "version": version,
    }
    return _request(connection, whose, [_Item(*gone)], {"versions": 1}, now=now)


def delete_user(connection: Connection, tenant: str, user_id: str, *, now: str) -> DeletionRecord:
    exists = user_rows.lock(connection, tenant, user_id)
    coming = upload_intents.take(connection, tenant, user_id)
    if not exists and not user_rows.lock(connection, tenant, user_id) and not coming:  # a first commit since?
        raise user_rows.not_found(user_id)
    gone = _take_adapters(connection, tenant, user_id)
    connection.execute(users.delete().where(users.c.tenant == tenant, users.c.user_id == user_id))
    whose = {"tenant": tenant, "user_id": user_id}
    items = [*gone, *(_Item(prefix, None) for prefix in coming)]
    removed = {"versions": len(gone), "uploads": len(coming)}
    return _request(connection, whose, items, removed, now=now)


def find(connection: Connection, tenant: str, deletion_id: str) -> DeletionRecord:
    return _found(connection, deletion_id, select(deletions).where(deletions.c.tenant == tenant))


def pending(connection: Connection, *, limit: int, now: str) -> list[DeletionRecord]:
    """Oldest first; those that nobody works on."""
    free = or_(deletions.c.holder.is_(None), deletions.c.held_until <= now)
    return records(connection, _pending().where(free).limit(limit))


def unacked(connection: Connection, router_id: str, *, limit: int) -> list[DeletionRecord]:
    """Oldest first; those that this router has not told of."""
    told = select(deletion_acks.c.router_id).where(
        deletion_acks.c.deletion_id == deletions.c.deletion_id, deletion_acks.c.router_id == router_id
    )
    return records(connection, _pending().where(~told.exists()).limit(limit))


def claim(connection: Connection, deletion_id: str, router_id: str, lease_s: float, *, now: datetime) -> bool:
    free = routers.is_free(deletions.c.holder, deletions.c.held_until, router_id, lease_s, now=now)
    query = (
        deletions.update()
        .where(deletions.c.deletion_id == deletion_id, deletions.c.finished_at.is_(None), free)
        .values(holder=router_id, held_until=timestamp(now, timedelta(seconds=lease_s)))
    )
    return connection.execute(query).rowcount == 1


def note_objects(
    connection: Connection, deletion_id: str, prefix: str, num_objects: int, kept: Sequence[str]
) -> None:
    """An item's objects are gone. The first word counts: a second removal finds less."""
    item = (deletion_items.c.deletion_id == deletion_id) & (deletion_items.c.prefix == prefix)
    query = deletion_items.update().where(item, deletion_items.c.num_objects.is_(None))
    connection.execute(query.values(num_objects=num_objects, kept=list(kept)))


def ack(
    connection: Connection, deletion_id: str, router_id: str, copies: Mapping[str, int], kept: Sequence[str]
) -> None:
    """A router's machine has none of it any more. The first word counts."""
    values = {"deletion_id": deletion_id, "router_id": router_id}
    user_rows.insert_new(connection, deletion_acks, **values, copies=dict(copies), kept=list(kept))


def finish(connection: Connection, deletion_id: str, *, now: str) -> DeletionRecord | None:
    """None while an item or a living router is missing."""
    query = select(deletions).where(deletions.c.deletion_id == deletion_id).with_for_update()
    row = connection.execute(query).one_or_none()
    if row is None:
        raise _not_found(deletion_id)
    if row.finished_at is not None:
        return _found(connection, deletion_id, select(deletions))
    missing = _missing_routers(connection, deletion_id, since=min(row.requested_at, now))
    if any(until > now for until in missing.values()) or _has_open_items(connection, deletion_id):
        return None
    kept = [_died(router_id) for router_id in sorted(missing)]
    values = {"user_id": None, "holder": None, "held_until": None, "finished_at": now, "kept": kept}
    connection.execute(deletions.update().where(deletions.c.deletion_id == deletion_id).values(**values))
    return _found(connection, deletion_id, select(deletions))


def _check_idle(adapter: AdapterName, row: Row[Any], version: int) -> None:
    whose = f"version {version} of {adapter.user_id!r}"
    if row.live_version == version:
        raise AdapterConflict(
            f"{whose} is live: promote another one first, or delete the user",
            code="version_is_live",
            param="version",
        )
    if row.canary_version == version:
        raise AdapterConflict(
            f"{whose} is the canary: end the canary first", code="version_is_canary", param="version"
        )


def _take_adapters(connection: Connection, tenant: str, user_id: str) -> list[_Item]:
    """Removes all adapters of a user, with everything that is theirs."""
    own = (adapters.c.tenant == tenant) & (adapters.c.user_id == user_id)
    gone: list[_Item] = []
    for adapter_id in connection.execute(select(adapters.c.adapter_id).where(own)).scalars().all():
        stored = select(versions.c.object_key, versions.c.digest).where(versions.c.adapter_id == adapter_id)
        gone.extend(_Item(*row) for row in connection.execute(stored))
        live_history.forget(connection, adapter_id)
        for table in (upload_keys, versions, adapters):
            connection.execute(table.delete().where(table.c.adapter_id == adapter_id))
    return gone


def _request(
    connection: Connection,
    whose: Mapping[str, object],
    items: Iterable[_Item],
    removed: dict[str, int],
    *,
    now: str,
) -> DeletionRecord:
    deletion_id = str(uuid.uuid4())
    values = {"deletion_id": deletion_id, "removed": removed, "kept": [], "requested_at": now}
    connection.execute(deletions.insert().values(**whose, **values))
    rows = [{"deletion_id": deletion_id, **item._asdict(), "kept": []} for item in items]
    if rows:
        connection.execute(deletion_items.insert(), rows)
    return _found(connection, deletion_id, select(deletions))


def _pending() -> Select[*tuple[Any, ...]]:
    return (
        select(deletions)
        .where(deletions.c.finished_at.is_(None))
        .order_by(deletions.c.requested_at, deletions.c.deletion_id)
    )


def _missing_routers(connection: Connection, deletion_id: str, *, since: str) -> dict[str, str]:
    """Routers alive since then that have not told, with the end of their lease."""
    told = select(deletion_acks.c.router_id).where(deletion_acks.c.deletion_id == deletion_id)
    acked = set(connection.execute(told).scalars())
    leases = routers.leases_after(connection, since)
    return {router_id: until for router_id, until in leases.items() if router_id not in acked}


def _has_open_items(connection: Connection, deletion_id: str) -> bool:
    query = select(deletion_items.c.prefix).where(
        deletion_items.c.deletion_id == deletion_id, deletion_items.c.num_objects.is_(None)
    )
    return connection.execute(query.limit(1)).one_or_none() is not None


def _died(router_id: str) -> str:
    return f"router {router_id} died before it told: its machine drops its copies when it starts again"


def _found(connection: Connection, deletion_id: str, query: Select[*tuple[Any, ...]]) -> DeletionRecord:
    found = records(connection, query.where(deletions.c.deletion_id == deletion_id))
    if not found:
        raise _not_found(deletion_id)
    return found[0]


def _not_found(deletion_id: str) -> AdapterNotFound:
    return AdapterNotFound(
        f"there is no deletion {deletion_id!r}", code="deletion_not_found", param="deletion_id"
    )
