"""Who has been served how much. Pure accounting: no torch, no clock, no I/O.

The virtual token counter of Sheng et al., "Fairness in Serving Large Language Models" (OSDI 2024): an owner's
counter grows with each token that is scheduled for it; who has the smallest is next. Who comes back is
lifted to the smallest counter of those who are there, so that absence earns no credit.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

PREFILL_WEIGHT = 1
DECODE_WEIGHT = 2  # the paper's: an output token costs about as much as two of input
MAX_ABSENT = 1024  # owners without sequences whose counters are remembered


class Owner(NamedTuple):
    tenant: str
    user_id: str | None  # None: the tenant itself


class ServiceCounters:
    """One counter per owner, in weighted tokens.

    An owner without sequences is remembered while others are there, else leaving and coming back would pay
    its debts; at most ``MAX_ABSENT`` are, those with the largest counters.
    """

    def __init__(self) -> None:
        self._service: dict[Owner, int] = {}
        self._num_sequences: Counter[Owner] = Counter()

    @property
    def num_active(self) -> int:
        """Owners that have sequences."""
        return len(self._num_sequences)

    def __len__(self) -> int:
        return len(self._service)

    def __getitem__(self, owner: Owner) -> int:
        return self._service[owner]

    def enter(self, owner: Owner) -> None:
        """A sequence of the owner's came."""
        if owner not in self._num_sequences:
            floor = min((self._service[active] for active in self._num_sequences), default=0)
            self._service[owner] = max(self._service.get(owner, 0), floor)
        self._num_sequences[owner] += 1

    def leave(self, owner: Owner) -> None:
        """A sequence of the owner's is finished."""
        self._num_sequences[owner] -= 1
        if not self._num_sequences[owner]:
            del self._num_sequences[owner]
            self._forget_absent()

    def charge(self, owner: Owner, *, num_prefill: int = 0, num_decode: int = 0) -> None:
        self._service[owner] += PREFILL_WEIGHT * num_prefill + DECODE_WEIGHT * num_decode

    def check(self) -> None:
        assert all(count > 0 for count in self._num_sequences.values()), (
            "an owner left more often than it came"
        )
        assert self._num_sequences.keys() <= self._service.keys(), "an owner has no counter"
        assert len(self._service) <= len(self._num_sequences) + MAX_ABSENT, "absent owners pile up"

    def _forget_absent(self) -> None:
        absent = self._service.keys() - self._num_sequences.keys()
        if not self._num_sequences:
            self._service.clear()
        elif len(absent) > MAX_ABSENT:
            del self._service[
                min(absent, key=lambda owner: (self._service[owner], owner.tenant, owner.user_id or ""))
            ]
