"""Running one batch: flat tokens, their places, one forward."""

from __future__ import annotations

import torch
from torch import nn

from tunefleet.runtime.attention import DecodeGroup, PrefillSegment, StepContext, step_context
from tunefleet.runtime.banks import Banks
from tunefleet.runtime.kv import KvRows
from tunefleet.runtime.lora import LoraPlan, lora_plan, plan_adapters
from tunefleet.runtime.rows import RowTable
from tunefleet.runtime.scheduler import Batch, Scheduled


class Runner:
    """The model with its KV tensors; turns a batch into logits."""

    def __init__(
        self, model: nn.Module, kv: KvRows, rows: RowTable, banks: Banks, device: torch.device
    ) -> None:
        self._model = model
        self._kv = kv
        self._rows = rows
        self._banks = banks
        self._device = device

    @torch.inference_mode()
    def prepare(self, batch: Batch) -> None:
        """Brings rows to where the batch expects them; once per batch."""
        self._kv.apply(batch.kv_ops)
        for entry in batch.scheduled:
            if entry.sequence.num_computed == 0:
                self._kv.clear(self._rows.row_of(entry.sequence.request_id))

    @torch.inference_mode()
    def run(self, scheduled: list[Scheduled]) -> torch.Tensor:
        """Logits ``[num_sampled, vocab]`` of the sequences that sample, in the order given.

        Running the same again, or a part of it, computes and writes the same.
        """
        places = _places(scheduled)
        input_ids: list[int] = []
        positions: list[int] = []
        for entry in scheduled:
            start = entry.sequence.num_computed
            end = start + entry.num_tokens
            input_ids += entry.sequence.tokens[start:end]
            positions += range(start, end)
        last = [
            place + entry.num_tokens - 1
            for place, entry in zip(places, scheduled, strict=True)
            if entry.samples
        ]
        context = self._context(scheduled, places)
        with step_context(context), lora_plan(self._adapters(scheduled, places)):
            output = self._model(
                input_ids=self._tensor(input_ids).unsqueeze(0),
                position_ids=self._tensor(positions).unsqueeze(0),
                attention_mask=torch.ones(1, len(input_ids), dtype=torch.long, device=self._device),
                use_cache=False,
                logits_to_keep=self._tensor(last or [0]),
            )
        logits: torch.Tensor = output.logits[0]
        return logits if last else logits[:0]

    def _context(self, scheduled: list[Scheduled], places: list[int]) -> StepContext:
        decodes: dict[int, list[tuple[int, int, int]]] = {}
        prefills = []
        for place, entry in zip(places, scheduled, strict=True):
            row = self._rows.row_of(entry.sequence.request_id)
            start = entry.sequence.num_computed
            if entry.num_tokens == 1:
                decodes.setdefault(row.length, []).append((place, row.index, start))
            else:
                prefills.append(PrefillSegment(row, place, start, entry.num_tokens))
        groups = [
            DecodeGroup(length, self._rows.num_rows(length), decoding, self._device)
            for length, decoding in decodes.items()
        ]
        return StepContext(self._kv, groups, prefills)

    def _adapters(self, scheduled: list[Scheduled], places: list[int]) -> LoraPlan | None:
        tokens = [
            (entry.slot, place, entry.num_tokens)
            for place, entry in zip(places, scheduled, strict=True)
            if entry.slot is not None
        ]
        return plan_adapters(tokens, self._banks, self._device)

    def _tensor(self, values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=self._device)


def _places(scheduled: list[Scheduled]) -> list[int]:
    """Where each sequence's tokens begin in the flat batch."""
    places = []
    place = 0
    for entry in scheduled:
        places.append(place)
        place += entry.num_tokens
    return places
