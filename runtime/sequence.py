"""One sequence's tokens and where it stands."""

from __future__ import annotations

import dataclasses
import enum
import functools

from tunefleet.core import DEFAULT_TENANT, AdapterRef, FinishReason, SamplingParams
from tunefleet.messages import Submit, Timing
from tunefleet.runtime.fairness import Owner
from tunefleet.runtime.prefixes import Scope


class SequenceState(enum.Enum):
    WAITING = "waiting"  # not in the batch: a place, its adapter, a slot or a row is missing
    RUNNING = "running"  # in the batch, holds a row and, if it has an adapter, pins a slot
    FINISHED = "finished"  # holds nothing


@dataclasses.dataclass(eq=False)
class Sequence:
    """Lives from Submit until it is finished; only the scheduler changes its state.

    ``num_computed`` tokens have KV; prefill is whatever of ``tokens`` does not. A preempted sequence waits
    again, with all its tokens and its place in the order of arrival.
    """

    request_id: str
    tokens: list[int]  # prompt, then what was generated
    num_prompt: int
    sampling: SamplingParams
    adapter: AdapterRef | None
    tenant: str = DEFAULT_TENANT
    user_id: str | None = None  # None: the tenant itself asks the base
    num_resumed: int = 0  # tokens that an earlier replica generated
    suspect: bool = False  # runs alone until it has a token of this replica's
    state: SequenceState = SequenceState.WAITING
    arrival: int = 0  # its place in the order of arrival
    num_computed: int = 0
    num_charged: int = 0  # tokens that its owner was charged for; computing them again is free
    cached_tokens: int = 0  # of the prompt, whose KV was there when it first joined
    num_preemptions: int = 0
    preempted_at: int = 0  # how many tokens it had then
    keeps_prefix: bool = True  # False: its owner or adapter was forgotten meanwhile
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
            work.tenant,
            work.user_id,
            num_resumed=len(work.generated),
            suspect=work.suspect,
        )

    @functools.cached_property
    def digest(self) -> str | None:
        return self.adapter.digest if self.adapter else None

    @functools.cached_property
    def owner(self) -> Owner:
        return Owner(self.tenant, self.user_id)

    @functools.cached_property
    def scope(self) -> Scope:
        return Scope(self.tenant, self.user_id, self.digest)

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
            cached_tokens=self.cached_tokens,
        )
