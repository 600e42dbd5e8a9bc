"""Keeps message contents from writing control tokens.

Contents are marked before the template renders them; the marks are taken out when the rendering is encoded.
Marks go around what spells a control token and nowhere else: templates see, trim and split contents as ever.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import tokenizers

# Private-use characters. They never come from outside: mark() drops those that contents bring.
_START, _END, _BREAK = "\U000f0000", "\U000f0001", "\U000f0002"
_MARKS = re.compile(f"[{_START}{_END}{_BREAK}]")
_SPACE = re.compile(r"\s*")


class Piece(NamedTuple):
    """A part of a rendered chat that is encoded by itself."""

    text: str
    plain: bool  # encode without control tokens


class ControlTokens:
    """The added tokens that steer a model: special ones, and those that its template writes (``<think>``).

    White space isn't control even when it's an added token (Gemma's newlines): templates write it as text.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, literals: Sequence[str]) -> None:
        written = "\0".join(literals)
        control = {
            token_id: token
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
            if token.special or (token.content in written and not token.content.isspace())
        }
        contents = sorted((token.content for token in control.values()), key=len, reverse=True)
        spelled = "|".join(map(re.escape, contents)) or "(?!)"
        self.ids = frozenset(control)
        self._spelled = re.compile(spelled)
        self._spelled_first = re.compile(f"\\s*(?:{spelled})")
        self._spelled_last = re.compile(f"(?:{spelled})\\s*\\Z")
        cuts = [(text[:at], text[at:]) for text in contents for at in range(1, len(text))]
        self._heads = tuple({head for head, tail in cuts if _meet(tail, literals, str.startswith)})
        self._tails = tuple({tail for head, tail in cuts if _meet(head, literals, str.endswith)})
        self._normalizer = (
            tokenizer.normalizer if any(token.normalized for token in control.values()) else None
        )

    def mark(self, content: str) -> str:
        """Marks what spells a control token by itself, or could with the template's text around it."""
        content = _MARKS.sub("", content)
        inner = content.strip()
        before, after = content.split(inner, 1) if inner else (content, "")
        if self._normalizer is not None and self._spelled.search(self._normalizer.normalize_str(inner)):
            return f"{before}{_START}{inner}{_END}{after}"
        starts_inside, ends_inside = inner.startswith(self._tails), inner.endswith(self._heads)
        return f"{before}{_BREAK * starts_inside}{self._wrapped(inner)}{_BREAK * ends_inside}{after}"

    def _wrapped(self, text: str) -> str:
        """Marks go outside the white space around a token: a template may split at the token, then trim."""
        parts: list[str] = []
        position = 0
        for match in self._spelled.finditer(text):
            kept = text[position : match.start()].rstrip()
            spelled_at = position + len(kept)
            position = _SPACE.match(text, match.end()).end()  # type: ignore[union-attr]  # matches always
            parts += [kept, _START, text[spelled_at:position], _END]
        return "".join([*parts, text[position:]])

    def pieces(self, rendered: str) -> Iterator[Piece]:
        """Splits a rendering at its marks; one piece when there are none."""
        marks = [_BREAK, *_MARKS.findall(rendered), _BREAK]
        for index, text in enumerate(_MARKS.split(rendered)):
            yield from (piece for piece in self._split(marks[index], text, marks[index + 1]) if piece.text)

    def _split(self, left: str, text: str, right: str) -> tuple[Piece, ...]:
        """A template may cut contents, so a mark can lack its partner: the token beside it still counts."""
        if left == _START and right == _END:
            return (Piece(text, plain=True),)
        if left == _START and (first := self._spelled_first.match(text)):
            return Piece(first[0], plain=True), Piece(text[first.end() :], plain=False)
        if right == _END and (last := self._spelled_last.search(text)):
            return Piece(text[: last.start()], plain=False), Piece(last[0], plain=True)
        return (Piece(text, plain=False),)


def _meet(part: str, literals: Sequence[str], at: Callable[[str, str], bool]) -> bool:
    """Can the template put ``part`` of a control token beside a content? It may write it in pieces."""
    return any(at(literal, part) or at(part, literal) for literal in literals if literal)
