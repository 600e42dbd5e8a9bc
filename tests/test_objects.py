from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tunefleet.adapters_store.downloads import download
from tunefleet.adapters_store.file_store import FileStore
from tunefleet.adapters_store.memory_store import MemoryStore
from tunefleet.adapters_store.objects import (
    ListedObject,
    ObjectStore,
    check_key,
    new_upload_id,
    object_prefix,
    open_store,
)
from tunefleet.errors import ConfigError, StoreError

DIGEST = "ab" + "0" * 62


@pytest.fixture(params=["files", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ObjectStore]:
    opened: ObjectStore = FileStore(tmp_path / "objects") if request.param == "files" else MemoryStore()
    yield opened
    opened.close()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_bytes(b"content")
    return path


def read(store: ObjectStore, key: str) -> bytes:
    stored = store.open(key)
    with stored.stream:
        content = stored.stream.read()
    assert stored.size_bytes == len(content)
    return content


def keys(listed: Iterator[ListedObject]) -> list[str]:
    return [stored.key for stored in listed]


def test_what_is_put_is_read_byte_for_byte(store: ObjectStore, source: Path) -> None:
    store.put("t/sha256/ab/file", source)
    assert read(store, "t/sha256/ab/file") == b"content"


def test_an_object_that_is_not_there_is_an_error_of_its_own(store: ObjectStore) -> None:
    with pytest.raises(StoreError) as refusal:
        store.open("t/none")
    assert refusal.value.code == "object_not_found"


def test_a_deleted_object_is_gone_and_deleting_again_is_fine(store: ObjectStore, source: Path) -> None:
    store.put("t/a/file", source)
    store.put("t/b/file", source)
    for _ in range(2):
        store.delete("t/a/file")
    assert keys(store.list("")) == ["t/b/file"]


def test_list_gives_the_sorted_keys_of_a_prefix(store: ObjectStore, source: Path) -> None:
    stored = ["t/a-b/1", "t/a/1", "t/a/2", "t/a0/1", "t/ab/1", "u/a/1"]
    for key in reversed(stored):
        store.put(key, source)
    assert keys(store.list("")) == stored
    assert keys(store.list("t/")) == stored[:5]
    assert keys(store.list("t/a/")) == stored[1:3]
    assert keys(store.list("t/a")) == stored[:5]
    assert keys(store.list("v")) == []


def test_a_put_without_a_source_leaves_nothing(store: ObjectStore, tmp_path: Path) -> None:
    with pytest.raises(StoreError):
        store.put("t/file", tmp_path / "none")
    assert keys(store.list("")) == []


HOSTILE_KEYS = [
    *(
        "",
        "/",
        "/etc/passwd",
        "t//f",
        "t/",
        "../x",
        "t/../x",
        "t/./x",
        ".",
        "..",
        ".incoming/x",
        ".lock",
        "t/.x",
    ),
    *(".lock", "t\\x", "t/a\0b", "t/a\nb", "t/ä", "t/a b", "t/" + "x" * 201, "/".join(["x" * 100] * 11)),
]


@pytest.mark.parametrize("key", HOSTILE_KEYS)
def test_a_key_that_might_leave_the_store_is_refused(store: ObjectStore, source: Path, key: str) -> None:
    for call in (lambda: store.put(key, source), lambda: store.open(key), lambda: store.delete(key)):
        with pytest.raises(StoreError) as refusal:
            call()
        assert refusal.value.code == "invalid_key"


def test_many_writers_and_deleters_of_one_folder_lose_nothing(store: ObjectStore, source: Path) -> None:
    errors: list[Exception] = []

    def churn(number: int) -> None:
        try:
            for _ in range(20):
                store.put(f"t/sha256/ab/{DIGEST}/{number}/file", source)
                assert read(store, f"t/sha256/ab/{DIGEST}/{number}/file") == b"content"
                store.delete(f"t/sha256/ab/{DIGEST}/{number}/file")
            store.put(f"t/sha256/ab/{DIGEST}/{number}/file", source)
        except Exception as error:  # to fail in the test's thread
            errors.append(error)

    threads = [threading.Thread(target=churn, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(keys(store.list("t/"))) == 4


def test_keys_are_the_designs_and_never_repeat() -> None:
    one, two = (object_prefix("default", DIGEST, new_upload_id()) for _ in range(2))
    assert one.startswith(f"default/sha256/ab/{DIGEST}/")
    assert one != two
    assert check_key(f"{one}/adapter_model.safetensors")


def test_a_download_is_a_new_file_of_bounded_size(store: ObjectStore, source: Path, tmp_path: Path) -> None:
    store.put("t/file", source)
    target = tmp_path / "target"
    with pytest.raises(StoreError, match="at most 6"):
        download(store, "t/file", target, max_bytes=6)
    assert not target.exists()
    download(store, "t/file", target, max_bytes=7)
    assert target.read_bytes() == b"content"


def test_a_download_to_nowhere_is_a_store_error(store: ObjectStore, source: Path, tmp_path: Path) -> None:
    store.put("t/file", source)
    with pytest.raises(StoreError, match="copied to disk"):
        download(store, "t/file", tmp_path / "none" / "target", max_bytes=7)


def test_a_file_store_survives_reopening_and_keeps_others_out(source: Path, tmp_path: Path) -> None:
    FileStore(tmp_path / "objects").put("t/file", source)
    assert read(FileStore(tmp_path / "objects"), "t/file") == b"content"
    assert (tmp_path / "objects" / "t").stat().st_mode & 0o777 == 0o700


def test_a_dead_processs_unfinished_put_is_removed_later_not_a_living_ones(tmp_path: Path) -> None:
    FileStore(tmp_path)
    dead, alive = tmp_path / ".incoming" / "dead", tmp_path / ".incoming" / "alive"
    for path in (dead, alive):
        path.write_bytes(b"half")
    os.utime(dead, (0, 0))
    assert keys(FileStore(tmp_path).list("")) == []
    assert list((tmp_path / ".incoming").iterdir()) == [alive]


def test_a_failed_put_leaves_nothing_behind(tmp_path: Path, source: Path) -> None:
    store = FileStore(tmp_path / "objects")
    (tmp_path / "objects" / "t").write_bytes(b"a file in the folder's place")
    with pytest.raises(StoreError):
        store.put("t/file", source)
    assert list((tmp_path / "objects" / ".incoming").iterdir()) == []


def test_an_unusable_folder_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="can't be used"):
        FileStore(tmp_path / "file")


def test_open_store_knows_file_urls_and_names_what_it_supports(tmp_path: Path, source: Path) -> None:
    open_store(tmp_path.as_uri()).put("t/file", source)
    assert (tmp_path / "objects" / "t" / "file").read_bytes() == b"content"
    for url in ("http://x", "relative/path", "ftp://x/y"):
        with pytest.raises(ConfigError, match="supported: file:///path") as refusal:
            open_store(url)
        assert refusal.value.param == "store_url"
