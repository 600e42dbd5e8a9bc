"""One answer as it comes from the machine: its choices' text, what it took, and its end, whoever ends it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from types import TracebackType
from typing import NamedTuple, Self

import msgspec

from tunefleet.answers import Answer, Choice, Chunk, Logprob, Served
from tunefleet.choices import ChoiceText, TextDelta, merged
from tunefleet.core import ColdStart, FinishReason, Usage
from tunefleet.errors import ReplicaError
from tunefleet.messages import Progress, Timing
from tunefleet.metrics import RequestRecord
from tunefleet.open_requests import OpenRequest
from tunefleet.runtime.dispatch import Run


class Accepted(NamedTuple):
    """What is fixed once a request is accepted."""

    request_id: str
    user_id: str | None
    adapter_digest: str  # or "base"
    adapter_version: int  # 0: the base
    model: str
    num_prompt: int  # tokens
    started_at: float  # by perf_counter


class RunningChoice:
    """One of a generation's sequences."""

    def __init__(self, run: Run, text: ChoiceText) -> None:
        self.run = run
        self.text = text
        self.is_over = False


class Generation:
    """One answer of ``n`` choices as it comes: iterate once for its text, always close.

    Ends by itself after the last choice's delta with a ``finish_reason``; closed before that, it cancels what
    still runs. One choice that fails is the whole answer's failure. ``cold_start``, ``timing`` and the batch
    numbers are known from the first delta on.
    """

    def __init__(
        self,
        sequences: Sequence[RunningChoice],
        accepted: Accepted,
        entered: OpenRequest,
        record: RequestRecord,
    ) -> None:
        self.accepted = accepted
        self.timing: dict[str, float] = {}
        self.cold_start: ColdStart | None = None
        self.batch_size = 0
        self.num_adapters = 0
        self._num_cached = 0  # tokens of the first choice's prompt
        self._sequences = sequences
        self._entered = entered
        self._record = record
        entered.on_end = self._cancel
        self._deltas = self._iterate()

    def __aiter__(self) -> AsyncIterator[TextDelta]:
        return self._deltas

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Frees the rows and slots of sequences that still run. Safe to call again."""
        self._entered.close()
        self._record.ended(FinishReason.CANCELLED, self.usage)  # if it hasn't ended before
        await self._cancel()
        await self._deltas.aclose()

    @property
    def num_choices(self) -> int:
        return len(self._sequences)

    @property
    def is_over(self) -> bool:
        """All choices are complete, or nobody wants the rest."""
        return all(sequence.is_over for sequence in self._sequences)

    @property
    def usage(self) -> Usage:
        num_completion = sum(sequence.text.num_tokens for sequence in self._sequences)
        return Usage(self.accepted.num_prompt, num_completion, self._num_cached)

    @property
    def waits_for(self) -> str:
        """The stage that a request without a token is in, as far as its router knows."""
        placed = any(sequence.run.replica_id for sequence in self._sequences)
        return "first_token" if placed else "wake"

    @property
    def cold_base(self) -> bool:
        return self._sequences[0].run.cold_base

    @property
    def served(self) -> Served:
        return Served(
            request_id=self.accepted.request_id,
            user_id=self.accepted.user_id,
            adapter_digest=self.accepted.adapter_digest,
            adapter_version=self.accepted.adapter_version,
            cold_start=self.cold_start or ColdStart.NONE,
            timing=self.timing,
            batch_size=self.batch_size,
            num_adapters=self.num_adapters,
        )

    async def answer(self) -> Answer:
        """Runs to the end."""
        async with self:
            deltas = [delta async for delta in self]
        choices = tuple(_choice(index, deltas) for index in range(self.num_choices))
        return Answer(choices=choices, usage=self.usage, served=self.served)

    async def chunks(self) -> AsyncGenerator[Chunk]:
        """Runs to the end; text and what belongs to it, then one chunk with everything else."""
        async with self:
            async for delta in self:
                text, reason, index, logprobs = delta
                chunk = Chunk(text=text, index=index, logprobs=logprobs, finish_reason=reason)
                if reason is not None and self.is_over:
                    chunk = msgspec.structs.replace(chunk, usage=self.usage, served=self.served)
                if chunk.text or chunk.logprobs or chunk.finish_reason:
                    yield chunk

    async def _iterate(self) -> AsyncGenerator[TextDelta]:
        """The first delta comes with the first token, even if that makes no text yet."""
        with self._record.failures():
            async with contextlib.aclosing(merged([sequence.run for sequence in self._sequences])) as news:
                while (item := await self._entered.next_of(news)) is not None:
                    index, progress = item
                    sequence = self._sequences[index]
                    if sequence.is_over:  # a stop string ended it, which its replica learned later
                        continue
                    is_first = self.cold_start is None
                    self._note(index, progress)
                    delta = sequence.text.push(progress, index)
                    if delta.finish_reason is not None:
                        await self._end(sequence, delta.finish_reason, progress)
                    is_last = delta.finish_reason is not None and self.is_over
                    if is_first or delta.text or delta.logprobs or delta.finish_reason:
                        yield delta
                    if is_last:
                        return
            raise ReplicaError(f"the answer of {self.accepted.request_id} ended before it was complete")

    async def _end(self, sequence: RunningChoice, reason: FinishReason, progress: Progress) -> None:
        if reason in {FinishReason.ERROR, FinishReason.CANCELLED}:
            raise ReplicaError(
                progress.error or "the sequence was cancelled", code=progress.error_code or None
            )
        sequence.is_over = True
        if progress.finish_reason is None:  # a stop string: the replica doesn't know yet
            await sequence.run.aclose()
        if self.is_over:
            self._entered.close()
            self._record.ended(reason, self.usage)

    async def _cancel(self) -> None:
        running = [sequence for sequence in self._sequences if not sequence.is_over]
        for sequence in running:
            sequence.is_over = True
        await asyncio.gather(*(sequence.run.aclose() for sequence in running))

    def _note(self, index: int, progress: Progress) -> None:
        self.batch_size = max(self.batch_size, progress.batch_size)
        self.num_adapters = max(self.num_adapters, progress.num_adapters)
        if index == 0 and progress.timing is not None:
            self._num_cached = progress.timing.cached_tokens
        if self.cold_start is None:
            self._note_first(self._sequences[index].run, progress.timing or Timing())
        self._record.generated(index, len(progress.tokens))

    def _note_first(self, run: Run, timing: Timing) -> None:
        warm = ColdStart.ADAPTER if timing.adapter_cold else ColdStart.NONE
        self.cold_start = ColdStart.BASE if run.cold_base else warm
        self.timing = {
            "queue": timing.queue_s,
            "wake": run.wake_s,
            "download": timing.download_s,
            "load": timing.load_s,
            "activate": timing.activate_s,
            "prefill": timing.prefill_s,
            "first_token": time.perf_counter() - self.accepted.started_at,
        }
        self._entered.is_answering = True
        self._record.began(
            self.timing, self.accepted.num_prompt, self._num_cached, adapter_cold=timing.adapter_cold
        )


def _choice(index: int, deltas: Sequence[TextDelta]) -> Choice:
    own = [delta for delta in deltas if delta.choice == index]
    return Choice(
        index=index,
        text="".join(delta.text for delta in own),
        finish_reason=own[-1].finish_reason or FinishReason.STOP,
        logprobs=_logprobs(own),
    )


def _logprobs(deltas: Sequence[TextDelta]) -> tuple[Logprob, ...] | None:
    if deltas[0].logprobs is None:
        return None
    return tuple(logprob for delta in deltas for logprob in delta.logprobs or ())
