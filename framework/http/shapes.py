"""Answers as OpenAI's clients expect them."""

from __future__ import annotations

import time
from typing import ClassVar

import msgspec

from tunefleet.answers import Answer, Logprob, TopLogprob
from tunefleet.choices import TextDelta
from tunefleet.core import FinishReason, Usage
from tunefleet.generation import Generation


class Shape:
    """One answer's objects. Subclasses say what a route's choices look like."""

    object_name: ClassVar[str]
    chunk_name: ClassVar[str]
    id_prefix: ClassVar[str]

    def __init__(self, generation: Generation, *, include_usage: bool = False) -> None:
        self._generation = generation
        self._include_usage = include_usage
        self._created = int(time.time())

    def whole(self, answer: Answer) -> dict[str, object]:
        return {
            **self._head(self.object_name),
            "choices": [
                self._choice(choice.index, self._content(choice.text), choice.logprobs, choice.finish_reason)
                for choice in answer.choices
            ],
            "usage": usage_body(answer.usage),
            "tunefleet": msgspec.to_builtins(answer.served),
        }

    def opening(self) -> list[dict[str, object]]:
        """Chunks before the first text."""
        return []

    def pieces(self, delta: TextDelta) -> list[dict[str, object]]:
        """Chunks of a delta, a choice's end in one of its own; the very last one carries ``tunefleet``."""
        chunks = []
        if delta.text or delta.logprobs:
            chunks.append(self._chunk([self._choice(delta.choice, self._delta(delta.text), delta.logprobs)]))
        if delta.finish_reason is not None:
            end = self._choice(delta.choice, self._delta(""), reason=delta.finish_reason)
            chunks.append(self._chunk([end]))
            if self._generation.is_over:
                if self._include_usage:
                    chunks.append({**self._chunk([]), "usage": usage_body(self._generation.usage)})
                chunks[-1]["tunefleet"] = msgspec.to_builtins(self._generation.served)
        return chunks

    def _chunk(self, choices: list[dict[str, object]]) -> dict[str, object]:
        usage: dict[str, object] = {"usage": None} if self._include_usage else {}
        return {**self._head(self.chunk_name), "choices": choices, **usage}

    def _head(self, name: str) -> dict[str, object]:
        return {
            "id": f"{self.id_prefix}-{self._generation.accepted.request_id}",
            "object": name,
            "created": self._created,
            "model": self._generation.accepted.model,
        }

    def _choice(
        self,
        index: int,
        content: dict[str, object],
        logprobs: tuple[Logprob, ...] | None = None,
        reason: FinishReason | None = None,
    ) -> dict[str, object]:
        told = None if logprobs is None else self._logprobs(logprobs)
        return {"index": index, **content, "logprobs": told, "finish_reason": reason}

    def _content(self, text: str) -> dict[str, object]:
        raise NotImplementedError

    def _delta(self, text: str) -> dict[str, object]:
        raise NotImplementedError

    def _logprobs(self, logprobs: tuple[Logprob, ...]) -> dict[str, object]:
        raise NotImplementedError


class ChatShape(Shape):
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def opening(self) -> list[dict[str, object]]:
        delta: dict[str, object] = {"delta": {"role": "assistant", "content": ""}}
        return [self._chunk([self._choice(index, delta)]) for index in range(self._generation.num_choices)]

    def _content(self, text: str) -> dict[str, object]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str) -> dict[str, object]:
        return {"delta": {"content": text} if text else {}}

    def _logprobs(self, logprobs: tuple[Logprob, ...]) -> dict[str, object]:
        content = [
            {**_of_chat(logprob), "top_logprobs": [_of_chat(top) for top in logprob.top_logprobs]}
            for logprob in logprobs
        ]
        return {"content": content, "refusal": None}


class CompletionShape(Shape):
    object_name = "text_completion"
    chunk_name = "text_completion"
    id_prefix = "cmpl"

    def _content(self, text: str) -> dict[str, object]:
        return {"text": text}

    def _delta(self, text: str) -> dict[str, object]:
        return {"text": text}

    def _logprobs(self, logprobs: tuple[Logprob, ...]) -> dict[str, object]:
        return {
            "tokens": [_of_completion(logprob) for logprob in logprobs],
            "token_logprobs": [logprob.logprob for logprob in logprobs],
            "top_logprobs": [_tops_of_completion(logprob) for logprob in logprobs],
            "text_offset": [logprob.text_offset for logprob in logprobs],
        }


def _of_chat(top: TopLogprob) -> dict[str, object]:
    return {"token": top.token, "logprob": top.logprob, "bytes": top.bytes}


def _of_completion(top: TopLogprob) -> str:
    """A part of a character has no text: OpenAI's completions say ``bytes:`` before what stands for it."""
    has_text = top.bytes is None or bytes(top.bytes) == top.token.encode()
    return top.token if has_text else f"bytes:{top.token}"


def _tops_of_completion(logprob: Logprob) -> dict[str, float]:
    """The chosen token is always among them, so that they may be one more than were asked for."""
    tops = {_of_completion(top): top.logprob for top in logprob.top_logprobs}
    return {**tops, _of_completion(logprob): logprob.logprob}


def usage_body(usage: Usage) -> dict[str, object]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
