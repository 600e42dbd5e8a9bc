"""What every store does: memory, files, and two real S3 servers."""

from __future__ import annotations

import itertools
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from object_kit import DIGEST, keys, listed, read, written
from s3_servers import S3Server
from tunefleet.adapters_store.file_store import FileStore
from tunefleet.adapters_store.memory_store import MemoryStore
from tunefleet.adapters_store.objects import (
    Deleted,
    ObjectStore,
    PresignedPut,
    catalog_key,
    check_key,
    new_upload_id,
    object_prefix,
    open_store,
    shown,
    staging_prefix,
)
from tunefleet.adapters_store.s3_store import SINGLE_PUT_BYTES, S3Store
from tunefleet.errors import ConfigError, InvalidState, StoreError

_numbers = itertools.count()
S3 = [pytest.param(name, marks=pytest.mark.s3) for name in ("juicefs", "seaweedfs")]


@pytest.fixture(params=["files", "memory", *S3])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ObjectStore]:
    opened = opened_store(request, request.param, tmp_path)
    yield opened
    opened.close()


@pytest.fixture(params=S3)
def s3_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ObjectStore]:
    opened = opened_store(request, request.param, tmp_path)
    yield opened
    opened.close()


def opened_store(request: pytest.FixtureRequest, name: str, folder: Path) -> ObjectStore:
    if name == "memory":
        return MemoryStore()
    if name == "files":
        return FileStore(folder / "objects")
    server: S3Server = request.getfixturevalue(name)
    return open_store(
        server.url(server.shared_bucket, f"test/{next(_numbers)}")
    )  # a prefix is a world of its own


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return written(tmp_path / "source", b"content")


def test_what_is_put_is_read_byte_for_byte(store: ObjectStore, source: Path) -> None:
    store.put("t/sha256/ab/file", source)
    assert read(store, "t/sha256/ab/file") == b"content"


def test_an_empty_object_is_one_too(store: ObjectStore, tmp_path: Path) -> None:
    store.put("t/file", written(tmp_path / "empty", b""))
    assert read(store, "t/file") == b""
    assert listed(store, "t/file").size_bytes == 0


def test_an_object_of_many_parts_is_read_byte_for_byte(store: ObjectStore, tmp_path: Path) -> None:
    content = os.urandom(SINGLE_PUT_BYTES + 1001)
    store.put("t/file", written(tmp_path / "large", content))
    assert read(store, "t/file") == content
    assert listed(store, "t/file").size_bytes == len(content)


@pytest.mark.parametrize(
    ("start", "length", "expected"),
    [(0, 1, b"c"), (0, 7, b"content"), (0, 100, b"content"), (3, 2, b"te"), (3, None, b"tent"), (6, 5, b"t")],
)
def test_a_range_is_opened_with_the_size_of_the_whole(
    store: ObjectStore, source: Path, start: int, length: int | None, expected: bytes
) -> None:
    store.put("t/file", source)
    stored = store.open("t/file", start=start, length=length)
    with stored.stream:
        assert stored.stream.read() == expected
        assert stored.stream.read() == b""
    assert stored.size_bytes == 7


@pytest.mark.parametrize(("start", "length"), [(7, None), (7, 1), (100, 1), (-1, 1), (0, 0), (3, -1)])
def test_a_range_without_a_byte_is_refused(
    store: ObjectStore, source: Path, start: int, length: int | None
) -> None:
    store.put("t/file", source)
    with pytest.raises(StoreError) as refusal:
        store.open("t/file", start=start, length=length)
    assert refusal.value.code == "invalid_range"


def test_an_object_that_is_not_there_is_an_error_of_its_own(store: ObjectStore) -> None:
    for key in ("t/none", f"t/sha256/ab/{DIGEST}/u1/adapter_config.json"):
        with pytest.raises(StoreError) as refusal:
            store.open(key)
        assert refusal.value.code == "object_not_found"
    assert refusal.value.message == "adapter_config.json of ab0000000000 is not in the store"


def test_a_deleted_object_is_gone_and_deleting_again_is_fine(store: ObjectStore, source: Path) -> None:
    store.put("t/a/file", source)
    store.put("t/b/file", source)
    assert store.delete("t/a/file") == Deleted(1)
    assert store.delete("t/a/file") == Deleted(0)
    assert store.delete("never/there") == Deleted(0)
    assert keys(store) == ["t/b/file"]


def test_list_gives_the_keys_of_a_prefix_folder_by_folder(store: ObjectStore, source: Path) -> None:
    stored = ["t/a-b/1", "t/a/1", "t/a/2", "t/a0/1", "t/ab/1", "u/a/1"]
    for key in reversed(stored):
        store.put(key, source)
    found = keys(store)
    assert stored == sorted(found)
    assert found.index("t/a/2") == found.index("t/a/1") + 1
    assert sorted(keys(store, "t/")) == stored[:5]
    assert keys(store, "t/a/") == stored[1:3]
    assert sorted(keys(store, "t/a")) == stored[:5]
    assert keys(store, "v") == []


def test_list_gives_sizes_and_dates(store: ObjectStore, source: Path) -> None:
    store.put("t/file", source)
    found = listed(store, "t/file")
    assert found.size_bytes == 7
    assert found.modified_at.utcoffset() == timedelta(0)
    assert abs(datetime.now(UTC) - found.modified_at) < timedelta(seconds=60)


def test_a_put_without_a_source_leaves_nothing(store: ObjectStore, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="can't be stored"):
        store.put("t/file", tmp_path / "none")
    assert keys(store) == []


def test_a_reader_of_what_was_overwritten_never_sees_a_mix(store: ObjectStore, tmp_path: Path) -> None:
    old, new = b"o" * 3_000_000, b"n" * 3_000_000
    store.put("t/file", written(tmp_path / "source", old))
    stored = store.open("t/file")
    with stored.stream:
        begin = stored.stream.read(1000)
        store.put("t/file", written(tmp_path / "source", new))
        assert begin + stored.stream.read() == old
    with pytest.raises(StoreError) as refusal:
        store.open("t/file", start=1, length=5, etag=stored.etag)
    assert refusal.value.code == "object_changed"


def test_the_same_object_has_the_same_etag(store: ObjectStore, source: Path) -> None:
    store.put("t/file", source)
    first = store.open("t/file")
    first.stream.close()
    assert first.etag is not None
    again = store.open("t/file", start=2, etag=first.etag)
    with again.stream:
        assert (again.stream.read(), again.etag) == (b"ntent", first.etag)


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
    assert len(keys(store, "t/")) == 4


def test_keys_are_the_designs_and_never_repeat() -> None:
    one, two = (object_prefix("default", DIGEST, new_upload_id()) for _ in range(2))
    assert one.startswith(f"default/sha256/ab/{DIGEST}/")
    assert one != two
    assert check_key(f"{one}/adapter_model.safetensors")
    assert staging_prefix("default", "u1") == "staging/default/u1"
    assert catalog_key("c1") == "catalogs/c1"


@pytest.mark.parametrize(
    ("key", "name"),
    [
        (f"tenant/sha256/ab/{DIGEST}/u1/adapter_config.json", "adapter_config.json of ab0000000000"),
        ("staging/tenant/0123456789abcdef/adapter_config.json", "adapter_config.json of 0123456789ab"),
        ("file", "file"),
    ],
)
def test_messages_name_an_object_without_its_tenant(key: str, name: str) -> None:
    assert name == shown(key)


def put_by_url(presigned: PresignedPut | None, content: bytes) -> int:
    """The status that a stranger's PUT gets."""
    assert presigned is not None
    request = urllib.request.Request(presigned.url, content, dict(presigned.headers), method="PUT")
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_a_store_without_urls_says_so(tmp_path: Path) -> None:
    for store in (MemoryStore(), FileStore(tmp_path)):
        assert store.presign_put("t/file", expires_s=60) is None


def test_a_presigned_url_puts_one_object_and_no_other(s3_store: ObjectStore) -> None:
    presigned = s3_store.presign_put("staging/t/u1/adapter_config.json", expires_s=60)
    assert presigned is not None
    assert put_by_url(presigned, b"by a stranger") == 200
    assert read(s3_store, "staging/t/u1/adapter_config.json") == b"by a stranger"
    for url in (presigned.url.replace("u1", "u2"), presigned.url[:-4] + "0000"):
        assert put_by_url(PresignedPut(url, {}), b"x") == 403
    assert keys(s3_store) == ["staging/t/u1/adapter_config.json"]


def test_what_a_stranger_calls_compressed_is_read_as_it_was_put(s3_store: ObjectStore) -> None:
    presigned = s3_store.presign_put("t/file", expires_s=60)
    assert presigned is not None
    assert put_by_url(PresignedPut(presigned.url, {"Content-Encoding": "gzip"}), b"not gzip") == 200
    assert read(s3_store, "t/file") == b"not gzip"


def test_a_presigned_url_expires(s3_store: ObjectStore) -> None:
    presigned = s3_store.presign_put("t/file", expires_s=1)
    gone = threading.Event()
    assert presigned is not None
    while put_by_url(presigned, b"x") != 403:  # the server's clock decides; pytest's timeout bounds it
        gone.wait(0.1)
    for expires_s in (0, 7 * 24 * 3600 + 1):
        with pytest.raises(InvalidState):
            s3_store.presign_put("t/file", expires_s=expires_s)


def test_open_store_knows_its_urls_and_names_what_it_supports(tmp_path: Path, source: Path) -> None:
    open_store(tmp_path.as_uri()).put("t/file", source)
    assert (tmp_path / "objects" / "t" / "file").read_bytes() == b"content"
    assert isinstance(open_store("s3://bucket"), S3Store)  # nothing connects before it must
    for url in ("http://x", "relative/path", "ftp://x/y"):
        with pytest.raises(ConfigError, match="supported: file:///path and s3://") as refusal:
            open_store(url)
        assert refusal.value.param == "store_url"
