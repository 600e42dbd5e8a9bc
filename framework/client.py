"""Clients of a running server, with the surface of ``Fleet``: moving out of the process changes one line."""

from __future__ import annotations

import builtins
import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import httpx2
import msgspec

from tunefleet import __version__, calls, config
from tunefleet.answers import Answer, Chunk, FleetStatus, Warm
from tunefleet.asking import Asking, ChatMessages
from tunefleet.calls import Call
from tunefleet.core import ADAPTER_FILES, DEFAULT_ADAPTER, User, Version
from tunefleet.errors import AdapterInvalid, ReplicaError

DEFAULT_URL = "http://127.0.0.1:8000"
_CHUNK_BYTES = 256 * 1024

T = TypeVar("T")


class Client:
    """A blocking client; close it, or use it with ``with``. Safe to share between threads.

    Args:
        url: of the server; else TUNEFLEET_URL, else this machine's port 8000.
        api_key: else TUNEFLEET_API_KEY, else none.
        timeout_s: longest silence of the server; a cold start and a long answer fit into it.
    """

    def __init__(self, url: str | None = None, api_key: str | None = None, *, timeout_s: float = 600) -> None:
        self._http = httpx2.Client(**_settings(url, api_key, timeout_s))
        self.adapters = ClientAdapters(self)

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def chat(self, user_id: str | None, messages: ChatMessages, **asking: Unpack[Asking]) -> Answer:
        """Answers with the user's live adapter, or the version asked for; user None: with the base."""
        return self.send(calls.chat(user_id, messages, asking))

    def stream(
        self, user_id: str | None, messages: ChatMessages, **asking: Unpack[Asking]
    ) -> Iterator[Chunk]:
        """Like ``chat``, as it comes. Leaving the loop cancels the rest."""
        call = calls.chat(user_id, messages, asking, stream=True)
        reader = calls.EventReader()
        with _reachable(self._http.base_url), self._http.stream(**_request(call)) as response:
            if not response.is_success:
                calls.raise_for(response.status_code, response.read(), response.headers.get("retry-after"))
            for content in response.iter_bytes():
                yield from reader.feed(content)
        reader.finish()

    def complete(self, user_id: str | None, prompt: str | Sequence[int], **asking: Unpack[Asking]) -> Answer:
        """Continues a text or token ids; no chat template."""
        return self.send(calls.complete(user_id, prompt, asking))

    def users(self, *, after: str | None = None, limit: int = 100) -> list[User]:
        """A page of users by id; ``after`` is the last id of the page before."""
        return self.send(calls.users(after=after, limit=limit))

    def warmup(self, user_id: str | None = None, *, name: str = DEFAULT_ADAPTER) -> Warm:
        """Returns when a replica is READY, and the user's adapter on its device."""
        return self.send(calls.warmup(user_id, name=name))

    def status(self) -> FleetStatus:
        """What runs where; wakes nothing."""
        return self.send(calls.status())

    def send(self, call: Call[T]) -> T:
        """Sends any call of ``tunefleet.calls``."""
        with _reachable(self._http.base_url), _upload(call) as upload:
            response = self._http.request(**_request(call), **upload)
        return _answer(call, response)


class ClientAdapters:
    """``client.adapters``."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def push(
        self,
        user_id: str,
        path: str | Path,
        *,
        name: str = DEFAULT_ADAPTER,
        promote: bool = True,
        metadata: Mapping[str, object] | None = None,
    ) -> Version:
        """Uploads a PEFT folder, or a tar or zip of one, as the user's next version."""
        return self._client.send(calls.push(user_id, path, name=name, promote=promote, metadata=metadata))

    def list(self, user_id: str, *, name: str = DEFAULT_ADAPTER) -> list[Version]:
        """All versions, newest first."""
        found: list[Version] = []
        while page := self.versions(user_id, name=name, after=found[-1].version if found else None):
            found += page
        return found

    def versions(
        self, user_id: str, *, name: str = DEFAULT_ADAPTER, after: int | None = None, limit: int = 100
    ) -> builtins.list[Version]:
        """A page of versions, newest first; ``after`` is the last number of the page before."""
        return self._client.send(calls.versions(user_id, name=name, after=after, limit=limit))

    def live(self, user_id: str, *, name: str = DEFAULT_ADAPTER) -> Version:
        """The version that answers."""
        return self._client.send(calls.live(user_id, name=name))

    def promote(
        self, user_id: str, version: int, *, name: str = DEFAULT_ADAPTER, if_live: int | None = None
    ) -> Version:
        """Makes a version live: the one that answers from now on."""
        return self._client.send(calls.promote(user_id, version, name=name, if_live=if_live))


class AsyncClient:
    """``Client`` for asyncio; close it with ``aclose``, or use it with ``async with``."""

    def __init__(self, url: str | None = None, api_key: str | None = None, *, timeout_s: float = 600) -> None:
        self._http = httpx2.AsyncClient(**_settings(url, api_key, timeout_s))
        self.adapters = AsyncClientAdapters(self)

    async def aclose(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def chat(self, user_id: str | None, messages: ChatMessages, **asking: Unpack[Asking]) -> Answer:
        """Answers with the user's live adapter, or the version asked for; user None: with the base."""
        return await self.send(calls.chat(user_id, messages, asking))

    async def stream(
        self, user_id: str | None, messages: ChatMessages, **asking: Unpack[Asking]
    ) -> AsyncIterator[Chunk]:
        """Like ``chat``, as it comes. Leaving the loop cancels the rest."""
        call = calls.chat(user_id, messages, asking, stream=True)
        reader = calls.EventReader()
        with _reachable(self._http.base_url):
            async with self._http.stream(**_request(call)) as response:
                if not response.is_success:
                    content = await response.aread()
                    calls.raise_for(response.status_code, content, response.headers.get("retry-after"))
                async for content in response.aiter_bytes():
                    for chunk in reader.feed(content):
                        yield chunk
        reader.finish()

    async def complete(
        self, user_id: str | None, prompt: str | Sequence[int], **asking: Unpack[Asking]
    ) -> Answer:
        """Continues a text or token ids; no chat template."""
        return await self.send(calls.complete(user_id, prompt, asking))

    async def users(self, *, after: str | None = None, limit: int = 100) -> list[User]:
        """A page of users by id; ``after`` is the last id of the page before."""
        return await self.send(calls.users(after=after, limit=limit))

    async def warmup(self, user_id: str | None = None, *, name: str = DEFAULT_ADAPTER) -> Warm:
        """Returns when a replica is READY, and the user's adapter on its device."""
        return await self.send(calls.warmup(user_id, name=name))

    async def status(self) -> FleetStatus:
        """What runs where; wakes nothing."""
        return await self.send(calls.status())

    async def send(self, call: Call[T]) -> T:
        """Sends any call of ``tunefleet.calls``."""
        with _reachable(self._http.base_url), _upload(call) as upload:
            if "content" in upload:
                upload["content"] = _chunks(upload["content"])
            response = await self._http.request(**_request(call), **upload)
        return _answer(call, response)


class AsyncClientAdapters:
    """``client.adapters``."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client

    async def push(
        self,
        user_id: str,
        path: str | Path,
        *,
        name: str = DEFAULT_ADAPTER,
        promote: bool = True,
        metadata: Mapping[str, object] | None = None,
    ) -> Version:
        """Uploads a PEFT folder, or a tar or zip of one, as the user's next version."""
        return await self._client.send(
            calls.push(user_id, path, name=name, promote=promote, metadata=metadata)
        )

    async def list(self, user_id: str, *, name: str = DEFAULT_ADAPTER) -> list[Version]:
        """All versions, newest first."""
        found: list[Version] = []
        while page := await self.versions(user_id, name=name, after=found[-1].version if found else None):
            found += page
        return found

    async def versions(
        self, user_id: str, *, name: str = DEFAULT_ADAPTER, after: int | None = None, limit: int = 100
    ) -> builtins.list[Version]:
        """A page of versions, newest first; ``after`` is the last number of the page before."""
        return await self._client.send(calls.versions(user_id, name=name, after=after, limit=limit))

    async def live(self, user_id: str, *, name: str = DEFAULT_ADAPTER) -> Version:
        """The version that answers."""
        return await self._client.send(calls.live(user_id, name=name))

    async def promote(
        self, user_id: str, version: int, *, name: str = DEFAULT_ADAPTER, if_live: int | None = None
    ) -> Version:
        """Makes a version live: the one that answers from now on."""
        return await self._client.send(calls.promote(user_id, version, name=name, if_live=if_live))


def _settings(url: str | None, api_key: str | None, timeout_s: float) -> dict[str, Any]:
    """Of the HTTP library's client."""
    key = api_key or config.setting("api_key")
    return {
        "base_url": (url or config.setting("url") or DEFAULT_URL).rstrip("/").removesuffix("/v1"),
        "headers": {
            "User-Agent": f"tunefleet/{__version__}",
            **({"Authorization": f"Bearer {key}"} if key else {}),
        },
        "timeout": httpx2.Timeout(timeout_s, connect=5),
    }


def _request(call: Call[T]) -> dict[str, Any]:
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
def _upload(call: Call[T]) -> Iterator[dict[str, Any]]:
    """The body of an upload, read from disk as it is sent."""
    if call.upload is None:
        yield {}
        return
    with contextlib.ExitStack() as stack:
        try:
            if call.upload.is_dir():
                opened = {
                    file: stack.enter_context((call.upload / file).open("rb")) for file in ADAPTER_FILES
                }
                yield {"files": {file: (file, stream) for file, stream in opened.items()}}
            else:
                yield {"content": stack.enter_context(call.upload.open("rb"))}
        except OSError as error:
            raise AdapterInvalid(f"can't read {call.upload}: {error.strerror}", code="unreadable") from error


async def _chunks(stream: Any) -> AsyncIterator[bytes]:
    while chunk := stream.read(_CHUNK_BYTES):
        yield chunk


@contextlib.contextmanager
def _reachable(url: httpx2.URL) -> Iterator[None]:
    try:
        yield
    except httpx2.ConnectError as error:
        raise ReplicaError(
            f"no server at {url}: start one with `tunefleet serve`, or set TUNEFLEET_URL", code="unreachable"
        ) from error
    except httpx2.TransportError as error:
        raise ReplicaError(
            f"the connection to {url} broke: {error or type(error).__name__}", code="connection_broken"
        ) from error


def _answer(call: Call[T], response: httpx2.Response) -> T:
    if not response.is_success:
        calls.raise_for(response.status_code, response.content, response.headers.get("retry-after"))
    try:
        return call.parse(response.content)
    except msgspec.DecodeError as error:
        raise ReplicaError("the server's answer is not tunefleet's", code="not_tunefleet") from error
