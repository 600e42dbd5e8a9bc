"""Clients of a running server, with the surface of ``Fleet``: moving out of the process changes one line."""

from __future__ import annotations

import builtins
from collections.abc import Iterator, Mapping, Sequence
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
from tunefleet.transport import answer_of, reachable, refuse, request_of, settings, upload_of

T = TypeVar("T")


class Client:
    """A blocking client; close it, or use it with ``with``. Safe to share between threads.

    Args:
        url: of the server; else TUNEFLEET_URL, else this machine's port 8000.
        api_key: else TUNEFLEET_API_KEY, else none.
        timeout_s: longest silence of the server; a cold start and a long answer fit into it.
    """

    def __init__(self, url: str | None = None, api_key: str | None = None, *, timeout_s: float = 600) -> None:
        self._http = httpx2.Client(**settings(url, api_key, timeout_s))
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
        reader = EventReader()
        with reachable(self._http.base_url), self._http.stream(**request_of(call)) as response:
            if not response.is_success:
                refuse(response, response.read())
            for content in response.iter_bytes():
                yield from reader.feed(content)
        reader.finish()

    def complete(self, user_id: str | None, prompt: str | Sequence[int], **asking: Unpack[Asking]) -> Answer:
        """Continues a text or token ids; no chat template."""
        return self.send(calls.complete(user_id, prompt, asking))

    def users(self, *, after: str | None = None, limit: int = 100) -> list[User]:
        """A page of users by id; ``after`` is the last id of the page before."""
        return self.send(calls.users(after=after, limit=limit))

    def user(self, user_id: str) -> User:
        """One user and their settings."""
        return self.send(calls.user(user_id))

    def update_user(
        self,
        user_id: str,
        *,
        fallback: Fallback | UnsetType | None = UNSET,
        limits: dict[str, object] | UnsetType | None = UNSET,
        metadata: dict[str, object] | UnsetType | None = UNSET,
    ) -> User:
        """Changes what is given; None takes a setting away. Makes the user if there is none."""
        return self.send(calls.update_user(user_id, fallback=fallback, limits=limits, metadata=metadata))

    def delete_user(self, user_id: str) -> Receipt:
        """Removes all of a user from everywhere; the receipt says what, where, and what is still to come."""
        return self.send(calls.delete_user(user_id))

    def deletion(self, deletion_id: str) -> Receipt:
        """How far a deletion is."""
        return self.send(calls.deletion(deletion_id))

    def warmup(self, user_id: str | None = None, *, name: str = DEFAULT_ADAPTER) -> Warm:
        """Returns when a replica is READY, and the user's adapter on its device."""
        return self.send(calls.warmup(user_id, name=name))

    def status(self) -> FleetStatus:
        """What runs where; wakes nothing."""
        return self.send(calls.status())

    def send(self, call: Call[T]) -> T:
        """Sends any call of ``tunefleet.calls``."""
        with reachable(self._http.base_url), upload_of(call) as upload:
            response = self._http.request(**request_of(call), **upload)
        return answer_of(call, response)

    def save(self, call: Call[bytes], path: Path) -> None:
        """Writes the answer of a download, which must be what its ETag says, to a new file."""
        with (
            reachable(self._http.base_url),
            self._http.stream(**request_of(call)) as response,
            ArrivingFile(path) as file,
        ):
            if not response.is_success:
                refuse(response, response.read())
            for chunk in response.iter_bytes():
                file.write(chunk)
            file.check(response.headers.get("etag", ""))


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
        progress: Progress | None = None,
        idempotency_key: str | None = None,
    ) -> Version:
        """Uploads a PEFT folder, or a tar or zip of one, as the user's next version."""
        return self._client.send(
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

    def show(self, user_id: str, *, name: str = DEFAULT_ADAPTER) -> Adapter:
        """The version that answers, with the adapter's canary and pin."""
        return self._client.send(calls.show(user_id, name=name))

    def live(self, user_id: str, *, name: str = DEFAULT_ADAPTER) -> Version:
        """The version that answers."""
        return self.show(user_id, name=name)

    def promote(
        self, user_id: str, version: int, *, name: str = DEFAULT_ADAPTER, if_live: int | None = None
    ) -> Version:
        """Makes a version live: the one that answers from now on."""
        return self._client.send(calls.promote(user_id, version, name=name, if_live=if_live))

    def rollback(
        self, user_id: str, to: int | None = None, if_live: int | None = None, *, name: str = DEFAULT_ADAPTER
    ) -> Version:
        """Makes live what was live before, or ``to``, which must have been; again: one further back."""
        return self._client.send(calls.rollback(user_id, to, if_live, name=name))

    def canary(self, user_id: str, version: int, percent: float, *, name: str = DEFAULT_ADAPTER) -> Adapter:
        """Lets a version answer a share of the sessions."""
        return self._client.send(calls.canary(user_id, version, percent, name=name))

    def end_canary(self, user_id: str, *, name: str = DEFAULT_ADAPTER) -> Adapter:
        """The live version answers all sessions again."""
        return self._client.send(calls.end_canary(user_id, name=name))

    def pin(
        self,
        user_id: str,
        tier: PinTier = "host",
        until: str | None = None,
        *,
        name: str = DEFAULT_ADAPTER,
    ) -> Adapter:
        """Keeps what answers at hand on every machine, down to ``tier``; ``until`` an RFC 3339 time."""
        return self._client.send(calls.pin(user_id, tier, until, name=name))

    def unpin(self, user_id: str, *, name: str = DEFAULT_ADAPTER) -> Adapter:
        """It may be evicted again."""
        return self._client.send(calls.unpin(user_id, name=name))

    def delete(self, user_id: str, version: int, *, name: str = DEFAULT_ADAPTER) -> Receipt:
        """Removes a version that doesn't answer from everywhere."""
        return self._client.send(calls.delete(user_id, version, name=name))

    def download(
        self, user_id: str, version: int | None, into: str | Path, *, name: str = DEFAULT_ADAPTER
    ) -> None:
        """Writes a version's files, None: the live one's, into a folder, byte for byte as uploaded."""
        number = self.live(user_id, name=name).version if version is None else version
        with arriving(Path(into)) as folder:
            for file in ADAPTER_FILES:
                self._client.save(calls.download(user_id, number, file, name=name), folder / file)
