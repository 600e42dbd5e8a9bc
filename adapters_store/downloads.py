"""Objects of a store to files on disk: large ones by ranges, side by side."""

from __future__ import annotations

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tunefleet.adapters_store.objects import COPY_BYTES, DISK_FULL, ObjectStore, StoredObject, changed, shown
from tunefleet.errors import StoreError

RANGE_BYTES = 8 * 1024 * 1024
NUM_THREADS = 4
_NUM_TRIES = 2
_FINAL = {"object_not_found", "object_changed", "store_denied", "disk_full"}  # trying again can't help


def download(
    objects: ObjectStore, key: str, target: Path, *, max_bytes: int, num_threads: int = NUM_THREADS
) -> None:
    """Copies an object into a new file. A copy that broke off is removed.

    A range that fails is asked for once more, from where it stopped.

    Raises:
        StoreError: as the store's; ``object_corrupt`` for one larger than what was stored, ``disk_full``.
    """
    first = _open_first(objects, key)
    try:
        if first.size_bytes > max_bytes:
            raise StoreError(
                f"{shown(key)} has {first.size_bytes} bytes, at most {max_bytes} were stored",
                code="object_corrupt",
            )
        try:
            with target.open("xb") as file:
                _Copy(objects, key, first, file.fileno()).run(num_threads)
        except BaseException as error:
            if not isinstance(error, FileExistsError):
                target.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise _disk_error(key, error) from error
    finally:
        first.stream.close()


class _Range:
    """A part of an object that one thread copies; ``at`` moves from its start to its end."""

    def __init__(self, start: int, end: int) -> None:
        self.at = start
        self.end = end


class _Copy:
    """One download under way: every range goes to its own place in one file."""

    def __init__(self, objects: ObjectStore, key: str, first: StoredObject, fd: int) -> None:
        self._objects = objects
        self._key = key
        self._first = first
        self._fd = fd
        self._failed = threading.Event()

    def run(self, num_threads: int) -> None:
        size_bytes = self._first.size_bytes
        _reserve(self._fd, size_bytes)
        ranges = [
            _Range(start, min(start + RANGE_BYTES, size_bytes)) for start in range(0, size_bytes, RANGE_BYTES)
        ]
        if len(ranges) <= 1:
            for part in ranges:
                self._fetch(part, self._first)
            return
        with ThreadPoolExecutor(num_threads, thread_name_prefix="download") as pool:
            done = [pool.submit(self._fetch, ranges[0], self._first)]
            done += [pool.submit(self._fetch, part, None) for part in ranges[1:]]
        for future in done:
            future.result()

    def _fetch(self, part: _Range, stored: StoredObject | None) -> None:
        """Copies a range; once one has failed for good, those that are left are given up."""
        for num_left in reversed(range(_NUM_TRIES)):
            try:
                self._fill(part, stored or self._open(part))
                return
            except StoreError as error:
                if not num_left or error.code in _FINAL:
                    self._failed.set()
                    raise
                stored = None
            except BaseException:
                self._failed.set()
                raise

    def _open(self, part: _Range) -> StoredObject:
        stored = self._objects.open(
            self._key, start=part.at, length=part.end - part.at, etag=self._first.etag
        )
        if stored.size_bytes != self._first.size_bytes:
            stored.stream.close()
            raise changed(self._key)
        return stored

    def _fill(self, part: _Range, stored: StoredObject) -> None:
        with stored.stream:
            while part.at < part.end and not self._failed.is_set():
                content = memoryview(self._read(stored, min(COPY_BYTES, part.end - part.at)))
                while content:
                    written = os.pwrite(self._fd, content, part.at)
                    part.at += written
                    content = content[written:]

    def _read(self, stored: StoredObject, num_bytes: int) -> bytes:
        try:
            content = stored.stream.read(num_bytes)
        except OSError as error:
            raise StoreError(f"{shown(self._key)} can't be read: {error.strerror or error}") from error
        if not content:
            raise StoreError(
                f"{shown(self._key)} has {stored.size_bytes} bytes, but not all of them came",
                code="short_read",
            )
        return content


def _open_first(objects: ObjectStore, key: str) -> StoredObject:
    """The first range, which is all of a small object; an empty one has none."""
    try:
        return objects.open(key, length=RANGE_BYTES)
    except StoreError as error:
        if error.code != "invalid_range":
            raise
    return objects.open(key)


def _reserve(fd: int, size_bytes: int) -> None:
    """Takes the space, so that a full disk shows before anything is fetched."""
    if not size_bytes or not hasattr(os, "posix_fallocate"):  # macOS has none
        return
    try:
        os.posix_fallocate(fd, 0, size_bytes)
    except OSError as error:
        if error.errno not in {errno.EOPNOTSUPP, errno.EINVAL}:  # not every file system can
            raise
        os.ftruncate(fd, size_bytes)


def _disk_error(key: str, error: OSError) -> StoreError:
    full = error.errno in DISK_FULL
    advice = "; make room on this machine's disk" if full else ""
    return StoreError(
        f"{shown(key)} can't be copied to disk: {error.strerror or error}{advice}",
        code="disk_full" if full else None,
    )
