"""A request's way to the machine: user to digest, text to tokens, one sequence per choice."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
import uuid
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from tunefleet.answers import BASE_DIGEST
from tunefleet.choices import ChoiceText
from tunefleet.config import Options, context_length
from tunefleet.core import DEFAULT_ADAPTER, AdapterRef, Manifest, SamplingParams
from tunefleet.errors import AdapterNotFound, RequestInvalid
from tunefleet.generation import Accepted, Generation, RunningChoice
from tunefleet.messages import Submit
from tunefleet.metrics import Metrics
from tunefleet.open_requests import OpenRequest, OpenRequests, Owner
from tunefleet.openai_api import ChatRequest, CompletionRequest
from tunefleet.runtime.dispatch import Dispatcher
from tunefleet.target import Target
from tunefleet.text import Tokenizer

if TYPE_CHECKING:
    from tunefleet.adapters_store.store import AdapterStore

_CHARS_OFF_LOOP = 16_384  # longer texts are tokenised in a thread, a few milliseconds are not
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15  # SplitMix64's: between the seeds of a request's choices


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
        self.metrics = Metrics(self.open_requests)
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
            prompt = tuple(await self._prompt_ids(request))
            work = Submit(
                request_id=accepted_id,
                prompt=prompt,
                sampling=self._sampling(request, len(prompt)),
                adapter=adapter.ref,
                tenant=target.tenant,
                user_id=target.user_id,
            )
            accepted = self._accepted(work, target, adapter.version, started_at)
            return self._begun(entered, work, accepted, request.stops, request.n or 1)

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
        with self.metrics.requests.refusals():
            try:
                yield entered
            except BaseException:
                entered.close()
                raise

    def _begun(
        self,
        entered: OpenRequest,
        work: Submit,
        accepted: Accepted,
        stops: tuple[str, ...] = (),
        num_choices: int = 1,
    ) -> Generation:
        entered.check()
        sequences = [
            RunningChoice(
                self._dispatcher.submit(_choice_of(work, index)),
                ChoiceText(self._tokenizer, stops, with_logprobs=work.sampling.logprobs is not None),
            )
            for index in range(num_choices)
        ]
        record = self.metrics.requests.record(accepted.started_at, has_adapter=work.adapter is not None)
        return Generation(sequences, accepted, entered, record)

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
            min_p=request.min_p or 0.0,
            logprobs=request.num_logprobs,
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


class _Adapter(NamedTuple):
    ref: AdapterRef | None
    version: int


def _choice_of(work: Submit, index: int) -> Submit:
    """The sequence of one choice, under an id of its own: the client's may be another client's too.

    The first has the request's seed, so that it is what it were without the others.
    """
    sampling = work.sampling
    if index:
        sampling = msgspec.structs.replace(sampling, seed=(sampling.seed + index * _GOLDEN_GAMMA) % 2**63)
    return msgspec.structs.replace(work, request_id=new_request_id(), sampling=sampling)


def new_request_id() -> str:
    return uuid.uuid4().hex


def model_name(user_id: str, name: str = DEFAULT_ADAPTER) -> str:
    return f"user:{user_id}" if name == DEFAULT_ADAPTER else f"user:{user_id}/{name}"
