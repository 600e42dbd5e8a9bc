"""Copies of adapters in one folder, within a byte budget."""

from __future__ import annotations

import contextlib
import re
import shutil
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

from tunefleet.adapters_store.byte_budget import ByteBudget
from tunefleet.adapters_store.failures import load_failed
from tunefleet.adapters_store.threads import Runner
from tunefleet.errors import InvalidState

GONE = ".gone-"
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Copies:
    """One tier's copies. Books and names change on the event loop, at once; bytes are removed in a thread.

    A copy is booked before its bytes come, and published, under its name, once they are there. One that was
    taken out is gone for everybody at once, whatever its removal takes.

    Args:
        option: the name of the option that sets the budget.
        suffix: of the copies' names, after the digest.
    """

    def __init__(self, folder: Path, option: str, max_bytes: int, suffix: str = "") -> None:
        self._folder = folder
        self._option = option
        self._suffix = suffix
        self._budget = ByteBudget(max_bytes)
        self._run = Runner(2)

    def __contains__(self, digest: str) -> bool:
        """Booked: there, or on its way."""
        return digest in self._budget

    def is_there(self, digest: str) -> bool:
        """Booked and published, and nobody else has removed it since (a tmpfs may be cleared)."""
        return digest in self._budget and self.path(digest).exists()

    @property
    def max_bytes(self) -> int:
        return self._budget.max_bytes

    def sizes(self) -> dict[str, int]:
        """By digest, the one to be evicted first at the front."""
        return self._budget.sizes()

    def size_of(self, digest: str) -> int | None:
        return self._budget.size_of(digest)

    def touch(self, digest: str) -> None:
        self._budget.touch(digest)

    def path(self, digest: str) -> Path:
        return self._folder / f"{checked_digest(digest)}{self._suffix}"

    async def book(self, digest: str, size: int, is_busy: Callable[[str], bool]) -> None:
        """Books ``size`` bytes at once, then removes the copies that had to go.

        Raises:
            AdapterLoadFailed: there is no room, now (``adapter_no_room``) or ever (``adapter_too_large``).
        """
        if digest in self._budget:  # somebody else removed it
            self._budget.remove(digest)
        victims = self._budget.victims(size, is_busy)
        if victims is None:
            text = f"adapter {digest[:12]} needs {size} bytes of {self._option} ({self.max_bytes})"
            if size > self.max_bytes:
                raise load_failed(
                    f"{text}: raise it to serve this adapter", "adapter_too_large", for_good=True
                )
            raise load_failed(f"{text}, which is in use; try again, or raise it", "adapter_no_room")
        for victim in victims:
            self._budget.evict(victim)
        self._budget.add(digest, size)
        await self.remove(self._set_aside(self.path(victim)) for victim in victims)

    def unbook(self, digest: str) -> None:
        """Takes a booking back of which no copy came to be."""
        self._budget.remove(digest)

    async def publish(self, written: Path, digest: str) -> None:
        """Gives a booked copy its name."""
        old = self._set_aside(self.path(digest))
        written.rename(self.path(digest))
        await self.remove([old])

    def take_out(self, digest: str) -> Path | None:
        """Removes a copy from books and view; its bytes, which the caller removes, if there are any."""
        if digest not in self._budget:
            return None
        self._budget.remove(digest)
        return self._set_aside(self.path(digest))

    async def remove(self, paths: Iterable[Path | None]) -> None:
        """Removes what was taken out."""
        found = [path for path in paths if path is not None]
        if found:
            await self._run(lambda: remove_all(found))

    def check(self) -> None:
        """Raises InvalidState unless folder and books agree; only while nothing is on its way."""
        self._budget.check()
        found = {path.name for path in self._folder.iterdir() if not path.name.startswith(".")}
        if found != {self.path(digest).name for digest in self.sizes()}:
            raise InvalidState(f"the folder of {self._option} differs from its books")
        if list(self._folder.glob(f"{GONE}*")):
            raise InvalidState(f"removed copies are left in the folder of {self._option}")

    def _set_aside(self, path: Path) -> Path | None:
        """Takes a name away at once, so that the slow removal can't hit the next copy of that name."""
        gone = self._folder / f"{GONE}{uuid.uuid4().hex}"
        with contextlib.suppress(FileNotFoundError):
            path.rename(gone)
            return gone
        return None


def is_digest(text: str) -> bool:
    return _DIGEST.fullmatch(text) is not None


def checked_digest(digest: str) -> str:
    if not is_digest(digest):
        raise InvalidState(f"{digest!r} is no digest")
    return digest


def remove_all(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
