"""Which adapter is in which slot. Pure accounting: no torch, no clock, no I/O.

Slots come in rank classes, so that a rank-4 adapter doesn't pay for rank 64; the budget is bytes over all
classes.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

from tunefleet.errors import InvalidState

SMALLEST_RANK_CLASS = 8


def rank_class_of(rank: int) -> int:
    """The smallest power of two >= ``rank`` (at least 8): the padded rank of its slot."""
    return max(SMALLEST_RANK_CLASS, 1 << (rank - 1).bit_length())


@dataclasses.dataclass(frozen=True, slots=True)
class Slot:
    """A place in the stacked tensors of one rank class."""

    rank_class: int
    index: int


class Activation(NamedTuple):
    """What to do to make an adapter resident: empty the evicted slots, fill this one."""

    slot: Slot
    evicted: tuple[Slot, ...]


@dataclasses.dataclass
class _Resident:
    slot: Slot
    num_pins: int = 0


class SlotTable:
    """Adapters that are resident on a device, least recently used first.

    Args:
        max_slots: adapters at once, over all rank classes.
        max_bytes: device memory for them.
        slot_bytes: bytes of one slot of a rank class.
    """

    def __init__(self, max_slots: int, max_bytes: int, slot_bytes: Callable[[int], int]) -> None:
        self._max_slots = max_slots
        self._max_bytes = max_bytes
        self._slot_bytes = slot_bytes
        self._residents: OrderedDict[str, _Resident] = OrderedDict()
        self._free: dict[int, list[int]] = {}  # rank class -> freed indexes, reused lowest first
        self._num_indexes: dict[int, int] = {}  # rank class -> indexes ever handed out

    @property
    def digests(self) -> tuple[str, ...]:
        return tuple(self._residents)

    @property
    def used_bytes(self) -> int:
        return sum(self._slot_bytes(resident.slot.rank_class) for resident in self._residents.values())

    def fits_ever(self, rank: int) -> bool:
        return self._slot_bytes(rank_class_of(rank)) <= self._max_bytes

    def lookup(self, digest: str) -> Slot | None:
        resident = self._residents.get(digest)
        return resident.slot if resident else None

    def activate(self, digest: str, rank: int) -> Activation | None:
        """A slot for an adapter that has none, evicting the least recently used unpinned ones.

        Returns:
            None when every slot that would have to go is pinned: the request waits.
        """
        if digest in self._residents:
            raise InvalidState(f"{digest[:12]} has a slot already")
        rank_class = rank_class_of(rank)
        victims = self._victims(self._slot_bytes(rank_class))
        if victims is None:
            return None
        evicted = tuple(self.deactivate(victim) for victim in victims)
        slot = Slot(rank_class, self._take_index(rank_class))
        self._residents[digest] = _Resident(slot)
        return Activation(slot, evicted)

    def deactivate(self, digest: str) -> Slot:
        resident = self._residents[digest]
        if resident.num_pins:
            raise InvalidState(f"{digest[:12]} is pinned by {resident.num_pins} sequences")
        del self._residents[digest]
        self._free.setdefault(resident.slot.rank_class, []).append(resident.slot.index)
        return resident.slot

    def pin(self, digest: str) -> Slot:
        """A sequence uses the slot from now on: it can't be evicted, and counts as recently used."""
        resident = self._residents[digest]
        resident.num_pins += 1
        self._residents.move_to_end(digest)
        return resident.slot

    def unpin(self, digest: str) -> None:
        resident = self._residents[digest]
        if not resident.num_pins:
            raise InvalidState(f"{digest[:12]} is not pinned")
        resident.num_pins -= 1

    def is_pinned(self, digest: str) -> bool:
        return digest in self._residents and self._residents[digest].num_pins > 0

    def check(self) -> None:
        """Asserts that no slot is held twice and that the budgets hold."""
        slots = [resident.slot for resident in self._residents.values()]
        assert len(set(slots)) == len(slots), "a slot is held twice"
        assert len(slots) <= self._max_slots, "more adapters than slots"
        assert self.used_bytes <= self._max_bytes, "over the byte budget"
        for rank_class, handed_out in self._num_indexes.items():
            used = [slot.index for slot in slots if slot.rank_class == rank_class]
            assert sorted(used + self._free.get(rank_class, [])) == list(range(handed_out)), "an index leaked"

    def _victims(self, num_bytes: int) -> list[str] | None:
        """Residents to evict so that one more slot of ``num_bytes`` fits."""
        victims: list[str] = []
        num_slots = len(self._residents)
        used = self.used_bytes
        candidates = [digest for digest, resident in self._residents.items() if not resident.num_pins]
        for digest in candidates:
            if num_slots < self._max_slots and used + num_bytes <= self._max_bytes:
                break
            victims.append(digest)
            num_slots -= 1
            used -= self._slot_bytes(self._residents[digest].slot.rank_class)
        fits = num_slots < self._max_slots and used + num_bytes <= self._max_bytes
        return victims if fits else None

    def _take_index(self, rank_class: int) -> int:
        free = self._free.get(rank_class)
        if free:
            free.sort(reverse=True)
            return free.pop()
        index = self._num_indexes.get(rank_class, 0)
        self._num_indexes[rank_class] = index + 1
        return index
