"""Routers that serve from this catalog, and what one of them does at a time.

A router is alive while its lease runs; it renews it. Leases are told by the routers' own clocks, which must
agree within a lease. One that lies further ahead than it could was written before the clock went back.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, Connection, or_, select
from sqlalchemy.sql.elements import KeyedColumnElement

from tunefleet.adapters_store.schema import claims, routers
from tunefleet.adapters_store.times import timestamp
from tunefleet.adapters_store.user_rows import insert_new

REMEMBER = timedelta(days=1)  # routers that are dead


def beat(connection: Connection, router_id: str, lease_s: float, *, now: datetime) -> None:
    """Joins, or goes on; forgets those that died long ago."""
    until = timestamp(now, timedelta(seconds=lease_s))
    if not insert_new(connection, routers, router_id=router_id, leased_until=until):
        mine = routers.c.router_id == router_id
        connection.execute(routers.update().where(mine).values(leased_until=until))
    connection.execute(routers.delete().where(routers.c.leased_until < timestamp(now, -REMEMBER)))


def leave(connection: Connection, router_id: str) -> None:
    connection.execute(routers.delete().where(routers.c.router_id == router_id))
    connection.execute(claims.delete().where(claims.c.holder == router_id))


def leases_after(connection: Connection, time: str) -> dict[str, str]:
    """The routers that were alive after ``time``, and until when each holds its lease."""
    query = select(routers.c.router_id, routers.c.leased_until).where(routers.c.leased_until > time)
    return {row.router_id: row.leased_until for row in connection.execute(query)}


def claim(connection: Connection, name: str, holder: str, lease_s: float, *, now: datetime) -> bool:
    """Takes or renews a named lease; False while another holder has it."""
    until = timestamp(now, timedelta(seconds=lease_s))
    if insert_new(connection, claims, name=name, holder=holder, held_until=until):
        return True
    free = is_free(claims.c.holder, claims.c.held_until, holder, lease_s, now=now)
    query = claims.update().where(claims.c.name == name, free).values(holder=holder, held_until=until)
    return connection.execute(query).rowcount == 1


def is_free(
    holder: KeyedColumnElement[str],
    held_until: KeyedColumnElement[str],
    claimant: str,
    lease_s: float,
    *,
    now: datetime,
) -> ColumnElement[bool]:
    """Nobody's, the claimant's own, run out, or from before the clock went back."""
    latest = timestamp(now, timedelta(seconds=2 * lease_s))
    return or_(holder.is_(None), holder == claimant, held_until <= timestamp(now), held_until > latest)
