"""From a folder to a version: a private copy, checks, objects, the commit.

An intent in the catalog comes before the first object and goes in the transaction that makes the version. It
stands between an upload and the collector: while it is there, its objects stay; once it is gone, nothing can
commit them. A crash leaves objects that nothing refers to, at most.
"""

from __future__ import annotations

import contextlib
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from tunefleet.adapters_store import adapter_objects
from tunefleet.adapters_store.adapter_objects import CHUNK_BYTES
from tunefleet.adapters_store.catalog import Catalog
from tunefleet.adapters_store.catalog_mark import CatalogMark
from tunefleet.adapters_store.lora_config import MAX_CONFIG_BYTES
from tunefleet.adapters_store.objects import ObjectStore, new_upload_id, object_prefix
from tunefleet.adapters_store.records import AdapterName, Added, NewVersion, UploadRecord
from tunefleet.adapters_store.repeats import UploadKey, upload_key
from tunefleet.adapters_store.steps import reached
from tunefleet.adapters_store.validation import CheckedAdapter, check_adapter, check_present
from tunefleet.core import ADAPTER_FILES, CONFIG_FILE, WEIGHTS_FILE, Manifest
from tunefleet.errors import AdapterInvalid, StoreError

INTENT_S = 3600  # an upload of which nothing was heard for so long may be collected
EXTEND_S = INTENT_S / 4
_STALE_S = 24 * 3600.0


class UploadLimits(NamedTuple):
    """What an upload may be at most."""

    max_rank: int
    max_upload_bytes: int  # of the weights

    def max_bytes(self, file: str) -> int:
        return MAX_CONFIG_BYTES if file == CONFIG_FILE else self.max_upload_bytes


class PushRequest(NamedTuple):
    """A push, its arguments checked."""

    adapter: AdapterName
    promote: bool
    metadata: dict[str, object]
    idempotency_key: str | None = None

    def upload_key(self, checked: CheckedAdapter) -> UploadKey | None:
        if self.idempotency_key is None:
            return None
        files = (checked.config_sha256, checked.weights_sha256)
        return upload_key(self.idempotency_key, *files, self.promote, self.metadata)


class Pushing:
    """Blocking, for several threads at once. Lives as long as the store that made it; holds nothing."""

    def __init__(
        self,
        objects: ObjectStore,
        catalog: Catalog,
        manifest: Manifest,
        *,
        staging: Path,
        limits: UploadLimits,
    ) -> None:
        self.limits = limits
        self.mark = CatalogMark(objects, catalog.catalog_id, staging)
        self._objects = objects
        self._catalog = catalog
        self._manifest = manifest
        self._staging = staging
        staging.mkdir(mode=0o700, parents=True, exist_ok=True)
        _remove_stale(staging)

    def push(self, request: PushRequest, folder: Path) -> Added:
        """Stores a folder's adapter, unless it is the newest version or was answered before."""
        check_present(folder)
        with self.private_folder() as staged:
            for file in ADAPTER_FILES:
                with (folder / file).open("rb") as source:
                    self.copy(source, staged / file)
            checked = self.check(staged)
            key = request.upload_key(checked)
            added = self._catalog.answered(request.adapter, checked.digest, key)
            if added is None:
                return self.add(request, checked, staged, key=key)
            self._mend(added, checked, staged)
            return added

    def check(self, folder: Path) -> CheckedAdapter:
        return check_adapter(folder, self._manifest, max_rank=self.limits.max_rank)

    def add(
        self,
        request: PushRequest,
        checked: CheckedAdapter,
        folder: Path,
        *,
        key: UploadKey | None,
        verify: bool = False,
    ) -> Added:
        """Objects first, then the commit. Objects that no version has in the end are removed.

        Args:
            folder: a private copy, just checked.
            verify: read the objects back before they count.
        """
        upload_id = new_upload_id()
        prefix = object_prefix(request.adapter.tenant, checked.digest, upload_id)
        self.begin(request, upload_id, prefix, "push", ttl_s=INTENT_S)
        reached("upload:intent")
        keep = False
        try:
            self._put(prefix, folder, checked, verify=verify, upload_id=upload_id)
            added = self._catalog.add_version(
                request.adapter,
                _new_version(checked, prefix, request.metadata),
                promote=request.promote,
                key=key,
                upload_id=upload_id,
            )
            reached("upload:committed")
            keep = added.record.object_key == prefix
            if not keep:
                self._mend(added, checked, folder)
            return added
        finally:
            if not keep:
                with contextlib.suppress(StoreError):  # what stays is the collector's
                    self._discard(upload_id, prefix)

    def begin(
        self,
        request: PushRequest,
        upload_id: str,
        prefix: str,
        kind: Literal["push", "staged"],
        *,
        ttl_s: int,
    ) -> UploadRecord:
        """Notes an upload before its first object is written below ``prefix``."""
        self.mark.write()
        record = UploadRecord(
            upload_id=upload_id,
            object_key=prefix,
            kind=kind,
            promote=request.promote,
            metadata=request.metadata,
            created_at=self._catalog.timestamp(),
            expires_at=self._catalog.timestamp(ttl_s),
        )
        self._catalog.begin_upload(request.adapter, record)
        return record

    @contextlib.contextmanager
    def private_folder(self) -> Iterator[Path]:
        """A folder of nobody else's: what is checked there is what is stored, whatever happens outside."""
        try:
            with tempfile.TemporaryDirectory(dir=self._staging) as name:
                yield Path(name)
        except OSError as error:
            raise StoreError(f"the upload can't be staged: {error.strerror or error}") from error

    def copy(self, source: BinaryIO, target: Path) -> None:
        """Copies one of the two files, which ``target`` names, up to its limit.

        Raises:
            AdapterInvalid: it is larger (code ``adapter_too_large``).
        """
        left = self.limits.max_bytes(target.name)
        with target.open("xb") as write:
            while chunk := source.read(min(CHUNK_BYTES, left + 1)):
                left -= len(chunk)
                if left < 0:
                    raise self.too_large(target.name)
                write.write(chunk)

    def too_large(self, file: str) -> AdapterInvalid:
        return AdapterInvalid(
            f"{file} is larger than {self.limits.max_bytes(file)} bytes", code="adapter_too_large", param=file
        )

    def _put(
        self, prefix: str, folder: Path, checked: CheckedAdapter, *, verify: bool, upload_id: str
    ) -> None:
        def extend() -> None:
            self._catalog.extend_upload(upload_id, self._catalog.timestamp(INTENT_S))

        with _repeatedly(EXTEND_S, extend):
            adapter_objects.put(self._objects, prefix, folder)
            if verify:
                for file, sha256 in _sha256s(checked).items():
                    adapter_objects.verify(self._objects, f"{prefix}/{file}", sha256)
                reached("upload:verified")

    def _mend(self, added: Added, checked: CheckedAdapter, folder: Path) -> None:
        """Who uploads a version's bytes again also heals the store's copy, if that was lost or changed."""
        record = added.record
        ours = _sha256s(checked)
        same = {file: sha256 for file, sha256 in _sha256s(record).items() if ours[file] == sha256}

        def is_wanted() -> bool:
            return bool(self._catalog.referenced([record.object_key]))

        adapter_objects.mend(self._objects, record.object_key, folder, same, is_wanted)

    def _discard(self, upload_id: str, prefix: str) -> None:
        """Ends the intent, after which nothing can commit, then removes what was not committed.

        In this order, and asking again: the answer to a commit may be lost where the commit is not.
        """
        self._catalog.end_upload(upload_id)
        reached("discard:intent-ended")
        if prefix not in self._catalog.referenced([prefix]):
            adapter_objects.delete(self._objects, prefix, step="discard:object-gone")


@contextlib.contextmanager
def _repeatedly(interval_s: float, work: Callable[[], object]) -> Iterator[None]:
    """Does ``work`` every so often beside the block, in a thread of its own."""
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(interval_s):
            with contextlib.suppress(StoreError):  # the next time may do; the commit decides
                work()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _sha256s(adapter: CheckedAdapter | NewVersion) -> dict[str, str]:
    return {CONFIG_FILE: adapter.config_sha256, WEIGHTS_FILE: adapter.weights_sha256}


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


def _remove_stale(staging: Path) -> None:
    """Copies that pushes of dead processes left."""
    for path in staging.iterdir():
        with contextlib.suppress(FileNotFoundError):
            status = path.lstat()
            if stat.S_ISDIR(status.st_mode) and time.time() - status.st_mtime > _STALE_S:
                shutil.rmtree(path, ignore_errors=True)
