"""A request's choices: their tokens to text, logprobs beside the text they belong to, all in one stream."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from typing import NamedTuple

from tunefleet.answers import Logprob, TopLogprob
from tunefleet.core import FinishReason
from tunefleet.messages import Progress, TokenLogprob
from tunefleet.runtime.dispatch import Run
from tunefleet.text import Detokenizer, StopMatcher, Tokenizer


class TextDelta(NamedTuple):
    """What one step added to one choice. ``logprobs`` is None where they weren't asked for."""

    text: str
    finish_reason: FinishReason | None
    choice: int = 0
    logprobs: tuple[Logprob, ...] | None = None


class ChoiceText:
    """Tokens to text, up to a stop string. One per sequence.

    A token's logprobs come with the first character that it writes, and not before: what a stop string takes
    away takes its logprobs along. Tokens that share a character come together, with that character.
    """

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...], *, with_logprobs: bool) -> None:
        self.num_tokens = 0
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopMatcher(stops)
        self._logprobs = _Logprobs(tokenizer) if with_logprobs else None

    def push(self, progress: Progress, choice: int) -> TextDelta:
        """The delta that a step makes. It ends the choice if it has a ``finish_reason``."""
        text, stopped = self._push(progress)
        reason = FinishReason.STOP if stopped else progress.finish_reason
        if reason is not None and not stopped:
            text += self._rest()
        return TextDelta(text, reason, choice, self._logprobs.take(text) if self._logprobs else None)

    def _push(self, progress: Progress) -> tuple[str, bool]:
        texts = []
        for at, token in enumerate(progress.tokens):
            self.num_tokens += 1
            text = self._detokenizer.push(token)
            if self._logprobs is not None:
                self._logprobs.push(token, progress.logprobs[at])
                if self._detokenizer.is_whole:
                    self._logprobs.place(text)
            text, stopped = self._stops.push(text)
            texts.append(text)
            if stopped:
                return "".join(texts), True
        return "".join(texts), False

    def _rest(self) -> str:
        text = self._detokenizer.flush()
        if self._logprobs is not None:
            self._logprobs.place(text)
        text, stopped = self._stops.push(text)
        return text if stopped else text + self._stops.flush()


class _Waiting(NamedTuple):
    shown_at: int  # characters given out from which on the token is to be seen
    logprob: Logprob


class _Logprobs:
    """Logprobs on their way to the text that they belong to."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokens = tokenizer.token_bytes
        self._loose: list[tuple[int, TokenLogprob]] = []  # tokens whose character isn't whole yet
        self._waiting: deque[_Waiting] = deque()
        self._num_placed = 0  # characters
        self._num_given = 0

    def push(self, token: int, found: TokenLogprob) -> None:
        self._loose.append((token, found))

    def place(self, text: str) -> None:
        """All tokens so far write ``text``, and nothing else."""
        start = self._num_placed
        self._num_placed += len(text)
        shown_at = min(start + 1, self._num_placed)  # a control token, which writes nothing: at once
        self._waiting += [_Waiting(shown_at, self._logprob(*loose, start)) for loose in self._loose]
        self._loose.clear()

    def take(self, text: str) -> tuple[Logprob, ...]:
        """Those that belong with ``text``, which is given out now."""
        self._num_given += len(text)
        taken = []
        while self._waiting and self._waiting[0].shown_at <= self._num_given:
            taken.append(self._waiting.popleft().logprob)
        return tuple(taken)

    def _logprob(self, token: int, found: TokenLogprob, text_offset: int) -> Logprob:
        own = self._named(token, found.logprob)
        tops = tuple(self._named(top, logprob) for top, logprob in found.top)
        return Logprob(own.token, own.logprob, own.bytes, tops, text_offset)

    def _named(self, token: int, logprob: float) -> TopLogprob:
        written = self._tokens.of(token)
        return TopLogprob(self._tokens.name(token), logprob, None if written is None else tuple(written))


class News(NamedTuple):
    choice: int  # by index
    progress: Progress


async def merged(runs: Sequence[Run]) -> AsyncGenerator[News]:
    """What all runs tell, as it comes. The first error ends it; the runs are the caller's to close."""
    if len(runs) == 1:
        async for progress in runs[0]:
            yield News(0, progress)
        return
    news: asyncio.Queue[News | asyncio.Task[None]] = asyncio.Queue()
    tasks = [asyncio.ensure_future(_forward(index, run, news)) for index, run in enumerate(runs)]
    for task in tasks:
        task.add_done_callback(news.put_nowait)
    try:
        num_running = len(runs)
        while num_running:
            item = await news.get()
            if isinstance(item, News):
                yield item
            else:
                item.result()
                num_running -= 1
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _forward(index: int, run: Run, news: asyncio.Queue[News | asyncio.Task[None]]) -> None:
    async for progress in run:
        news.put_nowait(News(index, progress))
