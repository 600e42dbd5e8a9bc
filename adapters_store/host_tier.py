"""The host tier: prepared files in memory, which replicas map; empty at start, gone at the end."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import uuid
from pathlib import Path

from tunefleet.adapters_store.copies import Copies, remove_all

_SHM = Path("/dev/shm")


class HostTier(Copies):
    """Memory of a mapped file that was removed goes with its last mapping."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        super().__init__(folder, "host_cache_bytes", max_bytes, suffix=".safetensors")
        remove_all([folder])
        folder.mkdir(mode=0o700, parents=True)

    def new_path(self) -> Path:
        """Where to write a file that is to be published."""
        return self._folder / f".new-{uuid.uuid4().hex}"

    async def close(self) -> None:
        await self._run(lambda: shutil.rmtree(self._folder, ignore_errors=True))


def default_host_dir(disk_dir: Path, host_cache_bytes: int) -> Path:
    """A private folder in memory, or one beside the disk tier where ``/dev/shm`` is missing or too small."""
    beside = disk_dir.with_name(f"{disk_dir.name}-host")
    parent = _SHM / f"tunefleet-{os.getuid()}"
    try:
        parent.mkdir(mode=0o700, exist_ok=True)
        status, space = parent.lstat(), os.statvfs(parent)
    except OSError:
        return beside
    is_ours = status.st_uid == os.getuid() and status.st_mode == stat.S_IFDIR | 0o700
    if not is_ours or space.f_bavail * space.f_frsize < host_cache_bytes:
        return beside
    return parent / hashlib.sha256(str(disk_dir.absolute()).encode()).hexdigest()[:12]
