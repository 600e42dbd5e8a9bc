"""Users and their adapters: upload, look, download, promote."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from tunefleet.auth import Caller
from tunefleet.core import DEFAULT_ADAPTER, User
from tunefleet.errors import RequestInvalid
from tunefleet.http.bodies import JSON, flag, integer, listed, page_of, read_json
from tunefleet.http.receive import parse_metadata, receive
from tunefleet.openai_api import convert
from tunefleet.uploads import upload_folder

if TYPE_CHECKING:
    from tunefleet.adapters_store.stored_file import StoredFile
    from tunefleet.fleet import Fleet


class Promotion(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    if_live: int | None = None


async def upload(fleet: Fleet, caller: Caller, request: Request) -> Response:
    """The body becomes the next version: 201. If its bytes are the newest version already: 200, unchanged.

    With an ``Idempotency-Key``, the first upload of this adapter that is taken with it decides: for 24 hours
    the same upload is answered as then, whatever happened since, and another one (bytes, metadata or promote)
    is a 409 ``idempotency_key_reused``. Refused uploads leave their key free.
    """
    promote = flag(request.query_params, "promote", default=True)
    header = _metadata_header(request)
    with upload_folder(fleet.options) as folder:
        received = await receive(request, folder, fleet.options)
        if header is not None and received.metadata is not None:
            raise RequestInvalid(
                "metadata comes as a part and as X-Adapter-Metadata: give one", param="metadata"
            )
        pushed = await fleet.store.push(
            _user(request),
            received.folder,
            name=_name(request),
            tenant=caller.tenant,
            promote=promote,
            metadata=header or received.metadata,
            idempotency_key=request.headers.get("idempotency-key"),
        )
    return JSON(pushed.version, 201 if pushed.created else 200)


async def show_live(fleet: Fleet, caller: Caller, request: Request) -> Response:
    user_id, name = _user(request), _name(request)
    live = await fleet.store.resolve(user_id, name=name, tenant=caller.tenant)
    return JSON(await fleet.store.version(user_id, live.version, name=name, tenant=caller.tenant))


async def list_versions(fleet: Fleet, caller: Caller, request: Request) -> Response:
    page = page_of(request)
    after = integer(request.query_params, "after", default=0) or None
    found = await fleet.store.versions(
        _user(request), name=_name(request), tenant=caller.tenant, after=after, limit=page.limit + 1
    )
    return listed(list(found), page.limit)


async def show_version(fleet: Fleet, caller: Caller, request: Request) -> Response:
    number = integer(request.path_params, "version", default=0)
    return JSON(await fleet.store.version(_user(request), number, name=_name(request), tenant=caller.tenant))


async def download(fleet: Fleet, caller: Caller, request: Request) -> Response:
    file = request.path_params["file"]
    number = integer(request.path_params, "version", default=0)
    stored = await fleet.store.open_file(
        _user(request), number, file, name=_name(request), tenant=caller.tenant
    )
    headers = {
        "content-length": str(stored.size_bytes),
        "content-disposition": f'attachment; filename="{file}"',
        "etag": f'"{stored.sha256}"',
    }
    kind = "application/octet-stream"
    if request.method == "HEAD":
        await stored.aclose()
        return Response(headers=headers, media_type=kind)
    return StreamingResponse(_chunks(stored), headers=headers, media_type=kind)


async def promote(fleet: Fleet, caller: Caller, request: Request) -> Response:
    asked = convert(await read_json(request), Promotion)
    return JSON(
        await fleet.store.promote(
            _user(request), asked.version, name=_name(request), tenant=caller.tenant, if_live=asked.if_live
        )
    )


async def list_users(fleet: Fleet, caller: Caller, request: Request) -> Response:
    page = page_of(request)
    found = await fleet.store.users(caller.tenant, page.after, page.limit + 1)
    return listed([User(**user._asdict()) for user in found], page.limit)


async def show_user(fleet: Fleet, caller: Caller, request: Request) -> Response:
    user = await fleet.store.user(_user(request), tenant=caller.tenant)
    return JSON(User(**user._asdict()))


def _user(request: Request) -> str:
    user_id: str = request.path_params["user_id"]
    return user_id


def _name(request: Request) -> str:
    name: str = request.path_params.get("name", DEFAULT_ADAPTER)
    return name


def _metadata_header(request: Request) -> dict[str, object] | None:
    header = request.headers.get("x-adapter-metadata")
    return None if header is None else parse_metadata(header.encode("latin-1"), "X-Adapter-Metadata")


async def _chunks(stored: StoredFile) -> AsyncIterator[bytes]:
    try:
        async for chunk in stored:
            yield chunk
    finally:
        await stored.aclose()
