"""The collector: removes objects that nothing in the catalog refers to and nothing can come to refer to.

An upload's intent is in the catalog before its first object and leaves in the commit that makes the version.
So a prefix without version and intent is garbage for good: no prefix is used twice. Uploads that expired are
ended first, and then asked about once more: either they committed before, or they never can.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import NamedTuple

from tunefleet.adapters_store.catalog import Catalog
from tunefleet.adapters_store.catalog_mark import CatalogMark
from tunefleet.adapters_store.objects import ListedObject, ObjectStore
from tunefleet.adapters_store.steps import reached

BATCH = 500  # uploads that are asked for and held at a time
MAX_KEPT = 20
_OURS = re.compile(r"([^/]+/sha256/[0-9a-f]{2}/[0-9a-f]{64}|staging/[^/]+)/(?P<upload_id>[0-9a-f]{32})")


class Collected(NamedTuple):
    num_objects: int
    num_bytes: int
    kept: tuple[str, ...]  # what stayed though it should go, and why


class _Upload(NamedTuple):
    """The objects under one prefix."""

    upload_id: str
    prefix: str
    keys: tuple[str, ...]
    size_bytes: int
    modified_at: datetime  # the newest of them


class Collector:
    """Blocking; any number may run at once, beside uploads and deletions."""

    def __init__(self, objects: ObjectStore, catalog: Catalog, mark: CatalogMark) -> None:
        self._objects = objects
        self._catalog = catalog
        self._mark = mark

    def collect(
        self, *, min_age_s: float, dry_run: bool = False, should_stop: Callable[[], bool] = lambda: False
    ) -> Collected:
        """Removes garbage older than ``min_age_s``; a dry run only counts it."""
        others = self._mark.others()
        if others:
            return Collected(0, 0, (_shared(others),))
        if not dry_run:
            self._end_expired()
        before = datetime.fromisoformat(self._catalog.timestamp(-min_age_s))
        total = Collected(0, 0, ())
        for upload in itertools.takewhile(lambda _: not should_stop(), self._garbage(before)):
            total = _sum(total, _counted(upload) if dry_run else self._removed(upload))
        return total

    def _end_expired(self) -> None:
        """From here on nothing can commit them."""
        while expired := self._catalog.expired_uploads(BATCH):
            for upload in expired:
                self._catalog.end_upload(upload.upload_id)
                reached("collect:expired")

    def _garbage(self, before: datetime) -> Iterator[_Upload]:
        old = (upload for upload in self._uploads() if upload.modified_at < before)
        while batch := list(itertools.islice(old, BATCH)):
            referenced = self._catalog.referenced([upload.prefix for upload in batch])
            yield from (upload for upload in batch if upload.prefix not in referenced)

    def _uploads(self) -> Iterator[_Upload]:
        """All that is stored of ours, by prefix. Anything else in the bucket is none of our business."""
        for prefix, group in itertools.groupby(self._objects.list(""), _prefix):
            if match := _OURS.fullmatch(prefix):
                found = list(group)
                yield _Upload(
                    match["upload_id"],
                    prefix,
                    tuple(each.key for each in found),
                    sum(each.size_bytes for each in found),
                    max(each.modified_at for each in found),
                )

    def _removed(self, upload: _Upload) -> Collected:
        self._catalog.end_upload(upload.upload_id)  # it may have expired just now
        if self._catalog.referenced([upload.prefix]):
            return Collected(0, 0, ())
        kept: tuple[str, ...] = ()
        for key in upload.keys:
            kept += self._objects.delete(key).kept
            reached("collect:object-gone")
        return Collected(len(upload.keys), upload.size_bytes, kept)


def _prefix(found: ListedObject) -> str:
    return found.key.rpartition("/")[0]


def _counted(upload: _Upload) -> Collected:
    return Collected(len(upload.keys), upload.size_bytes, ())


def _sum(total: Collected, more: Collected) -> Collected:
    return Collected(
        total.num_objects + more.num_objects,
        total.num_bytes + more.num_bytes,
        (total.kept + more.kept)[:MAX_KEPT],
    )


def _shared(others: list[str]) -> str:
    return (
        "another catalog writes to this store too, and may need what this one doesn't know: give each "
        f"deployment a prefix of its own in store_url; if that catalog is gone for good, delete {others[0]}"
    )
