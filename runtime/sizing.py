"""How many replicas a host process is to have: for the load there is, and for what is expected."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tunefleet.core import AdapterRef
from tunefleet.messages import HostOptions
from tunefleet.runtime.foresight import Foresight
from tunefleet.runtime.scaler import Limits, Load, ScalerState, decide


class Size(NamedTuple):
    """What is wanted now."""

    num_replicas: int
    ask_again_at: float | None  # fewer may do then, if nothing changes until then
    look_again_at: float | None  # something else may be expected then
    likely: list[AdapterRef]  # a replica begins to be likely, and these with it


class Sizing:
    """Remembers the load and, if ``predictive``, the hours of the day; lives as long as its supervisor."""

    def __init__(self, options: HostOptions) -> None:
        self._limits = Limits(
            min_replicas=options.min_replicas,
            max_replicas=options.max_replicas,
            target_concurrency=options.target_concurrency,
            idle_timeout_s=options.idle_timeout_s,
            scale_down_delay_s=options.scale_down_delay_s,
        )
        self._scaler = ScalerState()
        self._foresight = (
            Foresight(Path(options.state_dir), idle_timeout_s=options.idle_timeout_s)
            if options.predictive
            else None
        )

    def decide(self, load: Load, now: float) -> Size:
        """For the load there is at ``now``, in monotonic seconds."""
        limits, look_again_at, likely = self._limits, None, []
        if self._foresight is not None:
            forecast = self._foresight.forecast()
            likely = self._foresight.newly_likely(forecast)
            least = min(max(limits.min_replicas, forecast.least), limits.max_replicas)
            limits, look_again_at = limits._replace(min_replicas=least), now + forecast.ask_again_at
        self._scaler, wanted, ask_again_at = decide(self._scaler, load, now, limits)
        return Size(wanted, ask_again_at, look_again_at, likely)

    def arrived(self, count: int) -> None:
        """So many requests came to a replica."""
        if self._foresight is not None:
            self._foresight.arrived(count)

    def asked_for(self, ref: AdapterRef) -> None:
        """A replica needs this adapter."""
        if self._foresight is not None:
            self._foresight.asked_for(ref)

    def forget(self, digest: str) -> None:
        """An adapter was deleted: it is expected no more."""
        if self._foresight is not None:
            self._foresight.forget(digest)

    def save(self) -> None:
        """Keeps what was learned for the next host process."""
        if self._foresight is not None:
            self._foresight.save()
