"""Whose sequences have the places of the batch. Pure accounting: no torch, no clock, no I/O."""

from __future__ import annotations

from collections import Counter

from tunefleet.runtime.fairness import Owner, ServiceCounters
from tunefleet.runtime.sequence import Sequence

MIN_PROGRESS = 16  # tokens between two preemptions for the sake of others' shares


class Places:
    """Running sequences, at most ``max_places``, in the order in which they joined.

    An owner's share is an equal part of the places, one at least. Who has less than its share needs not wait
    for somebody who has more.
    """

    def __init__(self, max_places: int, counters: ServiceCounters) -> None:
        self.running: list[Sequence] = []
        self.max_places = max_places
        self._counters = counters
        self._num_running: Counter[Owner] = Counter()

    @property
    def num_free(self) -> int:
        return self.max_places - len(self.running)

    @property
    def share(self) -> int:
        """Places for each owner that has sequences."""
        return max(1, self.max_places // max(1, self._counters.num_active))

    def served(self) -> set[Owner]:
        """Owners that run their share, or more."""
        share = self.share
        return {owner for owner, num_running in self._num_running.items() if num_running >= share}

    def overserved(self) -> set[Owner]:
        """Owners that run more than their share."""
        share = self.share
        return {owner for owner, num_running in self._num_running.items() if num_running > share}

    def take(self, sequence: Sequence) -> None:
        self.running.append(sequence)
        self._num_running[sequence.owner] += 1

    def give_back(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._num_running[sequence.owner] -= 1
        if not self._num_running[sequence.owner]:
            del self._num_running[sequence.owner]

    def victim_for(self, owner: Owner) -> Sequence | None:
        """Who gives its place to an owner that has less than its share: the biggest owner's youngest.

        Nobody who was preempted and has made little progress since, so that two don't take turns at it.
        """
        if self._num_running[owner] >= self.share:
            return None
        overserved = self.overserved()
        return max(
            (
                sequence
                for sequence in self.running
                if sequence.owner in overserved and _made_progress(sequence)
            ),
            key=lambda sequence: (self._num_running[sequence.owner], sequence.arrival),
            default=None,
        )

    def youngest(self) -> Sequence:
        return max(self.running, key=lambda sequence: sequence.arrival)

    def check(self) -> None:
        """Asserts that no more run than there are places for, and that each is counted."""
        assert self.num_free >= 0, "more run than there are places"
        assert Counter(sequence.owner for sequence in self.running) == self._num_running


def _made_progress(sequence: Sequence) -> bool:
    """Since it was preempted last."""
    return not sequence.num_preemptions or len(sequence.tokens) - sequence.preempted_at >= MIN_PROGRESS
