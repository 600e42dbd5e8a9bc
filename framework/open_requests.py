"""What one router is answering, by user, so that it ends when the user is deleted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import NamedTuple, TypeVar

from tunefleet.errors import AdapterNotFound, TunefleetError

T = TypeVar("T")


class Owner(NamedTuple):
    tenant: str
    user_id: str | None  # None: the base, asked by the tenant itself


class OpenRequests:
    """Lives as long as its fleet. Requests enter before their user is looked up, so that none slips by."""

    def __init__(self) -> None:
        self._open: dict[Owner, set[OpenRequest]] = {}

    def enter(self, owner: Owner) -> OpenRequest:
        """The caller closes it, or hands it to whoever does."""
        request = OpenRequest(lambda: self._leave(owner, request))
        self._open.setdefault(owner, set()).add(request)
        return request

    async def end(self, owner: Owner) -> int:
        """Ends all of a deleted user; how many. Their sequences are cancelled when it returns."""
        requests = tuple(self._open.get(owner, ()))
        await asyncio.gather(*(request.end(user_deleted(owner.user_id)) for request in requests))
        return len(requests)

    def check(self) -> None:
        """Asserts that owners without requests are forgotten."""
        assert all(self._open.values()), self._open

    def __len__(self) -> int:
        return sum(map(len, self._open.values()))

    @property
    def num_waiting(self) -> int:
        """Without a token yet."""
        return sum(not request.is_answering for requests in self._open.values() for request in requests)

    def _leave(self, owner: Owner, request: OpenRequest) -> None:
        requests = self._open.get(owner, set())
        requests.discard(request)
        if not requests:
            self._open.pop(owner, None)


class OpenRequest:
    """One request, from before its user is looked up to the end of its answer, which closes it."""

    def __init__(self, leave: Callable[[], None]) -> None:
        self.on_end: Callable[[], Awaitable[None]] | None = None  # cancels its sequence, once there is one
        self.is_answering = False  # its first token is there
        self._leave = leave
        self._error: TunefleetError | None = None
        self._wait: asyncio.Timeout | None = None

    def close(self) -> None:
        """Safe to call again."""
        self._leave()

    def check(self) -> None:
        """Raises the error that the request was ended with."""
        if self._error is not None:
            raise self._error

    async def next_of(self, items: AsyncIterator[T]) -> T | None:
        """The next item, None after the last one.

        Raises:
            TunefleetError: the request was ended, before or while it waited.
        """
        self.check()
        try:
            async with asyncio.timeout(None) as self._wait:
                item = await anext(items, None)
        except TimeoutError:
            self.check()
            raise
        finally:
            self._wait = None
        self.check()
        return item

    async def end(self, error: TunefleetError) -> None:
        """Whoever waits in ``next_of`` gets ``error``, as does everybody after."""
        if self._error is not None:
            return
        self._error = error
        if self._wait is not None:
            self._wait.reschedule(asyncio.get_running_loop().time())
        if self.on_end is not None:
            await self.on_end()


def user_deleted(user_id: str | None) -> AdapterNotFound:
    return AdapterNotFound(
        f"user {user_id!r} was deleted while this was answered", code="user_deleted", param="user_id"
    )
