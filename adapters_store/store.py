"""The adapters of a deployment, as routers use them: push, resolve, look, promote, download.

A push copies the folder to a private place, checks that copy, stores it under a key of its own and commits it
to the catalog. The commit is what makes it exist: anything before leaves garbage at most, which a failed push
removes itself.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tunefleet.adapters_store.catalog import (
    AdapterName,
    Added,
    Catalog,
    NewVersion,
    UserRecord,
    VersionRecord,
)
from tunefleet.adapters_store.lora_config import MAX_CONFIG_BYTES
from tunefleet.adapters_store.objects import ObjectStore, new_upload_id, object_prefix, open_store
from tunefleet.adapters_store.repeats import UploadKey, check_idempotency_key, upload_key
from tunefleet.adapters_store.stored_file import StoredFile
from tunefleet.adapters_store.threads import Runner
from tunefleet.adapters_store.validation import CheckedAdapter, check_adapter, check_present
from tunefleet.config import Options
from tunefleet.core import (
    ADAPTER_FILES,
    CONFIG_FILE,
    DEFAULT_ADAPTER,
    DEFAULT_TENANT,
    MAX_METADATA_BYTES,
    WEIGHTS_FILE,
    AdapterRef,
    Manifest,
    Version,
    check_adapter_name,
    check_user_id,
)
from tunefleet.errors import AdapterInvalid, AdapterNotFound, RequestInvalid, StoreError

MAX_PAGE = 10_000
NUM_LOOKUPS = 8  # threads for the catalog: a request waits for these
NUM_TRANSFERS = 4  # threads for uploads and downloads, which may take long
CHUNK_BYTES = 256 * 1024
_STALE_S = 24 * 3600.0

UserRow = UserRecord


class Pushed(NamedTuple):
    version: Version
    created: bool  # False: these bytes were the newest version already


class _PushRequest(NamedTuple):
    """A push, its arguments checked."""

    adapter: AdapterName
    promote: bool
    metadata: dict[str, object]
    idempotency_key: str | None

    def upload_key(self, checked: CheckedAdapter) -> UploadKey | None:
        if self.idempotency_key is None:
            return None
        files = (checked.config_sha256, checked.weights_sha256)
        return upload_key(self.idempotency_key, *files, self.promote, self.metadata)


class Resolved(NamedTuple):
    """What a request needs: the adapter, its version number, and the user's own fallback setting."""

    ref: AdapterRef
    version: int
    fallback: str | None


class AdapterStore:
    """Objects and catalog together. Open one per process; ``close`` it when the process stops serving."""

    def __init__(
        self,
        objects: ObjectStore,
        catalog: Catalog,
        manifest: Manifest,
        *,
        staging: Path,
        max_rank: int,
        max_upload_bytes: int,
    ) -> None:
        self._objects = objects
        self._catalog = catalog
        self._manifest = manifest
        self._staging = staging
        self._max_rank = max_rank
        self._max_upload_bytes = max_upload_bytes
        self._lookup = Runner(NUM_LOOKUPS)
        self._transfer = Runner(NUM_TRANSFERS)
        staging.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_stale(staging)

    @classmethod
    def open(cls, options: Options, manifest: Manifest) -> AdapterStore:
        """The store that the options describe, for adapters of one base."""
        return cls(
            open_store(options.store_url),
            Catalog(options.database_url),
            manifest,
            staging=Path(options.cache_dir) / "staging",
            max_rank=options.max_adapter_rank,
            max_upload_bytes=options.max_upload_bytes,
        )

    @property
    def objects(self) -> ObjectStore:
        return self._objects

    async def close(self) -> None:
        await self._lookup(self._catalog.close)
        await self._lookup(self._objects.close)

    async def push(
        self,
        user_id: str,
        folder: Path,
        *,
        name: str = DEFAULT_ADAPTER,
        tenant: str = DEFAULT_TENANT,
        promote: bool = True,
        metadata: dict[str, object] | None = None,
        idempotency_key: str | None = None,
    ) -> Pushed:
        """Uploads the PEFT folder as the user's next version.

        A push that has begun runs to its end even if the caller is cancelled, which then waits for it. With
        an ``idempotency_key`` that this adapter has seen in the last 24 hours, it answers what it did then.

        Raises:
            AdapterInvalid: what is wrong with the upload.
            AdapterConflict: the key came with another upload (code ``idempotency_key_reused``).
            RequestInvalid: a user id, name, key or metadata that isn't allowed.
            StoreError: it could not be stored; nothing of it is visible.
        """
        request = _PushRequest(
            adapter=self._adapter(user_id, name, tenant),
            promote=promote,
            metadata=check_metadata(metadata or {}),
            idempotency_key=None if idempotency_key is None else check_idempotency_key(idempotency_key),
        )
        return await self._transfer.to_the_end(lambda: self._push(request, folder))

    async def resolve(
        self,
        user_id: str,
        *,
        name: str = DEFAULT_ADAPTER,
        tenant: str = DEFAULT_TENANT,
        version: int | None = None,
    ) -> Resolved:
        """The live adapter of a user, or the version asked for.

        Raises:
            AdapterNotFound: nothing to answer with; its ``fallback`` is the user's own setting.
        """
        adapter = self._adapter(user_id, name, tenant)
        if version is None:
            return Resolved(*await self._lookup(lambda: self._catalog.live(adapter)))
        number = _check_number(version)
        return Resolved(*await self._lookup(lambda: self._catalog.numbered(adapter, number)))

    async def versions(
        self,
        user_id: str,
        *,
        name: str = DEFAULT_ADAPTER,
        tenant: str = DEFAULT_TENANT,
        after: int | None = None,
        limit: int = 100,
    ) -> list[Version]:
        """Newest first; ``after`` is the last number of the page before."""
        adapter = self._adapter(user_id, name, tenant)
        size = _check_limit(limit)
        last = None if after is None else _check_number(after, "after")
        records = await self._lookup(lambda: self._catalog.versions(adapter, after=last, limit=size))
        return [_shown(adapter, record) for record in records]

    async def version(
        self, user_id: str, n: int, *, name: str = DEFAULT_ADAPTER, tenant: str = DEFAULT_TENANT
    ) -> Version:
        adapter = self._adapter(user_id, name, tenant)
        number = _check_number(n)
        return _shown(adapter, await self._lookup(lambda: self._catalog.version(adapter, number)))

    async def users(
        self, tenant: str = DEFAULT_TENANT, after: str | None = None, limit: int = 100
    ) -> list[UserRow]:
        """By user id; ``after`` is the last id of the page before."""
        size = _check_limit(limit)
        last = None if after is None else check_user_id(after)
        return await self._lookup(lambda: self._catalog.users(tenant, after=last, limit=size))

    async def user(self, user_id: str, *, tenant: str = DEFAULT_TENANT) -> UserRow:
        """Raises AdapterNotFound (code ``user_not_found``)."""
        check_user_id(user_id)
        return await self._lookup(lambda: self._catalog.user(tenant, user_id))

    async def promote(
        self,
        user_id: str,
        version: int,
        *,
        name: str = DEFAULT_ADAPTER,
        tenant: str = DEFAULT_TENANT,
        if_live: int | None = None,
    ) -> Version:
        """Makes a version live: from the commit on every resolve gives it.

        Raises:
            AdapterNotFound: no such version.
            AdapterConflict: another version than ``if_live`` is live.
        """
        adapter = self._adapter(user_id, name, tenant)
        number = _check_number(version)
        record = await self._lookup(lambda: self._catalog.promote(adapter, number, if_live=if_live))
        return _shown(adapter, record)

    async def open_file(
        self, user_id: str, n: int, file: str, *, name: str = DEFAULT_ADAPTER, tenant: str = DEFAULT_TENANT
    ) -> StoredFile:
        """A file of a version, to stream byte for byte."""
        adapter = self._adapter(user_id, name, tenant)
        number = _check_number(n)
        record = await self._lookup(lambda: self._catalog.version(adapter, number))
        sha256 = {CONFIG_FILE: record.config_sha256, WEIGHTS_FILE: record.weights_sha256}.get(file)
        if sha256 is None:
            raise AdapterNotFound(
                f"a version's files are {CONFIG_FILE} and {WEIGHTS_FILE}", code="file_not_found", param="file"
            )
        stored = await self._transfer(lambda: self._objects.open(f"{record.object_key}/{file}"))
        return StoredFile(stored.stream, stored.size_bytes, sha256, self._transfer)

    def _adapter(self, user_id: str, name: str, tenant: str) -> AdapterName:
        return AdapterName(tenant, check_user_id(user_id), check_adapter_name(name), self._manifest.base_id)

    def _push(self, request: _PushRequest, folder: Path) -> Pushed:
        adapter = request.adapter
        with self._staged(folder) as staged:
            checked = check_adapter(staged, self._manifest, max_rank=self._max_rank)
            key = request.upload_key(checked)
            added = self._catalog.answered(adapter, checked.digest, key)
            if added is None:
                added = self._add(request, checked, key, staged)
            return Pushed(_shown(adapter, added.record), added.created)

    def _add(
        self, request: _PushRequest, checked: CheckedAdapter, key: UploadKey | None, staged: Path
    ) -> Added:
        """Objects first, then the commit. Objects that no version has in the end are removed."""
        prefix = object_prefix(request.adapter.tenant, checked.digest, new_upload_id())
        keep = False
        try:
            for file in ADAPTER_FILES:
                self._objects.put(f"{prefix}/{file}", staged / file)
            new = _new_version(checked, prefix, request.metadata)
            added = self._catalog.add_version(request.adapter, new, promote=request.promote, key=key)
            keep = added.record.object_key == prefix
            return added
        finally:
            if not keep:
                self._discard(prefix)

    @contextlib.contextmanager
    def _staged(self, folder: Path) -> Iterator[Path]:
        """A private copy: what is checked is what is stored, whatever happens to the folder meanwhile."""
        check_present(folder)
        try:
            with tempfile.TemporaryDirectory(dir=self._staging) as name:
                staged = Path(name)
                _copy(folder / CONFIG_FILE, staged / CONFIG_FILE, MAX_CONFIG_BYTES)
                _copy(folder / WEIGHTS_FILE, staged / WEIGHTS_FILE, self._max_upload_bytes)
                yield staged
        except OSError as error:
            raise StoreError(f"the upload can't be staged: {error.strerror or error}") from error

    def _discard(self, key: str) -> None:
        """Best effort: what stays is garbage that nothing refers to."""
        for file in ADAPTER_FILES:
            with contextlib.suppress(StoreError):
                self._objects.delete(f"{key}/{file}")


def check_metadata(metadata: dict[str, object]) -> dict[str, object]:
    """Returns ``metadata`` as it will be read back, or raises RequestInvalid (code ``invalid_metadata``)."""
    try:
        encoded = json.dumps(metadata, allow_nan=False, ensure_ascii=False).encode()
        decoded: object = json.loads(encoded)
    except (TypeError, ValueError, RecursionError) as error:
        raise RequestInvalid(
            f"metadata is not JSON: {error}", code="invalid_metadata", param="metadata"
        ) from error
    if not isinstance(decoded, dict) or len(encoded) > MAX_METADATA_BYTES:
        raise RequestInvalid(
            f"metadata must be a JSON object of at most {MAX_METADATA_BYTES} bytes",
            code="invalid_metadata",
            param="metadata",
        )
    return decoded


def _new_version(checked: CheckedAdapter, key: str, metadata: dict[str, object]) -> NewVersion:
    return NewVersion(
        digest=checked.digest,
        object_key=key,
        config_sha256=checked.config_sha256,
        weights_sha256=checked.weights_sha256,
        size_bytes=checked.size_bytes,
        rank=checked.rank,
        target_modules=checked.target_modules,
        warnings=checked.warnings,
        metadata=metadata,
    )


def _shown(adapter: AdapterName, record: VersionRecord) -> Version:
    return Version(
        user_id=adapter.user_id,
        name=adapter.name,
        version=record.version,
        digest=record.digest,
        base=adapter.base,
        size_bytes=record.size_bytes,
        rank=record.rank,
        target_modules=record.target_modules,
        live=record.live,
        metadata=record.metadata,
        warnings=record.warnings,
        created_at=record.created_at,
    )


def _copy(source: Path, target: Path, max_bytes: int) -> None:
    with source.open("rb") as read, target.open("xb") as write:
        left = max_bytes
        while chunk := read.read(min(CHUNK_BYTES, left + 1)):
            left -= len(chunk)
            if left < 0:
                raise AdapterInvalid(
                    f"{source.name} is larger than {max_bytes} bytes",
                    code="adapter_too_large",
                    param=source.name,
                )
            write.write(chunk)


def _check_number(value: int, name: str = "version") -> int:
    if isinstance(value, bool) or not 1 <= value < 2**31:
        raise RequestInvalid(f"{name} must be a version number from 1 on", code="invalid_version", param=name)
    return value


def _check_limit(limit: int) -> int:
    if not 1 <= limit <= MAX_PAGE:
        raise RequestInvalid(f"limit must be 1 to {MAX_PAGE}", code="invalid_limit", param="limit")
    return limit


def _remove_stale(staging: Path) -> None:
    """Copies that pushes of dead processes left."""
    for path in staging.iterdir():
        with contextlib.suppress(FileNotFoundError):
            status = path.lstat()
            if stat.S_ISDIR(status.st_mode) and time.time() - status.st_mtime > _STALE_S:
                shutil.rmtree(path, ignore_errors=True)
