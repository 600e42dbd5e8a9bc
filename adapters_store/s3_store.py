"""Objects in an S3 bucket: MinIO, SeaweedFS, Garage, AWS, whatever speaks it."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import BinaryIO, cast

from minio import Minio
from minio.datatypes import Object
from urllib3.response import BaseHTTPResponse

from tunefleet.adapters_store.objects import (
    Deleted,
    ListedObject,
    PresignedPut,
    StoredObject,
    check_key,
    is_key,
    shown,
)
from tunefleet.adapters_store.s3_client import Clients, Patience, UsualCredentials, encryption, make_clients
from tunefleet.adapters_store.s3_errors import DENIED, UNAVAILABLE, explained
from tunefleet.adapters_store.s3_stream import S3Stream
from tunefleet.adapters_store.s3_url import S3Location
from tunefleet.adapters_store.s3_versions import Versioning
from tunefleet.errors import InvalidState, StoreError

SINGLE_PUT_BYTES = 16 * 1024 * 1024  # larger files go in parts
PART_BYTES = 8 * 1024 * 1024
NUM_PUT_THREADS = 2  # each holds a part in memory, and one more waits
MAX_PRESIGN_S = 7 * 24 * 3600  # S3's own limit
_BUFFER_BYTES = 64 * 1024
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class S3Store:
    """Objects below a prefix of one bucket; several machines may share it.

    Connects at first use and holds connections until ``close``. Usable after a fork: each process has clients
    of its own. Credentials are looked for at first use, and again once they were refused.
    """

    def __init__(
        self,
        location: S3Location,
        *,
        patience: Patience = Patience(),  # noqa: B008  a constant
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._location = location
        self._patience = patience
        self._clock = clock
        self._credentials = UsualCredentials()
        self._sse = encryption(location)
        self._clients: Clients | None = None
        self._versioning = Versioning(location.bucket, clock)

    def put(self, key: str, source: Path) -> None:
        name = self._name(key)
        what = f"{shown(key)} can't be stored"
        try:
            with source.open("rb") as file, self._explained(what):
                size_bytes = os.fstat(file.fileno()).st_size
                etag = self._send(name, file, size_bytes)
                stored = self._client.stat_object(self._bucket, name)
        except OSError as error:
            raise StoreError(f"{what}: {error.strerror or error}") from error
        if (stored.size, stored.etag) != (size_bytes, etag or stored.etag):
            raise StoreError(
                f"{what}: the store has {stored.size} bytes of it, not {size_bytes}", code="object_corrupt"
            )

    def open(
        self, key: str, *, start: int = 0, length: int | None = None, etag: str | None = None
    ) -> StoredObject:
        name = self._name(key)
        what = f"{shown(key)} can't be read"
        if start < 0 or (length is not None and length < 1):
            raise StoreError(f"{what}: no byte is asked for", code="invalid_range", param="start")
        with self._explained(what, key):
            response = self._client.get_object(
                self._bucket, name, start, length or 0, request_headers={"If-Match": etag} if etag else None
            )
        try:
            num_bytes, size_bytes = _extent(response, what, start, length)
        except BaseException:
            response.close()
            response.release_conn()
            raise
        raw = S3Stream(response, key, num_bytes, clock=self._clock)
        stream = cast(BinaryIO, io.BufferedReader(raw, _BUFFER_BYTES))
        return StoredObject(stream, size_bytes, response.headers.get("etag"))

    def delete(self, key: str) -> Deleted:
        name = self._name(key)
        with self._explained(f"{shown(key)} can't be deleted"):
            return self._versioning.delete(self._client, name, shown(key))

    def list(self, prefix: str) -> Iterator[ListedObject]:
        with self._explained("the store can't be listed"):
            found = self._versioning.objects(self._client, f"{self._location.prefix}{prefix}")
            for name, versions in itertools.groupby(found, lambda item: item.object_name or ""):
                key = name.removeprefix(self._location.prefix)
                if is_key(key):  # others aren't ours
                    yield _listed(key, next(versions))

    def presign_put(self, key: str, *, expires_s: int) -> PresignedPut | None:
        """A URL at the public endpoint; a file put there is encrypted as the bucket's default says."""
        if not 1 <= expires_s <= MAX_PRESIGN_S:
            raise InvalidState(f"a presigned URL may live 1 to {MAX_PRESIGN_S} s, not {expires_s}")
        name = self._name(key)
        with self._explained(f"{shown(key)} can't be presigned"):
            url = self._own_clients().public.presigned_put_object(
                self._bucket, name, timedelta(seconds=expires_s)
            )
        return PresignedPut(url, {})

    def close(self) -> None:
        if self._clients is not None and self._clients.pid == os.getpid():
            self._clients.pool.clear()
        self._clients = None

    @property
    def _client(self) -> Minio:
        return self._own_clients().inner

    @property
    def _bucket(self) -> str:
        return self._location.bucket

    def _own_clients(self) -> Clients:
        """Two threads that come first may both make them: the loser's hold nothing yet."""
        if self._clients is None or self._clients.pid != os.getpid():
            self._clients = make_clients(self._location, self._credentials, self._patience)
        return self._clients

    def _name(self, key: str) -> str:
        return f"{self._location.prefix}{check_key(key)}"

    def _send(self, name: str, file: BinaryIO, size_bytes: int) -> str | None:
        """The SDK sends a digest with each request, and aborts the upload if a part fails."""
        part_bytes = SINGLE_PUT_BYTES if size_bytes <= SINGLE_PUT_BYTES else PART_BYTES
        written = self._client.put_object(
            self._bucket,
            name,
            file,
            size_bytes,
            sse=self._sse,
            part_size=part_bytes,
            num_parallel_uploads=NUM_PUT_THREADS,
        )
        return written.etag

    @contextlib.contextmanager
    def _explained(self, what: str, key: str | None = None) -> Iterator[None]:
        try:
            with explained(what, key):
                yield
        except StoreError as error:
            if error.code == DENIED:
                self._credentials.forget()
            raise


def _extent(response: BaseHTTPResponse, what: str, start: int, length: int | None) -> tuple[int, int]:
    """Bytes to come, and bytes of the whole object, as the headers say."""
    if start == 0 and length is None:
        size_bytes = int(response.headers.get("content-length", "-1"))
        if size_bytes >= 0:
            return size_bytes, size_bytes
    else:
        found = _CONTENT_RANGE.fullmatch(response.headers.get("content-range", ""))
        if found is not None:
            first, last, size_bytes = map(int, found.groups())
            end = size_bytes if length is None else min(size_bytes, start + length)
            if (first, last + 1) == (start, end):
                return end - start, size_bytes
    raise StoreError(f"{what}: the store doesn't give the range that was asked for", code=UNAVAILABLE)


def _listed(key: str, found: Object) -> ListedObject:
    if found.size is None or found.last_modified is None:
        raise StoreError("the store can't be listed: it tells no sizes or dates", code=UNAVAILABLE)
    return ListedObject(key, found.size, found.last_modified)
