"""``tunefleet chat``: one question, or turns until end of input."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self

from tunefleet.answers import Chunk
from tunefleet.asking import Asking
from tunefleet.cli.output import note, print_json
from tunefleet.client import Client


class Conversation:
    """Keeps the turns; answers stream to standard output as they come. Closes its client."""

    def __init__(self, user_id: str | None, system: str | None, asking: Asking, *, as_json: bool) -> None:
        self._client = Client()
        self._user_id = user_id
        self._asking = asking
        self._as_json = as_json
        self._messages: list[dict[str, object]] = []
        if system is not None:
            self._messages.append({"role": "system", "content": system})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.close()

    def talk(self) -> None:
        """Reads turns from the terminal until end of input."""
        while True:
            try:
                text = input("> ")
            except EOFError:
                print()
                return
            if text.strip():
                self.say(text)

    def say(self, text: str) -> None:
        self._messages.append({"role": "user", "content": text})
        answer = self._whole() if self._as_json else self._streamed()
        self._messages.append({"role": "assistant", "content": answer})

    def _whole(self) -> str:
        answer = self._client.chat(self._user_id, self._messages, **self._asking)
        print_json(answer)
        return answer.text

    def _streamed(self) -> str:
        texts = []
        for chunk in self._client.stream(self._user_id, self._messages, **self._asking):
            texts.append(chunk.text)
            sys.stdout.write(chunk.text)
            sys.stdout.flush()
            if chunk.finish_reason is not None and sys.stderr.isatty():
                note(f"\n{_told(chunk)}")
        print()
        return "".join(texts)


def _told(chunk: Chunk) -> str:
    """Who answered, for people."""
    if chunk.served is None or chunk.usage is None:
        return ""
    served = chunk.served
    who = f"version {served.adapter_version}" if served.adapter_version else "the base"
    first_token_s = served.timing.get("first_token", 0.0)
    return (
        f"[{who} {served.adapter_digest[:12]}, {chunk.usage.completion_tokens} tokens, "
        f"first after {first_token_s:.2f} s, cold start: {served.cold_start.value}]"
    )
