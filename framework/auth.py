"""Who calls, and what they may do. Every route is checked by ``Caller.require`` and ``Caller.reach``."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import msgspec

from tunefleet.core import DEFAULT_TENANT, check_tenant, check_user_id
from tunefleet.errors import AdapterNotFound, AuthError, ConfigError

if TYPE_CHECKING:
    from starlette.requests import Request

SCOPES = frozenset({"admin", "tenant", "upload", "infer"})


class Caller(msgspec.Struct, frozen=True):
    """Who calls.

    Attributes:
        user_id: an end user, who reaches nobody but themselves; None: the tenant's backend.
        scopes: ``infer``, ``upload``; ``tenant`` includes both and lists users; ``admin`` includes all.
        tenant: whose users they are.
    """

    user_id: str | None = None
    scopes: frozenset[str] = frozenset({"infer"})
    tenant: str = DEFAULT_TENANT

    def __post_init__(self) -> None:
        unknown = sorted(self.scopes - SCOPES)
        if unknown:
            raise ConfigError(
                f"unknown scope {unknown[0]!r}; there are: {', '.join(sorted(SCOPES))}", param="scopes"
            )
        check_tenant(self.tenant)
        if self.user_id is not None:
            check_user_id(self.user_id)

    @property
    def is_admin(self) -> bool:
        """Of the whole deployment: sees what isn't any one tenant's."""
        return "admin" in self.scopes and self.user_id is None

    def require(self, scope: str) -> None:
        """Raises AuthError (``forbidden``) unless the caller has ``scope``."""
        allowed = (
            scope in self.scopes or "admin" in self.scopes or ("tenant" in self.scopes and scope != "admin")
        )
        if not allowed or (scope in {"admin", "tenant"} and self.user_id is not None):
            raise AuthError(f"this credential lacks the scope {scope!r}", code="forbidden")

    def reach(self, user_id: str) -> str:
        """Returns ``user_id``, or raises as if that user were not there."""
        check_user_id(user_id)
        if self.user_id not in {None, user_id}:
            raise no_such_user(user_id)
        return user_id


Authenticate = Callable[["Request"], Awaitable[Caller | None]]
"""A request to its caller; None: 401."""

BACKEND = Caller(scopes=SCOPES)


def no_such_user(user_id: str) -> AdapterNotFound:
    return AdapterNotFound(f"user {user_id!r} has no adapter here", param="user_id")


async def anyone(request: Request) -> Caller:
    """Any or no credential is the default tenant's backend."""
    return BACKEND


def admin_key(key: str) -> Authenticate:
    """``Authorization: Bearer <key>``, compared in constant time."""
    expected = key.encode()

    async def authenticate(request: Request) -> Caller | None:
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        matches = hmac.compare_digest(given.strip().encode("latin-1"), expected)
        return BACKEND if matches and kind.lower() == "bearer" else None

    return authenticate


def check_exposure(host: str, key: str | None) -> None:
    """Refuses to serve other machines without a key."""
    if key is None and not _is_loopback(host):
        raise ConfigError(
            f"without keys tunefleet serves this machine only, not {host!r}: set TUNEFLEET_ADMIN_KEY",
            param="host",
        )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
