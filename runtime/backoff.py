"""When the next replica may be started. Pure: times come in as arguments."""

from __future__ import annotations

from collections import deque

DELAYS_S = (0.5, 1.0, 2.0, 5.0, 10.0)  # after start failures in a row
MAX_DEATHS = 10  # within DEATHS_WINDOW_S, for which nobody waits
DEATHS_WINDOW_S = 10.0


class Backoff:
    """Starts that fail wait longer and longer; replicas that die are replaced at once, but not endlessly.

    The second rule is a supervisor's restart intensity in Erlang/OTP: a replica that dies of its own, again
    and again, doesn't keep the machine busy with starting it.
    """

    def __init__(self, delays_s: tuple[float, ...] = DELAYS_S) -> None:
        self._delays_s = delays_s
        self._num_failures = 0
        self._was_killed = False
        self._retry_at = 0.0
        self._deaths: deque[float] = deque(maxlen=MAX_DEATHS)

    @property
    def is_failing(self) -> bool:
        """The last start failed: who asks for a replica is better told so than held."""
        return self._num_failures > 0

    def wait_s(self, now: float) -> float:
        """Seconds until the next start may be tried."""
        return max(0.0, self._retry_at - now)

    def start_failed(self, now: float) -> None:
        self._retry_at = now + self._delays_s[min(self._num_failures, len(self._delays_s) - 1)]
        self._num_failures += 1

    def start_killed(self, now: float) -> None:
        """From outside, for its memory maybe: once is an accident, twice in a row is a failure."""
        if self._was_killed:
            self.start_failed(now)
        else:
            self._was_killed = True
            self.died(now)

    def started(self) -> None:
        """A replica is READY."""
        self._num_failures = 0
        self._was_killed = False

    def died(self, now: float) -> None:
        """A replica ended that was no failed start."""
        self._deaths.append(now)
        if len(self._deaths) == MAX_DEATHS:
            self._retry_at = max(self._retry_at, self._deaths[0] + DEATHS_WINDOW_S)
