"""One sequence's tokens and where it stands."""

from __future__ import annotations

import dataclasses
import enum

from tunefleet.core import AdapterRef, FinishReason, SamplingParams
from tunefleet.messages import Submit, Timing


class SequenceState(enum.Enum):
    WAITING = "waiting"  # not in the batch: a place, its adapter or a slot is missing
    RUNNING = "running"  # in the batch, holds a row and, if it has an adapter, pins a slot
    FINISHED = "finished"  # holds nothing


@dataclasses.dataclass
class Sequence:
    """Lives from Submit until it is finished; only the scheduler changes its state.

    ``num_computed`` tokens have KV; prefill is whatever of ``tokens`` does not.
    """

    request_id: str
    tokens: list[int]  # prompt, then what was generated
    num_prompt: int
    sampling: SamplingParams
    adapter: AdapterRef | None
    num_resumed: int = 0  # tokens that an earlier replica generated
    state: SequenceState = SequenceState.WAITING
    num_computed: int = 0
    finish_reason: FinishReason | None = None
    added_at: float = 0.0
    admitted_at: float = 0.0
    download_s: float = 0.0
    load_s: float = 0.0
    activate_s: float = 0.0
    adapter_cold: bool = False

    @classmethod
    def of(cls, work: Submit) -> Sequence:
        tokens = [*work.prompt, *work.generated]
        return cls(
            work.request_id,
            tokens,
            len(work.prompt),
            work.sampling,
            work.adapter,
            num_resumed=len(work.generated),
        )

    @property
    def digest(self) -> str | None:
        return self.adapter.digest if self.adapter else None

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def num_uncomputed(self) -> int:
        return len(self.tokens) - self.num_computed

    def timing(self, now: float) -> Timing:
        """Stages up to the first token."""
        return Timing(
            queue_s=self.admitted_at - self.added_at,
            download_s=self.download_s,
            load_s=self.load_s,
            activate_s=self.activate_s,
            prefill_s=now - self.admitted_at,
            adapter_cold=self.adapter_cold,
        )
