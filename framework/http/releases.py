"""Which version answers: promote, rollback, canary. One commit each, which the next request sees."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from tunefleet.auth import Caller
from tunefleet.http.bodies import JSON, read_json
from tunefleet.http.paths import adapter_of
from tunefleet.openai_api import convert

if TYPE_CHECKING:
    from tunefleet.fleet import Fleet


class Promotion(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    if_live: int | None = None


class Rollback(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    to: int | None = None  # None: what was live before
    if_live: int | None = None


class CanaryRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    percent: float


async def promote(fleet: Fleet, caller: Caller, request: Request) -> Response:
    asked = convert(await read_json(request), Promotion)
    return JSON(
        await fleet.store.promote(version=asked.version, if_live=asked.if_live, **adapter_of(caller, request))
    )


async def rollback(fleet: Fleet, caller: Caller, request: Request) -> Response:
    asked = convert(await read_json(request), Rollback)
    return JSON(await fleet.store.rollback(to=asked.to, if_live=asked.if_live, **adapter_of(caller, request)))


async def set_canary(fleet: Fleet, caller: Caller, request: Request) -> Response:
    asked = convert(await read_json(request), CanaryRequest)
    return JSON(
        await fleet.store.set_canary(
            version=asked.version, percent=asked.percent, **adapter_of(caller, request)
        )
    )


async def end_canary(fleet: Fleet, caller: Caller, request: Request) -> Response:
    return JSON(await fleet.store.clear_canary(**adapter_of(caller, request)))
