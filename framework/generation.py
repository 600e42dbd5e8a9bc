"""A request's way through the router: user to digest, text to tokens, tokens to text."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

from tunefleet.answers import BASE_DIGEST, Answer, Chunk, Served
from tunefleet.config import Options, context_length
from tunefleet.core import (
    DEFAULT_ADAPTER,
    AdapterRef,
    ColdStart,
    FinishReason,
    Manifest,
    SamplingParams,
    Usage,
)
from tunefleet.errors import AdapterNotFound, ReplicaError, RequestInvalid
from tunefleet.messages import Progress, Submit, Timing
from tunefleet.open_requests import OpenRequest, OpenRequests, Owner
from tunefleet.openai_api import ChatRequest, CompletionRequest
from tunefleet.runtime.dispatch import Dispatcher, Run
from tunefleet.target import Target
from tunefleet.text import Detokenizer, StopMatcher, Tokenizer

if TYPE_CHECKING:
    from tunefleet.adapters_store.store import AdapterStore

_CHARS_OFF_LOOP = 16_384  # longer texts are tokenised in a thread, a few milliseconds are not


class TextDelta(NamedTuple):
    text: str
    finish_reason: FinishReason | None


class Accepted(NamedTuple):
    """What is fixed once a request is accepted."""

    request_id: str
    user_id: str | None
    adapter_digest: str  # or "base"
    adapter_version: int  # 0: the base
    model: str
    num_prompt: int  # tokens
    started_at: float  # by perf_counter


class Generations:
    """Starts generations for one router, and knows which are open. The fleet closes its parts."""

    def __init__(
        self,
        *,
        options: Options,
        manifest: Manifest,
        tokenizer: Tokenizer,
        store: AdapterStore,
        dispatcher: Dispatcher,
    ) -> None:
        self._options = options
        self._manifest = manifest
        self._tokenizer = tokenizer
        self._store = store
        self._dispatcher = dispatcher
        self.open_requests = OpenRequests()
        self.max_model_len = context_length(options, manifest)

    async def start(
        self, target: Target, request: ChatRequest | CompletionRequest, *, request_id: str | None = None
    ) -> Generation:
        """Accepts a request: from here its digest is fixed. The caller closes the generation.

        Raises:
            RequestInvalid: also ``context_length_exceeded``.
            AdapterNotFound: no such user, adapter or version, and no fallback.
        """
        started_at = time.perf_counter()
        accepted_id = request_id or new_request_id()
        with self._entered(target) as entered:
            adapter = await self._resolve(target.checked(), target.session or accepted_id)
            prompt = await self._prompt_ids(request)
            work = Submit(
                request_id=new_request_id(),  # not the client's, which another client may use too
                prompt=tuple(prompt),
                sampling=self._sampling(request, len(prompt)),
                adapter=adapter.ref,
                tenant=target.tenant,
                user_id=target.user_id,
            )
            accepted = self._accepted(work, target, adapter.version, started_at)
            return self._begun(entered, work, accepted._replace(request_id=accepted_id), request.stops)

    async def warm(self, target: Target) -> Generation:
        """A generation of one token, which brings the target's adapter to a device."""
        started_at = time.perf_counter()
        with self._entered(target) as entered:
            adapter = await self._resolve(target.checked(), target.session)
            prompt = (next(iter(self._manifest.eos_token_ids), 0),)
            sampling = SamplingParams(max_tokens=1)
            work = Submit(
                request_id=new_request_id(),
                prompt=prompt,
                sampling=sampling,
                adapter=adapter.ref,
                tenant=target.tenant,
                user_id=target.user_id,
            )
            return self._begun(entered, work, self._accepted(work, target, adapter.version, started_at))

    @contextlib.contextmanager
    def _entered(self, target: Target) -> Iterator[OpenRequest]:
        """An open request, which stays open if this ends well: its generation closes it."""
        entered = self.open_requests.enter(Owner(target.tenant, target.user_id))
        try:
            yield entered
        except BaseException:
            entered.close()
            raise

    def _begun(
        self, entered: OpenRequest, work: Submit, accepted: Accepted, stops: tuple[str, ...] = ()
    ) -> Generation:
        entered.check()
        run = self._dispatcher.submit(work)
        return Generation(run, accepted, entered, Detokenizer(self._tokenizer), stops)

    def _accepted(self, work: Submit, target: Target, version: int, started_at: float) -> Accepted:
        return Accepted(
            request_id=work.request_id,
            user_id=target.user_id,
            adapter_digest=work.adapter.digest if work.adapter else BASE_DIGEST,
            adapter_version=version,
            model=model_name(target.user_id or "", target.name) if work.adapter else self._manifest.name,
            num_prompt=len(work.prompt),
            started_at=started_at,
        )

    async def _resolve(self, target: Target, session: str | None) -> _Adapter:
        if target.user_id is None:
            return _Adapter(None, 0)
        try:
            found = await self._store.resolve(
                target.user_id,
                name=target.name,
                tenant=target.tenant,
                version=target.version,
                session=session,
            )
        except AdapterNotFound as error:
            fallback = target.fallback or error.fallback or self._options.fallback
            if target.version is None and fallback == "base":
                return _Adapter(None, 0)
            raise
        return _Adapter(found.ref, found.version)

    async def _prompt_ids(self, request: ChatRequest | CompletionRequest) -> list[int]:
        if isinstance(request, ChatRequest):
            messages = [message.plain() for message in request.messages]
            return await self._encode(
                lambda: self._tokenizer.encode_chat(messages),
                sum(len(message["content"]) for message in messages),
            )
        prompt = request.text_or_ids
        if isinstance(prompt, str):
            return await self._encode(lambda: self._tokenizer.encode(prompt), len(prompt))
        if not all(0 <= token < self._manifest.vocab_size for token in prompt):
            raise RequestInvalid(f"token ids are 0 to {self._manifest.vocab_size - 1}", param="prompt")
        return prompt

    async def _encode(self, encode: Callable[[], list[int]], num_chars: int) -> list[int]:
        """Refuses by length what can't fit, so that no text is too long to refuse quickly."""
        if num_chars // self._tokenizer.max_token_chars >= self.max_model_len:
            self._refuse_length(f"at least {num_chars // self._tokenizer.max_token_chars}")
        return encode() if num_chars < _CHARS_OFF_LOOP else await asyncio.to_thread(encode)

    def _sampling(self, request: ChatRequest | CompletionRequest, num_prompt: int) -> SamplingParams:
        if not num_prompt:
            raise RequestInvalid("the prompt is empty", param="prompt")
        room = self.max_model_len - num_prompt
        if room < (request.max_new_tokens or 1):
            self._refuse_length(str(num_prompt), request.max_new_tokens)
        seed = secrets.randbits(63) if request.seed is None else request.seed % 2**63
        return SamplingParams(
            max_tokens=request.max_new_tokens or room,
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            top_k=max(request.top_k or 0, 0),
            seed=seed,
            ignore_eos=bool(request.ignore_eos),
        )

    def _refuse_length(self, num_prompt: str, max_tokens: int | None = None) -> None:
        asked = f" and {max_tokens} of answer" if max_tokens else ""
        raise RequestInvalid(
            f"the context holds {self.max_model_len} tokens; this request has {num_prompt} of prompt{asked}",
            code="context_length_exceeded",
            param="max_tokens" if max_tokens else "messages",
        )


class Generation:
    """One answer as it comes: iterate once for its text, always close.

    Ends by itself after the delta with a ``finish_reason``; closed before that, it cancels its sequence.
    ``cold_start``, ``timing`` and the batch numbers are known from the first delta on.
    """

    def __init__(
        self,
        run: Run,
        accepted: Accepted,
        entered: OpenRequest,
        detokenizer: Detokenizer,
        stops: tuple[str, ...] = (),
    ) -> None:
        self.accepted = accepted
        self.timing: dict[str, float] = {}
        self.cold_start: ColdStart | None = None
        self.batch_size = 0
        self.num_adapters = 0
        self._run = run
        self._entered = entered
        entered.on_end = run.aclose
        self._num_completion = 0
        self._detokenizer = detokenizer
        self._stops = StopMatcher(stops)
        self._over = False
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
        """Frees the sequence's rows and slot if it still runs. Safe to call again."""
        self._entered.close()
        if not self._over:
            self._over = True
            await self._run.aclose()
        await self._deltas.aclose()

    @property
    def usage(self) -> Usage:
        return Usage(self.accepted.num_prompt, self._num_completion)

    @property
    def waits_for(self) -> str:
        """The stage that a request without a token is in, as far as its router knows."""
        return "first_token" if self._run.replica_id else "wake"

    @property
    def cold_base(self) -> bool:
        return self._run.cold_base

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
            parts = [delta async for delta in self]
        reason = parts[-1].finish_reason or FinishReason.STOP
        text = "".join(part.text for part in parts)
        return Answer(text=text, finish_reason=reason, usage=self.usage, served=self.served)

    async def chunks(self) -> AsyncGenerator[Chunk]:
        """Runs to the end; text only, then one chunk with everything else."""
        async with self:
            async for text, finish_reason in self:
                if finish_reason is None:
                    if text:
                        yield Chunk(text=text)
                    continue
                yield Chunk(text=text, finish_reason=finish_reason, usage=self.usage, served=self.served)

    async def _iterate(self) -> AsyncGenerator[TextDelta]:
        """The first delta comes with the first token, even if that makes no text yet."""
        first, steps = True, aiter(self._run)
        while (progress := await self._entered.next_of(steps)) is not None:
            self._note(progress)
            text, stopped = self._push(progress.tokens)
            reason = FinishReason.STOP if stopped else progress.finish_reason
            if reason is not None:
                yield TextDelta(text if stopped else text + self._rest(), await self._end(reason, progress))
                return
            if text or first:
                first = False
                yield TextDelta(text, None)
        raise ReplicaError(f"the answer of {self.accepted.request_id} ended before it was complete")

    def _push(self, tokens: tuple[int, ...]) -> tuple[str, bool]:
        """Text of tokens, up to a stop string."""
        texts = []
        for token in tokens:
            self._num_completion += 1
            text, stopped = self._stops.push(self._detokenizer.push(token))
            texts.append(text)
            if stopped:
                return "".join(texts), True
        return "".join(texts), False

    def _rest(self) -> str:
        text, stopped = self._stops.push(self._detokenizer.flush())
        return text if stopped else text + self._stops.flush()

    async def _end(self, reason: FinishReason, progress: Progress) -> FinishReason:
        if reason in {FinishReason.ERROR, FinishReason.CANCELLED}:
            raise ReplicaError(
                progress.error or "the sequence was cancelled", code=progress.error_code or None
            )
        if progress.finish_reason is None:  # a stop string: the replica doesn't know yet
            await self._run.aclose()
        self._entered.close()
        self._over = True
        return reason

    def _note(self, progress: Progress) -> None:
        self.batch_size = max(self.batch_size, progress.batch_size)
        self.num_adapters = max(self.num_adapters, progress.num_adapters)
        if self.cold_start is None:
            self._note_first(progress.timing or Timing())

    def _note_first(self, timing: Timing) -> None:
        warm = ColdStart.ADAPTER if timing.adapter_cold else ColdStart.NONE
        self.cold_start = ColdStart.BASE if self._run.cold_base else warm
        self.timing = {
            "queue": timing.queue_s,
            "wake": self._run.wake_s,
            "download": timing.download_s,
            "load": timing.load_s,
            "activate": timing.activate_s,
            "prefill": timing.prefill_s,
            "first_token": time.perf_counter() - self.accepted.started_at,
        }


class _Adapter(NamedTuple):
    ref: AdapterRef | None
    version: int


def new_request_id() -> str:
    return uuid.uuid4().hex


def model_name(user_id: str, name: str = DEFAULT_ADAPTER) -> str:
    return f"user:{user_id}" if name == DEFAULT_ADAPTER else f"user:{user_id}/{name}"
