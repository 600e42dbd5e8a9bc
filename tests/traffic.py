"""Requests over time, and a simulation of what a scaling policy makes of them. Pure: no clock, no processes.

Traffic is seeded, so that policies can be compared on the same requests: how many of them met a cold start,
against the replica-seconds that this cost.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from tunefleet.runtime.scaler import Limits, Load, ScalerState, decide


class Arrival(NamedTuple):
    at: float
    service_s: float  # on a replica


class Answer(NamedTuple):
    wanted: int  # replicas
    ask_again_at: float | None


class Policy(Protocol):
    """What decides how many replicas there are. A predictive one learns from ``arrived``."""

    def arrived(self, now: float) -> None: ...

    def decide(self, load: Load, now: float) -> Answer: ...


class Reactive:
    """As the supervisor does it: by the requests there are."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._state = ScalerState()

    def arrived(self, now: float) -> None: ...

    def decide(self, load: Load, now: float) -> Answer:
        self._state, wanted, ask_again_at = decide(self._state, load, now, self._limits)
        return Answer(wanted, ask_again_at)


class Moment(NamedTuple):
    """What was decided upon one event."""

    at: float
    num_requests: int  # the scaler's load
    num_before: int  # replicas, READY or STARTING
    num_after: int  # as many as wanted, but that those which start can't be stopped
    wanted: int


class Report(NamedTuple):
    """What a policy made of the traffic."""

    num_requests: int
    num_cold: int  # that came when no replica was READY
    waits: tuple[float, ...]  # seconds until a replica took it, in order of arrival
    replica_s: float  # from each start to its end, draining included
    num_starts: int
    moments: tuple[Moment, ...]

    @property
    def cold_share(self) -> float:
        return self.num_cold / max(1, self.num_requests)


class _Replica:
    def __init__(self, started_at: float) -> None:
        self.started_at = started_at
        self.num_running = 0
        self.ready = False
        self.draining = False


class Simulation:
    """Replicas that start, serve ``target_concurrency`` requests each, drain and end.

    Args:
        start_s: from the decision to start a replica until it is READY.
    """

    def __init__(self, policy: Policy, *, target_concurrency: int, start_s: float) -> None:
        self._policy = policy
        self._target_concurrency = target_concurrency
        self._start_s = start_s
        self._now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._live: list[_Replica] = []
        self._held: deque[Arrival] = deque()
        self._ask_at: float | None = None
        self._num_cold = self._num_starts = 0
        self._replica_s = 0.0
        self._waits: list[float] = []
        self._moments: list[Moment] = []

    def run(self, arrivals: Sequence[Arrival], until: float = 0.0) -> Report:
        """From time 0 until nothing more happens, or ``until`` if that is later."""
        self._scale()
        for arrival in arrivals:
            self._at(arrival.at, lambda arrival=arrival: self._arrive(arrival))  # type: ignore[misc]
        while self._events:
            self._now, _, event = heapq.heappop(self._events)
            event()
            self._scale()
        end = max(self._now, until)
        kept_s = sum(end - replica.started_at for replica in self._live)
        return Report(
            num_requests=len(arrivals),
            num_cold=self._num_cold,
            waits=tuple(self._waits),
            replica_s=self._replica_s + kept_s,
            num_starts=self._num_starts,
            moments=tuple(self._moments),
        )

    def _at(self, time: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (time, next(self._order), event))

    def _scale(self) -> None:
        num_before = len(self._live)
        num_requests = len(self._held) + sum(replica.num_running for replica in self._live)
        wanted, ask_again_at = self._policy.decide(Load(num_requests, num_before), self._now)
        for _ in range(wanted - num_before):
            self._start()
        ready = [replica for replica in reversed(self._live) if replica.ready]
        for replica in sorted(ready, key=lambda replica: replica.num_running)[: max(0, num_before - wanted)]:
            self._drain(replica)
        self._moments.append(Moment(self._now, num_requests, num_before, len(self._live), wanted))
        if ask_again_at is not None and ask_again_at != self._ask_at:
            self._at(ask_again_at, lambda: None)
        self._ask_at = ask_again_at

    def _start(self) -> None:
        replica = _Replica(self._now)
        self._num_starts += 1
        self._live.append(replica)
        self._at(self._now + self._start_s, lambda: self._become_ready(replica))

    def _become_ready(self, replica: _Replica) -> None:
        replica.ready = True
        self._serve()

    def _drain(self, replica: _Replica) -> None:
        self._live.remove(replica)
        replica.draining = True
        self._end_if_done(replica)

    def _end_if_done(self, replica: _Replica) -> None:
        if replica.draining and not replica.num_running:
            self._replica_s += self._now - replica.started_at

    def _arrive(self, arrival: Arrival) -> None:
        self._policy.arrived(self._now)
        self._num_cold += not any(replica.ready for replica in self._live)
        self._held.append(arrival)
        self._serve()

    def _serve(self) -> None:
        """The oldest ones go to the least loaded replicas, as long as there is room."""
        while self._held:
            free = [r for r in self._live if r.ready and r.num_running < self._target_concurrency]
            if not free:
                return
            replica = min(free, key=lambda replica: replica.num_running)
            arrival = self._held.popleft()
            self._waits.append(self._now - arrival.at)
            replica.num_running += 1
            self._at(self._now + arrival.service_s, lambda replica=replica: self._finish(replica))  # type: ignore[misc]

    def _finish(self, replica: _Replica) -> None:
        replica.num_running -= 1
        self._end_if_done(replica)
        self._serve()


def poisson(
    generator: random.Random,
    rate: Callable[[float], float],
    *,
    most: float,
    until: float,
    service_s: float,
) -> list[Arrival]:
    """A Poisson process whose rate changes, by thinning one of the rate ``most``; exponential services."""
    arrivals = []
    now = 0.0
    while (now := now + generator.expovariate(most)) < until:
        if generator.random() * most < rate(now):
            arrivals.append(Arrival(now, generator.expovariate(1 / service_s)))
    return arrivals


def steady(generator: random.Random) -> list[Arrival]:
    rate = generator.uniform(0.05, 8.0)
    return poisson(generator, lambda _: rate, most=rate, until=60.0, service_s=generator.uniform(0.1, 4.0))


def sine(generator: random.Random) -> list[Arrival]:
    """Days and nights."""
    most, period = generator.uniform(0.5, 12.0), generator.uniform(10.0, 40.0)
    return poisson(
        generator,
        lambda now: most / 2 * (1 - math.cos(2 * math.pi * now / period)),
        most=most,
        until=2 * period,
        service_s=generator.uniform(0.1, 2.0),
    )


def bursts(generator: random.Random) -> list[Arrival]:
    """Many at the same moment, now and then."""
    arrivals = []
    now = 0.0
    for _ in range(generator.randint(1, 6)):
        now += generator.uniform(0.0, 40.0)
        size = generator.choice([1, 10, 100])
        arrivals += [Arrival(now, generator.uniform(0.01, 3.0)) for _ in range(size)]
    return arrivals


def spikes(generator: random.Random) -> list[Arrival]:
    """Single requests on an idle system, some right when it gives up waiting for them."""
    gaps = [generator.choice([0.2, 9.99, 10.0, 10.01, 10.2, 60.0]) for _ in range(generator.randint(1, 12))]
    return [Arrival(at, 0.1) for at in itertools.accumulate(gaps)]


def mixed(generator: random.Random) -> list[Arrival]:
    return sorted([*steady(generator), *bursts(generator), *sine(generator)])


TRAFFIC: dict[str, Callable[[random.Random], list[Arrival]]] = {
    kind.__name__: kind for kind in (steady, sine, bursts, spikes, mixed)
}
