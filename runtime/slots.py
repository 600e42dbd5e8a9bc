"""Which adapter is in which slot. Pure accounting: no torch, no clock, no I/O.

One arena of pages holds all slots; a page is a slot of rank 8. Rank classes (8, 16, 32 ...) are views of it:
slot i of class R covers the pages i*R/8 to (i+1)*R/8. So a rank-4 adapter doesn't pay for rank 64, and what
one class doesn't need is there for the others.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Collection
from typing import NamedTuple

from tunefleet.adapters_store.slot_layout import SMALLEST_RANK_CLASS, rank_class_of
from tunefleet.errors import InvalidState


@dataclasses.dataclass(frozen=True, slots=True)
class Slot:
    """A place in the arena, as its rank class counts them."""

    rank_class: int
    index: int

    @property
    def num_pages(self) -> int:
        return self.rank_class // SMALLEST_RANK_CLASS

    @property
    def pages(self) -> range:
        return range(self.index * self.num_pages, (self.index + 1) * self.num_pages)


class Activation(NamedTuple):
    """A slot that is to be filled; who was evicted for it is gone already."""

    digest: str
    slot: Slot
    evicted: dict[str, Slot]  # digests, and the slots that they had


class SlotState(enum.Enum):
    FILLING = "filling"  # reserved; can't be used or evicted
    READY = "ready"  # holds its adapter


@dataclasses.dataclass
class _Resident:
    slot: Slot
    cost: float
    priority: float
    last_use: int
    state: SlotState = SlotState.FILLING
    num_pins: int = 0
    num_uses: int = 1


class SlotTable:
    """Adapters that are resident on a device.

    Who is evicted follows GreedyDual-Size-Frequency (Cherkasova, "Improving WWW Proxies Performance with
    Greedy-Dual-Size-Frequency Caching Policy", HP Labs 1998): a resident's priority is
    clock + uses * cost / size as of its last use, and the clock rises to the priority of who is evicted. So
    frequency, reload cost and recency all count.

    Args:
        max_slots: adapters at once, over all rank classes.
        num_pages: size of the arena, in slots of rank 8.
    """

    def __init__(self, max_slots: int, num_pages: int) -> None:
        self.max_slots = max_slots
        self.num_pages = num_pages
        self._residents: dict[str, _Resident] = {}
        self._clock = 0.0
        self._num_uses = 0

    @property
    def digests(self) -> tuple[str, ...]:
        """Adapters that are ready to be used."""
        return tuple(d for d, resident in self._residents.items() if resident.state is SlotState.READY)

    @property
    def used_pages(self) -> int:
        return sum(resident.slot.num_pages for resident in self._residents.values())

    def fits_ever(self, rank: int) -> bool:
        return rank_class_of(rank) // SMALLEST_RANK_CLASS <= self.num_pages

    def holds(self, digest: str) -> bool:
        """Whether it has a slot, ready or being filled."""
        return digest in self._residents

    def lookup(self, digest: str) -> Slot | None:
        """Its slot, once it is ready."""
        resident = self._residents.get(digest)
        return resident.slot if resident and resident.state is SlotState.READY else None

    def activate(
        self, digest: str, rank: int, *, cost: float = 1.0, kept: Collection[str] = ()
    ) -> Activation | None:
        """Reserves a slot for an adapter that has none: the lowest free one, else the cheapest to empty.

        Args:
            cost: of loading it again, in any unit that is the same for all.
            kept: digests that may not be evicted for it.

        Returns:
            None when every place that would do holds an adapter in use: the request waits.
        """
        if digest in self._residents:
            raise InvalidState(f"{digest[:12]} has a slot already")
        place = self._place(rank_class_of(rank), kept)
        if place is None:
            return None
        slot, victims = place
        for victim in victims:
            self._clock = max(self._clock, self._residents[victim].priority)
        evicted = {victim: self.deactivate(victim) for victim in victims}
        self._num_uses += 1
        self._residents[digest] = _Resident(slot, cost, 0.0, self._num_uses)
        self._appraise(self._residents[digest])
        return Activation(digest, slot, evicted)

    def in_the_way(self, rank: int) -> Collection[str]:
        """Who is in the place for a rank that comes free first, if nobody there is used again."""
        residents = self._residents
        if self._lowest_free(rank_class_of(rank)) is not None:
            groups = [[digest] for digest in residents]  # there is room, but one adapter too many
        else:
            groups = [inside for _, inside in self._taken_places(rank_class_of(rank))]
        return min(groups, key=lambda group: sum(residents[d].num_pins for d in group), default=())

    def ready(self, digest: str) -> None:
        """Its slot is filled."""
        resident = self._residents[digest]
        if resident.state is not SlotState.FILLING:
            raise InvalidState(f"{digest[:12]} is ready already")
        resident.state = SlotState.READY

    def deactivate(self, digest: str) -> Slot:
        resident = self._residents[digest]
        if resident.num_pins:
            raise InvalidState(f"{digest[:12]} is pinned by {resident.num_pins} sequences")
        return self._residents.pop(digest).slot

    def pin(self, digest: str) -> Slot:
        """A sequence uses the slot from now on: it can't be evicted, and counts as used once more."""
        resident = self._residents[digest]
        if resident.state is not SlotState.READY:
            raise InvalidState(f"{digest[:12]} is not ready")
        self._num_uses += 1
        resident.num_pins += 1
        resident.num_uses += 1
        resident.last_use = self._num_uses
        self._appraise(resident)
        return resident.slot

    def unpin(self, digest: str) -> None:
        resident = self._residents[digest]
        if not resident.num_pins:
            raise InvalidState(f"{digest[:12]} is not pinned")
        resident.num_pins -= 1

    def is_pinned(self, digest: str) -> bool:
        return digest in self._residents and self._residents[digest].num_pins > 0

    def check(self) -> None:
        """Asserts that no page is held twice and that the budgets hold."""
        pages = [page for resident in self._residents.values() for page in resident.slot.pages]
        assert len(set(pages)) == len(pages), "a page is held twice"
        assert all(page < self.num_pages for page in pages), "a slot reaches beyond the arena"
        assert len(self._residents) <= self.max_slots, "more adapters than slots"
        for resident in self._residents.values():
            assert resident.state is SlotState.READY or not resident.num_pins, "in use before it was filled"

    def _appraise(self, resident: _Resident) -> None:
        resident.priority = self._clock + resident.num_uses * resident.cost / resident.slot.num_pages

    def _place(self, rank_class: int, kept: Collection[str]) -> tuple[Slot, tuple[str, ...]] | None:
        """A slot of the class, and who has to go for it."""
        free = self._lowest_free(rank_class)
        if free is not None and len(self._residents) < self.max_slots:
            return free, ()
        loose = {d for d, resident in self._residents.items() if _is_loose(resident) and d not in kept}
        if free is not None:
            victim = min(loose, key=lambda digest: self._worth([digest]), default=None)
            return (
                None if victim is None else (self._lowest_free(rank_class, without=victim) or free, (victim,))
            )
        return self._cheapest(rank_class, loose)

    def _lowest_free(self, rank_class: int, *, without: str | None = None) -> Slot | None:
        slot = Slot(rank_class, 0)
        held = [resident.slot.pages for digest, resident in self._residents.items() if digest != without]
        for pages in sorted(held, key=lambda pages: pages.start):
            if pages.start >= slot.pages.stop:
                break
            slot = Slot(rank_class, max(slot.index, -(-pages.stop // slot.num_pages)))
        return slot if slot.pages.stop <= self.num_pages else None

    def _cheapest(self, rank_class: int, loose: Collection[str]) -> tuple[Slot, tuple[str, ...]] | None:
        """Of the places that hold only loose residents, the one whose residents are worth least."""
        places = [
            place for place in self._taken_places(rank_class) if all(digest in loose for digest in place[1])
        ]
        best = min(places, key=lambda place: (self._worth(place[1]), place[0].index), default=None)
        return None if best is None else (best[0], tuple(best[1]))

    def _taken_places(self, rank_class: int) -> list[tuple[Slot, list[str]]]:
        """Slots of the class that hold residents, and whom; of those within one resident only the first."""
        firsts = {resident.slot.pages.start for resident in self._residents.values()}
        slots = [
            Slot(rank_class, index)
            for index in sorted({first * SMALLEST_RANK_CLASS // rank_class for first in firsts})
        ]
        return [(slot, self._inside(slot)) for slot in slots if slot.pages.stop <= self.num_pages]

    def _inside(self, slot: Slot) -> list[str]:
        """Residents that share a page with the slot."""
        pages = slot.pages
        return [
            digest
            for digest, resident in self._residents.items()
            if resident.slot.pages.start < pages.stop and pages.start < resident.slot.pages.stop
        ]

    def _worth(self, digests: Collection[str]) -> tuple[float, int]:
        """Of residents together; of equal ones, the least recently used is worth least."""
        residents = [self._residents[digest] for digest in digests]
        return sum(resident.priority for resident in residents), max(r.last_use for r in residents)


def _is_loose(resident: _Resident) -> bool:
    return resident.state is SlotState.READY and not resident.num_pins
