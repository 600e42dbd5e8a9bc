from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tunefleet.adapters_store.host_tier import HostTier, default_host_dir
from tunefleet.errors import InvalidState

DIGEST = "ab" * 32


def test_the_host_dir_is_private_memory_or_beside_the_disk_tier(tmp_path: Path) -> None:
    disk = tmp_path / "adapters"
    chosen = default_host_dir(disk, 1)
    assert chosen == default_host_dir(disk, 1) != default_host_dir(tmp_path / "other", 1)
    assert chosen.parent.stat().st_mode & 0o777 == 0o700 or chosen == tmp_path / "adapters-host"
    assert default_host_dir(disk, 2**60) == tmp_path / "adapters-host"


def test_it_starts_empty_and_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "host"
    folder.mkdir()
    (folder / "leftover").write_bytes(b"of a crash")
    tier = HostTier(folder, 100)
    assert list(folder.iterdir()) == []
    asyncio.run(tier.close())
    assert not folder.exists()


def test_books_and_folder_are_compared(tmp_path: Path) -> None:
    async def scenario() -> None:
        tier = HostTier(tmp_path / "host", 100)
        await tier.book(DIGEST, 3, lambda _: False)
        with pytest.raises(InvalidState, match="differs from its books"):
            tier.check()
        written = tier.new_path()
        written.write_bytes(b"abc")
        await tier.publish(written, DIGEST)
        tier.check()
        assert tier.is_there(DIGEST)
        (tmp_path / "host" / ".gone-1").write_bytes(b"")
        with pytest.raises(InvalidState, match="removed copies are left"):
            tier.check()

    asyncio.run(scenario())


def test_a_mapped_file_stays_readable_when_it_is_taken_out(tmp_path: Path) -> None:
    async def scenario() -> None:
        tier = HostTier(tmp_path / "host", 100)
        await tier.book(DIGEST, 3, lambda _: False)
        written = tier.new_path()
        written.write_bytes(b"abc")
        await tier.publish(written, DIGEST)
        with tier.path(DIGEST).open("rb") as mapped:
            await tier.remove([tier.take_out(DIGEST)])
            assert mapped.read() == b"abc"
        assert not tier.is_there(DIGEST)
        assert tier.take_out(DIGEST) is None
        tier.check()

    asyncio.run(scenario())
