"""Downloads: both files or none, and only as they were uploaded."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from tunefleet.arriving import ArrivingFile, arriving
from tunefleet.errors import RequestInvalid, StoreError


def write(path: Path, content: bytes, etag: str | None = None) -> None:
    with ArrivingFile(path) as file:
        file.write(content[:2])
        file.write(content[2:])
        file.check(etag or f'"{hashlib.sha256(content).hexdigest()}"')


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_files_appear_together_and_replace_what_was_there(tmp_path: Path) -> None:
    into = tmp_path / "new" / "folder"
    with arriving(into) as folder:
        write(folder / "a", b"one")
        write(folder / "b", b"two")
        assert [folder.name] == names(into)
    assert names(into) == ["a", "b"]
    with arriving(into) as folder:
        write(folder / "a", b"three")
    assert ((into / "a").read_bytes(), (into / "b").read_bytes()) == (b"three", b"two")


def test_other_bytes_are_an_error_and_nothing_of_them_stays(tmp_path: Path) -> None:
    def download() -> None:
        with arriving(tmp_path) as folder:
            write(folder / "a", b"one")
            write(folder / "b", b"two", etag='"0"')

    with pytest.raises(StoreError, match="download it again"):
        download()
    assert names(tmp_path) == []


def test_a_place_that_can_not_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(RequestInvalid, match="can't write to"), arriving(tmp_path / "file"):
        pass
