"""``Client`` for asyncio."""

from __future__ import annotations

import builtins
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar, Unpack

import httpx2
from msgspec import UNSET, UnsetType

from tunefleet import calls
from tunefleet.answers import Answer, Chunk, FleetStatus, Warm
from tunefleet.arriving import ArrivingFile, arriving
from tunefleet.asking import Asking, ChatMessages
from tunefleet.calls import Call, Progress
from tunefleet.core import ADAPTER_FILES, DEFAULT_ADAPTER, Adapter, PinTier, Receipt, User, Version
from tunefleet.replies import EventReader
from tunefleet.target import Fallback
from tunefleet.transport import answer_of, chunks_of, reachable, refuse, request_of, settings, upload_of

T = TypeVar("T")


class AsyncClient:
    """``Client`` for asyncio; close it with ``aclose``, or use it with ``async with``."""

    def __init__(self, url: str | None = None, api_key: str | None = None, *, timeout_s: float = 600) -> None:
        self._http = httpx2.AsyncClient(**settings(url, api_key, timeout_s))
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
        reader = EventReader()
        with reachable(self._http.base_url):
            async with self._http.stream(**request_of(call)) as response:
                if not response.is_success:
                    refuse(response, await response.aread())
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

    async def user(self, user_id: str) -> User:
        """One user and their settings."""
        return await self.send(calls.user(user_id))

    async def update_user(
        self,
        user_id: str,
        *,
        fallback: Fallback | UnsetType | None = UNSET,
        limits: dict[str, object] | UnsetType | None = UNSET,
        metadata: dict[str, object] | UnsetType | None = UNSET,
    ) -> User:
        """Changes what is given; None takes a setting away. Makes the user if there is none."""
        return await self.send(
            calls.update_user(user_id, fallback=fallback, limits=limits, metadata=metadata)
        )

    async def delete_user(self, user_id: str) -> Receipt:
        """Removes all of a user from everywhere; the receipt says what, where, and what is still to come."""
        return await self.send(calls.delete_user(user_id))

    async def deletion(self, deletion_id: str) -> Receipt:
        """How far a deletion is."""
        return await self.send(calls.deletion(deletion_id))

    async def warmup(self, user_id: str | None = None, *, name: str = DEFAULT_ADAPTER) -> Warm:
        """Returns when a replica is READY, and the user's adapter on its device."""
        return await self.send(calls.warmup(user_id, name=name))

    async def status(self) -> FleetStatus:
        """What runs where; wakes nothing."""
        return await self.send(calls.status())

    async def send(self, call: Call[T]) -> T:
        """Sends any call of ``tunefleet.calls``."""
        with reachable(self._http.base_url), upload_of(call) as upload:
            if "content" in upload:
                upload["content"] = chunks_of(upload["content"])
            response = await self._http.request(**request_of(call), **upload)
        return answer_of(call, response)

    async def save(self, call: Call[bytes], path: Path) -> None:
        """Writes the answer of a download, which must be what its ETag says, to a new file."""
        with reachable(self._http.base_url), ArrivingFile(path) as file:
            async with self._http.stream(**request_of(call)) as response:
                if not response.is_success:
                    refuse(response, await response.aread())
                async for chunk in response.aiter_bytes():
                    file.write(chunk)
                file.check(response.headers.get("etag", ""))


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
        progress: Progress | None = None,
        idempotency_key: str | None = None,
    ) -> Version:
        """Uploads a PEFT folder, or a tar or zip of one, as the user's next version."""
        return await self._client.send(
            calls.push(
                user_id,
                path,
                name=name,
                promote=promote,
                metadata=metadata,
                progress=progress,
                idempotency_key=idempotency_key,
            )
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

    async def show(self, user_id: str, *, name: str = DEFAULT_ADAPTER) -> Adapter:
        """The version that answers, with the adapter's canary and pin."""
        return await self._client.send(calls.show(user_id, name=name))

    async def live(self, user_id: str, *, name: str = DEFAULT_ADAPTER) -> Version:
        """The version that answers."""
        return await self.show(user_id, name=name)

    async def promote(
        self, user_id: str, version: int, *, name: str = DEFAULT_ADAPTER, if_live: int | None = None
    ) -> Version:
        """Makes a version live: the one that answers from now on."""
        return await self._client.send(calls.promote(user_id, version, name=name, if_live=if_live))

    async def rollback(
        self, user_id: str, to: int | None = None, if_live: int | None = None, *, name: str = DEFAULT_ADAPTER
    ) -> Version:
        """Makes live what was live before, or ``to``, which must have been; again: one further back."""
        return await self._client.send(calls.rollback(user_id, to, if_live, name=name))

    async def canary(
        self, user_id: str, version: int, percent: float, *, name: str = DEFAULT_ADAPTER
    ) -> Adapter:
        """Lets a version answer a share of the sessions."""
        return await self._client.send(calls.canary(user_id, version, percent, name=name))

    async def end_canary(self, user_id: str, *, name: str = DEFAULT_ADAPTER) -> Adapter:
        """The live version answers all sessions again."""
        return await self._client.send(calls.end_canary(user_id, name=name))

    async def pin(
        self,
        user_id: str,
        tier: PinTier = "host",
        until: str | None = None,
        *,
        name: str = DEFAULT_ADAPTER,
    ) -> Adapter:
        """Keeps what answers at hand on every machine, down to ``tier``; ``until`` an RFC 3339 time."""
        return await self._client.send(calls.pin(user_id, tier, until, name=name))

    async def unpin(self, user_id: str, *, name: str = DEFAULT_ADAPTER) -> Adapter:
        """It may be evicted again."""
        return await self._client.send(calls.unpin(user_id, name=name))

    async def delete(self, user_id: str, version: int, *, name: str = DEFAULT_ADAPTER) -> Receipt:
        """Removes a version that doesn't answer from everywhere."""
        return await self._client.send(calls.delete(user_id, version, name=name))

    async def download(
        self, user_id: str, version: int | None, into: str | Path, *, name: str = DEFAULT_ADAPTER
    ) -> None:
        """Writes a version's files, None: the live one's, into a folder, byte for byte as uploaded."""
        number = (await self.live(user_id, name=name)).version if version is None else version
        with arriving(Path(into)) as folder:
            for file in ADAPTER_FILES:
                await self._client.save(calls.download(user_id, number, file, name=name), folder / file)
