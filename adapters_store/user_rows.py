"""Users in the catalog. A user's row is the lock of all that is the user's: writers take it first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from sqlalchemy import Connection, Select, func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.sql.schema import Table

from tunefleet.adapters_store.records import UserRecord
from tunefleet.adapters_store.schema import adapters, tenants, users
from tunefleet.errors import AdapterNotFound, RequestInvalid

FALLBACKS = ("none", "base", None)


def page(connection: Connection, tenant: str, *, after: str | None, limit: int) -> list[UserRecord]:
    query = _records(tenant).order_by(users.c.user_id).limit(limit)
    if after is not None:
        query = query.where(users.c.user_id > after)
    return [UserRecord(*row) for row in connection.execute(query)]


def find(connection: Connection, tenant: str, user_id: str) -> UserRecord:
    row = connection.execute(_records(tenant).where(users.c.user_id == user_id)).one_or_none()
    if row is None:
        raise not_found(user_id)
    return UserRecord(*row)


def update(
    connection: Connection, tenant: str, user_id: str, changes: Mapping[str, object], *, now: str
) -> UserRecord:
    """Changes what is not UNSET; makes the user if there is none."""
    given = {key: value for key, value in changes.items() if value is not msgspec.UNSET}
    if given.get("fallback") not in FALLBACKS:
        raise RequestInvalid("fallback must be none, base or null", code="invalid_fallback", param="fallback")
    make(connection, tenant, user_id, now=now)
    if given:
        own = (users.c.tenant == tenant) & (users.c.user_id == user_id)
        connection.execute(users.update().where(own).values(**given))
    return find(connection, tenant, user_id)


def lock(connection: Connection, tenant: str, user_id: str) -> bool:
    """Waits for other writers of this user; False if there is no such user."""
    own = (users.c.tenant == tenant) & (users.c.user_id == user_id)
    return connection.execute(select(users.c.user_id).where(own).with_for_update()).one_or_none() is not None


def make(connection: Connection, tenant: str, user_id: str, *, now: str) -> None:
    """Locks the user, made with the tenant where there was none."""
    while not lock(connection, tenant, user_id):  # again: it may be deleted just after it was there
        insert_new(connection, tenants, tenant=tenant, created_at=now)
        values = {"limits": {}, "metadata": {}, "created_at": now}
        insert_new(connection, users, tenant=tenant, user_id=user_id, **values)


def insert_new(connection: Connection, table: Table, **values: object) -> bool:
    """Inserts a row unless one with its key is there; whether it did."""
    insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    return connection.execute(insert(table).values(**values).on_conflict_do_nothing()).rowcount == 1


def not_found(user_id: str) -> AdapterNotFound:
    return AdapterNotFound(f"there is no user {user_id!r}", code="user_not_found", param="user_id")


def _records(tenant: str) -> Select[*tuple[Any, ...]]:
    num_adapters = (
        select(func.count())
        .where(adapters.c.tenant == users.c.tenant, adapters.c.user_id == users.c.user_id)
        .scalar_subquery()
    )
    return select(
        users.c.user_id,
        num_adapters,
        users.c.created_at,
        users.c.fallback,
        users.c.limits,
        users.c.metadata,
    ).where(users.c.tenant == tenant)
