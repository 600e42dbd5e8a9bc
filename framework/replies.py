"""What the HTTP API's answers mean. Shared by both clients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, NoReturn, TypeVar

import msgspec

from tunefleet.answers import Answer, Chunk, Served
from tunefleet.core import FinishReason, Usage
from tunefleet.errors import (
    AdapterConflict,
    AdapterInvalid,
    AdapterLoadFailed,
    AdapterNotFound,
    AuthError,
    CapacityError,
    ReplicaError,
    RequestInvalid,
    StoreError,
    TunefleetError,
)

T = TypeVar("T")


class EventReader:
    """Server-sent events of one chat to chunks. Feed it bytes as they come, then ``finish``."""

    def __init__(self) -> None:
        self._buffer = b""
        self._reason: FinishReason | None = None
        self._done = False

    def feed(self, content: bytes) -> Iterator[Chunk]:
        """Raises the error that a stream ended with."""
        *events, self._buffer = (self._buffer + content).split(b"\n\n")
        for event in events:
            yield from self._read(event)

    def finish(self) -> None:
        """Raises ReplicaError if the stream broke off."""
        if not self._done:
            raise ReplicaError("the stream broke off before the answer was complete", code="stream_broken")

    def _read(self, event: bytes) -> Iterator[Chunk]:
        kind, _, text = event.partition(b": ")
        if kind != b"data":  # a comment, while it waits
            return
        if text == b"[DONE]":
            self._done = True
            return
        chunk = msgspec.json.decode(text, type=_Body)
        if chunk.error is not None:
            raise _error(500, chunk.error, None)
        for choice in chunk.choices:
            self._reason = choice.finish_reason or self._reason
            if choice.delta.content:
                yield Chunk(text=choice.delta.content)
        if chunk.tunefleet is not None and chunk.usage is not None:
            yield Chunk(
                text="", finish_reason=self._reason, usage=chunk.usage.plain(), served=chunk.tunefleet
            )


def raise_for(status_code: int, content: bytes, retry_after: str | None) -> NoReturn:
    """Raises what a refusal says, from the same tree of errors that the server raised it from."""
    try:
        problem = msgspec.json.decode(content, type=_Refusal).error
    except msgspec.DecodeError:
        problem = _Problem(message=f"the server answered {status_code}, and not as tunefleet does", code=None)
    raise _error(status_code, problem, retry_after)


def parse_answer(content: bytes) -> Answer:
    body = msgspec.json.decode(content, type=_Body)
    choice = body.choices[0]
    if body.usage is None or body.tunefleet is None or choice.finish_reason is None:
        raise ReplicaError("the server's answer is not tunefleet's", code="not_tunefleet")
    return Answer(
        text=choice.message.content if choice.message else choice.text,
        finish_reason=choice.finish_reason,
        usage=body.usage.plain(),
        served=body.tunefleet,
    )


def decoder(kind: type[T]) -> Callable[[bytes], T]:
    return msgspec.json.Decoder(kind).decode


def list_decoder(kind: type[T]) -> Callable[[bytes], list[T]]:
    decoder = msgspec.json.Decoder(_Listed[kind])  # type: ignore[valid-type]
    return lambda content: decoder.decode(content).data


class _Details(msgspec.Struct):
    cached_tokens: int = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: _Details

    def plain(self) -> Usage:
        return Usage(self.prompt_tokens, self.completion_tokens, self.prompt_tokens_details.cached_tokens)


class _Content(msgspec.Struct):
    content: str = ""


class _Choice(msgspec.Struct):
    finish_reason: FinishReason | None
    message: _Content | None = None  # chat
    text: str = ""  # completion
    delta: _Content = msgspec.field(default_factory=_Content)  # stream


class _Problem(msgspec.Struct):
    message: str
    code: str | None
    param: str | None = None


class _Refusal(msgspec.Struct):
    error: _Problem


class _Body(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    tunefleet: Served | None = None
    error: _Problem | None = None


class _Listed(msgspec.Struct, Generic[T]):
    data: list[T]


_CLASS_OF_STATUS: dict[int, type[TunefleetError]] = {
    400: RequestInvalid,
    401: AuthError,
    403: AuthError,
    404: AdapterNotFound,
    409: AdapterConflict,
    413: AdapterInvalid,
    422: AdapterInvalid,
    429: CapacityError,
    500: ReplicaError,
    503: CapacityError,
}
_STORE_CODES = (
    "bucket_not_found",
    "catalog_busy",
    "catalog_unavailable",
    "disk_full",
    "invalid_key",
    "invalid_range",
    "object_changed",
    "object_corrupt",
    "object_not_found",
    "short_read",
    "store_denied",
    "store_error",
    "store_unavailable",
)
_LOAD_CODES = ("adapter_corrupt", "adapter_load_failed", "adapter_no_room", "adapter_slow")
_CLASS_OF_CODE: dict[str, type[TunefleetError]] = {
    "adapter_deleted": AdapterLoadFailed,
    "body_too_large": RequestInvalid,
    "invalid_adapter_name": RequestInvalid,
    "invalid_tenant": RequestInvalid,
    "invalid_user_id": RequestInvalid,
    "replica_lost": ReplicaError,
    "user_deleted": AdapterNotFound,
    **dict.fromkeys(_STORE_CODES, StoreError),
    **dict.fromkeys(_LOAD_CODES, AdapterLoadFailed),
}


def _error(status_code: int, problem: _Problem, retry_after: str | None) -> TunefleetError:
    by_status = _CLASS_OF_STATUS.get(status_code, RequestInvalid if status_code < 500 else ReplicaError)
    kind = _CLASS_OF_CODE.get(problem.code or "", by_status)
    seconds = float(retry_after) if retry_after and retry_after.isdecimal() else None
    if issubclass(kind, CapacityError):
        return kind(problem.message, retry_after_s=seconds or 1.0, code=problem.code, param=problem.param)
    if issubclass(kind, AdapterLoadFailed):
        return kind(problem.message, retry_after_s=seconds, code=problem.code, param=problem.param)
    return kind(problem.message, code=problem.code, param=problem.param)
