"""Bytes that are no safetensors file that we read, each with what its refusal says."""

from __future__ import annotations

import json

import adapter_factory as factory
from tunefleet.adapters_store.tensors import MAX_HEADER_BYTES


def entry(dtype: str = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def one(name: str = "t", content: int = 8, **fields: object) -> bytes:
    return factory.with_header({name: entry(**fields)}, b"\0" * content)  # type: ignore[arg-type]


def two(first: tuple[int, int], second: tuple[int, int], content: int) -> bytes:
    return factory.with_header({"t": entry(offsets=first), "u": entry(offsets=second)}, b"\0" * content)


def length(value: int, rest: bytes = b"") -> bytes:
    return value.to_bytes(8, "little") + rest


MALFORMED = {
    "empty": (b"", "0 bytes"),
    **{f"{count} bytes": (b"x" * count, f"{count} bytes") for count in range(1, 8)},
    "only a length": (length(2), "8 bytes"),
    "header of 2**64 - 1": (length(2**64 - 1, b"{}" * 9), "header would be"),
    "header of 101 MB": (length(101_000_000, b"{}" * 9), "header would be"),
    "header of 1 MiB + 1": (length(MAX_HEADER_BYTES + 1, b"{" + b" " * MAX_HEADER_BYTES), "header would be"),
    "header of 2**63": (length(2**63, b"{}" * 9), "header would be"),
    "header of nothing": (length(0, b"{}"), "doesn't fit"),
    "header longer than the file": (length(100, b"{}"), "doesn't fit"),
    "a pickle, renamed": (b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00}\x94.", "header would be"),
    "a zip, renamed": (b"PK\x03\x04" + b"\0" * 30, "header"),
    "not JSON": (factory.with_header(b"{nonsense", b""), "not valid JSON"),
    "a list": (factory.with_header(b"[]", b""), "start with"),
    "byte order mark": (factory.with_header(b"\xef\xbb\xbf{}", b""), "start with"),
    "not UTF-8": (factory.with_header(b'{"\xff": 1}', b""), "not UTF-8"),
    "deep JSON": (factory.with_header(b'{"t":' + b"[" * 100_000, b""), "deeper|lists and objects"),
    "metadata not an object": (factory.with_header({"__metadata__": [1]}, b""), "__metadata__"),
    "metadata not text": (factory.with_header({"__metadata__": {"a": 1}}, b""), "__metadata__"),
    "same name twice": (
        factory.with_header(b'{"t":%s,"t":%s}' % ((json.dumps(entry()).encode(),) * 2), b"\0" * 8),
        "'t' twice",
    ),
    "more than 20,000 tensors": (
        factory.with_header(b"{" + b",".join(b'"%d":1' % number for number in range(20_001)) + b"}", b""),
        "20001 tensors",
    ),
    "a hundred thousand names": (
        factory.with_header(b"{" + b",".join(b'"%d":1' % number for number in range(100_000)) + b"}", b""),
        "header would be|tensors",
    ),
    "entry is not an object": (factory.with_header({"t": 1}, b""), "t must have"),
    "entry has a field more": (factory.with_header({"t": {**entry(), "x": 1}}, b"\0" * 8), "t must have"),
    "entry has a field less": (
        factory.with_header({"t": {"dtype": "F32", "shape": [2]}}, b""),
        "t must have",
    ),
    "name with NUL": (one("a\0b"), "tensor name"),
    "name with a newline": (one("a\nb"), "tensor name"),
    "name not ASCII": (one("ä"), "tensor name"),
    "name empty": (one(""), "tensor name"),
    "name of 100 kB": (one("n" * 100_000), "tensor name"),
    "dtype a number": (one(dtype=4), "t has dtype"),
    "shape not a list": (one(shape="2"), "t has a shape"),
    "shape with a float": (one(shape=[2.0]), "t has a shape"),
    "shape with a bool": (one(shape=[True, 2]), "t has a shape"),
    "shape with a negative": (one(shape=[-2]), "t has a shape"),
    "shape with a zero": (one(shape=[0], offsets=[0, 0], content=0), "t has a shape"),
    "shape of 10,000 dimensions": (one(shape=[1] * 10_000, offsets=[0, 4], content=4), "t has a shape"),
    "shape whose product overflows": (one(shape=[2**31 - 1] * 8), "t needs"),
    "shape of 2**40": (one(shape=[2**40]), "t has a shape"),
    "offsets are floats": (one(offsets=[0.0, 8.0]), "t has data_offsets"),
    "offsets reversed": (one(offsets=[8, 0]), "t has data_offsets"),
    "offsets negative": (one(offsets=[-8, 0]), "t has data_offsets"),
    "offsets of three": (one(offsets=[0, 4, 8]), "t has data_offsets"),
    "offsets don't fit the shape": (one(offsets=[0, 4], content=4), "t needs 8 bytes"),
    "overlap": (two((0, 8), (4, 12), 12), "u overlaps"),
    "same bytes twice": (two((0, 8), (0, 8), 8), "overlaps"),
    "hole before": (one(offsets=[8, 16], content=16), "t leaves a hole"),
    "hole between": (two((0, 8), (12, 20), 20), "u leaves a hole"),
    "trailing bytes": (one(content=9), "bytes behind"),
    "trailing bytes, no tensor": (factory.with_header({}, b"x"), "bytes behind"),
    "cut off": (one(content=7), "cut off"),
    "offsets far behind the file": (one(shape=[2**30], offsets=[0, 2**32]), "cut off"),
}

REFUSED_DTYPES = ["F64", "F8_E4M3", "F8_E5M2", "I64", "I32", "I8", "U8", "BOOL", "C64", "F4", "f32", ""]
