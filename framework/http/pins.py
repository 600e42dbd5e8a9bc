"""Adapters that stay near the device, whoever else calls."""

from __future__ import annotations

from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response

from tunefleet.auth import Caller
from tunefleet.core import Pin
from tunefleet.http.bodies import JSON, read_json
from tunefleet.http.paths import adapter_of
from tunefleet.openai_api import convert

if TYPE_CHECKING:
    from tunefleet.fleet import Fleet


class PinRequest(Pin, frozen=True, forbid_unknown_fields=True):
    """A pin as it is asked for."""


async def pin(fleet: Fleet, caller: Caller, request: Request) -> Response:
    asked = convert(await read_json(request), PinRequest)
    return JSON(await fleet.store.set_pin(tier=asked.tier, until=asked.until, **adapter_of(caller, request)))


async def unpin(fleet: Fleet, caller: Caller, request: Request) -> Response:
    return JSON(await fleet.store.clear_pin(**adapter_of(caller, request)))
