"""Text to token ids and back: chats, decoding token by token, stop strings. tokenizers and jinja2 only."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import tokenizers

from tunefleet.chat_template import ChatTemplate
from tunefleet.control_tokens import ControlTokens
from tunefleet.errors import BaseModelError, RequestInvalid
from tunefleet.token_bytes import TokenBytes


class Tokenizer:
    """The tokenizer and chat template of one prepared base; immutable, safe to share between threads.

    Chat: the template may write control tokens, message contents never do. A content that spells one
    (``<|im_start|>``) is marked before rendering and encoded as the plain text it is; contents that spell
    none give exactly the ids of transformers' ``apply_chat_template(add_generation_prompt=True)``.
    """

    def __init__(self, folder: Path) -> None:
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            config = json.loads((folder / "tokenizer_config.json").read_text())
        except Exception as error:  # tokenizers raises plain Exception
            raise BaseModelError(f"{folder} holds no usable tokenizer: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        source = _template_source(folder, config)
        self._template = ChatTemplate(source, _special_tokens(config)) if source else None
        self._control = ControlTokens(self._tokenizer, self._template.literals if self._template else ())
        self.token_bytes = TokenBytes(self._tokenizer)
        self.max_token_chars = max(map(len, self._tokenizer.get_vocab()))

    def encode(self, text: str) -> list[int]:
        """A raw prompt: control tokens in it count, and the tokenizer's own (a first BOS) are added."""
        return self._tokenizer.encode(_checked(text, "prompt"), add_special_tokens=True).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def encode_chat(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Renders messages (keys ``role`` and ``content``) up to where the model answers, and encodes that.

        Raises:
            RequestInvalid: no template, or one that refuses these messages.
        """
        if self._template is None:
            raise RequestInvalid(
                "this base has no chat template: use completions with your own prompt",
                code="no_chat_template",
            )
        marked = [
            {**message, "content": self._control.mark(_checked(message["content"], "messages"))}
            for message in messages
        ]
        ids: list[int] = []
        for text, plain in self._control.pieces(self._template.render(marked)):
            encode = self._encode_plain if plain else self._encode_markup
            ids += self._after_newline(encode, text) if ids else encode(text)
        return ids

    def _encode_markup(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _encode_plain(self, text: str) -> list[int]:
        """Never a control token: if even plain text makes one, each character goes by itself."""
        ids = self._model_ids(text)
        if self._control.ids.isdisjoint(ids):
            return ids
        parts = (self._after_newline(self._model_ids, character) for character in text)
        return [token for part in parts for token in part if token not in self._control.ids]

    def _model_ids(self, text: str) -> list[int]:
        """The tokenizer's pipeline without its added tokens."""
        steps = self._tokenizer
        text = steps.normalizer.normalize_str(text) if steps.normalizer else text
        words = (
            [word for word, _ in steps.pre_tokenizer.pre_tokenize_str(text)]
            if steps.pre_tokenizer
            else [text]
        )
        return [token.id for word in words for token in steps.model.tokenize(word)]

    def _after_newline(self, encode: Callable[[str], list[int]], text: str) -> list[int]:
        """Encodes behind a newline, taken off again: SentencePiece adds a space before a first word."""
        newline, ids = encode("\n"), encode("\n" + text)
        return ids[len(newline) :] if ids[: len(newline)] == newline else encode(text)


class Detokenizer:
    """Token by token to text; a character is given out only when it is whole. One per generation.

    Decodes a short window of ids that begins where the text was whole, so each push costs the same. Text that
    ends in a replacement character is held back: more bytes may change it, even before its last character.
    """

    _MAX_WINDOW = 64  # ids; reached only by bytes that never become a character

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decode = tokenizer.decode
        self._window: list[int] = []
        self._num_whole = 0  # ids at the window's beginning whose text was whole
        self._num_sent = 0  # characters of the window's text that are given out

    @property
    def is_whole(self) -> bool:
        """All text so far is given out: the last token ended a character."""
        return self._num_whole == len(self._window)

    def push(self, token: int) -> str:
        """The text that this token makes certain, maybe none."""
        self._window.append(token)
        text = self._decode(self._window)
        if text.endswith("\ufffd") and len(self._window) < self._MAX_WINDOW:
            return ""
        new = self._send(text)
        self._slide()
        return new

    def flush(self) -> str:
        """An unfinished character at the end, as replacement characters."""
        return self._send(self._decode(self._window))

    def _send(self, text: str) -> str:
        new = text[self._num_sent :]
        self._num_sent += len(new)
        return new

    def _slide(self) -> None:
        """Leaves the ids since the last whole text as context: decoders treat a first token differently."""
        context = self._window[self._num_whole :]
        text = self._decode(context)
        if text or len(self._window) >= self._MAX_WINDOW:  # ids without text (controls) are no context
            self._window, self._num_sent = context, len(text)
        if len(self._window) >= self._MAX_WINDOW:
            self._window, self._num_sent = [], 0
        self._num_whole = len(self._window)


class Cut(NamedTuple):
    text: str  # free of any part of a stop string
    stopped: bool


class StopMatcher:
    """Cuts text before the first stop string, however it is spread over pushes. One per generation."""

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""

    def push(self, text: str) -> Cut:
        """The text that belongs to no stop string whatever comes next."""
        pending = self._held + text
        found = [position for stop in self._stops if (position := pending.find(stop)) >= 0]
        if found:
            self._held = ""
            return Cut(pending[: min(found)], stopped=True)
        start = self._possible_start(pending)
        self._held = pending[start:]
        return Cut(pending[:start], stopped=False)

    def flush(self) -> str:
        """The text held back, which turned out to be no stop string."""
        held, self._held = self._held, ""
        return held

    def _possible_start(self, pending: str) -> int:
        """Where the longest tail begins that also begins a stop string."""
        for start in range(max(0, len(pending) - self._longest + 1), len(pending)):
            tail = pending[start:]
            if any(stop.startswith(tail) for stop in self._stops):
                return start
        return len(pending)


def _checked(text: str, param: str) -> str:
    """Refuses lone surrogates, which Python's strings may hold and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestInvalid(
            f"{param} holds text that is not Unicode: {error.reason}", param=param
        ) from error
    return text


def _template_source(folder: Path, config: Mapping[str, object]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text()
    source = config.get("chat_template")
    if isinstance(source, list):  # several by name
        source = next((entry["template"] for entry in source if entry.get("name") == "default"), None)
    return source if isinstance(source, str) else None


def _special_tokens(config: Mapping[str, object]) -> dict[str, str]:
    """``bos_token`` and the like, which templates may use by name."""
    tokens = {name: value for name, value in config.items() if name.endswith("_token")}
    texts = {
        name: value.get("content") if isinstance(value, dict) else value for name, value in tokens.items()
    }
    return {name: text for name, text in texts.items() if isinstance(text, str)}
