"""Uploads in three steps: begin, put the files into a staging place, complete.

What is staged is anybody's who holds the URLs, so it is nothing yet: completing takes a private copy, checks
exactly those bytes, stores them under a key of their own and reads that copy back before it counts. A client
that changes the staged files later changes nothing.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from tunefleet.adapters_store import adapter_objects
from tunefleet.adapters_store.catalog import Catalog
from tunefleet.adapters_store.objects import ObjectStore, new_upload_id, staging_prefix
from tunefleet.adapters_store.pushing import Pushing, PushRequest
from tunefleet.adapters_store.records import AdapterName, Added, UploadRecord
from tunefleet.adapters_store.repeats import UploadKey, upload_key
from tunefleet.adapters_store.steps import reached
from tunefleet.core import ADAPTER_FILES, UploadFile, UploadTicket
from tunefleet.errors import AdapterInvalid, AdapterNotFound, RequestInvalid, StoreError, TunefleetError

TTL_S = 15 * 60
MAX_TTL_S = 3600
_UPLOAD_ID = re.compile(r"[0-9a-f]{32}")


class StagedUploads:
    """Blocking, for several threads at once. Lives as long as the store that made it; holds nothing."""

    def __init__(self, objects: ObjectStore, catalog: Catalog, pushing: Pushing) -> None:
        self._objects = objects
        self._catalog = catalog
        self._pushing = pushing

    def begin(self, request: PushRequest, ttl_s: int) -> UploadTicket:
        upload_id = new_upload_id()
        prefix = staging_prefix(request.adapter.tenant, upload_id)
        record = self._pushing.begin(request, upload_id, prefix, "staged", ttl_s=ttl_s)
        reached("begin:noted")
        files = {file: self._file(f"{prefix}/{file}", ttl_s) for file in ADAPTER_FILES}
        return UploadTicket(upload_id=upload_id, files=files, expires_at=record.expires_at)

    def put(self, adapter: AdapterName, upload_id: str, file: str, source: Path) -> None:
        """Stages a file for a store that has no URLs. Again: the newer one counts."""
        record = self._staged(adapter, upload_id)
        if file not in ADAPTER_FILES:
            raise AdapterNotFound(
                f"the files of an upload are {' and '.join(ADAPTER_FILES)}",
                code="file_not_found",
                param="file",
            )
        if source.stat().st_size > self._pushing.limits.max_bytes(file):
            raise self._pushing.too_large(file)
        self._objects.put(f"{record.object_key}/{file}", source)
        reached("stage:put")
        self._check_wanted(adapter, upload_id, f"{record.object_key}/{file}")

    def complete(self, adapter: AdapterName, upload_id: str) -> Added:
        """Makes the staged files a version; again, also at once: the same answer and no second version."""
        key = _completion_key(upload_id)
        added = self._catalog.answered(adapter, "", key)
        if added is None:
            record = self._staged(adapter, upload_id)
            try:
                added = self._add(adapter, record, key)
            except TunefleetError:
                added = self._catalog.answered(adapter, "", key)
                if added is None:
                    raise
                # Somebody completed it meanwhile and took the staged files away.
        with contextlib.suppress(StoreError):  # what stays is the collector's
            self._remove(adapter.tenant, upload_id)
        return added

    def _add(self, adapter: AdapterName, record: UploadRecord, key: UploadKey) -> Added:
        request = PushRequest(adapter, record.promote, record.metadata)
        with self._pushing.private_folder() as folder:
            for file in ADAPTER_FILES:
                self._fetch(f"{record.object_key}/{file}", folder / file)
            reached("complete:fetched")
            checked = self._pushing.check(folder)
            added = self._pushing.add(request, checked, folder, key=key, verify=True)
        reached("complete:committed")
        return added

    def _fetch(self, key: str, target: Path) -> None:
        try:
            stored = self._objects.open(key)
        except StoreError as error:
            if error.code != "object_not_found":
                raise
            raise AdapterInvalid(
                f"{target.name} was not put yet: send it to its URL, then complete again",
                code="missing_file",
                param=target.name,
            ) from error
        with stored.stream as stream:
            if stored.size_bytes > self._pushing.limits.max_bytes(target.name):
                raise self._pushing.too_large(target.name)
            self._pushing.copy(stream, target)

    def _check_wanted(self, adapter: AdapterName, upload_id: str, key: str) -> None:
        """A file that came after its upload was over, or its user deleted, must not stay."""
        try:
            self._staged(adapter, upload_id)
        except AdapterNotFound:
            self._objects.delete(key)
            raise

    def _staged(self, adapter: AdapterName, upload_id: str) -> UploadRecord:
        """Raises AdapterNotFound (``upload_not_found``): never begun here, expired, or somebody else's."""
        record = self._catalog.upload(adapter, upload_id) if _UPLOAD_ID.fullmatch(upload_id) else None
        if record is None or record.kind != "staged":
            raise AdapterNotFound(
                f"{adapter.user_id!r} has no such upload: begin a new one",
                code="upload_not_found",
                param="upload_id",
            )
        return record

    def _remove(self, tenant: str, upload_id: str) -> None:
        prefix = staging_prefix(tenant, upload_id)
        adapter_objects.delete(self._objects, prefix, step="complete:object-gone")
        self._catalog.end_upload(upload_id)
        reached("complete:ended")

    def _file(self, key: str, ttl_s: int) -> UploadFile:
        presigned = self._objects.presign_put(key, expires_s=ttl_s)
        if presigned is None:
            return UploadFile(url="", method="PUT", headers={})
        return UploadFile(url=presigned.url, method="PUT", headers=presigned.headers)


def check_ttl(ttl_s: int) -> int:
    if isinstance(ttl_s, bool) or not 1 <= ttl_s <= MAX_TTL_S:
        raise RequestInvalid(f"ttl_s must be 1 to {MAX_TTL_S} seconds", code="invalid_ttl", param="ttl_s")
    return ttl_s


def _completion_key(upload_id: str) -> UploadKey:
    """The upload's own idempotency key. The space in it keeps it apart from those that clients choose."""
    return upload_key(f"upload {upload_id}")
