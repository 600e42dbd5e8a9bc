"""Users' adapters: upload, look, download, delete a version."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from tunefleet.auth import Caller
from tunefleet.errors import RequestInvalid
from tunefleet.http.bodies import JSON, flag, integer, listed, page_of
from tunefleet.http.paths import adapter_of
from tunefleet.http.receive import parse_metadata, receive
from tunefleet.http.users import receipt
from tunefleet.uploads import upload_folder

if TYPE_CHECKING:
    from tunefleet.adapters_store.stored_file import StoredFile
    from tunefleet.fleet import Fleet


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
            folder=received.folder,
            promote=promote,
            metadata=header or received.metadata,
            idempotency_key=request.headers.get("idempotency-key"),
            **adapter_of(caller, request),
        )
    return JSON(pushed.version, 201 if pushed.created else 200)


async def show(fleet: Fleet, caller: Caller, request: Request) -> Response:
    return JSON(await fleet.store.adapter(**adapter_of(caller, request)))


async def list_versions(fleet: Fleet, caller: Caller, request: Request) -> Response:
    page = page_of(request)
    after = integer(request.query_params, "after", default=0) or None
    found = await fleet.store.versions(after=after, limit=page.limit + 1, **adapter_of(caller, request))
    return listed(list(found), page.limit)


async def show_version(fleet: Fleet, caller: Caller, request: Request) -> Response:
    return JSON(await fleet.store.version(n=_number(request), **adapter_of(caller, request)))


async def delete_version(fleet: Fleet, caller: Caller, request: Request) -> Response:
    return receipt(await fleet.store.delete_version(n=_number(request), **adapter_of(caller, request)))


async def download(fleet: Fleet, caller: Caller, request: Request) -> Response:
    file = request.path_params["file"]
    stored = await fleet.store.open_file(n=_number(request), file=file, **adapter_of(caller, request))
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


def _number(request: Request) -> int:
    return integer(request.path_params, "version", default=0)


def _metadata_header(request: Request) -> dict[str, object] | None:
    header = request.headers.get("x-adapter-metadata")
    return None if header is None else parse_metadata(header.encode("latin-1"), "X-Adapter-Metadata")


async def _chunks(stored: StoredFile) -> AsyncIterator[bytes]:
    try:
        async for chunk in stored:
            yield chunk
    finally:
        await stored.aclose()
