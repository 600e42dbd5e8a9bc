"""Reading a tar from a stranger, front to back.

Not ``tarfile``: before Python 3.13.6 it loops for ever on a negative size (CVE-2025-8194), it recurses for
each extended header, and it reads extended headers of any size into memory. This knows what tar programs
write for plain files and folders (ustar, pax paths and sizes, GNU long names), refuses everything else, and
never holds more than a header.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

BLOCK = 512
MAX_EXTENDED_BYTES = 64 * 1024
MAX_MEMBERS = 1000
CHUNK_BYTES = 256 * 1024

_FILE_TYPES = b"0\x007"
_REFUSED_TYPES = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a FIFO",
    b"S": "a sparse file",
}


class TarInvalid(ValueError):
    """Not a tar of plain files and folders."""


class Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class TarMember(NamedTuple):
    """A file or folder. Use ``chunks`` before the next member is asked for; what is left is skipped."""

    name: str
    is_folder: bool
    size_bytes: int
    chunks: Iterator[bytes]


class _Extended(NamedTuple):
    """What extended headers say about the member that follows."""

    name: str | None = None
    size_bytes: int | None = None


def read_members(stream: Readable) -> Iterator[TarMember]:
    """The members in order.

    Raises:
        TarInvalid: bytes that are no tar, a cut, a link, a device, too many members.
    """
    extended = _Extended()
    num_members = 0
    while (header := _read_header(stream)) is not None:
        num_members += 1
        if num_members > MAX_MEMBERS:
            raise TarInvalid(f"it has more than {MAX_MEMBERS} members")
        kind, size = header[156:157], _octal(header[124:136])
        if kind in b"xgLK":
            extended = _merge(extended, kind, _read_extended(stream, size))
            continue
        name = extended.name if extended.name is not None else _name(header)
        if kind not in _FILE_TYPES and kind != b"5":
            raise TarInvalid(f"{name[:120]!a} is {_REFUSED_TYPES.get(kind, 'of an unknown type')}")
        size = size if extended.size_bytes is None else extended.size_bytes
        extended = _Extended()
        chunks = _chunks(stream, size)
        yield TarMember(name, kind == b"5" or name.endswith("/"), size, chunks)
        for _ in chunks:
            pass
        _read_exactly(stream, -size % BLOCK)
    if not num_members:
        raise TarInvalid("it is empty")


def _read_header(stream: Readable) -> bytes | None:
    """One header block, or None at the end, which is a block of zeros or of nothing."""
    block = stream.read(BLOCK)
    if not block or not any(block):
        return None
    if len(block) < BLOCK:
        block += _read_exactly(stream, BLOCK - len(block))
    if sum(block[:148]) + 8 * 32 + sum(block[156:]) != _octal(block[148:156]):
        raise TarInvalid("a header's checksum is wrong")
    return block


def _read_extended(stream: Readable, size: int) -> bytes:
    if size > MAX_EXTENDED_BYTES:
        raise TarInvalid(f"an extended header has {size} bytes")
    content = _read_exactly(stream, size)
    _read_exactly(stream, -size % BLOCK)
    return content


def _merge(extended: _Extended, kind: bytes, content: bytes) -> _Extended:
    if kind == b"L":
        return extended._replace(name=_text(content.rstrip(b"\0")))
    if kind != b"x":
        return extended  # global attributes and link targets: nothing we use
    records = _pax_records(content)
    if any(key.startswith("GNU.sparse") for key in records):
        raise TarInvalid("it holds a sparse file")
    size = records.get("size")
    if size is not None and not (size.isascii() and size.isdigit() and len(size) <= 15):
        raise TarInvalid("an extended header's size is not a number")
    return _Extended(records.get("path", extended.name), int(size) if size else extended.size_bytes)


def _pax_records(content: bytes) -> dict[str, str]:
    """Records of ``<length> <key>=<value>\\n``; only the keys that we need, as others may not be UTF-8."""
    records: dict[str, str] = {}
    position = 0
    while position < len(content):
        digits = content[position : position + 8].split(b" ", 1)[0]
        if not digits.isdigit() or int(digits) < 5 or position + int(digits) > len(content):
            raise TarInvalid("an extended header is malformed")
        record = content[position + len(digits) + 1 : position + int(digits) - 1]
        key, _, value = record.partition(b"=")
        if key in (b"path", b"size") or key.startswith(b"GNU.sparse"):
            records[_text(key)] = _text(value)
        position += int(digits)
    return records


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    prefix = header[345:500].split(b"\0", 1)[0] if header[257:263] == b"ustar\0" else b""
    return _text(prefix + b"/" + name if prefix else name)


def _text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise TarInvalid("a name is not UTF-8") from error


def _octal(field: bytes) -> int:
    digits = field.strip(b" \0")
    if digits.strip(b"01234567"):
        raise TarInvalid("a header's number is not octal")
    return int(digits or b"0", 8)


def _chunks(stream: Readable, size: int) -> Iterator[bytes]:
    while size:
        chunk = _read_exactly(stream, min(size, CHUNK_BYTES))
        size -= len(chunk)
        yield chunk


def _read_exactly(stream: Readable, size: int) -> bytes:
    content = stream.read(size) if size else b""
    while len(content) < size:
        more = stream.read(size - len(content))
        if not more:
            raise TarInvalid("it is cut off")
        content += more
    return content
