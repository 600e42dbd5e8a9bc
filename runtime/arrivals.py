"""When requests are likely, by the hour of the day. Pure: times come in as arguments, in unix seconds.

Where a replica would be asked for again and again within an hour, it is better there before the hour begins.
Requests of an hour are taken for a Poisson process, so that one meets zero replicas with probability
``exp(-rate * idle_timeout_s)``. Days back count less and less.
"""

from __future__ import annotations

from typing import NamedTuple

HOUR_S = 3600.0
NUM_HOURS = 24
DECAY = 0.8  # of what an hour of the day has seen, each day: three days back count half
LEAST_SEEN_S = HOUR_S / 2  # of an hour of the day, before it is believed
LEAST_ARRIVALS = 0.5  # expected within idle_timeout_s: 6 of 10 requests would find no replica
FORGET_S = 14 * NUM_HOURS * HOUR_S


class Hour(NamedTuple):
    """One hour of the day, over the days."""

    num_arrivals: float = 0.0
    seen_s: float = 0.0  # time that was looked at

    @property
    def rate(self) -> float:
        """Requests per second; 0 while too little of the hour was seen."""
        return self.num_arrivals / self.seen_s if self.seen_s >= LEAST_SEEN_S else 0.0


class Forecast(NamedTuple):
    """At least so many replicas, and when to ask again."""

    least: int
    ask_again_at: float


class Arrivals:
    """What one host process has seen of the days.

    Args:
        now: from here on it looks.
        hours: what was seen before, ``NUM_HOURS`` of them.
    """

    def __init__(self, now: float, hours: tuple[Hour, ...] = (Hour(),) * NUM_HOURS) -> None:
        self._hours = list(hours)
        self._now = now

    @property
    def hours(self) -> tuple[Hour, ...]:
        return tuple(self._hours)

    def arrived(self, now: float, count: int = 1) -> None:
        self.advance(now)
        hour = self._hours[hour_of(now)]
        self._hours[hour_of(now)] = hour._replace(num_arrivals=hour.num_arrivals + count)

    def advance(self, now: float) -> None:
        """Time has passed, with or without requests."""
        if now - self._now > FORGET_S:  # nobody was here for weeks
            self._hours = [Hour()] * NUM_HOURS
            self._now = now
        while self._now < now:
            end = min(now, _next_hour(self._now))
            hour = self._hours[hour_of(self._now)]
            self._hours[hour_of(self._now)] = hour._replace(seen_s=hour.seen_s + end - self._now)
            self._now = end
            if end == _next_hour(end - 1.0):  # the hour that begins now was last seen a day ago
                begun = self._hours[hour_of(end)]
                self._hours[hour_of(end)] = Hour(begun.num_arrivals * DECAY, begun.seen_s * DECAY)

    def forecast(self, now: float, *, idle_timeout_s: float, lead_s: float) -> Forecast:
        """One replica while requests are likely enough, and ``lead_s`` before that.

        Args:
            lead_s: what a start takes, with all that belongs to it.
        """
        begins = _next_hour(now)
        is_likely = self._is_likely(now, idle_timeout_s)
        will_be = self._is_likely(begins, idle_timeout_s)
        if is_likely or (will_be and now >= begins - lead_s):
            return Forecast(1, begins)
        return Forecast(0, begins - lead_s if will_be else begins)

    def _is_likely(self, at: float, idle_timeout_s: float) -> bool:
        return self._hours[hour_of(at)].rate * idle_timeout_s >= LEAST_ARRIVALS


def hour_of(at: float) -> int:
    """Of the day, in UTC: which hour it is called doesn't matter."""
    return int(at // HOUR_S) % NUM_HOURS


def _next_hour(at: float) -> float:
    return (at // HOUR_S + 1) * HOUR_S
