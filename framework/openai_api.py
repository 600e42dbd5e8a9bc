"""OpenAI's request bodies, checked to the last field: nothing that clients ask for is dropped in silence."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal, TypeVar

import msgspec
from msgspec import Meta

from tunefleet.errors import RequestInvalid

MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_CHOICES = 16  # n: each is a sequence of its own
MAX_TOP_LOGPROBS = 20  # OpenAI's limits: of chats
MAX_LOGPROBS = 5  # and of completions

# Parameters of OpenAI's API that change nothing at these values. null always counts as not given.
_NO_OPS: dict[str, tuple[object, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}
# Labels for the operator of OpenAI's service; they never changed an answer there either.
_LABELS = {"metadata": dict, "prompt_cache_key": str, "safety_identifier": str, "user": str}

_AT = re.compile(r" - at `\$\.?(.*)`$")


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    include_usage: bool = False
    include_obfuscation: bool = False  # random padding; accepted, never sent


class TextPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    text: str
    type: Literal["text"] = "text"


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A turn. The fields that are None here are those of OpenAI's own answers, handed back by clients."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    refusal: None = None
    annotations: list[None] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: list[None] | None = None
    name: None = None

    def plain(self) -> dict[str, str]:
        """The message as chat templates take it. Text parts become lines, as in other servers."""
        parts = self.content
        text = parts if isinstance(parts, str) else "\n".join(part.text for part in parts)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class InferenceRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What both routes take. ``top_k``, ``min_p`` and ``ignore_eos`` are extensions."""

    model: str | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=1_000_000)] | None = None  # 0 and -1: off
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_tokens


class ChatRequest(InferenceRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    messages: Annotated[list[Message], Meta(min_length=1)]
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_TOP_LOGPROBS)] | None = None

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives beside each token's own logprob; None: no logprobs."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(InferenceRequest, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``prompt`` is one text, a list of one text, or token ids. Control tokens in a text count."""

    prompt: str | list[str | int]
    logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives beside each token's own logprob; None: no logprobs."""
        return self.logprobs

    @property
    def text_or_ids(self) -> str | list[int]:
        if isinstance(self.prompt, str):
            return self.prompt
        if len(self.prompt) == 1 and isinstance(self.prompt[0], str):
            return self.prompt[0]
        ids = [token for token in self.prompt if isinstance(token, int)]
        if len(ids) != len(self.prompt):
            raise RequestInvalid("prompt must be one text or one list of token ids", param="prompt")
        return ids


_R = TypeVar("_R", bound=ChatRequest | CompletionRequest)


def parse_json(body: bytes) -> dict[str, object]:
    """A JSON object, or RequestInvalid."""
    try:
        parsed = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RequestInvalid(f"the body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(parsed, dict):
        raise RequestInvalid("the body must be a JSON object", code="invalid_json")
    return parsed


def parse_request(kind: type[_R], fields: Mapping[str, object]) -> _R:
    """Checks a request body or a library call's keywords.

    Raises:
        RequestInvalid: code ``unsupported_parameter``, or ``invalid_request`` with ``param``.
    """
    own = {name: value for name, value in fields.items() if name in kind.__struct_fields__}
    for name in fields.keys() - own.keys():
        _check_foreign(name, fields[name])
    request = convert(own, kind)
    _check_stops(request.stops)
    _check_limits(request)
    return request


T = TypeVar("T")


def convert(value: object, kind: type[T]) -> T:
    """Like msgspec.convert, with the field at fault as ``param``."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        message = str(error)
        at = _AT.search(message)
        where = at[1] if at else ""
        missing = re.search(r"required field `(\w+)`", message)
        param = ".".join(filter(None, (where, missing[1] if missing else ""))) or None
        told = _AT.sub("", message)
        raise RequestInvalid(f"{where}: {told}" if where else told, param=param) from error


def _check_foreign(name: str, value: object) -> None:
    """Lets parameters pass that change nothing, and refuses all others."""
    if name in _LABELS:
        if value is not None and not isinstance(value, _LABELS[name]):
            raise RequestInvalid(f"{name} has the wrong type", param=name)
        return
    if name not in _NO_OPS:
        raise _unsupported(name, "leave it out")
    if value is not None and not any(_same(value, no_op) for no_op in _NO_OPS[name]):
        allowed = " or ".join(msgspec.json.encode(no_op).decode() for no_op in _NO_OPS[name]) or "null"
        raise _unsupported(name, f"leave it out or send {allowed}")


def _same(value: object, no_op: object) -> bool:
    """Equal, an integer may come as a float; booleans are no numbers."""
    return value == no_op and isinstance(value, bool) == isinstance(no_op, bool)


def _unsupported(name: str, advice: str) -> RequestInvalid:
    return RequestInvalid(f"{name} is not supported: {advice}", code="unsupported_parameter", param=name)


def _check_stops(stops: tuple[str, ...]) -> None:
    if len(stops) > MAX_STOPS:
        raise RequestInvalid(f"at most {MAX_STOPS} stop strings, not {len(stops)}", param="stop")
    if not all(0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise RequestInvalid(f"a stop string has 1 to {MAX_STOP_CHARS} characters", param="stop")


def _check_limits(request: ChatRequest | CompletionRequest) -> None:
    both = (request.max_tokens, request.max_new_tokens)
    if None not in both and both[0] != both[1]:
        raise RequestInvalid(
            "max_tokens and max_completion_tokens differ; give one", param="max_completion_tokens"
        )
    if isinstance(request, ChatRequest) and request.top_logprobs and not request.logprobs:
        raise RequestInvalid("top_logprobs needs logprobs: true", param="top_logprobs")
    if request.stream_options is not None and not request.stream:
        raise RequestInvalid("stream_options needs stream: true", param="stream_options")
