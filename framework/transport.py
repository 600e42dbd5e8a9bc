"""Calls on their way through the HTTP library: requests, uploads from disk, broken connections."""

from __future__ import annotations

import contextlib
import io
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import httpx2
import msgspec

from tunefleet import __version__, config, replies
from tunefleet.calls import Call, Progress
from tunefleet.core import ADAPTER_FILES
from tunefleet.errors import AdapterInvalid, ConfigError, ReplicaError

DEFAULT_URL = "http://127.0.0.1:8000"
_CHUNK_BYTES = 256 * 1024

T = TypeVar("T")


def settings(url: str | None, api_key: str | None, timeout_s: float) -> dict[str, Any]:
    """Of the HTTP library's client."""
    key = (api_key or config.setting("api_key") or "").strip()  # files end in a line end
    if not (key.isascii() and key.isprintable()):
        raise ConfigError("an API key is printable ASCII: look at api_key and TUNEFLEET_API_KEY")
    return {
        "base_url": (url or config.setting("url") or DEFAULT_URL).rstrip("/").removesuffix("/v1"),
        "headers": {
            "User-Agent": f"tunefleet/{__version__}",
            **({"Authorization": f"Bearer {key}"} if key else {}),
        },
        "timeout": httpx2.Timeout(timeout_s, connect=5),
    }


def request_of(call: Call[T]) -> dict[str, Any]:
    """All of the call but what it uploads."""
    headers = dict(call.headers)
    request: dict[str, Any] = {
        "method": call.method,
        "url": call.path,
        "params": call.query or None,
        "headers": headers,
    }
    if call.body is not None:
        request["content"] = msgspec.json.encode(call.body)
        headers["Content-Type"] = "application/json"
    elif call.upload is not None and not call.upload.is_dir():
        headers["Content-Type"] = "application/octet-stream"
        headers["Content-Length"] = str(call.upload.stat().st_size)
    return request


@contextlib.contextmanager
def upload_of(call: Call[T]) -> Iterator[dict[str, Any]]:
    """The body of an upload, read from disk as it is sent."""
    if call.upload is None:
        yield {}
        return
    folder = call.upload if call.upload.is_dir() else None
    paths = [folder / file for file in ADAPTER_FILES] if folder else [call.upload]
    with contextlib.ExitStack() as stack:
        try:
            told = _Sent(call.progress, sum(path.stat().st_size for path in paths))
            files = [stack.enter_context(_SentFile(path, told)) for path in paths]
            if folder:
                named = zip(paths, files, strict=True)
                yield {"files": {path.name: (path.name, file) for path, file in named}}
            else:
                yield {"content": files[0]}
        except OSError as error:
            raise AdapterInvalid(f"can't read {call.upload}: {error.strerror}", code="unreadable") from error


async def chunks_of(file: io.FileIO) -> AsyncIterator[bytes]:
    while chunk := file.read(_CHUNK_BYTES):
        yield chunk


@contextlib.contextmanager
def reachable(url: httpx2.URL) -> Iterator[None]:
    """What the HTTP library raises, as ReplicaError."""
    shown = url.copy_with(userinfo=b"")
    try:
        yield
    except httpx2.ConnectError as error:
        raise ReplicaError(
            f"no server at {shown}: start one with `tunefleet serve`, or set TUNEFLEET_URL",
            code="unreachable",
        ) from error
    except httpx2.TransportError as error:
        raise ReplicaError(
            f"the connection to {shown} broke: {error or type(error).__name__}", code="connection_broken"
        ) from error


def answer_of(call: Call[T], response: httpx2.Response) -> T:
    if not response.is_success:
        refuse(response, response.content)
    try:
        return call.parse(response.content)
    except msgspec.DecodeError as error:
        raise ReplicaError("the server's answer is not tunefleet's", code="not_tunefleet") from error


def refuse(response: httpx2.Response, content: bytes) -> NoReturn:
    """Raises what an answer that is no success says."""
    replies.raise_for(response.status_code, content, response.headers.get("retry-after"))


class _Sent:
    """Bytes of one upload that are sent, over all its files."""

    def __init__(self, progress: Progress | None, num_total: int) -> None:
        self._progress = progress
        self._num_total = num_total
        self._num_sent = 0

    def add(self, num_bytes: int) -> None:
        self._num_sent += num_bytes
        if self._progress is not None and num_bytes:
            self._progress(self._num_sent, self._num_total)


class _SentFile(io.FileIO):
    """A file that tells what is read of it."""

    def __init__(self, path: Path, sent: _Sent) -> None:
        super().__init__(path)
        self._sent = sent

    def read(self, size: int | None = -1, /) -> bytes:
        chunk = super().read(-1 if size is None else size) or b""
        self._sent.add(len(chunk))
        return chunk
