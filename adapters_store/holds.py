"""Which adapters are held, by whom, down to which tier. Books only."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence

from tunefleet.core import AdapterRef, PinTier
from tunefleet.messages import HeldAdapter

MAX_SHARE = 0.75  # of a tier's bytes: the rest is left to those who aren't held

log = logging.getLogger("tunefleet.tiers")


class Holds:
    """The union over the holders; the longest held come first where bytes are short.

    What is beyond ``MAX_SHARE`` of a tier is refused, and said so in the log, until others leave.

    Args:
        disk_bytes, host_bytes: budgets of the tiers.
        prepared_bytes: of an adapter's prepared file, at most.
    """

    def __init__(
        self, *, disk_bytes: int, host_bytes: int, prepared_bytes: Callable[[AdapterRef], int]
    ) -> None:
        self._max_disk = int(disk_bytes * MAX_SHARE)
        self._max_host = int(host_bytes * MAX_SHARE)
        self._prepared_bytes = prepared_bytes
        self._by_holder: dict[Hashable, tuple[HeldAdapter, ...]] = {}
        self._tiers: dict[str, PinTier] = {}  # what is granted, the longest held first
        self._refused: dict[str, PinTier] = {}

    def tier(self, digest: str) -> PinTier | None:
        """Down to where an adapter is held."""
        return self._tiers.get(digest)

    def granted(self) -> list[HeldAdapter]:
        """Every ref of each held adapter, with its tier: where one's objects fail, another's may do."""
        refs: dict[tuple[str, str], AdapterRef] = {}
        for adapters in self._by_holder.values():
            refs.update(((held.adapter.digest, held.adapter.key), held.adapter) for held in adapters)
        return [
            HeldAdapter(ref, self._tiers[digest])
            for (digest, _), ref in refs.items()
            if digest in self._tiers
        ]

    def hold(self, holder: Hashable, adapters: Sequence[HeldAdapter]) -> None:
        """Replaces what a holder holds; nothing: it holds no more."""
        self._by_holder[holder] = tuple(adapters)
        if not adapters:
            del self._by_holder[holder]
        self._grant()

    def forget(self, digest: str) -> None:
        """Takes an adapter from all holders."""
        if digest in self._tiers or digest in self._refused:
            for holder, adapters in list(self._by_holder.items()):
                self.hold(holder, [held for held in adapters if held.adapter.digest != digest])

    def _grant(self) -> None:
        wanted: dict[str, HeldAdapter] = {}
        for adapters in self._by_holder.values():
            for held in adapters:
                if held.tier == "host" or held.adapter.digest not in wanted:
                    wanted[held.adapter.digest] = held
        longest = [digest for digest in self._tiers if digest in wanted]
        tiers: dict[str, PinTier] = {}
        refused: dict[str, PinTier] = {}
        disk_left, host_left = self._max_disk, self._max_host
        for digest in dict.fromkeys([*longest, *wanted]):
            ref, tier = wanted[digest].adapter, wanted[digest].tier
            if ref.size_bytes > disk_left:
                refused[digest] = "disk"
                continue
            tiers[digest] = "disk"
            disk_left -= ref.size_bytes
            size = self._prepared_bytes(ref)
            if tier == "host" and size > host_left:
                refused[digest] = "host"
            elif tier == "host":
                tiers[digest] = "host"
                host_left -= size
        self._tell(refused)
        self._tiers, self._refused = tiers, refused

    def _tell(self, refused: dict[str, PinTier]) -> None:
        for digest, tier in refused.items():
            if self._refused.get(digest) != tier:
                log.warning(
                    "adapter %s is not held: pins take %d %% of %s_cache_bytes; raise it, or unpin others",
                    digest[:12],
                    MAX_SHARE * 100,
                    tier,
                )
