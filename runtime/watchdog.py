"""Ends a process whose step does not: the kernel keeps the time, and nothing in the process can stop it."""

from __future__ import annotations

import faulthandler
import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Watchdog:
    """Lives as long as its process, which it makes one that dies of SIGALRM, its stacks printed to stderr.

    A step may hang in native code that holds the interpreter's lock; a thread would hang with it.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        faulthandler.register(signal.SIGALRM, all_threads=True, chain=True)

    @contextmanager
    def step(self) -> Iterator[None]:
        """What happens inside takes less than the timeout, or the process ends."""
        signal.setitimer(signal.ITIMER_REAL, self._timeout_s)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
