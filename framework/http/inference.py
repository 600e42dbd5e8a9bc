"""``/v1/chat/completions`` and ``/v1/completions``."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, get_args

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from tunefleet.auth import Caller
from tunefleet.choices import TextDelta
from tunefleet.core import ColdStart
from tunefleet.errors import RequestInvalid, TunefleetError
from tunefleet.generation import Generation
from tunefleet.http.bodies import JSON, integer, read_json
from tunefleet.http.boundary import request_id_of
from tunefleet.http.errors import error_body, unexpected_body
from tunefleet.http.shapes import ChatShape, CompletionShape, Shape
from tunefleet.openai_api import ChatRequest, CompletionRequest, parse_request
from tunefleet.target import Fallback, Target, choose_user

if TYPE_CHECKING:
    from tunefleet.fleet import Fleet

HEADERS = ("X-Request-Id", "X-Adapter-Digest", "X-Adapter-Version", "X-Cold-Start", "Server-Timing")
"""What every inference answer carries, and what pages of other origins may read."""

PATIENCE_S = 5.0  # a stream without a first token sends its headers then, and a comment as often

_log = logging.getLogger("tunefleet.http")
T = TypeVar("T")


class _Route(NamedTuple):
    kind: type[ChatRequest] | type[CompletionRequest]
    shape: type[Shape]


async def chat(fleet: Fleet, caller: Caller, request: Request) -> Response:
    return await _infer(fleet, caller, request, _Route(ChatRequest, ChatShape))


async def complete(fleet: Fleet, caller: Caller, request: Request) -> Response:
    return await _infer(fleet, caller, request, _Route(CompletionRequest, CompletionShape))


async def _infer(fleet: Fleet, caller: Caller, request: Request, route: _Route) -> Response:
    with fleet.generations.metrics.requests.refusals():
        asked = parse_request(route.kind, await read_json(request))
        target = target_of(fleet, caller, request, asked.model)
    generation = await fleet.generations.start(target, asked, request_id=request_id_of(request))
    if asked.stream:
        patience_s: float = request.app.state.patience_s
        shape = route.shape(generation, include_usage=asked.include_usage)
        return await _open_stream(request, generation, shape, patience_s)
    answer = await _unless_gone(request.receive, generation.answer())
    return JSON(route.shape(generation).whole(answer), headers=_headers(generation))


def target_of(fleet: Fleet, caller: Caller, request: Request, model: str | None) -> Target:
    headers = request.headers
    if len(headers.getlist("x-user-id")) > 1:  # a proxy's behind a client's, of which neither may win
        raise RequestInvalid("X-User-Id comes more than once", code="user_mismatch", param="X-User-Id")
    user_id, name = choose_user(
        own=caller.user_id, header=headers.get("x-user-id"), model=model, base_names=fleet.base_names
    )
    version = integer(headers, "x-adapter-version", default=0) if "x-adapter-version" in headers else None
    fallback, session = _fallback(headers.get("x-fallback")), headers.get("x-session-id")
    return Target(user_id, name, caller.tenant, version, fallback, session)


def _fallback(text: str | None) -> Fallback | None:
    for choice in get_args(Fallback):
        if text == choice:
            return choice  # type: ignore[no-any-return]  # one of the literals
    if text is None:
        return None
    raise RequestInvalid("X-Fallback is base or none", param="X-Fallback")


async def _unless_gone(receive: Receive, work: Coroutine[object, object, T]) -> T:
    """Runs ``work``; cancels it as soon as the client goes."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        await _cancelled(task, gone)


async def _open_stream(
    request: Request, generation: Generation, shape: Shape, patience_s: float
) -> StreamingResponse:
    """Waits for the first token, so that a refusal keeps its status; for ``patience_s`` at most."""
    first = asyncio.ensure_future(_first(generation))
    gone = asyncio.ensure_future(_disconnect(request.receive))
    stream = _EventStream(generation, shape, first, patience_s)
    try:
        await asyncio.wait({first, gone}, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
        if first.done():
            first.result()
        elif gone.done():
            raise ClientDisconnect
        stream.headers.update(_headers(generation))
    except BaseException:
        await stream.aclose()
        raise
    finally:
        await _cancelled(gone)
    return stream


class _EventStream(StreamingResponse):
    """Server-sent events of one generation; cancels it when the client goes, however that shows."""

    media_type = "text/event-stream"

    def __init__(
        self, generation: Generation, shape: Shape, first: asyncio.Future[TextDelta], patience_s: float
    ) -> None:
        self._generation = generation
        self._shape = shape
        self._first = first
        self._patience_s = patience_s
        self._events = self._iterate()
        super().__init__(self._events, headers={"cache-control": "no-cache", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        await _cancelled(self._first)
        await self._events.aclose()
        await self._generation.aclose()

    async def _iterate(self) -> AsyncGenerator[bytes]:
        try:
            while not self._first.done():
                yield f": waiting stage={self._generation.waits_for}\n\n".encode()
                await asyncio.wait({self._first}, timeout=self._patience_s)
            first = await self._first
            yield _events([*self._shape.opening(), *self._shape.pieces(first)])
            async for delta in self._generation:
                yield _events(self._shape.pieces(delta))
            yield b"data: [DONE]\n\n"
        except TunefleetError as error:
            _log.warning("stream %s failed: %s", self._generation.accepted.request_id, error, exc_info=error)
            yield _event(error_body(error))
        except Exception:  # headers are gone: this is all that the client can still be told
            _log.exception("stream %s failed", self._generation.accepted.request_id)
            yield _event(unexpected_body(self._generation.accepted.request_id))


def _events(values: Iterable[object]) -> bytes:
    return b"".join(map(_event, values))


def _event(value: object) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def _headers(generation: Generation) -> dict[str, str]:
    """Without a first token, only what is known."""
    headers = {
        "X-Request-Id": generation.accepted.request_id,
        "X-Adapter-Digest": generation.accepted.adapter_digest,
        "X-Adapter-Version": str(generation.accepted.adapter_version),
    }
    cold_start = generation.cold_start or (ColdStart.BASE if generation.cold_base else None)
    if cold_start is not None:
        headers["X-Cold-Start"] = cold_start.value
    if generation.timing:
        stages = (f"{stage};dur={seconds * 1000:.1f}" for stage, seconds in generation.timing.items())
        headers["Server-Timing"] = ", ".join(stages)
    return headers


async def _first(generation: Generation) -> TextDelta:
    return await anext(aiter(generation))


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancelled(*tasks: asyncio.Future[Any]) -> None:
    """Ends tasks and waits for that; what they raise was either seen or is of no use any more."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
