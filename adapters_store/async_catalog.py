"""The catalog for routers: asynchronous, arguments checked, answers as people see them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

from msgspec import UNSET, UnsetType

from tunefleet.adapters_store import views
from tunefleet.adapters_store.arguments import check_limit, check_metadata, check_number
from tunefleet.adapters_store.catalog import Catalog
from tunefleet.adapters_store.records import AdapterName
from tunefleet.adapters_store.steps import reached
from tunefleet.adapters_store.threads import Runner
from tunefleet.adapters_store.watching import Wakes
from tunefleet.core import (
    DEFAULT_ADAPTER,
    DEFAULT_TENANT,
    Adapter,
    AdapterRef,
    Pin,
    PinTier,
    User,
    Version,
    check_adapter_name,
    check_tenant,
    check_user_id,
)

NUM_LOOKUPS = 8  # threads for the catalog: a request waits for these

T = TypeVar("T")


class Resolved(NamedTuple):
    """What a request needs: the adapter, its version number, and the user's own fallback setting."""

    ref: AdapterRef
    version: int
    fallback: str | None


class AsyncCatalog:
    """What needs no objects: look, resolve, promote, roll back, canary, pin. Closed by its owner.

    Every method raises RequestInvalid for an id, name, number or page that isn't allowed, AdapterNotFound for
    what isn't there, and StoreError when the catalog is out of reach.
    """

    def __init__(self, catalog: Catalog, base: str) -> None:
        self._catalog = catalog
        self._base = base
        self._lookup = Runner(NUM_LOOKUPS)
        self._wakes = Wakes()

    async def resolve(
        self,
        user_id: str,
        *,
        name: str = DEFAULT_ADAPTER,
        tenant: str = DEFAULT_TENANT,
        version: int | None = None,
        session: str | None = None,
    ) -> Resolved:
        """The live adapter of a user, or the version asked for, or the canary for its share of sessions.

        Raises:
            AdapterNotFound: nothing to answer with; its ``fallback`` is the user's own setting.
        """
        adapter = self._named(user_id, name, tenant)
        if version is None:
            return Resolved(*await self._lookup(lambda: self._catalog.live(adapter, session=session)))
        number = check_number(version)
        return Resolved(*await self._lookup(lambda: self._catalog.numbered(adapter, number)))

    async def adapter(
        self, user_id: str, *, name: str = DEFAULT_ADAPTER, tenant: str = DEFAULT_TENANT
    ) -> Adapter:
        """The live version, with canary and pin."""
        adapter = self._named(user_id, name, tenant)
        return views.adapter(adapter, await self._lookup(lambda: self._catalog.adapter(adapter)))

    async def versions(
        self,
        user_id: str,
        *,
        name: str = DEFAULT_ADAPTER,
        tenant: str = DEFAULT_TENANT,
        after: int | None = None,
        limit: int = 100,
    ) -> list[Version]:
        """Newest first; ``after`` is the last number of the page before."""
        adapter = self._named(user_id, name, tenant)
        size = check_limit(limit)
        last = None if after is None else check_number(after, "after")
        records = await self._lookup(lambda: self._catalog.versions(adapter, after=last, limit=size))
        return [views.version(adapter, record) for record in records]

    async def version(
        self, user_id: str, n: int, *, name: str = DEFAULT_ADAPTER, tenant: str = DEFAULT_TENANT
    ) -> Version:
        adapter = self._named(user_id, name, tenant)
        number = check_number(n)
        return views.version(adapter, await self._lookup(lambda: self._catalog.version(adapter, number)))

    async def users(
        self, tenant: str = DEFAULT_TENANT, after: str | None = None, limit: int = 100
    ) -> list[User]:
        """By user id; ``after`` is the last id of the page before."""
        size = check_limit(limit)
        last = None if after is None else check_user_id(after)
        records = await self._lookup(
            lambda: self._catalog.users(check_tenant(tenant), after=last, limit=size)
        )
        return [views.user(record) for record in records]

    async def user(self, user_id: str, *, tenant: str = DEFAULT_TENANT) -> User:
        """Raises AdapterNotFound (code ``user_not_found``)."""
        check_tenant(tenant)
        check_user_id(user_id)
        return views.user(await self._lookup(lambda: self._catalog.user(tenant, user_id)))

    async def update_user(
        self,
        user_id: str,
        *,
        tenant: str = DEFAULT_TENANT,
        fallback: str | UnsetType | None = UNSET,
        limits: dict[str, object] | UnsetType | None = UNSET,
        metadata: dict[str, object] | UnsetType | None = UNSET,
    ) -> User:
        """Changes what is given; None is as it was for a new user. Makes the user if there is none."""
        check_tenant(tenant)
        check_user_id(user_id)
        changes = {
            "limits": limits if limits is UNSET else check_metadata(limits or {}, "limits"),
            "metadata": metadata if metadata is UNSET else check_metadata(metadata or {}),
        }
        record = await self._changed(
            lambda: self._catalog.update_user(tenant, user_id, fallback=fallback, **changes)
        )
        return views.user(record)

    async def promote(
        self,
        user_id: str,
        version: int,
        *,
        name: str = DEFAULT_ADAPTER,
        tenant: str = DEFAULT_TENANT,
        if_live: int | None = None,
    ) -> Version:
        """Makes a version live: from the commit on every resolve gives it.

        Raises:
            AdapterConflict: another version than ``if_live`` is live.
        """
        adapter = self._named(user_id, name, tenant)
        number = check_number(version)
        expected = None if if_live is None else check_number(if_live, "if_live")
        record = await self._changed(
            lambda: self._catalog.promote(adapter, number, if_live=expected), "promote:committed"
        )
        return views.version(adapter, record)

    async def rollback(
        self,
        user_id: str,
        *,
        name: str = DEFAULT_ADAPTER,
        tenant: str = DEFAULT_TENANT,
        to: int | None = None,
        if_live: int | None = None,
    ) -> Version:
        """Makes live what was live before, or before that: ``to``. Again: one further.

        Raises:
            AdapterConflict: nothing was (code ``no_earlier_version``), ``to`` never was (``never_live``), or
                another version than ``if_live`` is live.
        """
        adapter = self._named(user_id, name, tenant)
        target = None if to is None else check_number(to, "to")
        expected = None if if_live is None else check_number(if_live, "if_live")
        record = await self._changed(
            lambda: self._catalog.rollback(adapter, to=target, if_live=expected), "rollback:committed"
        )
        return views.version(adapter, record)

    async def set_canary(
        self,
        user_id: str,
        version: int,
        percent: float,
        *,
        name: str = DEFAULT_ADAPTER,
        tenant: str = DEFAULT_TENANT,
    ) -> Adapter:
        """Lets a version answer a share of the sessions, until it is promoted or the canary is cleared."""
        adapter = self._named(user_id, name, tenant)
        number = check_number(version)
        found = await self._changed(
            lambda: self._catalog.set_canary(adapter, number, percent), "canary:committed"
        )
        return views.adapter(adapter, found)

    async def clear_canary(
        self, user_id: str, *, name: str = DEFAULT_ADAPTER, tenant: str = DEFAULT_TENANT
    ) -> Adapter:
        adapter = self._named(user_id, name, tenant)
        found = await self._changed(lambda: self._catalog.clear_canary(adapter), "canary:committed")
        return views.adapter(adapter, found)

    async def set_pin(
        self,
        user_id: str,
        tier: PinTier,
        *,
        until: str | None = None,
        name: str = DEFAULT_ADAPTER,
        tenant: str = DEFAULT_TENANT,
    ) -> Adapter:
        """Keeps the live version and the canary in a tier of every machine, until a time or for good."""
        adapter = self._named(user_id, name, tenant)
        found = await self._changed(lambda: self._catalog.set_pin(adapter, Pin(tier, until)), "pin:committed")
        return views.adapter(adapter, found)

    async def clear_pin(
        self, user_id: str, *, name: str = DEFAULT_ADAPTER, tenant: str = DEFAULT_TENANT
    ) -> Adapter:
        adapter = self._named(user_id, name, tenant)
        found = await self._changed(lambda: self._catalog.clear_pin(adapter), "pin:committed")
        return views.adapter(adapter, found)

    def _named(self, user_id: str, name: str, tenant: str) -> AdapterName:
        return AdapterName(check_tenant(tenant), check_user_id(user_id), check_adapter_name(name), self._base)

    async def _changed(self, work: Callable[[], T], step: str | None = None) -> T:
        """A commit. The watch learns of it at once: what is pinned may be another version now."""

        def commit() -> T:
            answer = work()
            if step is not None:
                reached(step)
            return answer

        answer = await self._lookup(commit)
        self._wakes.pinned.set()
        return answer
