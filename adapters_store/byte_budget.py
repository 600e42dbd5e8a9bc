"""Which copies stay when bytes are short: GreedyDual-Size. Books only: no files, no clock of its own.

A copy's priority is the book's age when it was last used, plus what it would cost to fetch it again per byte
that it takes: the lowest goes, and its priority becomes the age of the book. So of copies used about as
recently the large go first, many small ones stay for one large, and a copy that nobody uses any more goes
however small it is. Copies of one size go least recently used first. While there is room, the book ages with
the bytes that come: else all that came before the first eviction would be of one age, and the large among
them would go first whatever their use.

P. Cao and S. Irani, "Cost-Aware WWW Proxy Caching Algorithms", USENIX Symposium on Internet Technologies and
Systems, 1997.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import NamedTuple

from tunefleet.errors import InvalidState

FETCH_COST_BYTES = 4 * 1024 * 1024
"""What a fetch costs before its first byte, in bytes that could have come meanwhile.

A fetch is two requests to the store (the paper's second cost model, a fixed part and one by size): some 20 ms
each, at 100 MB/s. Were the cost of a fetch its bytes alone, size would not count; were it one per fetch, a
large adapter would hardly ever stay."""


class _Copy(NamedTuple):
    priority: float
    used: int  # a number that grows with every use: among equals the least recently used goes
    digest: str
    size: int


class ByteBudget:
    """Sizes of copies by digest, never more than ``max_bytes`` together."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._copies: dict[str, _Copy] = {}
        self._queue: list[_Copy] = []  # a heap; entries that are not in _copies are outdated
        self._used_bytes = 0
        self._age = 0.0
        self._has_evicted = False  # since the last add
        self._num_uses = 0

    def __contains__(self, digest: str) -> bool:
        return digest in self._copies

    def sizes(self) -> dict[str, int]:
        """By digest, the one that goes first at the front."""
        return {copy.digest: copy.size for copy in sorted(self._copies.values())}

    def size_of(self, digest: str) -> int | None:
        copy = self._copies.get(digest)
        return copy.size if copy else None

    def victims(self, size: int, is_busy: Callable[[str], bool]) -> list[str] | None:
        """Who must go so that ``size`` more bytes fit, in this order; None if that can't be."""
        missing = self._used_bytes + size - self.max_bytes
        chosen: list[str] = []
        seen: list[_Copy] = []
        while missing > 0 and self._queue:
            copy = heapq.heappop(self._queue)
            if self._copies.get(copy.digest) is not copy:
                continue
            seen.append(copy)
            if not is_busy(copy.digest):
                chosen.append(copy.digest)
                missing -= copy.size
        for copy in seen:
            heapq.heappush(self._queue, copy)
        return chosen if missing <= 0 else None

    def add(self, digest: str, size: int) -> None:
        """Books a copy, used now. The victims for it must be gone."""
        if digest in self._copies or self._used_bytes + size > self.max_bytes:
            raise InvalidState(f"{digest} can't be added: it is there, or doesn't fit")
        if not self._has_evicted:
            self._age += _worth(size) * size / self.max_bytes
        self._has_evicted = False
        self._used_bytes += size
        self._use(digest, size)

    def touch(self, digest: str) -> None:
        self._use(digest, self._copies[digest].size)

    def evict(self, digest: str) -> None:
        """Removes a victim: the book ages to its priority."""
        self._age = max(self._age, self._copies[digest].priority)
        self._has_evicted = True
        self.remove(digest)

    def remove(self, digest: str) -> None:
        """Removes a copy that went for another reason than room."""
        self._used_bytes -= self._copies.pop(digest).size

    def check(self) -> None:
        """Raises InvalidState unless the sum is right and within the budget, and every copy has its turn."""
        used = sum(copy.size for copy in self._copies.values())
        if self._used_bytes != used or used > self.max_bytes:
            raise InvalidState(f"{self._used_bytes} bytes are booked, of {self.max_bytes}")
        if not set(self._copies.values()) <= set(self._queue):
            raise InvalidState("a copy is missing in the queue")

    def _use(self, digest: str, size: int) -> None:
        self._num_uses += 1
        copy = _Copy(self._age + _worth(size), self._num_uses, digest, size)
        self._copies[digest] = copy
        heapq.heappush(self._queue, copy)
        if len(self._queue) > 2 * len(self._copies) + 16:
            self._queue = sorted(self._copies.values())


def _worth(size: int) -> float:
    """What fetching a copy costs, per byte that it takes."""
    return (FETCH_COST_BYTES + size) / max(size, 1)
