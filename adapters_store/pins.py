"""Pins: adapters that no machine evicts, for a time or until they are taken away."""

from __future__ import annotations

from sqlalchemy import Connection, or_, select

from tunefleet.adapters_store import adapter_rows
from tunefleet.adapters_store.records import AdapterName, PinnedAdapter
from tunefleet.adapters_store.schema import adapters, versions
from tunefleet.adapters_store.times import normalized
from tunefleet.core import Pin
from tunefleet.errors import RequestInvalid

TIERS = ("disk", "host")


def put(connection: Connection, adapter: AdapterName, pin: Pin, *, now: str) -> None:
    if pin.tier not in TIERS:
        raise RequestInvalid("tier must be disk or host", code="invalid_tier", param="tier")
    until = None if pin.until is None else _checked_until(pin.until, now)
    row = adapter_rows.lock(connection, adapter)
    adapter_rows.change(connection, row.adapter_id, pin_tier=pin.tier, pin_until=until)


def clear(connection: Connection, adapter: AdapterName) -> None:
    row = adapter_rows.lock(connection, adapter)
    adapter_rows.change(connection, row.adapter_id, pin_tier=None, pin_until=None)


def pinned(connection: Connection, base: str, *, limit: int, now: str) -> list[PinnedAdapter]:
    """Live and canary versions of the pinned adapters of a base; a digest comes once per adapter."""
    query = (
        select(versions, adapters.c.tenant, adapters.c.pin_tier)
        .join_from(
            adapters,
            versions,
            (versions.c.adapter_id == adapters.c.adapter_id)
            & versions.c.version.in_([adapters.c.live_version, adapters.c.canary_version]),
        )
        .where(
            adapters.c.base == base,
            adapters.c.pin_tier.is_not(None),
            or_(adapters.c.pin_until.is_(None), adapters.c.pin_until > now),
        )
        .order_by(adapters.c.adapter_id, versions.c.version)
        .limit(limit)
    )
    rows = connection.execute(query)
    return [PinnedAdapter(adapter_rows.ref(row.tenant, row), row.pin_tier) for row in rows]


def _checked_until(until: str, now: str) -> str:
    try:
        checked = normalized(until)
    except (ValueError, OverflowError) as error:
        raise RequestInvalid(
            f"until must be a time like 2026-11-24T12:00:00Z: {error}", code="invalid_until", param="until"
        ) from error
    if checked <= now:
        raise RequestInvalid(f"until is over: it is {now} now", code="invalid_until", param="until")
    return checked
