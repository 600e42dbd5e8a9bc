"""Copies that are not what was uploaded, kept for whoever wants to know why."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

MAX_COPIES = 4


class Quarantine:
    """A folder of the newest few bad copies; survives restarts, and is never read by us.

    Args:
        max_bytes: of all together; a copy above it is not kept.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes

    def take(self, copy: Path, digest: str) -> None:
        """Moves a bad copy here; blocking."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        copy.rename(self._folder / f"{time.time_ns():020d}-{digest}")
        left = self._max_bytes
        for number, path in enumerate(sorted(self._folder.iterdir(), reverse=True)):
            left -= sum(file.stat().st_size for file in path.rglob("*"))
            if number >= MAX_COPIES or left < 0:
                shutil.rmtree(path, ignore_errors=True)
