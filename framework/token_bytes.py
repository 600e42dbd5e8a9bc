"""The bytes that each token of a vocabulary writes, also where they are only a part of a character."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import tokenizers

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class TokenBytes:
    """Of one tokenizer; immutable.

    Byte-level vocabularies (GPT-2's kind) spell bytes as characters, SentencePiece's spell spaces as ``▁``
    and single bytes as ``<0x0A>``.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        decoders = set(_decoders(tokenizer.decoder))
        self._tokenizer = tokenizer
        self._added = {
            token_id: None if token.special else token.content.encode()
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
        }
        self._byte_of = _bytes_of_characters() if "ByteLevel" in decoders else {}
        self._has_byte_tokens = "ByteFallback" in decoders
        self._space = "▁" if decoders & {"Metaspace", "Replace"} else " "

    def of(self, token: int) -> bytes | None:
        """None for a token that writes nothing: a control token, or one that the tokenizer doesn't know."""
        if token in self._added:
            return self._added[token]
        piece: str | None = self._tokenizer.id_to_token(token)
        if piece is None:
            return None
        if self._byte_of:
            return bytes(self._byte_of[character] for character in piece)
        if self._has_byte_tokens and (single := _BYTE_TOKEN.fullmatch(piece)):
            return bytes.fromhex(single[1])
        return piece.replace(self._space, " ").encode()

    def name(self, token: int) -> str:
        """The token as people read it; what is no text by itself as ``\\xf0\\x9f``, as OpenAI writes it."""
        written = self.of(token)
        if written is None:
            return self._tokenizer.id_to_token(token) or f"token_id:{token}"
        try:
            return written.decode()
        except UnicodeDecodeError:
            return "".join(f"\\x{byte:02x}" for byte in written)


def _decoders(decoder: Any) -> Iterator[str]:
    """Types of a decoder and of those that it consists of."""
    if decoder is None:
        return
    waiting = [json.loads(decoder.__getstate__())]  # JSON
    while waiting:
        state = waiting.pop()
        yield state["type"]
        waiting += state.get("decoders", ())


def _bytes_of_characters() -> dict[str, int]:
    """The other way round than GPT-2's ``bytes_to_unicode``: what can't be printed is written from 256 on."""
    ranges = (("!", "~"), ("¡", "¬"), ("®", "ÿ"))
    printed = [byte for first, last in ranges for byte in range(ord(first), ord(last) + 1)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + at): byte for at, byte in enumerate(others)}
