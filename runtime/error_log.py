"""The latest errors of a machine, for its status."""

from __future__ import annotations

import collections
import logging
import time
from collections.abc import Callable, Iterator

from tunefleet.core import LoggedError

MAX_ERRORS = 10

log = logging.getLogger("tunefleet.host")


class ErrorLog:
    """Lives as long as its host process, which writes to it; the log file has the older ones.

    Args:
        now: unix seconds.
    """

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._errors: collections.deque[LoggedError] = collections.deque(maxlen=MAX_ERRORS)

    def __iter__(self) -> Iterator[LoggedError]:
        """The last one last."""
        return iter(self._errors)

    @property
    def last(self) -> str:
        """Empty: there is none."""
        return self._errors[-1].message if self._errors else ""

    def note(self, message: str) -> None:
        log.error("%s", message)
        self._errors.append(LoggedError(at=self._now(), message=message))
