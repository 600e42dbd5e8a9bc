"""Objects as files below a folder."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, cast

from tunefleet.adapters_store.objects import (
    COPY_BYTES,
    DISK_FULL,
    Deleted,
    ListedObject,
    PresignedPut,
    StoredObject,
    changed,
    check_key,
    check_range,
    is_key,
    not_found,
    shown,
)
from tunefleet.adapters_store.steps import reached
from tunefleet.errors import StoreError

_STALE_S = 24 * 3600.0  # an unfinished put older than this belongs to a dead process


class FileStore:
    """Objects as files below a folder, for one machine; several processes may share it.

    A put writes beside the tree, syncs, renames and syncs the folders, so a crash leaves at most a file in
    ``.incoming``, which a later start removes.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._incoming = root / ".incoming"
        try:
            self._incoming.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._remove_stale()
        except OSError as error:
            raise StoreError(f"the store's folder {root} can't be used: {error.strerror}") from error

    def put(self, key: str, source: Path) -> None:
        target = self._root / check_key(key)
        try:
            with tempfile.NamedTemporaryFile(dir=self._incoming, delete=False) as file:
                temporary = Path(file.name)
                try:
                    with source.open("rb") as read:
                        shutil.copyfileobj(read, file, COPY_BYTES)
                    file.flush()
                    os.fsync(file.fileno())
                    reached("file:written")
                    self._publish(temporary, target)
                except BaseException:
                    temporary.unlink(missing_ok=True)
                    raise
        except OSError as error:
            raise _failed(f"{shown(key)} can't be stored", error) from error

    def open(
        self, key: str, *, start: int = 0, length: int | None = None, etag: str | None = None
    ) -> StoredObject:
        try:
            file = (self._root / check_key(key)).open("rb")
        except FileNotFoundError as error:
            raise not_found(key) from error
        except OSError as error:
            raise _failed(f"{shown(key)} can't be read", error) from error
        try:
            status = os.fstat(file.fileno())
            own_etag = f"{status.st_ino:x}-{status.st_mtime_ns:x}"
            if etag not in (None, own_etag):
                raise changed(key)
            num_bytes = check_range(key, status.st_size, start, length)
        except BaseException:
            file.close()
            raise
        stream = file if num_bytes == status.st_size else _part(file, start, num_bytes)
        return StoredObject(stream, status.st_size, own_etag)

    def delete(self, key: str) -> Deleted:
        path = self._root / check_key(key)
        try:
            path.unlink()
        except FileNotFoundError:
            return Deleted(0)
        except OSError as error:
            raise _failed(f"{shown(key)} can't be deleted", error) from error
        finally:
            self._remove_empty(path.parent)
        return Deleted(1)

    def list(self, prefix: str) -> Iterator[ListedObject]:
        yield from self._walk(self._root, "", prefix)

    def presign_put(self, key: str, *, expires_s: int) -> PresignedPut | None:
        check_key(key)
        return None

    def close(self) -> None:
        pass

    def _walk(self, folder: Path, base: str, prefix: str) -> Iterator[ListedObject]:
        """In the order of keys: a folder's place is where its name and a slash sort."""
        for key, entry in _entries(folder, base):
            if key.endswith("/"):
                if key.startswith(prefix) or prefix.startswith(key):
                    yield from self._walk(Path(entry.path), key, prefix)
            elif key.startswith(prefix) and is_key(key):
                with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                    status = entry.stat()
                    modified_at = datetime.fromtimestamp(status.st_mtime, UTC)
                    yield ListedObject(key, status.st_size, modified_at)

    def _publish(self, temporary: Path, target: Path) -> None:
        with self._locked(fcntl.LOCK_SH):  # no delete takes away a folder that we found or made
            self._make_folders(target.parent)
            temporary.rename(target)
            _sync_folder(target.parent)

    def _make_folders(self, folder: Path) -> None:
        """Like mkdir -p, with every new name synced into its parent."""
        missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        for path in reversed(missing):
            path.mkdir(mode=0o700, exist_ok=True)
            _sync_folder(path.parent)

    def _remove_empty(self, folder: Path) -> None:
        """Empty folders hurt nobody: where puts are under way, they just stay."""
        with contextlib.suppress(OSError), self._locked(fcntl.LOCK_EX | fcntl.LOCK_NB):
            while folder != self._root:
                folder.rmdir()  # raises where it isn't empty
                folder = folder.parent

    @contextlib.contextmanager
    def _locked(self, mode: int) -> Iterator[None]:
        """Between puts and the removal of folders, of all processes."""
        fd = os.open(self._root / ".lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, mode)
            yield
        finally:
            os.close(fd)

    def _remove_stale(self) -> None:
        for path in self._incoming.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _STALE_S:
                    path.unlink()


def _entries(folder: Path, base: str) -> list[tuple[str, os.DirEntry[str]]]:
    """What a folder holds by key, sorted; folders' keys end with a slash."""
    try:
        with os.scandir(folder) as found:
            entries = [entry for entry in found if not entry.name.startswith(".")]
    except FileNotFoundError:  # emptied and removed meanwhile
        return []
    except OSError as error:
        raise _failed("the store can't be listed", error) from error
    keyed = [(f"{base}{entry.name}{'/' * entry.is_dir()}", entry) for entry in entries]
    return sorted(keyed, key=lambda pair: pair[0])


class _Part(io.RawIOBase):
    """So many bytes of a file from its position on; closes the file."""

    def __init__(self, file: BinaryIO, num_bytes: int) -> None:
        self._file = file
        self._left = num_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        content = self._file.read(min(len(buffer), self._left))
        buffer[: len(content)] = content
        self._left -= len(content)
        return len(content)

    def close(self) -> None:
        self._file.close()
        super().close()


def _part(file: BinaryIO, start: int, num_bytes: int) -> BinaryIO:
    file.seek(start)
    return cast(BinaryIO, io.BufferedReader(_Part(file, num_bytes)))


def _failed(what: str, error: OSError) -> StoreError:
    if error.errno in DISK_FULL:
        return StoreError(f"{what}: {error.strerror}; make room for the store", code="disk_full")
    return StoreError(f"{what}: {error.strerror}")


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
