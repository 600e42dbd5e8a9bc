"""Builds tars and zips, hostile ones too."""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile

from tunefleet.core import CONFIG_FILE as CONFIG
from tunefleet.core import WEIGHTS_FILE as WEIGHTS


def tar_of(
    files: dict[str, bytes], *extra: tarfile.TarInfo, mode: str = "w", format: int = tarfile.PAX_FORMAT
) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, format=format) as archive:  # type: ignore[call-overload]
        for info in extra:
            archive.addfile(info)
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def zip_of(files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def zip_with_a_link(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO(zip_of(files))
    with zipfile.ZipFile(out, "a") as archive:
        link = zipfile.ZipInfo("link")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    return out.getvalue()


def encrypted_zip(files: dict[str, bytes]) -> bytes:
    """Its last member says that it is encrypted."""
    raw = bytearray(zip_of(files))
    raw[raw.rfind(b"PK\x01\x02") + 8] |= 1
    return bytes(raw)


BAD_NAMES = [
    *("../adapter_config.json", "/adapter_config.json", "a/../../adapter_config.json", "/etc/passwd", ".."),
    *("a/../adapter_config.json", "..\\x", "C:\\x", "C:/x", "a\\..\\b"),
]

LINKS = [
    (special(CONFIG, tarfile.SYMTYPE, "/etc/passwd"), "symbolic link"),
    (special("other", tarfile.SYMTYPE, "/etc"), "symbolic link"),
    (special(WEIGHTS, tarfile.LNKTYPE, CONFIG), "hard link"),
    (special("device", tarfile.CHRTYPE), "device"),
    (special("device", tarfile.BLKTYPE), "device"),
    (special("pipe", tarfile.FIFOTYPE), "FIFO"),
    (special("sparse", tarfile.GNUTYPE_SPARSE), "sparse"),
    (special("odd", b"Z"), "unknown type"),
]

NO_ARCHIVES = [
    *(b"", b"x", b"{}", b"\0" * 512, b"\0" * 10240, b"x" * 2000, b"BZh9", b"\xfd7zXZ\0"),
    *(
        b"PK",
        b"PK\x03\x04",
        b"PK\x05\x06" + b"\0" * 18,
        b"\x1f\x8b",
        gzip.compress(b"", mtime=0),
        gzip.compress(b"hello", mtime=0),
    ),
]
