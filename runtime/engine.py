"""The engine: many sequences, of many people's adapters, in one batch.

One ``step()`` is schedule, run, sample, advance. The engine does no I/O: prepared adapter files and requests
come in by calls, tokens go out as return values; a clock comes in as a function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from tunefleet.core import AdapterRef, FinishReason, LinearSpec, Manifest
from tunefleet.errors import AdapterLoadFailed
from tunefleet.messages import Progress, Submit
from tunefleet.runtime.batch import Runner
from tunefleet.runtime.kv import KvRows
from tunefleet.runtime.lora import Banks, wrap_linears
from tunefleet.runtime.rows import RowTable
from tunefleet.runtime.sampling import sample
from tunefleet.runtime.scheduler import Batch, Scheduler
from tunefleet.runtime.sequence import Sequence
from tunefleet.runtime.slots import SlotTable


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineLimits:
    max_num_seqs: int = 32
    max_model_len: int = 2048
    max_batch_tokens: int = 512  # a longer prompt is prefilled in chunks of this
    max_active_adapters: int = 32
    device_adapter_bytes: int = 1 << 30
    max_queue: int = 1024


class _Loaded(NamedTuple):
    """An adapter's prepared file, mapped: it stays readable even if the host tier drops the file."""

    weights: dict[str, tuple[torch.Tensor, torch.Tensor]]
    download_s: float
    load_s: float


class Engine:
    """Owns a model on a device with its KV rows and adapter slots; lives as long as its replica.

    Args:
        model: with the engine's attention (``runtime.model.load_model``), already on ``device``; its linear
        layers
            get wrapped.
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
        self.banks = Banks(manifest.linears, slot_dtype(manifest, device), device)
        self.slots = SlotTable(limits.max_active_adapters, limits.device_adapter_bytes, self.banks.slot_bytes)
        self.rows = RowTable(limits.max_model_len)
        self.scheduler = Scheduler(
            self.slots,
            self.rows,
            max_num_seqs=limits.max_num_seqs,
            max_batch_tokens=limits.max_batch_tokens,
            max_model_len=limits.max_model_len,
            eos_token_ids=frozenset(manifest.eos_token_ids),
        )
        self.num_steps = 0
        self.last_logits: torch.Tensor | None = None  # [sampled, vocab] of the last step
        self._limits = limits
        self._vocab_size = manifest.vocab_size
        self._linears = manifest.linears
        self._clock = clock
        self._loaded: dict[str, _Loaded] = {}
        self._fetching: set[str] = set()
        self._runner = Runner(model, KvRows(device), self.rows, self.banks, device)
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
        wanted: dict[str, AdapterRef] = {}
        for sequence in self.scheduler.waiting:
            if sequence.adapter is not None and self.slots.lookup(sequence.adapter.digest) is None:
                wanted[sequence.adapter.digest] = sequence.adapter
                if len(wanted) == self._limits.max_active_adapters:
                    break
        missing = [
            ref for digest, ref in wanted.items() if digest not in self._loaded.keys() | self._fetching
        ]
        self._fetching.update(ref.digest for ref in missing)
        return missing

    def cancel(self, request_id: str) -> None:
        """Ends a sequence at once, whatever it waits for; an unknown id is one that ended already."""
        sequence = self.scheduler.get(request_id)
        if sequence is not None:
            self.scheduler.finish(sequence, FinishReason.CANCELLED)

    def adapter_loaded(self, digest: str, path: Path, download_s: float, load_s: float) -> None:
        """Maps a prepared file; its sequences join as soon as there is a slot."""
        self._fetching.discard(digest)
        try:
            self._loaded[digest] = _Loaded(map_prepared(path, self._linears), download_s, load_s)
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
        for sequence in list(self.scheduler.waiting):
            ref = sequence.adapter
            if ref is not None and ref.digest == digest and key in (None, ref.key):
                self.scheduler.finish(sequence, FinishReason.ERROR)
                self._fail(sequence.request_id, message, code, retry_after_s)

    def evict(self, digest: str) -> bool:
        """Drops an adapter from its slot and forgets its file; False while a sequence still uses it."""
        if self.slots.is_pinned(digest):
            return False
        self._loaded.pop(digest, None)
        if self.slots.lookup(digest) is not None:
            self.banks.empty(self.slots.deactivate(digest))
        return True

    def step(self) -> list[Progress]:
        """Runs one step; what it did, per sequence. Empty when nothing can run now."""
        self._admit()
        batch = self.scheduler.schedule()
        if batch.scheduled:
            self._run(batch)
        news, self._news = self._news, []
        return news

    def check(self) -> None:
        """Asserts that scheduler, slots and rows agree."""
        self.scheduler.check()

    def _admit(self) -> None:
        while (admission := self.scheduler.admit(self._loaded.keys())) is not None:
            sequence = admission.sequence
            sequence.admitted_at = self._clock()
            if admission.activation is not None and sequence.digest is not None:
                loaded = self._loaded.pop(sequence.digest)
                for slot in admission.activation.evicted:
                    self.banks.empty(slot)
                self.banks.fill(admission.activation.slot, loaded.weights)
                sequence.download_s, sequence.load_s = loaded.download_s, loaded.load_s
                sequence.activate_s = self._clock() - sequence.admitted_at

    def _run(self, batch: Batch) -> None:
        self.num_steps += 1
        logits = self.last_logits = self._runner.run(batch)
        sampling = [entry.sequence for entry in batch.scheduled if entry.samples]
        if sampling:
            result = sample(logits, [s.sampling for s in sampling], [s.num_generated for s in sampling])
            ids = [s.request_id for s in sampling]
            tokens = dict(zip(ids, result.tokens, strict=True))
            for sequence, finite in zip(sampling, result.finite, strict=True):
                if not finite:
                    del tokens[sequence.request_id]
                    self._end_poisoned(sequence)
        else:
            tokens = {}
        self.scheduler.advance(batch, tokens)
        num_adapters = len({entry.sequence.digest for entry in batch.scheduled} - {None})
        for sequence in sampling:
            if sequence.request_id in tokens:
                self._news.append(self._progress(sequence, len(batch.scheduled), num_adapters))

    def _progress(self, sequence: Sequence, batch_size: int, num_adapters: int) -> Progress:
        token = sequence.tokens[-1]
        hidden = sequence.finish_reason is FinishReason.STOP  # the end token itself is not part of the answer
        first = sequence.num_generated == sequence.num_resumed + 1
        return Progress(
            request_id=sequence.request_id,
            tokens=() if hidden else (token,),
            finish_reason=sequence.finish_reason,
            timing=sequence.timing(self._clock()) if first else None,
            batch_size=batch_size,
            num_adapters=num_adapters,
        )

    def _end_poisoned(self, sequence: Sequence) -> None:
        """Ends it alone; what its row holds is gone before the row has another holder."""
        self.scheduler.finish(sequence, FinishReason.ERROR)
        self._fail(
            sequence.request_id,
            "the model's answer is not finite; upload a sound adapter",
            "non_finite_logits",
        )

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
        if len(self.scheduler.waiting) >= limits.max_queue:
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


def slot_dtype(manifest: Manifest, device: torch.device) -> torch.dtype:
    """Slots are fp32 on a CPU, where one-row products are twice as fast that way; else the base's type."""
    dtype: torch.dtype = torch.float32 if device.type == "cpu" else getattr(torch, manifest.dtype)
    return dtype


def map_prepared(path: Path, linears: dict[str, LinearSpec]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Per layer ``A [r, in]`` and ``B [r, out]`` of a prepared file.

    Raises:
        AdapterLoadFailed: it can't be read, or is not for this base.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = [name.removesuffix(".A") for name in file.keys() if name.endswith(".A")]  # noqa: SIM118
            weights = {name: (file.get_tensor(f"{name}.A"), file.get_tensor(f"{name}.B")) for name in names}
    except (OSError, SafetensorError) as error:
        raise AdapterLoadFailed(f"the prepared adapter can't be read: {error}") from error
    for name, (a, b) in weights.items():
        spec = linears.get(name)
        if spec is None or a.shape[1] != spec.in_features or b.shape[1] != spec.out_features:
            raise AdapterLoadFailed(f"the prepared adapter doesn't fit the base at {name}")
    return weights
