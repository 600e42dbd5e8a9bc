"""What a route's path names."""

from __future__ import annotations

from typing import TypedDict

from starlette.requests import Request

from tunefleet.auth import Caller
from tunefleet.core import DEFAULT_ADAPTER


class AdapterWords(TypedDict):
    """One adapter of one user, as keywords of the store's methods."""

    user_id: str
    name: str
    tenant: str


def adapter_of(caller: Caller, request: Request) -> AdapterWords:
    name: str = request.path_params.get("name", DEFAULT_ADAPTER)
    return AdapterWords(user_id=user_of(request), name=name, tenant=caller.tenant)


def user_of(request: Request) -> str:
    user_id: str = request.path_params["user_id"]
    return user_id
