from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest

from object_kit import code_of, written
from tunefleet.adapters_store.downloads import NUM_THREADS, RANGE_BYTES, download
from tunefleet.adapters_store.file_store import FileStore
from tunefleet.adapters_store.memory_store import MemoryStore
from tunefleet.adapters_store.objects import ObjectStore, StoredObject
from tunefleet.errors import StoreError

KEY = "t/sha256/ab/abcd/u1/adapter_model.safetensors"
MIB = 1024 * 1024
LARGE = 3 * RANGE_BYTES + 12345


class WatchedStore(MemoryStore):
    """Notes which ranges are asked for; a test may spoil streams, or wait inside ``open``."""

    def __init__(self) -> None:
        super().__init__()
        self.ranges: list[tuple[int, int | None]] = []
        self.spoil: Callable[[int, BinaryIO], BinaryIO] = lambda start, stream: stream
        self.on_open: Callable[[int], None] = lambda start: None

    def open(
        self, key: str, *, start: int = 0, length: int | None = None, etag: str | None = None
    ) -> StoredObject:
        self.ranges.append((start, length))
        self.on_open(start)
        stored = super().open(key, start=start, length=length, etag=etag)
        return stored._replace(stream=self.spoil(start, stored.stream))


class BreakingStream(io.BytesIO):
    """Ends in an error after so many bytes."""

    def __init__(self, stream: BinaryIO, num_bytes: int, error: Exception) -> None:
        super().__init__(stream.read())
        self._left = num_bytes
        self._error = error

    def read(self, size: int | None = -1) -> bytes:
        if self._left <= 0:
            raise self._error
        content = super().read(size)
        self._left -= len(content)
        return content


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "target"


def stored(tmp_path: Path, num_bytes: int) -> tuple[WatchedStore, bytes]:
    content = os.urandom(num_bytes)
    store = WatchedStore()
    store.put(KEY, written(tmp_path / "source", content))
    return store, content


def refusal(store: ObjectStore, target: Path, *, max_bytes: int = LARGE) -> StoreError:
    with pytest.raises(StoreError) as raised:
        download(store, KEY, target, max_bytes=max_bytes)
    assert not target.exists()
    return raised.value


@pytest.mark.parametrize("num_bytes", [0, 1, MIB + 1, RANGE_BYTES])
def test_a_small_object_comes_as_one_stream(tmp_path: Path, target: Path, num_bytes: int) -> None:
    store, content = stored(tmp_path, num_bytes)
    download(store, KEY, target, max_bytes=num_bytes)
    assert target.read_bytes() == content
    assert store.ranges[0] == (0, RANGE_BYTES)
    assert len(store.ranges) == (1 if num_bytes else 2)  # an empty object has no range


@pytest.mark.parametrize("num_bytes", [RANGE_BYTES + 1, LARGE])
def test_a_large_object_comes_by_ranges_each_once(tmp_path: Path, target: Path, num_bytes: int) -> None:
    store, content = stored(tmp_path, num_bytes)
    download(store, KEY, target, max_bytes=num_bytes)
    assert target.read_bytes() == content
    starts = range(0, num_bytes, RANGE_BYTES)
    expected = [(start, min(RANGE_BYTES, num_bytes - start)) for start in starts]
    assert sorted(store.ranges) == [(0, RANGE_BYTES), *expected[1:]]


def test_ranges_come_side_by_side(tmp_path: Path, target: Path) -> None:
    store, content = stored(tmp_path, LARGE)
    together = threading.Barrier(3)
    store.on_open = lambda start: together.wait(20) and None if start else None
    download(store, KEY, target, max_bytes=LARGE)
    assert target.read_bytes() == content
    assert NUM_THREADS >= 3


def test_an_object_larger_than_what_was_stored_is_refused_before_it_is_read(
    tmp_path: Path, target: Path
) -> None:
    store, _ = stored(tmp_path, 7)
    error = refusal(store, target, max_bytes=6)
    assert code_of(error) == "object_corrupt"
    assert error.message == "adapter_model.safetensors of abcd has 7 bytes, at most 6 were stored"


def test_a_range_that_breaks_goes_on_where_it_stopped(tmp_path: Path, target: Path) -> None:
    store, content = stored(tmp_path, LARGE)
    broken = {0, RANGE_BYTES}

    def spoil(start: int, stream: BinaryIO) -> BinaryIO:
        if start not in broken:
            return stream
        broken.remove(start)
        return BreakingStream(stream, 2 * MIB, StoreError("broke"))

    store.spoil = spoil
    download(store, KEY, target, max_bytes=LARGE)
    assert target.read_bytes() == content
    again = {(2 * MIB, RANGE_BYTES - 2 * MIB), (RANGE_BYTES + 2 * MIB, RANGE_BYTES - 2 * MIB)}
    assert again <= set(store.ranges)


@pytest.mark.parametrize("error", [StoreError("broke"), OSError(errno.EIO, "Input/output error")])
def test_a_range_that_breaks_twice_is_an_error_and_leaves_nothing(
    tmp_path: Path, target: Path, error: Exception
) -> None:
    store, _ = stored(tmp_path, LARGE)
    store.spoil = lambda start, stream: BreakingStream(stream, MIB, error) if start >= RANGE_BYTES else stream
    refusal(store, target)
    assert len(store.ranges) <= 1 + 2 * 3


def test_a_stream_that_just_ends_is_a_short_read(tmp_path: Path, target: Path) -> None:
    store, _ = stored(tmp_path, MIB)
    store.spoil = lambda start, stream: io.BytesIO(stream.read()[:-1])  # and at last nothing
    assert refusal(store, target).code == "short_read"
    assert store.ranges == [(0, RANGE_BYTES), (MIB - 1, 1)]


def test_an_object_that_changes_meanwhile_is_noticed(tmp_path: Path, target: Path) -> None:
    store, content = stored(tmp_path, LARGE)
    store.on_open = lambda start: store.replace(KEY, content) if start == RANGE_BYTES else None
    error = refusal(store, target)
    assert code_of(error) == "object_changed"


def test_an_object_that_is_deleted_meanwhile_is_not_asked_for_again(tmp_path: Path, target: Path) -> None:
    store, _ = stored(tmp_path, RANGE_BYTES + 1)
    store.on_open = lambda start: store.delete(KEY) and None if start else None
    assert code_of(refusal(store, target)) == "object_not_found"
    assert len(store.ranges) == 2


def test_a_download_to_nowhere_is_a_store_error(tmp_path: Path) -> None:
    store, _ = stored(tmp_path, 7)
    with pytest.raises(StoreError, match="copied to disk: No such file"):
        download(store, KEY, tmp_path / "none" / "target", max_bytes=7)


def test_an_existing_file_is_never_touched(tmp_path: Path, target: Path) -> None:
    store, _ = stored(tmp_path, 7)
    target.write_bytes(b"mine")
    with pytest.raises(StoreError, match="File exists"):
        download(store, KEY, target, max_bytes=7)
    assert target.read_bytes() == b"mine"


@pytest.mark.parametrize("num_bytes", [4096, RANGE_BYTES + 4096])
def test_a_full_disk_is_named_before_anything_is_copied(tmp_path: Path, target: Path, num_bytes: int) -> None:
    """A file's size limit stands for the disk: both fail when the space is taken."""
    FileStore(tmp_path / "objects").put(KEY, written(tmp_path / "source", b"x" * num_bytes))
    program = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from tunefleet.adapters_store.downloads import download\n"
        "from tunefleet.adapters_store.file_store import FileStore\n"
        "from tunefleet.errors import StoreError\n"
        "store = FileStore(Path(sys.argv[1]))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))\n"
        f"try: download(store, {KEY!r}, Path(sys.argv[2]), max_bytes=2**30)\n"
        "except StoreError as error: sys.exit(f'{error.code}: {error}')\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "objects"), str(target)]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.stderr.startswith("disk_full: adapter_model.safetensors of abcd can't be copied to disk")
    assert "make room on this machine's disk" in ran.stderr
    assert not target.exists()
