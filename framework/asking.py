"""The keywords of ``chat``, ``stream`` and ``complete``, the same for Fleet, Client and AsyncClient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

from tunefleet.target import Fallback

ChatMessages = Sequence[Mapping[str, object]]
"""OpenAI's: ``{"role": "user", "content": "..."}``; roles are system, developer, user and assistant."""


class Asking(TypedDict, total=False):
    """All optional. Generation defaults are OpenAI's."""

    name: str  # which of the user's adapters; "default"
    version: int  # instead of the live one
    fallback: Fallback  # who answers a user without an adapter
    session_id: str  # what a canary sticks to; else each request is a session
    max_tokens: int  # what fits
    temperature: float  # 1.0; 0 is greedy
    top_p: float  # 1.0: off
    top_k: int  # 0: off
    min_p: float  # 0: off; least probability, as a part of the likeliest token's
    n: int  # 1; so many answers
    seed: int  # random
    stop: str | Sequence[str]
    ignore_eos: bool
    logprobs: bool | int  # of chats: True; of completions: how many alternatives with each
    top_logprobs: int  # of chats: how many alternatives with each


_HEADERS = {"name", "version", "fallback", "session_id"}


def parameters(asking: Asking) -> dict[str, object]:
    """Those that belong into a request's body; the others say whose adapter answers."""
    return {name: value for name, value in asking.items() if name not in _HEADERS}
