"""What tests of object stores share."""

from __future__ import annotations

from pathlib import Path

from tunefleet.adapters_store.objects import ListedObject, ObjectStore
from tunefleet.errors import StoreError

DIGEST = "ab" + "0" * 62


def read(store: ObjectStore, key: str) -> bytes:
    stored = store.open(key)
    with stored.stream:
        content = stored.stream.read()
    assert stored.size_bytes == len(content)
    return content


def keys(store: ObjectStore, prefix: str = "") -> list[str]:
    return [stored.key for stored in store.list(prefix)]


def listed(store: ObjectStore, key: str) -> ListedObject:
    found = [stored for stored in store.list(key) if stored.key == key]
    assert len(found) == 1
    return found[0]


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def code_of(error: StoreError) -> str:
    """The code, once the message is fit for an end user: no path, no secret, and words on what to do."""
    for hidden in ("/", "minioadmin", "127.0.0.1", "X-Amz"):
        assert hidden not in error.message.replace("and/or", "")
    return error.code
