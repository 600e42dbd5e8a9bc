"""The objects of one stored adapter: written, read back, and mended from an upload of the same bytes."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

from tunefleet.adapters_store.objects import ObjectStore
from tunefleet.adapters_store.steps import reached
from tunefleet.core import ADAPTER_FILES, CONFIG_FILE, WEIGHTS_FILE
from tunefleet.errors import StoreError

CHUNK_BYTES = 256 * 1024
_BAD_CODES = {"invalid_range", "object_corrupt", "object_not_found", "short_read"}
_FILE_STEPS = {CONFIG_FILE: "upload:config-put", WEIGHTS_FILE: "upload:weights-put"}

log = logging.getLogger(__name__)


def put(objects: ObjectStore, prefix: str, folder: Path) -> None:
    for file in ADAPTER_FILES:
        objects.put(f"{prefix}/{file}", folder / file)
        reached(_FILE_STEPS[file])


def delete(objects: ObjectStore, prefix: str, *, step: str) -> None:
    for file in ADAPTER_FILES:
        objects.delete(f"{prefix}/{file}")
        reached(step)


def verify(objects: ObjectStore, key: str, sha256: str) -> None:
    """Raises StoreError (``object_corrupt``): what the store gives is not what it got."""
    actual = hashlib.sha256()
    with objects.open(key).stream as stream:
        while chunk := stream.read(CHUNK_BYTES):
            actual.update(chunk)
    if actual.hexdigest() != sha256:
        raise StoreError(
            f"the store's copy of {key.rpartition('/')[2]} is not what was uploaded: try again",
            code="object_corrupt",
        )


def mend(
    objects: ObjectStore, prefix: str, folder: Path, sha256s: dict[str, str], is_wanted: Callable[[], bool]
) -> None:
    """Writes again what the store lost or changed of a version whose files ``folder`` has.

    Args:
        sha256s: what each file of the version is; ``folder`` is checked to have the same.
        is_wanted: whether the version is still there. Asked after a write: an object that came back
            after its version's deletion must not stay.
    """
    for file, sha256 in sha256s.items():
        key = f"{prefix}/{file}"
        if _is_good(objects, key, sha256):
            continue
        log.warning("the store's copy of %s is missing or wrong: writing it again", key)
        objects.put(key, folder / file)
        if not is_wanted():
            objects.delete(key)


def _is_good(objects: ObjectStore, key: str, sha256: str) -> bool:
    try:
        verify(objects, key, sha256)
    except StoreError as error:
        if error.code not in _BAD_CODES:
            raise
        return False
    return True
