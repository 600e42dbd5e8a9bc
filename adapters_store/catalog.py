"""The catalog: who has which adapters, which version is live. SQL decides; objects are dumb.

Synchronous; safe to call from several threads and several processes. Each method is one transaction.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

import msgspec
from sqlalchemy import Connection, Row, Select, bindparam, func, select

from tunefleet.adapters_store.database import Database
from tunefleet.adapters_store.repeats import KEEP, FirstAnswer, UploadKey, first_answer, remember
from tunefleet.adapters_store.schema import adapters, live_history, tenants, users, versions
from tunefleet.core import AdapterRef
from tunefleet.errors import AdapterConflict, AdapterNotFound


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


class UserRecord(NamedTuple):
    user_id: str
    num_adapters: int
    created_at: str


class Catalog:
    """Lives as long as its process serves; ``close`` gives the connections back."""

    def __init__(self, database_url: str, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._database = Database(database_url)
        self._now = now

    def close(self) -> None:
        self._database.close()

    def add_version(
        self, adapter: AdapterName, new: NewVersion, *, promote: bool, key: UploadKey | None = None
    ) -> Added:
        """Records an upload as the next version, unless the newest version has the same digest.

        Raises:
            AdapterConflict: ``key`` was another upload's.
        """
        with self._database.write() as connection:
            row = self._adapter_row(connection, adapter)
            again = self._answered(connection, adapter, row.adapter_id, key)
            if again is not None:
                return again
            newest = _newest(connection, row.adapter_id)
            if newest is not None and newest.digest == new.digest:
                added = Added(_record(newest, row.live_version), created=False)
            else:
                added = Added(self._insert(connection, row, new, promote=promote), created=True)
            if key is not None:
                answer = FirstAnswer(added.record.version, added.created, added.record.live)
                now, since = self._timestamp(), self._timestamp(-KEEP)
                remember(connection, row.adapter_id, key, answer, now=now, since=since)
            return added

    def answered(self, adapter: AdapterName, digest: str, key: UploadKey | None = None) -> Added | None:
        """The answer to an upload that changes nothing, where that is known before it is stored.

        Raises:
            AdapterConflict: ``key`` was another upload's.
        """
        with self._database.read() as connection:
            row = connection.execute(_adapter(adapter)).one_or_none()
            if row is None:
                return None
            if key is not None:
                return self._answered(connection, adapter, row.adapter_id, key)
            newest = _newest(connection, row.adapter_id)
            if newest is None or newest.digest != digest:
                return None
            return Added(_record(newest, row.live_version), created=False)

    def live(self, adapter: AdapterName) -> LiveAdapter:
        """The live version: one SELECT by unique indexes, on every request's path.

        Raises:
            AdapterNotFound: ``fallback`` holds the user's own setting, if there is such a user.
        """
        return self._find(adapter, _LIVE, {})

    def numbered(self, adapter: AdapterName, version: int) -> LiveAdapter:
        """As ``live``, for a version asked for by number."""
        return self._find(adapter, _NUMBERED, {"version": version})

    def version(self, adapter: AdapterName, version: int) -> VersionRecord:
        with self._database.read() as connection:
            return _version(connection, adapter, version)

    def versions(self, adapter: AdapterName, *, after: int | None, limit: int) -> list[VersionRecord]:
        """Newest first; ``after`` is the last number of the page before."""
        query = _records(adapter).limit(limit)
        if after is not None:
            query = query.where(versions.c.version < after)
        with self._database.read() as connection:
            return [_record(row, row.live_version) for row in connection.execute(query)]

    def users(self, tenant: str, *, after: str | None, limit: int) -> list[UserRecord]:
        """By user id; ``after`` is the last id of the page before."""
        query = _users(tenant).order_by(users.c.user_id).limit(limit)
        if after is not None:
            query = query.where(users.c.user_id > after)
        with self._database.read() as connection:
            return [UserRecord(*row) for row in connection.execute(query)]

    def user(self, tenant: str, user_id: str) -> UserRecord:
        with self._database.read() as connection:
            row = connection.execute(_users(tenant).where(users.c.user_id == user_id)).one_or_none()
        if row is None:
            raise AdapterNotFound(f"there is no user {user_id!r}", code="user_not_found", param="user_id")
        return UserRecord(*row)

    def promote(self, adapter: AdapterName, version: int, *, if_live: int | None = None) -> VersionRecord:
        """Makes a version live, in one commit with its history.

        Raises:
            AdapterNotFound: no such version.
            AdapterConflict: ``if_live`` was given and another version is live.
        """
        with self._database.write() as connection:
            found = _version(connection, adapter, version)
            row = connection.execute(_adapter(adapter)).one()
            if if_live is not None and row.live_version != if_live:
                raise AdapterConflict(
                    f"version {row.live_version} of {adapter.user_id!r} is live, not {if_live}: "
                    "look again, then retry",
                    code="live_version_changed",
                    param="if_live",
                )
            if not found.live:
                self._set_live(connection, row.adapter_id, version)
            return msgspec.structs.replace(found, live=True)

    def _answered(
        self, connection: Connection, adapter: AdapterName, adapter_id: int, key: UploadKey | None
    ) -> Added | None:
        """What the first upload with this key was answered, word for word."""
        answer = key and first_answer(connection, adapter_id, key, self._timestamp(-KEEP))
        if answer is None:
            return None
        record = _version(connection, adapter, answer.version)
        return Added(msgspec.structs.replace(record, live=answer.was_live), answer.was_new)

    def _insert(
        self, connection: Connection, row: Row[Any], new: NewVersion, *, promote: bool
    ) -> VersionRecord:
        number = row.last_version + 1
        fields = msgspec.structs.asdict(new)
        created_at = self._timestamp()
        connection.execute(
            versions.insert().values(
                adapter_id=row.adapter_id, version=number, created_at=created_at, **fields
            )
        )
        connection.execute(
            adapters.update().where(adapters.c.adapter_id == row.adapter_id).values(last_version=number)
        )
        if promote:
            self._set_live(connection, row.adapter_id, number)
        return VersionRecord(version=number, live=promote, created_at=created_at, **fields)

    def _set_live(self, connection: Connection, adapter_id: int, version: int) -> None:
        connection.execute(
            adapters.update().where(adapters.c.adapter_id == adapter_id).values(live_version=version)
        )
        connection.execute(
            live_history.insert().values(adapter_id=adapter_id, version=version, created_at=self._timestamp())
        )

    def _adapter_row(self, connection: Connection, adapter: AdapterName) -> Row[Any]:
        """The adapter's row, made with its user and tenant if this is the first upload."""
        row = connection.execute(_adapter(adapter)).one_or_none()
        if row is not None:
            return row
        created_at = self._timestamp()
        if (
            connection.execute(select(tenants).where(tenants.c.tenant == adapter.tenant)).one_or_none()
            is None
        ):
            connection.execute(tenants.insert().values(tenant=adapter.tenant, created_at=created_at))
        if connection.execute(_user(adapter)).one_or_none() is None:
            connection.execute(
                users.insert().values(
                    tenant=adapter.tenant,
                    user_id=adapter.user_id,
                    limits={},
                    metadata={},
                    created_at=created_at,
                )
            )
        connection.execute(
            adapters.insert().values(**adapter._asdict(), last_version=0, created_at=created_at)
        )
        return connection.execute(_adapter(adapter)).one()

    def _find(
        self, adapter: AdapterName, query: Select[*tuple[Any, ...]], extra: dict[str, object]
    ) -> LiveAdapter:
        with self._database.read() as connection:
            row = connection.execute(query, {**adapter._asdict(), **extra}).one_or_none()
        if row is None or row.digest is None:
            raise _not_found(adapter, extra.get("version"), row)
        ref = AdapterRef(
            digest=row.digest,
            tenant=adapter.tenant,
            key=row.object_key,
            weights_sha256=row.weights_sha256,
            size_bytes=row.size_bytes,
            rank=row.rank,
        )
        return LiveAdapter(ref, row.version, row.fallback)

    def _timestamp(self, offset: timedelta = timedelta()) -> str:
        at = (self._now() + offset).astimezone(UTC)
        return at.isoformat(timespec="microseconds").replace("+00:00", "Z")


def _lookup(on_version: Any) -> Select[*tuple[Any, ...]]:
    """User, then adapter, then version, each by its unique index; columns of missing ones are NULL."""
    return (
        select(
            users.c.fallback,
            adapters.c.last_version,
            versions.c.version,
            versions.c.digest,
            versions.c.object_key,
            versions.c.weights_sha256,
            versions.c.size_bytes,
            versions.c.rank,
        )
        .select_from(users)
        .outerjoin(
            adapters,
            (adapters.c.tenant == users.c.tenant)
            & (adapters.c.user_id == users.c.user_id)
            & (adapters.c.name == bindparam("name"))
            & (adapters.c.base == bindparam("base")),
        )
        .outerjoin(
            versions, (versions.c.adapter_id == adapters.c.adapter_id) & (versions.c.version == on_version)
        )
        .where(users.c.tenant == bindparam("tenant"), users.c.user_id == bindparam("user_id"))
    )


_LIVE = _lookup(adapters.c.live_version)
_NUMBERED = _lookup(bindparam("version"))


def _adapter(adapter: AdapterName) -> Select[*tuple[Any, ...]]:
    return select(adapters).where(
        adapters.c.tenant == adapter.tenant,
        adapters.c.user_id == adapter.user_id,
        adapters.c.name == adapter.name,
        adapters.c.base == adapter.base,
    )


def _user(adapter: AdapterName) -> Select[*tuple[Any, ...]]:
    return select(users.c.user_id).where(users.c.tenant == adapter.tenant, users.c.user_id == adapter.user_id)


def _users(tenant: str) -> Select[*tuple[Any, ...]]:
    num_adapters = (
        select(func.count())
        .where(adapters.c.tenant == users.c.tenant, adapters.c.user_id == users.c.user_id)
        .scalar_subquery()
    )
    return select(users.c.user_id, num_adapters, users.c.created_at).where(users.c.tenant == tenant)


def _records(adapter: AdapterName) -> Select[*tuple[Any, ...]]:
    """Versions of one adapter with what is live, newest first."""
    return (
        select(versions, adapters.c.live_version)
        .join(adapters, adapters.c.adapter_id == versions.c.adapter_id)
        .where(
            adapters.c.tenant == adapter.tenant,
            adapters.c.user_id == adapter.user_id,
            adapters.c.name == adapter.name,
            adapters.c.base == adapter.base,
        )
        .order_by(versions.c.version.desc())
    )


def _version(connection: Connection, adapter: AdapterName, version: int) -> VersionRecord:
    row = connection.execute(_records(adapter).where(versions.c.version == version)).one_or_none()
    if row is None:
        raise _not_found(adapter, version, None)
    return _record(row, row.live_version)


def _newest(connection: Connection, adapter_id: int) -> Row[Any] | None:
    query = (
        select(versions)
        .where(versions.c.adapter_id == adapter_id)
        .order_by(versions.c.version.desc())
        .limit(1)
    )
    return connection.execute(query).one_or_none()


def _record(row: Row[Any], live_version: int | None) -> VersionRecord:
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


def _not_found(adapter: AdapterName, version: object, row: Row[Any] | None) -> AdapterNotFound:
    whose = f"user {adapter.user_id!r}" + (
        f" (adapter {adapter.name!r})" if adapter.name != "default" else ""
    )
    if version is not None:
        problem = f"{whose} has no version {version} for base {adapter.base}"
    elif row is not None and row.last_version:
        problem = f"{whose} has uploads but none is live: promote one with `tunefleet adapters promote`"
    else:
        problem = (
            f"{whose} has no adapter for base {adapter.base}: upload one with "
            f"`tunefleet adapters push {adapter.user_id} DIR` or PUT /v1/users/{adapter.user_id}/adapter"
        )
    return AdapterNotFound(problem, param="user_id", fallback=row.fallback if row is not None else None)
