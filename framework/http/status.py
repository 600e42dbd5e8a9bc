"""What is there, where, and whether it's well. Nothing here wakes a replica but ``/v1/warmup``."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from tunefleet.auth import Caller
from tunefleet.core import DEFAULT_ADAPTER, ReplicaInfo, User
from tunefleet.errors import AdapterNotFound, RequestInvalid
from tunefleet.generations import model_name
from tunefleet.http.bodies import JSON, page_of, read_json
from tunefleet.messages import Status
from tunefleet.openai_api import convert
from tunefleet.target import choose_user

if TYPE_CHECKING:
    from tunefleet.fleet import Fleet


class WarmupRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    user_id: str | None = None
    name: str = DEFAULT_ADAPTER


async def warmup(fleet: Fleet, caller: Caller, request: Request) -> Response:
    asked = convert(await read_json(request), WarmupRequest)
    user_id = choose_user(own=caller.user_id, header=asked.user_id, model=None, base_names=()).user_id
    return JSON(await fleet.warmup(user_id, name=asked.name, tenant=caller.tenant))


async def models(fleet: Fleet, caller: Caller, request: Request) -> Response:
    """The base first, then users as models: a page of the tenant's, or only the caller."""
    page = page_of(request)
    if caller.user_id is not None:
        found = await _if_there(fleet, caller.tenant, caller.user_id)
    else:
        found = await fleet.store.users(caller.tenant, page.after, page.limit + 1)
    shown = [_user_model(fleet, user.user_id, user.created_at) for user in found[: page.limit]]
    return JSON({"object": "list", "data": [_base_model(fleet), *shown], "has_more": len(found) > page.limit})


async def show_model(fleet: Fleet, caller: Caller, request: Request) -> Response:
    chosen = choose_user(
        own=None, header=None, model=request.path_params["model"], base_names=fleet.base_names
    )
    if chosen.user_id is None:
        return JSON(_base_model(fleet))
    user_id = caller.reach(chosen.user_id)
    live = await fleet.store.adapter(user_id, name=chosen.name, tenant=caller.tenant)
    return JSON(_user_model(fleet, user_id, live.created_at, chosen.name))


async def status(fleet: Fleet, caller: Caller, request: Request) -> Response:
    found = await fleet.status()
    shown = tuple(_public(replica, caller) for replica in found.replicas)
    return JSON(msgspec.structs.replace(found, replicas=shown))


async def replicas(fleet: Fleet, caller: Caller, request: Request) -> Response:
    found = (await fleet.dispatcher.status()).replicas
    shown = [_public(replica, caller) for replica in found]
    return JSON({"object": "list", "data": shown, "has_more": False})


async def adapters(fleet: Fleet, caller: Caller, request: Request) -> Response:
    """Where adapters are: ``?tier=device``, ``host`` or ``disk``. An admin sees which, others how many."""
    machine = await fleet.dispatcher.status()
    found = _in_tier(machine, request.query_params.get("tier", "device"))
    shown = found if caller.is_admin else []
    return JSON({"object": "list", "data": shown, "has_more": False, "num_adapters": len(found)})


async def healthz(fleet: Fleet, request: Request) -> Response:
    return JSON({"status": "ok"})


async def readyz(fleet: Fleet, request: Request) -> Response:
    """200 also at zero: the first request wakes a replica."""
    if fleet.is_open:
        return JSON({"status": "ready"})
    return JSON({"status": "starting"}, 503, {"retry-after": "1"})


async def _if_there(fleet: Fleet, tenant: str, user_id: str) -> list[User]:
    """Somebody who has uploaded nothing yet is nobody to the catalog, and may still ask the base."""
    try:
        return [await fleet.store.user(user_id, tenant=tenant)]
    except AdapterNotFound:
        return []


def _in_tier(machine: Status, tier: str) -> list[dict[str, object]]:
    sizes = {"disk": machine.disk_tier, "host": machine.host_tier}
    if tier in sizes:
        return [{"digest": digest, "size_bytes": size} for digest, size in sizes[tier].items()]
    if tier == "device":
        return [
            {"digest": digest, "replica_id": replica.replica_id}
            for replica in machine.replicas
            for digest in replica.digests
        ]
    raise RequestInvalid("tier is device, host or disk", param="tier")


def _public(replica: ReplicaInfo, caller: Caller) -> ReplicaInfo:
    """Without the socket's path, which is nobody's business; digests of all tenants are an admin's."""
    digests = replica.digests if caller.is_admin else ()
    return msgspec.structs.replace(replica, address="", digests=digests)


def _base_model(fleet: Fleet) -> dict[str, object]:
    name = fleet.manifest.name
    return {"id": name, "object": "model", "created": 0, "owned_by": "tunefleet", "parent": None}


def _user_model(
    fleet: Fleet, user_id: str, created_at: str, name: str = DEFAULT_ADAPTER
) -> dict[str, object]:
    return {
        "id": model_name(user_id, name),
        "object": "model",
        "created": int(datetime.fromisoformat(created_at).timestamp()),
        "owned_by": user_id,
        "parent": fleet.manifest.name,
    }
