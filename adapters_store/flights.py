"""Adapters on their way up a machine's tiers."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import NamedTuple

from tunefleet.adapters_store.failures import load_failed
from tunefleet.core import AdapterRef, PinTier


class Fetched(NamedTuple):
    """A copy in the tier that was asked for, and what it took to have it; zeros if it was there."""

    path: Path
    download_s: float
    load_s: float


class FlightAbandoned(Exception):
    """Nobody wants what this flight brings."""


class Flight:
    """One adapter's way up to ``tier``, from the objects of one ``ref``; there is one per digest.

    ``landed`` is what those who wait look at. An abandoned flight has landed for them; what it still does
    concerns nobody, and it touches no books any more.
    """

    def __init__(self, ref: AdapterRef, tier: PinTier) -> None:
        self.ref = ref
        self.tier: PinTier = tier
        self.landed: asyncio.Future[Fetched] = asyncio.get_running_loop().create_future()
        self.is_abandoned = False

    def land(self, result: Fetched | Exception) -> None:
        if self.is_abandoned:
            return
        if isinstance(result, Fetched):
            self.landed.set_result(result)
        else:
            self._fail(result)

    def abandon(self) -> None:
        """The adapter was deleted: whatever arrives is dropped."""
        self._fail(
            load_failed(f"adapter {self.ref.digest[:12]} was deleted", "adapter_deleted", for_good=True)
        )
        self.is_abandoned = True

    def check(self) -> None:
        """Raises FlightAbandoned if it was."""
        if self.is_abandoned:
            raise FlightAbandoned

    def _fail(self, error: Exception) -> None:
        self.landed.set_exception(error)
        self.landed.exception()  # seen: perhaps nobody waits any more
