"""Files that uploads are written to before they are checked."""

from __future__ import annotations

import io
from pathlib import Path

from tunefleet.errors import StoreError


def create_file(path: Path) -> io.FileIO:
    """A new file for ``write_all``. Unbuffered: that a disk is full shows there, and not on closing."""
    try:
        return path.open("xb", buffering=0)
    except OSError as error:
        raise StoreError(f"the upload can't be staged: {error.strerror}") from error


def write_all(file: io.FileIO, content: bytes | bytearray) -> None:
    """Raises StoreError: a full disk is our trouble, not the sender's."""
    left = memoryview(content)
    try:
        while left:
            left = left[file.write(left) :]
    except OSError as error:
        raise StoreError(f"the upload can't be staged: {error.strerror}") from error
