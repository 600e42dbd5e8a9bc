"""The HTTP API seen from outside: each call as a value, and what its answer means. Shared by both clients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Generic, NoReturn, TypeVar
from urllib.parse import quote

import msgspec

from tunefleet.answers import Answer, Chunk, FleetStatus, Served, Warm
from tunefleet.asking import Asking, ChatMessages, parameters
from tunefleet.core import (
    ADAPTER_FILES,
    DEFAULT_ADAPTER,
    FinishReason,
    Usage,
    User,
    Version,
    check_adapter_name,
    check_user_id,
)
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call(Generic[T]):
    """One request, not sent yet, and how to read its answer."""

    method: str
    path: str  # percent-encoded
    parse: Callable[[bytes], T]
    query: Mapping[str, str] = dataclasses.field(default_factory=dict)
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)
    body: object = None  # JSON
    upload: Path | None = None  # PEFT folder, or a tar or zip of one


def push(
    user_id: str,
    path: str | Path,
    *,
    name: str = DEFAULT_ADAPTER,
    promote: bool = True,
    metadata: Mapping[str, object] | None = None,
) -> Call[Version]:
    upload, url = Path(path), _adapter(user_id, name)
    missing = [file for file in ADAPTER_FILES if not (upload / file).is_file()] if upload.is_dir() else []
    if missing or not upload.exists():
        what = f"no {missing[0]} in {upload}" if missing else f"there is no {upload}"
        raise AdapterInvalid(f"{what}: give a PEFT folder, or a tar or zip of one", code="missing_file")
    return Call(
        method="PUT",
        path=url,
        query={} if promote else {"promote": "false"},
        headers={"X-Adapter-Metadata": _ascii_json(metadata)} if metadata else {},
        upload=upload,
        parse=_decoder(Version),
    )


def versions(
    user_id: str, *, name: str = DEFAULT_ADAPTER, after: int | None = None, limit: int = 100
) -> Call[list[Version]]:
    path = f"{_adapter(user_id, name)}/versions"
    return Call(method="GET", path=path, query=_page(after, limit), parse=_list_decoder(Version))


def live(user_id: str, *, name: str = DEFAULT_ADAPTER) -> Call[Version]:
    return Call(method="GET", path=_adapter(user_id, name), parse=_decoder(Version))


def promote(
    user_id: str, version: int, *, name: str = DEFAULT_ADAPTER, if_live: int | None = None
) -> Call[Version]:
    body = {"version": version, "if_live": if_live}
    return Call(method="POST", path=f"{_adapter(user_id, name)}/promote", body=body, parse=_decoder(Version))


def users(*, after: str | None = None, limit: int = 100) -> Call[list[User]]:
    return Call(method="GET", path="/v1/users", query=_page(after, limit), parse=_list_decoder(User))


def status() -> Call[FleetStatus]:
    return Call(method="GET", path="/v1/status", parse=_decoder(FleetStatus))


def warmup(user_id: str | None = None, *, name: str = DEFAULT_ADAPTER) -> Call[Warm]:
    body = {"user_id": user_id, "name": name}
    return Call(method="POST", path="/v1/warmup", body=body, parse=_decoder(Warm))


def chat(
    user_id: str | None, messages: ChatMessages, asking: Asking, *, stream: bool = False
) -> Call[Answer]:
    return _ask("/v1/chat/completions", user_id, {"messages": list(messages)}, asking, stream=stream)


def complete(user_id: str | None, prompt: str | Sequence[int], asking: Asking) -> Call[Answer]:
    return _ask("/v1/completions", user_id, {"prompt": prompt}, asking, stream=False)


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
_CLASS_OF_CODE: dict[str, type[TunefleetError]] = {
    "adapter_load_failed": AdapterLoadFailed,
    "catalog_unavailable": StoreError,
    "invalid_adapter_name": RequestInvalid,
    "invalid_user_id": RequestInvalid,
    "object_corrupt": StoreError,
    "object_not_found": StoreError,
    "replica_lost": ReplicaError,
    "store_error": StoreError,
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


def _ask(
    path: str, user_id: str | None, body: dict[str, object], asking: Asking, *, stream: bool
) -> Call[Answer]:
    streaming = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    name = check_adapter_name(asking.get("name", DEFAULT_ADAPTER))
    if user_id is not None and name != DEFAULT_ADAPTER:
        body["model"] = f"user:{user_id}/{name}"
    headers = {
        "X-User-Id": None if user_id is None else check_user_id(user_id),
        "X-Adapter-Version": asking.get("version"),
        "X-Fallback": asking.get("fallback"),
    }
    return Call(
        method="POST",
        path=path,
        headers={name: str(value) for name, value in headers.items() if value is not None},
        body={**body, **parameters(asking), **streaming},
        parse=_parse_answer,
    )


def _parse_answer(content: bytes) -> Answer:
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


def _adapter(user_id: str, name: str) -> str:
    return f"/v1/users/{quote(check_user_id(user_id), safe='')}/adapters/{check_adapter_name(name)}"


def _page(after: object, limit: int) -> dict[str, str]:
    return {"limit": str(limit), **({} if after is None else {"after": str(after)})}


def _ascii_json(value: object) -> str:
    """JSON that fits into a header."""
    text = msgspec.json.encode(value).decode()
    return "".join(char if char.isascii() else _escaped(char) for char in text)


def _escaped(char: str) -> str:
    units = char.encode("utf-16-be")
    return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))


def _decoder(kind: type[T]) -> Callable[[bytes], T]:
    return msgspec.json.Decoder(kind).decode


def _list_decoder(kind: type[T]) -> Callable[[bytes], list[T]]:
    decoder = msgspec.json.Decoder(_Listed[kind])  # type: ignore[valid-type]
    return lambda content: decoder.decode(content).data
