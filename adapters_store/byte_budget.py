"""Which copies stay when bytes are short: least recently used goes first. Books only: no files, no clock."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from tunefleet.errors import InvalidState


class ByteBudget:
    """Sizes of copies by digest, in order of use, never more than ``max_bytes`` together."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._used = 0

    def __contains__(self, digest: str) -> bool:
        return digest in self._sizes

    def sizes(self) -> dict[str, int]:
        return dict(self._sizes)

    def victims(self, size: int, is_busy: Callable[[str], bool]) -> list[str] | None:
        """Who must go so that ``size`` more bytes fit, least recently used first; None if that can't be."""
        missing = self._used + size - self.max_bytes
        chosen: list[str] = []
        for digest, held in self._sizes.items():
            if missing <= 0:
                break
            if not is_busy(digest):
                chosen.append(digest)
                missing -= held
        return chosen if missing <= 0 else None

    def add(self, digest: str, size: int) -> None:
        if digest in self._sizes or self._used + size > self.max_bytes:
            raise InvalidState(f"{digest} can't be added: it is there, or doesn't fit")
        self._sizes[digest] = size
        self._used += size

    def touch(self, digest: str) -> None:
        self._sizes.move_to_end(digest)

    def remove(self, digest: str) -> None:
        self._used -= self._sizes.pop(digest)

    def check(self) -> None:
        """Raises InvalidState unless the sum is right and within the budget."""
        if self._used != sum(self._sizes.values()) or self._used > self.max_bytes:
            raise InvalidState(f"{self._used} bytes are booked, of {self.max_bytes}")
