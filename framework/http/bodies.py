"""Reading requests and writing answers: bounded bodies, parameters, JSON."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from tunefleet.errors import RequestInvalid
from tunefleet.openai_api import parse_json

MAX_JSON_BYTES = 4 * 1024 * 1024
MAX_PAGE = 500
IDLE_S = 60.0  # a client that sends nothing of its body for so long has gone


class JSON(Response):
    """Any value that msgspec encodes."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        return msgspec.json.encode(content)


async def bounded(request: Request, max_bytes: int) -> AsyncIterator[bytes]:
    """The body's chunks, as they come.

    Raises:
        RequestInvalid: ``body_too_large`` as soon as it is, ``body_too_slow`` if nothing comes.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise _too_large(max_bytes)
    size = 0
    async for chunk in _alive(request):
        size += len(chunk)
        if size > max_bytes:
            raise _too_large(max_bytes)
        if chunk:
            yield chunk


async def read_json(request: Request) -> dict[str, object]:
    """The body as a JSON object; an empty body is an empty object."""
    body = b"".join([chunk async for chunk in bounded(request, MAX_JSON_BYTES)])
    return parse_json(body) if body else {}


class Page(msgspec.Struct, frozen=True):
    """``?after=...&limit=...``"""

    after: str | None
    limit: int


def page_of(request: Request) -> Page:
    limit = integer(request.query_params, "limit", default=100)
    if not 1 <= limit <= MAX_PAGE:
        raise RequestInvalid(f"limit is 1 to {MAX_PAGE}", code="invalid_limit", param="limit")
    return Page(request.query_params.get("after"), limit)


def listed(items: list[object], limit: int) -> JSON:
    """OpenAI's list; ``items`` may hold one more than ``limit``, which tells that there is more."""
    return JSON({"object": "list", "data": items[:limit], "has_more": len(items) > limit})


def integer(values: Mapping[str, str], name: str, *, default: int) -> int:
    """A parameter, path segment or header that must be a plain number."""
    text = values.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdecimal() and len(text) < 16):
        raise RequestInvalid(f"{name} must be a number, not {text[:32]!r}", param=name)
    return int(text)


def flag(values: Mapping[str, str], name: str, *, default: bool) -> bool:
    text = values.get(name)
    if text is None:
        return default
    if text not in {"true", "false"}:
        raise RequestInvalid(f"{name} must be true or false", param=name)
    return text == "true"


async def _alive(request: Request) -> AsyncIterator[bytes]:
    chunks = aiter(request.stream())
    idle_s: float = request.app.state.idle_s
    while True:
        try:
            async with asyncio.timeout(idle_s):
                chunk = await anext(chunks)
        except StopAsyncIteration:
            return
        except TimeoutError as error:
            raise RequestInvalid(
                f"nothing of the body came for {idle_s:g} s", code="body_too_slow"
            ) from error
        yield chunk


def _too_large(max_bytes: int) -> RequestInvalid:
    return RequestInvalid(f"the body may have {max_bytes} bytes at most", code="body_too_large")
