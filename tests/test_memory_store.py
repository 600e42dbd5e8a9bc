from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

from object_kit import listed, read, written
from tunefleet.adapters_store.memory_store import MemoryStore


def test_its_clock_dates_the_objects(tmp_path: Path) -> None:
    then = datetime(2026, 1, 2, tzinfo=UTC)
    store = MemoryStore(now=lambda: then)
    store.put("t/file", written(tmp_path / "source", b"content"))
    assert listed(store, "t/file").modified_at == then


def test_replacing_changes_bytes_and_etag(tmp_path: Path) -> None:
    store = MemoryStore()
    store.put("t/file", written(tmp_path / "source", b"content"))
    before = store.open("t/file").etag
    store.replace("t/file", b"contenT")
    assert read(store, "t/file") == b"contenT"
    assert store.open("t/file").etag != before


def test_two_stores_share_nothing(tmp_path: Path) -> None:
    one, two = MemoryStore(), MemoryStore()
    one.put("t/file", written(tmp_path / "source", b"content"))
    assert list(two.list("")) == []
