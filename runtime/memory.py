"""What processes cost in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

MAX_AGE_S = 1.0  # the kernel walks all pages for a reading; who asks in a loop must not make that a load


def pss_bytes(pid: int) -> int:
    """Proportional set size: private pages and a share of shared ones; 0 where the system doesn't tell."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


class MemoryMeter:
    """Readings of a few processes by name, none older than a second.

    Args:
        clock: monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._read_at = float("-inf")
        self._pids: dict[str, int] = {}
        self._readings: dict[str, int] = {}

    def pss_bytes(self, pids: Mapping[str, int]) -> dict[str, int]:
        """Bytes by name; a pid of 0 is no process."""
        now = self._clock()
        if dict(pids) != self._pids or now - self._read_at >= MAX_AGE_S:
            self._pids, self._read_at = dict(pids), now
            self._readings = {name: pss_bytes(pid) for name, pid in pids.items() if pid}
        return dict(self._readings)
