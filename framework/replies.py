"""What the HTTP API's answers mean. Shared by both clients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, NoReturn, TypeVar

import msgspec

from tunefleet.answers import Answer, Choice, Chunk, Logprob, Served, TopLogprob
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
        self._ended: Chunk | None = None  # of the choice that ended last: the very last one says more
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
            yield from self._read_choice(choice)
        if chunk.tunefleet is not None and chunk.usage is not None and self._ended is not None:
            yield msgspec.structs.replace(self._ended, usage=chunk.usage.plain(), served=chunk.tunefleet)

    def _read_choice(self, choice: _Choice) -> Iterator[Chunk]:
        logprobs = choice.logprobs.plain() if choice.logprobs else None
        chunk = Chunk(text=choice.delta.content, index=choice.index, logprobs=logprobs)
        if self._ended is not None:
            yield self._ended
            self._ended = None
        if chunk.text or chunk.logprobs:
            yield chunk
        if choice.finish_reason is not None:
            self._ended = Chunk(text="", index=choice.index, finish_reason=choice.finish_reason)


def raise_for(status_code: int, content: bytes, retry_after: str | None) -> NoReturn:
    """Raises what a refusal says, from the same tree of errors that the server raised it from."""
    try:
        problem = msgspec.json.decode(content, type=_Refusal).error
    except msgspec.DecodeError:
        problem = _Problem(message=f"the server answered {status_code}, and not as tunefleet does", code=None)
    raise _error(status_code, problem, retry_after)


def parse_answer(content: bytes, num_top: int | None = None) -> Answer:
    """
    Args:
        num_top: alternatives that a completion asked for; its answer has the chosen token among them too.
    """
    body = msgspec.json.decode(content, type=_Body)
    if body.usage is None or body.tunefleet is None or not body.choices:
        raise _not_ours()
    return Answer(
        choices=tuple(choice.plain(num_top) for choice in body.choices),
        usage=body.usage.plain(),
        served=body.tunefleet,
    )


def _not_ours() -> ReplicaError:
    return ReplicaError("the server's answer is not tunefleet's", code="not_tunefleet")


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


class _Logprobs(msgspec.Struct):
    """Of chats: ``content``; of completions: the others, which run side by side."""

    content: tuple[Logprob, ...] | None = None
    tokens: list[str] = []
    token_logprobs: list[float] = []
    top_logprobs: list[dict[str, float]] = []
    text_offset: list[int] = []

    def plain(self, num_top: int | None = None) -> tuple[Logprob, ...]:
        if self.content is not None:
            return self.content
        columns = zip(self.tokens, self.token_logprobs, self.top_logprobs, self.text_offset, strict=True)
        return tuple(
            Logprob(_name(token), logprob, _written(token), tuple(_tops(top)[:num_top]), offset)
            for token, logprob, top, offset in columns
        )


_BYTES = "bytes:"


def _tops(tops: dict[str, float]) -> list[TopLogprob]:
    return [TopLogprob(_name(token), logprob, _written(token)) for token, logprob in tops.items()]


def _name(token: str) -> str:
    return token.removeprefix(_BYTES)


def _written(token: str) -> tuple[int, ...]:
    """Completions tell no bytes but those of a token that is no text."""
    if token.startswith(_BYTES):
        return tuple(bytes.fromhex(_name(token).replace("\\x", "")))
    return tuple(token.encode())


class _Choice(msgspec.Struct):
    finish_reason: FinishReason | None
    index: int = 0
    message: _Content | None = None  # chat
    text: str = ""  # completion
    delta: _Content = msgspec.field(default_factory=_Content)  # stream
    logprobs: _Logprobs | None = None

    def plain(self, num_top: int | None) -> Choice:
        if self.finish_reason is None:
            raise _not_ours()
        return Choice(
            index=self.index,
            text=self.message.content if self.message else self.text,
            finish_reason=self.finish_reason,
            logprobs=self.logprobs.plain(num_top) if self.logprobs else None,
        )


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
