"""Objects of a store to files on disk."""

from __future__ import annotations

import shutil
from pathlib import Path

from tunefleet.adapters_store.objects import COPY_BYTES, ObjectStore, shown
from tunefleet.errors import StoreError


def download(objects: ObjectStore, key: str, target: Path, *, max_bytes: int) -> None:
    """Streams an object into a new file. A copy that broke off is removed."""
    stream, size_bytes, _ = objects.open(key)
    if size_bytes > max_bytes:
        stream.close()
        raise StoreError(
            f"{shown(key)} has {size_bytes} bytes, at most {max_bytes} were stored", code="object_corrupt"
        )
    try:
        with stream, target.open("xb") as file:
            shutil.copyfileobj(stream, file, COPY_BYTES)
            written = file.tell()
        if written != size_bytes:
            raise StoreError(f"{shown(key)} has {size_bytes} bytes, only {written} came", code="short_read")
    except OSError as error:
        target.unlink(missing_ok=True)
        raise StoreError(f"{shown(key)} can't be copied to disk: {error.strerror or error}") from error
    except BaseException:
        target.unlink(missing_ok=True)
        raise
