"""A machine without a machine: tokens from a function. Ships, so that apps can test against it too."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Sequence

from tunefleet.core import AdapterRef, FinishReason, PinTier
from tunefleet.messages import Forgotten, HeldAdapter, Progress, Status, Submit, Timing, TokenLogprob

Answer = Callable[[Submit], Sequence[int]]


class FakeRun:
    def __init__(self, dispatcher: FakeDispatcher, work: Submit) -> None:
        self.wake_s = 0.0
        self.cold_base = False
        self.replica_id = "fake"
        self._dispatcher = dispatcher
        self._work = work
        self._closed = False

    async def __aiter__(self) -> AsyncIterator[Progress]:
        work = self._work
        if self._dispatcher.error is not None:
            raise self._dispatcher.error
        self._dispatcher.running.add(work.request_id)
        try:
            tokens = list(self._dispatcher.answer(work))[: work.sampling.max_tokens]
            for index, token in enumerate(tokens):
                await self._dispatcher.step()
                if self._closed:
                    return
                yield Progress(
                    request_id=work.request_id,
                    tokens=(token,),
                    timing=Timing() if index == 0 else None,
                    batch_size=1,
                    logprobs=self._logprobs(token),
                )
            full = len(tokens) == work.sampling.max_tokens
            reason = FinishReason.LENGTH if full else FinishReason.STOP
            yield Progress(request_id=work.request_id, finish_reason=reason)
        finally:
            self._dispatcher.running.discard(work.request_id)

    def _logprobs(self, token: int) -> tuple[TokenLogprob, ...]:
        """As if each token were half as likely as the one before it, from the chosen one upwards by id."""
        num_top = self._work.sampling.logprobs
        if num_top is None:
            return ()
        tops = tuple((token + place, -math.log(2) * (place + 1)) for place in range(num_top))
        return (TokenLogprob(-math.log(2), tops),)

    async def aclose(self) -> None:
        self._closed = True
        self._dispatcher.cancelled.append(self._work.request_id)
        self._dispatcher.running.discard(self._work.request_id)


class FakeDispatcher:
    """Answers with ``answer(work)``, a token per step.

    Attributes:
        error: raised instead of an answer, when set.
        gate: when set, each token waits for ``gate.release()``.
        submitted, cancelled, running: what was asked of it.
        forgotten, held, prefetched, forgotten_users: the same, of adapters' copies and users.
        copies: what ``forget`` says it removed, by digest; one not named here was nowhere.
    """

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.error: Exception | None = None
        self.gate: asyncio.Semaphore | None = None
        self.submitted: list[Submit] = []
        self.cancelled: list[str] = []
        self.forgotten: list[str] = []
        self.forgotten_users: list[tuple[str, str]] = []
        self.held: tuple[HeldAdapter, ...] = ()
        self.prefetched: list[tuple[AdapterRef, PinTier]] = []
        self.copies: dict[str, Forgotten] = {}
        self.running: set[str] = set()

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def step(self) -> None:
        if self.gate is not None:
            await self.gate.acquire()
        await asyncio.sleep(0)

    def submit(self, work: Submit) -> FakeRun:
        self.submitted.append(work)
        return FakeRun(self, work)

    async def warmup(self) -> float:
        return 0.0

    async def forget(self, digest: str, keys: Sequence[str] = ()) -> Forgotten:
        self.forgotten.append(digest)
        return self.copies.pop(digest, Forgotten(digest=digest))

    async def forget_user(self, tenant: str, user_id: str) -> None:
        self.forgotten_users.append((tenant, user_id))

    def hold(self, adapters: Sequence[HeldAdapter]) -> None:
        self.held = tuple(adapters)

    async def prefetch(self, ref: AdapterRef, tier: PinTier) -> None:
        self.prefetched.append((ref, tier))

    async def status(self) -> Status:
        return Status(pid=0, parked_pid=0, replicas=(), pss_bytes={}, host_tier={})
