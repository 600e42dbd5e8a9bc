"""Dumb storage for adapter files: immutable objects under keys; the catalog decides what they mean.

Keys are ``<tenant>/sha256/<first 2 of digest>/<digest>/<upload_id>/<file>`` for stored adapters,
``staging/<tenant>/<upload_id>/<file>`` for files that a client put by itself and that nobody checked yet, and
``catalogs/<catalog_id>``, which says whose catalog decides over the store. Nothing in them comes from a user,
and no key is a prefix of another one, so a delete never races an upload of the same bytes.
"""

from __future__ import annotations

import errno
import re
import uuid
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from tunefleet.config import store_folder
from tunefleet.errors import ConfigError, StoreError

COPY_BYTES = 1024 * 1024
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_SEGMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._\-]{0,199}")


class StoredObject(NamedTuple):
    """An object, or a range of one, opened for reading; whoever asked for it closes ``stream``."""

    stream: BinaryIO
    size_bytes: int  # of the whole object
    etag: str | None = None  # another one means other bytes


class ListedObject(NamedTuple):
    key: str
    size_bytes: int
    modified_at: datetime  # UTC


class Deleted(NamedTuple):
    num_versions: int
    kept: tuple[str, ...] = ()  # a sentence for each object version that stayed, and why


class PresignedPut(NamedTuple):
    """A PUT that anybody who has it may send, with these headers, until it expires."""

    url: str
    headers: dict[str, str]


class ObjectStore(Protocol):
    """What every store does; all methods block and are safe to call from several threads.

    ``put`` is atomic and durable: once it returns, the object survives a crash; before that no reader sees
    it. Problems raise StoreError: ``object_not_found`` for a key that isn't there, ``store_denied`` for
    credentials that don't do, ``store_unavailable`` for a store that may be back soon.
    """

    def put(self, key: str, source: Path) -> None: ...

    def open(
        self, key: str, *, start: int = 0, length: int | None = None, etag: str | None = None
    ) -> StoredObject:
        """Opens an object, or ``length`` bytes of it from ``start``; fewer where it ends before.

        A stream that breaks raises StoreError: it never just ends early.

        Raises:
            StoreError: also ``invalid_range`` where there is no byte to give, and ``object_changed`` where
                the object isn't the one of ``etag`` any more.
        """
        ...

    def delete(self, key: str) -> Deleted:
        """Removes an object with all its versions; it is no error if there is none."""
        ...

    def list(self, prefix: str) -> Iterator[ListedObject]:
        """Objects whose keys start with ``prefix``: those of one folder come together, sorted.

        Most stores sort all keys; SeaweedFS sorts level by level. On a versioned bucket objects of which only
        older versions are left are among them.
        """
        ...

    def presign_put(self, key: str, *, expires_s: int) -> PresignedPut | None:
        """A URL by which others can put this object; None: this store has no URLs."""
        ...

    def close(self) -> None: ...


def object_prefix(tenant: str, digest: str, upload_id: str) -> str:
    """The prefix of one upload's two objects, without the last slash."""
    return check_key(f"{tenant}/sha256/{digest[:2]}/{digest}/{upload_id}")


def staging_prefix(tenant: str, upload_id: str) -> str:
    """Where clients put the files of an upload, without the last slash."""
    return check_key(f"staging/{tenant}/{upload_id}")


def catalog_key(catalog_id: str) -> str:
    """Marks the catalog that decides over a store."""
    return check_key(f"catalogs/{catalog_id}")


def new_upload_id() -> str:
    return uuid.uuid4().hex


def check_key(key: str) -> str:
    """Returns ``key`` unchanged, or raises StoreError (``invalid_key``): it might leave the store."""
    if is_key(key):
        return key
    raise StoreError(f"{key[:200]!r} is no key of this store", code="invalid_key", param="key")


def is_key(key: str) -> bool:
    return len(key) <= 1000 and all(_SEGMENT.fullmatch(segment) for segment in key.split("/"))


def shown(key: str) -> str:
    """An object's name in messages: its file, and the digest or upload it belongs to; no tenant, no path."""
    *folders, file = key.split("/")
    owner = folders[-2] if "sha256" in folders[:-2] else folders[-1] if folders else ""
    return f"{file} of {owner[:12]}" if owner else file


def not_found(key: str) -> StoreError:
    return StoreError(f"{shown(key)} is not in the store", code="object_not_found", param="key")


def changed(key: str) -> StoreError:
    return StoreError(
        f"{shown(key)} is not the object it was: something else writes to the store, and must not",
        code="object_changed",
        param="key",
    )


def check_range(key: str, size_bytes: int, start: int, length: int | None) -> int:
    """How many bytes a range has, or StoreError (``invalid_range``). A whole object may be empty."""
    whole = start == 0 and length is None
    if not whole and (not 0 <= start < size_bytes or (length is not None and length < 1)):
        raise StoreError(
            f"{shown(key)} has {size_bytes} bytes: none at {start}", code="invalid_range", param="start"
        )
    return min(size_bytes - start, size_bytes if length is None else length)


def open_store(store_url: str) -> ObjectStore:
    """The store of a ``store_url`` option.

    Raises:
        ConfigError: a scheme that isn't supported, or a part of the URL that isn't understood.
    """
    from tunefleet.adapters_store.file_store import FileStore  # both build on this module
    from tunefleet.adapters_store.s3_store import S3Store
    from tunefleet.adapters_store.s3_url import SHAPE, parse_s3_url

    if store_url.startswith("s3:"):
        return S3Store(parse_s3_url(store_url))
    if store_url.startswith("file:"):
        return FileStore(store_folder(store_url) / "objects")
    scheme, found, _ = store_url.partition("://")  # what follows may hold a secret
    said = f"begins with {scheme[:12] + found!r}" if found else "has no scheme"
    raise ConfigError(f"store_url {said}; supported: file:///path and {SHAPE}", param="store_url")
