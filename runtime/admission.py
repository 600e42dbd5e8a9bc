"""Who is next. Pure: no torch, no clock, no I/O.

Owners that run less than their share come first (``runtime.places``); then the least served ones
(``runtime.fairness``); then it goes by arrival. Of owners served nearly alike, those whose adapter has a slot
come first, so that nobody waits while another's is filled. Two bounds keep that from starving anyone: see
``WaitingLine.aged``.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from tunefleet.runtime.fairness import Owner, ServiceCounters
from tunefleet.runtime.places import Places
from tunefleet.runtime.sequence import Sequence
from tunefleet.runtime.slots import SlotTable

GROUPING_TOKENS = 256  # of service; owners this close together count as served alike
STARVED_WAITS = 16  # times max_wait_steps: the bound for those who were not passed over out of turn


@dataclasses.dataclass
class _First:
    """The first of its owner's that could run, were there room for it."""

    sequence: Sequence
    since: int  # step
    passed_since: int | None = None  # step in which somebody behind it in the fair order joined


class _Rank(NamedTuple):
    """Of an owner among those who wait."""

    has_share: bool
    group: int  # owners served nearly alike are in one
    service: int


class WaitingLine:
    """Sequences that wait to join the batch.

    Only the first sequence of an owner that could run, were there room for it (its adapter is in a slot, or
    its file at hand), grows older: an owner's others wait for their owner's own, and who waits for a download
    holds nobody back. Time is counted in calls of ``step``.

    Args:
        max_wait_steps: how long others may be let in ahead of who is first in the fair order.
    """

    def __init__(
        self, slots: SlotTable, places: Places, counters: ServiceCounters, max_wait_steps: int
    ) -> None:
        self.sequences: list[Sequence] = []  # by arrival
        self._slots = slots
        self._places = places
        self._counters = counters
        self._max_wait_steps = max_wait_steps
        self._at_hand: Collection[str] = ()
        self._num_waiting: Counter[Owner] = Counter()
        self._ranks: dict[Owner, _Rank] | None = None  # until something changes them
        self._order: list[Sequence] | None = None  # by them
        self._num_steps = 0
        self._firsts: dict[str, _First] = {}  # by request id
        self._aged: list[Sequence] = []

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def aged(self) -> Sequence | None:
        """Who waited too long, and must be next.

        It was passed over by somebody behind it in the fair order more than ``max_wait_steps`` ago, or has
        been its owner's first for ``STARVED_WAITS`` times as long, whoever went ahead.
        """
        return self._aged[0] if self._aged else None

    def add(self, sequence: Sequence) -> None:
        bisect.insort(self.sequences, sequence, key=lambda waiting: waiting.arrival)
        self._num_waiting[sequence.owner] += 1
        self.changed()

    def remove(self, sequence: Sequence) -> None:
        self.sequences.remove(sequence)
        self._firsts.pop(sequence.request_id, None)
        for line in (self._aged, self._order or []):
            if sequence in line:
                line.remove(sequence)
        self._num_waiting[sequence.owner] -= 1
        if not self._num_waiting[sequence.owner]:
            del self._num_waiting[sequence.owner]

    def join(self, sequence: Sequence) -> None:
        """It joins; whom it passes over will grow older, unless it was its turn after a long wait."""
        if sequence not in self._aged:
            ranks = self._ranks_now()
            key = _fair_key(sequence, ranks)
            for first in self._firsts.values():
                if first.passed_since is None and _fair_key(first.sequence, ranks) < key:
                    first.passed_since = self._num_steps
        self.remove(sequence)
        if sequence.owner in self._num_waiting:
            self.changed()  # its owner is charged; the others' order stays

    def files_at_hand(self, digests: Collection[str]) -> None:
        """Adapters that only lack a slot."""
        self._at_hand = frozenset(digests)

    def changed(self) -> None:
        """Slots, places or counters did."""
        self._ranks = self._order = None

    def order(self) -> list[Sequence]:
        """Who would be let in, first to last."""
        if self._order is None:
            ranks, ready, aged = self._ranks_now(), {*self._slots.digests, None}, {*self._aged}
            others = [sequence for sequence in self.sequences if sequence not in aged]
            others.sort(key=lambda sequence: _key(sequence, ranks[sequence.owner], ready))
            self._order = [*self._aged, *others]
        return self._order

    def step(self) -> None:
        """A step begins, and those who could have joined before it did."""
        self._num_steps += 1
        self.changed()
        firsts = {sequence.request_id: sequence for sequence in self._firsts_now()}
        self._firsts = {
            request_id: self._firsts.get(request_id) or _First(sequence, self._num_steps)
            for request_id, sequence in firsts.items()
        }
        aged = sorted(filter(self._is_aged, self._firsts.values()), key=lambda first: first.since)
        self._aged = [first.sequence for first in aged]

    def _firsts_now(self) -> Iterable[Sequence]:
        firsts: dict[Owner, Sequence] = {}
        for sequence in self.sequences:
            if sequence.owner not in firsts and self._could_run(sequence.digest):
                firsts[sequence.owner] = sequence
        return firsts.values()

    def _could_run(self, digest: str | None) -> bool:
        return digest is None or digest in self._at_hand or self._slots.holds(digest)

    def _ranks_now(self) -> dict[Owner, _Rank]:
        if self._ranks is None:
            services = {owner: self._counters[owner] for owner in self._num_waiting}
            least = min(services.values(), default=0)
            served = self._places.served()
            self._ranks = {
                owner: _Rank(owner in served, (service - least) // GROUPING_TOKENS, service)
                for owner, service in services.items()
            }
        return self._ranks

    def _is_aged(self, first: _First) -> bool:
        passed_since = self._num_steps if first.passed_since is None else first.passed_since
        return (
            self._num_steps - passed_since > self._max_wait_steps
            or self._num_steps - first.since > STARVED_WAITS * self._max_wait_steps
        )


def _fair_key(sequence: Sequence, ranks: Mapping[Owner, _Rank]) -> tuple[bool, int, int]:
    has_share, _, service = ranks[sequence.owner]
    return has_share, service, sequence.arrival


def _key(sequence: Sequence, rank: _Rank, ready: Collection[str | None]) -> tuple[bool, int, bool, int, int]:
    """The fair order, but for those who are ready among owners served nearly alike."""
    return rank.has_share, rank.group, sequence.digest not in ready, rank.service, sequence.arrival
