"""A version's files on their way into a folder: there once both are whole, and never before."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

from tunefleet.errors import RequestInvalid, StoreError


@contextlib.contextmanager
def arriving(into: Path) -> Iterator[Path]:
    """A private folder below ``into``, whose files move there if all goes well.

    Raises:
        RequestInvalid: ``into`` can't be written.
    """
    try:
        into.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=into, prefix=".arriving-") as name:
            yield Path(name)
            for path in sorted(Path(name).iterdir()):
                path.replace(into / path.name)
    except OSError as error:
        raise RequestInvalid(
            f"can't write to {into}: {error.strerror}", code="unwritable", param="into"
        ) from error


class ArrivingFile:
    """Hashed as it is written; close it, or leave its ``with``."""

    def __init__(self, path: Path) -> None:
        self._name = path.name
        self._file = path.open("xb")
        self._hasher = hashlib.sha256()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, chunk: bytes) -> None:
        self._hasher.update(chunk)
        self._file.write(chunk)

    def check(self, etag: str) -> None:
        """Raises StoreError (``object_corrupt``) unless ``etag`` is the sha256 of what was written."""
        if etag.strip('"') != self._hasher.hexdigest():
            raise StoreError(
                f"{self._name} came with other bytes than were uploaded: download it again",
                code="object_corrupt",
            )
