"""Objects in memory: the store of tests."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from tunefleet.adapters_store.objects import (
    Deleted,
    ListedObject,
    PresignedPut,
    StoredObject,
    changed,
    check_key,
    check_range,
    not_found,
    shown,
)
from tunefleet.errors import StoreError


class _Object(NamedTuple):
    content: bytes
    modified_at: datetime
    etag: str


class MemoryStore:
    """Objects in this process's memory, for tests and trials; gone with the process."""

    def __init__(self, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._now = now
        self._objects: dict[str, _Object] = {}
        self._num_puts = 0
        self._lock = threading.Lock()

    def put(self, key: str, source: Path) -> None:
        check_key(key)
        try:
            content = source.read_bytes()
        except OSError as error:
            raise StoreError(f"{shown(key)} can't be stored: {error.strerror}") from error
        self.replace(key, content)

    def replace(self, key: str, content: bytes) -> None:
        """Other bytes in an object's place, as broken hardware would: to test those who read them."""
        with self._lock:
            self._num_puts += 1
            self._objects[key] = _Object(content, self._now(), str(self._num_puts))

    def open(
        self, key: str, *, start: int = 0, length: int | None = None, etag: str | None = None
    ) -> StoredObject:
        check_key(key)
        with self._lock:
            stored = self._objects.get(key)
        if stored is None:
            raise not_found(key)
        if etag not in (None, stored.etag):
            raise changed(key)
        size_bytes = len(stored.content)
        end = start + check_range(key, size_bytes, start, length)
        return StoredObject(io.BytesIO(stored.content[start:end]), size_bytes, stored.etag)

    def delete(self, key: str) -> Deleted:
        check_key(key)
        with self._lock:
            return Deleted(int(self._objects.pop(key, None) is not None))

    def list(self, prefix: str) -> Iterator[ListedObject]:
        with self._lock:
            stored = sorted(self._objects.items())
        return (
            ListedObject(key, len(found.content), found.modified_at)
            for key, found in stored
            if key.startswith(prefix)
        )

    def presign_put(self, key: str, *, expires_s: int) -> PresignedPut | None:
        check_key(key)
        return None

    def close(self) -> None:
        pass
