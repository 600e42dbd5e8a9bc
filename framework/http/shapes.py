"""Answers as OpenAI's clients expect them."""

from __future__ import annotations

import time
from typing import ClassVar

import msgspec

from tunefleet.answers import Answer
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
            "choices": [self._choice(self._content(answer.text), answer.finish_reason)],
            "usage": usage_body(answer.usage),
            "tunefleet": msgspec.to_builtins(answer.served),
        }

    def opening(self) -> list[dict[str, object]]:
        """Chunks before the first text."""
        return []

    def text(self, text: str) -> dict[str, object]:
        return self._chunk([self._choice(self._delta(text), None)])

    def closing(self, reason: FinishReason) -> list[dict[str, object]]:
        """Chunks after the last text; the very last one carries ``tunefleet``."""
        chunks = [self._chunk([self._choice(self._delta(""), reason)])]
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

    def _choice(self, content: dict[str, object], reason: FinishReason | None) -> dict[str, object]:
        return {"index": 0, **content, "logprobs": None, "finish_reason": reason}

    def _content(self, text: str) -> dict[str, object]:
        raise NotImplementedError

    def _delta(self, text: str) -> dict[str, object]:
        raise NotImplementedError


class ChatShape(Shape):
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def opening(self) -> list[dict[str, object]]:
        return [self._chunk([self._choice({"delta": {"role": "assistant", "content": ""}}, None)])]

    def _content(self, text: str) -> dict[str, object]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, text: str) -> dict[str, object]:
        return {"delta": {"content": text} if text else {}}


class CompletionShape(Shape):
    object_name = "text_completion"
    chunk_name = "text_completion"
    id_prefix = "cmpl"

    def _content(self, text: str) -> dict[str, object]:
        return {"text": text}

    def _delta(self, text: str) -> dict[str, object]:
        return {"text": text}


def usage_body(usage: Usage) -> dict[str, object]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.total_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
