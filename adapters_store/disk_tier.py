"""The disk tier: adapters' files as uploaded, a folder per digest; survives restarts."""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from pathlib import Path

from tunefleet.adapters_store.copies import Copies, is_digest, remove_all
from tunefleet.adapters_store.downloads import download
from tunefleet.adapters_store.objects import ObjectStore
from tunefleet.adapters_store.quarantine import Quarantine
from tunefleet.adapters_store.validation import CheckedAdapter, Identity, check_tensors, identify
from tunefleet.core import ADAPTER_FILES, AdapterRef, Manifest
from tunefleet.errors import AdapterInvalid, InvalidState

QUARANTINE_SHARE = 16  # the quarantine may take this part of the tier's bytes, on top of them
_QUARANTINE = ".quarantine"


class CopyCorrupt(Exception):
    """A copy is not the adapter that it should be."""


class DiskTier(Copies):
    """Takes over the copies of earlier processes, and clears what crashes left."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        super().__init__(folder, "disk_cache_bytes", max_bytes)
        self._incoming = folder / ".incoming"
        self._quarantine = Quarantine(folder / _QUARANTINE, max_bytes // QUARANTINE_SHARE)
        leftovers = folder.glob(".*") if folder.exists() else []
        remove_all([path for path in leftovers if path.name != _QUARANTINE])
        self._incoming.mkdir(mode=0o700, parents=True)
        self._take_over()

    def receive(self, objects: ObjectStore, ref: AdapterRef) -> Path:
        """Downloads both files into a folder of their own, to be published; blocking.

        Raises:
            StoreError: as the store says, or the disk is full; then nothing is left.
        """
        incoming = self._incoming / uuid.uuid4().hex
        incoming.mkdir(mode=0o700)
        try:
            for file in ADAPTER_FILES:
                download(objects, f"{ref.key}/{file}", incoming / file, max_bytes=ref.size_bytes)
        except BaseException:
            shutil.rmtree(incoming, ignore_errors=True)
            raise
        return incoming

    def verified(self, ref: AdapterRef, manifest: Manifest) -> CheckedAdapter:
        """Reads a copy whole: it is what was uploaded (and looked through then), and fits the base; blocking.

        Raises:
            CopyCorrupt: it is something else.
            AdapterInvalid: it is what was uploaded, and can't be served.
        """
        folder = self.path(ref.digest)
        identity = _identity(folder)
        if identity.digest != ref.digest or identity.weights_sha256 != ref.weights_sha256:
            raise CopyCorrupt(f"its digest is {identity.digest[:12]}")
        with contextlib.suppress(OSError):
            os.utime(folder)  # the order of use, for the next process
        return check_tensors(folder, identity, manifest, max_rank=ref.rank, is_known=True)

    async def quarantine(self, digest: str) -> None:
        """Moves a bad copy out of the tier, for an operator to look at."""
        copy = self.take_out(digest)
        if copy is not None:
            with contextlib.suppress(OSError):
                await self._run(lambda: self._quarantine.take(copy, digest))
            await self.remove([copy])  # if it is still there

    async def discard(self, received: Path) -> None:
        """Removes what was received and is not wanted any more."""
        await self.remove([received])

    def check(self) -> None:
        super().check()
        if list(self._incoming.iterdir()):
            raise InvalidState("unfinished downloads are left on the disk")

    def _take_over(self) -> None:
        """Books the copies that are there, those used last first, until the budget is full."""
        left = self.max_bytes
        kept: list[tuple[str, int]] = []
        copies = [path for path in self._folder.iterdir() if is_digest(path.name)]
        for path in sorted(copies, key=lambda path: path.stat().st_mtime, reverse=True):
            size = sum((path / file).stat().st_size for file in ADAPTER_FILES if (path / file).is_file())
            if size <= left:
                left -= size
                kept.append((path.name, size))
            else:
                remove_all([path])
        for digest, size in reversed(kept):
            self._budget.add(digest, size)


def _identity(folder: Path) -> Identity:
    try:
        return identify(folder)
    except (AdapterInvalid, OSError) as error:
        raise CopyCorrupt(str(error)) from error
