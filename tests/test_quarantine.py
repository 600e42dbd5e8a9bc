from __future__ import annotations

from pathlib import Path

from tunefleet.adapters_store.quarantine import MAX_COPIES, Quarantine


def bad_copy(folder: Path, name: str, size: int = 10) -> Path:
    copy = folder / name
    copy.mkdir()
    (copy / "weights").write_bytes(b"x" * size)
    return copy


def kept(folder: Path) -> list[str]:
    return [path.name.partition("-")[2] for path in sorted((folder / "q").iterdir())]


def test_the_newest_few_copies_are_kept(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "q", 10**6)
    for number in range(MAX_COPIES + 3):
        quarantine.take(bad_copy(tmp_path, f"copy{number}"), f"d{number}")
    assert kept(tmp_path) == [f"d{number}" for number in range(3, MAX_COPIES + 3)]


def test_no_more_bytes_are_kept_than_allowed(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "q", 25)
    for number in range(3):
        quarantine.take(bad_copy(tmp_path, f"copy{number}"), f"d{number}")
    assert kept(tmp_path) == ["d1", "d2"]
    quarantine.take(bad_copy(tmp_path, "huge", 26), "huge")
    assert kept(tmp_path) == []


def test_the_same_copy_may_come_twice(tmp_path: Path) -> None:
    quarantine = Quarantine(tmp_path / "q", 100)
    for _ in range(2):
        quarantine.take(bad_copy(tmp_path, "copy"), "d")
    assert kept(tmp_path) == ["d", "d"]
