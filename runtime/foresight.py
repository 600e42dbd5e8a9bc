"""What a host process expects: when a replica will be needed, and whose adapters first.

Numbers per hour of the day survive the process, in a file of its state folder. Adapters don't: a file would
have to forget who is deleted.
"""

from __future__ import annotations

import collections
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from tunefleet.core import AdapterRef
from tunefleet.runtime.arrivals import NUM_HOURS, Arrivals, Forecast, Hour, hour_of

FILE = "arrivals.json"
LEAD_S = (
    30.0  # before an hour in which a replica is likely to be needed: a start, and adapters from the store
)
MAX_ADAPTERS = 64  # brought up ahead of an hour

log = logging.getLogger("tunefleet.host")


class Foresight:
    """Lives as long as its supervisor, which tells it what comes.

    Args:
        clock: unix seconds.
    """

    def __init__(
        self, folder: Path, *, idle_timeout_s: float, clock: Callable[[], float] = time.time
    ) -> None:
        self._file = folder / FILE
        self._idle_timeout_s = idle_timeout_s
        self._clock = clock
        self._arrivals = Arrivals(clock(), _read(self._file))
        self._adapters: list[collections.Counter[AdapterRef]] = [
            collections.Counter() for _ in range(NUM_HOURS)
        ]
        self._was_likely = False

    def arrived(self, count: int) -> None:
        if count > 0:
            self._arrivals.arrived(self._clock(), count)

    def asked_for(self, ref: AdapterRef) -> None:
        """A replica has no slot with this adapter, and somebody who waits for it."""
        self._adapters[hour_of(self._clock())][ref] += 1

    def forget(self, digest: str) -> None:
        for adapters in self._adapters:
            for ref in [ref for ref in adapters if ref.digest == digest]:
                del adapters[ref]

    def forecast(self) -> Forecast:
        """At least so many replicas now; ``ask_again_at`` is seconds from now."""
        now = self._clock()
        self._arrivals.advance(now)
        found = self._arrivals.forecast(now, idle_timeout_s=self._idle_timeout_s, lead_s=LEAD_S)
        return found._replace(ask_again_at=found.ask_again_at - now)

    def newly_likely(self, forecast: Forecast) -> list[AdapterRef]:
        """When a replica begins to be likely: the adapters that such an hour asked for most, those first."""
        begins, self._was_likely = forecast.least > 0 and not self._was_likely, forecast.least > 0
        if not begins:
            return []
        hour = self._adapters[hour_of(self._clock() + LEAD_S)]
        return [ref for ref, _ in hour.most_common(MAX_ADAPTERS)]

    def save(self) -> None:
        """Keeps the hours for the next process; without them it learns anew."""
        written = self._file.with_suffix(".new")
        try:
            written.write_bytes(msgspec.json.encode(self._arrivals.hours))
            os.replace(written, self._file)
        except OSError as error:
            log.warning("what was learned of the hours of the day is not kept: %s", error)


def _read(file: Path) -> tuple[Hour, ...]:
    try:
        hours = msgspec.json.decode(file.read_bytes(), type=list[Hour])
    except (OSError, msgspec.DecodeError):
        hours = []
    return tuple(hours) if len(hours) == NUM_HOURS else (Hour(),) * NUM_HOURS
