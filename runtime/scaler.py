"""How many replicas there should be. Pure: loads and times come in as arguments.

Up at once, down late. As many stay as were needed at any moment of the last ``scale_down_delay_s``: the
stabilization window of Kubernetes' HorizontalPodAutoscaler
(https://kubernetes.io/docs/tasks/run-application/horizontal-pod-autoscale/#stabilization-window). Zero has a
delay of its own, as in Ray Serve (``downscale_to_zero_delay_s``): who comes next pays for a start.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class Limits(NamedTuple):
    """What people set."""

    min_replicas: int
    max_replicas: int
    target_concurrency: int  # requests per replica
    idle_timeout_s: float  # without any request, before the last replica goes
    scale_down_delay_s: float  # fewer must have been enough for so long


class Load(NamedTuple):
    """What there is now."""

    num_requests: int  # running and waiting on replicas, and held for one
    num_replicas: int  # READY and STARTING


class Peak(NamedTuple):
    """So many replicas were needed until then, and never as many since."""

    needed: int
    until: float


class ScalerState(NamedTuple):
    """What is remembered from one decision to the next; at most a peak per replica."""

    needed: int = 0  # for the last load, which lasts until the next one is told
    peaks: tuple[Peak, ...] = ()  # within the delay; the oldest is the highest
    busy_until: float = -math.inf  # when there was last a request


class Decision(NamedTuple):
    state: ScalerState
    wanted: int  # replicas
    ask_again_at: float | None  # fewer may do then, if nothing changes until then


def decide(state: ScalerState, load: Load, now: float, limits: Limits) -> Decision:
    """How many replicas to have from ``now`` on.

    More only because of the requests there are: one that is gone isn't replaced for the sake of the past.
    """
    needed = min(-(-load.num_requests // limits.target_concurrency), limits.max_replicas)
    state = _observed(state, needed, now, limits.scale_down_delay_s)
    least = max(needed, limits.min_replicas)
    wanted = min(max(least, min(load.num_replicas, _kept(state, now, limits))), limits.max_replicas)
    return Decision(state, wanted, _next_drop(state, limits) if wanted > least else None)


def _observed(state: ScalerState, needed: int, now: float, delay_s: float) -> ScalerState:
    """The last load lasted until now, and this one begins."""
    peaks = (*state.peaks, Peak(state.needed, now))
    recent = tuple(peak for peak in peaks if peak.needed > needed and peak.until + delay_s > now)
    return ScalerState(needed, recent, now if needed or state.needed else state.busy_until)


def _kept(state: ScalerState, now: float, limits: Limits) -> int:
    """As many as may have to stay."""
    if not state.needed and now >= state.busy_until + limits.idle_timeout_s:
        return 0
    return max(1, state.needed, *(peak.needed for peak in state.peaks[:1]))


def _next_drop(state: ScalerState, limits: Limits) -> float:
    times = [peak.until + limits.scale_down_delay_s for peak in state.peaks[:1]]
    if not state.needed:
        times.append(state.busy_until + limits.idle_timeout_s)
    return min(times)
