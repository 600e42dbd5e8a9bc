"""The adapters of a deployment, as routers use them: upload, resolve, promote, delete, watch.

What a call changes is one commit in the catalog; objects come before it and go after it. So whatever dies
leaves nothing half: an upload that wasn't acknowledged is garbage, a deletion that was goes on.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import NamedTuple

from tunefleet.adapters_store import views
from tunefleet.adapters_store.arguments import check_metadata, check_number
from tunefleet.adapters_store.async_catalog import AsyncCatalog, Resolved
from tunefleet.adapters_store.catalog import Catalog
from tunefleet.adapters_store.collecting import Collected, Collector
from tunefleet.adapters_store.deleting import WAIT_S, Deletions
from tunefleet.adapters_store.objects import ObjectStore, open_store
from tunefleet.adapters_store.pushing import Pushing, PushRequest, UploadLimits
from tunefleet.adapters_store.records import AdapterName, Added, DeletionRecord
from tunefleet.adapters_store.repeats import check_idempotency_key
from tunefleet.adapters_store.staged_uploads import TTL_S, StagedUploads, check_ttl
from tunefleet.adapters_store.steps import reached
from tunefleet.adapters_store.stored_file import StoredFile
from tunefleet.adapters_store.threads import Runner
from tunefleet.adapters_store.watching import INTERVALS, Intervals, MachineSide, Watch, Watched
from tunefleet.config import Options
from tunefleet.core import (
    CONFIG_FILE,
    DEFAULT_ADAPTER,
    DEFAULT_TENANT,
    WEIGHTS_FILE,
    Manifest,
    Receipt,
    UploadTicket,
    Version,
    check_tenant,
    check_user_id,
)
from tunefleet.errors import AdapterNotFound

__all__ = ["AdapterStore", "Pushed", "Resolved"]

NUM_TRANSFERS = 4  # threads for uploads and downloads, which may take long
_DELETION_ID = re.compile(r"[0-9a-f-]{36}")


class Pushed(NamedTuple):
    version: Version
    created: bool  # False: these bytes were the newest version already


class AdapterStore(AsyncCatalog):
    """Objects and catalog together. Open one per process; ``close`` it when the process stops serving.

    Errors as those of ``AsyncCatalog``; StoreError too when the objects are out of reach.
    """

    def __init__(
        self,
        objects: ObjectStore,
        catalog: Catalog,
        manifest: Manifest,
        *,
        staging: Path,
        max_rank: int,
        max_upload_bytes: int,
        deletion_wait_s: float = WAIT_S,
    ) -> None:
        super().__init__(catalog, manifest.base_id)
        self._objects = objects
        self._transfer = Runner(NUM_TRANSFERS)
        self._router_id = uuid.uuid4().hex
        limits = UploadLimits(max_rank, max_upload_bytes)
        self._pushing = Pushing(objects, catalog, manifest, staging=staging, limits=limits)
        self._staged = StagedUploads(objects, catalog, self._pushing)
        self._deletions = Deletions(
            objects,
            catalog,
            self._router_id,
            lookup=self._lookup,
            transfer=self._transfer,
            on_removed=self._wakes.deleted.set,
            wait_s=deletion_wait_s,
        )
        self._collector = Collector(objects, catalog, self._pushing.mark)

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
        await self._deletions.close()
        await self._lookup(self._catalog.close)
        await self._lookup(self._objects.close)

    def watch(
        self, machine: MachineSide, intervals: Intervals = INTERVALS
    ) -> AbstractAsyncContextManager[Watch]:
        """This router's background work, while it serves: see ``watching``."""
        return self.watcher(machine, intervals).running()

    def watcher(
        self,
        machine: MachineSide,
        intervals: Intervals = INTERVALS,
        clock: Callable[[], float] = time.monotonic,
    ) -> Watch:
        """The same, to go round by round."""
        watched = Watched(
            catalog=self._catalog,
            base=self._base,
            deletions=self._deletions,
            collector=self._collector,
            router_id=self._router_id,
            wakes=self._wakes,
            lookup=self._lookup,
            transfer=self._transfer,
        )
        return Watch(watched, machine, intervals, clock)

    async def collect(self, *, min_age_s: float, dry_run: bool = False) -> Collected:
        """Removes objects that nothing refers to and that are older; a dry run only counts them."""
        return await self._transfer.to_the_end(
            lambda: self._collector.collect(min_age_s=min_age_s, dry_run=dry_run)
        )

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
            AdapterConflict: the key came with another upload (code ``idempotency_key_reused``), or the user
                was deleted meanwhile (``upload_expired``).
            StoreError: it could not be stored; nothing of it is visible.
        """
        adapter = self._named(user_id, name, tenant)
        key = None if idempotency_key is None else check_idempotency_key(idempotency_key)
        request = PushRequest(adapter, promote, check_metadata(metadata or {}), key)
        added = await self._transfer.to_the_end(lambda: self._pushing.push(request, folder))
        return self._pushed(adapter, added)

    async def begin_upload(
        self,
        user_id: str,
        *,
        name: str = DEFAULT_ADAPTER,
        tenant: str = DEFAULT_TENANT,
        promote: bool = True,
        metadata: dict[str, object] | None = None,
        ttl_s: int = TTL_S,
    ) -> UploadTicket:
        """Where to put the files of an upload. A URL is empty where the store has none: ``put_file`` then."""
        adapter = self._named(user_id, name, tenant)
        request = PushRequest(adapter, promote, check_metadata(metadata or {}))
        ttl = check_ttl(ttl_s)
        return await self._transfer.to_the_end(lambda: self._staged.begin(request, ttl))

    async def put_file(
        self,
        user_id: str,
        upload_id: str,
        file: str,
        path: Path,
        *,
        name: str = DEFAULT_ADAPTER,
        tenant: str = DEFAULT_TENANT,
    ) -> None:
        """Stages a file of an upload that began; the last one put counts."""
        adapter = self._named(user_id, name, tenant)
        await self._transfer.to_the_end(lambda: self._staged.put(adapter, upload_id, file, path))

    async def complete_upload(
        self,
        user_id: str,
        upload_id: str,
        *,
        name: str = DEFAULT_ADAPTER,
        tenant: str = DEFAULT_TENANT,
        idempotency_key: str | None = None,
    ) -> Pushed:
        """Makes the staged files the user's next version. Completed again, it answers the same for a day.

        The upload's id is its idempotency key already; another one is allowed and changes nothing.

        Raises:
            AdapterInvalid: what is wrong with the files, or which is missing (code ``missing_file``): put it
                and complete again.
            AdapterNotFound: no such upload of this user, or not any more (code ``upload_not_found``).
        """
        adapter = self._named(user_id, name, tenant)
        if idempotency_key is not None:
            check_idempotency_key(idempotency_key)
        added = await self._transfer.to_the_end(lambda: self._staged.complete(adapter, upload_id))
        return self._pushed(adapter, added)

    async def open_file(
        self, user_id: str, n: int, file: str, *, name: str = DEFAULT_ADAPTER, tenant: str = DEFAULT_TENANT
    ) -> StoredFile:
        """A file of a version, to stream byte for byte."""
        adapter = self._named(user_id, name, tenant)
        number = check_number(n)
        record = await self._lookup(lambda: self._catalog.version(adapter, number))
        sha256 = {CONFIG_FILE: record.config_sha256, WEIGHTS_FILE: record.weights_sha256}.get(file)
        if sha256 is None:
            raise AdapterNotFound(
                f"a version's files are {CONFIG_FILE} and {WEIGHTS_FILE}", code="file_not_found", param="file"
            )
        stored = await self._transfer(lambda: self._objects.open(f"{record.object_key}/{file}"))
        return StoredFile(stored.stream, stored.size_bytes, sha256, self._transfer)

    async def delete_version(
        self, user_id: str, n: int, *, name: str = DEFAULT_ADAPTER, tenant: str = DEFAULT_TENANT
    ) -> Receipt:
        """Removes a version from every place; see ``delete_user`` about the receipt.

        Raises:
            AdapterConflict: it is live or the canary (codes ``version_is_live``, ``version_is_canary``).
        """
        adapter = self._named(user_id, name, tenant)
        number = check_number(n)
        return await self._deleted(lambda: self._catalog.delete_version(adapter, number))

    async def delete_user(self, user_id: str, *, tenant: str = DEFAULT_TENANT) -> Receipt:
        """Removes all that is a user's from every place: catalog, objects, copies on machines, open streams.

        From the first commit on the user is gone. The rest is waited for, for some seconds; a receipt that
        is ``pending`` then goes on by itself, whatever dies: ask ``deletion``.
        """
        check_tenant(tenant)
        check_user_id(user_id)
        return await self._deleted(lambda: self._catalog.delete_user(tenant, user_id))

    async def deletion(self, deletion_id: str, *, tenant: str = DEFAULT_TENANT) -> Receipt:
        """Raises AdapterNotFound (code ``deletion_not_found``)."""
        if not _DELETION_ID.fullmatch(deletion_id):
            raise AdapterNotFound(
                "deletion_id must be one that a deletion answered with",
                code="deletion_not_found",
                param="deletion_id",
            )
        return views.receipt(
            await self._lookup(lambda: self._catalog.deletion(check_tenant(tenant), deletion_id))
        )

    async def _deleted(self, mark: Callable[[], DeletionRecord]) -> Receipt:
        def marked() -> DeletionRecord:
            record = mark()
            reached("delete:marked")
            return record

        record = await self._lookup.to_the_end(marked)
        self._wakes.deleted.set()
        self._wakes.pinned.set()
        return await self._deletions.settle(record)

    def _pushed(self, adapter: AdapterName, added: Added) -> Pushed:
        self._wakes.pinned.set()
        return Pushed(views.version(adapter, added.record), added.created)
