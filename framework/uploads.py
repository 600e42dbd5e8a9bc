"""Uploads on their way to the store: a private folder each, gone when it's done."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from tunefleet.config import Options
from tunefleet.errors import AdapterInvalid, StoreError


@contextlib.contextmanager
def upload_folder(options: Options) -> Iterator[Path]:
    """An empty folder in the staging place, which the store clears of what dead processes left."""
    staging = Path(options.cache_dir) / "staging"
    try:
        staging.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=staging, ignore_cleanup_errors=True)
    except OSError as error:
        raise StoreError(f"the upload can't be staged: {error.strerror}") from error
    with folder as name:
        yield Path(name)


@contextlib.asynccontextmanager
async def adapter_folder(path: Path, options: Options) -> AsyncIterator[Path]:
    """The PEFT folder at ``path``: itself, or unpacked from a tar or zip for as long as the context lasts."""
    if path.is_dir():
        yield path
        return
    if not path.is_file():
        raise AdapterInvalid(f"there is no adapter at {path}: give a PEFT folder, or a tar or zip of one")
    with upload_folder(options) as staged:
        await unpack(path, staged / "adapter", options)
        yield staged / "adapter"


async def unpack(archive: Path, into: Path, options: Options) -> None:
    """Unpacks in a thread; AdapterInvalid for what is no tar or zip of a PEFT folder."""
    from tunefleet.adapters_store.archives import unpack as unpack_archive

    into.mkdir()
    await asyncio.to_thread(unpack_archive, archive, into, options.max_upload_bytes)
