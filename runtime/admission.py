"""Who is next. Pure: no torch, no clock, no I/O.

Who waits is served in the order of their owners' counters (``runtime.fairness``), then of arrival. Among
those whose counters are nearly equal, who has an adapter in a slot goes first, so that a fill holds up
nobody. Two bounds keep that from starving anyone: see ``WaitingLine.aged``.
"""

from __future__ import annotations

import bisect
from collections.abc import Collection

from tunefleet.runtime.fairness import Owner, ServiceCounters
from tunefleet.runtime.sequence import Sequence
from tunefleet.runtime.slots import SlotTable

GROUPING_TOKENS = 256  # of service; owners this close together count as served alike
STARVED_WAITS = 16  # times max_wait_steps: the bound for those who were not passed over out of turn


class WaitingLine:
    """Sequences that wait to join the batch.

    A step is one call of ``step``. Only the first sequence of an owner that could run, were there room for
    it (its adapter is in a slot, or its file at hand), grows older: an owner's others wait for their owner's
    own, and who waits for a download holds nobody back.

    Args:
        max_wait_steps: how long others may be let in ahead of who is first in the fair order.
    """

    def __init__(self, slots: SlotTable, counters: ServiceCounters, max_wait_steps: int) -> None:
        self.sequences: list[Sequence] = []  # by arrival
        self._slots = slots
        self._counters = counters
        self._max_wait_steps = max_wait_steps
        self._at_hand: Collection[str] = ()
        self._order: list[Sequence] | None = None  # until something changes it
        self._num_steps = 0
        self._first_since: dict[str, int] = {}  # request id of an owner's first -> step
        self._passed_since: dict[str, int] = {}  # the same, of those passed over
        self._last_joined: tuple[int, int] | None = None  # the latest in the fair order to join in this step
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
        self._order = None

    def remove(self, sequence: Sequence) -> None:
        for line in (self.sequences, self._order, self._aged):
            if line and sequence in line:
                line.remove(sequence)

    def join(self, sequence: Sequence) -> None:
        """It joins; whoever it passes over will grow older, unless it was its turn after a long wait."""
        if sequence not in self._aged:
            key = self._fair_key(sequence)
            self._last_joined = max(self._last_joined or key, key)
        self.remove(sequence)

    def files_at_hand(self, digests: Collection[str]) -> None:
        """Adapters that only lack a slot."""
        self._at_hand = frozenset(digests)

    def slots_changed(self) -> None:
        self._order = None

    def order(self) -> list[Sequence]:
        """Who would be let in, first to last."""
        if self._order is None:
            least = min((self._counters[sequence.owner] for sequence in self.sequences), default=0)
            others = [sequence for sequence in self.sequences if sequence not in self._aged]
            others.sort(key=lambda sequence: self._key(sequence, least))
            self._order = [*self._aged, *others]
        return self._order

    def step(self, overserved: Collection[Owner]) -> None:
        """A step begins, and those who could have joined before it did.

        Args:
            overserved: owners that run more than their share; nobody passes them over out of turn.
        """
        self._num_steps += 1
        self._order = None
        firsts = self._firsts()
        self._first_since = {
            s.request_id: self._first_since.get(s.request_id, self._num_steps) for s in firsts
        }
        self._passed_since = {
            s.request_id: self._passed_since.get(s.request_id, self._num_steps)
            for s in firsts
            if s.request_id in self._passed_since or (s.owner not in overserved and self._is_passed(s))
        }
        self._last_joined = None
        self._aged = sorted(
            filter(self._is_aged, firsts), key=lambda s: (self._first_since[s.request_id], s.arrival)
        )

    def _firsts(self) -> list[Sequence]:
        """Of each owner, the first that only lacks room."""
        firsts: dict[Owner, Sequence] = {}
        for sequence in self.sequences:
            if sequence.owner not in firsts and self._could_run(sequence):
                firsts[sequence.owner] = sequence
        return list(firsts.values())

    def _could_run(self, sequence: Sequence) -> bool:
        digest = sequence.digest
        return digest is None or digest in self._at_hand or self._slots.holds(digest)

    def _is_passed(self, sequence: Sequence) -> bool:
        return self._last_joined is not None and self._fair_key(sequence) < self._last_joined

    def _is_aged(self, sequence: Sequence) -> bool:
        passed_since = self._passed_since.get(sequence.request_id, self._num_steps)
        waited = self._num_steps - self._first_since[sequence.request_id]
        return (
            self._num_steps - passed_since > self._max_wait_steps
            or waited > STARVED_WAITS * self._max_wait_steps
        )

    def _fair_key(self, sequence: Sequence) -> tuple[int, int]:
        return self._counters[sequence.owner], sequence.arrival

    def _key(self, sequence: Sequence, least: int) -> tuple[int, bool, int, int]:
        service, arrival = self._fair_key(sequence)
        is_ready = sequence.digest is None or self._slots.lookup(sequence.digest) is not None
        return (service - least) // GROUPING_TOKENS, not is_ready, service, arrival
