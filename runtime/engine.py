"""The engine: many sequences, of many people's adapters, in one batch.

One ``step()`` is: fill slots, let sequences join, schedule, run, sample, advance. The engine does no I/O:
prepared adapter files and requests come in by calls, tokens go out as return values; a clock comes in as a
function.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from tunefleet.core import AdapterRef, FinishReason, Manifest
from tunefleet.errors import AdapterLoadFailed
from tunefleet.messages import Progress, Submit, TokenLogprob
from tunefleet.runtime.activations import MAX_SLICES, SLICE_BYTES, Activations
from tunefleet.runtime.banks import Banks, slot_dtype
from tunefleet.runtime.batch import Runner
from tunefleet.runtime.kv import KvRows, bytes_per_token
from tunefleet.runtime.lora import wrap_linears
from tunefleet.runtime.prefixes import PrefixTable
from tunefleet.runtime.rewrites import Rewrites
from tunefleet.runtime.rows import RowTable
from tunefleet.runtime.sampling import sample
from tunefleet.runtime.scheduler import Scheduled, Scheduler
from tunefleet.runtime.sequence import Sequence
from tunefleet.runtime.slots import SlotTable
from tunefleet.runtime.trials import TrialOf, trial_of

MAX_OFFERS = 3  # of a prepared file that is not there, before its requests fail
MAX_BARREN_STEPS = 3  # in which nothing but exceptions came out: the fault is not the sequences'

log = logging.getLogger("tunefleet.engine")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineLimits:
    max_num_seqs: int = 32
    max_model_len: int = 2048
    max_batch_tokens: int = 512  # a longer prompt is prefilled in chunks of this
    max_active_adapters: int = 32
    device_adapter_bytes: int = 1 << 30
    kv_cache_bytes: int = 1 << 31
    max_queue: int = 1024


class _Choice(NamedTuple):
    """What one step chose for one sequence."""

    token: int
    logprob: TokenLogprob | None


class Engine:
    """Owns a model on a device with its KV rows and adapter slots; lives as long as its replica.

    Args:
        model: with the engine's attention (``runtime.model.load_model``), already on ``device``; its linear
            layers get wrapped.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        model: nn.Module,
        manifest: Manifest,
        limits: EngineLimits,
        clock: Callable[[], float],
        device: torch.device | None = None,
    ) -> None:
        device = device or torch.device("cpu")
        wrap_linears(model, manifest.linears)
        slots_in = slot_dtype(manifest, device)
        self.banks = Banks(manifest.linears, slots_in, device, limits.device_adapter_bytes)
        self.slots = SlotTable(limits.max_active_adapters, self.banks.num_pages)
        token_bytes = bytes_per_token(model.config, getattr(torch, manifest.dtype))  # type: ignore[arg-type]
        self.rows = RowTable(limits.max_model_len, limits.kv_cache_bytes // token_bytes)
        self.prefixes = PrefixTable()
        self.scheduler = Scheduler(
            self.slots,
            self.rows,
            self.prefixes,
            max_num_seqs=limits.max_num_seqs,
            max_batch_tokens=limits.max_batch_tokens,
            max_model_len=limits.max_model_len,
            eos_token_ids=frozenset(manifest.eos_token_ids),
        )
        self.kv = KvRows(device)
        self.num_steps = 0
        self.last_logits: torch.Tensor | None = None  # [sampled, vocab] of the last step
        self._limits = limits
        self._vocab_size = manifest.vocab_size
        self._clock = clock
        self._fetching: set[str] = set()
        self._num_gone: collections.Counter[str] = collections.Counter()  # offered files that weren't there
        self._activations = Activations(self.scheduler, self.banks, manifest.linears, clock)
        self._runner = Runner(model, self.kv, self.rows, self.banks, device)
        self._rewrites = Rewrites(model, manifest, device)
        self._num_barren = 0
        self._news: list[Progress] = []

    def add(self, work: Submit) -> None:
        """Takes a sequence in; a refusal is the next step's news."""
        refusal = self._refusal(work)
        if refusal:
            self._fail(work.request_id, *refusal)
            return
        sequence = Sequence.of(work)
        sequence.added_at = self._clock()
        sequence.adapter_cold = work.adapter is not None and self.slots.lookup(work.adapter.digest) is None
        self.scheduler.add(sequence)

    def missing_adapters(self) -> list[AdapterRef]:
        """Adapters to fetch now, each named once until it is loaded or failed.

        Only as many as there are slots, so that a long queue doesn't pull everything into memory at once.
        """
        missing = [
            ref
            for ref in self.scheduler.wanted_adapters()
            if ref.digest not in self._fetching and ref.digest not in self._activations
        ]
        self._fetching.update(ref.digest for ref in missing)
        return missing

    def cancel(self, request_id: str) -> None:
        """Ends a sequence at once, whatever it waits for; an unknown id is one that ended already."""
        sequence = self.scheduler.get(request_id)
        if sequence is not None:
            self.scheduler.finish(sequence, FinishReason.CANCELLED)

    def adapter_loaded(self, digest: str, path: Path, download_s: float, load_s: float) -> None:
        """Maps a prepared file; its sequences join as soon as there is a slot.

        One that is gone by now is fetched again: the same bytes were forgotten for one user, and another has
        them, or another host process keeps the folder.
        """
        self._fetching.discard(digest)
        try:
            self._activations.take(digest, path, download_s, load_s)
            self._num_gone.pop(digest, None)
        except FileNotFoundError as error:
            self._num_gone[digest] += 1
            if self._num_gone[digest] == MAX_OFFERS:
                message = f"the prepared adapter is gone, {MAX_OFFERS} times in a row: {error}"
                self.adapter_failed(digest, message, "adapter_unavailable", retry_after_s=1.0)
        except AdapterLoadFailed as error:
            self.adapter_failed(digest, error.message, error.code, retry_after_s=1.0)

    def adapter_failed(
        self, digest: str, message: str, code: str, retry_after_s: float = 0.0, *, key: str | None = None
    ) -> None:
        """Ends the sequences that wait for this adapter, and only those.

        Args:
            key: of the objects that failed; those who have the same adapter under another key wait on.
        """
        self._fetching.discard(digest)
        self._num_gone.pop(digest, None)
        for sequence in list(self.scheduler.waiting):
            ref = sequence.adapter
            if ref is not None and ref.digest == digest and key in (None, ref.key):
                self.scheduler.finish(sequence, FinishReason.ERROR)
                self._fail(sequence.request_id, message, code, retry_after_s)

    def evict(self, digest: str) -> bool:
        """Drops what is here of a deleted adapter; False while a sequence still uses it."""
        if self.slots.is_pinned(digest) or not self._activations.drop(digest):
            return False
        if self.slots.lookup(digest) is not None:
            self.banks.clear(self.slots.deactivate(digest))
        self.scheduler.forget(digest)
        return True

    def forget_user(self, tenant: str, user_id: str) -> None:
        """Drops the keys and values that a deleted user's finished sequences left."""
        self.scheduler.forget_user(tenant, user_id)

    def step(self, trial: TrialOf = nullcontext) -> list[Progress]:
        """Runs one step; what it did, per sequence. Empty when nothing can run now.

        Args:
            trial: entered for what is done for one suspect alone, which may end the process.
        """
        self._activations.forget_unwanted()
        self._activations.advance(self._slice_bytes(), trial)
        while (sequence := self.scheduler.join()) is not None:
            sequence.admitted_at = sequence.admitted_at or self._clock()
        batch = self.scheduler.schedule()
        self._runner.prepare(batch)
        if batch.scheduled:
            self.num_steps += 1
            with trial_of(batch.suspect, trial):
                choices = self._run(batch.scheduled)
            self.scheduler.advance(batch, {key: choice.token for key, choice in choices.items()})
            self._tell(batch.scheduled, choices)
        news, self._news = self._news, []
        return news

    def improve(self) -> bool:
        """Makes one part of the model faster, within milliseconds; False when there is nothing left to do."""
        return self._rewrites.apply_next()

    def check(self) -> None:
        """Asserts that scheduler, slots and rows agree."""
        self.scheduler.check()

    def _slice_bytes(self) -> int | None:
        """How much of adapters to copy before this step: more where few run and many would."""
        num_running = len(self.scheduler.running)
        if not num_running:
            return None
        num_idle = min(self._limits.max_num_seqs - num_running, len(self.scheduler.waiting))
        return SLICE_BYTES * min(max(1, num_idle // num_running), MAX_SLICES)

    def _run(self, scheduled: list[Scheduled]) -> dict[str, _Choice]:
        """Tokens by request id. Sequences that can't go on are ended, and nobody else.

        Raises:
            Exception: what the model raised, if it isn't one sequence's fault.
        """
        culprits: list[tuple[Sequence, Exception]] = []
        results = self._halved(scheduled, culprits)
        self._num_barren = 0 if results else self._num_barren + 1
        if not results and (len(culprits) > 1 or self._num_barren == MAX_BARREN_STEPS):
            raise culprits[0][1]  # the replica ends; its requests go on at another one
        choices = {key: choice for _, found in results for key, choice in found.items()}
        self._end_poisoned(scheduled, choices, {sequence.request_id for sequence, _ in culprits})
        for sequence, error in culprits:
            log.error("sequence %s ends: %r", sequence.request_id, error, exc_info=error)
            self._end(sequence, "the engine failed at this request; try again", "engine_error")
        if results:
            self.last_logits = results[0][0] if len(results) == 1 else torch.cat([row for row, _ in results])
        return choices

    def _halved(
        self, scheduled: list[Scheduled], culprits: list[tuple[Sequence, Exception]]
    ) -> list[tuple[torch.Tensor, dict[str, _Choice]]]:
        """Runs all at once, or where that raises, halves of it, down to whoever is the reason."""
        try:
            return [self._compute(scheduled)]
        except Exception as error:  # whatever one sequence's content brings about must not end the others
            if len(scheduled) == 1:
                culprits.append((scheduled[0].sequence, error))
                return []
        half = len(scheduled) // 2
        return self._halved(scheduled[:half], culprits) + self._halved(scheduled[half:], culprits)

    def _compute(self, scheduled: list[Scheduled]) -> tuple[torch.Tensor, dict[str, _Choice]]:
        logits = self._runner.run(scheduled)
        sequences = [entry.sequence for entry in scheduled if entry.samples]
        if not sequences:
            _settle(logits)
            return logits, {}
        sampled = sample(logits, [s.sampling for s in sequences], [s.num_generated for s in sequences])
        choices = {}
        rows = zip(sequences, sampled.tokens, sampled.finite, sampled.logprobs, strict=True)
        for sequence, token, is_finite, logprob in rows:
            if is_finite:
                choices[sequence.request_id] = _Choice(token, logprob)
        return logits, choices

    def _end_poisoned(
        self, scheduled: list[Scheduled], choices: dict[str, _Choice], culprits: set[str]
    ) -> None:
        for sequence in [entry.sequence for entry in scheduled if entry.samples]:
            if sequence.request_id not in choices.keys() | culprits:
                self._end(
                    sequence,
                    "the model's answer is not finite; upload a sound adapter",
                    "non_finite_logits",
                )

    def _tell(self, scheduled: list[Scheduled], choices: dict[str, _Choice]) -> None:
        """News of all who have a token."""
        num_adapters = len({entry.sequence.digest for entry in scheduled} - {None})
        for entry in scheduled:
            choice = choices.get(entry.sequence.request_id)
            if choice is not None:
                self._news.append(self._progress(entry.sequence, choice, len(scheduled), num_adapters))

    def _progress(self, sequence: Sequence, choice: _Choice, batch_size: int, num_adapters: int) -> Progress:
        hidden = sequence.finish_reason is FinishReason.STOP  # the end token itself is not part of the answer
        first = sequence.num_generated == sequence.num_resumed + 1
        return Progress(
            request_id=sequence.request_id,
            tokens=() if hidden else (choice.token,),
            finish_reason=sequence.finish_reason,
            timing=sequence.timing(self._clock()) if first else None,
            batch_size=batch_size,
            num_adapters=num_adapters,
            logprobs=() if hidden or choice.logprob is None else (choice.logprob,),
        )

    def _end(self, sequence: Sequence, message: str, code: str) -> None:
        """Ends a sequence alone; what its row holds is gone before the row has another holder."""
        self.scheduler.finish(sequence, FinishReason.ERROR, keep_prefix=False)
        self._fail(sequence.request_id, message, code)

    def _refusal(self, work: Submit) -> tuple[str, str] | None:
        limits = self._limits
        num_tokens = len(work.prompt) + len(work.generated)
        if not work.prompt:
            return "the prompt is empty", "invalid_request"
        if num_tokens >= limits.max_model_len:
            return (
                f"{num_tokens} tokens leave no room in a context of {limits.max_model_len}",
                "context_length_exceeded",
            )
        if not all(0 <= token < self._vocab_size for token in (*work.prompt, *work.generated)):
            return f"token ids must be below {self._vocab_size}", "invalid_request"
        if work.adapter is not None and not self.slots.fits_ever(work.adapter.rank):
            return f"rank {work.adapter.rank} does not fit device_adapter_bytes", "adapter_too_large"
        was_running = work.suspect or bool(work.generated)  # at a replica that is gone: it is never refused
        if len(self.scheduler.waiting) >= limits.max_queue and not was_running:
            return f"{limits.max_queue} requests wait already", "queue_full"
        if self.scheduler.get(work.request_id) is not None:
            return f"request {work.request_id} runs already", "duplicate_request_id"
        return None

    def _fail(self, request_id: str, message: str, code: str, retry_after_s: float = 0.0) -> None:
        self._news.append(
            Progress(
                request_id=request_id,
                finish_reason=FinishReason.ERROR,
                error=message,
                error_code=code,
                retry_after_s=retry_after_s,
            )
        )


def _settle(logits: torch.Tensor) -> None:
    """A GPU computes later: what it raises is to be raised in the step that it belongs to."""
    if logits.is_cuda:
        torch.cuda.synchronize(logits.device)
