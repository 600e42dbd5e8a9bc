"""Users: look, change, delete; and what deletions did."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import msgspec
from msgspec import UNSET, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from tunefleet.auth import Caller
from tunefleet.core import Receipt
from tunefleet.http.bodies import JSON, listed, page_of, read_json
from tunefleet.http.paths import user_of
from tunefleet.openai_api import convert

if TYPE_CHECKING:
    from tunefleet.fleet import Fleet


class UserChange(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is absent stays; null is as it was for a new user."""

    fallback: Literal["none", "base"] | UnsetType | None = UNSET
    limits: dict[str, object] | UnsetType | None = UNSET
    metadata: dict[str, object] | UnsetType | None = UNSET


async def list_users(fleet: Fleet, caller: Caller, request: Request) -> Response:
    page = page_of(request)
    found = await fleet.store.users(caller.tenant, page.after, page.limit + 1)
    return listed(list(found), page.limit)


async def show_user(fleet: Fleet, caller: Caller, request: Request) -> Response:
    return JSON(await fleet.store.user(user_of(request), tenant=caller.tenant))


async def change_user(fleet: Fleet, caller: Caller, request: Request) -> Response:
    """Makes the user if there is none: settings may come before the first upload."""
    asked = convert(await read_json(request), UserChange)
    return JSON(
        await fleet.store.update_user(
            user_of(request),
            tenant=caller.tenant,
            fallback=asked.fallback,
            limits=asked.limits,
            metadata=asked.metadata,
        )
    )


async def delete_user(fleet: Fleet, caller: Caller, request: Request) -> Response:
    return receipt(await fleet.store.delete_user(user_of(request), tenant=caller.tenant))


async def show_deletion(fleet: Fleet, caller: Caller, request: Request) -> Response:
    return receipt(await fleet.store.deletion(request.path_params["deletion_id"], tenant=caller.tenant))


def receipt(done: Receipt) -> Response:
    """202 while it goes on: ask ``/v1/deletions/{id}`` again."""
    return JSON(done, 202 if done.status == "pending" else 200)
