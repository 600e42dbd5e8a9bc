"""Uploads in steps: begin, put each file (to the object store, or here), complete."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import quote

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from tunefleet.adapters_store.lora_config import MAX_CONFIG_BYTES
from tunefleet.auth import Caller
from tunefleet.core import ADAPTER_FILES, CONFIG_FILE, UploadFile, UploadTicket
from tunefleet.errors import AdapterNotFound
from tunefleet.http.bodies import JSON, read_json
from tunefleet.http.paths import adapter_of
from tunefleet.http.receive import receive_file
from tunefleet.openai_api import convert
from tunefleet.uploads import upload_folder

if TYPE_CHECKING:
    from tunefleet.fleet import Fleet


class Beginning(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    promote: bool = True
    metadata: dict[str, object] | None = None


class Completion(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Nothing: what is completed was said when it began."""


async def begin(fleet: Fleet, caller: Caller, request: Request) -> Response:
    asked = convert(await read_json(request), Beginning)
    ticket = await fleet.store.begin_upload(
        promote=asked.promote, metadata=asked.metadata, **adapter_of(caller, request)
    )
    return JSON(_with_urls(ticket, request), 201)


async def put_file(fleet: Fleet, caller: Caller, request: Request) -> Response:
    """Where the object store gives no URLs of its own. A file put again replaces the one before."""
    file = request.path_params["file"]
    if file not in ADAPTER_FILES:
        raise AdapterNotFound(
            f"an upload's files are {', '.join(ADAPTER_FILES)}", code="file_not_found", param="file"
        )
    most = fleet.options.max_upload_bytes
    with upload_folder(fleet.options) as folder:
        path = folder / file
        await receive_file(request, path, min(most, MAX_CONFIG_BYTES) if file == CONFIG_FILE else most)
        await fleet.store.put_file(
            upload_id=request.path_params["upload_id"], file=file, path=path, **adapter_of(caller, request)
        )
    return Response(status_code=204)


async def complete(fleet: Fleet, caller: Caller, request: Request) -> Response:
    """Answers as an upload in one request does; completed again, the same."""
    convert(await read_json(request), Completion)
    pushed = await fleet.store.complete_upload(
        upload_id=request.path_params["upload_id"],
        idempotency_key=request.headers.get("idempotency-key"),
        **adapter_of(caller, request),
    )
    return JSON(pushed.version, 201 if pushed.created else 200)


def _with_urls(ticket: UploadTicket, request: Request) -> UploadTicket:
    """Files that the object store gave no URL for are put below this very path."""
    here = f"{quote(request.scope['path'], safe='/:@+=~')}/{ticket.upload_id}"
    files = {
        name: file if file.url else UploadFile(url=f"{here}/{name}", method="PUT", headers=file.headers)
        for name, file in ticket.files.items()
    }
    return msgspec.structs.replace(ticket, files=files)
