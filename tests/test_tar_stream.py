from __future__ import annotations

import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunefleet.adapters_store.tar_stream import MAX_EXTENDED_BYTES, TarInvalid, read_members

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0/"), min_size=1, max_size=150)
NAMES = st.lists(TEXT, min_size=1, max_size=3).map("/".join).filter(lambda name: name not in (".", ".."))


def members(raw: bytes) -> list[tuple[str, bytes]]:
    return [(member.name, b"".join(member.chunks)) for member in read_members(io.BytesIO(raw))]


def header(name: bytes = b"file", size: bytes = b"0", kind: bytes = b"0") -> bytes:
    block = bytearray(tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT)[:512])
    block[:100] = name.ljust(100, b"\0")
    block[124:136] = size.rjust(11, b"0") + b"\0" if len(size) < 12 else size
    block[156:157] = kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


@given(st.dictionaries(NAMES, st.binary(max_size=1500), min_size=1, max_size=4), st.sampled_from([1, 2]))
@settings(max_examples=100, deadline=None)
def test_what_tarfile_writes_is_read_equal(files: dict[str, bytes], format: int) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    assert list(files.items()) == members(out.getvalue())


def test_content_that_nobody_read_is_skipped() -> None:
    raw = header(b"a", b"3") + b"abc".ljust(512, b"\0") + header(b"b")
    assert [member.name for member in read_members(io.BytesIO(raw))] == ["a", "b"]


def test_folders_are_told_apart() -> None:
    raw = header(b"a", kind=b"5") + header(b"b/") + header(b"c")
    assert [member.is_folder for member in read_members(io.BytesIO(raw))] == [True, True, False]


def record(text: bytes) -> bytes:
    return b"%d %s\n" % (len(text) + 4, text)


def pax(records: bytes) -> bytes:
    return header(b"pax", b"%o" % len(records), b"x") + records.ljust(512, b"\0")


def test_an_extended_header_counts_for_one_member_only() -> None:
    raw = pax(b"14 path=other\n") + header(b"a") + header(b"b")
    assert [name for name, _ in members(raw)] == ["other", "b"]


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"", "empty"),
        (b"\0" * 1024, "empty"),
        (b"x" * 512, "checksum|octal"),
        (header()[:100], "cut off"),
        (header(size=b"1000"), "cut off"),
        (header(size=b"\xff" * 12), "octal"),  # a negative size: CVE-2025-8194
        (header(size=b"\x80" + b"\0" * 10 + b"\x05"), "octal"),
        (header(size=b"-1"), "octal"),
        (header(b"\xff"), "UTF-8"),
        (header(kind=b"x", size=b"%o" % (MAX_EXTENDED_BYTES + 1)), "extended header has"),
        (header(kind=b"L", size=b"%o" % 10**9), "extended header has"),
        (pax(b"nonsense") + header(), "malformed"),
        (pax(b"0 path=x\n") + header(), "malformed"),
        (pax(b"999 path=x\n") + header(), "malformed"),
        (pax(record(b"size=-00001")) + header(), "not a number"),
        (pax(record(b"size=1e9000")) + header(), "not a number"),
        (pax(record(b"size=99999999999999999999")) + header(), "not a number"),
        (pax(record(b"path=a\xffbcd")) + header(), "UTF-8"),
        (pax(record(b"GNU.sparse.major=1")) + header(), "sparse"),
        (header() * 1001, "more than 1000"),
        (pax(record(b"path=abcd")) * 1001, "more than 1000"),
    ],
)
def test_odd_tars_are_refused_with_their_reason(raw: bytes, problem: str) -> None:
    with pytest.raises(TarInvalid, match=problem):
        members(raw)
