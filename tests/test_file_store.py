from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from object_kit import keys, read, written
from tunefleet.adapters_store.file_store import FileStore
from tunefleet.errors import StoreError


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return written(tmp_path / "source", b"content")


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
    assert keys(FileStore(tmp_path)) == []
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


def test_files_that_are_no_keys_are_not_listed(tmp_path: Path, source: Path) -> None:
    store = FileStore(tmp_path / "objects")
    store.put("t/file", source)
    for stray in (".hidden", "with space", "t/.lock~"):
        written(tmp_path / "objects" / stray, b"")
    assert keys(store) == ["t/file"]


def test_a_full_disk_is_named(tmp_path: Path) -> None:
    """A file's size limit stands for the disk: both fail in the write."""
    source = written(tmp_path / "source", b"x" * 4096)
    program = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from tunefleet.adapters_store.file_store import FileStore\n"
        "from tunefleet.errors import StoreError\n"
        "store = FileStore(Path(sys.argv[1]))\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))\n"
        "try: store.put('t/file', Path(sys.argv[2]))\n"
        "except StoreError as error: sys.exit(error.code)\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "objects"), str(source)],
        capture_output=True,
        text=True,
    )
    assert ran.stderr.strip() == "disk_full"
    assert list((tmp_path / "objects" / ".incoming").iterdir()) == []


def test_a_killed_put_leaves_no_object(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "source")
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tunefleet.adapters_store.file_store import FileStore\n"
        "FileStore(Path(sys.argv[1])).put('t/file', Path(sys.argv[2]))\n"
    )
    putting = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "objects"), str(tmp_path / "source")]
    )
    with (tmp_path / "source").open("wb") as source:  # returns once the put reads
        source.write(b"half")
        source.flush()
        putting.send_signal(signal.SIGKILL)
        assert putting.wait(20) == -signal.SIGKILL
    store = FileStore(tmp_path / "objects")
    assert keys(store) == []
    assert len(list((tmp_path / "objects" / ".incoming").iterdir())) == 1  # collected by its age
    store.put("t/file", written(tmp_path / "again", b"whole"))
    assert read(store, "t/file") == b"whole"
