from __future__ import annotations

import gzip
import os
import posixpath
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import strategies as st

import hazards
from adapter_factory import make_adapter, make_manifest
from faults import no_file_above
from malformed.archives import (
    BAD_NAMES,
    LINKS,
    NO_ARCHIVES,
    encrypted_zip,
    special,
    tar_of,
    zip_of,
    zip_with_a_link,
)
from malformed.generated import (
    Member,
    cut_or_spliced,
    flipped,
    lying_tar,
    lying_zip,
    member_lists,
    tar_with,
    zip_with,
)
from tunefleet.adapters_store.archives import unpack
from tunefleet.adapters_store.lora_config import MAX_CONFIG_BYTES
from tunefleet.adapters_store.tar_stream import MAX_MEMBERS
from tunefleet.core import CONFIG_FILE as CONFIG
from tunefleet.core import WEIGHTS_FILE as WEIGHTS
from tunefleet.errors import AdapterInvalid, StoreError

PAIR = {CONFIG: b"{}", WEIGHTS: b"weights"}
LIMIT = 100_000


def unpacked(tmp_path: Path, raw: bytes, limit: int = LIMIT) -> dict[str, bytes]:
    archive, into = tmp_path / "archive", tmp_path / "into"
    archive.write_bytes(raw)
    shutil.rmtree(into, ignore_errors=True)
    into.mkdir()
    unpack(archive, into, limit)
    return {path.name: path.read_bytes() for path in into.iterdir()}


def refusal_of(tmp_path: Path, raw: bytes, limit: int = LIMIT) -> AdapterInvalid:
    with pytest.raises(AdapterInvalid) as refusal:
        unpacked(tmp_path, raw, limit)
    written = {path.name for path in (tmp_path / "into").iterdir()}
    assert written <= PAIR.keys()
    assert {path.name for path in tmp_path.iterdir()} == {"archive", "into"}
    return refusal.value


MAKERS: dict[str, Callable[[dict[str, bytes]], bytes]] = {
    "tar": tar_of,
    "tar, GNU": lambda files: tar_of(files, format=tarfile.GNU_FORMAT),
    "tar, ustar": lambda files: tar_of(files, format=tarfile.USTAR_FORMAT),
    "tar.gz": lambda files: tar_of(files, mode="w:gz"),
    "zip": zip_of,
    "zip, stored": lambda files: zip_of(files, zipfile.ZIP_STORED),
}


@pytest.fixture(params=MAKERS.values(), ids=MAKERS.keys())
def make(request: pytest.FixtureRequest) -> Callable[[dict[str, bytes]], bytes]:
    maker: Callable[[dict[str, bytes]], bytes] = request.param
    return maker


Make = Callable[[dict[str, bytes]], bytes]


@pytest.mark.parametrize("folder", ["", "./", "adapter/", "./adapter/", "f" * 90 + "/"])
def test_the_two_files_come_out_and_nothing_else(tmp_path: Path, make: Make, folder: str) -> None:
    others = {
        f"{folder}README.md": b"# hi",
        f"{folder}tokenizer.json": b"{}",
        "._adapter_config.json": b"mac",
    }
    files = {f"{folder}{name}": content for name, content in PAIR.items()}
    assert unpacked(tmp_path, make({**others, **files, f"{folder}optimizer.pt": b"x"})) == PAIR


@pytest.mark.parametrize("kind", ["tar", "gztar", "zip"])
def test_what_the_standard_library_packs_is_unpacked(tmp_path: Path, kind: str) -> None:
    folder = make_adapter(tmp_path / "adapter", make_manifest())
    archive = shutil.make_archive(str(tmp_path / "packed"), kind, tmp_path, "adapter")
    (tmp_path / "into").mkdir()
    unpack(Path(archive), tmp_path / "into", LIMIT)
    for name in PAIR:
        assert (tmp_path / "into" / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_that_are_not_ascii_are_read(tmp_path: Path, format: int) -> None:
    files = {f"{'ü' * 100}/{name}": content for name, content in PAIR.items()}
    assert unpacked(tmp_path, tar_of(files, format=format)) == PAIR


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_leads_out_is_refused(tmp_path: Path, make: Make, name: str) -> None:
    refusal = refusal_of(tmp_path, make({**PAIR, name: b"x"}))
    assert (refusal.code, refusal.param) == ("invalid_archive", name)


@pytest.mark.parametrize(("info", "what"), LINKS)
def test_links_and_devices_in_a_tar_are_refused(tmp_path: Path, info: tarfile.TarInfo, what: str) -> None:
    refusal = refusal_of(tmp_path, tar_of(PAIR, info))
    assert refusal.code == "invalid_archive"
    assert what in refusal.message
    assert info.name in refusal.message


def test_a_link_in_a_zip_is_refused(tmp_path: Path) -> None:
    assert "'link' is a link" in refusal_of(tmp_path, zip_with_a_link(PAIR)).message


def test_an_encrypted_zip_is_refused(tmp_path: Path) -> None:
    assert "encrypted" in refusal_of(tmp_path, encrypted_zip(PAIR)).message


@pytest.mark.parametrize("compression", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_another_compression_in_a_zip_is_refused(tmp_path: Path, compression: int) -> None:
    assert "another method" in refusal_of(tmp_path, zip_of(PAIR, compression)).message


def test_the_same_file_twice_is_refused(tmp_path: Path, make: Make) -> None:
    assert "two adapters" in refusal_of(tmp_path, make({**PAIR, f"checkpoint-100/{CONFIG}": b"{}"})).message
    assert "twice" in refusal_of(tmp_path, make({**PAIR, f"./{CONFIG}": b"{}"})).message


def test_the_same_name_twice_in_a_tar_is_refused(tmp_path: Path) -> None:
    info = special("x", tarfile.REGTYPE)
    assert "twice" in refusal_of(tmp_path, tar_of(PAIR, info, info)).message


def test_files_too_deep_or_in_two_folders_are_refused(tmp_path: Path, make: Make) -> None:
    deep = {f"a/b/{name}": content for name, content in PAIR.items()}
    assert "deeper than one folder" in refusal_of(tmp_path, make(deep)).message
    assert "same folder" in refusal_of(tmp_path, make({f"a/{CONFIG}": b"{}", f"b/{WEIGHTS}": b""})).message


@pytest.mark.parametrize("missing", [CONFIG, WEIGHTS])
def test_a_missing_file_is_named(tmp_path: Path, make: Make, missing: str) -> None:
    files = {name: content for name, content in PAIR.items() if name != missing}
    refusal = refusal_of(tmp_path, make({**files, "other": b""}))
    assert (refusal.code, refusal.param) == ("missing_file", missing)


def test_a_pickle_is_refused_by_name_unless_safetensors_are_there(tmp_path: Path, make: Make) -> None:
    refusal = refusal_of(tmp_path, make({CONFIG: b"{}", "adapter_model.bin": b"\x80\x04."}))
    assert (refusal.code, refusal.param) == ("pickle_refused", "adapter_model.bin")
    assert unpacked(tmp_path, make({**PAIR, "adapter_model.bin": b"\x80\x04."})) == PAIR


def test_a_bomb_is_stopped_at_the_limit_of_real_output(tmp_path: Path, make: Make) -> None:
    refusal = refusal_of(tmp_path, make({CONFIG: b"{}", WEIGHTS: b"\0" * 50_000_000}))
    assert refusal.code == "adapter_too_large"
    assert (tmp_path / "into" / WEIGHTS).stat().st_size <= LIMIT


def test_a_config_bomb_is_stopped_at_its_own_limit(tmp_path: Path, make: Make) -> None:
    refusal = refusal_of(tmp_path, make({CONFIG: b" " * 70_000, WEIGHTS: b""}))
    assert (refusal.code, refusal.param) == ("adapter_too_large", CONFIG)


def test_what_is_skipped_in_a_tar_counts_too(tmp_path: Path) -> None:
    refusal = refusal_of(tmp_path, tar_of({"junk": b"\0" * 50_000_000, **PAIR}, mode="w:gz"))
    assert refusal.code == "adapter_too_large"


def test_a_gzip_bomb_behind_the_tar_is_stopped(tmp_path: Path) -> None:
    refusal = refusal_of(tmp_path, gzip.compress(tar_of(PAIR) + b"\0" * 50_000_000))
    assert refusal.code == "adapter_too_large"


def test_weights_of_exactly_the_limit_are_taken(tmp_path: Path, make: Make) -> None:
    files = {CONFIG: b"{}", WEIGHTS: os.urandom(5000)}
    assert unpacked(tmp_path, make(files), limit=5000)[WEIGHTS] == files[WEIGHTS]
    assert refusal_of(tmp_path, make(files), limit=4999).code == "adapter_too_large"


def test_too_many_members_are_refused(tmp_path: Path, make: Make) -> None:
    files = {**{str(number): b"" for number in range(MAX_MEMBERS)}, **PAIR}
    refusal = refusal_of(tmp_path, make(files))
    assert refusal.code == "invalid_archive"
    assert "members" in refusal.message


def test_a_huge_zip_directory_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    refusal = refusal_of(tmp_path, zip_of({f"{number:0>200}": b"" for number in range(5000)}))
    assert "directory" in refusal.message


@pytest.mark.parametrize("share", [0.01, 0.5, 0.9])
def test_a_cut_archive_is_refused(tmp_path: Path, make: Make, share: float) -> None:
    raw = make({CONFIG: b"{}", WEIGHTS: os.urandom(20_000)})
    cut = raw[: int(len(raw.rstrip(b"\0")) * share)]
    assert refusal_of(tmp_path, cut).code in {"invalid_archive", "missing_file"}


def test_a_flipped_bit_in_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    for raw in (zip_of({CONFIG: b"{}", WEIGHTS: os.urandom(5000)}), tar_of(PAIR, mode="w:gz")):
        changed = bytearray(raw)
        changed[len(raw) // 3] ^= 0x10
        assert refusal_of(tmp_path, bytes(changed)).code == "invalid_archive"


@pytest.mark.parametrize("raw", NO_ARCHIVES)
def test_what_is_no_archive_is_refused(tmp_path: Path, raw: bytes) -> None:
    assert refusal_of(tmp_path, raw).code in {"invalid_archive", "missing_file"}


def test_a_target_that_is_in_the_way_is_our_trouble_not_the_senders(tmp_path: Path) -> None:
    (tmp_path / "archive").write_bytes(tar_of(PAIR))
    with pytest.raises(StoreError):
        unpack(tmp_path / "archive", tmp_path / "none", LIMIT)


def test_a_full_disk_is_our_trouble_not_the_senders(tmp_path: Path, make: Make) -> None:
    (tmp_path / "archive").write_bytes(make({CONFIG: b"{}" * 50, WEIGHTS: os.urandom(5000)}))
    (tmp_path / "into").mkdir()
    with no_file_above(50), pytest.raises(StoreError, match="File too large"):
        unpack(tmp_path / "archive", tmp_path / "into", LIMIT)


SEEDS = [maker({f"a/{name}": content for name, content in PAIR.items()}) for maker in MAKERS.values()]


def tree(folder: Path) -> dict[str, bytes]:
    """Everything below a folder, links not followed."""
    return {
        str(path.relative_to(folder)): b"" if path.is_dir() else path.read_bytes()
        for path in folder.rglob("*")
        if not path.is_symlink()
    }


def unpacked_within(folder: Path, raw: bytes) -> dict[str, bytes] | None:
    """The files that came out, or None for a refusal; either way nothing else was written, nor too much."""
    target = folder / "outer" / "into"
    shutil.rmtree(folder / "outer", ignore_errors=True)
    target.mkdir(parents=True)
    (folder / "archive").write_bytes(raw)
    before = tree(folder)
    accepted = True
    try:
        unpack(folder / "archive", target, LIMIT)
    except AdapterInvalid:
        accepted = False
    written = {path.name: path.read_bytes() for path in target.iterdir() if path.is_file()}
    assert before == {name: content for name, content in tree(folder).items() if "into/" not in name}
    assert written.keys() <= PAIR.keys()
    assert sum(map(len, written.values())) <= LIMIT + MAX_CONFIG_BYTES
    return written if accepted else None


def is_ordinary(members: list[Member]) -> bool:
    """Plain files in plain places, each once, both of the adapter's in one folder."""
    names = [posixpath.normpath(member.name) for member in members]
    files = [name for name in names if posixpath.basename(name) in PAIR]
    return (
        all(member.kind == tarfile.REGTYPE for member in members)
        and all(not re.search(r"(^|/)\.\.(/|$)|^/|\\|^[^/]*:", member.name) for member in members)
        and len(set(names)) == len(names)
        and sorted(map(posixpath.basename, files)) == sorted(PAIR)
        and len({posixpath.dirname(file) for file in files}) == 1
        and all(file.count("/") <= 1 for file in files)
        and sum(len(member.content) for member in members) <= LIMIT
        and all(len(member.content) <= MAX_CONFIG_BYTES for member in members if CONFIG in member.name)
    )


PACKERS: list[Callable[[list[Member]], bytes]] = [
    tar_with,
    lambda members: tar_with(members, tarfile.GNU_FORMAT),
    lambda members: gzip.compress(tar_with(members, tarfile.USTAR_FORMAT), 1),
    zip_with,
    lambda members: zip_with(members, zipfile.ZIP_STORED),
]


@hazards.examples(200)
def test_whatever_is_packed_only_the_adapters_two_files_come_out_byte_for_byte(
    tmp_path: Path, num_examples: int
) -> None:
    num_accepted = 0

    def check(members: list[Member], pack: Callable[[list[Member]], bytes]) -> None:
        nonlocal num_accepted
        written = unpacked_within(tmp_path, pack(members))
        if written is None:
            assert not is_ordinary(members)
            return
        num_accepted += 1
        assert written.keys() == PAIR.keys()
        for file, content in written.items():
            assert content in [
                member.content for member in members if posixpath.basename(member.name.rstrip("/")) == file
            ]
        assert all(member.is_plain for member in members)
        assert not any(".." in member.name.split("/") or member.name.startswith("/") for member in members)

    hazards.generate("D", num_examples, check, member_lists(), st.sampled_from(PACKERS))
    assert num_accepted > num_examples / 20


@hazards.examples(400)
def test_archives_that_are_broken_or_lie_write_nothing_else_and_raise_nothing_else(
    tmp_path: Path, num_examples: int
) -> None:
    def check(raw: bytes) -> None:
        unpacked_within(tmp_path, raw)

    broken = st.sampled_from(SEEDS).flatmap(lambda seed: flipped(seed) | cut_or_spliced(seed))
    hazards.generate("D", num_examples, check, st.one_of(broken, lying_tar(), lying_zip()))


@hazards.examples(100)
def test_a_whole_archive_cut_anywhere_gives_no_other_files(tmp_path: Path, num_examples: int) -> None:
    """Behind the last member a tar may end; before that nothing may be missing."""

    def check(seed: bytes, share: float) -> None:
        written = unpacked_within(tmp_path, seed[: int(share * len(seed))])
        assert written in (None, PAIR)

    hazards.generate("D", num_examples, check, st.sampled_from(SEEDS), st.floats(0, 1))
