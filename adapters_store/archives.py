"""Tar and zip uploads of a PEFT folder, from strangers.

Only the adapter's two files are ever written, under their own names: nothing in the archive chooses a path.
Sizes are counted on real output, never believed.
"""

from __future__ import annotations

import gzip
import stat
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from tunefleet.adapters_store.lora_config import MAX_CONFIG_BYTES
from tunefleet.adapters_store.staging import create_file, write_all
from tunefleet.adapters_store.strict_json import shown
from tunefleet.adapters_store.tar_stream import CHUNK_BYTES, MAX_MEMBERS, TarInvalid, read_members
from tunefleet.adapters_store.validation import PICKLE_FILES, refused_pickle
from tunefleet.core import CONFIG_FILE, WEIGHTS_FILE
from tunefleet.errors import AdapterInvalid, StoreError

MAX_DIRECTORY_BYTES = 1024 * 1024  # of a zip: it is parsed as a whole

_END = b"PK\x05\x06"
_END_BYTES = 22
_ZIP64_LOCATOR = b"PK\x06\x07"


def unpack(path: Path, into: Path, max_bytes: int) -> None:
    """Writes the adapter's two files, out of a tar, tar.gz or zip, into the folder ``into``.

    The files may be at the top or in one folder; anything else in the archive is read over and never written.

    Raises:
        AdapterInvalid: ``invalid_archive``, ``adapter_too_large``, ``missing_file`` or ``pickle_refused``.
    """
    target = _Target(into, max_bytes)
    try:
        with path.open("rb") as file:
            magic = file.read(4)
            file.seek(0)
            if magic.startswith(b"PK"):
                _unpack_zip(file, target)
            elif magic.startswith(b"\x1f\x8b"):
                with gzip.GzipFile(fileobj=file) as unzipped:
                    _unpack_tar(unzipped, target)
            else:
                _unpack_tar(file, target)
    except (AdapterInvalid, StoreError):
        raise
    except (TarInvalid, zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
        raise _invalid(f"it is not a whole tar, tar.gz or zip: {error}") from error
    except (ValueError, RuntimeError, NotImplementedError, OverflowError, IndexError, KeyError) as error:
        raise _invalid(f"it can't be read: {error}") from error  # what zipfile raises on odd bytes
    target.check_complete()


class _Target:
    """The folder being filled: which members are wanted, and how many bytes may still come."""

    def __init__(self, into: Path, max_bytes: int) -> None:
        self._into = into
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._seen: set[str] = set()
        self._found: dict[str, str] = {}  # file -> its name in the archive
        self._pickle: str | None = None

    def accepts(self, name: str, *, is_folder: bool) -> str | None:
        """Checks a member's name; returns which of the two files it is, or None for one to skip."""
        parts = _checked_parts(name)
        path = "/".join(parts)
        if path in self._seen and not is_folder:
            raise _invalid(f"{shown(name)} is there twice", name)
        self._seen.add(path)
        file = parts[-1] if parts and not is_folder else ""
        if file in PICKLE_FILES:
            self._pickle = file
        if file not in (CONFIG_FILE, WEIGHTS_FILE):
            return None
        if file in self._found:
            raise _invalid(
                f"it holds two adapters, {shown(self._found[file])} and {shown(name)}: send one", name
            )
        if len(parts) > 2:
            raise _invalid(f"{shown(name)} is deeper than one folder", name)
        self._found[file] = path
        return file

    def write(self, file: str, chunks: Iterator[bytes]) -> None:
        limit = MAX_CONFIG_BYTES if file == CONFIG_FILE else self._max_bytes
        written = 0
        with create_file(self._into / file) as out:
            for chunk in self._counted(chunks):
                written += len(chunk)
                if written > limit:
                    raise _too_large(file, limit)
                write_all(out, chunk)

    def _counted(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        """Passes chunks on while the sum of everything unpacked stays below the limit."""
        for chunk in chunks:
            self._num_bytes += len(chunk)
            if self._num_bytes > self._max_bytes + MAX_CONFIG_BYTES:
                raise _too_large("the unpacked archive", self._max_bytes)
            yield chunk

    def skip(self, chunks: Iterator[bytes]) -> None:
        for _ in self._counted(chunks):
            pass

    def check_complete(self) -> None:
        missing = [file for file in (CONFIG_FILE, WEIGHTS_FILE) if file not in self._found]
        if WEIGHTS_FILE in missing and self._pickle:
            raise refused_pickle(self._pickle)
        if missing:
            raise AdapterInvalid(
                f"the archive holds no {missing[0]}: an adapter is {CONFIG_FILE} and {WEIGHTS_FILE}, "
                "at the top or in one folder",
                code="missing_file",
                param=missing[0],
            )
        folders = {path.rpartition("/")[0] for path in self._found.values()}
        if len(folders) != 1:
            raise _invalid(f"{CONFIG_FILE} and {WEIGHTS_FILE} are not in the same folder")


def _unpack_tar(stream: BinaryIO | gzip.GzipFile, target: _Target) -> None:
    for member in read_members(stream):
        file = target.accepts(member.name, is_folder=member.is_folder)
        if file:
            target.write(file, member.chunks)
        else:
            target.skip(member.chunks)
    target.skip(iter(lambda: stream.read(CHUNK_BYTES), b""))  # to the end: gzip's checksum stands there


def _unpack_zip(stream: BinaryIO, target: _Target) -> None:
    _check_directory(stream)
    with zipfile.ZipFile(stream) as archive:
        members = archive.infolist()
        if len(members) > MAX_MEMBERS:
            raise _invalid(f"it has {len(members)} members, the limit is {MAX_MEMBERS}")
        for member in members:
            _check_zip_member(member)
            file = target.accepts(member.filename, is_folder=member.is_dir())
            if file:
                with archive.open(member) as content:
                    target.write(file, iter(lambda: content.read(CHUNK_BYTES), b""))


def _check_directory(stream: BinaryIO) -> None:
    """The size of a zip's directory, before zipfile makes an object of each of its entries."""
    stream.seek(0, 2)
    size = stream.tell()
    tail_start = max(0, size - _END_BYTES - 20)
    stream.seek(tail_start)
    tail = stream.read()
    end = tail[-_END_BYTES:]
    if not end.startswith(_END) or end[-2:] != b"\0\0":
        raise _invalid("it is a zip with a comment, or cut off")
    if tail[:-_END_BYTES].startswith(_ZIP64_LOCATOR):
        raise _invalid("zip64 is not needed for an adapter and not read")
    if int.from_bytes(end[12:16], "little") > MAX_DIRECTORY_BYTES:
        raise _invalid(f"its directory is larger than {MAX_DIRECTORY_BYTES} bytes")
    stream.seek(0)


def _check_zip_member(member: zipfile.ZipInfo) -> None:
    name, kind = member.filename, stat.S_IFMT(member.external_attr >> 16)
    if member.flag_bits & 0x1:
        raise _invalid(f"{shown(name)} is encrypted", name)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise _invalid(f"{shown(name)} is a link or a device", name)
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise _invalid(f"{shown(name)} is compressed by another method than deflate", name)


def _checked_parts(name: str) -> list[str]:
    """The parts of a member's path, without '.'; refuses names that lead anywhere else."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if name.startswith("/") or ".." in parts or "\\" in name or "\0" in name or (parts and ":" in parts[0]):
        raise _invalid(f"{shown(name)} leads out of the archive", name)
    return parts


def _too_large(what: str, limit: int) -> AdapterInvalid:
    return AdapterInvalid(f"{what} is larger than {limit} bytes", code="adapter_too_large", param=what)


def _invalid(problem: str, param: str = "archive") -> AdapterInvalid:
    return AdapterInvalid(f"the archive is refused: {problem}", code="invalid_archive", param=param[:200])
