"""Adapters in the catalog: the row that versions, live history, canary and pin belong to."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Row, select

from tunefleet.adapters_store import adapter_names, user_rows
from tunefleet.adapters_store.records import AdapterName, AdapterRecord
from tunefleet.adapters_store.schema import adapters, versions
from tunefleet.adapters_store.version_rows import record
from tunefleet.core import AdapterRef, Canary, Pin
from tunefleet.errors import AdapterConflict


def find(connection: Connection, adapter: AdapterName) -> Row[Any] | None:
    return connection.execute(select(adapters).where(adapter_names.is_named(adapter))).one_or_none()


def lock(connection: Connection, adapter: AdapterName) -> Row[Any]:
    """The adapter's row, which nobody else changes until this transaction ends."""
    user_rows.lock(connection, adapter.tenant, adapter.user_id)
    row = find(connection, adapter)
    if row is None:
        raise adapter_names.not_found(adapter)
    return row


def make(connection: Connection, adapter: AdapterName, *, now: str) -> Row[Any]:
    """As ``lock``, made with its user and tenant if this is the first upload."""
    user_rows.make(connection, adapter.tenant, adapter.user_id, now=now)
    row = find(connection, adapter)
    if row is None:
        connection.execute(adapters.insert().values(**adapter._asdict(), last_version=0, created_at=now))
        row = connection.execute(select(adapters).where(adapter_names.is_named(adapter))).one()
    return row


def change(connection: Connection, adapter_id: int, **values: object) -> None:
    connection.execute(adapters.update().where(adapters.c.adapter_id == adapter_id).values(**values))


def whole(connection: Connection, adapter: AdapterName, *, now: str) -> AdapterRecord:
    """The adapter with its live version.

    Raises:
        AdapterNotFound: no such adapter, or nothing of it is live.
    """
    query = (
        select(versions, *(adapters.c[name] for name in _DECIDED))
        .join_from(
            adapters,
            versions,
            (versions.c.adapter_id == adapters.c.adapter_id)
            & (versions.c.version == adapters.c.live_version),
        )
        .where(adapter_names.is_named(adapter))
    )
    row = connection.execute(query).one_or_none()
    if row is None:
        raise adapter_names.not_found(adapter, find(connection, adapter))
    canary = Canary(row.canary_version, row.canary_percent) if row.canary_version is not None else None
    tier, until = row.pin_tier, row.pin_until
    pin = Pin(tier, until) if tier is not None and (until is None or until > now) else None
    return AdapterRecord(record(row, row.live_version), canary, pin)


def ref(tenant: str, row: Row[Any]) -> AdapterRef:
    """What the machine's side needs, out of a row with a version's columns."""
    return AdapterRef(row.digest, tenant, row.object_key, row.weights_sha256, row.size_bytes, row.rank)


def check_live(adapter: AdapterName, live_version: int | None, expected: int | None) -> None:
    """Raises AdapterConflict if a live version is ``expected`` and another one is."""
    if expected is None or live_version == expected:
        return
    what = "no version" if live_version is None else f"version {live_version}"
    raise AdapterConflict(
        f"{what} of {adapter.user_id!r} is live, not {expected}: look again, then retry",
        code="live_version_changed",
        param="if_live",
    )


_DECIDED = ("live_version", "canary_version", "canary_percent", "pin_tier", "pin_until")
