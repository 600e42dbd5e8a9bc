"""Dumb storage for adapter files: immutable objects under keys; the catalog decides what they mean.

Keys are ``<tenant>/sha256/<first 2 of digest>/<digest>/<upload_id>/<file>``: nothing in them comes from a
user, and no key is a prefix of another one, so a delete never races an upload of the same bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import re
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol
from urllib.parse import urlsplit

from tunefleet.config import store_folder
from tunefleet.errors import ConfigError, StoreError

COPY_BYTES = 1024 * 1024
_SEGMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._\-]{0,199}")
_STALE_S = 24 * 3600.0  # an unfinished put older than this belongs to a dead process


class StoredObject(NamedTuple):
    """An object opened for reading; whoever asked for it closes ``stream``."""

    stream: BinaryIO
    size_bytes: int


class ObjectStore(Protocol):
    """What every store does; all methods block and are safe to call from several threads.

    ``put`` is atomic and durable: once it returns, the object survives a crash; before that no reader sees
    it. Problems raise StoreError, with code ``object_not_found`` for a key that isn't there.
    """

    def put(self, key: str, source: Path) -> None: ...

    def open(self, key: str) -> StoredObject: ...

    def delete(self, key: str) -> None:
        """Removes an object; it is no error if there is none."""

    def list(self, prefix: str) -> Iterator[str]:
        """Keys that start with ``prefix``, sorted."""
        ...

    def close(self) -> None: ...


def object_prefix(tenant: str, digest: str, upload_id: str) -> str:
    """The prefix of one upload's two objects, without the last slash."""
    return check_key(f"{tenant}/sha256/{digest[:2]}/{digest}/{upload_id}")


def new_upload_id() -> str:
    return uuid.uuid4().hex


def check_key(key: str) -> str:
    """Returns ``key`` unchanged, or raises StoreError (``invalid_key``): it might leave the store."""
    if len(key) <= 1000 and all(_SEGMENT.fullmatch(segment) for segment in key.split("/")):
        return key
    raise StoreError(f"{key[:200]!r} is no key of this store", code="invalid_key", param="key")


def download(objects: ObjectStore, key: str, target: Path, *, max_bytes: int) -> None:
    """Streams an object into a new file. A copy that broke off is removed."""
    stream, size_bytes = objects.open(key)
    if size_bytes > max_bytes:
        stream.close()
        raise StoreError(
            f"{key} has {size_bytes} bytes, at most {max_bytes} were stored", code="object_corrupt"
        )
    try:
        with stream, target.open("xb") as file:
            shutil.copyfileobj(stream, file, COPY_BYTES)
            written = file.tell()
        if written != size_bytes:
            raise StoreError(f"{key} has {size_bytes} bytes, only {written} came", code="short_read")
    except OSError as error:
        target.unlink(missing_ok=True)
        raise StoreError(f"{key} can't be copied to disk: {error.strerror or error}") from error
    except BaseException:
        target.unlink(missing_ok=True)
        raise


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
                    self._publish(temporary, target)
                except BaseException:
                    temporary.unlink(missing_ok=True)
                    raise
        except OSError as error:
            raise StoreError(f"{key} can't be stored: {error.strerror}") from error

    def open(self, key: str) -> StoredObject:
        try:
            file = (self._root / check_key(key)).open("rb")
        except FileNotFoundError as error:
            raise _not_found(key) from error
        except OSError as error:
            raise StoreError(f"{key} can't be read: {error.strerror}") from error
        return StoredObject(file, os.fstat(file.fileno()).st_size)

    def delete(self, key: str) -> None:
        path = self._root / check_key(key)
        try:
            path.unlink(missing_ok=True)
            self._remove_empty(path.parent)
        except OSError as error:
            raise StoreError(f"{key} can't be deleted: {error.strerror}") from error

    def list(self, prefix: str) -> Iterator[str]:
        for folder, names, files in os.walk(self._root):
            base = Path(folder).relative_to(self._root)
            names[:] = sorted(
                name
                for name in names
                if not name.startswith(".") and _may_hold(f"{(base / name).as_posix()}/", prefix)
            )
            keys = ((base / file).as_posix() for file in sorted(files) if not file.startswith("."))
            yield from (key for key in keys if key.startswith(prefix))

    def close(self) -> None:
        pass

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


class MemoryStore:
    """Objects in this process's memory, for tests and trials; gone with the process."""

    def __init__(self) -> None:
        self._objects: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def put(self, key: str, source: Path) -> None:
        check_key(key)
        try:
            content = source.read_bytes()
        except OSError as error:
            raise StoreError(f"{key} can't be stored: {error.strerror}") from error
        with self._lock:
            self._objects[key] = content

    def open(self, key: str) -> StoredObject:
        check_key(key)
        with self._lock:
            content = self._objects.get(key)
        if content is None:
            raise _not_found(key)
        return StoredObject(io.BytesIO(content), len(content))

    def delete(self, key: str) -> None:
        check_key(key)
        with self._lock:
            self._objects.pop(key, None)

    def list(self, prefix: str) -> Iterator[str]:
        with self._lock:
            keys = sorted(self._objects)
        return (key for key in keys if key.startswith(prefix))

    def close(self) -> None:
        pass


def open_store(store_url: str) -> ObjectStore:
    """The store of a ``store_url`` option.

    Raises:
        ConfigError: a scheme that isn't supported.
    """
    scheme = urlsplit(store_url).scheme
    if scheme != "file":
        raise ConfigError(
            f"store_url {store_url!r} has scheme {scheme!r}; supported: file:///path", param="store_url"
        )
    return FileStore(store_folder(store_url) / "objects")


def _may_hold(folder: str, prefix: str) -> bool:
    return folder.startswith(prefix) or prefix.startswith(folder)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _not_found(key: str) -> StoreError:
    return StoreError(f"{key} is not in the store", code="object_not_found", param="key")
