"""An upload's body on its way to disk: multipart parts or an archive, counted, hashed, not held in memory."""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.requests import Request

from tunefleet import digests, uploads
from tunefleet.adapters_store.staging import create_file, write_all
from tunefleet.config import Options
from tunefleet.core import ADAPTER_FILES, MAX_METADATA_BYTES
from tunefleet.digests import ContentDigest
from tunefleet.errors import AdapterInvalid, RequestInvalid
from tunefleet.http.bodies import bounded
from tunefleet.openai_api import parse_json

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

_MAX_PART_HEADER_BYTES = 8192
_WRITE_BYTES = 1024 * 1024


class Received(NamedTuple):
    folder: Path  # holds the two files
    metadata: dict[str, object] | None  # of the part, if there was one


async def receive(request: Request, folder: Path, options: Options) -> Received:
    """Writes the body below ``folder``.

    Raises:
        RequestInvalid: too large, too slow, wrongly framed, or not what Content-Digest says.
        AdapterInvalid: no PEFT folder in it.
    """
    kind, parameters = parse_options_header(request.headers.get("content-type", ""))
    if kind == b"multipart/form-data":
        boundary = parameters.get(b"boundary", b"")
        async with _body(request, options.max_upload_bytes) as chunks:
            return await _receive_parts(chunks, boundary, folder)
    archive = folder / "archive"
    await receive_file(request, archive, options.max_upload_bytes)
    await uploads.unpack(archive, folder / "adapter", options)
    return Received(folder / "adapter", None)


async def receive_file(request: Request, path: Path, max_bytes: int) -> None:
    """Writes the body to ``path`` as it is; raises RequestInvalid like ``receive``."""
    async with _body(request, max_bytes) as chunks:
        await _write_file(chunks, path)


@contextlib.asynccontextmanager
async def _body(request: Request, max_bytes: int) -> AsyncIterator[AsyncIterator[bytes]]:
    """The body's chunks; read to their end, they are what Content-Digest says."""
    if request.headers.get("content-encoding", "identity") != "identity":
        raise RequestInvalid("send uploads without Content-Encoding", code="unsupported_media_type")
    digest = ContentDigest(request.headers.getlist(digests.HEADER))
    yield digest.watch(bounded(request, max_bytes))
    digest.check()


def parse_metadata(text: bytes, where: str) -> dict[str, object]:
    """Metadata from a header or part, which ``where`` names."""
    try:
        return parse_json(text)
    except RequestInvalid as error:
        raise RequestInvalid(
            f"{where} must be a JSON object", code="invalid_metadata", param=where
        ) from error


async def _write_file(chunks: AsyncIterator[bytes], path: Path) -> None:
    with create_file(path) as file:
        pending = bytearray()
        async for chunk in chunks:
            pending += chunk
            if len(pending) >= _WRITE_BYTES:
                await asyncio.to_thread(write_all, file, pending)
                pending.clear()
        await asyncio.to_thread(write_all, file, pending)


async def _receive_parts(chunks: AsyncIterator[bytes], boundary: bytes, folder: Path) -> Received:
    if not boundary:
        raise RequestInvalid("multipart/form-data needs a boundary", code="invalid_multipart")
    adapter = folder / "adapter"
    adapter.mkdir()
    with contextlib.closing(_Parts(adapter)) as parts:
        try:
            parser = MultipartParser(boundary, parts.callbacks())
            async for chunk in chunks:
                parser.write(chunk)
                if parts.num_pending >= _WRITE_BYTES:
                    await asyncio.to_thread(parts.write)
            await asyncio.to_thread(parts.write)
        except FormParserError as error:
            raise RequestInvalid(
                f"the multipart body is malformed: {error}", code="invalid_multipart"
            ) from error
        parts.check_complete()
    return Received(adapter, parts.metadata)


class _Parts:
    """Where multipart parts go: two files and the metadata, by the part's name; a file name means nothing."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, io.FileIO] = {}
        self._pending: dict[str, bytearray] = {}  # by part: what is not written yet; all of the metadata
        self._header = [bytearray(), bytearray()]  # name, value
        self._disposition = b""
        self._name = ""
        self._complete = False

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda chunk, start, end: self._add_header(0, chunk[start:end]),
            "on_header_value": lambda chunk, start, end: self._add_header(1, chunk[start:end]),
            "on_header_end": self._end_header,
            "on_headers_finished": self._open,
            "on_part_data": lambda chunk, start, end: self._add(chunk[start:end]),
            "on_end": self._end,
        }

    @property
    def num_pending(self) -> int:
        """Bytes not written yet."""
        return sum(map(len, self._pending.values()))

    @property
    def metadata(self) -> dict[str, object] | None:
        text = self._pending.get("metadata")
        return None if text is None else parse_metadata(bytes(text), "metadata")

    def write(self) -> None:
        """Blocks; nothing else may be called meanwhile."""
        for name, file in self._files.items():
            write_all(file, self._pending[name])
            self._pending[name].clear()

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def check_complete(self) -> None:
        if not self._complete:
            raise RequestInvalid("the multipart body ends before its last boundary", code="invalid_multipart")
        missing = next((name for name in ADAPTER_FILES if name not in self._files), None)
        if missing is not None:
            raise AdapterInvalid(f"the part {missing!r} is missing", code="missing_file", param=missing)

    def _begin(self) -> None:
        self._disposition, self._name = b"", ""

    def _add_header(self, which: int, text: bytes) -> None:
        self._header[which] += text
        if len(self._header[which]) > _MAX_PART_HEADER_BYTES:
            raise RequestInvalid("a part's header is too long", code="invalid_multipart")

    def _end_header(self) -> None:
        name, value = (bytes(part) for part in self._header)
        self._header = [bytearray(), bytearray()]
        if name.lower() == b"content-disposition":
            self._disposition = value

    def _open(self) -> None:
        name = parse_options_header(self._disposition)[1].get(b"name", b"").decode("latin-1")
        if name not in {*ADAPTER_FILES, "metadata"}:
            raise RequestInvalid(
                f"an upload has the parts {', '.join(ADAPTER_FILES)} and metadata, not {name[:64]!r}",
                code="invalid_multipart",
                param=name[:64],
            )
        if name in self._pending:
            raise RequestInvalid(f"the part {name!r} comes twice", code="invalid_multipart", param=name)
        self._name, self._pending[name] = name, bytearray()
        if name in ADAPTER_FILES:
            self._files[name] = create_file(self._folder / name)

    def _add(self, content: bytes) -> None:
        pending = self._pending[self._name]
        pending += content
        if self._name == "metadata" and len(pending) > MAX_METADATA_BYTES:
            raise RequestInvalid(
                f"metadata may have {MAX_METADATA_BYTES} bytes", code="invalid_metadata", param="metadata"
            )

    def _end(self) -> None:
        self._complete = True
