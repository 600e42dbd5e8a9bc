"""The library: a base model, everybody's adapters, and the machine that serves them, in one object."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self, Unpack

from msgspec import UNSET, UnsetType

from tunefleet import config
from tunefleet.answers import Answer, Chunk, FleetStatus, Warm
from tunefleet.asking import Asking, ChatMessages, parameters
from tunefleet.auth import Authenticate, admin_key, anyone
from tunefleet.core import DEFAULT_ADAPTER, DEFAULT_TENANT, Manifest, Receipt, User
from tunefleet.errors import ConfigError, InvalidState
from tunefleet.fleet_adapters import FleetAdapters
from tunefleet.target import Fallback, Target

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from tunefleet.adapters_store.store import AdapterStore
    from tunefleet.generation import Generation
    from tunefleet.generations import Generations
    from tunefleet.runtime.dispatch import Dispatcher
    from tunefleet.text import Tokenizer

_log = logging.getLogger("tunefleet")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FleetParts:
    """What an open fleet is made of; tests bring their own. The fleet starts and closes them."""

    manifest: Manifest
    tokenizer: Tokenizer
    store: AdapterStore
    dispatcher: Dispatcher


class Fleet:
    """Everything in one process: ``async with Fleet(base_model="...") as fleet``.

    Keywords are the options of ``tunefleet.config.Options``. Nothing is started before ``async with``, which
    also closes all that it opened. Generation defaults equal HTTP's: temperature 1, ``max_tokens`` what fits.
    """

    def __init__(self, *, authenticate: Authenticate | None = None, **options: object) -> None:
        self.options = config.resolve(keywords=options)
        self.adapters = FleetAdapters(self)
        self._authenticate = authenticate
        self._given: FleetParts | None = None
        self._open: _Open | None = None

    @classmethod
    def from_parts(
        cls, parts: FleetParts, *, authenticate: Authenticate | None = None, **options: object
    ) -> Self:
        """A fleet on parts of the caller's, for tests: ``runtime.fakes.FakeDispatcher`` needs no machine."""
        fleet = cls(authenticate=authenticate, **options)
        fleet._given = parts
        return fleet

    async def __aenter__(self) -> Self:
        if self._open is not None:
            raise InvalidState("this fleet is open already")
        async with contextlib.AsyncExitStack() as stack:
            parts = self._given or await _open_parts(self.options)
            stack.push_async_callback(parts.store.close)
            await parts.dispatcher.start()
            stack.push_async_callback(parts.dispatcher.close)
            generations = _generations(self.options, parts)
            await stack.enter_async_context(_watched(parts, generations))
            self._open = _Open(parts, generations, stack.pop_all())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        opened, self._open = self._opened, None
        await opened.stack.aclose()

    @contextlib.asynccontextmanager
    async def lifespan(self, app: object) -> AsyncIterator[None]:
        """``FastAPI(lifespan=fleet.lifespan)``, or Starlette: opens with the app, closes with it."""
        async with self:
            yield

    def asgi(self, *, auth: Literal["none"] | None = None) -> ASGIApp:
        """The HTTP API as an app to mount: ``api.mount("/ai", fleet.asgi())``.

        Who calls is told by ``authenticate``, else by the key in ``TUNEFLEET_ADMIN_KEY``; ``auth="none"``
        makes everybody the default tenant's backend.

        Raises:
            ConfigError: none of the three is set.
        """
        with needs_serve_extra():
            from tunefleet.http.app import create_app
        return create_app(self, self._authenticator(auth))

    def _authenticator(self, auth: str | None) -> Authenticate:
        if auth not in {None, "none"} or (auth and self._authenticate):
            raise ConfigError("auth is 'none' or left out, and excludes authenticate", param="auth")
        key = config.setting("admin_key")
        chosen = anyone if auth else self._authenticate or (admin_key(key) if key else None)
        if chosen is None:
            raise ConfigError(
                "a mounted fleet needs to know its callers: give Fleet(authenticate=...), "
                "set TUNEFLEET_ADMIN_KEY, or say asgi(auth='none') to let anybody in",
                param="auth",
            )
        return chosen

    @property
    def manifest(self) -> Manifest:
        return self._opened.parts.manifest

    @property
    def store(self) -> AdapterStore:
        return self._opened.parts.store

    @property
    def dispatcher(self) -> Dispatcher:
        return self._opened.parts.dispatcher

    @property
    def generations(self) -> Generations:
        return self._opened.generations

    @property
    def is_open(self) -> bool:
        return self._open is not None

    @property
    def base_names(self) -> tuple[str, ...]:
        """What a request may call the base, its proper name first."""
        return tuple(
            dict.fromkeys((self.manifest.name, self.manifest.base_id, self.options.base_model, "quickstart"))
        )

    async def chat(self, user_id: str | None, messages: ChatMessages, **asking: Unpack[Asking]) -> Answer:
        """Answers with the user's live adapter, or the version asked for; user None: with the base.

        Raises:
            AdapterNotFound: no such user, adapter or version, and no fallback.
        """
        return await (await self._chat(user_id, messages, asking)).answer()

    async def stream(
        self, user_id: str | None, messages: ChatMessages, **asking: Unpack[Asking]
    ) -> AsyncIterator[Chunk]:
        """Like ``chat``, as it comes. Leaving the loop cancels the rest."""
        generation = await self._chat(user_id, messages, asking)
        async with contextlib.aclosing(generation.chunks()) as chunks:
            async for chunk in chunks:
                yield chunk

    async def complete(
        self, user_id: str | None, prompt: str | Sequence[int], **asking: Unpack[Asking]
    ) -> Answer:
        """Continues a text or token ids; no chat template. Control tokens in a text count."""
        from tunefleet.openai_api import CompletionRequest, parse_request

        request = parse_request(CompletionRequest, {"prompt": prompt, **parameters(asking)})
        return await (await self.generations.start(_target(user_id, asking), request)).answer()

    async def users(self, *, after: str | None = None, limit: int = 100) -> list[User]:
        """A page of users by id; ``after`` is the last id of the page before."""
        return await self.store.users(after=after, limit=limit)

    async def user(self, user_id: str) -> User:
        """One user and their settings."""
        return await self.store.user(user_id)

    async def update_user(
        self,
        user_id: str,
        *,
        fallback: Fallback | UnsetType | None = UNSET,
        limits: dict[str, object] | UnsetType | None = UNSET,
        metadata: dict[str, object] | UnsetType | None = UNSET,
    ) -> User:
        """Changes what is given; None takes a setting away. Makes the user if there is none."""
        return await self.store.update_user(user_id, fallback=fallback, limits=limits, metadata=metadata)

    async def delete_user(self, user_id: str) -> Receipt:
        """Removes all of a user from everywhere; the receipt says what, where, and what is still to come."""
        return await self.store.delete_user(user_id)

    async def deletion(self, deletion_id: str) -> Receipt:
        """How far a deletion is."""
        return await self.store.deletion(deletion_id)

    async def warmup(
        self, user_id: str | None = None, *, name: str = DEFAULT_ADAPTER, tenant: str = DEFAULT_TENANT
    ) -> Warm:
        """Returns when a replica is READY, and the user's adapter on its device."""
        seconds = await self.dispatcher.warmup()
        answer = await (await self.generations.warm(Target(user_id, name, tenant))).answer()
        return Warm(seconds=seconds + answer.timing["first_token"], adapter_digest=answer.adapter_digest)

    async def status(self) -> FleetStatus:
        """What runs where; wakes nothing."""
        from tunefleet.fleet_status import fleet_status

        return fleet_status(await self.dispatcher.status(), self.manifest, self.options)

    @property
    def _opened(self) -> _Open:
        if self._open is None:
            raise InvalidState("the fleet is not open: use it inside `async with fleet` or its lifespan")
        return self._open

    async def _chat(self, user_id: str | None, messages: ChatMessages, asking: Asking) -> Generation:
        from tunefleet.openai_api import ChatRequest, parse_request

        request = parse_request(ChatRequest, {"messages": list(messages), **parameters(asking)})
        return await self.generations.start(_target(user_id, asking), request)


def _target(user_id: str | None, asking: Asking) -> Target:
    return Target(
        user_id,
        asking.get("name", DEFAULT_ADAPTER),
        version=asking.get("version"),
        fallback=asking.get("fallback"),
        session=asking.get("session_id"),
    )


@dataclasses.dataclass(frozen=True)
class _Open:
    """All that exists while a fleet is open; ``stack`` closes it."""

    parts: FleetParts
    generations: Generations
    stack: contextlib.AsyncExitStack


async def _open_parts(options: config.Options) -> FleetParts:
    """The real parts. Preparing the base may take a minute the first time."""
    with needs_serve_extra():
        from tunefleet.adapters_store.store import AdapterStore
        from tunefleet.runtime.base import locate_base, read_manifest
        from tunefleet.runtime.machine import Machine
        from tunefleet.text import Tokenizer
    base_dir = await asyncio.to_thread(locate_base, options, progress=_log.info)
    manifest = await asyncio.to_thread(read_manifest, base_dir)
    tokenizer = await asyncio.to_thread(Tokenizer, base_dir)
    store = await asyncio.to_thread(AdapterStore.open, options, manifest)
    return FleetParts(
        manifest=manifest, tokenizer=tokenizer, store=store, dispatcher=Machine(options, manifest, base_dir)
    )


def _generations(options: config.Options, parts: FleetParts) -> Generations:
    from tunefleet.generations import Generations

    return Generations(
        options=options,
        manifest=parts.manifest,
        tokenizer=parts.tokenizer,
        store=parts.store,
        dispatcher=parts.dispatcher,
    )


def _watched(parts: FleetParts, generations: Generations) -> AbstractAsyncContextManager[object]:
    """The store's background work: deletions, pins, garbage."""
    from tunefleet.router_machine import RouterMachine

    return parts.store.watch(RouterMachine(parts.dispatcher, generations.open_requests))


@contextlib.contextmanager
def needs_serve_extra() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        if (error.name or "").startswith("tunefleet"):
            raise
        raise ConfigError(
            f"serving needs more than the clients' install, {error.name} is missing: "
            "pip install 'tunefleet[serve]'",
            code="not_installed",
        ) from error
